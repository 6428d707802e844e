"""Where a foreign checkpoint lies: a folder, one of its files or a name on the hub; what is in it, mapped, not read."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prenorm_jax.base.errors import PrenormError, first_line
from prenorm_jax.base.files import read_json
from prenorm_jax.interop import npz
from prenorm_jax.interop.families import TOWER, family_of, model_type, vit_npz
from prenorm_jax.interop.safetensors import NAMES, Entry, Header, map_file

# Of a folder, the first of these that is there.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SMALL = (".json", ".txt", ".md", ".model", ".jinja", ".tiktoken")  # what goes along: config, tokenizer, model card
# Of those, what belongs to a model, and not to whatever else lies in its folder.
_OF_A_MODEL = re.compile(
    r"((generation|preprocessor|processor|image_processor|tokenizer)_)?config|.*tokenizer.*|vocab|merges|spiece|"
    r"special_tokens_map|added_tokens|chat_template|README|MODEL_CARD|.+\.index",
    re.IGNORECASE,
)
_ALSO = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_LARGEST_SMALL = 2**26  # bytes
_TORCH = {f"torch.{dtype.name}": dtype for dtype in NAMES}


@dataclass(frozen=True)
class Source:
    """A foreign checkpoint.

    Attributes:
      name: as it was asked for.
      folder: where its small files lie.
      config: its config.json; of an .npz what takes its place.
      headers: its files of weights, by name, each with what is in it; PyTorch's have the name that safetensors' have.
      tensors: those of all its files, mapped.
      files: those files, as they are called.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    headers: dict[str, Header]
    tensors: dict[str, np.ndarray]
    files: tuple[Path, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def small_files(self) -> Iterator[Path]:
        """Its config, index, tokenizer, licence and model card: all that an export takes along.

        An .npz may lie among much else: of it that is what has its name.
        """
        alone = next((Path(file).stem for file in self.headers if file.endswith(".npz")), None)
        for path in sorted(self.folder.iterdir()):
            known = path.suffix in _SMALL and (path.stem == alone if alone else bool(_OF_A_MODEL.fullmatch(path.stem)))
            known = known or path.stem.upper() in _ALSO
            if known and path.is_file() and path.stat().st_size <= _LARGEST_SMALL:
                yield path


def tower_of(name: str | Path) -> tuple[str, str]:
    """("path", "text") of "path:text", the text tower of a whole model; of other names (name, "")."""
    base, _, tower = str(name).rpartition(":")
    return (base, tower) if tower == "text" and base and not Path(name).exists() else (str(name), "")


def is_workdir(place: str | Path) -> bool:
    """Whether it is a folder of a run of ours, or of a converted checkpoint."""
    folder = Path(place)
    return (folder / "checkpoints").is_dir()


def is_foreign(place: str | Path) -> bool:
    """Whether it looks like another library's checkpoint: a folder of one, a file, or a name on the hub."""
    folder = Path(tower_of(place)[0])
    if not folder.is_dir():
        return folder.is_file() or not folder.is_absolute()
    if is_workdir(folder):
        return False
    if any(next(folder.glob(f"*{suffix}"), None) for suffix in (".safetensors", ".bin", ".npz")):
        return True
    with contextlib.suppress(PrenormError, OSError):
        return model_type(read_json(folder / "config.json")) is not None
    return False


def open_source(name: str | Path) -> Source:
    """The checkpoint in a folder, of a file in it, or of a name on the Hugging Face hub.

    Raises PrenormError if there is none, if it is not whole, or if it is of no family that can be converted.
    """
    folder, file, config = open_config(name)
    family_of(config)  # before anything of weights is looked at
    if file is not None and file.endswith(".npz"):
        header, arrays = npz.map_file(folder / file)
        return Source(str(name), folder, config, {file: header}, arrays, (folder / file,))
    headers: dict[str, Header] = {}
    tensors: dict[str, np.ndarray] = {}
    files = _files(folder, file)
    for path in files:
        header, mapped = map_file(path) if path.suffix == ".safetensors" else _map_torch(path)
        if twice := sorted(tensors.keys() & mapped.keys()):
            raise PrenormError(f"{folder} holds {twice[0]} twice, the second time in {path.name}: remove one file")
        headers[f"{path.stem.replace('pytorch_model', 'model')}.safetensors"] = header
        tensors |= mapped
    return Source(str(name), folder, config, headers, tensors, tuple(files))


def open_config(name: str | Path, weights: bool = True) -> tuple[Path, str | None, dict[str, Any]]:
    """The folder, the file in it that is named, if one is, and config.json. Raises PrenormError if there is none.

    Of the text tower of a whole model, as "path:text", config.json has the key TOWER besides.

    `weights`: whether, of a name on the hub, its files of weights are wanted too.
    """
    base, tower = tower_of(name)
    place = Path(base)
    if not place.exists():
        place = _from_hub(base, weights)
    folder, file = (place, None) if place.is_dir() else (place.parent, place.name)
    if file is None and not (folder / "config.json").is_file() and len(arrays := [*folder.glob("*.npz")]) == 1:
        file = arrays[0].name
    if file is not None and file.endswith(".npz"):
        beside = (folder / file).with_suffix(".json")  # which may say what the arrays do not
        said = read_json(beside) if beside.is_file() else {}
        return folder, file, said | {"model_type": vit_npz.FAMILY.model_type}
    if not (folder / "config.json").is_file():
        raise PrenormError(f"{name}: there is no config.json with it, which says what the network is: copy it there")
    config = read_json(folder / "config.json") | ({TOWER: tower} if tower else {})
    if model_type(config) is None:
        raise PrenormError(
            f"{folder} is neither a workdir (it has no checkpoints) nor another library's model (its config.json names "
            "no model_type): name a folder that is one"
        )
    if other := config.get("transformers_weights"):
        raise PrenormError(f"{folder}/config.json: transformers_weights={other!r}: name that file, and remove this key")
    return folder, file, config


def _files(folder: Path, file: str | None) -> list[Path]:
    """The files of weights: that one, if it is none of an index, or all of the folder's. Raises PrenormError."""
    others = [path.name for path in folder.glob("*.safetensors")]
    found = file or next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None and len(others) == 1:
        found = others[0]
    if found is None:
        what = f"several ({', '.join(sorted(others)[:3])}): name one" if others else "none: safetensors files are read"
        raise PrenormError(f"{folder} should hold one file of weights, or an index of some, and holds {what}")
    if not found.endswith(".index.json"):
        return [folder / found]
    try:
        names = sorted(set(read_json(folder / found)["weight_map"].values()))
        paths = [folder / name for name in names]
    except (KeyError, AttributeError, TypeError) as error:
        raise PrenormError(f"{folder / found} is no index of files of weights: download it again") from error
    if outside := [name for name, path in zip(names, paths, strict=True) if path.parent != folder]:
        raise PrenormError(f"{folder / found} names {outside[0]}, which lies elsewhere: files of the folder are read")
    if absent := [path.name for path in paths if not path.is_file()]:
        raise PrenormError(f"{folder / found} names {', '.join(absent[:3])}, not in the folder: download all its files")
    return paths


def _map_torch(path: Path) -> tuple[Header, dict[str, np.ndarray]]:
    """The state dict in a file of PyTorch's own format. No code in it is run. Raises PrenormError."""
    if path.suffix not in (".bin", ".pt", ".pth"):
        raise PrenormError(f"{path.name} is of no known format: .safetensors files are read, or PyTorch's .bin")
    try:
        import torch
    except ImportError as error:
        raise PrenormError(
            f"{path} is of PyTorch's own format, which PyTorch alone reads: install it (pip install torch), or save "
            "the model as safetensors"
        ) from error
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 6):  # CVE-2025-32434
        raise PrenormError(
            f"{path}: PyTorch {torch.__version__} may run code that is in such a file: upgrade it to 2.6 or newer, or "
            "save the model as safetensors"
        )
    options = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            state = torch.load(path, mmap=True, **options)
        except RuntimeError:  # of before 2020: such a file cannot be mapped
            state = torch.load(path, **options)
    except Exception as error:
        raise PrenormError(f"{path} cannot be read ({first_line(error)}): save the model as safetensors") from error
    others = [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise PrenormError(
            f"{path} holds {', '.join(others[:4])} beside tensors, as a training state does: save the model's "
            "state_dict() by itself"
        )

    def array(tensor: torch.Tensor) -> np.ndarray:
        dtype = _TORCH.get(str(tensor.dtype))
        if dtype is None:
            raise PrenormError(f"{path} holds numbers of {tensor.dtype}: save the model in floating-point numbers")
        bits = {1: torch.uint8, 2: torch.uint16}.get(dtype.itemsize, tensor.dtype)  # NumPy knows no bfloat16
        return tensor.detach().view(bits).numpy().view(dtype)

    tensors = {name: array(tensor) for name, tensor in state.items()}
    entries = {name: Entry(NAMES[x.dtype], x.shape) for name, x in tensors.items()}
    return Header(entries, {"format": "pt"}), tensors


def _from_hub(name: str, weights: bool = True) -> Path:
    """The folder of the cache with the files of a model on the hub. Raises PrenormError."""
    is_local = name.count("/") != 1 or Path(name).parent.is_dir()  # its owner's name is a folder here
    if name[:1] in (".", "/", "~") or (is_local and "/" in name) or name.endswith((".safetensors", ".bin")):
        raise PrenormError(f"{name} does not exist: give a workdir, a model's folder or file, or a name on the hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise PrenormError(f"{name} does not exist, and names on the hub need pip install huggingface_hub") from error
    small = [f"*{suffix}" for suffix in _SMALL] + [f"{stem}*" for stem in _ALSO]
    try:
        for pattern in ("*.safetensors", "*.bin") if weights else ("config.json",):
            folder = Path(snapshot_download(name, allow_patterns=[*small, pattern], ignore_patterns=["*/*"]))
            if list(folder.glob(pattern)):
                break
    except Exception as error:  # of the network, of the hub's, or a name that is none
        raise PrenormError(
            f"{name} is no folder, and the hub gives no such model ({first_line(error)}): name a folder, or see to the "
            "network"
        ) from error
    return folder
