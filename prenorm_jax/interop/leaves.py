"""The leaves of a model of ours as they lie in foreign tensors: read, they are imported; written, exported."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.trees import Path
from prenorm_jax.equivalence.stored import Part
from prenorm_jax.interop.family import Family
from prenorm_jax.interop.safetensors import FLOATS
from prenorm_jax.interop.views import NOTHING, Place, Rows, View, axis_sizes, read_table, tensor_names, tensor_shape
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.models.config import ModelConfig

_SHOWN = 8  # names of a kind that an error lists
_HEAD, _TABLE = ("head", "kernel"), ("token_embedding",)
_OPTIMIZER = re.compile(r"exp_avg|momentum|optimizer|adam|master_weight", re.IGNORECASE)


class ForeignLeaves:
    """`stored.Readable` and `stored.Writable` of a Pre-LN model's leaves, in tensors of a family's names.

    Attributes:
      views: leaf -> where it lies; a tied table may lie in two places.
      ignored: the names of tensors that are none of the network, as the family says.
      skipped: tensor -> so many of its first rows are no leaf's.
    """

    def __init__(
        self,
        family: Family,
        config: Mapping[str, Any],
        model: ModelConfig,
        tensors: Mapping[str, np.ndarray],
        unread: bool = False,
    ):
        """`config`: config.json's, which describes the tensors, as `model` does. `unread`: a tied head that is there
        once more is not compared with its table, for which both are read.

        Raises PrenormError, listing all that is missing, too much, of another shape, no floating-point numbers or there
        twice.
        """
        self._shapes, self._name, self._key_bias_counts = param_shapes(model), family.model_type, model.key_bias_counts
        sizes, depth = axis_sizes(model) | family.sizes(model), model.depth
        places = list(read_table(family.lines(config, {name: x.shape for name, x in tensors.items()}), depth))
        others = [place for place in places if place.copy and place.path in self._shapes]
        places = [place for place in places if not place.copy]
        names, twice = _our_names(family, tensors)
        wanted = {place.path: place for place in places if place.path in self._shapes}
        _check_table(family, places, wanted, self._shapes)
        tied = [place for place in places if place.path == _HEAD] if model.tie_embeddings else []
        copies = [place for place in (*tied, *others) if place.tensor in names]
        problems = {"twice": twice} | _compare(family, [*wanted.values(), *copies], names, tensors, sizes)
        self.ignored = set(problems.pop("ignored"))
        if any(problems.values()):
            raise PrenormError(
                f"the tensors are not those of a {family.model_type} with this config.json: {_listed(problems)}"
            )
        skips = ((place.tensor, re.match(r"\w+@(\d+)", place.axes)) for place in wanted.values())
        self.skipped = {names[tensor]: int(found[1]) for tensor, found in skips if found}
        summed = {place.tensor for place in wanted.values() if place.added}
        self._added = {path for path, place in wanted.items() if place.added}
        self._summed = {path for path, place in wanted.items() if place.tensor in summed}
        self.views: dict[Path, list[View | Rows]] = {
            path: [_view(place, [tensors[names[name]] for name in tensor_names(place, sizes)], sizes)]
            for path, place in wanted.items()
            if place.tensor != NOTHING
        }
        for place in copies:  # a head's is of the table, whose layout its own line says
            if place in tied:
                place = place._replace(path=_TABLE, layout=wanted[_TABLE].layout)
            copy = View(tensors[names[place.tensor]], place, sizes)
            if not unread:
                self._check_equal(names[place.tensor], place.path, copy)
            self.views[place.path].append(copy)
        if wrong := [path for path, views in self.views.items() if views[0].shape != self._shapes[path].shape]:
            raise ValueError(f"the table of {family.model_type} gives {'/'.join(wrong[0])} another shape than it has")

    @property
    def absent(self) -> list[Path]:
        """The leaves that lie in no tensor of their own, and are zero."""
        return [path for path in self._shapes if path not in self.views or path in self._added]

    def read(self, path: Path, part: Part = ()) -> np.ndarray:
        """Part of a leaf (of (), all of it), in the model's dtype."""
        leaf = self._shapes[path]
        if path not in self.views or path in self._added:
            return np.zeros(leaf.shape, leaf.dtype)[part]
        view = self.views[path][0]
        return _in_dtype(path, _more(view.read(part), view.more), leaf.dtype)

    def write(self, path: Path, part: Part, array: np.ndarray) -> None:
        """Assigns to part of a leaf; to each copy of it. Leaves that are added up are so in a tensor of zeros.

        A bias of keys that does nothing may be without a place. Raises PrenormError for other numbers that have none.
        """
        if path not in self.views:
            without_effect = path[-2:] == ("key", "bias") and not self._key_bias_counts
            if np.any(array) and not without_effect:
                raise PrenormError(
                    f"the {self._name} format has no place for {'/'.join(path)}, which is not zero: if a norm was "
                    "folded into it, convert the source with --keep-affine"
                )
            return
        for view in self.views[path]:
            values = view.read(part) + array if path in self._summed else array
            view.write(part, _in_dtype(path, _more(values, -view.more), view.dtype))

    def _check_equal(self, name: str, path: Path, copy: View) -> None:
        """Raises PrenormError unless a copy, such as a tied head, is the leaf of this path, bit for bit."""
        leaf = self.views[path][0]
        for start in range(0, leaf.shape[0], 4096):
            rows = (slice(start, min(start + 4096, leaf.shape[0])), *[slice(None)] * (len(leaf.shape) - 1))
            if not np.array_equal(copy.read(rows).view(np.uint8), leaf.read(rows).view(np.uint8)):
                if path != _TABLE:
                    raise PrenormError(f"{name} should be the same as {'/'.join(path)} and is not: remove it")
                raise PrenormError(
                    f"{name} is not the token embedding, which config.json says it is (tie_word_embeddings): set that "
                    "to false there to take the head as it is, or remove it"
                )


