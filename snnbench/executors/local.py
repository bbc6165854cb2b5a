"""Runs on this machine, each in a process of its own, forked from a server that is warm.

The fork server imports torch once, and never touches a GPU; a run then starts in milliseconds with
fresh allocators and caches.  Only JSON passes between the processes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from snnbench.errors import WorkerError
from snnbench.store import RunFolder

WORKER = "snnbench.worker"
# torch imports this, for two seconds, when the first optimizer is made.
WARM = ("torch._dynamo",)
UNKNOWN_CODE = 255  # what multiprocessing says of a child whose server has died


class Handle:
    """A run in progress."""

    def __init__(self, process: Any, pipe: Connection, lifeline: Connection) -> None:
        self._process, self._pipe, self._lifeline = process, pipe, lifeline

    def messages(self, wait_s: float) -> Iterator[dict[str, Any]]:
        """Messages of the worker that arrive within this time; none once it has ended."""
        try:
            while self._pipe.poll(wait_s):
                yield json.loads(self._pipe.recv_bytes())
                wait_s = 0
        except (EOFError, OSError):
            self._process.join(wait_s)

    @property
    def alive(self) -> bool:
        """Whether the process still works."""
        return bool(self._process.is_alive())

    def death(self) -> str:
        """How the process ended."""
        code = self._process.exitcode
        if code is None:
            return "still alive"
        if code < 0:
            return f"killed by signal {-code} ({signal.Signals(-code).name})"
        if code == UNKNOWN_CODE and not _server_lives():
            return "killed with its server"
        return f"ended with exit code {code} and without a result"

    def stop(self) -> None:
        """Ask it to end between two steps."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.join(5)

    def close(self) -> None:
        """Release what belongs to it."""
        self._pipe.close()
        self._lifeline.close()
        self._process.join(5)


class LocalExecutor:
    """Starts runs on this machine."""

    def __init__(self, preload: Sequence[str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([WORKER, *WARM, *preload])

    def start(self) -> None:
        """Begin to warm the server up, in the background."""
        from multiprocessing import forkserver, resource_tracker

        resource_tracker.ensure_running()  # it would unblock the signal below
        # Ctrl-C is for the parent to handle, also while the server still imports torch.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _main_hidden():
                forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)

    def submit(self, folder: RunFolder, context: dict[str, Any]) -> Handle:
        """Start the run of this folder."""
        return self._spawn("main", [str(folder.path), context])

    def call(self, task: str, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of a function of the worker, such as `resolve`, run in a child."""
        handle = self._spawn(task, [request])
        answer: dict[str, Any] | None = None
        while answer is None and handle.alive:
            answer = _answer(handle.messages(0.2))
        answer = answer or _answer(handle.messages(0.2)) or {}
        handle.close()
        if "errors" not in answer:
            raise WorkerError(
                f"the worker process ended before it could answer '{task}': "
                f"{answer.get('reason') or handle.death()}"
            )
        return answer

    def _spawn(self, task: str, arguments: list[Any]) -> Handle:
        self.start()
        receive, send = self._context.Pipe(duplex=False)
        watched, lifeline = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_child, args=(task, json.dumps(arguments), send, watched), daemon=False
        )
        with _main_hidden():
            process.start()
        send.close()
        watched.close()
        return Handle(process, receive, lifeline)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep multiprocessing from running the caller's script again in every child."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _answer(messages: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    return next((m for m in messages if m.get("event") != "begin"), None)


def _server_lives() -> bool:
    from multiprocessing import forkserver

    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is None:
        return False
    with contextlib.suppress(ChildProcessError):
        # Only look: multiprocessing itself wants to collect its server.
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    return False


def _end_with_parent(watched: Connection) -> None:
    """End this process when the one that holds the other end of the pipe has gone."""
    with contextlib.suppress(OSError):
        watched.poll(None)
    os.kill(os.getpid(), signal.SIGKILL)


def _child(task: str, arguments: str, pipe: Connection, watched: Connection) -> None:
    """First code of the child. The worker, and with it torch, is imported here and not above."""

    def send(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            pipe.send_bytes(json.dumps(message).encode())

    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()
    send({"event": "begin"})
    try:
        worker = importlib.import_module(WORKER)
        if task == "main":
            worker.main(*json.loads(arguments), send)
        else:
            send(getattr(worker, task)(*json.loads(arguments)))
    except Exception as error:
        send({"event": "crash", "reason": f"{type(error).__name__}: {error}"})
        raise
