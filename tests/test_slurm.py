"""A real Slurm: a suite is submitted, cancelled, queued again, resumed, and equals a local one."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Bench, cells, events, rows, write_suite
from slurm_cluster import cluster, why_not

from snnbench.errors import ExitCode
from snnbench.executors import queue
from snnbench.runs.lease import holder
from snnbench.store import RunFolder

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(why_not() is not None, reason=f"no Slurm here: {why_not()}"),
]
STEADY = "steady\ndelay_s = 0.15"
ACCURACIES = ("run_id", "status", "test_acc", "test_acc_best_val", "test_acc_best_test",
              "spikes_per_sample", "init_hash", "order_hash")  # fmt: skip


def until(condition: Callable[[], Any], what: str, patience_s: float = 120.0) -> Any:
    """Wait for it to be true; what it then was."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {patience_s} s for {what}"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cluster; commands of Slurm find it through the environment."""
    with cluster(tmp_path_factory.mktemp("slurm")) as conf, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(conf))
        yield


@pytest.fixture(scope="module")
def on_slurm(slurm: None, cache: Path) -> Iterator[Bench]:
    """The command line, with the cluster at hand."""
    commands = Bench(cache)
    yield commands
    commands.clean_up()


def jobs(folder: Path) -> dict[str, str]:
    """Slurm's job of each run."""
    found = {
        p.parent.name: queue.job_of(RunFolder(p.parent)) for p in folder.glob("runs/*/job.json")
    }
    return {run_id: job for run_id, job in found.items() if job}


def epochs(folder: Path, name: str = "") -> int:
    return sum(e["event"] == "epoch" for e in events(folder, name))


