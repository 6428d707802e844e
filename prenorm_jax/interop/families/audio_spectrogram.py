"""AST, the Audio Spectrogram Transformer (transformers' `audio-spectrogram-transformer`).

A ViT of spectrograms (mel bins, frames, 1), which the library takes as (frames, mel bins), in patches that overlap.
With a classifier, which reads the mean of the two class tokens by way of a LayerNorm of its own, it gives logits;
without one all tokens (`last_hidden_state`).
"""

from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.families import vit
from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    classes = given.labels("classifier.dense.weight", "ForAudioClassification")
    strides = [given(f"{axis}_stride", default=10) for axis in ("frequency", "time")]
    if strides[0] != strides[1]:
        raise PrenormError(
            f"config.json: frequency_stride={strides[0]} and time_stride={strides[1]} differ: no model here does that"
        )
    return vit.config(given) | {
        "image_size": given("num_mel_bins", default=128),
        "image_width": given("max_length", default=1024),
        "patch_stride": strides[0],
        "channels": 1,
        "distillation_token": True,
        "classes": classes,
        "pooling": "class_pair" if classes else "none",
        "pooled_norm": bool(classes),
    }


FAMILY = Family(
    "audio-spectrogram-transformer",
    _config,
    table=vit.EMBEDDING
    + vit.ATTENTION
    + vit.BLOCK
    + """
    embeddings.distillation_token                       1 1 d    distillation_token                   1 d
    layernorm.{weight,bias}                             d        head_affine/{scale,bias}
    classifier.layernorm.{weight,bias}                  d        pooled_norm/{scale,bias}
    classifier.dense.weight                             v d      head/kernel                          d v
    classifier.dense.bias                               v        head/bias
    """,
    prefixes=("audio_spectrogram_transformer.",),
)
