"""Doing something in a process of its own, so that it leaves no trace here.

Only before CUDA or a pool of threads is in use: the child is a copy of this process.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Answer = dict[str, Any]
PATIENCE_S = 0.2  # between two checks
END_S = 5.0  # for a child to end after its answer


def isolated(work: Callable[[], Answer], check: Callable[[], None] = lambda: None) -> Answer:
    """What `work` gives, or {"error": why} where it fails or its process dies.

    `check` is called now and then; what it raises ends the work.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(work, sender))
    child.start()
    sender.close()
    try:
        while not receiver.poll(PATIENCE_S):
            check()
        answer: Answer = receiver.recv()
        child.join(END_S)
    except EOFError:
        child.join()
        answer = {"error": _death(child.exitcode)}
    finally:
        receiver.close()
        child.kill()
        child.join()
    return answer


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent is gone (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _child(work: Callable[[], Answer], sender: Connection) -> None:
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        answer = work()
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        answer = {"error": f"{type(error).__name__}: {text}"}
    sys.stdout.flush()
    sender.send(answer)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with code {code}"
