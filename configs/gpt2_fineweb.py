"""GPT-2 Small on a streamed corpus: 2.5 G tokens of FineWeb-Edu, about 20 for each of its 124 M parameters.

    python train.py --config=configs/gpt2_fineweb.py --workdir=runs/fineweb-ln   --config.model.norm=layernorm
    python train.py --config=configs/gpt2_fineweb.py --workdir=runs/fineweb-crms --config.model.norm=crmsnorm

The first run streams the data set from the Hugging Face hub, tokenises it as it comes and keeps the tokens, 5 GB, in
~/.cache/prenorm_jax (--config.data.cache=FOLDER); later ones map that file into memory and load no text. Training
starts when it is whole; --config.data.stream_tokens=100000000 is enough for a try. One document in a thousand is held
out. The sample has about 10 G tokens: to take more of them, raise --config.steps as well.

What was run: training steps of a GPT-2 of this size (see `configs/gpt2_wikitext103.py`), on a CPU; the streaming of
small local data sets. What was not: the download, and the training. So no loss is claimed here.
"""

from ml_collections import ConfigDict

from prenorm_jax import sizes
from prenorm_jax.config import base_config


def get_config() -> ConfigDict:
    """The run's configuration."""
    config = base_config()
    config.batch_size = 512
    config.eval_every = 500
    config.checkpoint_every = 500

    config.data.hub = "HuggingFaceFW/fineweb-edu"
    config.data.hub_config = "sample-10BT"
    config.data.stream_tokens = 2_500_000_000
    config.data.holdout = 0.001
    config.data.tokenizer = "gpt2"
    config.data.seq_len = 1024
    config.steps = config.data.stream_tokens // (config.batch_size * config.data.seq_len)  # each token once

    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 0.1

    config.model.update(sizes.gpt3("Small") | {"max_len": 1024})  # GPT-2's shapes but for its context
    config.model.dtype = "bfloat16"
    return config
