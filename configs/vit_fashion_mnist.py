"""A small Vision Transformer on Fashion-MNIST (arXiv 1708.07747): 60,000 + 10,000 grey images of 28 × 28 pixels.

    python train.py --config=configs/vit_fashion_mnist.py --workdir=runs/fashion-ln --config.model.norm=layernorm

The IDX files are looked for where Debian's package dataset-fashion-mnist puts them; for another place (and for MNIST,
EMNIST, ...) give --config.data.path=FOLDER, of one data set.

0.2 M parameters, one epoch. On 2 CPU cores (AMD EPYC, no GPU): 2 minutes and 40 seconds, evaluation included. 83.3 % of
the 10,000 test images are classified correctly under each of the three norms.
"""

from ml_collections import ConfigDict

from prenorm_jax.config import base_config


def get_config() -> ConfigDict:
    """The run's configuration."""
    config = base_config("vit")
    config.steps = 937  # one epoch
    config.batch_size = 64
    config.eval_every = 234
    config.checkpoint_every = 468

    config.data.path = "/usr/share/datasets/fashion-mnist"
    config.augment.flip = True

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.b2 = 0.999
    config.optimizer.final_learning_rate = 0.0

    config.model.image_size = 28
    config.model.patch_size = 4
    config.model.channels = 1
    config.model.classes = 10
    config.model.positions = "sincos2d"
    config.model.depth = 4
    config.model.d_model = 64
    config.model.heads = 4
    return config
