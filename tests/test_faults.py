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
CODES = (3, 0, 1, 255)


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


def kill_workers(bench: Bench, suite: Path, results: Path) -> Happened:
    """Every run of a suite is killed once, then the suite is run again."""
    folder, rng = results / "tiny", random.Random(1)
    command = ("run", suite, "--results", results)
    process = bench.start(*command, guest=True)
    for seed, after in enumerate(rng.sample(range(6), 4)):  # so many epochs of each run
        (pid,) = until(lambda s=seed: started(folder, f"-s{s}-"), f"run {seed}")
        until(lambda s=seed, n=after: epochs(folder, f"-s{s}-") >= n, "its epochs")
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
    first = bench.wait(process)
    assert {row["status"] for row in rows(folder)} == {"interrupted"}
    assert all("SIGKILL" in row["reason"] for row in rows(folder))
    return Happened(bench.run(*command, guest=True), folder, first)


def kill_commands(bench: Bench, suite: Path, results: Path) -> Happened:
    """The command is killed four times at different moments, each time given again at once."""
    folder, rng = results / "tiny", random.Random(2)
    command = ("run", suite, "--results", results)
    for after in (None, rng.randint(1, 4), rng.randint(5, 8), rng.randint(8, 10)):
        before = epochs(folder)
        process = bench.start(*command, guest=True)
        if after is None:
            time.sleep(rng.uniform(0, 3))  # anywhere before the first epoch
        else:
            until(lambda b=before, n=after: epochs(folder) >= b + n, "some epochs")
            time.sleep(rng.uniform(0, 0.1))
        process.kill()
        bench.wait(process)
    return Happened(bench.run(*command, guest=True), folder)


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


def invite_guests(bench: Bench, suite: Path, results: Path) -> Happened:
    """Guests that fail in every way, between runs that are all right."""
    # The one that hangs comes first: the time in which the server warms up counts as its own.
    methods = ["hangs", "raises", "aborts", f"exits\ncode = {list(CODES)}", "chatty", "bptt"]
    suite = write_suite(results / "tiny.toml", methods, train="timeout_s = 8")
    ended = bench.run("run", suite, "--results", results, "--json", guest=True)
    return Happened(ended, results / "tiny")


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


def load_guests(bench: Bench, suite: Path, results: Path) -> dict[str, Ended]:
    """Guests whose import fails, or ends the process."""
    begun = {}
    for name in ("broken", "deadly"):
        suite = write_suite(results / f"{name}.toml", ["bptt", name])
        begun[name] = bench.start("run", suite, "--results", results / name, guest=True)
    ended = {name: bench.wait(process) for name, process in begun.items()}
    assert not list(results.glob("*/tiny/runs"))
    return ended


SCENARIOS = (
    kill_commands, kill_workers, invite_guests, fill_the_disk, kill_the_parent, load_guests
)  # fmt: skip
Scenarios = dict[Callable[..., Any], Future[Any]]


@pytest.fixture(scope="module")
def scenarios(
    bench: Bench, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scenarios]:
    with ThreadPoolExecutor(3) as pool:
        yield {
            play: pool.submit(play, bench, undisturbed.suite, tmp_path_factory.mktemp("scene"))
            for play in SCENARIOS
        }


# --- kill -9 ------------------------------------------------------------------------------------


def test_killed_workers_are_done_again_with_the_same_result(scenarios, undisturbed):
    happened = scenarios[kill_workers].result()
    assert errors(happened.before) == []
    assert happened.ended.returncode == 0, happened.ended.stderr
    assert cells(happened.folder) == cells(undisturbed.folder)
    resumed = [e["epoch"] for e in events(happened.folder) if e["event"] == "resume"]
    assert len(resumed) >= 2  # not merely started afresh


def test_a_killed_command_is_taken_up_again_with_the_same_result(scenarios, undisturbed):
    happened = scenarios[kill_commands].result()
    assert happened.ended.returncode == 0, happened.ended.stderr
    assert cells(happened.folder) == cells(undisturbed.folder)


def test_a_killed_command_leaves_no_process_behind(scenarios):
    assert scenarios[kill_the_parent].result() == []


# --- two at once --------------------------------------------------------------------------------


