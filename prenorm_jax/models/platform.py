"""What programs for each platform are built with: the one place where platforms differ.

docs/speed.md, "What each platform is told", has the figures behind each line.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Platform:
    """Choices that do not change what is computed, up to rounding.

    Attributes:
      merge_batch_and_heads: attention multiplies arrays of three axes, batch and heads in one. XLA:CPU copies operands
        of more axes, and fuses softmax worse; XLA:TPU is the slower with three.
      sum_as_column: softmax's sum is one more column of its product with the values, where heads are no multiple of so
        many columns, which the MXU multiplies at once: a pass over the scores less. 0: nowhere.
      remat_normed: the backward pass multiplies the normalised x out anew, so that only x is a residual. In unrolled
        blocks XLA:CPU then writes more, and needs no less memory.
      pad_bytes: operands of matrix products are padded with zeros to rows of whole multiples of this, without which
        cuBLAS cannot use tensor cores well.
      row_major: gradients, and the stream in training, get the row-major layout. XLA:TPU otherwise chooses one for one
        reader, and copies the array for all others.
      barriers: `placement.fusion_barrier` keeps XLA:TPU from fusing two products into one slower operation.
      gather_label: the loss gathers the label's logit; a reduction over all of them instead lets XLA:TPU fuse it.
      compiler_options: of `jax.jit`.
    """

    merge_batch_and_heads: bool = False
    sum_as_column: int = 0
    remat_normed: bool = True
    pad_bytes: int = 1
    row_major: bool = False
    barriers: bool = False
    gather_label: bool = True
    compiler_options: dict[str, Any] | None = None


PLATFORMS = {
    "cpu": Platform(merge_batch_and_heads=True, remat_normed=False),
    "gpu": Platform(pad_bytes=16),
    "tpu": Platform(
        sum_as_column=128,
        row_major=True,
        barriers=True,
        gather_label=False,
        # By default the largest parameter, such as an embedding table, is prefetched into VMEM before a program starts,
        # and stays there to its end: the blocks in between have no room then.
        compiler_options={"xla_max_cross_program_prefetches": 0},
    ),
}


def platform_named(name: str) -> Platform:
    """That of "cpu", "gpu" or "tpu"; of others the defaults."""
    return PLATFORMS.get(name, Platform())
