"""How much of the machine a run uses: the FLOPs its model needs, over what the hardware could do in that time."""

from __future__ import annotations

import dataclasses

from prenorm_jax.models.flops import model_flops
from prenorm_jax.models.registry import model_config
from prenorm_jax.train.run import Run

# Dense peak TFLOP/s of one JAX device, by `device_kind` and the dtype of the computation; a kind that is not here is
# not guessed. NVIDIA's data sheets give the products of sparse matrices, twice these. float32 is what JAX multiplies
# with unless told otherwise: TF32 on NVIDIA's tensor cores, one bfloat16 pass on a TPU's MXU.
#
# TPUs: docs.cloud.google.com/tpu/docs, "Peak compute per chip (bf16)" on the pages v4, v5e, v5p, v6e and tpu7x. A
# device is a chip, but for TPU7x half of one.
# GPUs: NVIDIA's data sheets "A100 80GB", "H100", "H200" and "Blackwell" (HGX B200, an eighth of its eight GPUs); H100
# SXM to a decimal from the white paper "H100 Tensor Core GPU Architecture".
_TPU = {
    **dict.fromkeys(("TPU v4",), 275.0),
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), 197.0),
    **dict.fromkeys(("TPU v5", "TPU v5p"), 459.0),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), 918.0),
    **dict.fromkeys(("TPU7x",), 2307.0 / 2),
}
_GPU = {
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312.0),
    **dict.fromkeys(("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), 312.0),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), 989.4),
    **dict.fromkeys(("NVIDIA H100 NVL", "NVIDIA H200 NVL"), 835.5),
    **dict.fromkeys(("NVIDIA H100 PCIe",), 756.0),
    **dict.fromkeys(("NVIDIA B200",), 2250.0),
}
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    kind: {"bfloat16": peak, "float32": peak} for kind, peak in _TPU.items()
} | {kind: {"bfloat16": peak, "float16": peak, "float32": peak / 2} for kind, peak in _GPU.items()}


def data_sheet_flops(kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device of this `device_kind` for a computation in `dtype`; None where it is not known."""
    peak = PEAK_TFLOPS.get(kind, {}).get(dtype)
    return None if peak is None else 1e12 * peak


def mfu(flops: float, seconds: float, devices: int, kind: str, dtype: str) -> float | None:
    """Model FLOPs utilisation (arXiv 2204.02311, appendix B): the share of the devices' peak that was used.

    `flops` are those of all `devices` in these `seconds`. None where the peak is not known, such as on a CPU.
    """
    peak = data_sheet_flops(kind, dtype)
    return None if peak is None else flops / seconds / (devices * peak)


@dataclasses.dataclass(frozen=True)
class Utilisation:
    """What a run's speed is held against.

    Attributes:
      flops: of one optimizer step over all devices, however many passes its batch takes.
      devices: that share the step.
      kind: their `device_kind`.
      dtype: of the computation.
      causal: for `describe` alone: whether attention counts half.
    """

    flops: float
    devices: int
    kind: str
    dtype: str
    causal: bool

    @staticmethod
    def of(run: Run) -> Utilisation:
        """For a run on its mesh."""
        model, mesh = model_config(run.config.model), run.mesh
        flops = model_flops(model, run.config.batch_size, run.kind.length(run.config), training=True)
        return Utilisation(flops, mesh.size, mesh.devices.flat[0].device_kind, model.dtype, model.causal)

    def rates(self, seconds: float) -> dict[str, float]:
        """{model_flops_per_s, mfu (where the peak is known)} for steps that take so many seconds each."""
        share = mfu(self.flops, seconds, self.devices, self.kind, self.dtype)
        return {"model_flops_per_s": self.flops / seconds} | ({} if share is None else {"mfu": share})

    def describe(self) -> str:
        """One line: how the FLOPs of a step are counted, and the peak they are held against."""
        attention = f"{2 if self.causal else 4} · tokens · length · heads · head_dim a layer"
        formula = f"3 × (2 · tokens · numbers in kernels + {attention}) = {self.flops:.4g} model FLOPs a step"
        peak = data_sheet_flops(self.kind, self.dtype)
        of = f"{self.devices} × {self.kind} in {self.dtype}"
        known = "the peak is not known, so no mfu" if peak is None else f"mfu is of {peak / 1e12:g} TFLOP/s each"
        return f"{formula}; {of}: {known}"
