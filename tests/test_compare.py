"""Two results: the verdict, and every reason why there is none."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Bench
from records import HOSTILE, MACHINE, SPEC, done, ended, tet, write

from snnbench.errors import ResultsError, UsageError
from snnbench.report import compare
from snnbench.spec import TrainConfig
from snnbench.store import SuiteFolder

SEEDS = 8


def results(path: Path, change: Callable[[int], dict[str, Any]] | None = None, **spec: Any) -> Path:
    """Eight seeds of one method; `change` gives what differs in the record of a seed."""
    folder = SuiteFolder(path)
    for seed in range(SEEDS):
        acc = 0.9 + (seed * 7 % 5) / 1000
        more = change(seed) if change else {}
        done(folder, replace(SPEC, seed=seed, **spec), **{"acc": acc, **more})
    return write(folder).path


def verdicts(a: Path, b: Path, *figures: str) -> dict[str, tuple[str, str]]:
    read = [(p.name, compare.read(str(p), p.parent)) for p in (a, b)]
    rows = compare.compare(read[0], read[1], figures or ()).rows
    return {row.figure: (row.verdict, row.why) for row in rows}


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return results(tmp_path / "a")


def test_the_same_result_twice_is_equal_in_everything(a: Path) -> None:
    found = verdicts(a, a)
    assert set(found) == set(compare.FIGURES)
    assert {v for v, _ in found.values()} == {"equal"}


def test_better_and_worse_by_hand(a: Path, tmp_path: Path) -> None:
    def other(seed: int) -> dict[str, Any]:
        acc = 0.88 + (seed * 7 % 5) / 1000 + seed % 2 / 1000
        return {"acc": acc, "spikes_per_sample": 900.0 + seed, "saved_bytes": 3 * 2**19 + 1}

    b = results(tmp_path / "b", other)
    found = verdicts(a, b, "test_acc", "spikes_per_sample", "saved_bytes", "step_ms_p50")
    assert {k: v for k, (v, _) in found.items()} == {
        "test_acc": "worse", "spikes_per_sample": "better", "saved_bytes": "worse",
        "step_ms_p50": "equal",
    }  # fmt: skip
    read = [(p.name, compare.read(str(p), tmp_path)) for p in (a, b)]
    (row,) = compare.compare(read[0], read[1], ["test_acc"]).rows
    assert row.paired
    assert row.difference is not None
    assert row.difference.mean == pytest.approx(-0.0195)
    assert row.difference.n == SEEDS


def test_noise_is_no_evidence(a: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(3).normal(0, 0.003, SEEDS).tolist()
    b = results(tmp_path / "b", lambda s: {"acc": 0.9 + (s * 7 % 5) / 1000 + noise[s]})
    assert verdicts(a, b, "test_acc")["test_acc"] == ("no evidence", "")


def test_false_verdicts_are_rare_over_many_cells() -> None:
    """Twenty equal cells, a hundred times: at most one in twenty tables may say anything."""
    rng = np.random.default_rng(1)
    false = 0
    same = {"order_hash": "o", "data_hash": "d", "kernel": "k", "precision": "p", "memory": "m"}
    base = pd.DataFrame([{"seed": s, "init_hash": str(s), **same} for s in range(5)])
    column = {c.name: c for c in compare.catalogue("bptt", ())}["test_acc"]
    for _ in range(100):
        sides = [[base.assign(test_acc=rng.normal(0.9, 0.01, 5)) for _ in range(20)] for _ in "ab"]
        rows = [compare._row("m", "", column, x, y, "") for x, y in zip(*sides, strict=True)]
        judged = compare._corrected(rows)
        false += any(row.verdict in ("better", "worse") for row in judged)
    assert false <= 5 + 4 * (100 * 0.05 * 0.95) ** 0.5


def test_equal_differences_of_three_seeds_show_nothing(tmp_path: Path) -> None:
    folders = []
    for name, acc in (("a", 0.9), ("b", 0.91)):
        folder = SuiteFolder(tmp_path / name)
        for seed in range(3):
            done(folder, replace(SPEC, seed=seed), acc)
        folders.append(write(folder).path)
    assert verdicts(*folders, "test_acc")["test_acc"][0] == "no evidence"


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_better_needs_an_exact_test_that_could_say_so(tmp_path: Path, seeds: int) -> None:
    """A t-test would find this difference with two seeds."""
    folders = []
    for name, acc in (("a", 0.9), ("b", 0.95)):
        folder = SuiteFolder(tmp_path / name)
        for seed in range(seeds):
            done(folder, replace(SPEC, seed=seed), acc + (seed / 1e4 if name == "b" else 0))
        folders.append(write(folder).path)
    least = f"{2 / 2**seeds:.2g}"
    assert verdicts(*folders, "test_acc")["test_acc"] == (
        "no evidence",
        f"better by the interval, not by the exact test (p = {least}; of n = {seeds} at least "
        f"{least})",
    )


@pytest.mark.parametrize(
    ("seeds", "T", "why"),
    [
        (6, 2, "not after Holm over 2 cells"),
        (3, 5, "by the interval, not by the exact test (p = 0.25; of n = 3 at least 0.25)"),
    ],
)
def test_holm_is_blamed_only_for_what_it_took(tmp_path: Path, seeds: int, T: int, why: str) -> None:
    folders = []
    for name, acc in (("a", 0.9), ("b", 0.95)):
        folder = SuiteFolder(tmp_path / name)
        for seed in range(seeds):
            for t in range(1, T + 1):
                more = seed / 1e4 if name == "b" else 0
                done(folder, replace(SPEC, seed=seed, T=t), acc + more)
        folders.append(write(folder).path)
    found = verdicts(*folders, "test_acc")["test_acc"]
    assert found[0] == "no evidence"
    assert found[1].endswith(why)


def test_infinite_values_are_no_evidence(a: Path, tmp_path: Path) -> None:
    b = results(tmp_path / "b")
    frame = pd.read_csv(b / "runs.csv").assign(step_ms_p50=float("inf"))
    frame.to_csv(b / "runs.csv", index=False)
    assert verdicts(a, b, "step_ms_p50")["step_ms_p50"] == (
        "no evidence", "not every value is finite",
    )  # fmt: skip


def test_one_run_a_side_shows_nothing_but_exact_figures(tmp_path: Path) -> None:
    folders = []
    for name, more in (("a", 0), ("b", 1)):
        folder = SuiteFolder(tmp_path / name)
        done(folder, SPEC, 0.9 + more / 100, saved_bytes=1000 - more, params_train=5000 + more)
        folders.append(write(folder).path)
    found = verdicts(*folders, "test_acc", "saved_bytes", "params_train")
    assert found["test_acc"] == ("no evidence", "one run a side shows nothing")
    assert found["saved_bytes"][0] == "better"
    assert found["params_train"][0] == "worse"


def test_other_weights_are_not_paired(a: Path, tmp_path: Path) -> None:
    b = results(tmp_path / "b", lambda s: {"init_hash": f"new{s}", "acc": 0.8 + s / 1000})
    read = [(p.name, compare.read(str(p), tmp_path)) for p in (a, b)]
    (row,) = compare.compare(read[0], read[1], ["test_acc"]).rows
    assert not row.paired
    assert row.verdict == "worse"


def test_other_machine_leaves_times_and_memory_out_only(a: Path, tmp_path: Path) -> None:
    b = results(tmp_path / "b", lambda s: {"machine": {**MACHINE, "machine_id": "other"}})
    found = verdicts(a, b)
    why = ("not comparable", "other machine_id (cpu-2c-123456 / other)")
    assert {k: v for k, v in found.items() if k in ("peak_bytes", "step_ms_p50", "train_s")} == {
        "peak_bytes": why, "step_ms_p50": why, "train_s": why,
    }  # fmt: skip
    for name in ("energy_to_target_j", "activations_bytes", "wall_s", "backward_share"):
        assert name in compare.OF_A_MACHINE | compare.TIMES
    assert found["test_acc"][0] == found["saved_bytes"][0] == "equal"


@pytest.mark.parametrize(
    ("record", "spec", "words"),
    [
        ({"kernel_path": "native"}, {}, "other kernel (reference / native)"),
        ({"precision_path": "bf16"}, {}, "other precision (fp32 / bf16)"),
        ({"data_hash": "0000"}, {}, "other data_hash (1234567890123456 / 0000)"),
        ({}, {"memory": "smallest"}, "other memory (speed / smallest)"),
        ({}, {"train": TrainConfig(epochs=9)}, "other train.epochs (2 / 9)"),
        ({}, {"neuron": {"decay": 0.9}}, "other neuron.decay (0.5 / 0.9)"),
    ],
)
def test_why_two_cells_cannot_be_compared(
    a: Path, tmp_path: Path, record: dict[str, Any], spec: dict[str, Any], words: str
) -> None:
    b = results(tmp_path / "b", lambda _: record, **spec)
    assert set(verdicts(a, b).values()) == {("not comparable", words)}


def test_an_option_that_a_later_version_added_is_no_other_setting(a: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    frame = pd.read_csv(a / "runs.csv", dtype="string")
    settings = json.loads(frame["settings"][0])
    del settings["train"]["eval_every"]
    frame = frame.assign(settings=json.dumps(settings), settings_hash="older")
    frame.to_csv(old / "runs.csv", index=False)
    assert {v for v, _ in verdicts(old, a).values()} == {"equal"}


def test_cells_of_one_side_only_and_figures_of_one_side_only(a: Path, tmp_path: Path) -> None:
    b = results(tmp_path / "b", lambda _: {"peak_bytes": None, "nulls": {"peak_bytes": "no"}})
    done(SuiteFolder(b), tet(0.05, 4, 0), 0.9)
    write(SuiteFolder(b))
    read = [(p.name, compare.read(str(p), tmp_path)) for p in (a, b)]
    rows = compare.compare(read[0], read[1], ["test_acc", "peak_bytes"]).rows
    assert [(r.label, r.figure, r.why) for r in rows if r.why] == [
        ("bptt", "peak_bytes", "not measured in B"),
        ("tet", "test_acc", "only in B"),
        ("tet", "peak_bytes", "only in B"),
    ]


def test_a_time_within_the_drift_of_sessions_is_no_evidence(a: Path, tmp_path: Path) -> None:
    near = results(tmp_path / "near", lambda s: {"step_ms_p50": 2.7 + s / 1000})
    far = results(tmp_path / "far", lambda s: {"step_ms_p50": 3.0 + s / 1000})
    assert verdicts(a, near, "step_ms_p50")["step_ms_p50"] == (
        "no evidence", "within the 10% that two sessions differ by",
    )  # fmt: skip
    assert verdicts(a, far, "step_ms_p50")["step_ms_p50"][0] == "worse"


def test_runs_that_shared_their_device_leave_times_out(a: Path, tmp_path: Path) -> None:
    b = results(tmp_path / "b", lambda s: {"parallel_jobs": 2, "step_ms_p50": 9.0})
    alone = results(tmp_path / "alone", lambda s: {"parallel_jobs": 1})
    found = verdicts(alone, b, "step_ms_p50", "test_acc")
    assert found["step_ms_p50"] == ("not comparable", "other parallel_jobs (1 / 2)")
    assert found["test_acc"][0] == "equal"
    frame = pd.read_csv(b / "runs.csv", dtype=str)
    frame.drop(columns="parallel_jobs").to_csv(b / "runs.csv", index=False)  # an earlier version
    assert verdicts(alone, b, "step_ms_p50")["step_ms_p50"][0] == "worse"


def test_failed_runs_are_not_compared(a: Path, tmp_path: Path) -> None:
    folder = SuiteFolder(tmp_path / "b")
    ended(folder, SPEC, "failed", HOSTILE)
    assert set(verdicts(a, write(folder).path).values()) == {("not comparable", "only in A")}


def test_unknown_figure(a: Path) -> None:
    with pytest.raises(UsageError, match="--columns nix"):
        verdicts(a, a, "nix")


# --- where results come from ------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in whose first revision the accuracy was lower."""
    root = tmp_path / "repository"
    table = SuiteFolder(root / "results" / "mine")
    monkeypatch.chdir(tmp_path)
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for acc in (0.5, 0.9):
        for seed in range(SEEDS):
            run = table.run(replace(SPEC, seed=seed).run_id)
            table.set_aside(run)
            done(
                table,
                replace(SPEC, seed=seed),
                acc + seed % 3 / 1000 + (seed % 2) * (acc - 0.5) / 100,
            )
        write(table)
        for words in (
            ["init", "-q"],
            ["add", "results/mine/runs.csv"],
            ["commit", "-q", "-m", "x"],
        ):
            subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)
    monkeypatch.chdir(root)
    return root


