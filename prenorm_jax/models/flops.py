"""FLOPs of the matrix products of a model."""

from __future__ import annotations

from prenorm_jax.models.config import ModelConfig


def model_flops(config: ModelConfig, batch: int, length: int, training: bool, logits: int | None = None) -> float:
    """FLOPs of the matrix products of one forward pass, or of a training step (three times that).

    2 · tokens · (numbers in kernels) + 4 · B · T · S · H · K a layer for attention, half of it if causal. They are what
    the model needs, not what is computed: norms, the conversion h and whatever is computed a second time to save memory
    do not count, nor does a ViT's attention pooling. `length` is the tokens of a sequence; images have their own.
    `logits` is at how many of them there are logits; None: at all.
    """
    tokens_per_row = length if config.family == "gpt" else config.patches + config.prefix
    heads, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = config.d_model * (2 * heads + 2 * kv + (3 if config.gated_mlp else 2) * config.mlp_dim)
    attention = 4 * tokens_per_row**2 * heads * (0.5 if config.causal else 1)
    row = config.depth * (2 * tokens_per_row * layer + attention)
    if config.family == "gpt":
        row += 2 * (length if logits is None else logits) * config.d_model * config.vocab_size
    else:
        patch = config.patch_size**2 * config.channels
        row += 2 * config.d_model * (config.patches * patch + config.classes)
    return batch * row * (3 if training else 1)
