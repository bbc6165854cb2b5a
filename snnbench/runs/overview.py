"""A suite from outside, while it runs or afterwards: its runs, state, logs, and how to end it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from snnbench.errors import ResultsError
from snnbench.executors import queue
from snnbench.runs import lease
from snnbench.runs.progress import Ledger, run_state
from snnbench.runs.stopping import ask_to_cancel
from snnbench.spec import did_you_mean
from snnbench.store import RunFolder, SuiteFolder

LOG_BYTES = 1 << 20  # the end of a log
GOING_ON = ("running", "queued")


@dataclass(frozen=True)
class Overview:
    """All runs of a suite's last `run`, with their states as data."""

    suite: str
    folder: SuiteFolder
    states: Sequence[dict[str, Any]]

    @property
    def counts(self) -> dict[str, int]:
        """Runs by status."""
        return dict(Counter(s["status"] for s in self.states))

    @property
    def stale(self) -> int:
        """Results that other code computed."""
        return sum(s["stale"] for s in self.states)

    @property
    def going_on(self) -> bool:
        """Whether anything is running, or will without our doing."""
        return any(s["status"] in GOING_ON for s in self.states)

    def summary(self) -> str:
        """One line."""
        counts = ", ".join(f"{n} {status}" for status, n in self.counts.items())
        stale = f"; {self.stale} stale: computed by other code" if self.stale else ""
        return f"{self.suite}: {len(self.states)} runs: {counts}{stale}"

    def to_json(self) -> dict[str, Any]:
        """The state as data."""
        return {
            "suite": self.suite,
            "results": str(self.folder.path),
            "counts": self.counts,
            "stale": self.stale,
            "runs": list(self.states),
        }


def suite_of(results: Path, name: str | None) -> SuiteFolder:
    """The folder of a suite, by its name or file; without a name that of the last `run`."""
    found = [SuiteFolder(p) for p in results.iterdir()] if results.is_dir() else []
    known = {f.path.name: f for f in found if f.plan() is not None}
    if name is None:
        if not known:
            raise ResultsError(f"{results}: no suite was run yet; begin with `snnbench run smoke`")
        return max(known.values(), key=lambda f: f.planned_at())
    stem = Path(name).stem if name.endswith(".toml") else name
    if stem in known:
        return known[stem]
    if name.endswith(".toml"):
        from snnbench.suite import load

        stem = load(name).name
    if stem not in known:
        raise ResultsError(f"{results}: suite '{stem}' was not run yet{did_you_mean(stem, known)}")
    return known[stem]


def look(folder: SuiteFolder) -> Overview:
    """The state of every run; raises ResultsError where the plan is damaged."""
    run_ids = _run_ids(folder)
    ledger = Ledger(folder)
    states = [run_state(folder, run_id, ledger.look(run_id)) for run_id in run_ids]
    ledger.save()
    if folder.jobs.is_dir():
        _add_jobs(folder, states)
    return Overview(folder.path.name, folder, states)


def cancel(folder: SuiteFolder, wanted: Sequence[str], wait_s: float) -> list[str]:
    """Let these runs, or all, save themselves and end; ids of those that go on nevertheless.

    Jobs that wait in a cluster's queue leave it; those that are running are told, and are ended
    by the cluster where that does not help.
    """
    known = _run_ids(folder)
    chosen = [_one(start, known) for start in wanted] if wanted else known
    ask_to_cancel(folder, chosen if wanted else None)
    jobs = {r: j for r in chosen if (j := queue.job_of(folder.run(r))) is not None}
    states = (queue.states() or {}) if jobs else {}
    waiting = [j for j in jobs.values() if states.get(j) in queue.WAITING]
    queue.cancel(waiting)
    deadline = time.monotonic() + wait_s
    while True:
        # A job that has just come to its node has no lease yet, and may not have seen the request.
        on_nodes = {r for r, j in jobs.items() if states.get(j) in queue.RUNNING}
        left = [r for r in chosen if r in on_nodes or lease.holder(folder.leases(r))]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(1.0 if on_nodes else 0.5)
        states = (queue.states() or {}) if on_nodes else {}
    queue.cancel([jobs[r] for r in left if r in jobs])
    return [r for r in left if r not in jobs]


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


def log_of(suite: SuiteFolder, folder: RunFolder, lines: int) -> dict[Path, str]:
    """The last lines of what the run's process printed, and of its cluster job, by file."""
    files = [folder.log]
    job = queue.job_of(folder)
    if job is not None and suite.jobs.is_dir():
        files += sorted(suite.jobs.glob(f"{job}_*_log.*"))
    found = {}
    for file in files:
        text = end_of(file, LOG_BYTES)
        if text.strip():
            found[file] = "\n".join(_plain(line) for line in text.splitlines()[-lines:])
    return found


def end_of(file: Path, most: int) -> str:
    """The last lines of a text, so many bytes at most; empty where there is none, or a link, which
    could lead anywhere.
    """
    try:
        with os.fdopen(os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as opened:
            left_out = opened.seek(0, os.SEEK_END) > most
            opened.seek(-most if left_out else 0, os.SEEK_END if left_out else os.SEEK_SET)
            text = opened.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return f"...\n{text.partition(chr(10))[2] or text}" if left_out else text


def _plain(line: str) -> str:
    """Without characters that steer a terminal."""
    return "".join(ch if ch.isprintable() or ch == "\t" else "\ufffd" for ch in line)


def _run_ids(folder: SuiteFolder) -> list[str]:
    plan = folder.plan() or {}
    runs = plan.get("runs")
    if not isinstance(runs, list) or not all(isinstance(r, str) for r in runs):
        raise ResultsError(f"{folder.path}: the plan of the last run is damaged; run it again")
    return runs


def _one(start: str, known: Sequence[str]) -> str:
    found = [r for r in known if r.startswith(start)]
    if start in found or len(found) == 1:
        return start if start in found else found[0]
    raise ResultsError(f"'{start}' fits {len(found)} runs; give more of the id")


def _add_jobs(folder: SuiteFolder, states: Sequence[dict[str, Any]]) -> None:
    """Say of runs that have no result which job of the cluster will do them."""
    open_ = [s for s in states if s["status"] in ("missing", "interrupted", "running")]
    jobs = {s["run_id"]: queue.job_of(folder.run(s["run_id"])) for s in open_}
    if not any(jobs.values()):
        return
    seen = queue.states() or {}
    for state in open_:
        job = jobs[state["run_id"]]
        if job is not None and seen.get(job) is not None:
            state["job"] = f"Slurm job {job}: {seen[job]}"
            if seen[job] in queue.WAITING and state["status"] != "running":
                state["status"] = "queued"
