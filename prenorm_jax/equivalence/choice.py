"""Which coordinates of crmsnorm's stream round the least with given weights.

Rounding leaks from every entry k into all readers' products by way of Wc, where y_k = z_k - (c_k/c_p) z_p and
z_k = y_k - c_k Σy: a dropped p has c = e_p, a reflection c_k = 1/(d + √d), c_p = 1/√d. With W_k the weights at entry k
of what reads after one norm, times γ, and σ_k the size of the entry there, what is rounded in these coordinates errs √L
times as much as under rmsnorm,

    L = Σ_{k≠p} (σ_k² + (c_k/c_p)² σ_p²) ‖W_k - Wc‖²  /  Σ_k σ_k² ‖W_k‖²

since each number is rounded in proportion to its size.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
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
from prenorm_jax.models.coordinates import KINDS, center
from prenorm_jax.models.registry import model_config
from prenorm_jax.models.stacking import LAYER, STACKED
from prenorm_jax.models.transformer import activate

PART_SIZE = 2**20  # entries of a part, of which there are some copies in float64
BRANCHES = ("attention", "mlp")
OTHER = 0.5  # of what is rounded elsewhere, relative to what rmsnorm rounds in the stream's coordinates (squares)
NODES, _sums = np.polynomial.hermite_e.hermegauss(32)  # a normal number's values, and how often each comes
NODE_WEIGHTS = _sums / _sums.sum()


class Choice(NamedTuple):
    """A kind of coordinates (`models/coordinates.py`), its entry, and the error relative to RMSNorm's."""

    kind: str
    entry: int
    error: float


class Sites(NamedTuple):
    """Where the stream is read: before the branches of each block, in order, and by the head.

    Attributes:
      squares: (sites, d) mean squares of the stream's entries under rmsnorm.
      weights: (sites,) what the square of an error there counts for in the logits'.
    """

    squares: np.ndarray
    weights: np.ndarray


