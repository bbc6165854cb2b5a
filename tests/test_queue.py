"""What is made of Slurm's answers, and of none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snnbench.errors import WorkerError
from snnbench.executors import queue
from snnbench.executors.slurm import SlurmExecutor
from snnbench.runs.policy import SlurmOptions
from snnbench.runs.publish import publish_json
from snnbench.store import RunFolder


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
