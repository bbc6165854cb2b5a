"""Plugins that fail in every way: each fault is an outcome with a reason and harms no other run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Bench, events, rows, write_suite

from snnbench.errors import ExitCode

CODES = (3, 0, 1, 255)
Ended = subprocess.CompletedProcess[str]


@dataclass
class Happened:
    """The command that ended, and the suite's folder."""

    ended: Ended
    folder: Path


def errors(ended: Ended) -> list[str]:
    """The lines on stderr that are no progress; a traceback is never among them."""
    assert "Traceback" not in ended.stderr
    return [ln for ln in ended.stderr.splitlines() if ln.startswith("error:")]


SEVERAL = [
    "hangs",
    "raises",
    "aborts",
    "segfaults",
    f"exits\ncode = {list(CODES)}",
    "chatty",
    "bptt",
]
SUITES: dict[str, tuple[list[str], list[str]]] = {
    # The one that hangs comes first: the time in which the server warms up counts as its own.
    "several": (SEVERAL, ["train.timeout_s=45"]),
    "silent": (["hangs\nafter = [-1.0, 0.3]"], ["run.heartbeat_s=3"]),
    "hungry": (["hungry"], ["run.oom_retry={batch_split=true}"]),
    "starved": (["hungry"], []),
    "late": (["late"], []),
    "alike": (["raises"], ["axes.seed=[0,1,2,3,4]"]),
    "unlike": (["raises", "aborts"], ["run.stop_after_same_failures=2"]),
    "broken": (["bptt", "broken"], []),
    "deadly": (["bptt", "deadly"], []),
    "stuck": (["bptt", "stuck"], ["run.heartbeat_s=3"]),
}


@pytest.fixture(scope="module")
def begun(
    bench: Bench, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Happened]]]:
    """All commands of this file, three at a time."""
    root = tmp_path_factory.mktemp("guests")

    def play(name: str) -> Happened:
        methods, settings = SUITES[name]
        suite = write_suite(root / f"{name}.toml", methods)
        given = [part for setting in settings for part in ("--set", setting)]
        command = ("run", suite, "--results", root / name, "--json", *given)
        return Happened(bench.run(*command, guest=True), root / name / "tiny")

    with ThreadPoolExecutor(3) as pool:
        yield {name: pool.submit(play, name) for name in SUITES}


@pytest.fixture
def happened(begun: dict[str, Future[Happened]]) -> Callable[[str], Happened]:
    """What came of one of them."""
    return lambda name: begun[name].result()


@pytest.fixture
def guests(happened) -> Happened:
    return happened("several")


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
        ("segfaults", "failed", "killed by signal 11 (SIGSEGV)"),
        ("hangs", "timeout", "longer than train.timeout_s = 45 s"),
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
    assert json.loads(guests.ended.stdout)["runs"] == {"done": 2, "failed": 7, "timeout": 1}
    assert "8 runs failed" in guests.ended.stderr


def test_the_distribution_of_a_guest_is_recorded(guests):
    (path,) = guests.folder.glob("runs/*-chatty-*/result.json")
    method = json.loads(path.read_text())["components"]["method"]
    assert (method["distribution"], method["version"]) == ("snnbench-faulty", "2.5")


# --- what hangs, starves, or dies too late ------------------------------------------------------


def test_a_run_that_gives_no_sign_of_life_is_ended(happened):
    found = {(row["status"], row["reason"]) for row in rows(happened("silent").folder)}
    assert found == {("failed", "hung: no step for run.heartbeat_s = 3 s")}
    assert len(rows(happened("silent").folder)) == 2


def test_lack_of_memory_is_recorded_with_the_size_asked_for(happened):
    (row,) = rows(happened("starved").folder)
    assert row["status"] == "oom"
    assert row["reason"].startswith(f"out of memory, asked for {2**50} bytes")


def test_lack_of_memory_may_lead_to_smaller_parts_of_the_batch(happened):
    happened = happened("hungry")
    assert happened.ended.returncode == 0, happened.ended.stderr
    (path,) = happened.folder.glob("runs/*/result.json")
    result = json.loads(path.read_text())
    assert (result["status"], result["batch_split"]) == ("done", 4)  # 32 -> 16 -> 8 samples
    assert result["spec"]["train"]["batch_split"] == 1
    assert "batches taken in 4 parts, since in 2: out of memory" in result["reason"]
    tried = [e["batch_split"] for e in events(happened.folder) if e["event"] == "oom_retry"]
    assert tried == [2, 4]
    assert "its batches are now taken in 2 parts" in happened.ended.stderr


def test_a_result_stays_though_its_process_crashed_afterwards(happened):
    happened = happened("late")
    assert happened.ended.returncode == 0, happened.ended.stderr
    (row,) = rows(happened.folder)
    assert (row["status"], row["reason"]) == ("done", "")


def test_a_suite_whose_first_runs_fail_alike_stops_and_says_why(happened):
    happened = happened("alike")
    assert happened.ended.returncode == ExitCode.RUNS_FAILED
    (line,) = errors(happened.ended)
    assert "the first 3 runs all failed the same way: ValueError: a fault of the guest" in line
    assert json.loads(happened.ended.stdout)["runs"] == {"failed": 3}
    assert len(rows(happened.folder)) == 3  # of five


def test_a_suite_whose_runs_fail_in_different_ways_goes_on(happened):
    assert json.loads(happened("unlike").ended.stdout)["runs"] == {"failed": 2}
    assert errors(happened("unlike").ended) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", ["'broken'", "snnbench-faulty 2.5", "a_module_that_nobody_has"]),
        ("deadly", ["SIGABRT"]),
        ("stuck", ["did not answer 'resolve' within 3 s", "hang on import"]),
    ],
)
def test_guests_that_cannot_be_loaded_are_named_before_anything_runs(happened, name, words):
    one = happened(name)
    assert one.ended.returncode in (ExitCode.SUITE, ExitCode.WORKER)
    assert len(errors(one.ended)) == 1
    for text in words:
        assert text in one.ended.stderr
    assert not one.folder.exists()
