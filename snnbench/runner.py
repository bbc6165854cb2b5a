"""Doing what a plan says: many runs at a time, claims, failures, Ctrl-C.

Each run is claimed by a lease before it is touched, so that several commands, also on several
machines that share the folder, may do one suite together: each does what nobody else is doing, and
waits for the rest.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from snnbench import registry
from snnbench.errors import DataError, ResultsError, SuiteError, UsageError
from snnbench.executors.base import Executor
from snnbench.executors.local import LocalExecutor, Places
from snnbench.planner import Plan, Planned, built_in_modules
from snnbench.runs import lease
from snnbench.runs.attempt import Attempt
from snnbench.runs.collect import Tables
from snnbench.runs.stopping import GRACE_S, Alike, AskedToStop, Cancel, Interrupts
from snnbench.spec import SCHEMA, RunSpec, canonical
from snnbench.store import ENDED, FAILURES, RunFolder, SuiteFolder

LOOK_S = 0.1  # between looks at what gives no sign of its own
OTHERS_S = 1.0  # between looks at runs that others do, and at `cancel`


class Listener(Protocol):
    """Who is told how a suite goes on."""

    def begin(self, plan: Plan) -> None:
        """The suite starts."""

    def started(self, planned: Planned, number: int, of: int) -> None:
        """One run starts."""

    def message(self, planned: Planned, message: dict[str, Any]) -> None:
        """A run in progress says something."""

    def ended(self, planned: Planned, row: Mapping[str, Any]) -> None:
        """The run has an outcome, or was cut short."""

    def warn(self, text: str) -> None:
        """Something is odd."""


@dataclass
class Outcome:
    """How a `run` ended. `why` is why it was stopped early; `queued` runs go on without us."""

    counts: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False
    stopped_early: bool = False
    why: str = ""
    queued: int = 0

    @property
    def failed(self) -> int:
        """Runs of this call that failed."""
        return sum(self.counts.get(s, 0) for s in FAILURES)


def run(
    plan: Plan,
    context: Mapping[str, Any],
    listener: Listener,
    fail_fast: bool = False,
    detach: bool = False,
    local: LocalExecutor | None = None,
) -> Outcome:
    """Do what is to be done; every outcome is stored as soon as it is known, and tabulated soon.

    With `detach`, jobs of a cluster are submitted and not waited for.  Raises DataError if a
    dataset cannot be read, and ResultsError where results cannot be written.
    """
    plan.folder.write_plan(
        {
            "schema": SCHEMA,
            "suite": plan.suite.to_json(),
            "runs": [r.run_id for r in plan.runs],
        }
    )
    listener.begin(plan)
    cancel = Cancel(plan.folder)
    todo = plan.todo
    local = local or LocalExecutor(_preload(p.spec for p in todo))
    if todo:
        local.start()  # it warms up while the tables are read
    tables = Tables(plan.suite.name, plan.folder)
    with Interrupts() as interrupts, lease.Keeper() as keeper:
        executor: Executor = local
        if todo:
            try:
                gpus = _check_data(todo, local, context, interrupts.check)
            except AskedToStop:
                return Outcome(interrupted=True)
            executor = _executor(plan, local, gpus, context, listener)
        work = _Work(plan, executor, dict(context), listener, tables, keeper, cancel)
        work.fail_fast, work.detach = fail_fast, detach
        try:
            work.do(interrupts)
        finally:
            tables.write(wait_s=60.0)
    if work.storage:
        raise ResultsError(work.storage)
    return work.outcome


class _Work:
    """The runs of one command: those to do, those in progress, and those that others do."""

    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        context: dict[str, Any],
        listener: Listener,
        tables: Tables,
        keeper: lease.Keeper,
        cancel: Cancel,
    ) -> None:
        self._plan, self._executor, self._context = plan, executor, context
        self._listener, self._tables, self._keeper = listener, tables, keeper
        self._policy = plan.suite.run
        self._pending = deque(plan.todo)
        self._total, self._begun = len(self._pending), 0
        self._active: list[tuple[Planned, Attempt]] = []
        self._elsewhere: list[Planned] = []
        self._given_up: dict[str, Attempt] = {}  # by us; a node that is gone may seem to have them
        self._cancelled: set[str] = set()
        self._watch = lease.Watch()
        self._cancel = cancel
        # Results that are to be done again; another command may be faster at that.
        self._old = {
            p.run_id: plan.folder.run(p.run_id).fingerprint()
            for p in self._pending
            if p.status in ENDED
        }
        self._alike = Alike(self._policy.stop_after_same_failures)
        self._looked = time.monotonic()
        self.fail_fast = self.detach = False
        self.ending = ""
        self.storage = ""
        self.outcome = Outcome()

    def do(self, interrupts: Interrupts) -> None:
        """Everything, until it is done or has to end."""
        asked = 0
        while True:
            if interrupts.count > asked:
                asked = interrupts.count
                self.outcome.interrupted = True
                if self._executor.remote:  # the jobs go on without us
                    self.outcome.queued = len(self._active)
                    return
                self._end("asked to stop", kill=asked > 1, grace_s=interrupts.grace_s)
            if not self.ending:
                self._begin_runs()
            if not self._active and (self.ending or not (self._pending or self._elsewhere)):
                return
            if self._executor.remote and self.detach:
                self.outcome.queued = len(self._active)
                return
            self._executor.wait([a.handle for _, a in self._active], LOOK_S)
            self._poll()
            if time.monotonic() - self._looked > OTHERS_S:
                self._look_around()
                self._looked = time.monotonic()
            self._tables.write_if_due()

    def _begin_runs(self) -> None:
        """Start as many runs as there is room for."""
        with self._executor.batch():
            while self._pending and self._executor.room(self._pending[0].spec.train.devices):
                planned = self._pending.popleft()
                try:
                    self._begin(planned)
                except ResultsError as error:
                    self._fail(str(error))
                    return

    def _begin(self, planned: Planned) -> None:
        """Claim a run, make its folder ready and start it; or leave it to whoever has it."""
        folder = self._plan.folder.run(planned.run_id)
        claimed = None
        if not self._executor.attached(folder):
            claimed = lease.claim(
                self._plan.folder.leases(planned.run_id), self._watch, self._policy.lease_s
            )
            if claimed is None:
                self._elsewhere.append(planned)
                return
            given_up = self._given_up.pop(planned.run_id, None)
            if given_up is not None:  # nobody has it after all; a result that is there stays
                given_up.finish()
            if given_up is not None or self._done_meanwhile(planned, folder):
                claimed.release()
                self._ended(planned, folder)
                return
            _make_ready(planned, self._plan.folder, folder, self._listener)
            if self._executor.remote:  # its node will claim it
                claimed.release()
                claimed = None
            else:
                self._keeper.keep(claimed)
        self._begun += 1
        self._listener.started(planned, self._begun, self._total)
        attempt = Attempt(
            planned.spec,
            folder,
            self._executor,
            self._context,
            self._policy,
            lambda message: self._listener.message(planned, message),
            claimed,
        )
        attempt.begin()
        self._active.append((planned, attempt))

    def _done_meanwhile(self, planned: Planned, folder: RunFolder) -> bool:
        """Whether somebody else has done the run since it was planned."""
        seen = folder.fingerprint()
        return seen is not None and seen != self._old.get(planned.run_id) and folder.is_ended()

    def _poll(self) -> None:
        """Take in what happened to the runs in progress."""
        for planned, attempt in list(self._active):
            try:
                over = attempt.poll()
            except ResultsError as error:
                attempt.storage = attempt.storage or str(error)
                attempt.kill()
                over = True
            if not over:
                continue
            self._active.remove((planned, attempt))
            if attempt.lease is not None:
                self._keeper.release(attempt.lease)
            if attempt.storage:
                self._fail(attempt.storage)
            elif attempt.lost:
                why = "another machine has taken it over"
                if attempt.outcome is not None:
                    self._given_up[planned.run_id] = attempt
                    why = f"{attempt.outcome[1]}; waiting until nobody has its lease"
                self._listener.warn(f"{planned.run_id}: {why}")
                self._elsewhere.append(planned)
            else:
                self._ended(planned, attempt.folder)

    def _ended(self, planned: Planned, folder: RunFolder) -> None:
        """One run less; perhaps the last."""
        row = self._tables.read(folder)
        status, counts = row["status"], self.outcome.counts
        counts[status] = counts.get(status, 0) + 1
        self._listener.ended(planned, row)
        left = bool(self._pending or self._active)
        if self._alike.too_often(row) and left:
            self.outcome.why = (
                f"the first {self._alike.count} runs all failed the same way: {row['reason']}; "
                "stopped (run.stop_after_same_failures)"
            )
        if self.outcome.why or (self.fail_fast and status in FAILURES and left):
            self.outcome.stopped_early = True
            self._end("the suite was stopped")

    def _end(self, why: str, kill: bool = False, grace_s: float | None = None) -> None:
        """Begin nothing more, and let those in progress save themselves."""
        self.ending = self.ending or why
        for _, attempt in self._active:
            attempt.kill() if kill else attempt.stop(why, grace_s)

    def _fail(self, storage: str) -> None:
        """The folder cannot be written: nothing more can be done here."""
        self.storage = self.storage or storage
        self._end("the results folder cannot be written", grace_s=GRACE_S)

    def _look_around(self) -> None:
        """Has somebody cancelled runs, or left some of his to us?"""
        for run_id in self._cancel.asked():
            if run_id is None:
                self.outcome.interrupted = True
                self._end("cancelled", grace_s=GRACE_S)
            else:
                self._cancelled.add(run_id)
            for planned, attempt in self._active:
                if planned.run_id == run_id:
                    attempt.stop("cancelled", GRACE_S)
        self._pending = deque(p for p in self._pending if p.run_id not in self._cancelled)
        elsewhere = [p for p in self._elsewhere if p.run_id not in self._cancelled]
        self._elsewhere = []
        for planned in elsewhere:
            folder = self._plan.folder.run(planned.run_id)
            if self._done_meanwhile(planned, folder):
                self._ended(planned, folder)
            elif lease.is_free(self._plan.folder.leases(planned.run_id), self._watch):
                self._pending.append(planned)
            else:
                self._elsewhere.append(planned)


def _executor(
    plan: Plan, local: LocalExecutor, gpus: int, context: Mapping[str, Any], listener: Listener
) -> Executor:
    """Where the runs are executed, with as many places as the suite asks for."""
    policy = plan.suite.run
    if policy.executor == "slurm":
        from snnbench.executors.slurm import SlurmExecutor
        from snnbench.runs.node import Task

        task = Task(asdict(policy))
        return SlurmExecutor(plan.folder.jobs, plan.suite.name, plan.suite.slurm, task)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    ids = [i for i in visible if i] or [str(i) for i in range(gpus)]
    device = str(context.get("device", "auto"))
    ids = [] if device == "cpu" or not gpus else ids[:gpus]
    if device.startswith("cuda:"):  # one GPU was named: the worker picks it out itself
        ids = []
    local.places = Places(ids, policy.jobs)
    if local.places.shared_by > 1:
        listener.warn(
            f"{local.places.shared_by} runs at a time on one device disturb each other's clocks: "
            "their times are marked by parallel_jobs in the record and compare with no others"
        )
    return local


def _check_data(
    todo: Sequence[Planned],
    executor: LocalExecutor,
    context: Mapping[str, Any],
    check: Callable[[], None],
) -> int:
    """Read each dataset once before any run does; the number of GPUs here.

    Raises DataError, and nothing is recorded.
    """
    wanted = {canonical([p.spec.dataset, p.spec.data]): p.spec for p in todo}
    sets = [[spec.dataset, spec.data] for spec in wanted.values()]
    request = {"datasets": sets, "context": dict(context)}
    answer = executor.call("check_data", request, check=check)
    if answer["errors"]:
        raise DataError("\n".join(answer["errors"]))
    return int(answer["gpus"])


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


def _preload(specs: Iterable[RunSpec]) -> list[str]:
    names = {
        (kind, name)
        for s in specs
        for kind, name in (("datasets", s.dataset), ("models", s.model), ("methods", s.method))
    }
    return built_in_modules(registry.find(kind, name) for kind, name in sorted(names))


def examine_machine(device: str, data_root: Path, results: Path) -> dict[str, Any]:
    """The machine and what may be wrong with it, as data; raises UsageError without the device."""
    request = {"device": device, "data_root": str(data_root), "results": str(results)}
    answer = LocalExecutor([]).call("doctor", request)
    if errors := answer.pop("errors"):
        raise UsageError("\n".join(errors))
    return answer


def check_method(name: str) -> list[dict[str, Any]]:
    """Clauses of the method contract, each with name, ok and detail; raises on a broken method."""
    component = registry.find("methods", name)
    answer = LocalExecutor(built_in_modules([component])).call("contract", {"name": name})
    if answer["errors"]:
        raise SuiteError("\n".join(answer["errors"]))
    return list(answer["checks"])
