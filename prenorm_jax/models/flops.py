"""FLOPs of a model: of its matrix products, and of its norms."""

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
    share = 0.5 if config.causal else 1.0  # of the pairs of tokens; each side of a window leaves out a triangle
    windows = (config.of_block(i).window for i in range(config.depth))
    outside = (0 if window is None else max(tokens - window, 0) for window in windows)
    attention = sum(4 * heads * share * (tokens**2 - before**2) for before in outside)
    example = config.depth * 2 * tokens * kernels + attention + config.flops_outside_blocks(length, logits)
    return batch * example * (3 if training else 1)


def norm_operations(config: ModelConfig) -> int:
    """Operations of the norms on the stream for one token: additions, multiplications, each of the stream's numbers.

    Of each number: 2 for its square and the sum of these, 1 to be scaled; 1 more for the sum of all where an entry was
    dropped, 2 for a mean and its removal, 1 for each of γ and β where they are. Every norm counts, however fused.
    """
    a_number = {"layernorm": 5, "rmsnorm": 3, "crmsnorm": 4 if config.coordinates == "drop" else 3}[config.norm]
    affine = 1 + config.norm_bias

    def operations(norms: int, has_affine: bool) -> int:
        return norms * config.stream_width * (a_number + affine * has_affine)

    in_blocks = config.depth * (1 if config.parallel and config.shared_norm else 2) - (not config.first_norm)
    return operations(in_blocks, config.norm_affine) + operations(config.final_norm, bool(config.final_norm_affine))
