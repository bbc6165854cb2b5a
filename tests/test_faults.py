"""Kills, interruptions, full disks, damaged files and faulty guests, with real processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE_S, Bench, cells, events, rows, write_suite

from snnbench.errors import ExitCode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
Process = subprocess.Popen[str]
Ended = subprocess.CompletedProcess[str]


def until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Wait for it to be true; what it then was."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {patience_s} s for {what}"
        time.sleep(0.01)
    return value


def group(process: Process) -> list[int]:
    """Living processes of the command's group: itself, its fork server, its workers."""
    living = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # gone meanwhile
        if int(fields[2]) == process.pid and fields[0] not in "ZX":
            living.append(int(stat.parent.name))
    return living


def epochs(folder: Path, name: str = "") -> int:
    return sum(event["event"] == "epoch" for event in events(folder, name))


def started(folder: Path, name: str = "") -> list[int]:
    """Workers that began to train."""
    return [event["pid"] for event in events(folder, name) if event["event"] == "start"]


def errors(ended: Ended) -> list[str]:
    """The lines on stderr that are no progress; a traceback is never among them."""
    assert "Traceback" not in ended.stderr
    return [ln for ln in ended.stderr.splitlines() if ln.startswith("error:")]


# --- a suite that nothing disturbs --------------------------------------------------------------


@dataclass
class Undisturbed:
    """Four runs of eight epochs, saved after each; begun at once, finished on demand."""

    suite: Path
    results: Path
    process: Process
    bench: Bench
    ended: list[Ended] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The finished results."""
        if not self.ended:
            self.ended.append(self.bench.wait(self.process))
        assert self.ended[0].returncode == 0, self.ended[0].stderr
        return self.results / "tiny"


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed")
    steady = "steady\ndelay_s = 0.03"
    suite = write_suite(root / "tiny.toml", steady, seeds="[0, 1, 2, 3]", epochs=8)
    process = bench.start("run", suite, "--results", root / "results", guest=True)
    return Undisturbed(suite, root / "results", process, bench)


# --- what happens to its like -------------------------------------------------------------------
# Each scenario drives processes of its own; they take place side by side, and a test looks at one.


@dataclass
class Happened:
    """The last command of a scenario, and the suite's folder."""

    ended: Ended
    folder: Path
    before: Ended | None = None


def kill_at_random(bench: Bench, suite: Path, results: Path) -> Happened:
    """Worker, command, or both are killed at twenty random moments; the command is given again."""
    folder, rng = results / "tiny", random.Random(1)
    command = ("run", suite, "--results", results, "--set", "run.retries=99")
    moments = ["worker"] * 12 + ["late worker"] * 4 + ["late command"] * 2 + ["late both"] * 2
    rng.shuffle(moments)
    process, dead = bench.start(*command, guest=True), set[int]()
    for whom in moments:
        until(lambda p=process, d=dead: p.poll() is not None or set(started(folder)) - d, "a run")
        # At any step of its beginning, or after some epochs.
        time.sleep(rng.uniform(0, 0.7))
        if "late" in whom:
            more = epochs(folder) + rng.randint(1, 4)
            until(lambda m=more, p=process: p.poll() is not None or epochs(folder) >= m, "epochs")
            time.sleep(rng.uniform(0, 0.1))
        if "command" not in whom:
            for pid in set(started(folder)) - dead:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if "worker" not in whom:
            process.kill()
            bench.wait(process)
        if process.poll() is not None:
            process = bench.start(*command, guest=True)
        dead |= set(started(folder))
    ended = bench.wait(process)
    return Happened(bench.run(*command, guest=True) if ended.returncode else ended, folder, ended)


def damage_a_checkpoint(bench: Bench, suite: Path, results: Path) -> Happened:
    """The command is killed, and the end of the newest checkpoint is lost."""
    folder = results / "tiny"
    command = ("run", suite, "--results", results, "--only", "seed=0")
    process = bench.start(*command, guest=True)
    until(lambda: len(list(folder.glob("runs/*/checkpoint*.pt"))) == 2, "two checkpoints")
    process.kill()
    bench.wait(process)
    until(lambda: not group(process), "the end of all processes", 20)
    (newest,) = folder.glob("runs/*/checkpoint.pt")
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    return Happened(bench.run(*command, guest=True), folder)


def two_at_once(bench: Bench, suite: Path, results: Path) -> list[Happened]:
    """The same command twice at the same time, as on two machines with one shared folder."""
    both = [bench.start("run", suite, "--results", results, guest=True) for _ in range(2)]
    return [Happened(bench.wait(process), results / "tiny") for process in both]


