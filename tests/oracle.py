"""The Pre-LN networks in NumPy, one position and one head at a time: what the models are tested against.

And of `norm="rmsnorm"` the same with its norms alone swapped, as nobody should.
"""

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from scipy.special import erf

from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.encoder import EncoderConfig
from prenorm_jax.models.gpt import GPTConfig
from prenorm_jax.models.vit import ViTConfig

ACTIVATE = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.where(x > 0, x**2, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def add(*lists):
    return [sum(terms) for terms in zip(*lists, strict=True)]


def slopes(heads):
    """ALiBi's, as its authors' code finds them."""
    if heads & (heads - 1) == 0:
        return [2 ** (-8 / heads * (i + 1)) for i in range(heads)]
    n = 2 ** int(np.log2(heads))
    return slopes(n) + slopes(2 * n)[::2][: heads - n]


class Transformer:
    """What both families share."""

    def __init__(self, config: ModelConfig, params: dict, mask=None):
        self.c, self.mask = config, mask  # of keys that are none of padding
        self.p = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()}

    def norm(self, x, name, h=None):
        mean = x.mean() if self.c.norm == "layernorm" else 0.0
        y = (x - mean) / np.sqrt(((x - mean) ** 2).mean() + self.c.epsilon)
        scale, bias = self.p.get(f"{name}/scale", np.ones(1)), self.p.get(f"{name}/bias", np.zeros(1))
        return y * scale + bias if scale.ndim == 1 or h is None else y * scale[h] + (bias[h] if bias.ndim > 1 else 0)

    def linear(self, x, name):
        return x @ self.p[f"{name}/kernel"] + self.p.get(f"{name}/bias", 0)

    def turn(self, x, t, base):
        if self.c.rotary2d:
            return self.turn_patch(x, t - self.c.prefix)
        if not self.c.rotary or not base:
            return x
        x, width = x.copy(), self.c.rotary_dim or self.c.head_dim
        for k in range(width // 2):
            pair = [2 * k, 2 * k + 1] if self.c.rotary_interleaved else [k, k + width // 2]
            turned = complex(*x[pair]) * np.exp(1j * t * base ** (-2 * k / width))
            x[pair] = turned.real, turned.imag
        return x

    def turn_patch(self, x, patch):
        x, width = x.copy(), self.c.head_dim
        for k in range(width // 2 if patch >= 0 else 0):
            place, size = [*zip(divmod(patch, self.c.grid[1]), self.c.grid, strict=True)][k // (width // 4)]
            middle, k_of_axis = 2 * (place + 0.5) / size - 1, k % (width // 4)
            pair = [k, k + width // 2]
            angle = 2 * np.pi * middle / self.c.rotary_base ** (4 * k_of_axis / width)
            turned = complex(*x[pair]) * np.exp(1j * angle)
            x[pair] = turned.real, turned.imag
        return x

    def apart(self, h, t, s, name):
        c = self.c
        if c.relative_bias == "none":
            return 0.0
        table, (rows, columns) = (
            self.p["relative_bias/table" if c.relative_bias == "shared" else f"{name}/relative_bias/table"],
            c.grid,
        )
        if t < c.prefix or s < c.prefix:
            return table[{(True, False): -3, (False, True): -2, (True, True): -1}[t < c.prefix, s < c.prefix], h]
        (y, x), (v, u) = divmod(t - c.prefix, columns), divmod(s - c.prefix, columns)
        return table[:-3].reshape(2 * rows - 1, 2 * columns - 1, -1)[y - v + rows - 1, x - u + columns - 1, h]

    def fall(self, h, t, s):
        c = self.c
        if not c.alibi:
            return 0.0
        slope = slopes(c.heads)[h]
        if not c.alibi_rounded:
            return slope * (s - t)
        slope, s = np.array(slope).astype(ml_dtypes.bfloat16), np.array(s).astype(ml_dtypes.bfloat16)
        return float(slope * s) / np.sqrt(c.head_dim)

    def attend(self, xs, name):
        c, bound = self.c, np.inf if self.c.clip_qkv is None else self.c.clip_qkv
        scale = 1 / np.sqrt(c.head_dim) if c.score_scale is None else c.score_scale
        number = int(name[len("block_") :].split("/")[0])
        is_local = c.attention_pattern[number % len(c.attention_pattern)] == "l"
        window, base = c.window if is_local else None, getattr(c, "rotary_base", None)
        if not is_local and c.global_rotary_base is not None:
            base = c.global_rotary_base
        q, k, v = ([self.linear(x, f"{name}/{part}") for x in xs] for part in ("query", "key", "value"))

        def head(vectors, place, h, part):
            x = vectors[place][h * c.head_dim : (h + 1) * c.head_dim]
            if c.qk_norm and part != "value":
                x = self.norm(x, f"{name}/{part}_norm", h)
            x = np.array([min(max(number, -bound), bound) for number in x])
            return x if part == "value" else self.turn(x, place, base)

        outputs = []
        for t in range(len(xs)):
            heads = []
            for h in range(c.heads):
                g = h // (c.heads // c.kv_heads)
                near = [s for s in range(len(xs)) if window is None or abs(s - t) < window]
                near = [s for s in near if s <= t or not c.causal]
                seen = [s for s in near if self.mask is None or self.mask[s]] or near  # what padding sees is nothing
                products = [scale * head(q, t, h, "query") @ head(k, s, g, "key") for s in seen]
                scores = np.array(
                    [
                        product + self.fall(h, t, s) + self.apart(h, t, s, name)
                        for product, s in zip(products, seen, strict=True)
                    ]
                )
                weights = np.exp(scores - scores.max())
                values = [head(v, s, g, "value") for s in seen]
                heads.append(sum(w * value for w, value in zip(weights / weights.sum(), values, strict=True)))
            outputs.append(self.linear(np.concatenate(heads), f"{name}/out") * self.p.get(f"{name}/out_scale", 1))
        return outputs

    def feed(self, xs, name):
        c, act = self.c, ACTIVATE[self.c.activation]
        if c.gated_mlp:
            hidden = [act(self.linear(x, f"{name}/gate")) * self.linear(x, f"{name}/up") for x in xs]
        else:
            hidden = [act(self.linear(x, f"{name}/up")) for x in xs]
        return [self.linear(h, f"{name}/down") * self.p.get(f"{name}/down_scale", 1) for h in hidden]

    def stream(self, xs):
        """From the embedding to the last block's output."""
        c = self.c
        if c.embed_norm:
            xs = [self.norm(x, "embedding_norm") for x in xs]
        for i in range(c.depth):
            b = f"block_{i}"
            names = [f"{b}/norm"] * 2 if c.shared_norm else [f"{b}/attention_norm", f"{b}/mlp_norm"]
            if c.parallel:
                normed = [[self.norm(x, name) for x in xs] for name in names]
                xs = add(xs, self.attend(normed[0], f"{b}/attention"), self.feed(normed[1], f"{b}/mlp"))
            elif c.post_norm:
                xs = [self.norm(x, names[0]) for x in add(xs, self.attend(xs, f"{b}/attention"))]
                xs = [self.norm(x, names[1]) for x in add(xs, self.feed(xs, f"{b}/mlp"))]
            else:
                read = xs if i == 0 and not c.first_norm else [self.norm(x, names[0]) for x in xs]
                xs = add(xs, self.attend(read, f"{b}/attention"))
                xs = add(xs, self.feed([self.norm(x, names[1]) for x in xs], f"{b}/mlp"))
        return xs


def numpy_gpt(c: GPTConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    net = Transformer(c, params)
    p = net.p
    rows = []
    for row in tokens:
        xs = [p["token_embedding"][token] * c.embed_scale for token in row]
        if c.positions == "learned":
            xs = add(xs, p["position_embedding"][: len(xs)])
        if c.positions == "sinusoidal":
            i = np.arange((c.d_model + 1) // 2)
            angles = [t / 10000 ** (2 * i / c.d_model) for t in range(len(xs))]
            xs = add(xs, [np.concatenate([np.sin(a), np.cos(a)])[: c.d_model] for a in angles])
        if c.positions == "fairseq":
            i = np.arange(c.d_model // 2)
            angles = [(t + 2) * np.exp(-np.log(10000) * i / max(len(i) - 1, 1)) for t in range(len(xs))]
            xs = add(xs, [np.concatenate([np.sin(a), np.cos(a), np.zeros(c.d_model % 2)]) for a in angles])
        xs = net.stream(xs)
        if c.final_norm:
            xs = [net.norm(x, "head_norm") for x in xs]
        if c.tie_embeddings:
            xs = [x * p.get("head_affine/scale", 1) + p.get("head_affine/bias", 0) for x in xs]
            rows.append([p["token_embedding"] @ x + p.get("head_bias", 0) for x in xs])
        else:
            rows.append([net.linear(x, "head") for x in xs])
    return np.array(rows) * c.logit_scale


def numpy_encoder(c: EncoderConfig, params: dict, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.array([_encoded(Transformer(c, params, own), row) for row, own in zip(tokens, mask, strict=True)])


def _encoded(net: Transformer, tokens: np.ndarray) -> np.ndarray:
    c, p, mask = net.c, net.p, net.mask
    xs = [p["token_embedding"][token] for token in tokens]
    if c.mask_token is not None:
        share = sum(token == c.mask_token for token in tokens) / sum(mask)
        xs = [x * (token != c.mask_token) * 0.88 / (1 - share) for x, token in zip(xs, tokens, strict=True)]
    if c.token_types:
        xs = [x + p["token_type_embedding"][0] for x in xs]
    if c.positions == "learned":
        place = -1 if c.pad_token is None else 0
        for t, token in enumerate(tokens):
            place += token != c.pad_token
            xs[t] = xs[t] + p["position_embedding"][0 if token == c.pad_token else place]
    xs = net.stream(xs)
    has_head = c.tie_embeddings or c.outputs
    xs = [net.norm(x, "head_norm" if has_head else "head_affine") for x in xs]
    ends = [token == (max(tokens) if c.eos_token is None else c.eos_token) for token in tokens]
    if c.pooling == "mean":
        xs = [sum(x * own for x, own in zip(xs, mask, strict=True)) / sum(mask)]
    elif c.pooling != "none":
        xs = [xs[{"first": 0, "last": -1, "eos": ends.index(True) if True in ends else 0}[c.pooling]]]
    if c.transform:
        xs = [net.norm(ACTIVATE[c.activation](net.linear(x, "transform")), "transform_norm") for x in xs]
    if c.tie_embeddings:
        xs = [p["token_embedding"] @ x + p.get("head_bias", 0) for x in xs]
    elif c.outputs:
        xs = [net.linear(x, "head") for x in xs]
    return np.array(xs if c.pooling == "none" else xs[0])


def numpy_vit(c: ViTConfig, params: dict, images: np.ndarray) -> np.ndarray:
    net = Transformer(c, params)
    return np.array([_logits_of(net, image) for image in images])


def _logits_of(net: Transformer, image: np.ndarray) -> np.ndarray:
    c, p = net.c, net.p
    stride = c.patch_stride or c.patch_size
    xs = []
    for row in range((image.shape[0] - c.patch_size) // stride + 1):
        for column in range((image.shape[1] - c.patch_size) // stride + 1):
            x = p.get("patch_embedding/bias", np.zeros(c.d_model)).copy()
            for i in range(c.patch_size):
                for j in range(c.patch_size):
                    pixel = image[row * stride + i, column * stride + j]
                    x += pixel @ p["patch_embedding/kernel"][i, j]
            if c.positions == "sincos2d":
                quarter = c.d_model // 4
                angle = np.array([10000 ** -(k / max(quarter - 1, 1)) for k in range(quarter)])
                parts = (np.sin(column * angle), np.cos(column * angle), np.sin(row * angle), np.cos(row * angle))
                x += np.concatenate(parts)
            xs.append(x)
    number = len(xs)
    first = [*p.get("class_token", []), *p.get("distillation_token", [])]
    if c.positions == "learned":
        if c.class_position:
            xs = add([*first, *xs], p["position_embedding"])
            first, xs = xs[: len(first)], xs[len(first) :]
        else:
            xs = add(xs, p["position_embedding"])
    xs = net.stream([*first, *p.get("registers", []), *xs])

    def final(x, name="head_norm"):
        return net.norm(x, name) if c.final_norm else x

    if c.pooling == "attention":
        if not c.norm_after_pooling:
            xs = [final(x, "pool_norm") for x in xs]
        q = net.linear(p["pool/probe"][0], "pool/query")
        k, v = ([net.linear(x, f"pool/{part}") for x in xs] for part in ("key", "value"))
        heads = []
        for h in range(c.heads):
            mine = slice(h * c.head_dim, (h + 1) * c.head_dim)
            weights = np.exp([q[mine] @ key[mine] / np.sqrt(c.head_dim) for key in k])
            heads.append(sum(w * value[mine] for w, value in zip(weights / weights.sum(), v, strict=True)))
        x = net.linear(np.concatenate(heads), "pool/out")
        hidden = ACTIVATE[c.activation](net.linear(net.norm(x, "pool/mlp_norm"), "pool/up"))
        x = x + net.linear(hidden, "pool/down")
        x = final(x, "pooled_norm") if c.norm_after_pooling else x
        return net.linear(x, "head") if c.classes else x
    if not c.classes or c.pooled_norm:

        def final(x, name="head_affine"):
            return net.norm(x, name) if c.final_norm else x

        if c.pooling == "none":
            return np.array([final(x) for x in xs])
    patches = xs[len(xs) - number :]
    mean = final(np.mean(patches, axis=0)) if c.norm_after_pooling else np.mean([final(x) for x in patches], axis=0)
    if c.pooling == "distilled":
        return (net.linear(final(xs[0]), "head/class") + net.linear(final(xs[1]), "head/distillation")) / 2
    if c.pooling != "class_mean":
        x = mean if c.pooling == "mean" else final(xs[0])
        if c.pooling == "class_pair":
            x = (final(xs[0]) + final(xs[1])) / 2
        x = net.norm(x, "pooled_norm") if c.pooled_norm else x
        return net.linear(x, "head") if c.classes else x
    return net.linear(final(xs[0]), "head/class") + net.linear(mean, "head/mean")
