"""What lies in a folder. Names decide nothing but the order; what is not read is kept count of, to be said."""

import os
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

from prenorm_jax.base.errors import PrenormError


class LeftOut:
    """What below `root` is not read, by the reason why. As a string: the end of a line that says so, or nothing."""

    def __init__(self, root: Path):
        self._root = root
        self._found: dict[str, list[str]] = defaultdict(list)

    def add(self, why: str, path: Path, detail: str = "") -> None:
        self._found[why].append(path.relative_to(self._root).as_posix() + detail)

    def __str__(self) -> str:
        counts = [f"{len(names):,} {why} ({names[0]})" for why, names in self._found.items()]
        return "; left out: " * bool(counts) + ", ".join(counts)


def list_folder(folder: Path, left_out: LeftOut) -> tuple[list[Path], list[Path]]:
    """(folders, files) in it, sorted. Links are followed, but not to where the folder lies; what is hidden is left out.

    Raises PrenormError.
    """
    folders, files, place = [], [], Path(os.path.realpath(folder))
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = folder / entry.name
                if entry.name.startswith("."):
                    left_out.add("hidden", path)
                elif entry.is_symlink() and place.is_relative_to(os.path.realpath(path)):
                    left_out.add("links back", path)
                elif path.is_dir() if entry.is_symlink() else entry.is_dir():
                    folders.append(path)
                elif path.is_file() if entry.is_symlink() else entry.is_file():
                    files.append(path)
                else:
                    left_out.add("neither file nor folder" if os.path.exists(path) else "links to nothing", path)
    except OSError as error:
        raise PrenormError(
            f"{folder} cannot be listed ({error.strerror}): change its rights or move it away"
        ) from error
    return folders, files


def walk(root: Path, left_out: LeftOut) -> Iterator[Path]:
    """The files in the folder and below, also behind links, but each folder once. Raises PrenormError."""
    seen, waiting = set(), deque([root])
    while waiting:
        folder = waiting.popleft()
        if (place := os.path.realpath(folder)) in seen:
            continue
        seen.add(place)
        folders, files = list_folder(folder, left_out)
        yield from files
        waiting.extendleft(inner for inner in reversed(folders) if not inner.is_symlink())
        waiting.extend(inner for inner in folders if inner.is_symlink())  # what lies here too keeps that name
