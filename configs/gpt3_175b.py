"""GPT-3 175B: `configs/gpt3.py` at its largest size, for 128 TPU v5p.

    python train.py --config=configs/gpt3_175b.py --workdir=runs/gpt3-175b --config.model.norm=crmsnorm
    python -m prenorm_jax.aot --config=configs/gpt3_175b.py --topology=v5p:4x4x8 --norm=crmsnorm

175 G parameters; a step is 3.1 M tokens, 3.3e18 FLOPs. What was run: its step was compiled for these devices (see
docs/devices.md). What was not: a step of it.
"""

from ml_collections import ConfigDict

from configs.gpt3 import get_config as gpt3


def get_config() -> ConfigDict:
    """The run's configuration."""
    config = gpt3("175B")
    config.log_every, config.checkpoint_every, config.grace_seconds = 1, 50, 900  # a step takes a minute or two
    config.mesh.fsdp, config.mesh.tensor, config.accumulate = 32, 4, 6
    return config
