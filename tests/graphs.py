"""Random graphs around LayerNorms, for `test_fold.py`: `programs.py` has one stream; here any value has any reader.

Each step takes one of the values that there are and gives one more, so a value has several readers, and norms of parts
of it. A graph is drawn anew from its seed whenever it is traced, and each step sees the shapes of its operands.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

B, T, D = 2, 5, 4
WIDTHS = (2, 4, 4, 8)
LARGEST = 16  # of an axis


class Draw:
    """Random choices, and the parameters and values that are to choose from.

    Attributes:
      params: by name; one that is missing is made. There are two of a shape, so that many are shared.
      values: the newest last.
      turns: what the loops around give to this turn of them.
    """

    def __init__(self, seed: int, params: dict, values: Sequence[jax.Array], turns: Sequence[jax.Array] = ()) -> None:
        self.rng, self.params, self.values, self.turns = np.random.default_rng(seed), params, [*values], [*turns]

    def below(self, stop: int) -> int:
        return int(self.rng.integers(stop))

    def of(self, choices: Sequence[Any]) -> Any:
        return choices[self.below(len(choices))]

    def chance(self, share: float = 0.5) -> bool:
        return bool(self.rng.random() < share)

    def param(self, *shape: int) -> jax.Array:
        name = "x".join(map(str, shape)) + self.of("ab")
        if name not in self.params:
            value = np.random.default_rng(len(self.params)).normal(size=shape)
            self.params[name] = value / shape[0] ** (0.5 * (len(shape) > 1)) + 0.3
        return jnp.asarray(self.params[name])

    def value(self, fits: Callable[[jax.Array], bool] = lambda x: True) -> jax.Array:
        """One of the newest values that fit."""
        return self.of([x for x in self.values if fits(x)][-4:])

    def part(self, x: jax.Array, axis: int = -1) -> jax.Array:
        start, stop = sorted(self.rng.choice(x.shape[axis] + 1, 2, replace=False).tolist())
        return jax.lax.slice_in_dim(x, start, start + 1 if axis >= 0 and self.chance() else stop, axis=axis)

    def grown(self, steps: int) -> list[jax.Array]:
        """The values, after so many steps."""
        while steps:
            kinds = [*KINDS, *[turn] * 20] if self.turns else KINDS
            new = self.of(kinds)(self, self.value())
            if new is not None and new.ndim < 5 and max(new.shape) <= LARGEST:
                self.values.append(new)
                steps -= 1
        return self.values

    def inner(self) -> Callable[..., list[jax.Array]]:
        """A part of the graph, of values and turns, that is drawn anew whenever it is called."""
        seed, steps = self.below(2**31), 1 + self.below(3)
        return lambda values, turns=(): Draw(seed, self.params, values, [*self.turns, *turns]).grown(steps)


# The kinds of steps: each gives a value, or None where it does not apply.


def centred(x: jax.Array, axes: Any = -1) -> jax.Array:
    return x - x.mean(axes, keepdims=True)


def norm(draw: Draw, x: jax.Array) -> jax.Array:
    """Over some axes; the mean may be repeated along an axis of which x has one entry."""
    axes = -1 if draw.chance() else tuple({draw.below(x.ndim) for _ in range(3)})
    mean = x.mean(axes, keepdims=True)
    repeats = [*(1 + (size == 1) for size in x.shape[:-1]), 1]
    y = x - jnp.broadcast_to(mean, np.maximum(mean.shape, repeats))
    return y * jax.lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + 0.1) if draw.chance(0.7) else y


def normed(draw: Draw, x: jax.Array) -> list[jax.Array]:
    """A value's norm; or those of halves of it, or of parts of a part of it, some of which are read as they are."""
    if (size := x.shape[-1]) < 2 or draw.chance():
        return [centred(x)]
    some, halves = draw.part(x), (x[..., : size // 2], x[..., size // 2 :])
    parts = draw.of([halves, (draw.part(some), draw.part(some), draw.part(x))])
    return [draw.of([centred, centred, jnp.tanh])(one) for one in parts]


WEIGHTS = ["plain"] * 5 + ["transposed", "reordered", "scaled", "difference", "heads", "half", "centred"]


def linear(draw: Draw, x: jax.Array, m: int = 0, kinds: Sequence[str] = WEIGHTS) -> jax.Array:
    """x W, of a W that is a parameter or made of some: it may have no mean as it is, over all or parts of its width."""
    n, m = x.shape[-1], m or draw.of(WIDTHS)
    w, other, half = draw.param(n, m), draw.param(m, n).T, m // 2
    made = {
        "plain": lambda: w,
        "transposed": lambda: other,
        "reordered": lambda: jax.lax.reshape(w, (n, m), dimensions=(1, 0)),
        "scaled": lambda: w * draw.param(m),
        "difference": lambda: w - other,
        "heads": lambda: centred(w.reshape(n, 2, half)).reshape(n, m),
        "half": lambda: jnp.concatenate([centred(w[:, :half]), w[:, half:]], -1),
        "centred": lambda: centred(w),
    }
    return x @ made[draw.of(kinds)]()


def product(draw: Draw, x: jax.Array) -> jax.Array | None:
    """Two values, or what is made of them, contracted over their last axes; there are norms of both too."""
    y = draw.value(lambda y: x.shape[:-1] == y.shape[:-1])
    if draw.chance(0.8) or x.shape != y.shape:
        kinds = draw.of([WEIGHTS, WEIGHTS[-2:], WEIGHTS[-2:]])
        x, y = linear(draw, x, 4, kinds), linear(draw, y, 4, kinds)
    if x.ndim != 3:
        return None
    norms = draw.of([[centred(x), centred(y[..., :2])], [*normed(draw, x), *normed(draw, y)]])
    return jnp.concatenate([jnp.einsum("btd,bsd->bts", x, y) / x.shape[-1], *norms], -1)


def combined(draw: Draw, x: jax.Array) -> jax.Array:
    """With another value, which may have axes of one entry."""
    y = draw.value(lambda y: x.ndim == y.ndim and all(np.isin(y.shape, 1) | np.equal(y.shape, x.shape)))
    return draw.of([x + y, x - y, y - x, x * jnp.tanh(y)])


def parameter(draw: Draw, x: jax.Array) -> jax.Array:
    """With a parameter, before or after it, of as many axes or fewer, some of one entry."""
    sizes = x.shape[draw.below(x.ndim) :]
    p = draw.param(*(1 if draw.chance(0.25) else max(size, draw.of([1, 2])) for size in sizes))
    p = p * draw.param(*(draw.of([1, size]) for size in p.shape)) if draw.chance(0.3) else p
    return draw.of([x + p, x * p, x * p, p * x])


def part(draw: Draw, x: jax.Array) -> jax.Array:
    """A slice, or what a split gives."""
    if draw.chance(0.3) and x.shape[-1] > 1:
        return draw.of(jnp.split(x, [1 + draw.below(x.shape[-1] - 1)], -1))
    return draw.part(x, -1 if draw.chance(0.7) else draw.below(x.ndim))


def regrouped(draw: Draw, x: jax.Array) -> jax.Array | None:
    """By heads, or heads as one axis; or an axis of two, of which entries change places."""
    if draw.chance(0.1) and x.ndim > 1:
        return jax.lax.reshape(x, x.shape, dimensions=[*range(x.ndim - 2), x.ndim - 1, x.ndim - 2])
    if x.ndim == 4:
        return x.reshape(*x.shape[:2], -1)
    return x.reshape(*x.shape[:-1], *draw.of([(2, -1), (-1, 2)])) if x.shape[-1] % 2 == 0 else None


def rearranged(draw: Draw, x: jax.Array) -> jax.Array | None:
    """Along one axis or across it: entries repeat, change places, are summed, scaled, chosen, surrounded by others."""
    axis, n = draw.below(x.ndim), x.ndim
    shape = [-1 if i == axis else 1 for i in range(n)]

    def fits(y: jax.Array) -> bool:
        return y.ndim == n and all(np.less_equal(y.shape, x.shape))

    first = jax.lax.slice_in_dim(x, 0, 1, axis=axis)
    padding, even = [(-min(size, 0), 0, 0) for size in shape], np.arange(x.shape[axis]).reshape(shape) % 2 == 0
    kinds = {
        "pad": lambda: jax.lax.pad(x, jnp.asarray(draw.of([0.0, 0.7]), x.dtype), padding),
        "put in": lambda: jax.lax.dynamic_update_slice(x, draw.value(fits), [0] * n),
        "join": lambda: jnp.concatenate([x, draw.value(lambda y: x.shape[:-1] == y.shape[:-1])], -1),
        "first": lambda: draw.of([x + first, jnp.broadcast_to(first, x.shape)]),
        "swap": lambda: x.swapaxes(axis, axis - 1) if axis else None,
        "sum": lambda: x.sum(axis) if n > 2 else None,
        "take": lambda: jnp.take(x, np.array([0, 0, x.shape[axis] - 1]), axis=axis),
        "tile": lambda: jnp.tile(x, [1 + (i == axis) for i in range(n)]),
        "move": lambda: draw.of([jnp.roll(x, 1, axis), jnp.flip(x, axis), jnp.cumsum(x, axis)]),
        "choose": lambda: jnp.where(even, x, draw.of([0.3, -x])),
        "scale": lambda: draw.of([-0.7 * x, x / jnp.sqrt(1 + jnp.square(x).mean(-1, keepdims=True))]),
        "activate": lambda: jnp.tanh(x),
    }
    return kinds[draw.of(["pad", "join", *kinds])]()


def turn(draw: Draw, x: jax.Array) -> jax.Array | None:
    """With a loop's slice of a parameter, and of a parameter around the loop."""
    if not (fitting := [row for row in draw.turns if row.shape[0] in (1, x.shape[-1])]):
        return None
    row, table = draw.of(fitting), draw.param(*x.shape[-2:])
    return draw.of([x * row, row * x, x + row, *[x + row * table] * 3, x + table * row])


def loop(draw: Draw, x: jax.Array) -> jax.Array | None:
    """A scan that carries x among the values that there are, over stacked parameters; or what it gives at a turn."""
    if len(draw.turns) > 2:
        return None
    depth, others, body = 1 + draw.below(3), [y for y in draw.values if y is not x], draw.inner()

    def step(carry: jax.Array, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        values = body([*others, carry], rows)
        return 0.5 * carry + [y for y in values if y.shape == x.shape][-1], values[-1]

    rows = draw.param(depth, x.shape[-1]), draw.param(depth, draw.of(WIDTHS))
    last, each = jax.lax.scan(step, x, rows, reverse=draw.chance(0.3))
    return each[-1] if draw.chance(0.3) else last


def checkpoint(draw: Draw, x: jax.Array) -> jax.Array:
    return jax.checkpoint(draw.inner())(draw.values)[-1]


KINDS = [norm] * 3 + [linear] * 8 + [product] * 4 + [combined] * 4 + [parameter] * 4 + [part] * 6 + [regrouped] * 3
KINDS += [rearranged] * 14 + [loop] * 4 + [checkpoint]


def graph(seed: int) -> tuple[Callable[..., list[jax.Array]], dict, jax.Array]:
    """A function of (parameters, tokens), and both."""

    def function(params: dict, tokens: jax.Array) -> list[jax.Array]:
        draw = Draw(seed, params, ())
        draw.values.append(draw.param(5, D)[tokens])
        values = draw.grown(3 + draw.below(8))
        read = [values[-1], *(draw.of(values) for _ in range(draw.below(4)))]
        return [one for x in read for one in normed(draw, x)]

    params: dict[str, Any] = {}
    tokens = np.random.default_rng(seed).integers(0, 5, (B, T))
    jax.eval_shape(lambda tokens: function(params, tokens), tokens)
    return function, {name: jnp.asarray(value) for name, value in params.items()}, tokens