def choose_coordinates(
    params: Mapping[str, Any],
    config: ConfigDict | Mapping[str, Any] | ModelConfig,
    sizes: np.ndarray | None = None,
) -> dict[str, Any]:
    """{"coordinates": kind, "coordinates_entry": entry} for these weights, to be set in the config before conversion.

    Args:
      params: the tree that `config` describes, of any norm.
      config: the model's.
      sizes: root mean squares of the stream's entries under rmsnorm, from a calibration batch: (d,), or before each
        branch of each block and before the head (2·depth + 1, d). None: as estimated from the weights.

    Raises PrenormError for a tree that is not the config's, or sizes of another shape.
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
    squares = sites.squares if sizes is None else np.asarray(sizes, np.float64) ** 2
    if squares.shape not in (sites.squares.shape, sites.squares.shape[1:]):
        expected = " or ".join(map(str, (sites.squares.shape[1:], sites.squares.shape)))
        raise PrenormError(f"sizes have shape {squares.shape}, not {expected}: of each entry, or of each at each norm")
    squares = np.broadcast_to(squares, sites.squares.shape)
    sums: dict[int, Any] = {}
    for site, reader in _readers(stored, source):
        sums[site] = sums.get(site, 0) + reader_sums(reader, squares[site])
    return rank_choices(
        sum(sites.weights[site] * leaks(own, squares[site]) for site, own in sums.items()) / sites.weights.sum()
    )


def reader_sums(reader: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """What `leaks` takes of readers (n, d), to be added up: (4, d), ‖W_k‖², W_k·ΣW, W_k·Σ_j σ_j² W_j and ‖ΣW‖²."""
    total = reader.sum(1)
    return np.stack(
        [(reader**2).sum(0), total @ reader, (reader @ squares) @ reader, np.full(reader.shape[1], total @ total)]
    )


def leaks(sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """L of a drop and of a reflection of each entry: (2, d); of `reader_sums` and mean squares (d,) of the stream."""
    norms, along_sum, along_sized, sum_norm = sums
    d, root = len(squares), np.sqrt(len(squares))
    of_rms, whole = squares @ norms, squares.sum()
    dropped = of_rms - 2 * along_sized + whole * norms
    one, own = 1 / (d + root), 1 / root - 1 / (d + root)  # Wc = one ΣW + own W_p
    of_center = one**2 * sum_norm + 2 * one * own * along_sum + own**2 * norms
    share = squares / (root + 1) ** 2
    reflected = of_rms - 2 * (one * (squares @ along_sum) + own * along_sized) + whole * of_center
    reflected += share * (norms.sum() - 2 * (one * sum_norm + own * along_sum) + d * of_center)
    reflected -= (squares + share) * (norms - 2 * (one * along_sum + own * norms) + of_center)  # the entry itself
    return np.maximum(np.stack([dropped, reflected]) / of_rms, 0)


def rank_choices(leak: np.ndarray) -> list[Choice]:
    """The choices by their error, of L of a drop and of a reflection of each entry: (2, d)."""
    choices = [
        Choice(kind, entry, float(error))
        for kind, errors in zip(KINDS, np.sqrt((leak + OTHER) / (1 + OTHER)), strict=True)
        for entry, error in enumerate(errors)
    ]
    return sorted(choices, key=lambda choice: choice.error)


def _folded(stored: Readable, source: ModelConfig) -> Iterator[tuple[int | None, Path, np.ndarray]]:
    """(block, path, leaf) in parts, in float64, with norms and LayerScales folded. The block is None outside of any."""
    roles = parameter_roles(source)
    for tile, flat in read_parts(stored, source, PART_SIZE):
        wide = {path: leaf.astype(np.float64) for path, leaf in flat.items()}
        for path, leaf in fold_norms(fold_layer_scales(wide, roles), roles).items():
            if path[0] == STACKED:
                first = tile[LAYER].start if LAYER in tile else 0
                yield from ((first + i, path, own) for i, own in enumerate(leaf))
            else:
                yield int(path[0].split("_")[1]) if path[0].startswith("block_") else None, path, leaf


def _reader(source: ModelConfig, path: Path, leaf: np.ndarray, tied_scale: Any) -> np.ndarray | None:
    """(outputs, d) of a leaf that reads the stream, as a tied table does by way of its affine; of others None."""
    role = parameter_roles(source).get(path)
    if role is not None and role.reads is not None:
        return np.moveaxis(leaf, role.reads, -1).reshape(-1, source.d_model)
    return leaf * tied_scale if path == ("token_embedding",) and source.tie_embeddings else None


def _tied_scale(stored: Readable, source: ModelConfig) -> Any:
    scale = ("head_affine", "scale")
    return stored.read(scale).astype(np.float64) if scale in parameter_roles(source) else 1.0


def _readers(stored: Readable, source: ModelConfig) -> Iterator[tuple[int, np.ndarray]]:
    """(site, (outputs, d)) of all that reads the stream."""
    scale = _tied_scale(stored, source)
    for block, path, leaf in _folded(stored, source):
        reader = _reader(source, path, leaf, scale)
        if reader is not None:
            yield (2 * source.depth if block is None else 2 * block + BRANCHES.index(path[1])), reader


class _Statistics:
    """Of the weights: by (block, module) of readers [‖W_k‖² (d,), ‖b‖², outputs], of writers [squares of what an
    input of size 1 adds to each entry (d,), of what the bias does]; and the same of the embedding."""

    def __init__(self, stored: Readable, source: ModelConfig):
        self.readers: dict[Any, list[Any]] = {}
        self.writers: dict[Any, list[Any]] = {}
        roles, leaves, scale = parameter_roles(source), abstract_params(source), _tied_scale(stored, source)
        biases = {role.bias for role in roles.values() if role.bias is not None}
        for block, path, leaf in _folded(stored, source):
            key = block, path[-2] if len(path) > 1 else path[0]
            reader = _reader(source, path, leaf, scale)
            if reader is not None:
                self._add(self.readers, key, (reader**2).sum(0), 0.0, len(reader))
            elif path in biases:
                self._add(self.readers, key, 0.0, float((leaf**2).sum()), 0)
            names = leaves[path].names if path in leaves else ()
            axis = next((i - len(names) for i, name in enumerate(names) if name in ("write", "raw")), None)
            if axis is None or (names[axis] == "raw" and not _writes_raw(path)):
                continue
            added = (center(np.moveaxis(leaf, axis, -1)).reshape(-1, source.d_model) ** 2).sum(0)
            if names[0] in ("vocab", "position"):  # a token adds one row of a table
                added /= leaves[path].value.shape[0]
            self._add(self.writers, key, *((0.0, added) if path[-1] == "bias" else (added, 0.0)))
        self.embedding = sum(sum(of) for (block, _), of in self.writers.items() if block is None)
        self.head = sum(of[0] for (block, _), of in self.readers.items() if block is None)

    @staticmethod
    def _add(to: dict[Any, list[Any]], key: Any, *values: Any) -> None:
        to[key] = [a + b for a, b in zip(to.get(key, [0.0] * len(values)), values, strict=True)]


def _writes_raw(path: Path) -> bool:
    """Of a leaf that is d wide: whether it enters the stream, centred at run time, rather than follow it."""
    entering = ("patch_embedding", "out", "down")
    return len(path) == 1 or (path[-2] in entering and path[0] != "pool")


def estimate_sites(stored: Readable, source: ModelConfig) -> Sites:
    """From the weights alone, as if numbers were independent, normal, and attention looked at one token."""
    found = _Statistics(stored, source)
    x, squares, updates = found.embedding, [], []
    for block in range(source.depth):
        before = x
        for branch in BRANCHES:
            squares.append(before if source.parallel else x)
            n = squares[-1] / squares[-1].mean()

            def size(name: str, block: int = block, n: np.ndarray = n) -> float:
                norms, bias, outputs = found.readers[block, name]
                return float((norms @ n + bias) / outputs)

            if branch == "attention":
                of_kernel, of_bias = found.writers[block, "out"]
                inner = size("value")
            else:
                of_kernel, of_bias = found.writers[block, "down"]
                h = NODES * np.sqrt(size("gate" if source.gated_mlp else "up"))
                inner = float(np.asarray(activate(source, jnp.asarray(h)), np.float64) ** 2 @ NODE_WEIGHTS)
                inner *= size("up") if source.gated_mlp else 1.0
            updates.append(inner * of_kernel + of_bias)
            x = x + updates[-1]
    return Sites(np.stack([*squares, x]), np.array([*(u @ found.head / (x @ found.head) for u in updates), 1.0]))


def with_choice(config: ModelConfig, choice: Choice) -> ModelConfig:
    """The config with these coordinates."""
    return dataclasses.replace(config, coordinates=choice.kind, coordinates_entry=choice.entry)
