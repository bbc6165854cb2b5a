"""Times the same network in several libraries, each in a process of its own, in interleaved rounds.

The rounds run A B C, C B A, A B C, ..., so that a machine that becomes slower does so for all; two
contestants are compared within each round.  Only JSON passes between the processes.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from snnbench.errors import UsageError, WorkerError
from snnbench.peers import tables
from snnbench.peers.lineup import ALONE, LINE_UP_ALONE, NETS, ON_GPU, line_up, on_gpu, parse
from snnbench.peers.results import FOREIGN, Result, Row
from snnbench.spec import did_you_mean
from snnbench.store import publish

COMMAND = (sys.executable, "-m", "snnbench.peers.child")
WARM_STEPS = 3
TOGETHER = 8  # contestants at once, on a GPU
REPEATS = 4  # of a slice that others disturbed
PAUSE_S = 0.3  # before the first repeat, then longer

Say = Callable[[str], None]
Busy = Callable[[], float | None]


@dataclass(frozen=True)
class Settings:
    """What is to be timed, and how long; raises UsageError for what does not exist."""

    nets: tuple[str, ...] = tuple(NETS)
    rounds: int = 7
    steps: int = 3  # at least, in one slice
    T: int = 4
    batch: int | None = None  # None: each network's own
    only: tuple[str, ...] = ()  # contestants; empty: those of `line_up`
    device: str = "cpu"
    threads: int | None = None  # None: one for each core
    slice_s: float | None = None  # at least; None: as long as a reading of others' load takes
    timeout_s: float = 900.0  # of one answer; compiling takes a minute

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "T", "batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value}: it must be at least 1")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"--device {self.device}: it can be cpu, cuda or cuda:N")
        for net in self.nets:
            if net not in {*NETS, *ALONE}:
                raise UsageError(f"unknown network '{net}'{did_you_mean(net, [*NETS, *ALONE])}")
        for name in self.only:
            parse(name)

    def contestants(self, net: str) -> tuple[str, ...]:
        """Their names, for one of the networks."""
        usual = LINE_UP_ALONE if net in ALONE else line_up(self.device)
        return tuple(dict.fromkeys(self.only)) or usual


def compare(
    settings: Settings, output: Path | None, say: Say, command: Sequence[str] = COMMAND
) -> list[Result]:
    """Time all networks; tables and a report are written to `output` after each of them.

    A contestant that cannot take part is a row with the reason. Raises ResultsError where the
    output cannot be written. Whatever ends this function ends all processes that it started.
    """
    results: list[Result] = []
    for net in settings.nets:
        results.append(time_network(net, settings, say, command))
        if output is not None:
            csv, report = tables.to_csv(results[-1]), tables.to_markdown(results)
            for name, text in ((f"peers-{net}.csv", csv), ("report.md", report)):
                publish(output / name, partial(Path.write_text, data=text, encoding="utf-8"))
    return results


def time_network(
    net: str,
    settings: Settings,
    say: Say,
    command: Sequence[str] = COMMAND,
    busy: Busy | None = None,
) -> Result:
    """All contestants on one network."""
    setup = (NETS | ALONE)[net] | (ON_GPU.get(net, {}) if on_gpu(settings.device) else {})
    setup |= {"T": settings.T, "device": settings.device}
    setup["B"] = settings.batch or setup["B"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = settings.threads or cores or 1
    rows = [Row(name) for name in settings.contestants(net)]
    result = Result(net, setup["B"], settings.T, settings.rounds, settings.device, threads, rows)
    together = TOGETHER if on_gpu(settings.device) else 1  # in what is not timed
    with (
        ThreadPoolExecutor(together) as pool,  # left last: what it waits for has been ended
        Field(command, threads, settings.timeout_s, busy or busy_seconds) as contest,
    ):
        if together > 1:  # imports are not timed either
            for row in rows:
                contest.start(row)
        for row in rows:
            warm_up(contest, row, setup, result)
            if row.status == "done":  # what follows for all of them can take minutes
                say(f"{net}: {row.name} warm after {row.warmup_s:.1f} s")
        for row in pool.map(partial(compare_spikes, contest), rows):
            say(f"{net}: {row.name} {readiness(row)}")
        fit = [row for row in rows if row.status == "done"]
        for row in fit:
            row.guess_ms = min(contest.ask(row, "steps", n=WARM_STEPS).get("step_ms", [0.0]))
        for i in range(settings.rounds):
            for row in fit if i % 2 == 0 else fit[::-1]:
                contest.slice(row, settings)
            say(f"{net}: round {i + 1} of {settings.rounds}")
        for row in fit:  # one after another: cuDNN takes as much memory as there is
            row.take(contest.ask(row, "measure"))
    return result


def warm_up(contest: Field, row: Row, setup: dict[str, Any], result: Result) -> None:
    """Build a contestant, and let it do its first step."""
    entry, keep_memory = parse(row.name)
    if not contest.has(row):
        contest.start(row)
    request = {"entry": entry, "setup": setup, "keep_memory": keep_memory}
    built = contest.ask(row, "build", **request)
    result.machine = result.machine or built.get("machine", {})
    row.version = built.get("version", "")
    row.take(contest.ask(row, "warm_up"))
    on_cpu = not on_gpu(setup["device"])
    if row.status == "done" and row.who == ["ours", "auto"] and row.plain and on_cpu:
        row.cold_warmup_s = contest.cold_warm_up(request)


def compare_spikes(contest: Field, row: Row) -> Row:
    """Compare a contestant's spikes and gradients with those of our reference."""
    row.parity = contest.ask(row, "parity") or None
    return row