def test_a_revision_of_a_committed_table(repository: Path, bench: Bench) -> None:
    (repository / "deep").mkdir()
    for name in ("HEAD~1:results/mine", "HEAD~1:results/mine/", "HEAD~1:results/mine/runs.csv"):
        assert compare.read(name, Path("results"))["test_acc"].mean() < 0.51
    found = bench.run("compare", "HEAD~1:results/mine", "mine", "--columns", "last", "--json")
    (row,) = json.loads(found.stdout)["rows"]
    assert row["verdict"] == "better"
    assert row["difference"]["mean"] == pytest.approx(0.402)


@pytest.mark.parametrize(
    "name", ["HEAD~9:results/mine", "HEAD:nowhere", "no-such-suite", "-c:x", "HEAD:", ":x"]
)
def test_what_is_no_result_is_one_clear_line(repository: Path, name: str) -> None:
    with pytest.raises(ResultsError) as caught:
        compare.read(name, Path("results"))
    assert len(str(caught.value).splitlines()) == 1


def test_command_in_every_format(a: Path, tmp_path: Path, bench: Bench) -> None:
    b = results(tmp_path / "b", lambda s: {"acc": 0.8 + s / 1000})
    shown = bench.run("compare", a, b)
    assert shown.returncode == 0, shown.stderr
    assert "last" in shown.stdout
    assert "worse" in shown.stdout
    assert "1 worse, 6 equal" in shown.stderr
    out = tmp_path / "x.md"
    assert bench.run("compare", a, b, "--format", "md", "-o", out).returncode == 0
    table = [line for line in out.read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 2 + 7
    refused = bench.run("compare", a, b, "--format", "html")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1


def test_a_filter_that_no_run_fits_is_one_clear_line(a: Path, bench: Bench) -> None:
    found = bench.run("compare", a, a, "--where", "T=99")
    assert found.returncode == 2
    assert found.stderr == f"error: --where T=99: no run fits, of {SEEDS}\n"


def test_only_some_runs(a: Path, bench: Bench) -> None:
    found = bench.run("compare", a, a, "--where", "seed=0,seed=1", "--columns", "last", "--json")
    (row,) = json.loads(found.stdout)["rows"]
    assert row["a"]["n"] == 2
