"""Files that are whole or not there, folders that one process has to itself or that can be written to. Needs no JAX."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.processes import is_first


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file's content at once, and for good: after a crash or a power cut it is the old one or the new.

    Of many processes only the first does. Raises OSError, naming the file, if it cannot be written; the old content is
    then untouched.
    """
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """`write_whole` for some files: if one cannot be written, none is, and OSError names it.

    (Nothing replaces several files at once: a crash between the last lines of it can leave some old and some new.)
    """
    if not is_first():
        return
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in contents}
    path = None
    try:
        for path, temporary in temporaries.items():
            if path.is_dir():  # else found out when others are replaced
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            with temporary.open("wb") as file:
                file.write(contents[path])
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_results(contents: Mapping[Path, bytes]) -> None:
    """Writes what a command was asked for, all of it or none, in folders that it makes. Raises PrenormError."""
    try:
        for path in contents:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_together(contents)
    except OSError as error:
        raise PrenormError(f"cannot write {error.filename} ({error.strerror}): choose another --out") from error


def check_folder(folder: Path, flag: str = "--out") -> None:
    """Raises PrenormError, naming the flag, if nothing can be written into the folder, which need not be there."""
    place = folder.absolute()
    try:
        there = next(path for path in (place, *place.parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise PrenormError(f"cannot write into {folder} ({error.strerror}): choose another {flag}") from error


def only_process(folder: Path) -> contextlib.AbstractContextManager[None]:
    """While entered, no other run can enter it with this folder.

    Of many processes that train as one, the first stands for all. Raises PrenormError if another run is there already.
    """
    return locked(folder, "training in") if is_first() else contextlib.nullcontext()


@contextlib.contextmanager
def locked(folder: Path, what: str, wait: bool = False) -> Iterator[None]:
    """While entered, no other process can enter it with this folder; one that dies lets go of it (flock).

    If another is there already, which is doing `what`, says so and waits, or raises PrenormError; that, too, if the
    lock's place is taken.
    """
    path = folder / "lock"
    # Where there is no flock, an OSError: a marker file in its place would outlive a process that is killed.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        owner = path.read_text().strip() or "another process"
        if not wait:
            raise PrenormError(f"{owner} is {what} {folder}: wait for it, stop it, or name another one") from error
        say(f"waiting: {owner} is {what} {folder}")
        lock.acquire()
    except IsADirectoryError as error:
        raise PrenormError(f"{path} is a folder, where processes lock a file of that name: remove it") from error
    try:
        path.write_text(f"process {os.getpid()} on {os.uname().nodename}")
        yield
    finally:
        lock.release()


def json_bytes(value: Any) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    write_whole(path, json_bytes(value))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file. Raises PrenormError if it holds none."""
    if path.is_dir():
        raise PrenormError(f"{path} is a folder, where a file of that name is read and written: remove it")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise PrenormError(f"{path} is damaged: {error}; restore it from a copy") from error
    if not isinstance(value, dict):
        raise PrenormError(f"{path} is damaged: it holds no JSON object; restore it from a copy")
    return value


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.norm": "layernorm", ...} of {"model": {"norm": "layernorm"}, ...}, or of a ConfigDict."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
    return flat
