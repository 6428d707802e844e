"""The parts of JAX that have no public name, in one place. `tests/test_fold.py` names what is relied on.

Public and used elsewhere in the room: `jax.make_jaxpr`, `jax.extend.core` (`ClosedJaxpr`, `Literal`), an equation's
`primitive`, `params`, `invars`, `outvars` and `effects`, which a jaxpr has too.
"""

import functools
import os
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as core
from jax.interpreters import partial_eval

INLINED = ("jit", "pjit", "closed_call", "core_call")  # calls that mean nothing but their body: parameter `jaxpr`
REMAT = ("checkpoint", "remat2", "remat")  # `jax.checkpoint`: parameters `jaxpr`, `policy`, `prevent_cse`
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


class Body(NamedTuple):
    """A program and the arrays of its `constvars`. (From jax 0.12 on a jaxpr has them itself.)"""

    jaxpr: core.Jaxpr
    consts: Sequence[Any]


def body_of(jaxpr: Any) -> Body:
    """That of a jaxpr, closed or without constants."""
    return Body(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()))


def without_dead_code(body: Body) -> Body:
    """The same program without what no output needs, in the bodies of loops too; every input stays."""
    jaxpr, _ = partial_eval.dce_jaxpr(body.jaxpr, [True] * len(body.jaxpr.outvars), instantiate=True)
    return Body(jaxpr, body.consts)


def bind(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """The equation's primitive on these values, in the context (meshes, computation types) that it was traced in."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        result = eqn.primitive.bind(*values, **params)
    return list(result) if eqn.primitive.multiple_results else [result]


def bodies(eqn: core.JaxprEqn) -> list[Body]:
    """The programs among the equation's parameters, such as a loop's body or the branches of a cond."""
    values = [one for value in eqn.params.values() for one in (value if isinstance(value, tuple | list) else [value])]
    return [body_of(one) for one in values if isinstance(one, core.Jaxpr | core.ClosedJaxpr)]


def scan_counts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """How many of a scan's operands are constant, and how many are carried; they come in this order."""
    if "ft_in" in eqn.params:  # from jax 0.12 on
        consts, carries, _ = map(len, eqn.params["ft_in"].unpack())
        return consts, carries
    return eqn.params["num_consts"], eqn.params["num_carry"]


def region(eqn: core.JaxprEqn, body: Callable[..., Any]) -> Callable[..., Any]:
    """The scan or the checkpoint with another body: of (carry, slices), of which a checkpoint has none."""
    if eqn.primitive.name == "scan":
        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        return functools.partial(jax.lax.scan, body, **options)
    return jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])


def where(eqn: core.JaxprEqn) -> str:
    """The user's line that the equation comes from, as file:line: the innermost outside of libraries; or ""."""
    frames = eqn.source_info.traceback.frames if eqn.source_info.traceback else []
    own = [frame for frame in frames if not frame.file_name.startswith(("<", *_LIBRARIES))]
    return f"{os.path.relpath(own[0].file_name)}:{own[0].line_num}" if own else ""


def scope(eqn: core.JaxprEqn) -> str:
    """The names of the modules and `jax.named_scope`s around the equation, as a/b/c, where there are some."""
    return str(eqn.source_info.name_stack)


def is_tracer(value: Any) -> bool:
    """Whether an array is only traced, and has no numbers."""
    return isinstance(value, jax.core.Tracer)
