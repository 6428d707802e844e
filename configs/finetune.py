"""A further run from the last checkpoint of another, imported or not, named after a colon: on other data, of any norm.

    python train.py --config=configs/finetune.py:runs/gpt2 --workdir=runs/tuned --config.data.path=notes \
        --config.model.norm=crmsnorm --config.steps=500

It has the configuration of that run, network, tokenizer and all, and starts with its parameters and a new optimizer.
The data must be named. Whatever norm the other run has, Pre-LN's parameters are trained (`pre_ln`) unless the other
run trains those of its own norm (`native`): so import --to=layernorm to train as the source would be.

What was run: a tiny GPT-2, imported, under each norm (in the tests). What was not: the tuning of a large model. So no
loss is claimed here.
"""

from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.train.workdir import load_config


def get_config(workdir: str = "") -> ConfigDict:
    """The run's configuration. Raises PrenormError if `workdir` is none."""
    if not workdir:
        raise PrenormError("name the run to start from after a colon, as in configs/finetune.py:runs/gpt2")
    config = load_config(workdir)
    config.init_from = workdir
    for key in ("path", "hub", "eval_path", "eval_split"):
        if key in config.data:
            config.data[key] = None
    return config