def readiness(row: Row) -> str:
    """How the preparation went, in a few words."""
    if row.status != "done":
        return f"{row.status}: {row.reason}"
    differing = "" if row.parity is None else f", {row.parity['differing']} spikes differ"
    return f"ready{differing}"


class Field:
    """The processes of all contestants; leaving it, in whichever way, ends them."""

    def __init__(self, command: Sequence[str], threads: int, timeout_s: float, busy: Busy) -> None:
        self._command, self._threads = command, threads
        self._timeout_s, self._busy = timeout_s, busy
        self._children: dict[str, Child] = {}
        self._cold: list[Child] = []
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

    def __enter__(self) -> Field:
        return self

    def __exit__(self, *_: object) -> None:
        for child in (*self._children.values(), *self._cold):
            child.kill()
        self._folder.cleanup()

    def start(self, row: Row) -> None:
        """A process for a row."""
        place = Path(self._folder.name) / str(len(self._children))
        place.mkdir()
        self._children[row.name] = Child(self._command, place, self._threads)

    def has(self, row: Row) -> bool:
        """Whether the row's process was started."""
        return row.name in self._children

    def ask(self, row: Row, do: str, **request: Any) -> dict[str, Any]:
        """The answer; empty, with the reason in the row, once something has failed."""
        child = self._children[row.name]
        if row.status != "done":
            return {}
        try:
            return child.ask({"do": do, **request}, self._timeout_s) or {}
        except Absent as error:
            row.status, row.reason = "absent", str(error)
        except WorkerError as error:
            row.status, row.reason = "failed", str(error)
        child.kill()
        return {}

    def cold_warm_up(self, request: dict[str, Any]) -> float | None:
        """Seconds of building and the first step where no kernel is cached; None if it fails."""
        place = Path(self._folder.name) / f"cold-{len(self._cold)}"
        place.mkdir()
        child = Child(self._command, place, self._threads, {"XDG_CACHE_HOME": str(place)})
        self._cold.append(child)
        try:
            child.ask({"do": "build", **request}, self._timeout_s)
            answer = child.ask({"do": "warm_up"}, self._timeout_s) or {}
        except WorkerError:
            return None
        finally:
            child.kill()
        return answer.get("warmup_s")

    def slice(self, row: Row, settings: Settings) -> None:
        """A few steps of one contestant, repeated while other processes need the CPU."""
        slice_s = settings.slice_s
        if slice_s is None:
            slice_s = 0.2 if on_gpu(settings.device) else 0.5
        n = max(settings.steps, math.ceil(1e3 * slice_s / max(row.guess_ms, 1e-3)))
        tried: list[tuple[float, float]] = []
        for attempt in range(REPEATS):
            before, began = self._busy(), time.monotonic()
            answer = self.ask(row, "steps", n=n)
            if not answer:
                return
            after, wall_s = self._busy(), time.monotonic() - began
            foreign = 0.0
            if before is not None and after is not None:
                foreign = (after - before - answer["cpu_s"]) / (wall_s * (os.cpu_count() or 1))
            tried.append((max(0.0, foreign), statistics.median(answer["step_ms"])))
            if foreign <= FOREIGN:
                break
            time.sleep(PAUSE_S * (attempt + 1))
        foreign, step_ms = min(tried)
        row.foreign.append(foreign)
        row.round_ms.append(step_ms)


class Absent(WorkerError):
    """The contestant cannot be had here: no such library, kernel or device."""


class Child:
    """One contestant's process."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        threads: int,
        settings: dict[str, str] | None = None,
    ) -> None:
        self._log, self._rest, self._ended = folder / "log", b"", False
        # Settings of the C library's memory are made by the contestant, or not at all; what is
        # compiled is compiled anew, or the warm-up would depend on earlier runs.
        dropped = ("MALLOC_", "GLIBC_TUNABLES")
        own = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        own |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        own |= {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
        own |= settings or {}
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C is for this process to handle.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=own,
                start_new_session=True,
            )  # fmt: skip

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """The answer. Raises Absent, or WorkerError: an error, dead, or too late."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._line(timeout_s))
        except BrokenPipeError:
            raise WorkerError(self._death()) from None
        if "absent" in answer:
            raise Absent(answer["absent"])
        if "error" in answer:
            raise WorkerError(answer["error"])
        found: dict[str, Any] | None = answer["answer"]
        return found

    def _line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([pipe], [], [], left)[0]:
                raise WorkerError(f"no answer within {timeout_s:.0f} s")
            read = os.read(pipe, 2**16)
            if not read:
                raise WorkerError(self._death())
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _death(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll() or 0
        if code < 0:
            return f"killed by signal {-code} ({signal.Signals(-code).name})"
        lines = self._log.read_text("utf-8", "replace").split("\n")
        last = next((" ".join(ln.split())[:300] for ln in reversed(lines) if ln.strip()), "")
        return f"ended with exit code {code}" + (f": {last}" if last else "")

    def kill(self) -> None:
        """End the process, and those it has started."""
        if self._ended:
            return
        self._ended = True
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not sent is not sent
                    pipe.close()


def busy_seconds() -> float | None:
    """Seconds of CPU time that all processes have used since the start; None if nobody tells."""
    try:
        first = Path("/proc/stat").read_text("utf-8").partition("\n")[0]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, first.split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
