"""Tiny models of other libraries' own classes, in float64 throughout, with awkward parameters as real ones have."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


@functools.cache
def transformers() -> ModuleType:
    """The library, where float32 means float64: its rotary positions and norms would else limit a comparison."""
    import torch

    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def make(model_type: str, seed: int = 0, **config: Any) -> Any:
    """A causal language model: γ over two decades and of both signs, β of size 1, tables far off zero."""
    import torch

    library, rng = transformers(), np.random.default_rng(seed)
    described = library.AutoConfig.for_model(model_type, **config)
    model = library.AutoModelForCausalLM.from_config(described, dtype=torch.float64).eval()
    norms = {name for name, module in model.named_modules() if type(module).__name__.endswith("LayerNorm")}
    tables = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        module, kind_of = name.rpartition(".")[::2]
        value = rng.normal(size=parameter.shape)
        if module in norms and kind_of == "weight":
            value = 10 ** rng.uniform(-1, 1, parameter.shape) * rng.choice([-1, 1], parameter.shape)
        elif any(name.startswith(f"{table}.") for table in tables):
            value += 3
        elif value.ndim == 2:
            value /= min(value.shape) ** 0.5
        parameter.data = torch.tensor(value)
    return model


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """(B, T) -> (B, T, V)."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens), use_cache=False).logits.numpy()


def load(folder: Path) -> Any:
    """The model in the folder, by the class that its config.json names. No tensor may be left out or over."""
    import torch

    library = transformers()
    model, said = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    left = {kind: names for kind, names in said.items() if names}
    assert not left, left
    return model.eval()


def generate(model: Any, ids: list[int], tokens: int, **options: Any) -> list[int]:
    """The likeliest tokens that the library's own `generate` adds, its end-of-text token included."""
    import torch

    given = torch.tensor([ids], dtype=torch.long)
    options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0} | options
    found = model.generate(given, attention_mask=torch.ones_like(given), **options)
    return found[0, len(ids) :].tolist()


def tokens_of(folder: Path, text: str) -> list[int]:
    """What the library's own tokenizer for the folder makes of a text, whatever it puts around it included."""
    return transformers().AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
