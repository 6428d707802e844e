"""The engine: a table of what lies where, whose every line is a view of a foreign tensor in our layout.

A line is two layouts over axes that have names, as einops writes them:

    foreign tensor              its axes       our leaves                                     our axes
    h.{i}.attn.c_attn.weight    d (p h k)      block_{i}/attention/{query,key,value}/kernel   d (h k)
    h.{i}.ln_1.{weight,bias}    d              block_{i}/attention_norm/{scale,bias}
    embed_positions.weight      n@2 d          position_embedding
    -                           d              block_{i}/attention/out/bias
    +classifier.bias            v              head/mean/bias
    1+norm.weight               d              head_norm/scale
    q_norms.{h}.weight          k              block_{i}/attention/query_norm/scale           h k

Columns stand two spaces apart, and what follows # is a comment. Our axes are the foreign ones where they are left out.
{i} is a block; where only our name has it, the foreign axis `l` counts the blocks. {a,b} on both sides are tensors side
by side; on our side alone, the parts of the foreign axis `p`. Each part is 1 wide, and `p` can then be left out on our
side, unless the sizes follow it, as in (g p=r,1,1 k). n@2 leaves out the first two rows. A number is an axis of that
size; a 1 may stand on one side alone. `-` is no tensor: zeros. + is a tensor that another line has, too: read, it is
zeros; written, added to the other. 1+ is a tensor that, added to 1, is our leaf. Another axis in braces than i counts
tensors that stand on it, our first. How wide an axis is, the model says: `axis_sizes`.

Reading a view is import, and assigning to it export: the inverse of a line is the same line. No byte is read before
that, so `convert_stored` streams foreign files as it does checkpoints.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from prenorm_jax.base.trees import Path
from prenorm_jax.equivalence.stored import Part
from prenorm_jax.models.config import ModelConfig

NOTHING = "-"  # in place of a tensor's name
ADDED, ONE_MORE = "+", "1+"  # before one
_OF_MODEL = [("d", "d_model"), ("h", "heads"), ("g", "kv_heads"), ("k", "head_dim"), ("f", "mlp_dim")]
_OF_MODEL += [("v", "vocab_size"), ("n", "max_len")]
_OF_MODEL += [("v", "classes"), ("n", "position_rows"), ("t", "registers")]  # of a ViT, and of its patches:
_OF_MODEL += [("y", "patch_size"), ("x", "patch_size"), ("c", "channels")]


class Place(NamedTuple):
    """Where one leaf of ours lies: the foreign tensor, its layout, the leaf, its layout.

    `part`: of an axis of parts, the number of the part that it is, and how many there are. `added`: whether the leaf is
    added to what else lies there. `more`: by how much the leaf is more than what lies there.
    """

    tensor: str
    axes: str
    path: Path
    layout: str
    part: dict[str, tuple[int, int]]
    added: bool = False
    more: float = 0.0


def read_table(table: str, depth: int) -> Iterator[Place]:
    """The leaves that a table's lines stand for, in a model of so many blocks."""
    for line in filter(None, (line.partition("#")[0].strip() for line in table.splitlines())):
        foreign, axes, ours, *layout = re.split(r"\s{2,}", line)
        tensors, leaves = _options(foreign), _options(ours)
        for j, leaf in enumerate(leaves):
            tensor, part = tensors[j if len(tensors) > 1 else 0], {}
            if len(leaves) > len(tensors):
                part["p"] = (j, len(leaves))
            for i in range(depth) if "{i}" in leaf else [0]:
                if "{i}" in leaf and "{i}" not in tensor:
                    part["l"] = (i, depth)
                sign = next((sign for sign in (ADDED, ONE_MORE) if tensor.startswith(sign)), "")
                name, path = (name.replace("{i}", str(i)) for name in (tensor.removeprefix(sign), leaf))
                kind = sign == ADDED, float(sign == ONE_MORE)
                yield Place(name, axes, tuple(path.split("/")), *(layout or [axes]), dict(part), *kind)


def _options(name: str) -> list[str]:
    """["a/x", "a/y"] of "a/{x,y}"."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", name)
    return [name.replace(found[0], option) for option in found[1].split(",")] if found else [name]


def axis_sizes(model: ModelConfig) -> dict[str, int]:
    """The axes that every table may name: those of `docs/checkpoints.md`, with their sizes."""
    sizes = {axis: getattr(model, key) for axis, key in _OF_MODEL if hasattr(model, key)}
    return sizes | {"r": model.heads // model.kv_heads}


def tensor_names(place: Place, sizes: Mapping[str, int]) -> list[str]:
    """The foreign tensors that a leaf lies in: one, or one for each entry of its first axis."""
    counted = re.search(r"\{(\w)\}", place.tensor)
    return [place.tensor.replace(counted[0], str(i)) for i in range(sizes[counted[1]])] if counted else [place.tensor]


class _Axis(NamedTuple):
    """An axis of a foreign tensor: its name and size there, and what of it is the leaf's."""

    name: str
    size: int
    own: slice


