"""GPT-3 of any size of its paper (arXiv 2005.14165), the size after a colon; without one it is Small.

    python train.py --config=configs/gpt3.py:Small --workdir=runs/gpt3-small --config.model.norm=crmsnorm
    python train.py --config=configs/gpt3.py:175B  --workdir=runs/gpt3-175b  --config.model.norm=crmsnorm

Sizes: Small (125 M), Medium (350 M), Large (760 M), XL (1.3 B), 2.7B, 6.7B, 13B, 175B.

From the paper, table 2.1 and appendix B: widths, depths and heads, 2,048 tokens of context, batch sizes in tokens (as
256, 512, 1024 and 1536 sequences), learning rates, warm-up over 375 M tokens, cosine to a tenth, Adam (.9, .95, 1e-8),
weight decay .1, clipping at 1, 300 G tokens in all. Computed in bfloat16, parameters and optimizer in float32.

Not as there: attention is dense in all layers; the batch does not grow from 32 k tokens at the start; the cosine ends
with the training, not at 260 G tokens; the vocabulary is padded (`sizes.py`). The paper's corpus is not public. These
runs take 9.9 G tokens of FineWeb-Edu (or what its sample has), 20 GB on disk, and so see each 30 times. For one pass:
--config.data.hub_config=sample-350BT --config.data.stream_tokens=300000000000 (600 GB); for a try: --config.steps=100
--config.data.stream_tokens=100000000. All of it is downloaded and tokenised before the first step, once.

What was run: the shapes of all sizes were traced and their parameters counted. What was not: the download, and the
training of any of them. So no loss is claimed here.
"""

from ml_collections import ConfigDict

from prenorm_jax import sizes
from prenorm_jax.base.errors import check_choice
from prenorm_jax.config import base_config

# size -> (sequences of 2,048 in a batch, learning rate): .5, 1, 2 and 3.2 M tokens.
TRAINING = {
    "Small": (256, 6.0e-4),
    "Medium": (256, 3.0e-4),
    "Large": (256, 2.5e-4),
    "XL": (512, 2.0e-4),
    "2.7B": (512, 1.6e-4),
    "6.7B": (1024, 1.2e-4),
    "13B": (1024, 1.0e-4),
    "175B": (1536, 0.6e-4),
}


def get_config(size: str = "Small") -> ConfigDict:
    """The run's configuration. Raises PrenormError for an unknown size."""
    check_choice("GPT-3 size", size, tuple(TRAINING))
    config = base_config()
    config.model.update(sizes.gpt3(size))
    config.model.dtype = "bfloat16"
    config.model.scan, config.model.remat = True, "full"

    config.data.hub = "HuggingFaceFW/fineweb-edu"
    config.data.hub_config = "sample-10BT"
    config.data.stream_tokens = 9_900_000_000
    config.data.holdout = 0.0001
    config.data.tokenizer = "gpt2"
    config.data.seq_len = 2048

    config.batch_size, config.optimizer.learning_rate = TRAINING[size]
    tokens = config.batch_size * config.data.seq_len
    config.steps = round(300e9 / tokens)
    config.optimizer.warmup_steps = round(375e6 / tokens)
    config.optimizer.final_learning_rate = 0.1
    config.optimizer.b1, config.optimizer.b2, config.optimizer.eps = 0.9, 0.95, 1e-8
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip = 1.0
    config.eval_every = 1000
    config.checkpoint_every = 1000
    return config
