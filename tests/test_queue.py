"""What is made of Slurm's answers, and of none."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from snnbench import runner
from snnbench.errors import WorkerError
from snnbench.executors import queue
from snnbench.executors.local import LocalExecutor
from snnbench.executors.slurm import SlurmExecutor
from snnbench.planner import Planned
from snnbench.runs import lease, overview
from snnbench.runs.policy import RunPolicy, SlurmOptions
from snnbench.runs.publish import publish_json
from snnbench.runs.stopping import AskedToStop, Cancel, Interrupts
from snnbench.spec import RunSpec, TrainConfig
from snnbench.store import RunFolder, SuiteFolder

SPEC = RunSpec(
    dataset="digits", data={}, model="mlp", model_options={}, method="bptt", method_config={},
    neuron={}, T=2, seed=0, train=TrainConfig(epochs=1),
)  # fmt: skip


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Whether a run with job 7 counts as queued, while squeue gives these answers in turn."""
    folder = RunFolder(tmp_path / "runs" / "a")
    publish_json(folder.job, {"job": "7"})
    monkeypatch.setattr("time.sleep", lambda _: None)

    def attached(*answers: dict[str, str] | None) -> bool:
        left = list(answers)
        monkeypatch.setattr(queue, "states", lambda: left.pop(0) if len(left) > 1 else left[0])
        executor = SlurmExecutor(tmp_path, "suite", SlurmOptions(), None)
        executor._jobs = -10_000  # ask every time
        return executor.attached(folder)

    return attached


@pytest.mark.parametrize(
    ("state", "queued"),
    [("PENDING", True), ("RUNNING", True), ("REQUEUED", True), ("COMPLETED", False)],
)
def test_a_job_that_waits_or_runs_is_not_submitted_again(asked: Any, state: str, queued: bool):
    assert asked({"7": state}) is queued


def test_a_job_that_slurm_has_forgotten_is_gone(asked: Any):
    assert asked({}) is False


def test_no_answer_is_waited_for(asked: Any):
    """Taken for an absent job, it would submit the run a second time."""
    assert asked(None, None, {"7": "RUNNING"}) is True


def test_no_answer_at_all_is_an_error_and_no_second_job(asked: Any, monkeypatch):
    monkeypatch.setattr(queue, "PATIENCE_S", 0.0)
    with pytest.raises(WorkerError, match="must not be submitted twice"):
        asked(None)


def test_a_job_that_ends_between_two_looks_is_not_submitted_again(tmp_path: Path, monkeypatch):
    """It was there when the run was looked at, and is over when the run is begun."""
    folder = RunFolder(tmp_path / "runs" / "a")
    (folder.path).mkdir(parents=True)
    publish_json(folder.job, {"job": "7"})
    answers = [{"7": "RUNNING"}, {"7": "COMPLETED"}]
    monkeypatch.setattr(queue, "states", lambda: answers.pop(0) if len(answers) > 1 else answers[0])
    executor = SlurmExecutor(tmp_path, "suite", SlurmOptions(), None)
    monkeypatch.setattr(executor, "_send", lambda _: pytest.fail("submitted twice"))
    assert executor.attached(folder)
    executor._asked = -1e9  # a second has passed
    assert executor.submit(folder, {}).job == "7"


def test_cancel_ends_a_job_that_has_not_begun_on_its_node(tmp_path: Path, monkeypatch):
    """It holds no lease yet, and takes a request of before its start for an old one."""
    folder = SuiteFolder(tmp_path / "s")
    folder.write_plan({"runs": ["a", "b"]})
    for name, job in (("a", "7"), ("b", "8")):
        folder.run(name).path.mkdir(parents=True)
        publish_json(folder.run(name).job, {"job": job})
    ended: list[str] = []
    monkeypatch.setattr(queue, "states", lambda: {"7": "RUNNING", "8": "COMPLETED"})
    monkeypatch.setattr(queue, "cancel", lambda jobs: ended.extend(jobs))
    assert overview.cancel(folder, [], wait_s=0.0) == []
    assert ended == ["7"]


class Remote:
    """A cluster on which nothing ever ends; Ctrl-C is pressed while it is watched."""

    remote = True

    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts, self.begun, self.stopped = interrupts, 0, 0
        self.alive, self.from_outside = True, True

    batch = staticmethod(contextlib.nullcontext)

    def room(self, devices: int) -> bool:
        return True

    def attached(self, folder: RunFolder) -> bool:
        return True

    def submit(self, *_: Any) -> Remote:
        self.begun += 1
        return self

    def messages(self, wait_s: float = 0.0) -> list[Any]:
        return []

    def stop(self) -> None:
        self.stopped += 1

    def wait(self, *_: Any) -> None:
        self.interrupts.count += 1


