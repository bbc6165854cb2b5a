"""What a node of a cluster does with one run: claim it, do it, or save it and queue up again.

When the time of the job is nearly over, or the cluster wants its node back, Slurm sends a signal:
the run then writes a checkpoint, and the job goes back into the queue.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from snnbench import registry
from snnbench.errors import ResultsError, SuiteError
from snnbench.executors.local import LocalExecutor, Places
from snnbench.planner import built_in_modules
from snnbench.runs import lease
from snnbench.runs.attempt import Attempt
from snnbench.runs.policy import RunPolicy
from snnbench.runs.stopping import GRACE_S, Cancel
from snnbench.spec import RunSpec, validate
from snnbench.store import RunFolder, SuiteFolder

LOOK_S = 0.2


class Task:
    """The function of a job. submitit calls it with the folder of a run."""

    def __init__(self, policy: Mapping[str, Any]) -> None:
        self._policy = dict(policy)

    def __call__(self, folder: str, context: dict[str, Any]) -> str:
        """Do the run; what came of it, for the job's own log."""
        run = RunFolder(Path(folder))
        suite = SuiteFolder(run.path.parents[1])
        errors: list[str] = []
        policy = validate(RunPolicy, self._policy, errors)
        if policy is None:
            raise SuiteError("; ".join(errors))
        asked = _Signal()
        cancel = Cancel(suite)
        spec = run.spec()
        claimed = _claim(suite, run, policy, asked)
        if claimed is None:
            return asked.answer() or f"{run.run_id}: done, or in other hands"
        local = LocalExecutor(_modules(spec))
        local.places = Places(_visible_gpus(), 1)
        attempt = Attempt(spec, run, local, context, policy, _tell, claimed)
        with lease.Keeper() as keeper:
            keeper.keep(claimed)
            attempt.begin()
            while not attempt.poll():
                local.wait([attempt.handle], LOOK_S)
                if asked.number is not None or asked.end:
                    attempt.stop("asked to stop by Slurm")
                wanted = cancel.asked()
                if None in wanted or run.run_id in wanted:
                    attempt.stop("cancelled", GRACE_S)
        if attempt.storage:
            raise ResultsError(attempt.storage)
        if not run.is_ended():
            asked.answer()  # does not come back where the job is queued again
        return f"{run.run_id}: {run.status()}"

    def checkpoint(self, folder: str, context: dict[str, Any]) -> Any:
        """The same job again: the run goes on from its own checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, folder, context)


class _Signal:
    """What Slurm wants: it is noted at once, and answered when the run has saved itself.

    SIGUSR2 is the warning that the job's time is nearly over, or that others need the node: it
    goes on to submitit, which queues the job again.  SIGTERM alone is an end without return.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.end = False
        self._frame: FrameType | None = None
        self._submitit = signal.signal(signal.SIGUSR2, self._note)
        signal.signal(signal.SIGTERM, self._note_end)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number, self._frame = number, frame

    def _note_end(self, *_: object) -> None:
        self.end = True

    def answer(self) -> str:
        """Queue up again if the warning came; submitit then ends this process."""
        if self.number is not None and callable(self._submitit):
            self._submitit(self.number, self._frame)
        return ""


def _claim(
    suite: SuiteFolder, run: RunFolder, policy: RunPolicy, asked: _Signal
) -> lease.Lease | None:
    """The run; None if it has ended, or is in other hands that live.

    A node that vanished leaves a lease, which has to be watched until it expires.
    """
    watch, deadline = lease.Watch(), time.monotonic() + 1.5 * policy.lease_s + 5
    while asked.number is None and not asked.end and time.monotonic() < deadline:
        if run.is_ended():
            return None
        claimed = lease.claim(suite.leases(run.run_id), watch, policy.lease_s)
        if claimed is not None:
            if not run.is_ended():
                return claimed
            claimed.release()
            return None
        time.sleep(LOOK_S)
    return None


def _modules(spec: RunSpec) -> list[str]:
    kinds = (("datasets", spec.dataset), ("models", spec.model), ("methods", spec.method))
    return built_in_modules(registry.find(kind, name) for kind, name in kinds)


def _visible_gpus() -> list[str]:
    """The GPUs that Slurm gave to the job."""
    return [i for i in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if i]


def _tell(message: dict[str, Any]) -> None:
    """A line in the job's own log."""
    sys.stdout.write(f"{message}\n")
    sys.stdout.flush()
