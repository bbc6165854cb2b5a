"""Further processes that train one run together with this one, on its machine.

Only before CUDA or a pool of threads is in use: they are copies of this process.
"""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from snnbench.errors import SnnbenchError
from snnbench.training.isolated import die_with_parent
from snnbench.training.oom import is_out_of_memory

END_S = 10.0  # for the others to end after us


@contextmanager
def team(size: int, work: Callable[[int, str], None]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Have `work(rank, address)` done in processes 1 to size - 1, while this one is process 0.

    Gives the address where they meet, and a check that raises SnnbenchError if one has failed, or
    RuntimeError if it ran out of memory.
    """
    address = f"tcp://127.0.0.1:{_free_port()}"
    context = multiprocessing.get_context("fork")
    others = []
    for rank in range(1, size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_follow, args=(work, rank, address, sender))
        process.start()
        sender.close()
        others.append((process, receiver))

    def check() -> None:
        for rank, (process, receiver) in enumerate(others, 1):
            if receiver.poll():
                try:
                    why = receiver.recv()
                except EOFError:
                    process.join()
                    why = f"it ended with code {process.exitcode}"
                error = RuntimeError(f"process {rank} of {size}: {why}")
                raise error if is_out_of_memory(error) else SnnbenchError(str(error))

    try:
        yield address, check
        for process, _ in others:
            process.join(END_S)
    finally:
        for process, receiver in others:
            process.kill()
            process.join()
            receiver.close()


def _follow(work: Callable[[int, str], None], rank: int, address: str, sender: Connection) -> None:
    die_with_parent()
    try:
        work(rank, address)
    except Exception as error:
        traceback.print_exc()
        sender.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
