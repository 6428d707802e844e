"""The planned program, computed: equations whose output is raw, or without its mean, on operands that are."""

import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.trees import Array, at_least_float32
from prenorm_jax.folding import internals
from prenorm_jax.folding.plan import Plan
from prenorm_jax.folding.program import Block, Equation, Region, Value
from prenorm_jax.folding.rules import ONE, RAW, ZERO, Label
from prenorm_jax.folding.sites import Site

Key = tuple[Value, Label | None] | str  # a value as it is (None), or by a label; or ZERO, ONE
Env = dict[Key, Array]


def centre(x: Array, label: Label) -> Array:
    """x without its mean, in float32 at least; λ is not looked at."""
    x = at_least_float32(x)
    if not label.pieces:
        return x - x.mean(tuple(label.axes), keepdims=True)
    (axis,), xp = label.axes, np if isinstance(x, np.ndarray) else jnp
    parts = xp.split(x, [bound for start, stop, _ in label.pieces for bound in (start, stop)], axis)
    for i, (_, _, group) in enumerate(label.pieces):
        part = parts[2 * i + 1]
        groups = part.reshape(*part.shape[:axis], part.shape[axis] // group, group, *part.shape[axis + 1 :])
        parts[2 * i + 1] = (groups - groups.mean(axis + 1, keepdims=True)).reshape(part.shape)
    return xp.concatenate(parts, axis)


class Run:
    """One call of a plan's function."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __call__(self, args: list[Array]) -> list[Array]:
        """The outputs. Parameters come as the plan stores them (`plan.centred`), all else raw."""
        env: Env = {}
        for value in self.plan.read:
            if value.equation is None:
                self._put(env, value, value.data if value.kind == "constant" else args[value.index])
        self._run(self.plan.program.block, env)
        return [jnp.asarray(env[value, None]) for value in self.plan.program.outputs]

    def _put(self, env: Env, value: Value, array: Array) -> None:
        """What was computed, in the form it is stored in; if raw, for those who want it without its mean too."""
        env[value, self.plan.centred.get(value)] = array
        for label in self.plan.made.get(value, ()):
            env[value, label] = centre(jnp.asarray(array), label)

    def _run(self, block: Block, env: Env) -> None:
        for item in block:
            if isinstance(item, Region):
                self._region(item, env)
            elif item in self.plan.sites:
                self._put(env, item.outputs[0], self._at_site(self.plan.sites[item], env))
            elif item in self.plan.live:
                self._compute(item, env)

    def _compute(self, eqn: Equation, env: Env) -> None:
        bound: dict[tuple[Key, ...], list[Array]] = {}  # of a primitive with several outputs, by what it is given
        for i, out in enumerate(eqn.outputs):
            if out not in self.plan.read:
                continue
            keys = self._keys(eqn, out)
            if keys not in bound:
                pairs = zip(keys, eqn.inputs, strict=True)
                bound[keys] = internals.bind(eqn.eqn, [_operand(key, one, env) for key, one in pairs])
            self._put(env, out, bound[keys][i])

    def _keys(self, eqn: Equation, out: Value) -> tuple[Key, ...]:
        """What gives the output in the form it is stored in, of each operand."""
        label, keys = self.plan.centred.get(out), []
        found = [RAW] * len(eqn.inputs) if label is None else self.plan.needs(out, label)
        for i, (one, need) in enumerate(zip(eqn.inputs, found, strict=True)):
            stored = self.plan.centred.get(one)
            if need == RAW:
                need = one, stored if self.plan.indifferent(eqn, i, out) else None
            keys.append((one, stored or need) if isinstance(need, Label) else need)
        return tuple(keys)

    def _at_site(self, site: Site, env: Env) -> Array:
        """What a site gives of a base without mean: itself, or the mean of its square."""
        out, base = site.equation.outputs[0], site.base
        known = self.plan.known(base, site.label)
        z = env[base, None if known else self.plan.centred.get(base, site.label)].astype(out.aval.dtype)
        if site.form == "difference":
            return z
        mean = jnp.square(z).mean(tuple(site.mean.axes), keepdims=True)
        return jnp.broadcast_to(mean.reshape([1 if dim is None else z.shape[dim] for dim in site.mean.dims]), out.shape)

    def _region(self, region: Region, env: Env) -> None:
        carries, xs, ys = (
            [eqn for eqn in group if eqn in self.plan.live] for group in (region.carries, region.xs, region.ys)
        )

        def body(carry: list[Array], slices: list[Array]) -> tuple[list[Array], list[Array]]:
            inner = dict(env)
            for eqn, array in zip(carries + xs, [*carry, *slices], strict=True):
                self._put(inner, eqn.outputs[0], array)
            self._run(region.body, inner)
            return self._operands(carries, 1, inner), self._operands(ys, 0, inner)

        given = self._operands(carries, 0, env), self._operands(xs, 0, env)
        last, stacked = internals.region(region.eqn, body)(*given)
        for eqn, array in zip(carries + ys, [*last, *stacked], strict=True):
            self._put(env, eqn.outputs[-1], array)

    def _operands(self, equations: list[Equation], i: int, env: Env) -> list[Array]:
        """The i-th operand of each, for its first output."""
        return [_operand(self._keys(eqn, eqn.outputs[0])[i], eqn.inputs[i], env) for eqn in equations]


def _operand(key: Key, one: Value, env: Env) -> Array:
    if key in (ZERO, ONE):
        return jnp.full(one.shape, float(key == ONE), one.aval.dtype)
    return env[key] if key[1] is None else env[key].astype(one.aval.dtype)