def suspend_the_owner(bench: Bench, suite: Path, results: Path) -> list[Happened]:
    """A command and its worker are suspended until another one has done the suite; then they
    wake up.
    """
    folder = results / "tiny"
    command = ("run", suite, "--results", results, "--only", "seed=0")
    command += ("--only", "seed=1", "--set", "run.lease_s=1.5")
    first = bench.start(*command, guest=True)
    until(lambda: epochs(folder) >= 2, "some epochs")
    os.killpg(first.pid, signal.SIGSTOP)
    second = bench.run(*command, guest=True)
    os.killpg(first.pid, signal.SIGCONT)
    return [Happened(second, folder), Happened(bench.wait(first), folder)]


def jump_in_time(bench: Bench, suite: Path, results: Path) -> Happened:
    """The clock jumps by days, to and fro, in all processes, and leases get dates from anywhere."""
    folder = results / "tiny"
    process = bench.start("run", suite, "--results", results, guest=True, jumping_clock=True)
    rng = random.Random(3)
    while process.poll() is None:
        for file in folder.glob("leases/*/*"):
            when = time.time() + rng.choice([-1, 1]) * 86400 * rng.uniform(1, 1000)
            os.utime(file, (when, when))
        time.sleep(0.3)
    return Happened(bench.wait(process), folder)


def fill_the_disk(bench: Bench, suite: Path, results: Path) -> Happened | None:
    """The disk becomes full during the second run, then there is space again."""
    with small_disk(results) as mounted:
        if not mounted:
            return None
        command = ("run", suite, "--results", results)
        process = bench.start(*command, guest=True)
        until(lambda: epochs(results / "tiny", "-s1-") >= 2, "the second run")
        filler = fill(results)
        full = bench.wait(process)
        until(lambda: not group(process), "the end of all processes", 10)
        filler.unlink()
        again = bench.run(*command, guest=True)
        copy = results.with_name("copy")
        shutil.copytree(results, copy)
    return Happened(again, copy / "tiny", full)