class Vanishing:
    """A cluster whose node claims the run, and vanishes with it."""

    remote, alive, from_outside = True, False, True
    batch = staticmethod(contextlib.nullcontext)

    def __init__(self, folder: SuiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch, self.begun, self.held = folder, monkeypatch, 0, False

    def room(self, devices: int) -> bool:
        return True

    def attached(self, folder: RunFolder) -> bool:
        return False

    def submit(self, run: RunFolder, *_: Any) -> Vanishing:
        self.begun += 1
        with self.monkeypatch.context() as elsewhere:
            elsewhere.setattr(lease, "_place", lambda: "another boot of another machine")
            claimed = lease.claim(self.folder.leases(run.run_id), lease.Watch(), TTL_S)
            assert claimed or self.begun > 1
        return self

    def messages(self, wait_s: float = 0.0) -> list[Any]:
        return []

    def death(self) -> str:
        return "NODE_FAIL"

    def close(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def wait(self, *_: Any) -> None:
        time.sleep(0.05)


TTL_S = 0.5


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_run_whose_nodes_vanish_is_given_up(tmp_path: Path, monkeypatch, cancelled: bool):
    """Its lease was never given back: whether anybody has it is known when that has run out."""
    monkeypatch.setattr(runner, "OTHERS_S", 0.0)
    folder, run = SuiteFolder(tmp_path / "s"), SPEC.run_id
    ended: list[str] = []
    warned: list[str] = []
    listener = SimpleNamespace(
        started=lambda *_: None, message=lambda *_: None, warn=warned.append,
        ended=lambda planned, row: ended.append(row["status"]),
    )  # fmt: skip
    tables = SimpleNamespace(
        write_if_due=lambda: None, read=lambda folder: folder.result() | {"seed": 0}
    )
    suite = SimpleNamespace(run=RunPolicy(retries=2, lease_s=TTL_S))
    plan = SimpleNamespace(folder=folder, suite=suite, todo=[Planned(SPEC, run, "missing", True)])
    cluster = Vanishing(folder, monkeypatch)
    cancel = SimpleNamespace(asked=lambda: [run] if cancelled and cluster.begun == 3 else [])
    work = runner._Work(plan, cluster, {}, listener, tables, None, cancel)
    work.do(Interrupts())
    assert cluster.begun == 3
    why = "NODE_FAIL, 3 times (run.retries)"
    if cancelled:
        assert warned == [f"{run}: another machine has taken it over"]
        assert (ended, folder.run(run).result()) == ([], None)
    else:
        assert warned == [f"{run}: {why}; waiting until nobody has its lease"]
        assert ended == ["failed"]
        assert folder.run(run).result()["reason"] == why


@pytest.mark.parametrize("before", [False, True])
def test_after_ctrl_c_jobs_go_on_and_none_is_submitted(tmp_path: Path, before: bool):
    folder = SuiteFolder(tmp_path / "s")
    specs = [replace(SPEC, seed=seed) for seed in (0, 1)]
    planned = [Planned(s, s.run_id, "missing", True) for s in specs]
    plan = SimpleNamespace(folder=folder, todo=planned, suite=SimpleNamespace(run=RunPolicy()))
    listener, tables = (
        SimpleNamespace(started=lambda *_: None), SimpleNamespace(write_if_due=lambda: None)
    )  # fmt: skip
    interrupts = Interrupts()
    interrupts.count = int(before)
    cluster = Remote(interrupts)
    work = runner._Work(plan, cluster, {}, listener, tables, None, Cancel(folder))
    work.do(interrupts)
    assert (cluster.begun, cluster.stopped) == (0 if before else 2, 0)
    assert (work.outcome.interrupted, work.outcome.queued) == (True, cluster.begun)


def test_ctrl_c_ends_a_question_that_takes_long(monkeypatch):
    """As when a large dataset is read for the first time."""
    ended = []
    child = SimpleNamespace(
        alive=True, messages=lambda _: [], kill=lambda: ended.append("killed"),
        close=lambda: ended.append("closed"),
    )  # fmt: skip
    executor = LocalExecutor([])
    monkeypatch.setattr(executor, "_spawn", lambda *_: child)
    interrupts = Interrupts()
    interrupts.count = 1
    with pytest.raises(AskedToStop):
        executor.call("check_data", {}, check=interrupts.check)
    assert ended == ["killed", "closed"]