def test_a_second_run_of_a_suite_is_refused_and_the_first_unharmed(bench, tmp_path):
    folder = tmp_path / "tiny"
    suite = write_suite(tmp_path / "tiny.toml", "bptt", epochs=20_000)
    first = bench.start("run", suite, "--results", tmp_path)
    until(lambda: epochs(folder), "the first run")
    second = bench.run("run", suite, "--results", tmp_path)
    assert second.returncode == ExitCode.RESULTS
    assert len(second.stderr.splitlines()) == len(errors(second)) == 1
    assert "another `snnbench run`" in second.stderr
    more = epochs(folder) + 5
    until(lambda: epochs(folder) >= more, "the first run to go on")
    assert len(started(folder)) == 1

    first.send_signal(signal.SIGINT)
    ended = bench.wait(first)
    assert ended.returncode == ExitCode.INTERRUPTED
    # The hint can be given as it stands.
    assert f"snnbench run {suite} --results {tmp_path}" in ended.stderr.splitlines()[-1]


# --- Ctrl-C and SIGTERM -------------------------------------------------------------------------


@dataclass
class UnderWay:
    """A suite whose first run is done and whose second has begun."""

    process: Process
    folder: Path


@pytest.fixture(scope="module")
def under_way(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, UnderWay]:
    """Three of them, begun at the same time."""
    slow = "steady\ndelay_s = 0.5"
    suites = {"ctrl_c": ["bptt", slow], "sigterm": ["bptt", slow], "twice": ["bptt", "hangs"]}
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


# --- faulty guests ------------------------------------------------------------------------------


@pytest.fixture
def guests(scenarios: Scenarios) -> Happened:
    happened: Happened = scenarios[invite_guests].result()
    return happened


def row_of(happened: Happened, method: str, config: str = "") -> dict[str, str]:
    """The only row of the method."""
    (row,) = [
        row
        for row in rows(happened.folder)
        if row["method"] == method and config in row["method_config"]
    ]
    return row


@pytest.mark.parametrize(
    ("method", "status", "reason"),
    [
        ("raises", "failed", "ValueError: a fault of the guest"),
        ("aborts", "failed", "killed by signal 6 (SIGABRT)"),
        ("hangs", "timeout", "longer than train.timeout_s = 8 s"),
    ],
)
def test_the_fault_of_a_guest_is_an_outcome_with_a_reason(guests, method, status, reason):
    row = row_of(guests, method)
    assert (row["status"], row["reason"]) == (status, reason)
    assert row["test_acc"] == ""


@pytest.mark.parametrize("code", CODES)
def test_a_guest_that_leaves_without_a_word_has_failed(guests, code):
    row = row_of(guests, "exits", f":{code}}}")
    assert row["status"] == "failed"
    assert f"exit code {code}" in row["reason"]


def test_faults_of_guests_leave_other_runs_alone(guests):
    assert (row_of(guests, "bptt")["status"], row_of(guests, "chatty")["status"]) == (
        "done",
        "done",
    )
    for column in ("test_acc", "spikes_per_sample", "init_hash", "order_hash", "saved_bytes"):
        assert row_of(guests, "bptt")[column] == row_of(guests, "chatty")[column]


def test_what_a_guest_prints_goes_to_its_log_alone(guests):
    output = json.loads(guests.ended.stdout)
    assert output["interrupted"] is False
    assert "garbage" not in guests.ended.stderr
    (log,) = guests.folder.glob("runs/*-chatty-*/log.txt")
    for text in (b"garbage on stdout", b"garbage on stderr", b"\xff\x00 raw garbage"):
        assert text in log.read_bytes()
    (log,) = guests.folder.glob("runs/*-raises-*/log.txt")
    assert "Traceback" in log.read_text()


def test_a_suite_with_failures_says_so(guests):
    assert guests.ended.returncode == ExitCode.RUNS_FAILED
    assert errors(guests.ended) == []
    assert json.loads(guests.ended.stdout)["runs"] == {"done": 2, "failed": 6, "timeout": 1}
    assert "7 runs failed" in guests.ended.stderr


def test_the_distribution_of_a_guest_is_recorded(guests):
    (path,) = guests.folder.glob("runs/*-chatty-*/result.json")
    method = json.loads(path.read_text())["components"]["method"]
    assert (method["distribution"], method["version"]) == ("snnbench-faulty", "2.5")


def test_guests_that_cannot_be_loaded_are_named_before_anything_runs(scenarios):
    ended = scenarios[load_guests].result()
    for one in ended.values():
        assert one.returncode in (ExitCode.SUITE, ExitCode.WORKER)
        assert len(errors(one)) == 1
    for text in ("'broken'", "snnbench-faulty 2.5", "a_module_that_nobody_has"):
        assert text in ended["broken"].stderr
    assert "SIGABRT" in ended["deadly"].stderr
