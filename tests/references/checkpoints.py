"""Tiny models of other libraries' own classes, in float64 throughout, with awkward parameters as real ones have."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import made_up_torchvision
import numpy as np
import pytest
from common import changed, relative
from common import logits as logits_of

import prenorm_jax
from prenorm_jax import convert_config, convert_params
from prenorm_jax.interop.export import export_checkpoint
from prenorm_jax.interop.importing import import_checkpoint
from prenorm_jax.interop.safetensors import map_file
from prenorm_jax.train import convert_run


@pytest.fixture(autouse=True)
def nothing_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a file of tests to name: the command's own comparison of logits would compile both networks at each call."""
    monkeypatch.setattr(convert_run, "COMPARED_BYTES", 0)


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


@functools.cache
def timm() -> ModuleType:
    """The library. Its ViTs need nothing of torchvision, for whose builds it is a matter of luck to fit torch's.

    So what it imports of that is made up while it is imported.
    """
    transformers()  # which would else believe in a torchvision

    sys.meta_path.insert(0, finder := made_up_torchvision.Finder())
    import timm

    sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    return timm


def make(model_type: str, seed: int = 0, **config: Any) -> Any:
    """A causal language model with awkward parameters."""
    import torch

    library = transformers()
    described = library.AutoConfig.for_model(model_type, **config)
    return awkward(library.AutoModelForCausalLM.from_config(described, dtype=torch.float64), seed)


def awkward(model: Any, seed: int = 0) -> Any:
    """γ and λ over two decades and of both signs, β of size 1, tables far off zero."""
    import torch

    rng = np.random.default_rng(seed)
    norms = {name for name, module in model.named_modules() if "LayerNorm" in type(module).__name__}
    tables = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        module, kind_of = name.rpartition(".")[::2]
        value = rng.normal(size=parameter.shape)
        if (module in norms and kind_of == "weight") or kind_of in ("lambda1", "lambda_1", "lambda_2", "gamma"):
            value = 10 ** rng.uniform(-1, 1, parameter.shape) * rng.choice([-1, 1], parameter.shape)
        elif any(name.startswith(f"{table}.") for table in tables) or (value.ndim == 3 and len(value) == 1):
            value += 3  # a table by itself: class token, registers, positions
        elif value.ndim > 1:
            value /= min(value.shape[0], value[0].size) ** 0.5
        parameter.data = torch.tensor(value)
    return model.to(torch.float64).eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """(B, T) -> (B, T, V)."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens), use_cache=False).logits.numpy()


def load(folder: Path) -> Any:
    """The model in the folder, by the class that its config.json names. No tensor may be left out or over."""
    import torch

    library = transformers()
    config = json.loads((folder / "config.json").read_text())
    if "architecture" in config:
        return timm().create_model(f"local-dir:{folder}", pretrained=True).to(torch.float64).eval()
    kind = getattr(library, config["architectures"][0])
    model, said = kind.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
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


def features(model: Any, images: np.ndarray, output: str | None) -> np.ndarray:
    """(B, H, W, C) -> one of the outputs; "": the only one; None: the pooled one of the image tower in it.

    Of a spectrogram (B, mel bins, frames, 1) the library takes (B, frames, mel bins); a masked autoencoder masks and
    shuffles nothing.
    """
    import torch

    pixels = torch.tensor(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        if output == "":
            return model(pixels).numpy()
        tower = model if output else model.vision_model
        given = {tower.main_input_name: pixels}
        if "input_values" in given:
            given = {"input_values": pixels[:, 0].transpose(1, 2)}
        if hasattr(tower.config, "mask_ratio"):
            assert tower.config.mask_ratio == 0
            given["noise"] = torch.arange(10**4, dtype=torch.float64)[: tower.embeddings.patch_embeddings.num_patches]
            given["noise"] = given["noise"].repeat(len(images), 1)
        return tower(**given)[output or "pooler_output"].numpy()


def embeds(model: Any, images: np.ndarray) -> np.ndarray:
    """The image embeddings of a CLIP, and of a whole one the text embeddings, in one row."""
    import torch

    pixels, tokens = torch.tensor(images).permute(0, 3, 1, 2), torch.arange(5)[None]
    with torch.no_grad():
        if not hasattr(model, "text_model"):
            return model(pixel_values=pixels)["image_embeds"].numpy()
        found = model(pixel_values=pixels, input_ids=tokens)
        return np.concatenate([found[name].numpy().ravel() for name in ("image_embeds", "text_embeds")])


def grouped(names: Iterable[str]) -> list[Any]:
    """Parameters of a fixture or a test; one worker has all tests of each, which share what is imported and traced."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


def imported(source: str | Path, norm: str, keep_affine: bool = False) -> Path:
    """The import of a source, beside it, which is made once for all tests."""
    place = Path(str(source).partition(":")[0]).parent / f"{norm}{'-kept' * keep_affine}"
    if not place.exists():
        import_checkpoint(source, place, norm, keep_affine=keep_affine)
    return place


def check_function(folder: Path, inputs: np.ndarray, expected: np.ndarray, oracle: Callable[..., np.ndarray]) -> None:
    """An import is the library's function under every norm; with the norms alone swapped it is not.

    `oracle`: (config, parameters, inputs) -> outputs, in NumPy.
    """
    config, params = prenorm_jax.load(folder)
    assert relative(logits_of(config, params, inputs), expected) < 1e-9
    for to in ("rmsnorm", "crmsnorm"):
        converted = convert_params(params, config, to)
        assert relative(logits_of(convert_config(config, to), converted, inputs), expected) < 1e-9, to
    assert relative(oracle(config, params, inputs[:1]), expected[:1]) < 1e-9
    assert relative(oracle(changed(config, norm="rmsnorm"), params, inputs[:1]), expected[:1]) > 1e-2


def check_way_back(source: str | Path, place: Path, one_more: str = "") -> None:
    """What is imported and exported again is bit for bit what it was.

    `one_more`: of names, of tensors that 1 is added to: these within the rounding of that sum.
    """
    export_checkpoint(imported(source, "layernorm"), place / "back", "layernorm")
    folder = Path(str(source).partition(":")[0])
    source, back = (map_file(where / "model.safetensors")[1] for where in (folder, place / "back"))
    assert source.keys() == back.keys()
    for name, tensor in source.items():
        if one_more and re.search(one_more, name):
            assert (np.abs(tensor - back[name]) <= np.spacing(np.abs(1 + tensor)) / 2).all(), name
            continue
        np.testing.assert_array_equal(tensor, back[name], strict=True, err_msg=name)


def exported(source: str | Path, place: Path, to: str, folds: bool) -> Any | None:
    """The library's model of an import under another norm that was exported as a LayerNorm network again.

    `folds`: whether all that is folded has a bias to go to in the format; where not, rmsnorm keeps its affine, and of
    crmsnorm, which cannot, the export is refused: None.
    """
    run = imported(source, to, keep_affine=to == "rmsnorm" and not folds)
    if to == "crmsnorm" and not folds:
        with pytest.raises(prenorm_jax.PrenormError, match=r"has no place for .*keep-affine"):
            export_checkpoint(run, place / "back", "layernorm")
        return None
    export_checkpoint(run, place / "back", "layernorm")
    return load(place / "back")
