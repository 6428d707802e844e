"""A Vision Transformer of any size on ImageNet-1k, the size after a colon; without one it is S/16.

    python train.py --config=configs/vit.py:B/16   --workdir=runs/vit-b   --config.model.norm=crmsnorm
    python train.py --config=configs/vit.py:22B/14 --workdir=runs/vit-22b --config.model.norm=crmsnorm

Sizes: Ti, S, B, L, H, g, G, 22B (`prenorm_jax/sizes.py`), after the slash the patch size. Computed in bfloat16,
parameters and optimizer in float32. Needs access to the gated hub data set, and accelerators.

S, B, L and H have the recipe of `configs/vit_s16_imagenet.py` with the learning rate and stochastic depth that the
authors of DeiT III give each (github.com/facebookresearch/deit, README_revenge.md); theirs of B, L and H begin at 192,
192 and 160 pixels and are fine-tuned at 224, these train at 224 throughout. Ti is as S without stochastic depth. g, G
and 22B were trained on other data, which are not public: they have H's settings and no LayerScale, as a beginning
for measurements rather than a recipe.

What was run: the shapes of all sizes were traced and their parameters counted. What was not: the training of any. So no
accuracy is claimed here.
"""

from ml_collections import ConfigDict

from configs.vit_s16_imagenet import get_config as imagenet

# size -> (learning rate, stochastic depth)
TRAINING = {"Ti": (4e-3, 0.0), "S": (4e-3, 0.05), "B": (3e-3, 0.2), "L": (3e-3, 0.45), "H": (3e-3, 0.6)}


def get_config(size: str = "S/16") -> ConfigDict:
    """The run's configuration. Raises PrenormError for an unknown size."""
    config = imagenet(size)
    letter = size.partition("/")[0]
    config.optimizer.learning_rate, config.model.stochastic_depth = TRAINING.get(letter, TRAINING["H"])
    if letter not in TRAINING:
        config.model.layer_scale = None
    config.model.dtype = "bfloat16"
    return config
