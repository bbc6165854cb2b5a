"""Runs on this machine, each in a process of its own, forked from a server that is warm.

The fork server imports torch once, and never touches a GPU; a run then starts in milliseconds with
fresh allocators and caches.  Only JSON passes between the processes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import signal
import sys
import types
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from snnbench.errors import WorkerError
from snnbench.store import RunFolder

WORKER = "snnbench.worker"
# torch imports this, for two seconds, when the first optimizer is made.
WARM = ("torch._dynamo",)


class Handle:
    """A run in progress."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self._process, self._pipe = process, pipe

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

    def death(self) -> str | None:
        """How the process was killed, if it was."""
        code = self._process.exitcode
        if code is None or code in (0, 1):
            return None
        if code < 0:
            return f"killed by signal {-code} ({signal.Signals(-code).name})"
        return f"ended with exit code {code}" if code != 255 else "killed with its server"

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
        self._process.join(5)


class LocalExecutor:
    """Starts runs on this machine."""

    def __init__(self, preload: Sequence[str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([WORKER, *WARM, *preload])

    def start(self) -> None:
        """Begin to warm the server up, in the background."""
        from multiprocessing import forkserver

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
            answer = next(handle.messages(0.2), None)
        answer = answer or next(handle.messages(0.2), {})
        handle.close()
        if "errors" not in answer:
            raise WorkerError(
                f"the worker process ended before it could answer '{task}': "
                f"{answer.get('reason') or handle.death() or 'no reason given'}"
            )
        return answer

    def _spawn(self, task: str, arguments: list[Any]) -> Handle:
        self.start()
        receive, send = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_child, args=(task, json.dumps(arguments), send), daemon=False
        )
        with _main_hidden():
            process.start()
        send.close()
        return Handle(process, receive)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep multiprocessing from running the caller's script again in every child."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _child(task: str, arguments: str, pipe: Connection) -> None:
    """First code of the child. The worker, and with it torch, is imported here and not above."""

    def send(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            pipe.send_bytes(json.dumps(message).encode())

    try:
        worker = importlib.import_module(WORKER)
        if task == "main":
            worker.main(*json.loads(arguments), send)
        else:
            send(getattr(worker, task)(*json.loads(arguments)))
    except Exception as error:
        send({"event": "crash", "reason": f"{type(error).__name__}: {error}"})
        raise
