"""Which coordinates of crmsnorm's stream round the least with given weights.

y_k = z_k - (c_k/c_p) z_p and z_k = y_k - c_k Σy, so that rounding of every entry k leaks into all readers' products by
way of Wc: a dropped p has c = e_p, a reflection c_k = 1/(d + √d), c_p = 1/√d. Each number is rounded in proportion to
its size. With W_k the weights at entry k of what reads after one norm, times γ, and σ_k the size of the entry there,
the squared error of that is L times rmsnorm's,

    L = [ Σ_{k≠p} (σ_k² + (c_k/c_p)² σ_p²) ‖W_k - Wc‖² + ρ σ_p² ‖W_p‖² ]  /  Σ_k σ_k² ‖W_k‖²

with ρ = 1 for reflections and 0 for drops. It stands for what the norm removes, rounding that is along the stream.
Where z_p is most of the stream its own rounding is, and what a drop of it leaks is as well. A reflection has z_p in all
its numbers, and their rounding is not: without this term a large entry would seem to gain by being reflected. Before a
tied head, which reads all d entries, a dropped one is restored and rounded again: there ρ = 1 for both.

An error of what a branch reads is one of the same relative size of what it writes. So that of the logits has the mean
of all norms' L, that before the head of weight 1, that before a branch of the share that this has in the logits,

    s = Σ_k u_k² ‖H_k‖²  /  Σ_k σ_k² ‖H_k‖²           u_k: what it adds to entry k; σ, H: stream and readers at the head

What is rounded elsewhere (attention, activations, float32 sums, the logits) is the same in all coordinates: a squared
error of q times what rmsnorm rounds in them. The error relative to rmsnorm's is √((L + q)/(1 + q)), with q = .6 as
measured (docs/coordinates.md, with what this cannot predict).

σ is measured on a calibration batch, or estimated from the weights as u is (`stream_sizes.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.trees import Path
from prenorm_jax.equivalence.convert import check_tree, convert_config, convert_params
from prenorm_jax.equivalence.stored import Part, Readable
from prenorm_jax.equivalence.stream_sizes import column_squares, estimate_sites, readers_of
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.coordinates import KINDS
from prenorm_jax.models.registry import model_config

ELSEWHERE = 0.6  # q above


class Choice(NamedTuple):
    """A kind of coordinates (`models/coordinates.py`), its entry, and the error relative to RMSNorm's, if predicted."""

    kind: str
    entry: int
    error: float | None


def choose_coordinates(
    params: Mapping[str, Any],
    config: ConfigDict | Mapping[str, Any] | ModelConfig,
    sizes: np.ndarray | None = None,
) -> dict[str, Any]:
    """{"coordinates": kind, "coordinates_entry": entry} for these weights, to be set in the config before conversion.

    Args:
      params: the tree that `config` describes, of any norm.
      config: the model's.
      sizes: root mean squares, over the tokens of a calibration batch, of the entries of what rmsnorm's norms give,
        without their scales: (d,), or of those of each branch of each block and of the head (2·depth + 1, d). None:
        as estimated from the weights.

    Raises PrenormError for a tree that is not the config's, one whose numbers are not finite or overflow in float32's
    sums, and sizes of another shape or that are no sizes.
    """
    choice = coordinate_choices(params, config, sizes)[0]
    return {"coordinates": choice.kind, "coordinates_entry": choice.entry}


def coordinate_choices(
    params: Mapping[str, Any],
    config: ConfigDict | Mapping[str, Any] | ModelConfig,
    sizes: np.ndarray | None = None,
) -> list[Choice]:
    """All of them, the one with the least predicted error first. Arguments as of `choose_coordinates`."""
    source = model_config(config)
    if source.norm == "crmsnorm":
        params, source = convert_params(params, source, "rmsnorm"), convert_config(source, "rmsnorm")
    return stored_choices(_Leaves(check_tree(params, source)), source, sizes)


class _Leaves(dict):
    """A tree in memory, as `stored.Readable`."""

    def read(self, path: Path, part: Part = ()) -> np.ndarray:
        return np.asarray(self[path])[part]


