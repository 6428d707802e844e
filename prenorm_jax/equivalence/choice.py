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
from prenorm_jax.base.trees import Flat
from prenorm_jax.equivalence.convert import check_tree, convert_config, convert_params
from prenorm_jax.equivalence.roles import Roles, parameter_roles, with_biases
from prenorm_jax.equivalence.rules import fold_layer_scales, fold_norms
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.coordinates import center
from prenorm_jax.models.registry import model_config

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
    flat, roles = check_tree(params, source), parameter_roles(source)
    flat = {path: np.asarray(leaf).astype(np.float64) for path, leaf in flat.items()}
    folded, roles = fold_norms(fold_layer_scales(flat, roles), roles), with_biases(roles)
    squares = _written(folded, roles, source) if sizes is None else np.asarray(sizes, np.float64) ** 2
    if squares.shape != (source.d_model,):
        raise PrenormError(f"sizes have shape {squares.shape}, not ({source.d_model},), one of each entry")
    return rank_choices(lambda: _readers(folded, roles, source), squares)


def _readers(folded: Flat, roles: Roles, config: ModelConfig) -> Iterator[np.ndarray]:
    """(outputs, d) of each leaf that reads the stream; a tied table is one, by way of its affine."""
    for path, role in roles.items():
        if role.reads is not None:
            yield np.moveaxis(folded[path], role.reads, -1).reshape(-1, config.d_model)
    if config.tie_embeddings:
        yield folded[("token_embedding",)] * folded.get(("head_affine", "scale"), 1)


def _written(folded: Flat, roles: Roles, config: ModelConfig) -> np.ndarray:
    """(d,) mean squares of the stream's entries, if what is multiplied by the kernels that write has size 1."""
    total = np.zeros(config.d_model)
    for path, leaf in folded.items():
        axis = roles[path].writes
        raw = axis is None and leaf.shape[-1:] == (config.d_model,) and roles[path].reads is None
        if axis is None and not (raw and _writes_raw(path)):
            continue
        rows = center(np.moveaxis(leaf, -1 if axis is None else axis, -1), -1)
        square = (rows**2).reshape(-1, config.d_model)
        total += square.mean(0) if path[-1].endswith("embedding") else square.sum(0)
    return total


def _writes_raw(path: tuple[str, ...]) -> bool:
    """Of a leaf off the stream's coordinates: whether it writes all the same, and is centred at run time."""
    return path[-1].endswith(("embedding", "token", "registers")) or path[-2:-1] in (("out",), ("down",), ("patch_embedding",))


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
