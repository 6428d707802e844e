"""Networks in other people's styles, tiny and in float64, each with the table of its tree: this project defined none.

Their norms and widths are arguments, as a user has to make them who wants to swap a norm. And tables with one mistake.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prenorm_jax import PrenormError, convert_foreign
from prenorm_jax.equivalence.role_table import Row, norm_of, read_rows

D, H, K, F = 8, 2, 4, 8  # so wide that shapes tell little
EPSILON = 1e-3
LAYER_NORM = functools.partial(nn.LayerNorm, epsilon=EPSILON)


class ShiftedRMSNorm(nn.Module):
    """LayerNorm's parameters without its centring: what keeps γ and β."""

    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + self.epsilon) * scale + bias


PLAIN = functools.partial(nn.RMSNorm, epsilon=EPSILON, use_scale=False)
NARROW = functools.partial(nn.RMSNorm, epsilon=EPSILON * D / (D - 1), use_scale=False)


# --- A ViT by flax's own attention, with a class token, registers and LayerScale; head over the class token. ---


class ViTLayer(nn.Module):
    norm: Callable[..., Any]
    width: int
    layer_scale: bool

    @nn.compact
    def __call__(self, x):
        def scaled(name, y):
            return y * self.param(name, nn.initializers.ones, (self.width,)) if self.layer_scale else y

        mixed = nn.MultiHeadDotProductAttention(H, qkv_features=H * K, out_features=self.width, name="mha")(
            self.norm(name="pre_attn")(x)
        )
        x = x + scaled("gamma_attn", mixed)
        h = nn.gelu(nn.Dense(F, name="expand")(self.norm(name="pre_mlp")(x)), approximate=False)
        return x + scaled("gamma_mlp", nn.Dense(self.width, name="contract")(h))


class ViT(nn.Module):
    norm: Callable[..., Any] = LAYER_NORM
    width: int = D
    layer_scale: bool = True

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(self.width, (2, 2), (2, 2), name="stem")(images)
        x = x.reshape(len(x), -1, self.width)
        extra = self.param("prefix", nn.initializers.normal(1.0), (3, self.width))  # a class token and two registers
        x = jnp.concatenate([jnp.broadcast_to(extra, (len(x), 3, self.width)), x], 1)
        x = x + self.param("where", nn.initializers.normal(1.0), (1, x.shape[1], self.width))
        for i in range(2):
            x = ViTLayer(self.norm, self.width, self.layer_scale, name=f"layer{i}")(x)
        return nn.Dense(5, name="classify")(self.norm(name="post")(x)[:, 0])


VIT = """
stem/kernel                              patch patch channel write
stem/bias                                write
prefix                                   token write
where                                    other position write
layer{i}/{pre_attn,pre_mlp}/{scale,bias}  {scale,bias}
layer{i}/mha/{query,key,value}/kernel    read heads head_dim   layer{i}/pre_attn
layer{i}/mha/{query,key,value}/bias      heads head_dim
layer{i}/mha/out/kernel                  heads head_dim write
layer{i}/mha/out/bias                    write
layer{i}/gamma_attn                      layer_scale           layer{i}/mha/out/kernel layer{i}/mha/out/bias
layer{i}/expand/kernel                   read mlp              layer{i}/pre_mlp
layer{i}/expand/bias                     mlp
layer{i}/contract/kernel                 mlp write
layer{i}/contract/bias                   write
layer{i}/gamma_mlp                       layer_scale           layer{i}/contract/kernel layer{i}/contract/bias
post/{scale,bias}                        {scale,bias}
classify/kernel                          read class            post
classify/bias                            class
"""


# --- A GPT with its own names: one matrix for q, k, v, without biases; a norm over each head; a tied head. ---


class GPT(nn.Module):
    norm: Callable[..., Any] = LAYER_NORM
    centred: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = self.param("E", nn.initializers.normal(1.0), (11, D))
        x = embed[tokens] + self.param("P", nn.initializers.normal(1.0), (7, D))[: tokens.shape[1]]
        if self.centred:  # at run time: the tied table is raw
            x = x - x.mean(-1, keepdims=True)
        causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        for i in range(2):
            y = self.normalise(x, f"ln{i}_")  # one norm for both branches, which lie side by side
            w_in = self.param(f"W_in{i}", nn.initializers.normal(0.3), (3 * H * K + F, D))
            b_in = self.param(f"c{i}", nn.initializers.zeros, (3 * H * K + F,))
            q, k, v, h = jnp.split(y @ w_in.T + b_in, [H * K, 2 * H * K, 3 * H * K], -1)
            q, k, v = (z.reshape(*z.shape[:-1], H, K) for z in (q, k, v))
            scores = jnp.where(causal, jnp.einsum("bthk,bshk->bhts", q, k), -jnp.inf)
            mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
            w_out = self.param(f"W_out{i}", nn.initializers.normal(0.3), (H, K, D))
            w_down = self.param(f"W_down{i}", nn.initializers.normal(0.3), (F, D))
            x = x + jnp.einsum("bthk,hkd->btd", mixed, w_out) + jax.nn.relu(h) @ w_down
        return self.normalise(x, "") @ embed.T

    def normalise(self, x, name):
        scale = self.param(f"{name}g", nn.initializers.ones, (D,))
        bias = self.param(f"{name}b", nn.initializers.zeros, (D,))
        x = x - x.mean(-1, keepdims=True) if self.norm is LAYER_NORM else x
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale + bias


