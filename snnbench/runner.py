"""What of a suite is missing, and its execution: resume, retry, failures, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from platformdirs import user_cache_dir

from snnbench import registry
from snnbench.errors import DataError, ResultsError, SuiteError, WorkerError
from snnbench.executors.local import Handle, LocalExecutor
from snnbench.spec import SCHEMA, RunSpec, canonical, digest
from snnbench.store import ENDED, FAILURES, RunFolder, Status, SuiteFolder, publish_json
from snnbench.suite import Options, Suite, expand, fail, load, matches, method_variants

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


@dataclass(frozen=True)
class Planned:
    """One run of a plan."""

    spec: RunSpec
    status: Status
    todo: bool
    estimate_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """All runs of a suite, and which are to be done."""

    suite: Suite
    folder: SuiteFolder
    runs: Sequence[Planned]

    @property
    def todo(self) -> list[Planned]:
        """Runs to be done, in order."""
        return [r for r in self.runs if r.todo]

    @property
    def estimate_s(self) -> float | None:
        """Seconds left, if every run to be done could be estimated."""
        estimates = [r.estimate_s for r in self.todo]
        return sum(e for e in estimates if e is not None) if None not in estimates else None

    def to_json(self) -> dict[str, Any]:
        """The plan as data."""
        return {
            "suite": self.suite.name,
            "claim": self.suite.claim,
            "results": str(self.folder.path),
            "runs": [
                {
                    "run_id": r.spec.run_id,
                    "status": r.status,
                    "todo": r.todo,
                    "estimate_s": r.estimate_s,
                    **{k: getattr(r.spec, k) for k in ("dataset", "model", "method", "T", "seed")},
                    "method_config": r.spec.method_config,
                    "kernel": r.spec.kernel,
                    "precision": r.spec.precision,
                }
                for r in self.runs
            ],
            "todo": len(self.todo),
            "estimate_s": self.estimate_s,
        }


@dataclass(frozen=True)
class Choice:
    """Which runs of a suite to do."""

    only: Mapping[str, list[Any]] = field(default_factory=dict)
    redo: bool = False
    retry_failed: bool = False


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


def specs_of(name: str, settings: Sequence[str] = ()) -> tuple[Suite, list[RunSpec]]:
    """The suite and its runs; raises SuiteError with one line per mistake."""
    suite = load(name, settings)
    return suite, expand(suite, _options(suite, name))


def make_plan(
    suite: Suite, specs: Sequence[RunSpec], results: Path, choice: Choice | None = None
) -> Plan:
    """Which runs are to be done, and how long that may take on this machine."""
    choice = choice or Choice()
    folder = SuiteFolder(results / suite.name)
    past = _past_times(folder)
    runs = []
    for spec in specs:
        if not matches(spec, choice.only):
            continue
        status = folder.run(spec.run_id).status()
        redo = choice.redo or (choice.retry_failed and status in FAILURES)
        todo = redo or status not in ENDED
        runs.append(Planned(spec, status, todo, _estimate(spec, past) if todo else None))
    return Plan(suite, folder, runs)


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


def _options(suite: Suite, name: str) -> Options:
    """Options of all components, validated by them in a worker, or remembered from last time."""
    request: dict[str, Any] = {
        "datasets": list(dict.fromkeys(suite.axes.dataset)),
        "models": list(dict.fromkeys(suite.axes.model)),
        "data": suite.data,
        "model": suite.model,
        "neuron": suite.neuron,
        "methods": list(method_variants(suite)),
    }
    used = [
        *(registry.find("datasets", n) for n in request["datasets"]),
        *(registry.find("models", n) for n in request["models"]),
        *(registry.find("methods", m["name"]) for _, m in request["methods"]),
    ]
    # Only our own code is known by its hash.
    own = all(c.distribution == "snnbench" for c in used)
    key = digest(canonical(json.loads(json.dumps(request, default=str))), registry.source_hash())
    memory = Path(user_cache_dir("snnbench")) / "options" / f"{key[:32]}.json"
    answer: dict[str, Any] | None = None
    if own:
        with contextlib.suppress(OSError, ValueError):
            answer = json.loads(memory.read_text("utf-8"))
    parts = ("data", "model", "neuron", "methods")
    if not isinstance(answer, dict) or any(part not in answer for part in parts):
        executor = LocalExecutor(_built_in_modules(used))
        answer = executor.call("resolve", json.loads(json.dumps(request, default=str)))
        if answer["broken"]:
            raise WorkerError("\n".join(answer["broken"]))
        fail(name, answer["errors"])
        if own:
            with contextlib.suppress(ResultsError):
                publish_json(memory, answer)
    return Options(answer["data"], answer["model"], answer["neuron"], answer["methods"])


def _preload(specs: Iterator[RunSpec]) -> list[str]:
    names = {
        (kind, name)
        for s in specs
        for kind, name in (("datasets", s.dataset), ("models", s.model), ("methods", s.method))
    }
    return _built_in_modules(registry.find(kind, name) for kind, name in sorted(names))


def _built_in_modules(components: Any) -> list[str]:
    """Modules to warm up: our own only, since a guest's may fail or hang on import."""
    return sorted({c.module for c in components if c.distribution == "snnbench"})


def _past_times(folder: SuiteFolder) -> list[tuple[RunSpec, float]]:
    """Wall-clock seconds of the runs done here."""
    past = []
    for run in folder.runs():
        times = [e["wall_s"] for e in run.events()[0] if e.get("event") == "exit"]
        if times and run.status() == "done":
            with contextlib.suppress(ResultsError):
                past.append((run.spec(), sum(times)))
    return past


def _estimate(spec: RunSpec, past: Sequence[tuple[RunSpec, float]]) -> float | None:
    """Median time of runs that differ in the seed only; else of the nearest, scaled by T."""

    def same(other: RunSpec, *keys: str) -> bool:
        return all(getattr(other, k) == getattr(spec, k) for k in keys)

    work = ("dataset", "data", "model", "model_options", "train", "kernel", "precision")
    twins = [t for s, t in past if same(s, *work, "method", "T")]
    if not twins:
        twins = [t * spec.T / s.T for s, t in past if same(s, *work, "method")]
    if not twins:
        twins = [t * spec.T / s.T for s, t in past if same(s, *work)]
    return statistics.median(twins) if twins else None


def check_method(name: str) -> list[dict[str, Any]]:
    """Clauses of the method contract, each with name, ok and detail; raises on a broken method."""
    component = registry.find("methods", name)
    answer = LocalExecutor(_built_in_modules([component])).call("contract", {"name": name})
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
