"""How a parameter is created: its axes have names, and what belongs to it is said. Sharding and conversion read both.

At most one axis of ours lies on the residual stream:

    write        adds to the stream: embeddings, attention output, MLP down
    read         consumes a normalised stream: query, key, value, up, gate, head
    norm         the affine map of the norm that feeds readers
    layer_scale  multiplies what a branch writes
    raw          d wide, but not in stream coordinates: what follows at run time centres it (ModelConfig.raw_embedding,
                 ...), or it belongs to what comes after the stream

Off the stream, `normed_heads` and `normed_kv_heads` are the outputs of query and key that a LayerNorm over each head
follows: a linear map into another small stream, whose mean can be removed from the map's weights by the same argument.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prenorm_jax.base.trees import Path, at_least_float32

STREAM_AXES = ("write", "read", "norm", "layer_scale")
HEAD_AXES = ("normed_heads", "normed_kv_heads")
OTHER_AXES = ("raw", "vocab", "position", "heads", "kv_heads", "head_dim", "mlp")
OTHER_AXES += ("patch", "channel", "token", "class", "layer")


class NormSite(NamedTuple):
    """A norm of a network, whether it has parameters or not.

    Attributes:
      path: of its module; γ is the leaf (*path, "scale") and β (*path, "bias"), where it has them.
      epsilon: added to the mean square.
      stream: the name of the residual stream that it normalises, in networks that have several.
    """

    path: Path
    epsilon: float
    stream: str = ""


class Parameter(nn.LogicallyPartitioned):
    """A parameter with the names of its axes (see above) and what belongs to it.

    Attributes:
      norm: of a reader, the norm that feeds it; of γ and β, the norm they are of.
      head_dim: of an axis of HEAD_AXES, how many entries each norm over a head takes.
      scaled: of a LayerScale, the linear map whose output it multiplies.
    """

    norm: NormSite | None = flax.struct.field(default=None, pytree_node=False)
    head_dim: int | None = flax.struct.field(default=None, pytree_node=False)
    scaled: Path | None = flax.struct.field(default=None, pytree_node=False)


def annotated(init: Callable[..., Any], *axes: str, **belonging: Any) -> Callable[..., Parameter]:
    """The initialiser, whose array comes as a `Parameter` with these axis names and what belongs to it."""
    return lambda *args: Parameter(init(*args), axes, **belonging)


def spread(parameter: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A parameter that is the same for all tokens or examples, in this shape and dtype: all such come here.

    It is broadcast in float32 at least. The transpose of a broadcast is a sum, in the dtype of the broadcast: over
    thousands of tokens a bfloat16 one is off by percents.
    """
    return jnp.broadcast_to(at_least_float32(parameter), shape).astype(dtype)