def _axis(word: str, sizes: Mapping[str, int], part: Mapping[str, tuple[int, int]]) -> _Axis:
    """What a word of a layout says, as d, n@2, p, p=r,1,1 or 3."""
    name, skipped, parts = re.fullmatch(r"(\w+)(?:@(\d+))?(?:=([\w,*]+))?", word).groups()

    def size(factors: str) -> int:
        return math.prod(int(factor) if factor.isdecimal() else sizes[factor] for factor in factors.split("*"))

    if name in part:
        which, count = part[name]
        widths = [size(width) for width in parts.split(",")] if parts else [1] * count
        start = sum(widths[:which])
        return _Axis(name, sum(widths), slice(start, start + widths[which]))
    start = int(skipped or 0)
    return _Axis(name, start + size(name), slice(start, None))


def _groups(layout: str) -> list[list[str]]:
    """[["d"], ["p", "h", "k"]] of "d (p h k)"."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", layout)]


def tensor_shape(place: Place, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of the foreign tensor."""
    return tuple(math.prod(_axis(word, sizes, place.part).size for word in group) for group in _groups(place.axes))


class View:
    """A leaf of ours that lies in a foreign tensor.

    Its axes stand in our order, but those that make up one of ours are still apart: where heads lie between other
    heads, there is no view of them as one axis.

    Attributes:
      more: what is to be added to the numbers there, so that they are the leaf's.
    """

    def __init__(self, tensor: np.ndarray, place: Place, sizes: Mapping[str, int]):
        """`tensor` has the shape `tensor_shape`."""
        axes = [_axis(word, sizes, place.part) for group in _groups(place.axes) for word in group]
        array = tensor.reshape([axis.size for axis in axes])[tuple(axis.own for axis in axes)]
        names, groups = [axis.name for axis in axes], _groups(place.layout)
        wanted = [re.split("[@=]", word)[0] for group in groups for word in group]
        left_out = [name == "1" or name not in wanted for name in names]
        array = array.squeeze(tuple(i for i, out in enumerate(left_out) if out))
        names = [name for name, out in zip(names, left_out, strict=True) if not out]
        array = array.transpose([names.index(name) for name in wanted if name != "1"])
        self.more = place.more
        self._array = np.expand_dims(array, tuple(i for i, name in enumerate(wanted) if name == "1"))
        self._merged = [len(group) for group in groups]

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's."""
        return tuple(math.prod(sizes) for sizes in self._sizes())

    @property
    def dtype(self) -> np.dtype:
        """The tensor's."""
        return self._array.dtype

    def read(self, part: Part = ()) -> np.ndarray:
        """Part of the leaf (of (), all of it), in the tensor's dtype."""
        index, shape, inside = self._cover(part)
        covered = self._array[index]
        if (
            max(self._merged, default=1) > 1
        ):  # copied in the order of the file: merged as it lies, it would be transposed
            covered = covered.copy(order="K")
        return covered.reshape(shape)[inside]

    def write(self, part: Part, values: np.ndarray) -> None:
        """Assigns to part of the leaf."""
        index, shape, inside = self._cover(part)
        covered = self._array[index]
        if values.shape != shape:  # the part begins or ends inside a head
            values, within = covered.reshape(shape).copy(), values
            values[inside] = within
        self._array[index] = values.reshape(covered.shape)

    def _sizes(self) -> Iterator[list[int]]:
        """For each axis of the leaf, the sizes of those that make it up."""
        sizes = iter(self._array.shape)
        for count in self._merged:
            yield [next(sizes) for _ in range(count)]

    def _cover(self, part: Part) -> tuple[Part, tuple[int, ...], Part]:
        """The least index of the array that covers the part, the shape of that, merged, and where in it the part is."""
        index: list[slice] = []
        shape, inside = [], []
        for axis, sizes in enumerate(self._sizes()):
            start, stop, _ = (part[axis] if axis < len(part) else slice(None)).indices(math.prod(sizes))
            inner = math.prod(sizes[1:])
            first, last = start // inner, -(-stop // inner)
            index += [slice(first, last), *[slice(None)] * (len(sizes) - 1)]
            shape.append((last - first) * inner)
            inside.append(slice(start - first * inner, stop - first * inner))
        return tuple(index), tuple(shape), tuple(inside)


class Rows:
    """A leaf of ours each of whose rows, along its first axis, is a view: of small ones, which are read whole."""

    more = 0.0

    def __init__(self, views: list[View]):
        self._views = views

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's."""
        return (len(self._views), *self._views[0].shape)

    @property
    def dtype(self) -> np.dtype:
        """The tensors'."""
        return self._views[0].dtype

    def read(self, part: Part = ()) -> np.ndarray:
        """Part of the leaf (of (), all of it), in the tensors' dtype."""
        return np.stack([view.read() for view in self._views])[part]

    def write(self, part: Part, values: np.ndarray) -> None:
        """Assigns to part of the leaf."""
        whole = self.read()
        whole[part] = values
        for view, row in zip(self._views, whole, strict=True):
            view.write((), row)