def _view(place: Place, tensors: list[np.ndarray], sizes: Mapping[str, int]) -> View | Rows:
    if len(tensors) == 1 and "{" not in place.tensor:
        return View(tensors[0], place, sizes)
    row = place._replace(layout=place.layout.partition(" ")[2])
    return Rows([View(tensor, row, sizes) for tensor in tensors])


def _more(array: np.ndarray, by: float) -> np.ndarray:
    """The numbers and so much more, before they are rounded."""
    return array.astype(np.float64) + by if by else array


def _in_dtype(path: Path, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The numbers in this dtype. Raises PrenormError for finite ones that it cannot hold."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if cast.dtype.itemsize < array.dtype.itemsize and not np.array_equal(np.isfinite(cast), np.isfinite(array)):
        raise PrenormError(f"{'/'.join(path)} has numbers that {dtype.name} cannot hold: give another --dtype")
    return cast


def _our_names(family: Family, tensors: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The table's name of each tensor -> its own; those that have a name which another has already."""
    names: dict[str, str] = {}
    twice = []
    for own in tensors:
        if names.setdefault(name := family.name(own), own) != own:
            twice.append(f"{own} (as {names[name]})")
    return names, twice


def _compare(
    family: Family,
    places: list[Place],
    names: Mapping[str, str],
    tensors: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
) -> dict[str, list[str]]:
    """What is wrong, by kind; and under "ignored" the tensors that are left out."""
    wanted = {name: place for place in places for name in tensor_names(place, sizes) if name != NOTHING}
    found: dict[str, list[str]] = {kind: [] for kind in ("missing", "surplus", "shape", "dtype", "ignored")}
    found["missing"] = [name for name in wanted if name not in names]
    for name, own in names.items():
        if name not in wanted:
            found["ignored" if family.ignores(name) else "surplus"].append(own)
            continue
        tensor, shape = tensors[own], tensor_shape(wanted[name], sizes)
        if tensor.dtype.type not in FLOATS:
            found["dtype"].append(f"{own} ({tensor.dtype.name})")
        elif tensor.shape != shape:
            found["shape"].append(f"{own} {list(tensor.shape)}, not {list(shape)}")
    return found


def _listed(problems: Mapping[str, list[str]]) -> str:
    words = {
        "missing": "missing {}",
        "surplus": "unknown {}",
        "shape": "of another shape {}",
        "dtype": "quantised, or no floating-point numbers, {}",
        "twice": "there twice {}",
    }
    said = []
    for kind, form in words.items():
        if names := problems[kind]:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            said.append(form.format(", ".join(names[:_SHOWN]) + more))
    if any(_OPTIMIZER.search(name) for name in problems["surplus"]):
        said.append("it seems to hold an optimizer's state: save the model's tensors by themselves")
    return "; ".join(said)


def _check_table(family: Family, places: list[Place], wanted: Mapping[Path, Place], shapes: Mapping[Path, Any]) -> None:
    """Raises ValueError for a table with no line, or two, for a leaf: that is a mistake of the table."""
    paths = [place.path for place in places]
    wrong = [path for path in shapes if path not in wanted] + [path for path in wanted if paths.count(path) > 1]
    if wrong:
        raise ValueError(f"the table of {family.model_type} has no line, or two, for {'/'.join(wrong[0])}")
