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
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any

from snnbench.errors import WorkerError
from snnbench.executors.base import Handle
from snnbench.store import RunFolder

WORKER = "snnbench.worker"
# What a child would else import by itself: its own first code, what multiprocessing needs to enter
# it, and what torch imports, for two seconds, when the first optimizer is made.
FIRST = ("snnbench.executors.local", "multiprocessing.popen_forkserver", "torch._dynamo")
LAST = "snnbench.training.warm"  # makes the most of all that was imported before it
UNKNOWN_CODE = 255  # what multiprocessing says of a child whose server has died
NOT_FOR_THE_SERVER = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}
# A process that ends by one of these was ended by somebody else; by another, by its own fault.
FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT}


class LocalHandle:
    """A run in progress in a process of this machine."""

    def __init__(
        self, process: Any, pipe: Connection, lifeline: Connection, places: Places, own: list[str]
    ) -> None:
        self._process, self._pipe, self._lifeline = process, pipe, lifeline
        self._places, self._own = places, own
        self._silent = False
        self._server = _server_pid()

    def messages(self, wait_s: float = 0.0) -> Iterator[dict[str, Any]]:
        """Messages of the worker that arrive within this time; none once it has ended."""
        try:
            while not self._silent and self._pipe.poll(wait_s):
                yield json.loads(self._pipe.recv_bytes())
                wait_s = 0
        except (EOFError, OSError):
            self._silent = True
            self._process.join(wait_s)

    @property
    def waitable(self) -> Any:
        """What becomes ready when there is something to see."""
        return self._process.sentinel if self._silent else self._pipe

    @property
    def alive(self) -> bool:
        """Whether the process still works."""
        return bool(self._process.is_alive())

    @property
    def from_outside(self) -> bool:
        """Whether somebody else ended it."""
        code = self._process.exitcode
        return code is not None and (
            -code in FROM_OUTSIDE or (code == UNKNOWN_CODE and not _lives(self._server))
        )

    def death(self) -> str:
        """How the process ended."""
        code = self._process.exitcode
        if code is None:
            return "still alive"
        if code < 0:
            return f"killed by signal {-code} ({signal.Signals(-code).name})"
        if code == UNKNOWN_CODE and not _lives(self._server):
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
        self._places.give_back(self._own)
        self._own = []