GPT_TABLE = """
E                 vocab raw                # tied
P                 position write
ln{i}_{g,b}       {scale,bias}             ln{i}
W_in{i}           other read               ln{i}      c{i}
c{i}              other
W_out{i}          heads head_dim write
W_down{i}         mlp write
{g,b}             raw                      # before a tied table
"""


# --- A regression over vectors in NNX, with keys and queries normed, and an encoder whose norm feeds two decoders. ---


class Cross(nnx.Module):
    """A block that reads its own stream and the encoder's normed output."""

    def __init__(self, norm, width, memory, biases, rngs):
        self.ln = norm(width, rngs)
        self.attn = nnx.MultiHeadAttention(
            H, width, H * K, width, in_kv_features=memory, normalize_qk=True, decode=False, rngs=rngs
        )
        self.ln_ff = norm(width, rngs)
        self.up = nnx.Linear(width, F, use_bias=biases, rngs=rngs)
        self.down = nnx.Linear(F, width, use_bias=False, rngs=rngs)

    def __call__(self, x, memory):
        x = x + self.attn(self.ln(x), memory, memory)
        return x + self.down(nnx.silu(self.up(self.ln_ff(x))))


class EncoderDecoder(nnx.Module):
    """An encoder D wide and a decoder D + 2 wide."""

    def __init__(self, norm, rngs, lost=0, biases=False):
        e, d = D - lost, D + 2 - lost
        self.enter, self.enter_decoder = nnx.Linear(3, e, rngs=rngs), nnx.Linear(3, d, rngs=rngs)
        self.ln_enc, self.up, self.down = norm(e, rngs), nnx.Linear(e, F, rngs=rngs), nnx.Linear(F, e, rngs=rngs)
        self.ln_memory = norm(e, rngs)
        self.blocks = nnx.List([Cross(norm, d, e, biases, rngs) for _ in range(2)])
        self.ln_out, self.out = norm(d, rngs), nnx.Linear(d, 4, use_bias=biases, rngs=rngs)

    def __call__(self, x):
        memory = self.enter(x)
        memory = memory + self.down(jnp.tanh(self.up(self.ln_enc(memory))))
        memory, y = self.ln_memory(memory), self.enter_decoder(x[:, ::-1])
        for block in self.blocks:
            y = block(y, memory)
        return self.out(self.ln_out(y))


def nnx_layer_norm(width, rngs):
    return nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs)


def nnx_plain(width, rngs):
    return nnx.RMSNorm(width, epsilon=EPSILON, use_scale=False, rngs=rngs)


def nnx_narrow(width, rngs):
    return nnx.RMSNorm(width, epsilon=EPSILON * (width + 1) / width, use_scale=False, rngs=rngs)


class NNXShiftedRMSNorm(nnx.Module):
    def __init__(self, width, rngs):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x):
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * self.scale[...] + self.bias[...]


ENCODER_DECODER = """
enter/kernel                                       channel write
enter/bias                                         write
enter_decoder/kernel                               channel write
enter_decoder/bias                                 write
{ln_enc,ln_memory,ln_out}/{scale,bias}             {scale,bias}
up/kernel                                          read mlp                     ln_enc
up/bias                                            mlp
down/kernel                                        mlp write
down/bias                                          write
blocks/{i}/{ln,ln_ff}/{scale,bias}                 {scale,bias}
blocks/{i}/attn/query/kernel                       read heads normed            blocks/{i}/ln
blocks/{i}/attn/key/kernel                         read heads normed            ln_memory
blocks/{i}/attn/{query,key}/bias                   heads normed
blocks/{i}/attn/{query_ln,key_ln}/scale            head_dim                     # of a norm over each head: it stays
blocks/{i}/attn/value/kernel                       read heads head_dim          ln_memory
blocks/{i}/attn/value/bias                         heads head_dim
blocks/{i}/attn/out/kernel                         heads head_dim write
blocks/{i}/attn/out/bias                           write
blocks/{i}/up/kernel                               read mlp                     blocks/{i}/ln_ff
blocks/{i}/down/kernel                             mlp write
out/kernel                                         read class                   ln_out
"""


