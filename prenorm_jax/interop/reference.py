"""A source's outputs as its own library computes them, in float64 throughout, in a process of its own.

`python -m prenorm_jax.interop.reference FOLDER PROBES.npz OUTPUTS.npz` is that process: in it torch.float32 means
float64, since the library computes rotary angles and norms in float32 whatever the model's dtype is, and that would
limit the comparison.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.files import read_json
from prenorm_jax.models.config import ModelConfig

STANDARD = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class Reference(NamedTuple):
    """Outputs to compare with.

    Attributes:
      outputs: (probes, positions, V), float64; of images (probes, 1, V), or with all tokens (probes, 1, T, V).
      by: who computed them, in words.
      of_library: whether it was the source's own library, now or earlier.
      versions: library -> version, where it was.
    """

    outputs: np.ndarray
    by: str
    of_library: bool
    versions: dict[str, str]


def why_not(folder: Path, asked: str, model: ModelConfig) -> str:
    """Why the source's own library cannot be asked; "" if it can."""
    if model.inputs == "images" and not (folder / "config.json").is_file():
        return "it has no config.json, without which no library computes it"
    libraries = ("timm", "torch") if _is_timms(folder) else ("transformers", "torch")
    if missing := [name for name in libraries if importlib.util.find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed"
    if Path(asked).is_file() and Path(asked).name not in STANDARD:
        return f"the library reads the folder's standard files, not {Path(asked).name}"
    if not any((folder / name).is_file() for name in STANDARD):
        return f"{folder} has none of {', '.join(STANDARD)}"
    return ""


def _is_timms(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and "architecture" in read_json(path)


def by_library(folder: Path, model: ModelConfig, inputs: np.ndarray, positions: np.ndarray) -> Reference:
    """What the library of the folder's checkpoint makes of the inputs. Raises PrenormError if it fails.

    Of (probes, 1, T) tokens the outputs at these positions; or of (probes, 1, height, width, C) images.
    """
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place) / "probes.npz", Path(place) / "outputs.npz"
        np.savez(given, inputs=inputs, positions=positions, asked=asked(model))
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": path}
        line = [sys.executable, "-m", "prenorm_jax.interop.reference", str(folder.absolute()), str(given), str(made)]
        done = subprocess.run(line, env=os.environ | offline, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [text for text in done.stderr.strip().splitlines() if text.strip()][-1:] or [str(done.returncode)]
            raise PrenormError(f"its library does not compute {folder}: {' '.join(said[0].split())[:300]}")
        with np.load(made) as arrays:
            outputs, versions = arrays["outputs"], json.loads(str(arrays["versions"]))
    by = " and ".join(f"{name} {version}" for name, version in versions.items())
    return Reference(outputs, f"{by}, in float64 throughout", True, versions)


def asked(model: ModelConfig) -> tuple[str, str]:
    """The class of transformers' that computes what the model does, and which of its outputs that is.

    Of a classifier it is that of config.json, where it names one.
    """
    if model.inputs == "images":
        if model.classes:
            return "AutoModelForImageClassification", "logits"
        return "AutoModel", "last_hidden_state" if model.pooling == "none" else "pooler_output"
    if model.decodes:
        return "AutoModelForCausalLM", "logits"
    if model.tie_embeddings or model.outputs == model.vocab_size:
        return "AutoModelForMaskedLM", "logits"
    return "AutoModel", "last_hidden_state" if model.token_outputs else "pooler_output"


def main(argv: Sequence[str]) -> None:
    """The process. Raises what the library raises, and ValueError for a checkpoint that lacks tensors."""
    folder, given, made = argv
    import torch

    with np.load(given) as arrays:
        inputs, positions, (kind, output) = arrays["inputs"], arrays["positions"], arrays["asked"].tolist()
    model = _timm(folder) if _is_timms(Path(folder)) else _transformers(folder, kind)
    with torch.no_grad():
        if inputs.ndim > 3:
            pixels = torch.tensor(inputs.astype(np.float64)).permute(0, 1, 4, 2, 3)
            outputs = [_of_image(model, pixels_1xCxHxW, output).numpy() for pixels_1xCxHxW in pixels]
        else:
            outputs = [_of_text(model, tokens, output).numpy() for tokens in inputs]
            outputs = outputs if output == "pooler_output" else [each[0, positions] for each in outputs]
    names = [name for name in ("transformers", "timm", "torch") if name in sys.modules]
    versions = json.dumps({name: str(sys.modules[name].__version__) for name in names})
    np.savez(made, outputs=np.stack(outputs).astype(np.float64), versions=versions)


def _in_float64() -> None:
    """From here on torch.float32 means float64."""
    import torch

    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double


def _transformers(folder: str, asked: str) -> Any:
    """The model in the folder, by the class asked for."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = _class(transformers, folder, asked)
    options = {"dtype": torch.float64, "local_files_only": True, "output_loading_info": True}
    stored, said = kind.from_pretrained(folder, **options)
    not_asked = ("pooler.dense.", "vision_model.pooler.dense.")
    if missing := sorted(name for name in said["missing_keys"] if not name.startswith(not_asked)):
        raise ValueError(f"the checkpoint lacks {', '.join(missing[:3])}, which the library then draws at random")
    state, config = stored.state_dict(), stored.config
    del stored
    _in_float64()
    if hasattr(config, "mask_ratio"):  # of a masked autoencoder, which masks nothing here
        config.mask_ratio = 0.0
    make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    model = make(config, dtype=torch.float64).eval()
    for name, exact in model.named_buffers():  # frequencies that are stored, if they are these in float32
        if name in state and torch.allclose(state[name].to(exact.dtype), exact, rtol=1e-6, atol=0):
            state[name] = exact
    model.load_state_dict(state)
    return model


def _class(library: Any, folder: str, asked: str) -> Any:
    """The class asked for, or, for a classifier and a tower that it does not know, that of config.json."""
    config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
    kind, (named, *_) = getattr(library, asked), config.architectures or [""]
    if named == "BeitForMaskedImageModeling":
        raise ValueError("the library does not give the tokens that the head of masked image modelling reads")
    classifies = asked == "AutoModelForImageClassification"
    return kind if type(config) in kind._model_mapping and not (classifies and named) else getattr(library, named)


def _timm(folder: str) -> Any:
    import timm
    import torch

    torch.set_default_dtype(torch.float64)  # of the parameters, into which the file's numbers are copied
    state = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    _in_float64()
    made = timm.create_model(f"local-dir:{folder}", pretrained=False).eval()
    made.load_state_dict(state)
    return made


def _of_text(model: Any, tokens: np.ndarray, output: str) -> Any:
    """An output of one text; of a whole CLIP or SigLIP its tower's."""
    import torch

    model = getattr(model, "text_model", model)
    said = {"use_cache": False} if output == "logits" and hasattr(model, "generate") else {}
    return model(torch.tensor(tokens.astype(np.int64)), **said)[output]


def _of_image(model: Any, pixels_1xCxHxW: Any, output: str) -> Any:
    """An output of one image; of a whole CLIP or SigLIP its tower's. Nothing is shuffled."""
    import torch

    if "timm" in sys.modules:
        return model(pixels_1xCxHxW)
    tower = getattr(model, "vision_model", model) if output == "pooler_output" else model
    if tower.main_input_name == "input_values":  # (1, frames, mel bins)
        return tower(input_values=pixels_1xCxHxW[:, 0].transpose(1, 2))[output]
    given = {"pixel_values": pixels_1xCxHxW}
    if hasattr(tower.config, "mask_ratio"):
        given["noise"] = torch.arange(tower.embeddings.patch_embeddings.num_patches)[None]
    return tower(**given)[output]


if __name__ == "__main__":
    main(sys.argv[1:])
