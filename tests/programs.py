"""Random programs around LayerNorms, for `test_fold.py`: what a stream may meet, and what must stop a fold.

A program is a chain of steps on a stream of shape (B, T, D): writers, norms and their readers, rearrangements, loops.
Each step is drawn with what makes a rule apply, or with what makes it not apply: along the stream or across it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

B, T, D, H = 2, 4, 6, 2
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
Step = Callable[[dict, dict, jax.Array], jax.Array]  # of (parameters, inputs, stream)


class Draw:
    """Random choices, and the parameters that they need."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.params: dict[str, np.ndarray] = {}
        self.coarse = False  # whether something is rounded to float32

    def param(self, *shape: int) -> str:
        name = f"p{len(self.params)}"
        if self.params and self.rng.random() < 0.1:  # shared
            same = [old for old, value in self.params.items() if value.shape == shape]
            if same:
                return self.of(same)
        self.params[name] = self.rng.normal(size=shape) / max(shape[0], 1) ** (0.5 * (len(shape) > 1)) + 0.3
        return name

    def of(self, choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def chance(self, share: float = 0.5) -> bool:
        return bool(self.rng.random() < share)

    def constant(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape) + 0.5


def norm(draw: Draw, axis: int = -1, size: int = D, known: str = "") -> Step:
    """A LayerNorm in one of its spellings, with an affine map or without."""
    kind = known or draw.of(["fast", "two_pass", "var", "added", "abs_division"])
    scale = draw.param(size) if draw.chance(0.6) else None
    shift = draw.param(size) if scale and draw.chance() else None
    epsilon = draw.of([1e-6, 1e-2])

    def apply(p: dict, i: dict, x: jax.Array) -> jax.Array:
        mean = x.mean(axis, keepdims=True)
        if kind == "fast":
            n = (x - mean) * jax.lax.rsqrt((x * x).mean(axis, keepdims=True) - jnp.square(mean) + epsilon)
        elif kind == "two_pass":
            n = (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(axis, keepdims=True) + epsilon)
        elif kind == "var":
            n = (x - mean) / jnp.sqrt(x.var(axis, keepdims=True) + epsilon)
        elif kind == "added":
            centred = x + -mean
            n = centred / (jnp.sum(centred**2, axis, keepdims=True) / x.shape[axis] + epsilon) ** 0.5
        else:
            n = (x - mean) / (jnp.abs(x - mean).mean(axis, keepdims=True) + epsilon)
        shape = [1] * x.ndim
        shape[axis] = size
        n = n if scale is None else n * p[scale].reshape(shape)
        return n if shift is None else n + p[shift].reshape(shape)

    return apply


def linear(draw: Draw, n_in: int, n_out: int, out_axes: int = 1) -> Step:
    """x W + b over the last axis, as one product, one of heads, or a convolution of width 1."""
    kind = draw.of(["plain", "heads", "conv", "transposed", "grouped"])
    bias = draw.param(n_out) if draw.chance() else None
    if kind == "heads":
        weight = draw.param(n_in, H, n_out // H)
    elif kind == "conv":
        weight = draw.param(2, n_in, n_out)
    elif kind == "grouped":
        weight = draw.param(1, n_in // H, n_out)
    else:
        weight = draw.param(*((n_out, n_in) if kind == "transposed" else (n_in, n_out)))

    def apply(p: dict, i: dict, x: jax.Array) -> jax.Array:
        w = p[weight]
        if kind == "heads":
            y = jnp.einsum("btn,nhk->bthk", x, w).reshape(*x.shape[:2], n_out)
        elif kind in ("conv", "grouped"):
            groups = H if kind == "grouped" else 1
            numbers = ("NWC", "WIO", "NWC")
            y = jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups)
        elif kind == "transposed":
            y = (w @ x.reshape(-1, n_in).T).T.reshape(*x.shape[:2], n_out)
        else:
            y = x @ w
        return y if bias is None else y + p[bias]

    return apply


def branch(draw: Draw) -> Step:
    """What reads a norm and gives something for the stream."""
    up, down = linear(draw, D, 2 * D), linear(draw, 2 * D, D)
    activation = draw.of([jnp.tanh, jax.nn.relu, jax.nn.gelu, jnp.sin])
    mixes, fused = draw.chance(0.3), draw.chance(0.25)
    both, shift = draw.param(D, 4 * D), draw.param(4 * D)

    def apply(p: dict, i: dict, x: jax.Array) -> jax.Array:
        h = up(p, i, x)
        if fused:  # one product for what is normed by heads and what is not
            q, v = jnp.split(x @ p[both] + p[shift], 2, axis=-1)
            q = q.reshape(*q.shape[:2], H, D)
            h = h + v + (q - q.mean(-1, keepdims=True)).reshape(v.shape)
        h = activation(h)
        if mixes:
            h = jax.nn.softmax(h @ h.swapaxes(1, 2)) @ h
        return down(p, i, h)

    return apply


def on_branch(draw: Draw) -> Step:
    """What happens to a branch's output before it is added: along the stream (no rule holds) or across it."""
    kind = draw.of(
        ["none"] * 5 + ["layer_scale"] * 3 + ["dropout", "depth", "scalar", "divide", "tanh", "stopped", "cumsum"]
    )
    scale, mask = (draw.param(D) if kind == "layer_scale" else None), draw.constant(B, T, D) > 0
    flip = draw.chance()

    def apply(p: dict, i: dict, y: jax.Array) -> jax.Array:
        if kind == "layer_scale":
            return y * p[scale]
        if kind == "dropout":
            return jnp.where(mask[:, :1] if flip else mask, y, 0.0)
        if kind == "depth":
            return jnp.where(mask[:, :, :1], y, 1.0) if flip else y * mask[:, :1, :1]
        if kind == "scalar":
            return -y * 0.5
        if kind == "divide":
            return y / (1 + jnp.square(y).sum(1 if flip else 2, keepdims=True))
        if kind == "tanh":
            return jnp.tanh(y)
        if kind == "cumsum":
            return jnp.cumsum(y, 1 if flip else 2)
        return jax.lax.stop_gradient(y) if kind == "stopped" else y

    return apply


def residual(draw: Draw) -> Step:
    """x + f(norm(x)), or with the norm elsewhere."""
    place = draw.of(["pre"] * 12 + ["post", "none", "raw"])
    inner, outer, between = norm(draw), branch(draw), on_branch(draw)
    minus = draw.chance(0.2)

    def apply(p: dict, i: dict, x: jax.Array) -> jax.Array:
        y = between(p, i, outer(p, i, x if place in ("post", "none") else inner(p, i, x)))
        y = x - y if minus else x + y
        y = y + 0.1 * jnp.tanh(x) if place == "raw" else y
        return inner(p, i, y) if place == "post" else y

    return wrapped(draw, apply)


def wrapped(draw: Draw, whole: Step) -> Step:
    """A step as a call of some kind, or on what a call gives."""
    kind = draw.of(["", "", "", "remat", "jit", "custom", "cond"])

    def apply(p: dict, i: dict, x: jax.Array) -> jax.Array:
        if kind == "remat":
            return jax.checkpoint(lambda p, x: whole(p, i, x))(p, x)
        if kind == "jit":
            return jax.jit(lambda p, x: whole(p, i, x))(p, x)
        if kind == "custom":
            double = jax.custom_jvp(lambda x: 2 * x)
            double.defjvp(lambda primals, tangents: (double(*primals), 2 * tangents[0]))
            return whole(p, i, double(x))
        if kind == "cond":
            return whole(p, i, jax.lax.cond(i["flag"], lambda x: 2 * x, lambda x: -x, x))
        return whole(p, i, x)

    return apply


def looped(draw: Draw) -> Step:
    """A scan of residual blocks over stacked parameters; it may give the stream after each of them."""
    outer, names, depth = draw.params, set(draw.params), draw.of([1, 2, 3])
    step = residual(draw)
    stacked = sorted(draw.params.keys() - names)
    for name in stacked:
        outer[name] = np.stack([outer[name] * (1 + 0.3 * k) for k in range(depth)])
    gives, backwards, table = draw.of(["", "", "sum", "last"]), draw.chance(), draw.constant(depth, T, D)

    def apply(p: dict, i: dict, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, turn: tuple[dict, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x = step(p | turn[0], i, x + turn[1])
            return x, x

        xs = {name: p[name] for name in stacked}, jnp.asarray(table)
        x, all_x = jax.lax.scan(body, x, xs, reverse=backwards)
        return x + all_x.sum(0) if gives == "sum" else all_x[-1] if gives == "last" else x

    return apply


def rearranged(draw: Draw) -> Step:
    """Axes and entries of the stream change places, across it or along it, and come back to (B, T, D)."""
    kind, across = draw.of(KINDS), draw.chance(0.75)
    axis = 1 if across else 2
    extra = draw.param(B, 1, D) if across else draw.param(B, T, 1)
    draw.coarse |= kind == "cast"
    pattern = draw.constant((T, D)[axis - 1]) > 0.3
    order, table = draw.rng.permutation((T, D)[axis - 1]), draw.param((T, D)[axis - 1])
    order = np.minimum(order, len(order) - 2)  # no permutation, which the mean would not notice

    def apply(p: dict, i: dict, x: jax.Array) -> jax.Array:
        size = x.shape[axis]
        if kind == "concatenate":
            x = jnp.concatenate([jnp.broadcast_to(p[extra], (B, *p[extra].shape[1:])), x], axis)
            return jax.lax.slice_in_dim(x, 0, size, axis=axis)
        if kind == "split":
            first, second = jnp.split(x, 2, axis)
            return jnp.concatenate([second, first * 2], axis)
        if kind == "pad":
            widths = [(0, 0), (1, 0), (0, 0)] if across else [(0, 0), (0, 0), (1, 0)]
            return jax.lax.slice_in_dim(jnp.pad(x, widths, constant_values=0.7), 0, size, axis=axis)
        if kind == "take":
            return jnp.take(x, order, axis=axis)
        if kind == "dynamic":
            row = jax.lax.dynamic_slice_in_dim(x, i["place"], 2, axis)
            return jax.lax.dynamic_update_slice_in_dim(x, 2 * row, 0, axis)
        if kind in ("reversed", "copied", "named", "placed", "tiled"):
            x = {"reversed": lambda x: jnp.flip(x, axis), "copied": jnp.copy}.get(kind, lambda x: x)(x)
            x = checkpoint_name(x, "stream") if kind == "named" else x
            x = (
                jnp.tile(x[:1] if across else x[:, :, : D // 2], (B, 1, 1) if across else (1, 1, 2))
                if kind == "tiled"
                else x
            )
            return jax.lax.with_sharding_constraint(x, HERE) if kind == "placed" else x
        if kind == "pulled":
            return jax.vjp(lambda x: 2 * x - x[:, ::-1], x)[1](x)[0]
        if kind == "cast":
            return x.astype(jnp.float32).astype(x.dtype)
        if kind == "divided":
            return x / (1 + jnp.square(p[table].reshape((T, 1) if across else (D,))))
        if kind == "chosen":
            return jnp.where(pattern.reshape((T, 1) if across else (D,)), x, 2 * x)
        if kind == "weigh":
            return x * p[table].reshape((T, 1) if across else (D,))
        if kind == "mix":
            return jnp.einsum("bts,bsd->btd", jax.nn.softmax(x @ x.swapaxes(1, 2)), x) if across else x[:, :, ::-1]
        if kind == "transpose":
            x = x.transpose(2, 0, 1) if across else x.swapaxes(0, 1)
            x = x * 2
            return x.transpose(1, 2, 0) if across else x.swapaxes(0, 1)
        if kind == "fold_tokens":
            return -(x.reshape(B * T, D) if across else x.reshape(B, T * D)).reshape(B, T, D)
        if kind == "halves":  # a norm of heads
            y = x.reshape(B, T, H, D // H)
            return (y - y.mean(-1, keepdims=True) if across else y.swapaxes(2, 3)).reshape(B, T, D)
        if kind == "summed":
            return x + (x.sum(1, keepdims=True) if across else x.sum(2, keepdims=True) * jnp.arange(D))
        if kind == "stretch":
            return jnp.broadcast_to(x[:, :1] if across else x[:, :, :1], x.shape) + p[extra]
        raise ValueError(kind)

    return apply


KINDS = ["concatenate", "split", "pad", "take", "dynamic", "weigh", "mix", "transpose", "fold_tokens", "halves"]
KINDS += ["summed", "stretch", "reversed", "copied", "named", "placed", "tiled", "cast", "divided", "chosen", "pulled"]


def tabled(draw: Draw) -> Step:
    """To the stream is added what is made of parameters alone, and so folds for nothing where a rule holds."""
    kind, axis = (
        draw.of(["slice", "dynamic", "update", "split", "join", "pad", "stack", "unstack", "sum"]),
        draw.of([1, 2]),
    )
    n = (T, D)[axis - 1]

    def sized(size: int) -> str:
        return draw.param(*((B, size, D) if axis == 1 else (B, T, size)))

    wide, small, other, high = sized(2 * n), sized(n - 1), sized(1), draw.param(B, T, D, 2)
    full, flat = sized(n), draw.param(T, D)
    stacked = [draw.param(B, (T, D)[2 - axis]) for _ in range(n)]

    def made(p: dict, i: dict) -> jax.Array:
        if kind == "slice":
            return jax.lax.slice_in_dim(p[wide], 1, 1 + n, axis=axis)
        if kind == "dynamic":
            return jax.lax.dynamic_slice_in_dim(p[wide], i["place"], n, axis)
        if kind == "update":
            return jax.lax.dynamic_update_slice_in_dim(p[full], p[small], i["place"], axis)
        if kind == "split":
            return jnp.split(p[wide], 2, axis)[1]
        if kind == "join":
            return jnp.concatenate([p[other], p[small]], axis)
        if kind == "pad":
            return jax.lax.pad(p[small], 0.7, [(0, 1, 0) if k == axis else (0, 0, 0) for k in range(3)])
        if kind == "stack":
            return jax.lax.stack([p[name] for name in stacked], axis)
        if kind == "unstack":
            return (
                p[flat] + jax.lax.unstack(p[high], 3)[0]
                if axis == 1
                else jax.lax.unstack(p[high][:, None], 1)[0][..., 1]
            )
        return p[high].sum(3) if axis == 1 else p[high].swapaxes(1, 3).sum(1).swapaxes(1, 2)

    return wrapped(draw, lambda p, i, x: x + made(p, i))


def start(draw: Draw) -> Step:
    """The first value of the stream."""
    table, positions, more = draw.param(7, D), draw.param(T, D), draw.param(B, T, D)
    arranged, added = wrapped(draw, rearranged(draw)), tabled(draw)
    kind, first = draw.of(["tokens", "tokens", "patches", "input", "constant", "counts"]), linear(draw, D, D)
    fixed = draw.constant(T, D)

    def apply(p: dict, i: dict, x: jax.Array) -> jax.Array:
        if kind == "tokens":
            x = jnp.take(p[table], i["tokens"], axis=0) + p[positions]
        elif kind == "patches":
            x = first(p, i, i["x"]) + p[positions][None]
        elif kind == "constant":
            x = p[table][i["tokens"]] + jnp.sin(fixed)
        elif kind == "counts":
            x = (i["tokens"][:, :, None] * jnp.arange(D)).astype(jnp.float64)
        else:
            x = i["x"]
        return added(p, i, x + arranged(p, i, p[more]))

    return apply, table


def program(seed: int) -> tuple[Callable[..., jax.Array], dict, dict]:
    """A function of (parameters, inputs), and both."""
    draw = Draw(seed)
    first, table = start(draw)
    makers = [residual, residual, residual, looped, rearranged, tabled]
    steps = [draw.of(makers)(draw) for _ in range(int(draw.rng.integers(1, 5)))]
    last, head = norm(draw), draw.of(["linear"] * 5 + ["tied"] * 3 + ["sum", "raw"])
    out = linear(draw, D, 4)
    inputs = {
        "tokens": draw.rng.integers(0, 7, (B, T)),
        "x": draw.constant(B, T, D),
        "place": np.int32(1),
        "flag": np.bool_(True),
    }

    def function(p: dict, i: dict) -> jax.Array:
        x = first(p, i, None)
        for step in steps:
            x = step(p, i, x)
        if head == "raw":
            return x
        n = last(p, i, x)
        return n @ p[table].T if head == "tied" else out(p, i, n) if head == "linear" else n.sum(1)

    function.coarse = draw.coarse
    return function, {name: jnp.asarray(value) for name, value in draw.params.items()}, inputs