# --- Stacked blocks: parameters of nn.scan, whose readers have no biases. ---


class ScanBlock(nn.Module):
    norm: Callable[..., Any]
    width: int
    biases: bool  # of what β is folded into; a key needs none

    @nn.compact
    def __call__(self, x, _):
        y = self.norm(name="ln")(x)
        q, v = (nn.Dense(H * K, use_bias=self.biases, name=name)(y) for name in ("q", "v"))
        k = nn.Dense(H * K, use_bias=False, name="k")(y)
        q, k, v = (z.reshape(*z.shape[:-1], H, K) for z in (q, k, v))
        mixed = nn.dot_product_attention(q, k, v).reshape(*x.shape[:-1], H * K)
        x = x + nn.Dense(self.width, name="o")(mixed)
        h = nn.relu(nn.Dense(F, use_bias=self.biases, name="wi")(self.norm(name="ln_ff")(x)))
        return x + nn.Dense(self.width, use_bias=False, name="wo")(h), None


class Stacked(nn.Module):
    norm: Callable[..., Any] = LAYER_NORM
    width: int = D
    biases: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, self.width, name="embed")(tokens)
        layers = nn.scan(ScanBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(self.norm, self.width, self.biases, name="layers")(x, None)
        return nn.Dense(11, name="head")(self.norm(name="final")(x))


STACKED = """
embed/embedding                 vocab write
layers/{ln,ln_ff}/{scale,bias}  layer {scale,bias}
layers/{q,v}/kernel             layer read heads   layers/ln
layers/k/kernel                 layer read heads   layers/ln   -   # without positions softmax removes a key's bias
layers/o/kernel                 layer heads write
layers/o/bias                   layer write
layers/wi/kernel                layer read mlp     layers/ln_ff
layers/wo/kernel                layer mlp write
final/{scale,bias}              {scale,bias}
head/kernel                     read class         final
head/bias                       class
"""


class Case(NamedTuple):
    """A network and what it becomes.

    Attributes:
      params: a tree of float64, of awkward numbers.
      apply: of LayerNorms.
      variants: (to, affine) -> the same with the norms swapped, of the converted tree.
    """

    params: Any
    table: str
    apply: Callable[[Any], Any]
    variants: dict[tuple[str, str], Callable[[Any], Any]]


def awkward(params: Any) -> Any:
    """γ of both signs, β of size 1, all that enters the stream far off zero."""
    rng = np.random.default_rng(0)

    def number(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        value = rng.normal(size=leaf.shape)
        if name.endswith(("scale", "g")) or "gamma" in name:
            value = np.exp(value) * rng.choice([-1, 1], leaf.shape)
        elif leaf.ndim > 1:
            value = value / np.sqrt(leaf.shape[-2]) + 0.1
        return jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(number, params)


def of_linen(table: str, inputs: np.ndarray, module: nn.Module, variants: dict) -> Case:
    params = awkward(module.init(jax.random.key(0), inputs)["params"])

    def apply(module: nn.Module) -> Callable[[Any], Any]:
        return jax.jit(lambda params: module.apply({"params": params}, inputs))

    return Case(params, table, apply(module), {key: apply(other) for key, other in variants.items()})


@functools.cache
def case(name: str) -> Case:
    rng = np.random.default_rng(1)
    tokens = rng.integers(11, size=(2, 6)).astype(np.int32)
    if name == "linen-vit":
        variants = {
            ("rmsnorm", "keep"): ViT(ShiftedRMSNorm),
            ("rmsnorm", "plain"): ViT(ShiftedRMSNorm),
            ("rmsnorm", "fold"): ViT(PLAIN, layer_scale=False),
            ("crmsnorm", "fold"): ViT(NARROW, D - 1, layer_scale=False),
            ("crmsnorm", "plain"): ViT(functools.partial(ShiftedRMSNorm, EPSILON * D / (D - 1)), D - 1),
        }
        return of_linen(VIT, rng.normal(size=(2, 4, 4, 3)), ViT(), variants)
    if name == "linen-gpt":
        variants = {("rmsnorm", affine): GPT(ShiftedRMSNorm, centred=True) for affine in ("keep", "plain")}
        return of_linen(GPT_TABLE, tokens, GPT(), variants)
    if name == "stacked":
        variants = {
            ("rmsnorm", "keep"): Stacked(ShiftedRMSNorm),
            ("rmsnorm", "fold"): Stacked(PLAIN, biases=True),
            ("crmsnorm", "fold"): Stacked(NARROW, D - 1, biases=True),
        }
        return of_linen(STACKED, tokens, Stacked(), variants)
    return _of_nnx(rng.normal(size=(2, 5, 3)), as_dict=name == "nnx-dict")


def _of_nnx(inputs: np.ndarray, as_dict: bool) -> Case:
    """Of an `nnx.State`, or of the nested dicts that it is, whose keys are numbers, too."""

    def apply(norm: Callable[..., Any], **options: Any) -> tuple[Any, Callable[[Any], Any]]:
        graph, state, rest = nnx.split(EncoderDecoder(norm, nnx.Rngs(0), **options), nnx.Param, ...)

        def of_dict(params: Any) -> jax.Array:
            own = jax.tree.map(lambda leaf: leaf, state)
            nnx.replace_by_pure_dict(own, params)
            return nnx.merge(graph, own, rest)(inputs)

        return state, jax.jit(of_dict if as_dict else lambda state: nnx.merge(graph, state, rest)(inputs))

    state, of_layer_norms = apply(nnx_layer_norm)
    params = awkward(state)
    if not as_dict:
        variants = {("rmsnorm", "keep"): apply(NNXShiftedRMSNorm)[1]}
        return Case(params, ENCODER_DECODER, of_layer_norms, variants)
    variants = {("rmsnorm", "fold"): apply(nnx_plain, biases=True)[1]}
    variants |= {("crmsnorm", "fold"): apply(nnx_narrow, lost=1, biases=True)[1]}
    return Case(nnx.to_pure_dict(params), ENCODER_DECODER, of_layer_norms, variants)


# --- Tables with one mistake. ---

PROBES = ("fold", "shift", "omission", "scale")


def refusals(params: Any, table: str, apply: Callable[[Any], Any]) -> dict[str, str]:
    """What each mutant of a table is refused with; "" for one that is not."""
    refused = {}
    for what, mutant in mutants(table):
        try:
            convert_foreign(params, mutant, apply)
            refused[what] = ""
        except PrenormError as error:
            refused[what] = str(error)
    return refused


def mutants(table: str) -> Iterator[tuple[str, str]]:
    """(what was done, the table) with each writer, reader, norm, feed and tie removed or swapped in turn."""
    rows = list(read_rows(table))
    norms = list(dict.fromkeys(norm_of(row) for row in rows if "scale" in row.axes))
    for i, row in enumerate(rows):
        found: dict[str, Row] = {}
        for word in {"write", "read", "layer_scale", *[word for word in row.axes if word.startswith("normed")]}:
            if word not in row.axes:
                continue
            at, others = row.axes.index(word), [j for j, axis in enumerate(row.axes) if axis not in (word, "layer")]
            swapped = {f"{word} on axis {j}": _swapped(row.axes, at, j) for j in others}
            removed = {f"no {word}": (*row.axes[:at], "other", *row.axes[at + 1 :])}
            found |= {what: row._replace(axes=axes) for what, axes in (removed | swapped).items()}
        if "read" in row.axes:
            found |= {f"fed by {norm}": row._replace(of=norm) for norm in [*norms, "-"] if norm != row.of}
            found["a writer"] = row._replace(axes=_renamed(row.axes, "read", "write"), of="", bias="")
        elif "write" in row.axes:
            axes = _renamed(row.axes, "write", "read")
            found |= {f"a reader of {norm}": row._replace(axes=axes, of=norm, bias="-") for norm in [*norms, "-"]}
        if (kind := next((word for word in ("scale", "bias") if word in row.axes), None)) is not None:
            found["no affine"] = row._replace(axes=_renamed(row.axes, kind, "other"))
            found["the other affine"] = row._replace(
                axes=_renamed(row.axes, kind, {"scale": "bias"}.get(kind, "scale"))
            )
            found |= {f"of {norm}": row._replace(of=norm) for norm in norms if norm != norm_of(row)}
        if "raw" in row.axes:
            found["no tie"] = row._replace(axes=_renamed(row.axes, "raw", "write"))
        for what, mutant in found.items():
            yield f"{row.leaf}: {what}", "\n".join(_line(other) for other in [*rows[:i], mutant, *rows[i + 1 :]])


def _swapped(axes: tuple[str, ...], i: int, j: int) -> tuple[str, ...]:
    changed = list(axes)
    changed[i], changed[j] = changed[j], changed[i]
    return tuple(changed)


def _renamed(axes: tuple[str, ...], word: str, other: str) -> tuple[str, ...]:
    return tuple(other if axis == word else axis for axis in axes)


def _line(row: Row) -> str:
    columns = [row.leaf, " ".join(row.axes), row.of, row.bias]
    return "  ".join(columns[: 4 if row.bias else 3 if row.of else 2])
