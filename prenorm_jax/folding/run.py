"""The planned program, computed: equations whose output is raw, or without its mean, on operands that are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.trees import Array, at_least_float32
from prenorm_jax.folding import internals
from prenorm_jax.folding.plan import Label, Plan
from prenorm_jax.folding.program import Block, Equation, Region, Value
from prenorm_jax.folding.rules import RAW, UNREAD, ZERO
from prenorm_jax.folding.sites import Site

Key = tuple[Value, Label | None]  # a value in a form: raw (None), or by a label
Env = dict[Key, Array]


def centre(x: Array, axes: frozenset[int], scale: Array | None = None, dims: tuple[int, ...] = ()) -> Array:
    """C(scale ⊙ x), in float32 at least; the result has x's dtype. The scale's axes are `dims` of x."""
    dtype, places = x.dtype, tuple(sorted(axes))
    x = at_least_float32(x)
    if scale is not None:
        order = np.argsort(dims)
        shape = [x.shape[axis] if axis in dims else 1 for axis in range(x.ndim)]
        x = x * scale.transpose(order).reshape(shape)
    return (x - x.mean(places, keepdims=True)).astype(dtype)


class Runner:
    """A plan as a function of the flat arguments. What no output needs is not computed."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.centred = plan, plan.centred
        self.forms: dict[Value, dict[Label | None, None]] = {}  # those that something reads of each value, in order
        for value in plan.program.outputs:
            self._mark(value, None)
        self._mark_block(plan.program.block)
        for value in list(self.forms):
            if value.equation is None:
                self._mark_scales(value)

    # Before any array: which forms are read.

    def _mark(self, value: Value, form: Label | None) -> None:
        self.forms.setdefault(value, {})[form] = None

    def _mark_scales(self, value: Value) -> None:
        for form in self.forms[value]:
            if form is not None and form.scale is not None and form != self.centred.get(value):
                self._mark(form.scale, None)

    def _mark_block(self, block: Block) -> None:
        for item in reversed(block):
            if isinstance(item, Region):
                for eqn in item.carries:
                    for out in eqn.outputs:
                        self._mark(out, self.centred.get(out))
                for eqn in item.ys + item.carries:
                    self._mark_equation(eqn)
                self._mark_block(item.body)
                for eqn in item.xs:
                    self._mark_equation(eqn)
            else:
                self._mark_equation(item)

    def _mark_equation(self, eqn: Equation) -> None:
        for out in eqn.outputs:
            if out in self.forms:
                self._mark_scales(out)
                for key in self._operands(eqn, out):
                    if isinstance(key, tuple):
                        self._mark(*key)

    def _operands(self, eqn: Equation, out: Value) -> list[Any]:
        """What computes the output in the form it is stored in: a key for each operand, ZERO or UNREAD."""
        site, label = self.plan.sites.get(eqn), self.centred.get(out)
        if site is not None and self.plan.folded(site):
            known = self.plan.known(site.base, Label(site.axes))
            return [(site.base, None if known else Label(site.axes))]
        found = [RAW] * len(eqn.inputs) if label is None else self.plan.needs(out, label)
        for i, (one, need) in enumerate(zip(eqn.inputs, found, strict=True)):
            if need == RAW and one in self.centred and not self.plan.indifferent(eqn, i):
                raise AssertionError(f"the plan is wrong: {eqn.name} at {eqn.where} reads what has lost its mean")
        return [
            (one, need) if isinstance(need, Label) else (one, self.centred.get(one)) if need == RAW else need
            for one, need in zip(eqn.inputs, found, strict=True)
        ]

    # The arrays.

    def __call__(self, args: list[Array]) -> list[Array]:
        """The outputs. Parameters come as the plan stores them (`plan.centred`), all else raw."""
        env: Env = {}
        for value in self.forms:
            if value.kind in ("parameter", "input"):
                env[value, self.centred.get(value)] = args[value.index]
            elif value.equation is None:
                env[value, None] = value.data
        for value in self.forms:
            if value.equation is None:
                self._add_forms(value, env)
        self._run(self.plan.program.block, env)
        return [env[value, None] for value in self.plan.program.outputs]

    def _add_forms(self, value: Value, env: Env) -> None:
        """Removes the mean of what was computed raw, for those who want it without."""
        for form in self.forms[value]:
            if (value, form) not in env:
                raw = jnp.asarray(env[value, None])
                scale = None if form.scale is None else jnp.asarray(env[form.scale, None])
                env[value, form] = centre(raw, form.axes, scale, form.dims)

    def _run(self, block: Block, env: Env) -> None:
        for item in block:
            if isinstance(item, Equation):
                self._compute(item, env)
            elif item.name == "scan":
                self._scan(item, env)
            else:
                self._checkpoint(item, env)

    def _compute(self, eqn: Equation, env: Env) -> None:
        bound: dict[tuple[Any, ...], list[Array]] = {}  # of a primitive with several outputs, by what it is given
        for i, out in enumerate(eqn.outputs):
            if out not in self.forms:
                continue
            keys = tuple(self._operands(eqn, out))
            site = self.plan.sites.get(eqn)
            if site is not None and self.plan.folded(site):
                result = _at_site(site, env[keys[0]], out)
            elif UNREAD in keys:
                result = next(env[key] for key in keys if key != UNREAD).astype(out.aval.dtype)
            else:
                if keys not in bound:
                    pairs = zip(keys, eqn.inputs, strict=True)
                    values = [_zeros(one) if key == ZERO else env[key] for key, one in pairs]
                    bound[keys] = internals.bind(eqn.eqn, values)
                result = bound[keys][min(i, len(bound[keys]) - 1)]
            env[out, self.centred.get(out)] = result
            self._add_forms(out, env)

    def _scan(self, region: Region, env: Env) -> None:
        params = region.eqn.params
        starts = [eqn.outputs[0] for eqn in region.carries]
        ends = [self._operands(eqn, start) for eqn, start in zip(region.carries, starts, strict=True)]
        xs = self._turns(region.xs)
        ys = self._turns(region.ys)

        def body(carry: list[Array], slices: list[Array]) -> tuple[list[Array], list[Array]]:
            inner = dict(env)
            given = [*zip(starts, carry, strict=True), *((value, x) for (value, _), x in zip(xs, slices, strict=True))]
            for value, array in given:
                inner[value, self.centred.get(value)] = array
            for value, _ in given:
                self._add_forms(value, inner)
            self._run(region.body, inner)
            return [inner[end] for _, end in ends], [inner[key] for _, key in ys]

        init, length = [env[start] for start, _ in ends], params["length"]
        options = {"reverse": params["reverse"], "unroll": params["unroll"]}
        last, stacked = jax.lax.scan(body, init, [env[key] for _, key in xs], length, **options)
        outputs = [eqn.outputs[1] for eqn in region.carries] + [value for value, _ in ys]
        for value, array in zip(outputs, [*last, *stacked], strict=True):
            env[value, self.centred.get(value)] = array
            self._add_forms(value, env)

    def _turns(self, equations: list[Equation]) -> list[tuple[Value, Key]]:
        """What a scan takes or gives turn by turn and something reads: each with what it is made of."""
        read = [eqn for eqn in equations if eqn.outputs[0] in self.forms]
        return [(eqn.outputs[0], self._operands(eqn, eqn.outputs[0])[0]) for eqn in read]

    def _checkpoint(self, region: Region, env: Env) -> None:
        keys = [(value, form) for value in region.outputs for form in self.forms.get(value, ())]
        params = region.eqn.params

        def body() -> list[Array]:
            inner = dict(env)
            self._run(region.body, inner)
            return [inner[key] for key in keys]

        kept = jax.checkpoint(body, policy=params["policy"], prevent_cse=params["prevent_cse"])
        env.update(zip(keys, kept(), strict=True))


def _zeros(value: Value) -> Array:
    return jnp.zeros(value.shape, value.aval.dtype)


def _at_site(site: Site, z: Array, out: Value) -> Array:
    """What a site gives of a base without mean: itself, or the mean of its square."""
    z = z.astype(out.aval.dtype)
    if site.form == "difference":
        return z
    mean = jnp.square(z).mean(tuple(sorted(site.axes)))
    kept = [axis for axis in range(z.ndim) if axis not in site.axes]
    places = {dim: axis for axis, dim in enumerate(site.dims) if dim is not None}
    units = [axis for axis in kept if axis not in places]  # of one entry, and not in the output
    mean = mean.reshape([mean.shape[i] for i, axis in enumerate(kept) if axis not in units])
    return jax.lax.broadcast_in_dim(mean, out.shape, [places[axis] for axis in kept if axis in places])
