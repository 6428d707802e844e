"""The library `datasets`, silenced: a run's output is lines of ours, `Data.description` or a PrenormError's reason."""

import logging

import datasets

datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

__all__ = ["datasets"]
