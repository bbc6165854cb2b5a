"""One run until it has an outcome, over as many processes as that takes.

A process that was killed from outside is followed by another, up to `run.retries` times; one that
takes too long, or hangs, is ended; one that runs out of memory may be followed by one that takes
its batches in smaller parts.  A result that was written stays, whatever happens afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from snnbench import registry
from snnbench.errors import WorkerError
from snnbench.executors.base import Executor, Handle
from snnbench.runs.lease import Lease, held
from snnbench.runs.policy import RunPolicy
from snnbench.spec import SCHEMA, RunSpec
from snnbench.store import RunFolder, SuiteFolder


class Attempt:
    """A run in progress. `begin` starts it, `poll` takes in what happened and is True at the end.

    `storage` then says why its folder could not be written, `stopped` that it was ended on
    demand, and `lost` that another process has taken the run over, or seems to have: if it has
    not after all, `outcome` is what `finish` is to write.
    """

    def __init__(
        self,
        spec: RunSpec,
        folder: RunFolder,
        executor: Executor,
        context: Mapping[str, Any],
        policy: RunPolicy,
        listen: Callable[[dict[str, Any]], None],
        lease: Lease | None = None,
    ) -> None:
        self.spec, self.folder, self.lease = spec, folder, lease
        self._executor, self._policy, self._listen = executor, policy, listen
        self._context = dict(context)
        self._killed = 0
        self._asked_to_stop: str | None = None
        self._deadline: float | None = None
        self.storage: str | None = None
        self.stopped = self.lost = False
        self.outcome: tuple[str, str] | None = None

    def begin(self) -> None:
        """Start a process for the run."""
        self._began = time.monotonic()
        self._heard: float | None = None
        self._started: float | None = None  # the warming up of the server is nobody's time
        self._ended_by: str | None = None
        self._crash: str | None = None
        self._said: set[str] = set()
        context = self._context
        if not self._executor.remote:
            place: dict[str, Any] = {
                "oom_split": self._policy.oom_retry.batch_split,
                "checkpoint_s": self._policy.checkpoint_s,
            }
            if self.lease is not None:
                place["lease"] = self.lease.ticket()
            context = {**context, "place": place}
        self.handle: Handle = self._executor.submit(self.folder, context, self.spec.train.devices)

    def stop(self, why: str, grace_s: float | None = None) -> None:
        """Ask it to save itself and end; after the grace it is ended at once."""
        if self._asked_to_stop is None:
            self._asked_to_stop = why
            self.handle.stop()
        if grace_s is not None:
            self._deadline = min(self._deadline or float("inf"), time.monotonic() + grace_s)

    def kill(self) -> None:
        """End it at once."""
        self._asked_to_stop = self._asked_to_stop or "killed"
        self.handle.kill()

    def poll(self) -> bool:
        """Take in what happened since the last time; True once the run is over for us."""
        for message in self.handle.messages():
            self._hear(message)
        if self.handle.alive:
            self._watch()
            return False
        for message in self.handle.messages():
            self._hear(message)
        self.handle.close()
        if self._executor.remote:
            return self._over_remotely()
        fenced = self._ended_by == "fenced" or "fenced" in self._said
        if self.storage is None and not fenced:
            wall_s = time.monotonic() - (self._started or self._began)
            self.folder.append({"event": "exit", "wall_s": wall_s})
        return self._over(fenced)

    def _hear(self, message: dict[str, Any]) -> None:
        self._heard = time.monotonic()
        self._started = self._started or self._heard
        event = message["event"]
        self._said.add(event)
        if event == "storage":
            self.storage = message["reason"]
        elif event == "crash":
            self._crash = message["reason"]
        self._listen(message)

    def _watch(self) -> None:
        """End what takes too long, hangs, was taken over, or does not listen."""
        if self._executor.remote:
            return
        now, limit = time.monotonic(), self.spec.train.timeout_s
        if self._ended_by is None:
            if limit and self._started and now - self._started > limit:
                self._ended_by = "timeout"
            elif self._heard and now - self._heard > self._policy.heartbeat_s:
                self._ended_by = "hung"
            elif self.lease is not None and self.lease.lost:
                self._ended_by = "fenced"
            elif self._deadline is not None and now > self._deadline:
                self._ended_by = "grace"
            if self._ended_by:
                self.handle.kill()

    def _over(self, fenced: bool) -> bool:
        """What the end of a process means; starts another where the run goes on."""
        if self.storage is not None or self.folder.result() is not None:
            return True
        if fenced:
            self.lost = True
            return True
        if self._ended_by == "timeout":
            limit = self.spec.train.timeout_s
            return self._record("timeout", f"longer than train.timeout_s = {limit:g} s")
        if self._ended_by == "hung":
            limit = self._policy.heartbeat_s
            return self._record("failed", f"hung: no step for run.heartbeat_s = {limit:g} s")
        if self._asked_to_stop is not None:
            self.stopped = True
            if "stopped" not in self._said:
                self._interrupted(f"{self._asked_to_stop}; {self.handle.death()}")
            return True
        if self._crash is not None:
            return self._record("failed", self._crash)
        if "oom_retry" in self._said:
            return self._again()
        if "stopped" in self._said or self.handle.from_outside:
            return self._killed_from_outside()
        return self._record("failed", self.handle.death())

    def _over_remotely(self) -> bool:
        """A job that has left the queue: its node wrote down what happened, or was lost."""
        if self.folder.result() is not None:
            return True
        if self._asked_to_stop is not None or not self.handle.from_outside:
            suite = SuiteFolder(self.folder.path.parents[1])
            self.lost = held(suite.leases(self.folder.run_id)) is not None
            self.stopped = not self.lost
            return True
        return self._killed_from_outside()

    def _killed_from_outside(self) -> bool:
        death = "asked to stop" if "stopped" in self._said else self.handle.death()
        self._killed += 1
        if "stopped" not in self._said:
            self._interrupted(death)
        if self._killed <= self._policy.retries:
            self._listen({"event": "again", "reason": death})
            return self._again()
        times = f", {self._killed} times" if self._killed > 1 else ""
        memory = "; was it the system, out of memory?" if "SIGKILL" in death else ""
        return self._record("failed", f"{death}{times} (run.retries){memory}")

    def _again(self) -> bool:
        try:
            self.begin()
        except WorkerError as error:
            return self._record("failed", str(error))
        return False

    def _interrupted(self, reason: str) -> None:
        self.folder.append({"event": "interrupted", "reason": reason, "time": time.time()})

    def _record(self, status: str, reason: str) -> bool:
        """The outcome of a run that left no result, unless somebody else has the run by now."""
        if self.lease is None:  # a node may have it again
            suite = SuiteFolder(self.folder.path.parents[1])
            self.lost = held(suite.leases(self.folder.run_id)) is not None
        else:
            self.lost = not self.lease.holds()
        self.outcome = (status, reason)
        if not self.lost:
            self.finish()
        return True

    def finish(self) -> None:
        """Write the outcome down."""
        assert self.outcome is not None
        status, reason = self.outcome
        self.folder.finish(
            {
                "schema": SCHEMA,
                "run_id": self.spec.run_id,
                "spec": self.spec.to_json(),
                "source_hash": registry.source_hash(),
                "status": status,
                "reason": reason,
            }
        )
