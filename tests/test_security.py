"""Suites, records and checkpoints are data: nothing in them runs, nothing leads out of results."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Bench, write_suite

import snnbench
from snnbench.errors import ExitCode, ResultsError
from snnbench.executors import queue
from snnbench.runs.overview import end_of, log_of
from snnbench.runs.policy import SlurmOptions
from snnbench.runs.progress import Ledger
from snnbench.spec import RunSpec, TrainConfig
from snnbench.store import RunFolder, SuiteFolder

SPEC = RunSpec(
    dataset="digits", data={}, model="mlp", model_options={}, method="bptt", method_config={},
    neuron={}, T=2, seed=0, train=TrainConfig(epochs=1),
)  # fmt: skip
HOSTILE = [
    "../outside", "..", ".", "", "/etc/passwd", "a/b", "a\\b/../c", "a\0b", "\0", ".hidden",
    "-rf", "a b", "a\nb", "é", "名前", "\u202egnp.exe", "a" * 129, "a" * 5000, "~root", "$(ls)",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("use", ["run", "leases"])
def test_no_name_of_a_run_leads_anywhere_else(tmp_path: Path, name: str, use: str) -> None:
    suite = SuiteFolder(tmp_path / "s")
    with pytest.raises(ResultsError, match="is no name of a run") as caught:
        getattr(suite, use)(name)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bptt", "tet+shortcut", "a/../../b", "a\0b", "aé" * 300])
def test_a_run_with_a_strange_method_has_a_good_id(tmp_path: Path, name: str) -> None:
    run_id = replace(SPEC, method=name, dataset=name).run_id
    folder = SuiteFolder(tmp_path / "s").run(run_id)
    assert folder.path.parent == tmp_path / "s" / "runs"


@pytest.mark.parametrize("place", ["s", "s/runs", "s/runs/a"])
def test_a_link_in_place_of_a_folder_is_refused(tmp_path: Path, place: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = tmp_path / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    with pytest.raises(ResultsError, match="a link in place of a folder"):
        SuiteFolder(tmp_path / "s").run("a")
    assert list(outside.iterdir()) == []


def test_linked_leases_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "s" / "leases").symlink_to(tmp_path / "outside")
    with pytest.raises(ResultsError, match="a link in place of a folder"):
        SuiteFolder(tmp_path / "s").leases("a")


def test_a_linked_log_is_not_read(tmp_path: Path) -> None:
    suite = SuiteFolder(tmp_path / "s")
    run = suite.run("a")
    run.create(SPEC)
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    assert end_of(secret, 100) == "a secret"
    run.log.symlink_to(secret)
    assert end_of(run.log, 100) == ""
    assert log_of(suite, run, 10) == {}


def test_the_end_of_a_log_begins_with_a_whole_line(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_bytes(b"first\n\xff second\nthird\n")
    assert end_of(log, 21) == "first\n\ufffd second\nthird\n"
    assert end_of(log, 17) == "...\n\ufffd second\nthird\n"
    assert end_of(log, 3) == "...\nrd\n"
    assert end_of(tmp_path / "absent", 10) == ""


def test_linked_runs_are_not_listed(tmp_path: Path) -> None:
    suite = SuiteFolder(tmp_path / "s")
    suite.run("a").create(SPEC)
    RunFolder(tmp_path / "outside").create(SPEC)
    (suite.path / "runs" / "b").symlink_to(tmp_path / "outside")
    assert suite.run_ids() == ["a"]
    assert [r.run_id for r in suite.runs()] == ["a"]


def test_linked_files_are_not_written_through(tmp_path: Path) -> None:
    run = SuiteFolder(tmp_path / "s").run("a")
    run.create(SPEC)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("events.jsonl", "result.json", "checkpoint.pt", "log.txt", "spec.json"):
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).symlink_to(precious)
    with pytest.raises(ResultsError):
        run.append({"event": "start"})
    assert not run.finish({"status": "done"})  # something is there already
    run.save_checkpoint(b"weights")
    assert precious.read_text() == "precious"
    assert not run.checkpoint.is_symlink()


def test_a_plan_from_elsewhere_cannot_name_other_folders(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "evil").mkdir()
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "result.json").write_text('{"status": "done", "reason": "a secret"}')
    for runs in (["../../secret"], ["/etc"], ["a\0"], [7], {"a": 1}, "abc"):
        (tmp_path / "evil" / "suite.json").write_text(json.dumps({"runs": runs}))
        for command in (("status", "evil"), ("cancel", "evil")):
            ended = bench.run(*command, "--results", tmp_path)
            assert ended.returncode == ExitCode.RESULTS, (runs, command, ended.stderr)
            assert len(ended.stderr.splitlines()) == 1
            assert "a secret" not in ended.stdout + ended.stderr


@pytest.mark.parametrize("name", ["../../secret", "/", "a\0b".replace("\0", "%00"), "x" * 4000])
def test_hostile_run_ids_on_the_command_line(bench: Bench, tmp_path: Path, name: str) -> None:
    for command in ("show", "logs"):
        ended = bench.run(command, name, "--results", tmp_path)
        assert ended.returncode == ExitCode.RESULTS
        assert "Traceback" not in ended.stderr


# --- nothing runs -------------------------------------------------------------------------------


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_code_in_it_runs_nothing(bench: Bench, tmp_path: Path) -> None:
    import torch

    suite = write_suite(tmp_path / "tiny.toml", "bptt", epochs=1)
    planned = json.loads(bench.run("plan", suite, "--results", tmp_path, "--json").stdout)
    folder = SuiteFolder(tmp_path / "tiny").run(planned["runs"][0]["run_id"])
    folder.path.mkdir(parents=True)
    trap = tmp_path / "trap"
    torch.save({"seal": Evil(trap)}, folder.checkpoint)
    folder.checkpoint.with_name("checkpoint.old.pt").write_bytes(pickle.dumps(Evil(trap)))
    ended = bench.run("run", suite, "--results", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert not trap.exists()
    said = [e for e in folder.events()[0] if e["event"] == "restart"]
    assert len(said) == 2
    make, (path,) = Evil(trap).__reduce__()
    make(path)
    assert trap.is_dir()  # it could have


def test_only_the_door_to_checkpoints_unpickles() -> None:
    """torch.load with weights_only; no pickle, eval, exec, yaml or marshal in the package."""
    package = Path(snnbench.__file__).parent
    for file in package.rglob("*.py"):
        text = file.read_text("utf-8")
        assert not re.search(r"^\s*(?:import|from) (?:pickle|marshal|shelve|yaml|dill)", text, re.M)
        assert not re.search(r"(?<![\w.])(?:eval|exec)\(", text), file
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text):
            assert "weights_only=True" in call, file


@pytest.mark.parametrize(
    "value", ["x\ny", "a b", "`ls`", "$(ls)", "a;b", "'", '"', "\\", "#", "", "-x"]
)
def test_no_option_can_write_into_a_script(value: str) -> None:
    for name in ("partition", "account", "qos", "constraint", "memory"):
        with pytest.raises(ValueError, match=name):
            SlurmOptions(**{name: value})


def test_a_job_id_is_a_number(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for text in (
        '{"job": "1; rm -rf /"}',
        '{"job": 7}',
        '{"job": "--me"}',
        "[]",
        "{",
        '{"job": ""}',
    ):
        run.job.write_text(text)
        assert queue.job_of(run) is None
    run.job.write_text('{"job": "12_3"}')
    assert queue.job_of(run) == "12_3"


def test_logs_steer_no_terminal(tmp_path: Path) -> None:
    suite = SuiteFolder(tmp_path / "s")
    run = suite.run("a")
    run.create(SPEC)
    run.log.write_bytes(b"before\x1b]0;title\x07\x1b[2J\xff\x00\x9bm after\r\n")
    (text,) = log_of(suite, run, 10).values()
    assert text.startswith("before")
    assert " after" in text
    assert all(ch.isprintable() or ch in "\t\n" for ch in text)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"index": 1, "runs": []}', '{"index": 1, "runs": {"a": 7}}',
     '{"index": 1, "runs": {"a": [[1, 2, 3], "great", "", null, 1.0, "w", "m", 2]}}',
     '{"index": 1, "runs": {"a": [[1, 2, 3], "done", "", null, "x", "w", "m", 2]}}'],
)  # fmt: skip
def test_a_damaged_index_is_made_anew(tmp_path: Path, text: str) -> None:
    suite = SuiteFolder(tmp_path / "s")
    run = suite.run("a")
    run.create(SPEC)
    run.append({"event": "exit", "wall_s": 2.0})
    run.finish({"status": "done", "source_hash": "x"})
    suite.index.write_text(text)
    ledger = Ledger(suite)
    assert (ledger.look("a").status, ledger.look("a").wall_s) == ("done", 2.0)
    ledger.save()
    assert Ledger(suite).look("a") == ledger.look("a")


# --- secrets ------------------------------------------------------------------------------------


def test_nothing_of_the_environment_is_recorded(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "hunter2-secret-value")
    monkeypatch.setenv("USER", "a-user-name-of-ours")
    suite = write_suite(tmp_path / "tiny.toml", "bptt", epochs=1)
    bench = Bench(cache)
    try:
        assert bench.run("run", suite, "--results", tmp_path / "r").returncode == 0
    finally:
        bench.clean_up()
    files = [p for p in (tmp_path / "r").rglob("*") if p.is_file()]
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        for secret in (b"hunter2", b"MY_API_TOKEN", b"a-user-name-of-ours"):
            assert secret not in content, file
    (record,) = (tmp_path / "r").rglob("result.json")
    assert str(tmp_path).encode() not in record.read_bytes()  # nor paths
    assert os.uname().nodename.encode() not in record.read_bytes() or len(os.uname().nodename) < 4
