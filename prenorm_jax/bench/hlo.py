"""What a compiled program's text says of it: its operations, how often each is done, what the compiler thinks it takes.

XLA's text format is not documented as an interface; what is read here is little, and tested against programs whose
counts are known (tests/test_hlo.py).
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+?(\d+)(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|branch_computations|true_computation|false_computation)=(\{.*?\}|\S+)")
_NAME = re.compile(r"[\w.\-]+")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a program.

    Attributes:
      kind: HLO opcode, such as fusion, all-gather.
      scope: where it comes from in the source: JAX's name stack.
      times: how often one run of the program does it; a loop of unknown length counts once.
      cycles: the compiler's estimate for doing it once; 0 if it has none.
      size: bytes of its result.
    """

    kind: str
    scope: str
    times: int
    cycles: int
    size: int

    @property
    def all_cycles(self) -> int:
        """Of all the times that it is done."""
        return self.times * self.cycles

    @property
    def collective(self) -> str | None:
        """The kind of collective it is, by which its start alone counts; None for all else."""
        kind = self.kind.removesuffix("-start")
        return kind if kind in COLLECTIVES else None


def operations(text: str) -> Iterator[Operation]:
    """All operations of the program (`compiled.as_text()`), those in loops and calls with how often they are done."""
    computations, entry = _computations(text)
    yield from _walk(computations, entry, times=1)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    result: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            lines = result.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif " = " in line:
            lines.append(line)
    return result, entry


def _walk(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Operation]:
    fused = set()
    for line in computations.get(name, ()):
        instruction = _INSTRUCTION.match(line)
        if not instruction:
            continue
        kind, size = instruction[2], _size(instruction[1])
        called = [name for names in _CALLED.findall(line) for name in _NAME.findall(names)]
        if kind == "fusion" and any(" all-reduce(" in inner for inner in computations.get(called[0], ())):
            kind = "reduce-scatter"  # on TPUs: an all-reduce of which each device keeps its share
        elif kind == "fusion":
            # On TPUs: one that is done in steps, beside the products that the fusions around those steps are.
            for inner in computations.get(called[0], ()):
                part, channel = _INSTRUCTION.match(inner), _CHANNEL.search(inner)
                if part and part[2] in COLLECTIVES and channel and (part[2], channel[1]) not in fused:
                    fused.add((part[2], channel[1]))
                    yield Operation(part[2], _scope(inner), times, 0, _size(part[1]))
        cycles = _CYCLES.search(line)
        yield Operation(kind, _scope(line), times, int(cycles[1]) if cycles else 0, size)
        if kind in ("while", "call", "conditional", "async-start"):
            for computation in called:
                yield from _walk(computations, computation, times * _trips(computations, line))


def _scope(line: str) -> str:
    name = _OP_NAME.search(line)
    return name[1] if name else ""


def _trips(computations: dict[str, list[str]], line: str) -> int:
    """How often a loop runs: as XLA noted, or as its condition, counter < constant, says. 1 if neither."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = "\n".join(computations.get(_CONDITION.search(line)[1], ())) if " while(" in line else ""
    limits = _LIMIT.findall(condition)
    return int(limits[0]) if len(limits) == 1 and "direction=LT" in condition else 1


def _size(shape: str) -> int:
    """Bytes of a result: of a tuple, all of its parts."""
    sizes = ((1 if name == "pred" else max(int(bits) // 8, 1), axes) for name, bits, axes in _SHAPE.findall(shape))
    return sum(size * math.prod(int(axis) for axis in axes.split(",") if axis) for size, axes in sizes)