def test_the_commands_of_the_readme_work_in_their_order(on_slurm: Bench, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    (block,) = re.findall(r"## On a cluster\n\n```sh\n(.*?)```", readme, re.S)
    commands = [shlex.split(line.partition("#")[0]) for line in block.splitlines()]
    assert [words[1] for words in commands] == ["run", "run", "status", "logs", "cancel"]
    for words in commands:
        less = ["--set", "train.epochs=1", "--only", "seed=0,method=bptt"]
        less = less if words[1] == "run" else []
        ended = on_slurm.run(*words[1:], *less, "--results", tmp_path)
        assert ended.returncode == 0, f"{words}\n{ended.stderr}"
    assert [row["status"] for row in rows(tmp_path / "smoke")] == ["done"]


def test_a_suite_on_slurm_equals_a_local_one(on_slurm: Bench, tmp_path: Path) -> None:
    """The shipped suite, shortened; jobs of an array."""
    short = ("--set", "train.epochs=1", "--only", "seed=0,method=bptt,method=shortcut,method=rate")
    there = on_slurm.start(
        "run", "smoke", *short, "--results", tmp_path / "slurm", "--executor", "slurm",
        "--slurm-time", 10, "--slurm-partition", "main", "--slurm-cpus", 1,
    )  # fmt: skip
    here = on_slurm.run("run", "smoke", *short, "--results", tmp_path / "local")
    ended = on_slurm.wait(there)
    assert (here.returncode, ended.returncode) == (0, 0), ended.stderr
    tables = [
        [{name: row[name] for name in ACCURACIES} for row in rows(tmp_path / where / "smoke")]
        for where in ("slurm", "local")
    ]
    assert len(tables[0]) == 3
    assert tables[0] == tables[1]
    arrays = {job.partition("_")[0] for job in jobs(tmp_path / "slurm" / "smoke").values()}
    assert len(arrays) == 1  # one array of three tasks
    script = next((tmp_path / "slurm" / "smoke" / "slurm").glob("*_submission.sh")).read_text()
    for wanted in ("--partition=main", "--time=10", "--cpus-per-task=1", "--requeue",
                   "--signal=USR2@90", "--array=0-2"):  # fmt: skip
        assert f"#SBATCH {wanted}" in script


@pytest.fixture
def under_way(on_slurm: Bench, tmp_path: Path) -> Path:
    """A suite of two long runs, submitted and left alone; its first run has begun."""
    suite = write_suite(tmp_path / "tiny.toml", STEADY, seeds="[0, 1]", epochs=12)
    ended = on_slurm.run("run", suite, "--results", tmp_path, "--executor", "slurm", "--detach",
                         guest=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "2 runs go on in the cluster" in ended.stderr
    until(lambda: epochs(tmp_path / "tiny"), "an epoch")
    return suite


def test_a_warned_run_saves_itself_is_queued_again_and_goes_on(
    on_slurm: Bench, under_way: Path, tmp_path: Path
) -> None:
    """As before the end of the job's time, or when the node is wanted for something else."""
    folder = tmp_path / "tiny"
    (run_id, job), _ = sorted(jobs(folder).items())
    until(lambda: epochs(folder, run_id) >= 2, "two epochs")
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    until(lambda: "interrupted" in {e["event"] for e in events(folder, run_id)}, "the checkpoint")
    until(lambda: (queue.states() or {}).get(job) == "PENDING", "the job to be queued again")
    # Slurm lets a job that was queued again wait for two minutes; in less than a second its node
    # would refuse it, since what it may run is known there by the second.
    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now+3"], check=True)
    state = json.loads(on_slurm.run("status", "tiny", "--results", tmp_path, "--json").stdout)
    assert {r["run_id"] for r in state["runs"]} == set(jobs(folder))
    assert set(state["counts"]) <= {"queued", "running", "interrupted", "done", "missing"}

    # The same command finds the jobs, waits for them, and submits nothing.
    ended = on_slurm.run("run", under_way, "--results", tmp_path, "--executor", "slurm", guest=True)
    assert ended.returncode == 0, ended.stderr
    assert len(list((folder / "slurm").glob("*_submission.sh"))) == 1
    seen = events(folder, run_id)
    resumed = [e for e in seen if e["event"] == "resume"]
    assert len(resumed) == 1
    assert [e["reason"] for e in seen if e["event"] == "interrupted"] == ["asked to stop"]
    assert resumed[0]["epoch"] >= 2
    assert [e["event"] for e in seen].count("start") == 2

    local = tmp_path / "local"
    assert on_slurm.run("run", under_way, "--results", local, guest=True).returncode == 0
    assert cells(folder)["results"] == cells(local / "tiny")["results"]

    text = on_slurm.run("logs", run_id, "--results", tmp_path, guest=True)
    assert f"{job}_0_log.out" in text.stderr
    assert "Bypassing signal SIGTERM" not in text.stdout  # an end, which submitit would ignore
    assert re.search(r"requeue|preempted|timed-out", text.stdout)


def test_cancelled_runs_leave_the_queue_and_can_be_taken_up_again(
    on_slurm: Bench, under_way: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    ended = on_slurm.run("cancel", "tiny", "--results", tmp_path, guest=True)
    assert ended.returncode == 0, ended.stderr
    mine = set(jobs(folder).values())
    until(lambda: not [j for j, s in (queue.states() or {}).items()
                       if j in mine and s in (*queue.WAITING, *queue.RUNNING)],
          "an empty queue")  # fmt: skip
    assert not list(folder.glob("runs/*/result.json"))
    before = epochs(folder)

    again = on_slurm.run("run", under_way, "--results", tmp_path, "--executor", "slurm", guest=True)
    assert again.returncode == 0, again.stderr
    assert {row["status"] for row in rows(folder)} == {"done"}
    assert set(jobs(folder).values()).isdisjoint(mine)
    assert epochs(folder) - before <= 24  # no run began twice
    assert [e for e in events(folder) if e["event"] == "resume"]


def test_a_job_whose_processes_die_is_submitted_again(on_slurm: Bench, tmp_path: Path) -> None:
    """As with its node: the run is nobody's, and is queued anew."""
    suite = write_suite(tmp_path / "tiny.toml", STEADY, epochs=6)
    folder = tmp_path / "tiny"
    process = on_slurm.start(
        "run", suite, "--results", tmp_path, "--executor", "slurm", "--set", "run.lease_s=2",
        guest=True,
    )  # fmt: skip
    until(lambda: epochs(folder) >= 2, "two epochs")
    ((_, job),) = jobs(folder).items()
    (leases,) = (folder / "leases").iterdir()
    os.kill(int((holder(leases) or "").partition(" ")[0]), signal.SIGKILL)
    ended = on_slurm.wait(process)
    assert ended.returncode == 0, ended.stderr
    assert "taken up again" in ended.stderr
    assert {row["status"] for row in rows(folder)} == {"done"}
    assert queue.job_of(RunFolder(next((folder / "runs").iterdir()))) != job


def test_what_slurm_does_not_take_is_one_line(on_slurm: Bench, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "tiny.toml", "bptt")
    ended = on_slurm.run("run", suite, "--results", tmp_path, "--executor", "slurm",
                         "--slurm-partition", "nowhere")  # fmt: skip
    assert ended.returncode == ExitCode.WORKER
    (line,) = [ln for ln in ended.stderr.splitlines() if ln.startswith("error:")]
    assert "Slurm did not take the jobs" in line
    assert "Traceback" not in ended.stderr


def test_options_cannot_add_lines_to_the_script(on_slurm: Bench, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "tiny.toml", "bptt")
    for value in ("main\ntouch /tmp/x", "main; ls", "$(ls)", "", "a b", "'"):
        ended = on_slurm.run("run", suite, "--results", tmp_path, "--executor", "slurm",
                             "--slurm-partition", value)  # fmt: skip
        assert ended.returncode == ExitCode.SUITE, value
        assert "not a word that Slurm could know" in ended.stderr
    assert not (tmp_path / "tiny").exists()


def test_the_environment_of_the_tests_names_the_cluster(slurm: None) -> None:
    assert Path(os.environ["SLURM_CONF"]).is_file()
    assert queue.states() is not None
