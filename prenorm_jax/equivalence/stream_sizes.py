"""How large the entries of the residual stream are, as the weights let one expect; nothing is run.

As if numbers were independent, those before an activation normal, and attention looked at one token.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.trees import Path
from prenorm_jax.equivalence.roles import parameter_roles
from prenorm_jax.equivalence.rules import affine_leaves, fold_layer_scales, fold_shifts
from prenorm_jax.equivalence.stored import Readable, read_parts
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.coordinates import center
from prenorm_jax.models.positions import POSITION_TABLES, sincos2d_table
from prenorm_jax.models.stacking import LAYER, STACKED
from prenorm_jax.models.transformer import activate

PART_SIZE = 2**18  # entries of a part, of which there are some copies
BRANCHES = ("attention", "mlp")
NODES, _often = np.polynomial.hermite_e.hermegauss(32)  # values of a normal number, and how often each comes
NODE_WEIGHTS = _often / _often.sum()


class Sites(NamedTuple):
    """Where the stream is read: before the branches of each block, in order, and by the head.

    Attributes:
      squares: (sites, d) mean squares of the stream's entries under rmsnorm.
      weights: (sites,) what the square of an error there counts for in the logits'.
    """

    squares: np.ndarray
    weights: np.ndarray


def estimate_sites(stored: Readable, source: ModelConfig) -> Sites:
    """From the weights alone: block by block, what the branches make of the stream and add to it."""
    found = _Statistics(stored, source)
    x, squares, updates = found.embedding, [], []
    for block in range(source.depth):
        before = x
        for branch in BRANCHES:
            squares.append(before if source.parallel else x)
            raw = not (updates or source.first_norm)  # of the embedding itself
            n = x if raw else squares[-1] / (squares[-1].mean() + source.epsilon)
            updates.append(found.update(source, block, branch, n))
            x = x + updates[-1]
    head = found.head if found.head.any() else np.ones(source.d_model)  # of a classifier that begins as zero
    shares = [float(update @ head) / max(float(x @ head), np.finfo(float).tiny) for update in updates]
    if not source.first_norm:
        shares[0] = 0.0  # nothing reads the stream there
    return Sites(np.stack([*squares, x]), np.array([*shares, 1.0]))


class _Statistics:
    """Sums of squares of the weights.

    Attributes:
      readers: by (block, module) [‖W_k‖² (d,), ‖b‖², outputs].
      writers: by (block, module) [what an input of size 1 adds to each entry (d,), what the bias does].
      embedding: of the stream's entries before the first block (d,).
      head: ‖W_k‖² of what reads the stream after the last, or is the output (d,).
    """

    def __init__(self, stored: Readable, source: ModelConfig):
        self.readers: dict[Any, list[Any]] = {}
        self.writers: dict[Any, list[Any]] = {}
        tables: dict[Path, list[Any]] = {}
        roles, leaves = parameter_roles(source), abstract_params(source)
        biases = {role.bias for role in roles.values() if role.bias is not None}
        for block, path, leaf, scale in _parts(stored, source):
            key = block, path[-2] if len(path) > 1 else path[0]
            reader = _reader(source, path, leaf)
            if reader is not None:
                _add(self.readers, key, column_squares(reader) * scale**2, 0.0, len(reader))
            elif block is not None and path in roles and roles[path].bias is not None:  # of the embedding, beside it
                rows = np.moveaxis(leaf, -2, -1)
                _add(self.readers, key, column_squares(rows), 0.0, len(rows))
            elif path in biases:
                _add(self.readers, key, 0.0, float(np.vdot(leaf, leaf)), 0)
            names = leaves[path].names if path in leaves else ()
            axis = next((i - len(names) for i, name in enumerate(names) if name in ("write", "raw")), None)
            if axis is None or (names[axis] == "raw" and not _writes_raw(path)):
                continue
            rows = np.moveaxis(leaf, axis, -1).reshape(-1, source.d_model)
            rows = rows - rows.mean(-1, keepdims=True)
            if names[0] in ("vocab", "position"):  # a token adds one row of a table
                _add(tables, path, *_row_statistics(rows))
            else:
                added = column_squares(rows)
                _add(self.writers, key, *((0.0, added) if path[-1] == "bias" else (added, 0.0)))
        embedding = sum(sum(of) for (block, _), of in self.writers.items() if block is None)
        for path, (along, logs, n) in tables.items():  # as if all its rows had their geometric mean's size
            scale = source.embed_scale if path == ("token_embedding",) else 1.0
            embedding = embedding + along / max(n, 1) * np.exp(logs / max(n, 1)) * scale**2
        embedding = np.broadcast_to(embedding + _constant_positions(source), (source.d_model,))
        if source.embed_norm:
            affine = {path[1]: stored.read(path) ** 2 for path in leaves if path[0] == "embedding_norm"}
            embedding = embedding / embedding.mean() * affine.get("scale", 1.0) + affine.get("bias", 0.0)
        self.embedding = embedding
        self.head = sum(of[0] for (block, _), of in self.readers.items() if block is None)
        if (output := _output_scale(stored, source)) is not None:
            self.head = output**2

    def output(self, block: int, module: str, n: np.ndarray) -> float:
        """The mean square of what a reader makes of a stream of mean squares n (d,)."""
        norms, bias, outputs = self.readers[block, module]
        return float((norms @ n + bias) / outputs)

    def update(self, source: ModelConfig, block: int, branch: str, n: np.ndarray) -> np.ndarray:
        """The mean squares (d,) of what a branch makes of it and adds to the stream."""
        if branch == "attention":
            of_kernel, of_bias = self.writers[block, "out"]
            return self.output(block, "value", n) * of_kernel + of_bias
        of_kernel, of_bias = self.writers[block, "down"]
        h = NODES * np.sqrt(self.output(block, "gate" if source.gated_mlp else "up", n))
        activated = float(np.asarray(activate(source, jnp.asarray(h)), np.float64) ** 2 @ NODE_WEIGHTS)
        return activated * (self.output(block, "up", n) if source.gated_mlp else 1.0) * of_kernel + of_bias


def column_squares(rows: np.ndarray) -> np.ndarray:
    """(n, d) -> (d,) sums of squares, in float64."""
    return np.einsum("nk,nk->k", rows, rows).astype(np.float64)


def _row_statistics(rows: np.ndarray) -> tuple[np.ndarray, float, int]:
    """Of a table's rows (rows, d), those of zeros left out: the sum of their squares if each had length 1 (d,), the sum
    of the logarithms of their squared lengths, and how many they are.

    A token's size is divided out by the norm: a few rows that are much larger than the others are a few tokens.
    """
    squares = np.einsum("nk,nk->n", rows, rows)
    used = squares != 0
    squares[~used] = 1
    return column_squares(rows / np.sqrt(squares)[:, None]), float(np.log(squares).sum()), int(used.sum())


def _add(to: dict[Any, list[Any]], key: Any, *values: Any) -> None:
    to[key] = [a + b for a, b in zip(to.get(key, [0.0] * len(values)), values, strict=True)]


def _constant_positions(source: ModelConfig) -> Any:
    """(d,) mean squares of a computed position table, 0 if the model has none."""
    if source.positions in POSITION_TABLES:
        table = POSITION_TABLES[source.positions](source.max_len, source.d_model)
    elif source.positions == "sincos2d":
        table = sincos2d_table(source.grid[0], source.d_model)
    else:
        return 0.0
    return (center(table) ** 2).mean(0)


def _writes_raw(path: Path) -> bool:
    """Of a leaf that is d wide: whether it enters the stream, centred at run time, rather than follow it."""
    entering = ("patch_embedding", "out", "down")
    return len(path) == 1 or (path[-2] in entering and path[0] != "pool")


def _parts(stored: Readable, source: ModelConfig) -> Iterator[tuple[int | None, Path, np.ndarray, Any]]:
    """(block, path, leaf, scale) in parts, `scale` being what multiplies the stream before the leaf: of a norm, its γ.

    With LayerScales and β folded, but not γ: the product with it would take as long as all sums. The block is None
    outside of any. In float32 or more: squares are added up to within 1e-5, in half of the time that float64 takes.
    """
    roles, leaves, tied_scale = parameter_roles(source), abstract_params(source), _tied_scale(stored, source)
    for tile, flat in read_parts(stored, source, PART_SIZE):
        own_roles = {path: roles[path] for path in flat}
        affines = affine_leaves(own_roles)
        wide = {path: leaf.astype(np.result_type(leaf, np.float32), copy=False) for path, leaf in flat.items()}
        for path, leaf in fold_shifts(fold_layer_scales(wide, own_roles), own_roles).items():
            undivided = [tile[name] for name in tile if path in leaves and name not in leaves[path].names]
            if path in affines.values() or any(part.start for part in undivided):
                continue  # a bias, that came whole with the first part of its kernel
            scale = np.asarray(tied_scale if path == ("token_embedding",) else 1.0)
            if path in roles and roles[path].reads is not None and (roles[path].norm, "scale") in affines:
                scale = wide[affines[roles[path].norm, "scale"]].astype(np.float64)
            if path[0] == STACKED:
                first = tile[LAYER].start if LAYER in tile else 0
                for i, own in enumerate(leaf):
                    yield first + i, path, own, scale[i] if scale.ndim else scale
            else:
                yield int(path[0].split("_")[1]) if path[0].startswith("block_") else None, path, leaf, scale


def _reader(source: ModelConfig, path: Path, leaf: np.ndarray) -> np.ndarray | None:
    """(outputs, d) of a leaf that reads the stream, as a tied table does by way of its affine; of others None."""
    role = parameter_roles(source).get(path)
    if role is not None and role.reads is not None:
        return np.moveaxis(leaf, role.reads, -1).reshape(-1, source.d_model)
    is_head = path == ("token_embedding",) and source.tie_embeddings and source.final_norm_bias is None
    return leaf if is_head else None


def _tied_scale(stored: Readable, source: ModelConfig) -> Any:
    scale = ("head_affine", "scale")
    return stored.read(scale).astype(np.float64) if scale in parameter_roles(source) else 1.0


def _output_scale(stored: Readable, source: ModelConfig) -> np.ndarray | None:
    """(d,) what multiplies the final norm's output where that is the network's; None: something reads it."""
    if source.final_norm_bias is not None or source.tie_embeddings:
        return None
    return np.broadcast_to(_tied_scale(stored, source), (source.d_model,))


def readers_of(stored: Readable, source: ModelConfig) -> Iterator[tuple[int, np.ndarray, Any]]:
    """(site, W (outputs, d), scale) of all that reads the stream, or is the output, as W (scale ⊙ n)."""
    for block, path, leaf, scale in _parts(stored, source):
        reader = _reader(source, path, leaf)
        if reader is not None:
            yield (2 * source.depth if block is None else 2 * block + BRANCHES.index(path[1])), reader, scale
    if (output := _output_scale(stored, source)) is not None:
        yield 2 * source.depth, np.diag(output), 1.0
