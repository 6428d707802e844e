"""GPT-3 175B: `configs/gpt3.py` at its largest size, where its settings and what was not run are described.

    python train.py --config=configs/gpt3_175b.py --workdir=runs/gpt3-175b --config.model.norm=crmsnorm

175 G parameters; a step is 3.1 M tokens, 3.3e18 FLOPs. What was run: its shapes were traced and its parameters counted.
What was not: a step of it.
"""

from ml_collections import ConfigDict

from configs.gpt3 import get_config as gpt3


def get_config() -> ConfigDict:
    """The run's configuration."""
    return gpt3("175B")
