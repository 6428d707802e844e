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
from prenorm_jax.models.config import ModelConfig

LIBRARIES = ("transformers", "torch")
STANDARD = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class Reference(NamedTuple):
    """Outputs to compare with.

    Attributes:
      outputs: (probes, positions, V), float64.
      by: who computed them, in words.
      of_library: whether it was the source's own library, now or earlier.
      versions: library -> version, where it was.
    """

    outputs: np.ndarray
    by: str
    of_library: bool
    versions: dict[str, str]


def why_not(folder: Path, asked: str, inputs: str) -> str:
    """Why the source's own library cannot be asked; "" if it can."""
    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed"
    if inputs != "text":
        return "only language models are computed by their library"
    if Path(asked).is_file() and Path(asked).name not in STANDARD:
        return f"the library reads the folder's standard files, not {Path(asked).name}"
    if not any((folder / name).is_file() for name in STANDARD):
        return f"{folder} has none of {', '.join(STANDARD)}"
    return ""


def by_library(folder: Path, model: ModelConfig, inputs: np.ndarray, positions: np.ndarray) -> Reference:
    """The outputs of (probes, 1, T) tokens at these positions, by transformers. Raises PrenormError if it fails."""
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
            raise PrenormError(f"transformers does not compute {folder}: {' '.join(said[0].split())[:300]}")
        with np.load(made) as arrays:
            outputs, versions = arrays["outputs"], json.loads(str(arrays["versions"]))
    by = " and ".join(f"{name} {version}" for name, version in versions.items())
    return Reference(outputs, f"{by}, in float64 throughout", True, versions)


def asked(model: ModelConfig) -> tuple[str, str]:
    """The class of transformers' that computes what the model does, and which of its outputs that is."""
    if model.decodes:
        return "AutoModelForCausalLM", "logits"
    if model.tie_embeddings or model.outputs == model.vocab_size:
        return "AutoModelForMaskedLM", "logits"
    return "AutoModel", "last_hidden_state" if model.token_outputs else "pooler_output"


def _class(library: Any, folder: str, asked: str) -> Any:
    """The class asked for, or, for a tower that it does not know, that of config.json."""
    config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = getattr(library, asked)
    return kind if type(config) in kind._model_mapping else getattr(library, config.architectures[0])


def main(argv: Sequence[str]) -> None:
    """The process. Raises what the library raises, and ValueError for a checkpoint that lacks tensors."""
    folder, given, made = argv
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with np.load(given) as arrays:
        inputs, positions, (kind, output) = arrays["inputs"], arrays["positions"], arrays["asked"].tolist()
    kind = _class(transformers, folder, kind)
    options = {"dtype": torch.float64, "local_files_only": True, "output_loading_info": True}
    stored, said = kind.from_pretrained(folder, **options)
    if missing := sorted(name for name in said["missing_keys"] if not name.startswith("pooler.")):  # which is not asked
        raise ValueError(f"the checkpoint lacks {', '.join(missing[:3])}, which the library then draws at random")
    state, config = stored.state_dict(), stored.config
    del stored
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    model: Any = make(config, dtype=torch.float64).eval()
    for name, exact in model.named_buffers():  # frequencies that are stored, if they are these in float32
        if name in state and torch.allclose(state[name].to(exact.dtype), exact, rtol=1e-6, atol=0):
            state[name] = exact
    model.load_state_dict(state)
    model = getattr(model, "text_model", model)  # the tower of a whole model
    said = {"use_cache": False} if output == "logits" and hasattr(model, "generate") else {}
    with torch.no_grad():
        found = [model(torch.tensor(tokens.astype(np.int64)), **said)[output].numpy() for tokens in inputs]
    outputs = found if output == "pooler_output" else [each[0, positions] for each in found]
    versions = json.dumps({"transformers": transformers.__version__, "torch": str(torch.__version__)})
    np.savez(made, outputs=np.stack(outputs).astype(np.float64), versions=versions)


if __name__ == "__main__":
    main(sys.argv[1:])
