"""A workdir that was imported, back in its source's format, or in that of another stock family."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prenorm_jax.base import trees
from prenorm_jax.base.errors import PrenormError, check_choice
from prenorm_jax.base.files import read_json, write_json
from prenorm_jax.equivalence.convert import convert_config
from prenorm_jax.equivalence.fit import model_differences
from prenorm_jax.equivalence.stored import Part, Readable, convert_stored, copy_stored
from prenorm_jax.interop import npz
from prenorm_jax.interop.families import family_of, llama, timm
from prenorm_jax.interop.family import Family
from prenorm_jax.interop.importing import ABOUT, PART_SIZE, REST
from prenorm_jax.interop.leaves import ForeignLeaves
from prenorm_jax.interop.safetensors import DTYPES, FLOATS, NAMES, Entry, Header, create_file, map_file
from prenorm_jax.interop.views import axis_sizes, read_table, tensor_shape
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.models.config import EXECUTION, ModelConfig
from prenorm_jax.models.coordinates import center
from prenorm_jax.models.stacking import STACKED
from prenorm_jax.train.checkpoint import Checkpoints
from prenorm_jax.train.convert_run import check_asked, in_the_making
from prenorm_jax.train.workdir import SOURCE, configure_jax, load_config

RECORD = "converted.json"  # of an export: what it was made from
INDEX = "model.safetensors.index.json"

# What of a config says which parameters there are, or how it is trained, rather than which function they are of.
_PARAMETERS = {"norm", "norm_affine", "norm_bias", "final_norm_affine", "kept_norm_affine", "layer_scale"}
_PARAMETERS |= {"use_bias", "reader_bias", "qkv_bias", "head_bias"}
_TRAINING = {"stochastic_depth", "stochastic_depth_schedule", "init", "dtype", "param_dtype", *EXECUTION}


class Format(NamedTuple):
    """A format to be written: its family, its config.json, the tree of ours that it holds, and its files."""

    family: Family
    config: dict[str, Any]
    model: ModelConfig
    headers: dict[str, Header]

    @property
    def is_npz(self) -> bool:
        """Whether it is one file of NumPy's arrays, and nothing beside."""
        return any(file.endswith(".npz") for file in self.headers)


def export_checkpoint(
    workdir: str | Path,
    target: str | Path,
    to: str,
    form: str = "source",
    dtype: str | None = None,
    step: int | None = None,
) -> None:
    """Writes folder `target` with a run's checkpoint in the format of what the run was imported from.

    A layernorm tree is written as it is, so that an import that nothing was done to comes back bit for bit; a tree of
    another norm as a LayerNorm network whose stream has no mean. Prints what it did.

    Args:
      workdir: an imported checkpoint, or what was converted or trained from one.
      target: must not exist.
      to: layernorm; with a format of RMSNorms rmsnorm; with mistral crmsnorm.
      form: source; or llama, mistral, timm-rmsnorm, where the network can be told as one.
      dtype: keep, each tensor's of the source; None: that too if nothing was done to it, else the run's.
      step: which checkpoint; None: the latest.

    Raises PrenormError for what was not imported, and for what the format has no place for; `target` is then not made.
    """
    target = Path(target)
    check_asked(workdir, target, to, None)
    check_choice("--format", form, tuple(FORMATS))
    check_choice("--dtype", dtype or "keep", ("keep",))
    if to != (wanted := FORMATS[form][0]):
        raise PrenormError(f"--format={form} is of {wanted} networks: give --to={wanted}")
    config, about = load_config(workdir), read_about(workdir)
    configure_jax(config)

    with Checkpoints(workdir, read_only=True) as checkpoints:

        def write(step: int) -> None:
            stored = checkpoints.model(step)
            tree = stored if stored.norm == to else convert_config(stored, to, keep_affine=_keeps_affine(to))
            tree = narrow_rmsnorm(tree) if tree.norm == "crmsnorm" else tree
            made = FORMATS[form][1](about, tree)
            unchanged = about["unchanged"] == checkpoints.metadata(step)["digests"]["params"]
            if not (unchanged or dtype == "keep"):
                made = _in_dtype(made, tree.param_dtype)
            scale = math.sqrt(stored.d_model / (stored.d_model - 1)) if to == "crmsnorm" else 1.0
            defaults = _defaults(made, tree, scale)
            with in_the_making(target) as folder, checkpoints.leaves(step) as leaves:
                _write(Path(workdir), folder, made, defaults, leaves, stored)
                _finish(folder, made)
                record = {"source": about["imported_from"], "workdir": str(workdir), "step": step, "norm": stored.norm}
                write_json(folder / RECORD, record | {"to": to, "format": form})
            for place, model in ((f"{workdir} at step {step}", stored), (target, made.model)):
                print(f"{place}: {model.norm}, {trees.count(param_shapes(model)):,} parameters, {model.param_dtype}")

        checkpoints.of(step, write)


