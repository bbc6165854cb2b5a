"""Doing what a plan says: resume, retry, failures, Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from snnbench import registry
from snnbench.errors import DataError, ResultsError, SuiteError
from snnbench.executors.local import Handle, LocalExecutor
from snnbench.planner import Plan, Planned, built_in_modules
from snnbench.spec import SCHEMA, RunSpec, canonical
from snnbench.store import ENDED, FAILURES, RunFolder, SuiteFolder

# A process that ends by one of these was ended by somebody else; by another, by its own fault.
FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "killed with its server")


class Listener(Protocol):
    """Who is told how a suite goes on."""

    def begin(self, plan: Plan) -> None:
        """The suite starts."""

    def started(self, planned: Planned, number: int, of: int) -> None:
        """One run starts."""

    def message(self, message: dict[str, Any]) -> None:
        """The run in progress says something."""

    def ended(self, planned: Planned, row: Mapping[str, Any]) -> None:
        """The run has an outcome."""

    def warn(self, text: str) -> None:
        """Something is odd."""


@dataclass
class Outcome:
    """How a `run` ended."""

    counts: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False
    stopped_early: bool = False

    @property
    def failed(self) -> int:
        """Runs of this call that failed."""
        return sum(self.counts.get(s, 0) for s in FAILURES)


def run(
    plan: Plan, context: Mapping[str, Any], listener: Listener, fail_fast: bool = False
) -> Outcome:
    """Do what is to be done; every outcome is stored and tabulated as soon as it is known."""
    from snnbench.tables import Writer  # pandas: half a second that `plan` need not wait

    outcome = Outcome()
    with plan.folder.claim():
        plan.folder.write_plan(
            {
                "schema": SCHEMA,
                "suite": plan.suite.to_json(),
                "runs": [r.spec.run_id for r in plan.runs],
            }
        )
        writer = Writer(plan.suite.name, plan.folder)
        listener.begin(plan)
        todo = plan.todo
        executor = LocalExecutor(_preload(p.spec for p in todo))
        with _Interrupts() as interrupts:
            if todo:
                _check_data(todo, executor, context)
            for number, planned in enumerate(todo, 1):
                folder = plan.folder.run(planned.spec.run_id)
                _make_ready(planned, plan.folder, folder, listener)
                listener.started(planned, number, len(todo))
                _do(planned.spec, folder, executor, context, listener, interrupts)
                row = writer.read(folder)
                writer.write()
                outcome.counts[row["status"]] = outcome.counts.get(row["status"], 0) + 1
                listener.ended(planned, row)
                if interrupts.count:
                    outcome.interrupted = True
                    break
                if fail_fast and row["status"] in FAILURES and number < len(todo):
                    outcome.stopped_early = True
                    break
        writer.write()
    return outcome


def _check_data(
    todo: Sequence[Planned], executor: LocalExecutor, context: Mapping[str, Any]
) -> None:
    """Read each dataset once before any run does; raises DataError, and nothing is recorded."""
    wanted = {canonical([p.spec.dataset, p.spec.data]): p.spec for p in todo}
    sets = [[spec.dataset, spec.data] for spec in wanted.values()]
    answer = executor.call("check_data", {"datasets": sets, "context": dict(context)})
    if answer["errors"]:
        raise DataError("\n".join(answer["errors"]))


def _make_ready(
    planned: Planned, suite: SuiteFolder, folder: RunFolder, listener: Listener
) -> None:
    """An empty or resumable folder; whatever is replaced is kept."""
    if planned.status in ENDED:
        suite.set_aside(folder)
    try:
        folder.result()
    except ResultsError as error:
        aside = folder.set_aside_damaged_result()
        listener.warn(f"{error}; kept as {aside.name}, the run is done again")
    for warning in folder.events()[1]:
        listener.warn(warning)
    folder.create(planned.spec)
    try:
        folder.spec()
    except ResultsError as error:
        listener.warn(f"{error}; the folder is kept under redone/, the run is done afresh")
        suite.set_aside(folder)
        folder.create(planned.spec)


def _do(
    spec: RunSpec,
    folder: RunFolder,
    executor: LocalExecutor,
    context: Mapping[str, Any],
    listener: Listener,
    interrupts: _Interrupts,
) -> None:
    """One run in a process of its own, until it has an outcome or is interrupted."""
    began = time.monotonic()
    limit = spec.train.timeout_s
    handle = executor.submit(folder, dict(context))
    storage = crash = None
    stopped = False
    timed_out = False
    asked = 0
    started: float | None = None  # the warming up of the server is nobody's time
    while True:
        for message in handle.messages(0.1):
            started = started or time.monotonic()
            storage = message["reason"] if message["event"] == "storage" else storage
            crash = message["reason"] if message["event"] == "crash" else crash
            stopped = stopped or message["event"] == "stopped"
            listener.message(message)
        if not handle.alive:
            break
        if limit and started and time.monotonic() - started > limit:
            timed_out = True
            handle.kill()
        if interrupts.count > asked:
            asked = interrupts.count
            handle.stop() if asked == 1 else handle.kill()
    handle.close()
    if storage:
        raise ResultsError(storage)
    wall_s = time.monotonic() - (started or began)
    folder.append({"event": "exit", "wall_s": wall_s})
    if folder.result() is None:
        _record_death(spec, folder, handle, crash, limit if timed_out else None, stopped)


def _record_death(
    spec: RunSpec,
    folder: RunFolder,
    handle: Handle,
    crash: str | None,
    limit: float | None,
    stopped: bool,
) -> None:
    """The outcome of a worker that left no result; one that was asked to stop said so itself."""
    death = handle.death()
    status = reason = None
    if limit is not None:
        status, reason = "timeout", f"longer than train.timeout_s = {limit:g} s"
    elif crash is not None:
        status, reason = "failed", crash
    elif not stopped and not any(name in death for name in FROM_OUTSIDE):
        status, reason = "failed", death
    if status is not None:
        folder.finish(
            {
                "schema": SCHEMA,
                "run_id": spec.run_id,
                "spec": spec.to_json(),
                "source_hash": registry.source_hash(),
                "status": status,
                "reason": reason,
            }
        )
    elif not stopped:
        folder.append({"event": "interrupted", "reason": death, "time": time.time()})


class _Interrupts:
    """Counts Ctrl-C and SIGTERM: the first asks for a clean end, the second for one at once."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> _Interrupts:
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, *_: int | FrameType | None) -> None:
        self.count += 1