class Places:
    """Where runs can be executed: GPUs by their ids, or the CPU by no name; `jobs` at a time.

    A run on several devices takes several GPUs, and is one job.
    """

    def __init__(self, gpus: Sequence[str], jobs: int | None) -> None:
        self.jobs = jobs or max(len(gpus), 1)
        self.gpus = list(gpus)
        self._free = (self.gpus or [""]) * self.shared_by
        self._running = 0

    @property
    def shared_by(self) -> int:
        """The most runs that share one device at a time; more than 1 disturbs their clocks."""
        return -(-self.jobs // max(len(self.gpus), 1))

    def room(self, devices: int) -> bool:
        """Whether so many different devices are free; a run on a CPU needs one place."""
        free = len(self._pick(devices)) == self._needed(devices)
        return free and self._running < self.jobs

    def take(self, devices: int) -> list[str]:
        """Their ids; to be given back."""
        taken = self._pick(devices)
        for place in taken:
            self._free.remove(place)
        self._running += bool(taken)
        return taken

    def give_back(self, taken: Sequence[str]) -> None:
        """They are free again."""
        self._free += taken
        self._running -= bool(taken)

    def _needed(self, devices: int) -> int:
        return min(devices, len(self.gpus)) if self.gpus else 1

    def _pick(self, devices: int) -> list[str]:
        return list(dict.fromkeys(self._free))[: self._needed(devices)]


class LocalExecutor:
    """Starts runs on this machine."""

    remote = False

    def __init__(self, preload: Sequence[str], worker: str = WORKER) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*FIRST, worker, *preload, LAST])
        self._worker = worker
        self.places = Places([], 1)

    def start(self) -> None:
        """Begin to warm the server up, in the background."""
        from multiprocessing import forkserver, resource_tracker

        # Ctrl-C, and what a cluster sends to all processes of a job, are for the parent to handle,
        # also while the server still imports torch; workers die with their server.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_THE_SERVER)
        try:
            resource_tracker.ensure_running()  # it unblocks two of the signals
            signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_THE_SERVER)
            with _main_hidden():
                forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)

    def room(self, devices: int) -> bool:
        """Whether a place is free."""
        return self.places.room(devices)

    def submit(
        self, folder: RunFolder, context: Mapping[str, Any], devices: int = 1
    ) -> LocalHandle:
        """Start the run of this folder."""
        own = self.places.take(devices)
        place = dict(context.get("place", {}))
        if self.places.shared_by > 1:
            place["parallel_jobs"] = self.places.shared_by
            if not self.places.gpus and "OMP_NUM_THREADS" not in os.environ:
                place["threads"] = max(1, len(os.sched_getaffinity(0)) // self.places.jobs)
        context = {**context, "place": place}
        gpus = [place for place in own if place]
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        return self._spawn("main", [str(folder.path), context], environment, own)

    def attached(self, folder: RunFolder) -> bool:
        """Never: a run ends with the command that started it."""
        return False

    def batch(self) -> AbstractContextManager[None]:
        """Nothing: every run is started at once."""
        return nullcontext()

    def wait(self, handles: Sequence[Handle], timeout_s: float) -> None:
        """Return when one of them has something to say, or after this time."""
        ready = [h.waitable for h in handles if isinstance(h, LocalHandle)]
        if ready:
            wait_for(ready, timeout_s)
        else:
            time.sleep(timeout_s)

    def call(
        self,
        task: str,
        request: dict[str, Any],
        limit_s: float | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """The answer of a function of the worker, such as `resolve`, run in a child.

        Raises WorkerError if it dies, or gives no answer within `limit_s`; what `check` raises
        ends it.
        """
        handle = self._spawn(task, [request])
        answer: dict[str, Any] | None = None
        asked: float | None = None
        while answer is None and handle.alive:
            try:
                check()
            except BaseException:
                handle.kill()
                handle.close()
                raise
            for message in handle.messages(0.2):
                asked = asked or time.monotonic()  # the warming up of the server is nobody's time
                answer = answer or (message if message.get("event") != "begin" else None)
            if answer is None and limit_s and asked and time.monotonic() - asked > limit_s:
                handle.kill()
                handle.close()
                raise WorkerError(
                    f"the worker process did not answer '{task}' within {limit_s:g} s "
                    "(run.heartbeat_s); does a plugin hang on import?"
                )
        answer = answer or _answer(handle.messages(0.2)) or {}
        handle.close()
        if "errors" not in answer:
            raise WorkerError(
                f"the worker process ended before it could answer '{task}': "
                f"{answer.get('reason') or handle.death()}"
            )
        return answer

    def _spawn(
        self,
        task: str,
        arguments: list[Any],
        environment: Mapping[str, str] | None = None,
        own: Sequence[str] = (),
    ) -> LocalHandle:
        self.start()
        receive, send = self._context.Pipe(duplex=False)
        watched, lifeline = self._context.Pipe(duplex=False)
        call = json.dumps([self._worker, task, arguments, dict(environment or {})])
        process = self._context.Process(target=_child, args=(call, send, watched), daemon=False)
        with _main_hidden():
            process.start()
        send.close()
        watched.close()
        return LocalHandle(process, receive, lifeline, self.places, list(own))


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


def _server_pid() -> int | None:
    from multiprocessing import forkserver

    return getattr(forkserver._forkserver, "_forkserver_pid", None)


def _lives(server: int | None) -> bool:
    """Whether this fork server is still the one, and no dead one."""
    if server is None or server != _server_pid():
        return False
    with contextlib.suppress(ChildProcessError):
        # Only look: multiprocessing itself wants to collect its server.
        return os.waitid(os.P_PID, server, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    return False


def _end_with_parent(watched: Connection) -> None:
    """End this process when the one that holds the other end of the pipe has gone."""
    with contextlib.suppress(OSError):
        watched.poll(None)
    os.kill(os.getpid(), signal.SIGKILL)


def _child(call: str, pipe: Connection, watched: Connection) -> None:
    """First code of the child. The worker, and with it torch, is imported here and not above."""
    module, task, arguments, environment = json.loads(call)
    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def send(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            pipe.send_bytes(json.dumps(message).encode())

    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()
    send({"event": "begin"})
    try:
        worker = importlib.import_module(module)
        if task == "main":
            worker.main(*arguments, send)
        else:
            send(getattr(worker, task)(*arguments))
    except Exception as error:
        send({"event": "crash", "reason": f"{type(error).__name__}: {error}"})
        raise
