"""Processes that are to train as one find each other, and out who is missing, before JAX waits for them.

JAX's coordination service waits in C++ for as many as its first process was told of, says nothing of who did not come,
and does not know what the others were told. So the first process listens at its address before the service does, and
the others tell it, in a line, their number and of how many they were told.
"""

import contextlib
import os
import socket
import time

from prenorm_jax.base.errors import PrenormError

_TALK_SECONDS = 5  # for a line to arrive over a connection that is made


def meet(address: tuple[str, int], number: int, count: int, seconds: float) -> None:
    """Returns when all of `count` processes, of which this is `number`, have met at the first one's address.

    Raises PrenormError, in all that have come, if some do not come in so many `seconds`, if two have one number, or if
    they were told of other counts; and if the first cannot listen there.
    """
    end = time.monotonic() + seconds
    place = "{}:{}".format(*address)
    if number == 0:
        _wait_for_others(place, address[1], count, seconds, end)
    else:
        _tell_first(place, address, number, count, seconds, end)


def _wait_for_others(place: str, port: int, count: int, seconds: float, end: float) -> None:
    both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    try:
        server = socket.create_server(("", port), **both)
    except OSError as error:
        raise PrenormError(
            f"{place}: cannot listen there ({os.strerror(error.errno)}): name a free port of this host"
        ) from error
    with server, contextlib.ExitStack() as connections:
        met, there, wrong = set(), [], ""
        while len(met) < count - 1 and not wrong:
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                other, _ = server.accept()
                connections.enter_context(other)
                other.settimeout(_TALK_SECONDS)
                words = other.recv(99).split()
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in met)
                wrong = f"of {count} processes these did not come to {place} within {seconds} s: {missing}; start all"
                break
            if len(words) != 3 or words[0] != b"prenorm_jax" or not all(map(bytes.isdigit, words[1:])):
                continue  # whoever else looks at ports
            theirs, told = map(int, words[1:])
            if told != count:
                wrong = f"process {theirs} was told of --processes={told}, process 0 of {count}: tell all the same"
            elif theirs in met:
                wrong = f"two processes were started with --process={theirs}: give each its own"
            met.add(theirs)
            there.append(other)
        for other in there:
            with contextlib.suppress(OSError):
                other.sendall(wrong.encode() or b"all here")
        if wrong:
            raise PrenormError(wrong)


def _tell_first(place: str, address: tuple[str, int], number: int, count: int, seconds: float, end: float) -> None:
    answer = b""
    while not answer:
        left = end - time.monotonic()
        if left <= 0:
            raise PrenormError(f"process 0 does not answer at {place} within {seconds} s: start all in that time")
        with contextlib.suppress(OSError), socket.create_connection(address, left) as first:  # refused, or in the end
            first.sendall(f"prenorm_jax {number} {count}".encode())
            first.settimeout(left)
            answer = first.recv(999)
        time.sleep(0.1)
    if answer != b"all here":
        raise PrenormError(answer.decode(errors="replace"))