def _preload(specs: Iterator[RunSpec]) -> list[str]:
    names = {
        (kind, name)
        for s in specs
        for kind, name in (("datasets", s.dataset), ("models", s.model), ("methods", s.method))
    }
    return built_in_modules(registry.find(kind, name) for kind, name in sorted(names))


def check_method(name: str) -> list[dict[str, Any]]:
    """Clauses of the method contract, each with name, ok and detail; raises on a broken method."""
    component = registry.find("methods", name)
    answer = LocalExecutor(built_in_modules([component])).call("contract", {"name": name})
    if answer["errors"]:
        raise SuiteError("\n".join(answer["errors"]))
    return list(answer["checks"])


def find_run(results: Path, run_id: str) -> tuple[SuiteFolder, RunFolder]:
    """The run of that id, or of the only id that begins so; raises ResultsError."""
    folders = [SuiteFolder(p) for p in sorted(results.iterdir())] if results.is_dir() else []
    found = [(f, r) for f in folders for r in f.runs() if r.run_id.startswith(run_id)]
    exact = [(f, r) for f, r in found if r.run_id == run_id]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if not found:
        raise ResultsError(f"{results}: no run '{run_id}'; `snnbench plan SUITE` prints the ids")
    names = ", ".join(r.run_id for _, r in found[:5])
    raise ResultsError(
        f"'{run_id}' fits {len(found)} runs: {names}{' ...' if len(found) > 5 else ''}"
    )


def run_details(folder: RunFolder) -> dict[str, Any]:
    """Everything known of one run, as data."""
    return {
        "run_id": folder.run_id,
        "folder": str(folder.path),
        "status": folder.status(),
        "spec": asdict(folder.spec()),
        "result": folder.result(),
        "epochs": folder.epochs(),
    }