def kill_the_parent(bench: Bench, suite: Path, results: Path) -> list[int]:
    """The command is killed during a run that never ends; who is left five seconds later."""
    suite = write_suite(results / "tiny.toml", "hangs")
    process = bench.start("run", suite, "--results", results, guest=True)
    (pid,) = until(lambda: started(results / "tiny"), "the run")
    assert pid in group(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60  # a server that is still importing sees its end late
    while (left := group(process)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


SCENARIOS = (
    kill_at_random, fill_the_disk, damage_a_checkpoint, two_at_once, suspend_the_owner,
    jump_in_time, kill_the_parent,
)  # fmt: skip
KILLS = "test_kills_at_twenty_random_moments_change_nothing"  # by far the longest
Scenarios = dict[Callable[..., Any], Future[Any]]


@pytest.fixture(scope="module")
def scenarios(
    bench: Bench, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Scenarios]:  # fmt: skip
    wanted = {item.name for item in request.session.items}
    plays = [s for s in SCENARIOS if s is not kill_at_random or KILLS in wanted]
    with ThreadPoolExecutor(3) as pool:
        yield {
            play: pool.submit(play, bench, undisturbed.suite, tmp_path_factory.mktemp("scene"))
            for play in plays
        }


# --- kill -9 ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kills_at_twenty_random_moments_change_nothing(scenarios, undisturbed):
    happened = scenarios[kill_at_random].result()
    assert happened.ended.returncode == 0, happened.ended.stderr
    assert errors(happened.before) == []
    assert cells(happened.folder) == cells(undisturbed.folder)
    resumed = [e["epoch"] for e in events(happened.folder) if e["event"] == "resume"]
    assert len(resumed) >= 4  # not merely started afresh
    for file in happened.folder.glob("runs/*/result.json"):
        assert file.parent.name in {row["run_id"] for row in rows(happened.folder)}
    assert len(rows(happened.folder)) == 4  # nothing is counted twice


def test_a_damaged_checkpoint_costs_no_more_than_the_way_from_the_older(scenarios, undisturbed):
    happened = scenarios[damage_a_checkpoint].result()
    assert happened.ended.returncode == 0, happened.ended.stderr
    said = [e["event"] for e in events(happened.folder) if e["event"] in ("restart", "resume")]
    assert said == ["restart", "resume"]
    (result,) = cells(happened.folder)["results"].items()
    assert result[1] == cells(undisturbed.folder)["results"][result[0]]


def test_a_killed_command_leaves_no_process_behind(scenarios):
    assert scenarios[kill_the_parent].result() == []


# --- two at once --------------------------------------------------------------------------------


def test_two_commands_share_the_runs_of_a_suite(scenarios, undisturbed):
    for happened in scenarios[two_at_once].result():
        assert happened.ended.returncode == 0, happened.ended.stderr
        assert errors(happened.ended) == []
        assert cells(happened.folder) == cells(undisturbed.folder)
        assert len(started(happened.folder)) == 4  # nothing was done twice


def test_an_owner_that_was_suspended_publishes_nothing_over_the_next(scenarios, undisturbed):
    second, first = scenarios[suspend_the_owner].result()
    for happened in (second, first):
        assert happened.ended.returncode == 0, happened.ended.stderr
    seen = cells(second.folder)
    assert len(seen["results"]) == len(seen["runs"]) == 2
    whole = cells(undisturbed.folder)["results"]
    assert seen["results"] == {run_id: whole[run_id] for run_id in seen["results"]}
    assert [len(started(second.folder, f"-s{seed}-")) for seed in (0, 1)] == [2, 1]


def test_a_clock_that_jumps_changes_nothing(scenarios, undisturbed):
    happened = scenarios[jump_in_time].result()
    assert happened.ended.returncode == 0, happened.ended.stderr
    assert cells(happened.folder) == cells(undisturbed.folder)
    assert len(started(happened.folder)) == 4
    times = [e["time"] for e in events(happened.folder) if e["event"] == "start"]
    assert max(abs(then - time.time()) for then in times) > 86400  # it did jump


# --- Ctrl-C and SIGTERM -------------------------------------------------------------------------


@dataclass
class UnderWay:
    """A suite whose first run is done and whose second has begun."""

    process: Process
    folder: Path


@pytest.fixture(scope="module")
def under_way(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, UnderWay]:
    """Some of them, begun at the same time."""
    slow, hangs = ["bptt", "steady\ndelay_s = 0.5"], ["bptt", "hangs"]
    suites = {
        "ctrl_c": slow, "sigterm": slow, "sigterm_to_all": slow, "twice": hangs, "grace": hangs,
    }  # fmt: skip
    begun = {}
    for name, methods in suites.items():
        root = tmp_path_factory.mktemp(name)
        suite = write_suite(root / "tiny.toml", methods, epochs=20)
        process = bench.start("run", suite, "--results", root, guest=True)
        begun[name] = UnderWay(process, root / "tiny")
    for one in begun.values():
        until(lambda o=one: len(started(o.folder)) == 2, "the second run")
    return begun


@pytest.mark.parametrize(
    ("name", "send"),
    [
        ("ctrl_c", lambda process: os.killpg(process.pid, signal.SIGINT)),
        ("sigterm", lambda process: process.terminate()),
        ("sigterm_to_all", lambda process: os.killpg(process.pid, signal.SIGTERM)),
    ],
)
def test_an_interrupted_suite_ends_cleanly_and_keeps_what_is_done(bench, under_way, name, send):
    process, folder = under_way[name].process, under_way[name].folder
    until(lambda: epochs(folder, "steady") >= 1, "an epoch")
    (result,) = folder.glob("runs/*/result.json")
    before = result.read_bytes()
    send(process)
    ended = bench.wait(process)
    assert ended.returncode == ExitCode.INTERRUPTED
    assert errors(ended) == []
    assert "what was done stays done" in ended.stderr
    assert result.read_bytes() == before
    status = {row["method"]: (row["status"], row["reason"]) for row in rows(folder)}
    assert status == {"bptt": ("done", ""), "steady": ("interrupted", "asked to stop")}
    until(lambda: not group(process), "the end of all processes", 5)


def test_a_second_ctrl_c_ends_a_run_that_does_not_listen(bench, under_way):
    process, folder = under_way["twice"].process, under_way["twice"].folder
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None  # it waits for the worker, which sleeps
    os.killpg(process.pid, signal.SIGINT)
    ended = bench.wait(process)
    assert ended.returncode == ExitCode.INTERRUPTED
    assert errors(ended) == []
    assert {row["method"]: row["status"] for row in rows(folder)} == {
        "bptt": "done",
        "hangs": "interrupted",
    }
    until(lambda: not group(process), "the end of all processes", 5)


def test_sigterm_ends_a_run_that_does_not_listen_within_ten_seconds(bench, under_way):
    process, folder = under_way["grace"].process, under_way["grace"].folder
    began = time.monotonic()
    process.terminate()
    ended = bench.wait(process)
    assert time.monotonic() - began < 10
    assert ended.returncode == ExitCode.INTERRUPTED
    assert {row["method"]: row["status"] for row in rows(folder)} == {
        "bptt": "done",
        "hangs": "interrupted",
    }


# --- damaged and unusable files -----------------------------------------------------------------


def test_damaged_files_are_named_kept_and_done_again(bench, undisturbed, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(undisturbed.folder, folder)
    runs = sorted((folder / "runs").iterdir())
    whole = (runs[0] / "result.json").read_bytes()
    (runs[0] / "result.json").write_bytes(whole[: len(whole) // 2])
    (runs[1] / "result.json").write_bytes(b"\0" * 4096)  # as after a power failure
    lines = (runs[0] / "events.jsonl").read_bytes().splitlines(keepends=True)
    lines[1:1] = [b"\xff\x00 garbage {\n", b"17\n", b"\n"]
    (runs[0] / "events.jsonl").write_bytes(b"".join(lines) + b'{"event": "epoch", "epo')

    ended = bench.run("run", undisturbed.suite, "--results", tmp_path, guest=True)
    assert ended.returncode == 0, ended.stderr
    assert errors(ended) == []
    warnings = [line for line in ended.stderr.splitlines() if line.startswith("warning:")]
    for run in runs[:2]:
        assert [w for w in warnings if str(run / "result.json") in w]
        assert list(run.glob("result.damaged-*.json"))
    for number in (2, 3, 4, len(lines) + 1):
        assert [w for w in warnings if str(runs[0] / "events.jsonl") in w and f" {number} " in w]
    assert "2 done already, 2 to do" in ended.stderr
    assert cells(folder) == cells(undisturbed.folder)


def test_a_file_in_place_of_the_results_is_one_line(bench, tmp_path):
    suite = write_suite(tmp_path / "tiny.toml", "bptt")
    (tmp_path / "results").write_text("a file")
    ended = bench.run("run", suite, "--results", tmp_path / "results")
    assert ended.returncode == ExitCode.RESULTS
    assert len(ended.stderr.splitlines()) == len(errors(ended)) == 1
    assert "a file stands where a folder is needed" in ended.stderr
    assert (tmp_path / "results").read_text() == "a file"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 4 MiB in the folder, if that can be had."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Use all the space that is left; the file that does."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass
    assert shutil.disk_usage(disk).free == 0
    return filler


NO_MOUNT = "a small file system can be mounted by root only"


def test_a_full_disk_is_one_line_and_nothing_is_lost(scenarios, undisturbed):
    happened = scenarios[fill_the_disk].result()
    if happened is None:
        pytest.skip(NO_MOUNT)
    assert happened.before.returncode == ExitCode.RESULTS
    (line,) = errors(happened.before)
    assert "the disk is full; free some space" in line
    assert "tiny" in line  # the file
    assert happened.ended.returncode == 0, happened.ended.stderr
    assert "1 done already, 3 to do" in happened.ended.stderr
    assert cells(happened.folder) == cells(undisturbed.folder)


def test_a_disk_that_is_full_from_the_start_is_one_line(bench, tmp_path):
    suite = write_suite(tmp_path / "tiny.toml", "bptt")
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk") as mounted:
        if not mounted:
            pytest.skip(NO_MOUNT)
        fill(tmp_path / "disk")
        ended = bench.run("run", suite, "--results", tmp_path / "disk")
    assert ended.returncode == ExitCode.RESULTS
    assert len(errors(ended)) == 1
    assert "the disk is full" in ended.stderr


def test_read_only_results_are_one_line(bench, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk) as mounted:
        if not mounted:
            pytest.skip(NO_MOUNT)
        shutil.copytree(undisturbed.folder, disk / "tiny")
        next((disk / "tiny" / "runs").iterdir()).joinpath("result.json").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        ended = bench.run("run", undisturbed.suite, "--results", disk, guest=True)
        look = bench.run("status", "tiny", "--results", disk, "--json")
    assert ended.returncode == ExitCode.RESULTS
    (line,) = errors(ended)
    assert "the file system is read-only" in line
    assert json.loads(look.stdout)["counts"] == {"interrupted": 1, "done": 3}


@pytest.mark.parametrize("command", ["run", "plan", "status"])
def test_results_of_a_newer_schema_are_refused_and_left_alone(
    bench, undisturbed, tmp_path, command
):
    folder = tmp_path / "tiny"
    shutil.copytree(undisturbed.folder, folder)
    file = next((folder / "runs").iterdir()) / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 99}))
    before = {p: p.read_bytes() for p in folder.rglob("*.*") if p.name != "suite.json"}
    what = "tiny" if command == "status" else undisturbed.suite
    ended = bench.run(command, what, "--results", tmp_path, guest=True)
    assert ended.returncode == ExitCode.RESULTS
    (line,) = errors(ended)
    assert "schema 99, written by a newer snnbench" in line
    assert str(file) in line
    assert {p: p.read_bytes() for p in before} == before
