"""What a suite expands to, how far each run has come, and how long the rest may take."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from snnbench import registry
from snnbench.errors import ResultsError, WorkerError
from snnbench.executors.local import LocalExecutor
from snnbench.runs.progress import Ledger, work_of
from snnbench.runs.publish import publish_json
from snnbench.spec import RunSpec, canonical, digest
from snnbench.store import ENDED, FAILURES, Status, SuiteFolder
from snnbench.suite import Options, Suite, expand, fail, load, matches, method_variants


@dataclass(frozen=True)
class Planned:
    """One run of a plan; a `stale` result was computed by other code than this."""

    spec: RunSpec
    run_id: str
    status: Status
    todo: bool
    estimate_s: float | None = None
    stale: bool = False


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
    def stale(self) -> int:
        """Number of results that other code computed, and that are to be kept."""
        return sum(r.stale and not r.todo for r in self.runs)

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
                    "run_id": r.run_id,
                    "status": r.status,
                    "stale": r.stale,
                    "todo": r.todo,
                    "estimate_s": r.estimate_s,
                    **{k: getattr(r.spec, k) for k in ("dataset", "model", "method", "T", "seed")},
                    "method_config": r.spec.method_config,
                    "kernel": r.spec.kernel,
                    "precision": r.spec.precision,
                    "memory": r.spec.memory,
                }
                for r in self.runs
            ],
            "todo": len(self.todo),
            "stale": self.stale,
            "estimate_s": self.estimate_s,
        }


@dataclass(frozen=True)
class Choice:
    """Which runs of a suite to do."""

    only: Mapping[str, list[Any]] = field(default_factory=dict)
    redo: bool = False
    retry_failed: bool = False
    redo_stale: bool = False


def specs_of(name: str, settings: Sequence[str] = ()) -> tuple[Suite, list[RunSpec]]:
    """The suite and its runs; raises SuiteError with one line per mistake."""
    suite = load(name, settings)
    return suite, expand(suite, options_of(suite, name))


def make_plan(
    suite: Suite, specs: Sequence[RunSpec], results: Path, choice: Choice | None = None
) -> Plan:
    """Which runs are to be done, and how long that may take on this machine."""
    choice = choice or Choice()
    folder = SuiteFolder(results / suite.name)
    ledger = Ledger(folder)
    past = Past(ledger)
    runs = []
    for spec in specs:
        if not matches(spec, choice.only):
            continue
        run_id = spec.run_id
        known = ledger.look(run_id)
        redo = (
            choice.redo
            or (choice.retry_failed and known.status in FAILURES)
            or (choice.redo_stale and known.stale)
        )
        todo = redo or known.status not in ENDED
        estimate_s = past.estimate(spec) if todo else None
        runs.append(Planned(spec, run_id, known.status, todo, estimate_s, known.stale))
    ledger.save()
    return Plan(suite, folder, runs)


def options_of(suite: Suite, name: str) -> Options:
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
        executor = LocalExecutor(built_in_modules(used))
        asked = json.loads(json.dumps(request, default=str))
        answer = executor.call("resolve", asked, suite.run.heartbeat_s)
        if answer["broken"]:
            raise WorkerError("\n".join(answer["broken"]))
        fail(name, answer["errors"])
        if own:
            with contextlib.suppress(ResultsError):
                publish_json(memory, answer)
    return Options(answer["data"], answer["model"], answer["neuron"], answer["methods"])


def built_in_modules(components: Iterable[registry.Component]) -> list[str]:
    """Modules to warm up: our own only, since a guest's may fail or hang on import."""
    return sorted({c.module for c in components if c.distribution == "snnbench"})


class Past:
    """Wall-clock seconds of the runs done here."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._median: dict[tuple[object, ...], float] = {}

    @cached_property
    def _times(self) -> dict[tuple[object, ...], list[float]]:
        """By what is alike; looked for where anything is to be estimated."""
        times: dict[tuple[object, ...], list[float]] = defaultdict(list)
        for known in self._ledger.past():
            if known.wall_s and known.T:
                times[known.work, known.method, known.T].append(known.wall_s)
                per_step = known.wall_s / known.T
                times[known.work, known.method].append(per_step)
                times[known.work,].append(per_step)
        return times

    def estimate(self, spec: RunSpec) -> float | None:
        """Median time of runs that differ in the seed only; else of the nearest, scaled by T."""
        if not self._times:
            return None
        work = work_of(spec)
        keys: list[tuple[tuple[object, ...], int]] = [
            ((work, spec.method, spec.T), 1), ((work, spec.method), spec.T), ((work,), spec.T)
        ]  # fmt: skip
        for key, factor in keys:
            if key in self._times:
                if key not in self._median:
                    self._median[key] = statistics.median(self._times[key])
                return factor * self._median[key]
        return None