def read_about(workdir: str | Path) -> dict[str, Any]:
    """What an imported workdir knows of its source. Raises PrenormError for one that was not imported."""
    path = Path(workdir) / SOURCE / ABOUT
    if not path.is_file():
        raise PrenormError(f"{workdir} was not imported from another library's checkpoint: it has no {SOURCE}/{ABOUT}")
    return read_json(path)


def _source_format(about: dict[str, Any], tree: ModelConfig) -> Format:
    config = about["config"]
    family = family_of(config)
    rates = dict.fromkeys(tree.rates, 0.0)
    headers = {
        file: Header(
            {name: Entry(dtype, tuple(shape)) for name, (dtype, shape) in header["tensors"].items()}, header["metadata"]
        )
        for file, header in about["headers"].items()
    }
    shapes = {name: entry.shape for header in headers.values() for name, entry in header.tensors.items()}
    model = family.model(config, shapes, dtype=tree.dtype, param_dtype=tree.param_dtype, **rates)
    return Format(family, config, model, headers)


def _llama_format(about: dict[str, Any], tree: ModelConfig, family: Family = llama.FAMILY) -> Format:
    config = llama.config(tree, about["config"], family)
    model = dataclasses.replace(tree, norm_affine=True, norm_bias=False, final_norm_affine=True)
    sizes, shapes, dtype = axis_sizes(model), param_shapes(model), NAMES[np.dtype(model.param_dtype)]
    places = [place for place in read_table(family.lines(config), model.depth) if place.path in shapes]
    tensors = {place.tensor: Entry(dtype, tensor_shape(place, sizes)) for place in places}
    return Format(family, config, model, {"model.safetensors": Header(tensors, {"format": "pt"})})


def _mistral_format(about: dict[str, Any], tree: ModelConfig) -> Format:
    return _llama_format(about, tree, llama.MISTRAL)


def narrow_rmsnorm(tree: ModelConfig) -> ModelConfig:
    """The network of plain RMSNorms that a crmsnorm one in reflected coordinates is, d-1 wide.

    Its norms divide by d: y/√(Σy²/d + ε) = √(d/(d-1)) y/√(Σy²/(d-1) + ε d/(d-1)). Raises PrenormError for one whose
    norms are no RMSNorms: what drops an entry, and a tied table, which is as wide as its raw stream.
    """
    if tree.coordinates != "reflect" or tree.tie_embeddings:
        raise PrenormError(
            f"a network with model.coordinates={tree.coordinates!r} and model.tie_embeddings={tree.tie_embeddings} is "
            "none of plain RMSNorms: one is that was converted by --to=crmsnorm --coordinates=reflect and is not tied"
        )
    d = tree.d_model
    changed = {"norm": "rmsnorm", "d_model": d - 1, "epsilon": tree.epsilon * d / (d - 1)}
    return dataclasses.replace(tree, **changed, coordinates_entry=None)


def _timm_format(about: dict[str, Any], tree: ModelConfig) -> Format:
    source = _source_format(about, tree)
    config, model = timm.of_rmsnorms(source.config, source.model)
    headers = {
        file: header._replace(
            tensors={name: entry for name, entry in header.tensors.items() if not timm.NORM_BIAS.search(name)}
        )
        for file, header in source.headers.items()
    }
    return Format(timm.FAMILY, config, model, headers)


FORMATS: dict[str, tuple[str, Callable[[dict[str, Any], ModelConfig], Format]]] = {
    "source": ("layernorm", _source_format),
    "llama": ("rmsnorm", _llama_format),
    "mistral": ("crmsnorm", _mistral_format),
    "timm-rmsnorm": ("rmsnorm", _timm_format),
}


def _keeps_affine(to: str) -> bool:
    """Whether a tree that is converted on its way out keeps γ and β: RMSNorms have no place for β."""
    return to == "layernorm"


