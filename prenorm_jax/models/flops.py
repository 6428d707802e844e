"""FLOPs of the matrix products of a model."""

from prenorm_jax.models.config import ModelConfig


def model_flops(config: ModelConfig, batch: int, length: int, training: bool, logits: int | None = None) -> float:
    """FLOPs of the matrix products of one forward pass, or of a training step (three times that).

    2 · tokens · (numbers in kernels) + 4 · B · T · S · H · K a layer for attention, half of it if causal, and with a
    window without what lies before it. They are what the model needs, not what is computed: norms, the conversion h and
    rematerialisation do not count, nor does a ViT's attention pooling. `length` is the tokens of a sequence; images
    have their own. `logits`: at how many of them there are logits; None: at all.
    """
    tokens, heads, kv = config.tokens(length), config.heads * config.head_dim, config.kv_heads * config.head_dim
    kernels = config.d_model * (2 * heads + 2 * kv + (3 if config.gated_mlp else 2) * config.mlp_dim)
    before_window = 0 if config.window is None else max(tokens - config.window, 0)
    attention = 4 * heads * (tokens**2 * (0.5 if config.causal else 1) - before_window**2 / 2)
    example = config.depth * (2 * tokens * kernels + attention) + config.flops_outside_blocks(length, logits)
    return batch * example * (3 if training else 1)
