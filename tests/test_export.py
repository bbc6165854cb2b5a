"""Archives, NeuroBench's metrics, and suites written by `init`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Bench
from records import HOSTILE, SPEC, done, ended, tet, write

from snnbench import planner, scaffold
from snnbench.errors import UsageError
from snnbench.report import content, export
from snnbench.runs import overview
from snnbench.runs.stopping import ask_to_cancel
from snnbench.scaffold import Questions
from snnbench.store import SuiteFolder


@pytest.fixture
def folder(tmp_path: Path) -> SuiteFolder:
    made = SuiteFolder(tmp_path / "made")
    for seed in range(2):
        done(made, replace(SPEC, seed=seed), 0.9 + seed / 10)
    ended(made, tet(0.05, 4, 0), "failed", HOSTILE)
    none = {
        "firing_rate": None,
        "sops_per_sample": None,
        "nulls": {"firing_rate": "no spikes here"},
    }
    run = done(made, replace(SPEC, method="ann", T=1), 0.95, **none)
    run.log.write_text("a line\n")
    run.checkpoint.write_bytes(b"weights")
    (made.path / ".lock").write_text("")
    (made.path / "leak.txt").symlink_to("/etc/hostname")
    return write(made)


def unpacked(raw: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        assert archive.testzip() is None
        return {i.filename: archive.read(i) for i in archive.infolist()}


def test_archive_has_tables_reports_and_records_but_no_weights_or_links(
    folder: SuiteFolder,
) -> None:
    files = unpacked(export.archive(folder))
    assert all(name.startswith("made/") for name in files)
    names = {name.removeprefix("made/") for name in files}
    assert {"runs.csv", "epochs.csv", "report.md", "report.json", "neurobench.json"} <= names
    run = folder.run(SPEC.run_id).run_id
    assert {f"runs/{run}/{n}" for n in ("spec.json", "result.json", "events.jsonl")} <= names
    assert not any("checkpoint" in n or ".lock" in n or "leak" in n for n in names)
    assert files["made/runs.csv"] == folder.runs_csv.read_bytes()


def test_provenance_has_the_hash_of_every_file(folder: SuiteFolder) -> None:
    files = unpacked(export.archive(folder))
    provenance = json.loads(files.pop("made/provenance.json"))
    hashes = {f"made/{k}": v for k, v in provenance["sha256"].items()}
    assert hashes == {k: hashlib.sha256(v).hexdigest() for k, v in files.items()}
    assert provenance["runs"] == {"done": 3, "failed": 1}
    assert provenance["torch"] == ["2.10.0"]
    assert [m["cpu"] for m in provenance["machines"]] == ["Testium 3000"]
    text = json.dumps(provenance)
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert os.environ.get("USER", "nobody-at-all") not in text


def test_the_same_results_give_the_same_bytes(folder: SuiteFolder) -> None:
    folder.write_plan({"runs": folder.run_ids()})
    before = export.archive(folder)
    for run in folder.runs():
        os.utime(run.path / "result.json", (1, 1))
    overview.look(folder)  # writes an index, with the times of files
    ask_to_cancel(folder, None)
    assert folder.index.exists()
    assert folder.cancel.exists()
    assert export.archive(folder) == before


def test_archive_of_committed_tables_only(folder: SuiteFolder, tmp_path: Path) -> None:
    bare = SuiteFolder(tmp_path / "bare")
    bare.path.mkdir()
    bare.runs_csv.write_bytes(folder.runs_csv.read_bytes())
    names = set(unpacked(export.archive(bare)))
    assert names == {
        f"bare/{n}" for n in ("runs.csv", "report.md", "report.json", "neurobench.json",
                              "provenance.json")
    }  # fmt: skip


def test_neurobench_metrics_by_hand(folder: SuiteFolder) -> None:
    bptt, ann = (
        next(c for c in export.neurobench(content.build(folder).cells) if c["method"] == m)
        for m in ("bptt", "ann")
    )
    assert bptt["ClassificationAccuracy"] == pytest.approx(0.95)
    assert bptt["ActivationSparsity"] == 0.875
    assert bptt["Footprint"] == 4 * 4990
    assert bptt["SynapticOperations"] == {
        "Effective_MACs": 9216.0, "Effective_ACs": 2.5e6, "Dense": None,
    }  # fmt: skip
    assert ann["ActivationSparsity"] is None
    assert "ActivationSparsity: no spikes here" in ann["notes"]
    assert "Effective_ACs: not measured" in ann["notes"]
    assert not any(n.startswith("ActivationSparsity") for n in bptt["notes"])
    assert "Dense: not measured" in bptt["notes"]
    assert ann["SynapticOperations"]["Effective_ACs"] is None


def test_command_export(folder: SuiteFolder, tmp_path: Path, bench: Bench) -> None:
    out = tmp_path / "out"
    found = bench.run("export", folder.path, "-o", out / "made.zip")
    assert found.returncode == 0, found.stderr
    assert "made/provenance.json" in unpacked((out / "made.zip").read_bytes())
    assert bench.run("export", folder.path, "-o", out / "n.json").returncode == 0
    assert len(json.loads((out / "n.json").read_text())) == 2
    refused = bench.run("export", folder.path, "-o", out / "made.rar")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1


# --- init -------------------------------------------------------------------------------------


def test_a_suite_of_defaults_can_be_run_as_it_is(tmp_path: Path) -> None:
    path = scaffold.new_suite(Questions(), tmp_path / "mine.toml")
    suite, specs = planner.specs_of(str(path))
    assert suite.name == "mine"
    assert len(specs) == 12
    assert sum(line.startswith("#") for line in path.read_text().splitlines()) > 20


def test_every_commented_line_is_valid_too(tmp_path: Path) -> None:
    """What a user gets by removing `# ` in front of keys and tables."""
    path = scaffold.new_suite(Questions(), tmp_path / "mine.toml")
    text = path.read_text()
    begin = text.index("schema = 1")
    loud = "\n".join(
        line.removeprefix("# ") if line.startswith("# ") else line
        for line in text[begin:].splitlines()
    )
    loud = loud.replace('model = ["convnet"]\nT = [4]', 'model = ["convnet"]\nT = [1, 4]')
    document = tomllib.loads(loud)
    assert document["measure"]["gradient_fidelity"]["every"] == 1
    path.write_text(loud.replace("[4]   ", "[1, 4]"))
    suite, _ = planner.specs_of(str(path))
    assert suite.train.warmup_epochs == 1.0
    assert suite.exclude


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ("bptt,tet", ("6 seeds are the fewest", "over 1 method beside")),
        ("bptt,tet,rate,shortcut,grad_scale", ("8 seeds are the fewest", "over 4 methods beside")),
    ],
)
def test_the_suite_says_how_many_seeds_its_methods_need(
    tmp_path: Path, methods: str, words: tuple[str, str]
) -> None:
    text = scaffold.new_suite(Questions(methods=methods), tmp_path / "x.toml").read_text()
    assert all(w in text for w in words)


def test_answers_end_up_in_the_suite_whatever_they_are(tmp_path: Path) -> None:
    claim = 'A "quoted" claim \\ with $name, né # and\nlines'
    answers = Questions("x.1", claim, "digits", "mlp,convnet", "tet+rate, bptt", "8,2", 3, 7)
    suite, specs = planner.specs_of(str(scaffold.new_suite(answers, tmp_path / "deep" / "x.toml")))
    assert suite.claim == 'A "quoted" claim \\ with $name, né # and lines'
    assert suite.axes.T == (8, 2)
    assert suite.train.epochs == 7
    assert len(specs) == 2 * 2 * 2 * 3


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (Questions(methods="bptt,tte"), "unknown method 'tte'; did you mean 'tet'"),
        (Questions(dataset="digit"), "unknown dataset 'digit'"),
        (Questions(model=""), "at least one model"),
        (Questions(name="../x"), "use letters"),
        (Questions(T="0"), "timesteps are integers from 1"),
        (Questions(T="²"), "timesteps are integers from 1"),
        (Questions(seeds=0), "from 1"),
    ],
)
def test_a_bad_answer_is_one_clear_line_and_no_file(
    tmp_path: Path, answers: Questions, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        scaffold.new_suite(answers, tmp_path / "x.toml")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.toml").exists()


def test_a_file_that_is_there_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        scaffold.new_suite(Questions(), tmp_path / "x.toml")
    assert (tmp_path / "x.toml").read_text() == "mine"


def test_init_never_waits_in_a_script(tmp_path: Path, bench: Bench) -> None:
    found = bench.run("init", "fast", "--methods", "bptt,rate", "-o", tmp_path / "fast.toml")
    assert found.returncode == 0, found.stderr
    assert tomllib.loads((tmp_path / "fast.toml").read_text())["name"] == "fast"


def test_init_asks_on_a_terminal(tmp_path: Path) -> None:
    main, side = pty.openpty()
    words = [sys.executable, "-m", "snnbench", "init", "--seeds", "2", "--epochs", "1"]
    process = subprocess.Popen(words, cwd=tmp_path, stdin=side, stdout=side, stderr=side)
    os.close(side)
    os.write(main, b"asked\nIt works.\n\n\nbptt,rate\n2,4\n")
    said = b""
    try:
        while part := os.read(main, 4096):
            said += part
    except OSError:
        pass
    assert process.wait(60) == 0, said
    os.close(main)
    document = tomllib.loads((tmp_path / "asked.toml").read_text())
    assert document["claim"] == "It works."
    assert [m["name"] for m in document["method"]] == ["bptt", "rate"]
    assert document["axes"]["T"] == [2, 4]
    assert b"seeds" not in said.partition(b"written")[0]
