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


def by_library(folder: Path, inputs: np.ndarray, positions: np.ndarray) -> Reference:
    """The logits of (probes, 1, T) tokens at these positions, by transformers. Raises PrenormError if it fails."""
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place) / "probes.npz", Path(place) / "outputs.npz"
        np.savez(given, inputs=inputs, positions=positions)
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


def main(argv: Sequence[str]) -> None:
    """The process. Raises what the library raises, and ValueError for a checkpoint that lacks tensors."""
    folder, given, made = argv
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"dtype": torch.float64, "local_files_only": True, "output_loading_info": True}
    stored, said = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    if missing := sorted(said["missing_keys"]):
        raise ValueError(f"the checkpoint lacks {', '.join(missing[:3])}, which the library then draws at random")
    state, config = stored.state_dict(), stored.config
    del stored
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    model.load_state_dict(state)
    with np.load(given) as arrays:
        inputs, positions = arrays["inputs"], arrays["positions"]
    with torch.no_grad():
        outputs = [
            model(torch.tensor(tokens.astype(np.int64)), use_cache=False).logits[0, positions].numpy()
            for tokens in inputs
        ]
    versions = json.dumps({"transformers": transformers.__version__, "torch": str(torch.__version__)})
    np.savez(made, outputs=np.stack(outputs).astype(np.float64), versions=versions)


if __name__ == "__main__":
    main(sys.argv[1:])