def _in_dtype(made: Format, dtype: str) -> Format:
    """The format with all floating-point numbers in this dtype."""
    named = NAMES[np.dtype(dtype)]

    def changed(entry: Entry) -> Entry:
        return entry._replace(dtype=named) if DTYPES[entry.dtype] in FLOATS else entry

    headers = {
        file: header._replace(tensors={name: changed(entry) for name, entry in header.tensors.items()})
        for file, header in made.headers.items()
    }
    config = made.config | {key: dtype for key in ("dtype", "torch_dtype") if key in made.config}
    return made._replace(headers=headers, config=config)


def _defaults(made: Format, tree: ModelConfig, scale: float) -> dict[trees.Path, float]:
    """The leaves that the format has and the tree has not: norms without an affine, and what they are then.

    `scale`: what a norm multiplies by that has none.

    Raises PrenormError for a tree of another function, and for leaves that the format has no place for.
    """
    ignored = {*_PARAMETERS, *_TRAINING, *tree.rates}
    if differences := model_differences(tree, made.model, ignored):
        raise PrenormError(f"the run is of another network than its source ({'; '.join(differences)})")
    there, wanted = param_shapes(dataclasses.replace(tree, scan=False)), param_shapes(made.model)
    if homeless := ["/".join(path) for path in there if path not in wanted]:
        remedy = "into which norms were folded: convert the source with --keep-affine, under which they keep theirs"
        if made.model.norm == "rmsnorm":
            remedy = "as RMSNorms have no bias: give --to=layernorm --format=source"
        raise PrenormError(f"the {made.family.model_type} format has no place for {', '.join(homeless[:4])}, {remedy}")
    return {path: scale * path[-1].endswith("scale") for path in wanted if path not in there}


def _write(
    workdir: Path,
    folder: Path,
    made: Format,
    defaults: dict[trees.Path, float],
    leaves: Readable,
    stored: ModelConfig,
) -> None:
    """Writes the stored leaves, of a model `stored`, and the defaults of others in a format's files."""
    places = ForeignLeaves(made.family, made.config, made.model, _create(workdir, folder, made))
    for path, value in defaults.items():
        places.write(path, (), np.full(param_shapes(made.model)[path].shape, value))
    new = _Exported(places, center_table=made.family is llama.FAMILY)
    if stored.norm in (made.model.norm, "crmsnorm" if made.family is llama.MISTRAL else None):
        copy_stored(leaves, new, param_shapes(stored), PART_SIZE)
    else:
        convert_stored(leaves, new, stored, made.model.norm, PART_SIZE, _keeps_affine(made.model.norm))


def _create(workdir: Path, folder: Path, made: Format) -> dict[str, np.ndarray]:
    """Makes the export's files, with all but the leaves in them; gives their tensors."""
    for path in sorted((workdir / SOURCE).iterdir()):
        if path.name not in (ABOUT, REST) and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    tensors: dict[str, np.ndarray] = {}
    for file, header in made.headers.items():
        tensors |= create_file(_place(folder, file), header)
    if not made.is_npz:
        write_json(folder / "config.json", made.config)
    if not made.is_npz and list(made.headers) != ["model.safetensors"]:
        weight_map = {name: file for file, header in made.headers.items() for name in header.tensors}
        write_json(
            folder / INDEX,
            {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map},
        )
    for name, rest in map_file(workdir / SOURCE / REST)[1].items():
        if name in tensors:
            place = tensors[name] if tensors[name].shape == rest.shape else tensors[name][: len(rest)]
            place[...] = rest
    return tensors


def _place(folder: Path, file: str) -> Path:
    """Where the tensors of a file of the format are written first."""
    return folder / (f"{file}.safetensors" if file.endswith(".npz") else file)


def _finish(folder: Path, made: Format) -> None:
    """Brings what was written first into the format's own files."""
    for file in made.headers if made.is_npz else ():
        npz.write_file(folder / file, map_file(_place(folder, file))[1])
        _place(folder, file).unlink()


class _Exported:
    """`stored.Writable`: leaves of ours as they come, stacked blocks too, into those of a format."""

    def __init__(self, leaves: ForeignLeaves, center_table: bool):
        """`center_table`: whether a tied table loses its mean, where nothing centres it at run time."""
        self._leaves, self._center_table = leaves, center_table

    def write(self, path: trees.Path, part: Part, array: np.ndarray) -> None:
        if path[0] == STACKED:
            first, part = part[0].start or 0, part[1:]
            for i, block in enumerate(array, first):
                self._leaves.write((f"block_{i}", *path[1:]), part, block)
            return
        if self._center_table and path == ("token_embedding",):
            array = center(array.astype(np.float64), -1)
        self._leaves.write(path, part, array)
