"""GPT-2 Small on wikitext-103-raw: the check of training equivalence of arXiv 2305.14858 (appendix D.4, figure 7).

    python train.py --config=configs/gpt2_wikitext103.py --workdir=runs/gpt2-ln  --config.model.norm=layernorm
    python train.py --config=configs/gpt2_wikitext103.py --workdir=runs/gpt2-rms --config.model.norm=rmsnorm
    python train.py --config=configs/gpt2_wikitext103.py --workdir=runs/gpt2-crms --config.model.norm=crmsnorm
    python -m prenorm_jax.compare runs/gpt2-ln runs/gpt2-rms runs/gpt2-crms --out=report

Needs the network on its first run (the data set and GPT-2's tokenizer come from the Hugging Face hub), and accelerators
to end in reasonable time: 124 M parameters, 0.5 M tokens a step. Lower --config.batch_size where memory is short.

What was run: training steps of this model under each norm, on a CPU with a short batch (in the tests of two of its
blocks, to compile in less time), and the conversion of its parameters. What was not: the download, and the training.
The architecture is GPT-2's; batch size, schedule and dropout are in common use for it, not taken from the paper. So no
loss is claimed here.
"""

from ml_collections import ConfigDict

from prenorm_jax.config import base_config


def get_config() -> ConfigDict:
    """The run's configuration."""
    config = base_config()
    config.steps = 20_000
    config.batch_size = 512
    config.eval_every = 1000
    config.checkpoint_every = 1000

    config.data.hub = "Salesforce/wikitext"
    config.data.hub_config = "wikitext-103-raw-v1"
    config.data.eval_split = "validation"
    config.data.separate_documents = False  # its rows are lines; an article runs over many
    config.data.tokenizer = "gpt2"
    config.data.seq_len = 1024

    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 1000
    config.optimizer.weight_decay = 0.1

    config.model.vocab_size = 50257
    config.model.max_len = 1024
    config.model.depth = 12
    config.model.d_model = 768
    config.model.heads = 12
    config.model.activation = "gelu_tanh"
    config.model.dropout = 0.1
    return config
