"""The process of its own in which a source's library computes, forked from one where the library is imported already.

Importing it takes ten times as long as what it is asked for. `python library_process.py` is the process that forks: a
line for each call, its arguments, and a line back.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).parents[2])
Run = Callable[..., subprocess.CompletedProcess]


@contextlib.contextmanager
def started() -> Iterator[Run]:
    """In place of `subprocess.run`: what `python -m prenorm_jax.interop.reference ARGUMENTS` would have done."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": ROOT}
    line, pipe = [sys.executable, __file__], subprocess.PIPE
    with subprocess.Popen(line, env=environment, stdin=pipe, stdout=pipe, text=True) as process:

        def run(line: list[str], **_: Any) -> subprocess.CompletedProcess:
            assert line[:3] == [sys.executable, "-m", "prenorm_jax.interop.reference"]
            process.stdin.write(json.dumps(line[3:]) + "\n")
            process.stdin.flush()
            returncode, stderr = json.loads(process.stdout.readline())
            return subprocess.CompletedProcess(line, returncode, "", stderr)

        yield run


def main() -> None:
    import torch
    import transformers

    from prenorm_jax.interop import reference

    assert transformers.AutoModel and transformers.ViTModel  # which imports what every model needs
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # JAX's, of forks: no child computes with it
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as said:
            if not (child := os.fork()):
                for stream in (1, 2):
                    os.dup2(said.fileno(), stream)
                status = 1
                try:
                    reference.main(json.loads(line))
                    status = 0
                except BaseException:
                    traceback.print_exc()
                sys.stderr.flush()
                os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            print(json.dumps([status, said.read()]), file=answers, flush=True)


if __name__ == "__main__":
    main()
