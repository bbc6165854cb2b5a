"""What a suite of many runs costs beyond training: `python -m snnbench.runs.scale 100 1000 10000`.

The runs go through everything but training itself, in processes of their own; printed are seconds
to expand, plan, show the state and report, and milliseconds a run to do them one after another.
`fork_ms` of these is what the system takes for a process alone: forked from a server that has torch
loaded, answering, and gone.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from snnbench import planner, runner
from snnbench.executors.local import LocalExecutor
from snnbench.planner import Plan, Planned
from snnbench.runs import overview
from snnbench.suite import expand, load

WORKER = "snnbench.runs.scale_worker"
SUITE = """
schema = 1
name = "scale"
claim = "What many runs cost."
[axes]
dataset = ["digits"]
model = ["mlp"]
T = [1, 2, 3, 4, 5]
seed = {seeds}
[train]
epochs = 1
[[method]]
name = "bptt"
[[method]]
name = "tet"
"""
RUNS_A_SEED = 10
FORKS = 50
T = TypeVar("T")


@dataclass
class Cost:
    """Seconds, milliseconds a run, and MiB of the command's own memory."""

    runs: int
    expand_s: float
    plan_s: float
    run_ms: float
    run_ms_last: float
    fork_ms: float
    plan_done_s: float
    status_s: float
    report_s: float
    memory_mib: float
    growth_mib: float


class Silent:
    """Notes when each run ended, and how much memory the command then used."""

    def __init__(self) -> None:
        self.times = array("d")  # small, so that they are no part of what they measure
        self.memory = array("d")

    def begin(self, plan: Plan) -> None:
        """The suite starts."""

    def started(self, planned: Planned, number: int, of: int) -> None:
        """One run starts."""

    def message(self, planned: Planned, message: dict[str, Any]) -> None:
        """A run in progress says something."""

    def ended(self, planned: Planned, row: Mapping[str, Any]) -> None:
        """The run has an outcome."""
        if row["status"] != "done":
            raise RuntimeError(f"{planned.run_id}: {row['status']}: {row['reason']}")
        self.times.append(time.perf_counter())
        self.memory.append(_memory_mib())

    def warn(self, text: str) -> None:
        """Something is odd."""
        raise RuntimeError(text)


def measure(runs: int, folder: Path) -> Cost:
    """Do a suite of so many runs below the folder, and see what each step costs."""
    seeds = list(range(max(1, runs // RUNS_A_SEED)))
    file = folder / "scale.toml"
    file.write_text(SUITE.format(seeds=seeds))
    results = folder / "results"
    planner.specs_of(str(file))  # the options of the components are known from now on
    suite = load(str(file))
    options = planner.options_of(suite, str(file))
    expand_s, specs = _timed(lambda: expand(suite, options))
    plan_s, plan = _timed(lambda: planner.make_plan(suite, specs, results))

    listener = Silent()
    local = LocalExecutor([], WORKER)
    context = {"data_root": str(folder), "device": "cpu"}
    runner.run(plan, context, listener, local=local)
    forks = [1000 * _timed(lambda: local.call("nothing", {}))[0] for _ in range(FORKS)]
    between = [1000 * (b - a) for a, b in zip(listener.times, listener.times[1:], strict=False)]

    plan_done_s, again = _timed(lambda: planner.make_plan(suite, specs, results))
    if again.todo:
        raise RuntimeError(f"{len(again.todo)} runs were lost")
    status_s, _ = _timed(lambda: overview.look(plan.folder))
    from snnbench.report import content

    report_s, _ = _timed(lambda: content.build(plan.folder))
    last = between[-max(1, len(between) // 10) :]
    tenth = len(listener.memory) // 10
    return Cost(
        len(specs), expand_s, plan_s, statistics.mean(between), statistics.mean(last),
        statistics.median(forks), plan_done_s, status_s, report_s, listener.memory[-1],
        listener.memory[-1] - listener.memory[tenth],
    )  # fmt: skip


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def _memory_mib() -> float:
    """What this process holds now; its largest so far where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(arguments: Sequence[str]) -> None:
    """Print a table with one row for each number of runs."""
    columns = list(Cost.__dataclass_fields__)
    sys.stdout.write(" | ".join(columns) + "\n")
    for text in arguments or ("100", "1000", "10000"):
        with tempfile.TemporaryDirectory() as folder:
            cost = measure(int(text), Path(folder))
        figures = (getattr(cost, name) for name in columns)
        line = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in figures)
        sys.stdout.write(" | ".join(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
