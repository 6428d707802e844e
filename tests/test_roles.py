"""Conversion by roles alone: networks of others, with several streams and epsilons; and a family that is added."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import numpy as np
import pytest
from common import relative

from prenorm_jax import PrenormError, build_model, convert_config, convert_params
from prenorm_jax.config import base_config, data_kind
from prenorm_jax.equivalence.convert import convert_tree
from prenorm_jax.equivalence.roles import Role, with_biases
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.linear import Linear, reader
from prenorm_jax.models.norms import Normed
from prenorm_jax.models.parameters import NormSite
from prenorm_jax.models.registry import FAMILIES
from prenorm_jax.models.transformer import StreamModel, blocks, end_embedding, enter_stream, make_norm, table
from prenorm_jax.train.run import Run
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.step import init_state, make_gradients, make_train_step

# An encoder and a decoder of one block each, in NumPy and written in another style: kernels are (out, in), the encoder
# is 6 wide and the decoder 8, each norm has an epsilon of its own, and one matrix, under a LayerScale and with no bias,
# reads the encoder's stream and writes the decoder's. The decoder's keys and values read what the encoder's final norm
# gives, queries and keys have a norm over each head, and the decoder's norms call their γ `weight`.
ENCODER, DECODER, EPSILONS = 6, 8, {"enc.ln": 1e-2, "enc.final": 1e-5, "dec.ln_self": 1e-1, "dec.ln_cross": 1e-6}
EPSILONS["dec.final"], HEAD = 1e-12, 4
SHAPES = {
    "enc.embed": (5, ENCODER),
    "enc.mlp.up": (7, ENCODER),
    "enc.mlp.down": (ENCODER, 7),
    "bridge": (DECODER, ENCODER),
    "dec.embed": (5, DECODER),
    "dec.self": (DECODER, DECODER),
    "dec.cross.q": (8, DECODER),
    "dec.cross.k": (8, ENCODER),
    "dec.cross.v": (8, ENCODER),
    "dec.cross.out": (DECODER, 8),
    "head": (3, DECODER),
}
READS = {  # leaf -> the norm that feeds it
    "enc.mlp.up": "enc.ln",
    "bridge": "enc.final",
    "dec.self": "dec.ln_self",
    "dec.cross.q": "dec.ln_cross",
    "dec.cross.k": "enc.final",
    "dec.cross.v": "enc.final",
    "head": "dec.final",
}
WRITES = {"enc.embed": -1, "enc.mlp.down": -2, "bridge": -2, "dec.embed": -1, "dec.self": -2, "dec.cross.out": -2}


def path(name: str) -> tuple[str, ...]:
    return (*name.split("."), "kernel")


def site(norm: str) -> NormSite:
    return NormSite(tuple(norm.split(".")), EPSILONS[norm], stream=norm.split(".")[0])


def make_roles() -> dict:
    roles = {}
    for name in SHAPES:
        reads = {"reads": -1, "norm": site(READS[name]), "bias": (*path(name)[:-1], "bias")} if name in READS else {}
        stream = "enc" if name.startswith("enc") else "dec"
        heads = {"heads": -2, "head_dim": HEAD} if name in ("dec.cross.q", "dec.cross.k") else {}
        roles[path(name)] = Role(writes=WRITES.get(name), stream=stream if name in WRITES else "", **reads, **heads)
    roles["bridge", "lambda"] = Role(scales=((path("bridge"), -2),))
    for norm in EPSILONS:
        for affine in ("scale", "bias"):
            leaf = "weight" if affine == "scale" and norm.startswith("dec") else affine
            roles[*norm.split("."), leaf] = Role(norm=site(norm), affine=affine)
    return roles


def make_params(roles: dict) -> dict:
    rng, flat = np.random.default_rng(0), {}
    for leaf, role in roles.items():
        if role.affine is not None:
            width = ENCODER if leaf[0] == "enc" else DECODER
            flat[leaf] = rng.normal(size=width) + (3 if role.affine == "scale" else 0)
        elif role.scales:
            flat[leaf] = rng.normal(size=DECODER)
        else:
            flat[leaf] = rng.normal(size=SHAPES[".".join(leaf[:-1])]) + 2
    return flat


def nested(flat: dict) -> dict:
    tree: dict = {}
    for leaf, value in flat.items():
        node = tree
        for name in leaf[:-1]:
            node = node.setdefault(name, {})
        node[leaf[-1]] = value
    return tree


def forward(tree: dict, norm: str) -> np.ndarray:
    def get(name, default=0.0):
        node = tree
        for part in name.split("."):
            node = node.get(part, {})
        return default if isinstance(node, dict) else node

    def normalise(x, name):
        width = x.shape[-1] + (norm == "crmsnorm")
        x = x - x.mean(-1, keepdims=True) if norm == "layernorm" else x
        square = (x**2).sum(-1, keepdims=True) + (x.sum(-1, keepdims=True) ** 2 if norm == "crmsnorm" else 0)
        scale = get(f"{name}.{'weight' if name.startswith('dec') else 'scale'}", 1.0)
        return x / np.sqrt(square / width + EPSILONS[name]) * scale + get(f"{name}.bias")

    def over_heads(x):
        x = x.reshape(len(x), -1, HEAD)
        x = x - x.mean(-1, keepdims=True) if norm == "layernorm" else x
        return (x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)).reshape(len(x), -1)

    def linear(x, name):
        return x @ get(f"{name}.kernel").T + get(f"{name}.bias")

    tokens = np.array([0, 3, 1, 4])
    e = get("enc.embed.kernel")[tokens]
    e = e + linear(np.tanh(linear(normalise(e, "enc.ln"), "enc.mlp.up")), "enc.mlp.down")
    memory = normalise(e, "enc.final")
    x = get("dec.embed.kernel")[tokens[::-1]] + linear(memory, "bridge") * get("bridge.lambda", 1.0)
    x = x + linear(normalise(x, "dec.ln_self"), "dec.self")
    q, k = linear(normalise(x, "dec.ln_cross"), "dec.cross.q"), linear(memory, "dec.cross.k")
    scores = over_heads(q) @ over_heads(k).T
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = x + linear(weights @ linear(memory, "dec.cross.v"), "dec.cross.out")
    return linear(normalise(x, "dec.final"), "head")


def test_a_tree_of_two_streams_and_five_epsilons_converts_by_its_roles_in_all_directions():
    roles = make_roles()
    tree = nested(make_params(roles))
    expected = forward(tree, "layernorm")
    for to in ("rmsnorm", "crmsnorm"):
        converted = convert_tree(tree, roles, "layernorm", to)
        assert "ln" not in converted["enc"] and "bias" in converted["dec"]["cross"]["k"]
        assert "lambda" not in converted["bridge"] and "bias" in converted["bridge"]
        assert relative(forward(converted, to), expected) < 1e-12
        # The roles of the converted tree: norms without parameters, and biases that are there now.
        folded = {leaf: role for leaf, role in with_biases(roles).items() if role.affine is None and not role.scales}
        for back in {"layernorm", "rmsnorm", "crmsnorm"} - {to}:
            again = convert_tree(converted, folded, to, back)
            assert relative(forward(again, back), expected) < 1e-12


@pytest.mark.parametrize(
    ("leaf", "change"),
    [
        ("head", {"norm": site("dec.ln_self")}),  # fed by another norm
        ("bridge", {"writes": None}),  # only read
        ("dec.cross.v", {"norm": None}),  # its norm forgotten
        ("enc.embed", {"writes": None}),  # a writer forgotten
        ("dec.cross.q", {"heads": None}),  # the norm over heads forgotten
    ],
)
def test_a_wrong_role_gives_another_function(leaf, change):
    roles = make_roles()
    tree = nested(make_params(roles))
    roles[path(leaf)] = dataclasses.replace(roles[path(leaf)], **change)
    if leaf == "head":  # else the final norm would feed no reader, which is refused
        roles[path("dec.self")] = dataclasses.replace(roles[path("dec.self")], norm=site("dec.final"))
    wrong = forward(convert_tree(tree, roles, "layernorm", "rmsnorm"), "rmsnorm")
    assert relative(wrong, forward(tree, "layernorm")) > 1e-3


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("dec.self", {"writes": -1}, "dec/self/kernel reads the stream along the axis on which it writes it"),
        ("dec.cross.q", {"bias": None}, "dec/cross/q/kernel takes up a norm's β: name the leaf of its bias"),
        ("dec.cross.q", {"head_dim": 3}, "dec/cross/q/kernel has heads of no width, or of one that does not divide"),
        ("dec.cross.q", {"head_dim": None}, "dec/cross/q/kernel has heads of no width"),
        ("enc.embed", {"writes": 1}, "enc/embed/kernel has no such axis; axes are counted from the end"),
        ("enc.embed", {"writes": -3}, "enc/embed/kernel has no such axis"),
        ("dec.cross.q", {"heads": -3}, "dec/cross/q/kernel has no such axis"),
        ("head", {"norm": site("dec.final")._replace(epsilon=1e-3)}, "with another epsilon or stream|feeds no reader"),
    ],
)
def test_a_role_that_contradicts_itself_or_its_leaf_is_refused(leaf, change, message):
    roles = make_roles()
    tree = nested(make_params(roles))
    roles[path(leaf)] = dataclasses.replace(roles[path(leaf)], **change)
    with pytest.raises(PrenormError, match=message):
        convert_tree(tree, roles, "layernorm", "crmsnorm")


def test_roles_that_do_not_fit_the_tree_or_each_other_are_refused():
    roles = make_roles()
    tree = nested(make_params(roles))
    with pytest.raises(PrenormError, match="leaves without a role, or roles without a leaf: dec/embed/kernel"):
        convert_tree(
            tree, {leaf: role for leaf, role in roles.items() if leaf != path("dec.embed")}, "layernorm", "rmsnorm"
        )
    misspelt = dataclasses.replace(roles[path("head")], norm=NormSite(("dec", "finale"), 1e-5))
    with pytest.raises(PrenormError, match="dec/final/weight is of a norm that feeds no reader"):
        convert_tree(tree, roles | {path("head"): misspelt}, "layernorm", "rmsnorm")
    with pytest.raises(PrenormError, match="is not zero-mean along the stream"):
        convert_tree(tree, roles, "rmsnorm", "crmsnorm")
    with pytest.raises(PrenormError, match="norm='batchnorm' is not one of layernorm, rmsnorm, crmsnorm"):
        convert_tree(tree, roles, "batchnorm", "crmsnorm")
    with pytest.raises(PrenormError, match="head/kernel is no NumPy or JAX array"):
        convert_tree(tree | {"head": {"kernel": [1.0]}}, roles, "layernorm", "crmsnorm")


# --- A third family of models: what follows, and a line in the registry. ---


@dataclasses.dataclass(frozen=True)
class BagConfig(ModelConfig):
    """Predicts the next token from the set of those before it: a toy."""

    family: str = "bag"
    vocab_size: int = 11
    inputs: ClassVar[str] = "text"
    causal: ClassVar[bool] = True

    def tokens(self, length: int) -> int:
        return length

    def flops_outside_blocks(self, length: int, logits: int | None) -> int:
        return 2 * length * self.d_model * self.vocab_size


class Bag(StreamModel):
    config: BagConfig
    config_class: ClassVar[type[ModelConfig]] = BagConfig

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, train: bool = False) -> jax.Array:
        config = self.config
        table_VxW = table(self, config, "words", config.vocab_size, "vocab")
        x_BxTxD = blocks(config, enter_stream(config, end_embedding(config, table_VxW[tokens_BxT], train)), train)
        twin = Linear(config, 4, ("heads", "heads"), True, name="off_stream")(np.ones((1, 4), config.dtype))
        normed = make_norm(config, "last", config.final_norm_affine).for_readers(x_BxTxD)
        return reader(config, "head", config.vocab_size, "vocab", config.head_bias)(normed) + twin.sum()

    @nn.nowrap
    def example(self, batch: int = 1, seed: int | None = None) -> np.ndarray:
        return np.random.default_rng(seed).integers(self.config.vocab_size, size=(batch, 3)).astype(np.int32)


@pytest.mark.slow
def test_a_further_family_is_a_module_and_a_line_in_the_registry(monkeypatch):
    """Its configuration, conversion, sharding, data and training step are there without a change elsewhere."""
    monkeypatch.setitem(FAMILIES, "bag", Bag)
    config = base_config("bag")
    config.model.update({"depth": 1, "d_model": 8, "heads": 2, "dtype": "float64", "param_dtype": "float64"})
    config.batch_size, config.data.seq_len = 4, 3
    assert data_kind(config).unit == "token"
    model = build_model(config.model)
    rng = np.random.default_rng(0)
    params = model.init(jax.random.key(0), model.example())["params"]
    params = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape), params)
    expected = model.apply({"params": params}, model.example(2, 1))
    batch = {"tokens": rng.integers(11, size=(4, 4)).astype(np.int32), "weights": np.ones((4, 3), np.float32)}
    losses = []
    for norm in ("layernorm", "crmsnorm"):
        if norm != "layernorm":
            variant, converted = convert_config(model.config, norm), convert_params(params, model.config, norm)
            actual = build_model(variant).apply({"params": converted}, model.example(2, 1))
            assert relative(actual, np.asarray(expected)) < 1e-12
        config.model.norm = norm
        run = Run.create(config, make_mesh(config, jax.devices()[:2]))
        losses.append(jax.jit(make_gradients(run))(params, batch, 0)[0])
        make_train_step(run).trace(jax.eval_shape(lambda run=run: init_state(run)), batch)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-12)


def test_a_reader_names_the_norm_that_its_input_comes_from():
    normed = Normed(np.ones((1, 1, 8)), site=NormSite(("somewhere", "else"), 1e-3, "encoder"))
    config = base_config().model
    config.update({"d_model": 8, "heads": 2})
    layer = reader(build_model(config).config, "query", 4, "heads", bias=False)
    leaves = jax.eval_shape(layer.init, jax.random.key(0), normed)["params"]
    assert leaves["kernel"].norm == normed.site
