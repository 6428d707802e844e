"""ViT-S/16 on ImageNet-1k: the vision experiment of arXiv 2305.14858 (figure 6), in the recipe of DeiT III.

    python train.py --config=configs/vit_s16_imagenet.py --workdir=runs/vit-ln  --config.model.norm=layernorm
    python train.py --config=configs/vit_s16_imagenet.py --workdir=runs/vit-rms --config.model.norm=rmsnorm

Needs access to the gated hub data set, and accelerators: 22 M parameters, 800 epochs of 1.28 M images. Other sizes:
--config=configs/vit_s16_imagenet.py:B/16 (Ti, S, B, L, H, g, G, 22B; `prenorm_jax/sizes.py`).

From the recipe (arXiv 2204.07118, table 1, and the authors' command for ViT-S): LAMB at 4e-3, weight decay .05, 5 epochs
of warm-up, batches of 2048, clipping at 1, LayerScale from 1e-4, stochastic depth .05 in all blocks, positions for
patches alone, mixup .8, CutMix 1, flips, resized crops, binary cross-entropy. Not here: 3-Augment, colour jitter and
repeated augmentation; and crops are taken from the central square of an image, resized to 256 pixels.

What was run: training steps of this model under each norm on random images, on a CPU (in the tests of two of its
blocks, to compile in less time), and the conversion of its parameters. What was not: the download and the training. So
no accuracy is claimed here.

The layout of the parameters is that of the public JAX checkpoints (github.com/google-research/vision_transformer) by
other names; head axes are merged, and axes of length 1 are left out, which moves no number. So it is for the PyTorch
ones of `transformers` (below vit.), but for the transpose of each linear map that their layout has.

    here (d width, H heads of K)                         JAX: Transformer/encoderblock_i/...    transformers
    patch_embedding/{kernel (P, P, C, d), bias}          embedding                              embeddings.patch_embeddings.projection
    class_token (1, d)                                   cls (1, 1, d)                          embeddings.cls_token
    position_embedding (1 + patches, d)                  .../posembed_input/pos_embedding       embeddings.position_embeddings
    block_i/attention_norm/{scale, bias}                 LayerNorm_0                            encoder.layer.i.layernorm_before
    block_i/attention/{query, key, value}/kernel (d, HK) MultiHeadDotProductAttention_1 (d, H, K)  ...attention.attention.{query, key, value}
    block_i/attention/out/kernel (HK, d)                 .../out (H, K, d)                      ...attention.output.dense
    block_i/mlp_norm/{scale, bias}                       LayerNorm_2                            ...layernorm_after
    block_i/mlp/up, block_i/mlp/down                     MlpBlock_3/Dense_0, Dense_1            ...intermediate.dense, ...output.dense
    head_norm/{scale, bias}                              Transformer/encoder_norm               layernorm
    head/{kernel (d, classes), bias}                     head                                   classifier

With pooling="attention" (SigLIP, scaled ViTs): pool/{probe, query, key, value, out, mlp_norm, up, down} are MAPHead_0's
probe, MultiHeadDotProductAttention_0, LayerNorm_0, MlpBlock_0. LayerScale: block_i/attention/out_scale, mlp/down_scale.
"""  # noqa: E501

from ml_collections import ConfigDict

from prenorm_jax import sizes
from prenorm_jax.config import base_config

EPOCH = 1_281_167 / 2048  # steps


def get_config(size: str = "S/16") -> ConfigDict:
    """The run's configuration, for a size of `prenorm_jax/sizes.py`."""
    config = base_config("vit")
    config.steps = round(800 * EPOCH)
    config.batch_size = 2048
    config.eval_every = round(10 * EPOCH)
    config.checkpoint_every = round(5 * EPOCH)
    config.loss = "sigmoid"

    config.data.hub = "ILSVRC/imagenet-1k"
    config.data.eval_split = "validation"
    config.data.image_size = 256
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.augment.min_area = 0.08
    config.augment.flip = True
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0

    config.optimizer.name = "lamb"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = round(5 * EPOCH)
    config.optimizer.final_learning_rate = 0.0025
    config.optimizer.weight_decay = 0.05
    config.optimizer.b2 = 0.999

    config.model.update(sizes.vit(size))
    config.model.class_position = config.model.pooling != "class"
    config.model.layer_scale = 1e-4
    config.model.stochastic_depth = 0.05
    config.model.stochastic_depth_schedule = "constant"
    return config
