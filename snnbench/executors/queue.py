"""Slurm's queue, through its own commands; empty on a machine without them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence

from snnbench.errors import WorkerError
from snnbench.store import RunFolder

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED")
JOB_ID = re.compile(r"\d+(_\d+)?")
PATIENCE_S = 60.0


def job_of(folder: RunFolder) -> str | None:
    """Id of the job that was submitted for a run; None if there was none."""
    try:
        job = json.loads(folder.job.read_text("utf-8"))["job"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    # It is handed to commands: a damaged or hostile one is none.
    return job if isinstance(job, str) and JOB_ID.fullmatch(job) else None


def under_way(state: str) -> bool:
    """Whether a job of this state is, or will be, on a node."""
    return state in WAITING or state in RUNNING


def states() -> dict[str, str] | None:
    """State of each of the user's jobs by id, those just ended too; None where nobody answers."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    pairs = (line.split("|") for line in done.stdout.splitlines() if line.count("|") == 1)
    return {job.strip(): state.strip() for job, state in pairs}


def cancel(jobs: Sequence[str]) -> None:
    """Take these jobs out of the queue; those that run are ended."""
    if jobs and shutil.which("scancel"):
        for start in range(0, len(jobs), 500):
            command = ["scancel", *jobs[start : start + 500]]
            try:
                subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise WorkerError(f"Slurm's scancel did not answer: {error}") from error
