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


def output_of(model: ModelConfig) -> str:
    """What transformers calls the output that a model of ours gives."""
    if model.inputs == "text" or model.classes:
        return "logits"
    return "last_hidden_state" if model.pooling == "none" else "pooler_output"


def by_library(folder: Path, inputs: np.ndarray, positions: np.ndarray, output: str = "logits") -> Reference:
    """What the library of the folder's checkpoint makes of the inputs. Raises PrenormError if it fails.

    Of (probes, 1, T) tokens the logits at these positions; of (probes, 1, height, width, C) images this output.
    """
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place) / "probes.npz", Path(place) / "outputs.npz"
        np.savez(given, inputs=inputs, positions=positions, output=output)
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


def main(argv: Sequence[str]) -> None:
    """The process. Raises what the library raises, and ValueError for a checkpoint that lacks tensors."""
    folder, given, made = argv
    import torch

    with np.load(given) as arrays:
        inputs, positions, output = arrays["inputs"], arrays["positions"], str(arrays["output"])
    with torch.no_grad():
        if inputs.ndim == 3:
            model = _transformers(folder, "AutoModelForCausalLM")
            outputs = [
                model(torch.tensor(tokens.astype(np.int64)), use_cache=False).logits[0, positions] for tokens in inputs
            ]
        else:
            model = (
                _timm(folder) if _is_timms(Path(folder)) else _transformers(folder, _class_of_images(folder, output))
            )
            pixels = torch.tensor(inputs.astype(np.float64)).permute(0, 1, 4, 2, 3)
            outputs = [_of_image(model, pixels_1xCxHxW, output) for pixels_1xCxHxW in pixels]
    names = [name for name in ("transformers", "timm", "torch") if name in sys.modules]
    versions = json.dumps({name: str(sys.modules[name].__version__) for name in names})
    np.savez(made, outputs=np.stack([x.numpy() for x in outputs]).astype(np.float64), versions=versions)


def _in_float64() -> None:
    """From here on torch.float32 means float64."""
    import torch

    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double


def _transformers(folder: str, kind: str) -> Any:
    """The model in the folder, by a class of transformers."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, kind)
    options = {"dtype": torch.float64, "local_files_only": True, "output_loading_info": True}
    stored, said = kind.from_pretrained(folder, **options)
    if missing := sorted(name for name in said["missing_keys"] if not name.startswith("pooler.dense.")):
        raise ValueError(f"the checkpoint lacks {', '.join(missing[:3])}, which the library then draws at random")
    state, config = stored.state_dict(), stored.config
    del stored
    _in_float64()
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0
    made = (getattr(kind, "from_config", None) or kind._from_config)(config, dtype=torch.float64).eval()
    made.load_state_dict(state)
    return made


def _timm(folder: str) -> Any:
    import timm
    import torch

    torch.set_default_dtype(torch.float64)  # of the parameters, into which the file's numbers are copied
    state = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    _in_float64()
    made = timm.create_model(f"local-dir:{folder}", pretrained=False).eval()
    made.load_state_dict(state)
    return made


def _class_of_images(folder: str, output: str) -> str:
    """The class that gives the output: with a head the one that config.json names, without the bare network's."""
    config = read_json(Path(folder) / "config.json")
    name = (config.get("architectures") or [""])[0]
    if name == "BeitForMaskedImageModeling":
        raise ValueError("the library does not give the tokens that the head of masked image modelling reads")
    return "AutoModel" if output != "logits" else name or "AutoModelForImageClassification"


def _of_image(model: Any, pixels_1xCxHxW: Any, output: str) -> Any:
    """An output of one image; of a whole CLIP or SigLIP its tower's. Nothing is masked or shuffled."""
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
