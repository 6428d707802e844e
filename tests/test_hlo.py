"""What is read from a compiled program's text, against programs whose counts are known."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from prenorm_jax.bench import hlo


def test_operations_in_loops_count_as_often_as_they_are_done():
    def looped(x, w):
        def body(x, w):
            with jax.named_scope("inside"):
                return jnp.tanh(x @ w), None

        return jax.lax.scan(body, x, w)[0]

    text = jax.jit(looped).lower(jnp.ones((8, 16)), jnp.ones((5, 16, 16))).compile().as_text()
    loops = [operation for operation in hlo.operations(text) if operation.times == 5]
    assert any("inside" in operation.scope for operation in loops)
    assert {operation.times for operation in hlo.operations(text)} == {1, 5}


def test_collectives_and_their_sizes():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, jax.P("x")), NamedSharding(mesh, jax.P())
    gather = jax.jit(lambda x: x * 2, in_shardings=split, out_shardings=whole)
    text = gather.lower(jnp.ones((8, 4), jnp.float32)).compile().as_text()
    found = [operation for operation in hlo.operations(text) if operation.collective]
    assert [(operation.collective, operation.size) for operation in found] == [("all-gather", 8 * 4 * 4)]


def test_cycles_shapes_and_nested_loops_of_a_text():
    text = """HloModule jit_f
%async_collective_fusion.1 (p: bf16[4]) -> bf16[8] {
  %a = bf16[8] all-gather(%p), channel_id=7, dimensions={0}
}
%async_collective_fusion.2 (p: bf16[4]) -> bf16[8] {
  %a = bf16[8] all-gather(%p), channel_id=7, dimensions={0}
}
%branch (p: (f32[2])) -> (f32[2]) {
  %n = f32[2] negate(%p)
}
%inner (p: (f32[2])) -> (f32[2]) {
  %s = bf16[8] fusion(%p), kind=kCustom, calls=%async_collective_fusion.1
  %e = bf16[8] fusion(%p), kind=kCustom, calls=%async_collective_fusion.2
  %c = f32[2] conditional(%p), branch_computations={%other, %branch}
  %g = bf16[3,4]{1,0} fusion(%p), calls=%f, metadata={op_name="f/a/norm"}, backend_config={"estimated_cycles":"10"}
}
%outer (p: (f32[2])) -> (f32[2]) {
  %w = (f32[2]) while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %r = (f32[8], pred[5]) all-reduce-start(%p), to_apply=%sum
}
ENTRY %main (p: f32[2]) -> f32[2] {
  ROOT %w = (f32[2]) while(%p), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"2"}}
}
"""
    assert [(o.kind, o.times, o.size) for o in hlo.operations(text) if o.kind == "all-gather"] == [
        ("all-gather", 6, 16)
    ]
    operations = {operation.kind: operation for operation in hlo.operations(text)}
    fusion = operations["fusion"]
    assert (fusion.times, fusion.cycles, fusion.all_cycles) == (6, 10, 60)
    assert (fusion.size, fusion.scope) == (24, "f/a/norm")
    assert operations["negate"].times == 6
    reduced = operations["all-reduce-start"]
    assert (reduced.times, reduced.collective, reduced.size) == (2, "all-reduce", 37)
