"""What is said of an error in the training loop that is not the program's fault, and of a workdir that is gone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError, Unwritable, first_line, is_out_of_memory


def refusal(error: Exception, config: ConfigDict) -> PrenormError | None:
    """The line, with its remedy, of an error in the data, of the file system or of memory; None for another."""
    if isinstance(error, PrenormError):
        return error
    if is_out_of_memory(error):
        return PrenormError(
            f"memory is exhausted ({first_line(error)}): compute a batch in more pieces (--config.accumulate="
            f"{2 * config.accumulate}) or keep less of it (--config.model.remat=full), split the state over more "
            "devices (--config.mesh.fsdp), or take a smaller batch_size or model in another workdir"
        )
    if isinstance(error, OSError):
        return PrenormError(f"{first_line(error)}: mend that and give the same command again")
    return None


@contextlib.contextmanager
def memory_named(config: ConfigDict) -> Iterator[None]:
    """Raises PrenormError, with its remedies, where memory is exhausted."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise refusal(error, config) from error


class Place:
    """A folder as it is now: it knows it again."""

    def __init__(self, folder: Path):
        self._folder, self._found = folder, folder.stat()

    def check(self) -> None:
        """Raises Unwritable if the folder was removed, renamed or replaced since."""
        try:
            same = os.path.samestat(self._folder.stat(), self._found)
        except OSError:
            same = False
        if not same:
            raise Unwritable(
                f"{self._folder} was removed, renamed or replaced while it was trained in: put it back under this "
                "name, in place of what is there now, and the same command goes on from its last complete checkpoint"
            )
