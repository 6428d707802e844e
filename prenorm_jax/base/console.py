"""What a command prints beside its results, and how it ends."""

import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable

from prenorm_jax.base.errors import Interrupted, PrenormError, first_line, is_out_of_memory
from prenorm_jax.base.processes import count_processes, is_first, lost_process


def say(line: str) -> None:
    """One line to stderr, where the progress bar is too: stdout is for results. Of many processes the first says it."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def run_command(command: Callable[[], None]) -> None:
    """Runs a command line's body; turns a `PrenormError` into one line on stderr and its exit status.

    One of many processes ends with any error at once, and says so if the error is that another one is gone.
    """
    try:
        command()
        sys.stdout.flush()  # here, where it is known what a pipe that is closed means
    except BrokenPipeError:  # as by `| head`, which has read what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python writes at its end
        end("", 128 + 13)  # as a shell gives for SIGPIPE
    except PrenormError as error:
        warnings.simplefilter("ignore")  # of what is left undone: after the line there is nothing to add
        end(f"error: {error}", error.status, error.shared)
    except KeyboardInterrupt:
        end("error: interrupted before there was anything to save", 128 + 2)  # as a shell gives for SIGINT
    except Exception as error:
        if lost_process(error):
            end_for_lost_process(error)
        if is_out_of_memory(error):
            less = "take less at once (a smaller batch, fewer or shorter prompts), a smaller model or more devices"
            end(f"error: memory is exhausted ({first_line(error)}): {less}", PrenormError.status)
        if isinstance(error, OSError):  # no room, no rights: it names the file
            end(f"error: {first_line(error)}: mend that and give the same command again", PrenormError.status)
        if count_processes() > 1:
            end(traceback.format_exc(), 1)
        raise


def end(line: str, status: int, shared: bool = False) -> None:
    """Prints the line of an error, once, and ends this process.

    If all processes end with this error (`shared`), the first says so and they leave in order. Else this one ends at
    once: all that would be closed on the way waits for the others, which wait for this one.
    """
    with _ending:  # for good: whoever comes second has nothing to add
        if line and (is_first() or not shared):
            print(line, file=sys.stderr, flush=True)
        if count_processes() > 1 and not shared:
            sys.stdout.flush()
            os._exit(status)
    sys.exit(status)


_ending = threading.RLock()


def end_for_lost_process(error: object) -> None:
    """Ends this process, because another one is gone."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    end(
        f"error: another process of this run ended or cannot be reached ({reason}): the same command, for any number "
        "of processes, goes on from the last complete checkpoint",
        Interrupted.status_unsaved,
    )
