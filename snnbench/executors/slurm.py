"""Runs on a Slurm cluster, as job arrays through submitit.

A job is `snnbench.runs.node.Task` on the folder of one run; what crosses to the node and back lies
in that folder, as data. (submitit itself hands the task over as a pickle below `slurm/`, which only
jobs read.)  A job outlives the command that submitted it: the next one finds its id in the run's
folder, and waits for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from snnbench.errors import UsageError, WorkerError
from snnbench.executors import queue
from snnbench.executors.base import Handle
from snnbench.runs.policy import SlurmOptions
from snnbench.runs.publish import publish_json
from snnbench.store import RunFolder

# Ends that are nobody's failure: a user's, or one after which the node wrote what there is.
OWN = ("CANCELLED", "COMPLETED")
SHARED_FILES_S = 5.0  # how late a network file system may show what a node wrote


def require_submitit() -> None:
    """Raises UsageError where submitit is not installed, before anything is begun."""
    if importlib.util.find_spec("submitit") is None:
        raise UsageError('a cluster needs submitit: pip install "snnbench[slurm]"')


class SlurmHandle:
    """A run in the queue or on a node."""

    def __init__(self, folder: RunFolder, executor: SlurmExecutor, job: str | None) -> None:
        self._folder, self._executor, self.job = folder, executor, job
        self._told = len(folder.events()[0])
        self._size = -1
        self._gone: float | None = None
        self._last = ""
        self._cancelled = False

    def messages(self, wait_s: float = 0.0) -> Iterator[dict[str, Any]]:
        """Events that the run has written since the last time."""
        size = self._folder.events_size()
        if size != self._size:
            self._size = size
            events = self._folder.events()[0]
            yield from events[self._told :]
            self._told = len(events)

    @property
    def alive(self) -> bool:
        """Whether the job is waiting or running, and the run has no result."""
        if self.job is None:
            return True  # to be submitted at the end of the batch
        if self._folder.fingerprint() is not None and self._folder.is_ended():
            return False
        state = self._executor.state(self.job)
        if state is None:  # nobody answers
            return True
        if queue.under_way(state):
            self._gone = None
            self._last = state
            return True
        self._last = state or "gone from the queue"
        self._gone = self._gone or time.monotonic()
        return time.monotonic() - self._gone < SHARED_FILES_S

    @property
    def from_outside(self) -> bool:
        """Whether the cluster, and not the run or its user, ended the job."""
        return not self._cancelled and self._last not in OWN

    def stop(self) -> None:
        """Take it out of the queue."""
        self.kill()

    def kill(self) -> None:
        """Take it out of the queue."""
        if self.job is not None:
            self._cancelled = True
            queue.cancel([self.job])

    def death(self) -> str:
        """How Slurm says that it ended."""
        return f"Slurm job {self.job}: {self._last}"

    def close(self) -> None:
        """Nothing is held."""


class SlurmExecutor:
    """Submits runs as tasks of job arrays."""

    remote = True

    def __init__(self, folder: Path, name: str, options: SlurmOptions, task: Any) -> None:
        self._folder, self._name, self._options, self._task = folder, name, options, task
        self._batch: list[tuple[RunFolder, dict[str, Any], int, SlurmHandle]] | None = None
        self._states: dict[str, str] | None = {}
        self._asked = -1e9
        self._jobs = 0
        self._there: set[str] = set()  # runs that were left to the job of an earlier command

    def room(self, devices: int) -> bool:
        """Always: the queue is long."""
        return True

    def attached(self, folder: RunFolder) -> bool:
        """Whether a job of an earlier command is waiting or running for this run.

        Raises WorkerError if Slurm does not say: a second job is worse than none.
        """
        job = queue.job_of(folder)
        if job is None:
            return False
        deadline = time.monotonic() + queue.PATIENCE_S
        while (state := self.state(job)) is None:
            if time.monotonic() > deadline:
                raise WorkerError(
                    "squeue does not answer: it is not known whether a job of an earlier command "
                    "is still there, and a run must not be submitted twice; try again later"
                )
            time.sleep(0.5)
        there = queue.under_way(state)
        (self._there.add if there else self._there.discard)(folder.run_id)
        return there

    def submit(
        self, folder: RunFolder, context: Mapping[str, Any], devices: int = 1
    ) -> SlurmHandle:
        """Put the run in the queue, unless a job of an earlier command is there for it."""
        self._jobs += 1
        # A job that was there a moment ago, and has ended since, has left a result or a reason:
        # its handle finds that, and a second job would only do the run again.
        if folder.run_id in self._there or self.attached(folder):
            self._there.discard(folder.run_id)
            return SlurmHandle(folder, self, queue.job_of(folder))
        handle = SlurmHandle(folder, self, None)
        order = (folder, dict(context), devices, handle)
        if self._batch is None:
            self._send([order])
        else:
            self._batch.append(order)
        return handle

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Submit all that is begun within as arrays, one for each number of devices."""
        self._batch = []
        try:
            yield
        finally:
            orders, self._batch = self._batch, None
            for devices in sorted({d for _, _, d, _ in orders}):
                alike = [o for o in orders if o[2] == devices]
                for start in range(0, len(alike), self._options.array):
                    self._send(alike[start : start + self._options.array])

    def wait(self, handles: Sequence[Handle], timeout_s: float) -> None:
        """Return after this time."""
        time.sleep(timeout_s)

    def state(self, job: str) -> str | None:
        """State of a job; empty if Slurm knows it no more, None if it does not answer."""
        if time.monotonic() - self._asked > 1.0 + self._jobs / 200:
            self._states = queue.states()
            self._asked = time.monotonic()
        return None if self._states is None else self._states.get(job, "")

    def _send(self, orders: list[tuple[RunFolder, dict[str, Any], int, SlurmHandle]]) -> None:
        import submitit

        try:
            executor = submitit.SlurmExecutor(self._folder, max_num_timeout=self._options.requeues)
            executor.update_parameters(**self._parameters(orders[0][2]))
            with executor.batch():
                jobs = [
                    executor.submit(self._task, str(folder.path.absolute()), context)
                    for folder, context, _, _ in orders
                ]
        except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
            text = " ".join(str(error).split())[:300]
            raise WorkerError(f"Slurm did not take the jobs: {text}") from error
        for (folder, _, _, handle), job in zip(orders, jobs, strict=True):
            publish_json(folder.job, {"job": job.job_id})
            handle.job = job.job_id
        self._asked = -1e9

    def _parameters(self, devices: int) -> dict[str, Any]:
        options = self._options
        gpus = max(options.gpus, devices if options.gpus else 0)
        wanted = {
            "job_name": self._name,
            "time": options.time,
            "partition": options.partition,
            "account": options.account,
            "qos": options.qos,
            "constraint": options.constraint,
            "gpus_per_node": gpus or None,
            "cpus_per_task": options.cpus,
            "mem": options.memory,
            "array_parallelism": options.at_once,
            "signal_delay_s": options.signal_s,
            "stderr_to_stdout": True,
            "additional_parameters": {"requeue": True},
        }
        return {name: value for name, value in wanted.items() if value is not None}
