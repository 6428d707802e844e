"""Which coordinates of crmsnorm's stream round the least with given weights.

Rounding leaks from every entry k into all readers' products by way of Wc, where y_k = z_k - (c_k/c_p) z_p and
z_k = y_k - c_k Σy: a dropped p has c = e_p, a reflection c_k = 1/(d + √d), c_p = 1/√d. With W_k the readers' weights
at entry k, times γ, and σ_k the size of the entry, the error relative to RMSNorm's is

    √( Σ_{k≠p} (σ_k² + (c_k/c_p)² σ_p²) ‖W_k - Wc‖²  /  Σ_k σ_k² ‖W_k‖² )

since each number is rounded in proportion to its size.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.trees import Path
from prenorm_jax.equivalence.convert import check_tree, convert_config, convert_params
from prenorm_jax.equivalence.roles import parameter_roles
from prenorm_jax.equivalence.rules import fold_layer_scales, fold_norms
from prenorm_jax.equivalence.stored import Part, Readable, read_parts
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.coordinates import center
from prenorm_jax.models.registry import model_config

PART_SIZE = 2**20  # entries of a part, of which there are some copies in float64
CANDIDATES = 64  # entries that are tried: those with the smallest readers, those that are smallest, and the last


class Choice(NamedTuple):
    """A kind of coordinates (`models/coordinates.py`), its entry, and the error relative to RMSNorm's."""

    kind: str
    entry: int
    error: float


def choose_coordinates(
    params: Mapping[str, Any],
    config: ConfigDict | Mapping[str, Any] | ModelConfig,
    sizes: np.ndarray | None = None,
) -> dict[str, Any]:
    """{"coordinates": kind, "coordinates_entry": entry} for these weights, to be set in the config before conversion.

    Args:
      params: the tree that `config` describes, of any norm.
      config: the model's.
      sizes: (d,) root mean squares of the stream's entries under rmsnorm, from a calibration batch; None: from what the
        weights write, of activations of size 1.

    Raises PrenormError for a tree that is not the config's, or sizes of another shape.
    """
    choice = coordinate_choices(params, config, sizes)[0]
    return {"coordinates": choice.kind, "coordinates_entry": choice.entry}


def coordinate_choices(
    params: Mapping[str, Any],
    config: ConfigDict | Mapping[str, Any] | ModelConfig,
    sizes: np.ndarray | None = None,
) -> list[Choice]:
    """All that were tried, the one with the least predicted error first. Arguments as of `choose_coordinates`."""
    source = model_config(config)
    if source.norm == "crmsnorm":
        params, source = convert_params(params, source, "rmsnorm"), convert_config(source, "rmsnorm")
    return stored_choices(_Leaves(check_tree(params, source)), source, sizes)


class _Leaves(dict):
    """A tree in memory, as `stored.Readable`."""

    def read(self, path: Path, part: Part = ()) -> np.ndarray:
        return np.asarray(self[path])[part]


def stored_choices(stored: Readable, source: ModelConfig, sizes: np.ndarray | None = None) -> list[Choice]:
    """`coordinate_choices` of a stored tree, not of crmsnorm, which is read in parts, three times."""
    written = _written(stored, source) if sizes is None else np.asarray(sizes, np.float64) ** 2
    if written.shape != (source.d_model,):
        raise PrenormError(f"sizes have shape {written.shape}, not ({source.d_model},), one of each entry")
    return rank_choices(lambda: _readers(stored, source), written)


def _folded(stored: Readable, source: ModelConfig) -> Iterator[tuple[Path, np.ndarray]]:
    """Parts of leaves in float64, with norms and LayerScales folded."""
    roles = parameter_roles(source)
    for _, flat in read_parts(stored, source, PART_SIZE):
        wide = {path: leaf.astype(np.float64) for path, leaf in flat.items()}
        yield from fold_norms(fold_layer_scales(wide, roles), roles).items()


def _readers(stored: Readable, source: ModelConfig) -> Iterator[np.ndarray]:
    """(outputs, d) of each leaf that reads the stream; a tied table is one, by way of its affine."""
    roles, scale = parameter_roles(source), ("head_affine", "scale")
    scale_D = stored.read(scale).astype(np.float64) if scale in roles else 1.0
    for path, leaf in _folded(stored, source):
        if path in roles and roles[path].reads is not None:
            yield np.moveaxis(leaf, roles[path].reads, -1).reshape(-1, source.d_model)
        elif path == ("token_embedding",) and source.tie_embeddings:
            yield leaf * scale_D


def _written(stored: Readable, source: ModelConfig) -> np.ndarray:
    """(d,) mean squares of the stream's entries, if what is multiplied by the kernels that write has size 1.

    Raw values are centred where they enter, and so are those of layernorm's writers in the conversion.
    """
    leaves, total = abstract_params(source), np.zeros(source.d_model)
    for path, leaf in _folded(stored, source):
        names = leaves[path].names if path in leaves else ()
        axis = next((i - len(names) for i, name in enumerate(names) if name in ("write", "raw")), None)
        if axis is None or (names[axis] == "raw" and not _writes_raw(path)):
            continue
        rows = center(np.moveaxis(leaf, axis, -1)).reshape(-1, source.d_model)
        one_of_them = names[0] in ("vocab", "position")  # a token adds one row of a table
        total += (rows**2).sum(0) / (leaves[path].value.shape[0] if one_of_them else 1)
    return total


def _writes_raw(path: Path) -> bool:
    """Of a leaf that is d wide: whether it enters the stream, centred at run time, rather than follow it."""
    entering = ("patch_embedding", "out", "down")
    return len(path) == 1 or (path[-2] in entering and path[0] != "pool")


def rank_choices(readers: Callable[[], Iterator[np.ndarray]], squares: np.ndarray) -> list[Choice]:
    """The choices by their error: of readers (n, d) each, gone through twice, and mean squares (d,) of the stream."""
    d = len(squares)
    norms, along_sum, sum_norm = np.zeros(d), np.zeros(d), 0.0
    for reader in readers():
        total = reader.sum(1)
        norms += (reader**2).sum(0)
        along_sum += total @ reader
        sum_norm += float(total @ total)
    tried = sorted({*np.argsort(norms)[:CANDIDATES], *np.argsort(squares)[:CANDIDATES], d - 1})
    gram = sum(reader[:, tried].T @ reader for reader in readers())  # (tried, d)
    of_rms, root = float(squares @ norms), np.sqrt(d)
    one, own = 1 / (d + root), 1 / root - 1 / (d + root)  # Wc = one ΣW + own W_p
    choices = []
    for along_p, p in zip(gram, map(int, tried), strict=True):
        others = np.arange(d) != p
        dropped = norms - 2 * along_p + norms[p]
        center_norm = one**2 * sum_norm + 2 * one * own * along_sum[p] + own**2 * norms[p]
        reflected = norms - 2 * (one * along_sum + own * along_p) + center_norm
        for kind, leak, share in (("drop", dropped, 0.0), ("reflect", reflected, 1 / (root + 1))):
            error = ((squares + share**2 * squares[p]) * leak)[others].sum() / of_rms
            choices.append(Choice(kind, p, float(np.sqrt(max(error, 0)))))
    return sorted(choices, key=lambda choice: choice.error)


def with_choice(config: ModelConfig, choice: Choice) -> ModelConfig:
    """The config with these coordinates."""
    return dataclasses.replace(config, coordinates=choice.kind, coordinates_entry=choice.entry)
