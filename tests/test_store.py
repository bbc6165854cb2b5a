"""Result folders: nothing is ever half written, and whatever lies there can be read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from snnbench import store
from snnbench.errors import ResultsError, SchemaError
from snnbench.spec import RunSpec, TrainConfig
from snnbench.store import (
    ENDED,
    RunFolder,
    SuiteFolder,
    is_locked,
    publish,
    publish_json,
    suite_folders,
)

SPEC = RunSpec(
    dataset="digits",
    data={},
    model="mlp",
    model_options={},
    method="bptt",
    method_config={},
    neuron={},
    T=2,
    seed=0,
    train=TrainConfig(epochs=1),
)
PLACES = ["", "runs", f"runs/{SPEC.run_id}"]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = SuiteFolder(tmp_path / "s").run(SPEC.run_id)
    folder.create(SPEC)
    return folder


def events_file(run: RunFolder) -> Path:
    return run.path / "events.jsonl"


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs the code and has said its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    process.stdout.readline()
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout
    process.stdout.close()


HOLD = """
    import sys, time
    from pathlib import Path
    from snnbench.store import RunFolder, SuiteFolder
    if sys.argv[1] == "run":
        lock = RunFolder(Path(sys.argv[2])).claim(0)
    else:
        lock = SuiteFolder(Path(sys.argv[2])).writing(0)
        assert lock.__enter__()
    print("held", flush=True)
    time.sleep(60)
"""


# --- publishing -------------------------------------------------------------------------------


def test_publish_makes_folders_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "x.json"
    for value in ({"n": 1}, {"n": 2}):
        publish_json(file, value)
        assert json.loads(file.read_text()) == value
    assert [p.name for p in file.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("error", [ValueError("no"), OSError(5, "Input/output error")])
@pytest.mark.parametrize("old", [None, "old"])
def test_writer_that_fails_midway_changes_nothing(
    tmp_path: Path, error: Exception, old: str | None
) -> None:
    file = tmp_path / "x"
    if old is not None:
        file.write_text(old)

    def half(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(ResultsError if isinstance(error, OSError) else ValueError):
        publish(file, half)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if old is None else [old])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"x": [float("nan")]}])
def test_what_is_not_json_is_refused_and_changes_nothing(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "x.json"
    publish_json(file, {"n": 1})
    with pytest.raises(ValueError, match="JSON"):
        publish_json(file, value)
    assert json.loads(file.read_text()) == {"n": 1}


def test_kill_while_publishing_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from snnbench.store import publish
        file, n = Path(sys.argv[1]), 0
        def write(path):
            with path.open("w") as f:
                for _ in range(200):
                    f.write(str(n % 10) * 1000)
                    f.flush()
        while True:
            publish(file, write)
            if n == 0:
                print("first", flush=True)
            n += 1
    """
    file = tmp_path / "x"
    for delay in (0.0, 0.003, 0.01, 0.02):
        process = child(code, file)
        time.sleep(delay)
        end(process)
        text = file.read_text()
        assert len(text) == 200_000
        assert len(set(text)) == 1


