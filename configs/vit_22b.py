"""ViT-22B (arXiv 2302.05442): `configs/vit.py` at its largest size, for 64 TPU v5p.

    python -m prenorm_jax.aot --config=configs/vit_22b.py --topology=v5p:4x4x4 --norm=crmsnorm

Its own data (JFT-4B) are not public: the settings are a beginning for measurements, on ImageNet-1k, with AdamW, because
LAMB treats the matrices of scanned blocks as one. What was run: its step was compiled for these devices (see
docs/devices.md). What was not: a step of it.
"""

from ml_collections import ConfigDict

from configs.vit import get_config as vit


def get_config() -> ConfigDict:
    """The run's configuration."""
    config = vit("22B/14")
    config.batch_size = 4096
    config.optimizer.name = "adamw"
    config.model.update({"scan": True, "remat": "full", "stochastic_depth": 0.0})
    config.mesh.fsdp = 16
    config.mesh.largest_replicated = 2**23  # the head, whose 1,000 classes are few
    return config