def stored_choices(stored: Readable, source: ModelConfig, sizes: np.ndarray | None = None) -> list[Choice]:
    """`coordinate_choices` of a stored tree, not of crmsnorm, which is read in parts, twice."""
    sites = estimate_sites(stored, source)
    squares = sites.squares if sizes is None else _squares(sizes)
    if squares.shape not in (sites.squares.shape, sites.squares.shape[1:]):
        expected = " or ".join(map(str, (sites.squares.shape[1:], sites.squares.shape)))
        raise PrenormError(f"sizes have shape {squares.shape}, not {expected}: of each entry, or of each at each norm")
    squares = np.broadcast_to(squares, sites.squares.shape)
    sums: dict[int, Any] = {}
    for site, reader, scale in readers_of(stored, source):
        sums[site] = sums.get(site, 0) + reader_sums(reader, squares[site], scale)
    return rank_choices(
        sum(
            sites.weights[site] * leaks(own, squares[site], restored=source.tie_embeddings and site == len(squares) - 1)
            for site, own in sums.items()
        )
        / sites.weights.sum()
    )


def _squares(sizes: Any) -> np.ndarray:
    try:
        squares = np.square(sizes, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PrenormError("sizes are no array of numbers") from error
    if not (np.isfinite(squares).all() and np.greater_equal(sizes, 0).all() and squares.any()):
        raise PrenormError("sizes are root mean squares: finite, none below 0 and not all 0")
    return squares


def reader_sums(reader: np.ndarray, squares: np.ndarray, scale: Any = 1.0) -> np.ndarray:
    """What `leaks` takes of readers W = (reader · scale) (n, d), to be added up: (4, d).

    ‖W_k‖², W_k·ΣW, W_k·Σ_j σ_j² W_j and ‖ΣW‖², without a copy of the reader.
    """
    scale = np.broadcast_to(scale, squares.shape).astype(np.float64)
    summed = reader @ np.stack([scale, scale * squares], 1).astype(reader.dtype)
    sums = np.concatenate([column_squares(reader)[None] * scale, summed.T @ reader]) * scale
    return np.vstack([sums, np.full_like(scale, summed[:, 0] @ summed[:, 0])])


def leaks(sums: np.ndarray, squares: np.ndarray, restored: bool = False) -> np.ndarray:
    """L of a drop and of a reflection of each entry: (2, d); of `reader_sums` and mean squares (d,) of the stream.

    `restored`: whether a dropped entry is, before it is read.
    """
    norms, along_sum, along_sized, sum_norm = sums
    d, root = len(squares), np.sqrt(len(squares))
    of_rms, whole, of_entry = squares @ norms, squares.sum(), squares * norms
    if of_rms == 0:
        return np.ones((2, d))  # nothing is read
    dropped = of_rms - 2 * along_sized + whole * norms
    one, own = 1 / (d + root), 1 / root - 1 / (d + root)  # Wc = one ΣW + own W_p
    of_center = one**2 * sum_norm + 2 * one * own * along_sum + own**2 * norms
    share = squares / (root + 1) ** 2
    reflected = of_rms - 2 * (one * (squares @ along_sum) + own * along_sized) + whole * of_center
    reflected += share * (norms.sum() - 2 * (one * sum_norm + own * along_sum) + d * of_center)
    reflected -= (squares + share) * (norms - 2 * (one * along_sum + own * norms) + of_center)  # the entry itself
    return np.maximum(np.stack([dropped + restored * of_entry, reflected + of_entry]), 0) / of_rms


def rank_choices(leak: np.ndarray) -> list[Choice]:
    """The choices by their error, of L of a drop and of a reflection of each entry: (2, d)."""
    if not np.isfinite(leak).all():
        raise PrenormError(
            "no rounding can be predicted, for the weights are not finite, or too large for sums in float32: state the "
            "coordinates, as --coordinates=drop"
        )
    choices = [
        Choice(kind, entry, float(error))
        for kind, errors in zip(KINDS, np.sqrt((leak + ELSEWHERE) / (1 + ELSEWHERE)), strict=True)
        for entry, error in enumerate(errors)
    ]
    return sorted(choices, key=lambda choice: choice.error)


def with_choice(config: ModelConfig, choice: Choice) -> ModelConfig:
    """The config with these coordinates."""
    return dataclasses.replace(config, coordinates=choice.kind, coordinates_entry=choice.entry)