def test_kill_midway_keeps_the_old_file(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from snnbench.store import publish
        def write(path):
            path.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        print("go", flush=True)
        publish(Path(sys.argv[1]), write)
    """
    file = tmp_path / "x"
    file.write_text("old")
    process = child(code, file)
    assert process.wait(60) == -signal.SIGKILL
    end(process)
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "no permission"),
        (errno.ENOTDIR, "a file stands where a folder is needed"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_storage_errors_are_one_clear_line(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    run.append({"event": "start"})
    monkeypatch.setattr(os, "fdopen", fail)
    monkeypatch.setattr(Path, "write_text", fail)
    for write in (lambda: run.append({"n": 1}), lambda: run.finish({"status": "done"})):
        with pytest.raises(ResultsError, match=words) as caught:
            write()
        assert "\n" not in str(caught.value)
        assert str(run.path) in str(caught.value)
    monkeypatch.undo()
    assert run.events()[0] == [{"event": "start"}]
    assert run.result() is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(small_disk: Path) -> None:
    run = SuiteFolder(small_disk / "s").run(SPEC.run_id)
    run.create(SPEC)
    run.append({"event": "start"})
    publish(run.checkpoint, lambda path: path.write_bytes(b"old"))
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    with pytest.raises(ResultsError, match="the disk is full"):
        publish(run.checkpoint, lambda path: path.write_bytes(b"new" * 100_000))
    with pytest.raises(ResultsError, match="the disk is full"):
        run.finish({"status": "done", "layers": ["x" * 5000]})
    with pytest.raises(ResultsError, match="the disk is full"):
        run.append({"event": "epoch", "text": "x" * 5000})
    assert run.checkpoint.read_bytes() == b"old"
    assert run.events()[0] == [{"event": "start"}]
    assert run.status() == "interrupted"
    assert not list(run.path.glob(".*.tmp"))
    filler.unlink()
    run.append({"event": "epoch", "epoch": 1})
    run.finish({"status": "done"})
    assert [e["event"] for e in run.events()[0]] == ["start", "epoch"]
    assert run.status() == "done"


def test_read_only_disk(small_disk: Path) -> None:
    suite = SuiteFolder(small_disk / "s")
    run = suite.run(SPEC.run_id)
    run.create(SPEC)
    run.append({"event": "start"})
    run.claim(0).release()
    with suite.writing() as held:
        assert held
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ResultsError, match="read-only"), suite.writing():
        pass
    with pytest.raises(ResultsError, match="read-only"):
        run.append({"event": "epoch"})
    with pytest.raises(ResultsError, match="read-only"):
        run.finish({"status": "done"})
    assert run.status() == "interrupted"


@pytest.mark.parametrize("place", PLACES, ids=["suite", "runs", "run"])
def test_file_in_place_of_a_folder(tmp_path: Path, place: str) -> None:
    suite = SuiteFolder(tmp_path / "s")
    file = suite.path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("I am a file")
    run = suite.run(SPEC.run_id)
    for write in (
        lambda: run.create(SPEC),
        lambda: run.append({}),
        lambda: run.finish({"status": "done"}),
        run.spec,
        run.result,
    ):
        with pytest.raises(ResultsError) as caught:
            write()
        assert "\n" not in str(caught.value)
    assert run.status() == "missing"
    assert list(suite.runs()) == []
    assert file.read_text() == "I am a file"


@pytest.mark.parametrize("place", PLACES, ids=["suite", "runs", "run"])
@pytest.mark.parametrize("use", ["events", "epochs", "set_aside_damaged_result", "claim"])
def test_run_cannot_be_used_where_a_file_is_in_the_way(
    tmp_path: Path, place: str, use: str
) -> None:
    file = tmp_path / "s" / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("I am a file")
    run = SuiteFolder(tmp_path / "s").run(SPEC.run_id)
    with pytest.raises(ResultsError):
        getattr(run, use)(*([0] if use == "claim" else []))


def test_tables_cannot_be_written_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("I am a file")
    for folder in (SuiteFolder(tmp_path / "s"), SuiteFolder(tmp_path / "s" / "t")):
        with pytest.raises(ResultsError, match="a file stands"), folder.writing():
            pass


# --- events -----------------------------------------------------------------------------------


def test_events_come_back(run: RunFolder) -> None:
    events = [{"event": "start", "pid": 1}, {"event": "epoch", "epoch": 1, "é": None}, {}]
    for event in events:
        run.append(event)
    assert run.events() == (events, [])


def test_no_events(run: RunFolder) -> None:
    assert run.events() == ([], [])
    assert run.epochs() == []


@pytest.mark.parametrize(
    "line",
    [b"garbage", b"", b"\xff\xfe", b'{"event": "ep', b"[1]", b"3", b"null", b'"x"', b"\0" * 64,
     b'{"a":1}{"b":2}'],
)  # fmt: skip
def test_damaged_line_is_left_out_with_a_warning(run: RunFolder, line: bytes) -> None:
    events_file(run).write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 2}\n')
    events, warnings = run.events()
    assert events == [{"n": 1}, {"n": 2}]
    assert warnings == [f"{events_file(run)}: line 2 is damaged and left out"]


@pytest.mark.parametrize("cut", range(1, 12))
def test_truncated_last_line(run: RunFolder, cut: int) -> None:
    run.append({"n": 1})
    whole = b'{"event": "epoch"}\n'
    with events_file(run).open("ab") as file:
        file.write(whole[:-cut])
    events, warnings = run.events()
    assert events[0] == {"n": 1}
    assert len(events) + len(warnings) == 2
    run.append({"n": 2})
    after, warnings_after = run.events()
    assert after == [*events, {"n": 2}]
    assert warnings_after == warnings
    assert [w for w in warnings if "line 2" not in w] == []


def test_event_that_is_not_json_is_refused_and_changes_nothing(run: RunFolder) -> None:
    run.append({"n": 1})
    with pytest.raises(ValueError, match="JSON"):
        run.append({"x": float("nan")})
    assert run.events() == ([{"n": 1}], [])


def test_repeated_epochs_count_once(run: RunFolder) -> None:
    for epoch, acc in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25), (3, 0.35), (10, 0.9)):
        run.append({"event": "epoch", "epoch": epoch, "test_acc": acc})
        run.append({"event": "start"})
    found = [(e["epoch"], e["test_acc"]) for e in run.epochs()]
    assert found == [(1, 0.1), (2, 0.25), (3, 0.35), (10, 0.9)]


@pytest.mark.parametrize("line", ['{"event": "epoch"}', '{"event": "epoch", "epoch": [1]}'])
def test_epoch_line_that_lost_its_number_does_not_crash(run: RunFolder, line: str) -> None:
    events_file(run).write_text(line + "\n")
    run.append({"event": "epoch", "epoch": 1, "test_acc": 0.5})
    assert [e["epoch"] for e in run.epochs()] == [1]


# --- spec and result --------------------------------------------------------------------------


def test_spec_comes_back_and_is_written_once(run: RunFolder) -> None:
    before = (run.path / "spec.json").stat().st_mtime_ns
    run.create(SPEC)
    assert run.spec() == SPEC
    assert run.spec().run_id == run.run_id
    assert (run.path / "spec.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"schema": "2"}', "\xff", "\0"])
def test_damaged_spec(run: RunFolder, text: str) -> None:
    (run.path / "spec.json").write_text(text, "latin-1")
    with pytest.raises(ResultsError, match="not a readable run spec") as caught:
        run.spec()
    assert "\n" not in str(caught.value)


DAMAGED = ["", "{", "[]", "null", "{}", '{"status": "great"}', '{"status": []}', "\xff",
           '{"status": "running"}', '{"status": "done"']  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_result_counts_as_missing_and_is_kept(run: RunFolder, text: str) -> None:
    run.append({"event": "start"})
    (run.path / "result.json").write_text(text, "latin-1")
    assert run.status() == "missing"
    with pytest.raises(ResultsError, match="not a readable result"):
        run.result()
    aside = run.set_aside_damaged_result()
    assert aside.read_text("latin-1") == text
    assert run.result() is None
    assert run.status() == "interrupted"
    run.finish({"status": "done"})
    assert run.status() == "done"
    assert aside.exists()


def test_two_damaged_results_are_both_kept(run: RunFolder) -> None:
    for text in ("{", "["):
        (run.path / "result.json").write_text(text)
        run.set_aside_damaged_result()
    assert sorted(p.read_text() for p in run.path.glob("result.damaged-*.json")) == ["[", "{"]


# --- status and locks -------------------------------------------------------------------------


@pytest.mark.parametrize("status", ENDED)
def test_status_of_a_run_that_has_ended(run: RunFolder, status: str) -> None:
    run.append({"event": "start"})
    run.finish({"status": status, "reason": "because"})
    assert run.status() == status
    assert run.result() == {"status": status, "reason": "because"}


def test_status_of_a_run_that_never_began(tmp_path: Path, run: RunFolder) -> None:
    assert RunFolder(tmp_path / "nowhere").status() == "missing"
    assert run.status() == "missing"


def test_status_of_a_run_in_progress_and_after_a_kill(run: RunFolder) -> None:
    run.append({"event": "start"})
    assert run.status() == "interrupted"
    process = child(HOLD, "run", run.path)
    assert run.status() == "running"
    end(process)
    assert run.status() == "interrupted"


def test_asking_for_the_status_takes_no_lock(run: RunFolder) -> None:
    run.append({"event": "start"})
    lock = run.claim(0)
    lock.release()
    assert run.status() == "interrupted"
    run.claim(0).release()


def test_run_that_another_process_works_on(run: RunFolder) -> None:
    process = child(HOLD, "run", run.path)
    with pytest.raises(ResultsError, match="another process is working on this run"):
        run.claim(0.05)
    end(process)
    run.claim(5).release()


def test_tables_are_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    folder = SuiteFolder(tmp_path / "s")
    process = child(HOLD, "suite", folder.path)
    with folder.writing(0) as held:
        assert not held
    end(process)
    with folder.writing(5) as held:
        assert held
        assert is_locked(folder.path / ".lock")
    with folder.writing(0) as held:
        assert held


def test_tables_are_let_go_after_an_error(tmp_path: Path) -> None:
    folder = SuiteFolder(tmp_path / "s")
    with pytest.raises(KeyError), folder.writing():
        raise KeyError
    assert not is_locked(folder.path / ".lock")


# --- results, checkpoints and schemas ----------------------------------------------------------


def test_the_first_result_stays(run: RunFolder) -> None:
    assert run.finish({"status": "done", "n": 1})
    assert not run.finish({"status": "failed", "n": 2})
    assert run.result() == {"status": "done", "n": 1}
    assert not list(run.path.glob(".*.tmp"))


def test_of_many_results_at_once_one_is_published(run: RunFolder) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: run.finish({"status": "done", "n": n}), range(40)))
    assert sum(won) == 1
    assert run.result() == {"status": "done", "n": won.index(True)}


def test_the_first_result_stays_on_a_file_system_without_links(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert run.finish({"status": "done", "n": 1})
    assert not run.finish({"status": "done", "n": 2})
    assert run.result() == {"status": "done", "n": 1}


def test_the_last_two_checkpoints_are_kept(run: RunFolder) -> None:
    assert run.checkpoints == []
    for n in (1, 2, 3):
        run.save_checkpoint(b"%d" % n)
    assert [p.read_bytes() for p in run.checkpoints] == [b"3", b"2"]
    run.drop_checkpoints()
    assert run.checkpoints == []
    assert not list(run.path.glob("*.pt"))


def test_kill_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from snnbench.store import RunFolder
        run, n = RunFolder(Path(sys.argv[1])), 0
        while True:
            run.save_checkpoint(str(n % 10).encode() * 200_000)
            if n == 1:
                print("two", flush=True)
            n += 1
    """
    run = RunFolder(tmp_path)
    for delay in (0.0, 0.002, 0.007, 0.015):
        process = child(code, tmp_path)
        time.sleep(delay)
        end(process)
        assert run.checkpoints
        for path in run.checkpoints:
            assert len(path.read_bytes()) == 200_000
            assert len(set(path.read_bytes())) == 1


@pytest.mark.parametrize(
    ("schema", "words"), [(2, "a newer snnbench: update"), (0, "an snnbench too old")]
)
def test_a_record_of_another_schema_is_refused_and_not_touched(
    run: RunFolder, schema: int, words: str
) -> None:
    text = json.dumps({"schema": schema, "status": "done"})
    for name, read in (("result.json", run.status), ("spec.json", run.spec)):
        (run.path / name).write_text(text)
        with pytest.raises(SchemaError, match=words) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert str(run.path / name) in str(caught.value)
        assert (run.path / name).read_text() == text


# --- suites -----------------------------------------------------------------------------------


def test_runs_are_the_folders_with_a_spec(tmp_path: Path) -> None:
    suite = SuiteFolder(tmp_path / "s")
    assert list(suite.runs()) == []
    for name in ("b", "a"):
        suite.run(name).create(SPEC)
    (suite.path / "runs" / "empty").mkdir()
    (suite.path / "runs" / "file").write_text("")
    assert [r.run_id for r in suite.runs()] == ["a", "b"]


def test_redone_runs_are_kept(tmp_path: Path) -> None:
    suite = SuiteFolder(tmp_path / "s")
    for n in (1, 2):
        run = suite.run("a")
        run.create(SPEC)
        run.finish({"status": "failed", "n": n})
        suite.set_aside(run)
        assert run.status() == "missing"
    kept = [json.loads(p.read_text())["n"] for p in suite.path.glob("redone/a-*/result.json")]
    assert sorted(kept) == [1, 2]
    suite.set_aside(suite.run("never"))


def test_plan_comes_back(tmp_path: Path) -> None:
    suite = SuiteFolder(tmp_path / "s")
    assert suite.plan() is None
    suite.write_plan({"runs": ["a"]})
    assert suite.plan() == {"runs": ["a"]}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_damaged_plan_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "suite.json").write_text(text, "latin-1")
    assert SuiteFolder(tmp_path).plan() is None


def test_suites_with_tables_the_newest_last(tmp_path: Path) -> None:
    for age, name in ((30, "a"), (10, "b"), (20, "c")):
        file = tmp_path / name / "runs.csv"
        file.parent.mkdir()
        file.write_text("")
        when = time.time() - age
        os.utime(file, (when, when))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert [f.path.name for f in suite_folders(tmp_path)] == ["a", "c", "b"]
    assert suite_folders(tmp_path / "nowhere") == []
    assert suite_folders(tmp_path / "file") == []


def test_only_the_store_knows_its_file_names() -> None:
    package = Path(store.__file__).parent
    names = ("events.jsonl", "result.json", "checkpoint.pt", "log.txt", "suite.json", "epochs.csv")
    for file in package.rglob("*.py"):
        code = file.read_text("utf-8")
        for name in names:
            assert file.name == "store.py" or f'"{name}"' not in code, (file.name, name)
