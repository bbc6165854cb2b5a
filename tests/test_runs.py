"""`snnbench run` and what follows it, from end to end with real processes."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Bench, cells, events, rows, without_timing, write_suite

from snnbench.errors import ExitCode
from snnbench.spec import RunSpec

METHODS = ["bptt", "tet", "shortcut", "rate", "grad_scale"]
MEASURED = [
    "epochs", "test_acc", "test_acc_best_val", "test_acc_best_test", "spikes_per_sample",
    "firing_rate", "sops_per_sample", "macs_per_sample", "step_ms_p50", "step_ms_p25",
    "step_ms_p75", "train_s", "saved_bytes", "params_train", "params_infer", "steps_timed",
    "best_val_epoch", "eval_s", "measure_s", "wall_s", "overhead_s", "T", "seed", "schema",
]  # fmt: skip
NAMED = [
    "run_id", "suite", "dataset", "model", "method", "method_config", "kernel", "precision",
    "init_hash", "order_hash", "data_hash", "machine_id", "source_hash", "version", "settings",
    "settings_hash", "kernel_path", "device", "torch",
]  # fmt: skip
Ended = subprocess.CompletedProcess[str]


@dataclass
class Done:
    """One suite of five methods and two seeds, run in two folders."""

    suite: Path
    first: Path
    second: Path
    ended: tuple[Ended, Ended]

    def copy(self, target: Path) -> Path:
        """A copy of the first results that a test may change; its folder of all results."""
        shutil.copytree(self.first, target / "results" / "tiny")
        return target / "results"


@pytest.fixture(scope="module")
def done(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Done:
    root = tmp_path_factory.mktemp("runs")
    suite = write_suite(root / "tiny.toml", METHODS, seeds="[0, 1]")
    first = bench.start("run", suite, "--results", root / "first")
    second = bench.start("run", suite, "--results", root / "second", "--quiet")
    ended = bench.wait(first), bench.wait(second)
    return Done(suite, root / "first" / "tiny", root / "second" / "tiny", ended)


def written_at(folder: Path) -> dict[str, int]:
    """When each result was written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("runs/*/result.json")}


def one(values: list[dict[str, str]], **wanted: str) -> dict[str, str]:
    """The only row with these values."""
    (found,) = [row for row in values if all(row[k] == v for k, v in wanted.items())]
    return found


# --- a whole suite ----------------------------------------------------------------------------


def test_every_run_is_done_and_said_so(done):
    ended = done.ended[0]
    assert (ended.returncode, ended.stdout) == (0, "")
    lines = ended.stderr.splitlines()
    assert lines[0].startswith("tiny: 10 runs, 0 done already, 10 to do")
    engine = [line for line in lines[1:-1] if not line.startswith("[")]
    assert engine[0].startswith("cpu, kernel ")
    assert all(line.startswith("warning: a faster kernel is not used: ") for line in engine[1:])
    runs = [line for line in lines if line.startswith("[")]
    assert [line.split()[0] for line in runs] == [f"[{i}/10]" for i in range(1, 11)]
    assert all("done: test" in line for line in runs)
    assert lines[-1].startswith("next: snnbench report tiny --results")
    assert Counter(row["status"] for row in rows(done.first)) == {"done": 10}
    assert {(row["method"], row["seed"]) for row in rows(done.first)} == {
        (method, seed) for method in METHODS for seed in "01"
    }


def test_quiet_says_nothing(done):
    assert (done.ended[1].returncode, done.ended[1].stdout, done.ended[1].stderr) == (0, "", "")


def test_every_metric_of_every_run_is_filled(done):
    for row in rows(done.first):
        assert [k for k in NAMED if not row[k]] == []
        assert all(float(row[k]) >= 0 for k in MEASURED)
        assert float(row["spikes_per_sample"]) > 0
        assert float(row["saved_bytes"]) > 0
        assert bool(row["peak_bytes"]) != ("peak_bytes" in row["null_reasons"])
        assert (row["data_verified"], row["reason"]) == ("True", "")
        assert row["test_acc_best_test"] >= row["test_acc"]
        assert float(row["step_ms_p25"]) <= float(row["step_ms_p50"]) <= float(row["step_ms_p75"])
        assert float(row["wall_s"]) >= float(row["train_s"]) + float(row["eval_s"])


def test_every_epoch_has_a_row(done):
    table = rows(done.first, "epochs.csv")
    assert len(table) == 20
    for row in rows(done.first):
        mine = [epoch for epoch in table if epoch["run_id"] == row["run_id"]]
        assert [epoch["epoch"] for epoch in mine] == ["1", "2"]
        unmeasured = {"energy_j", "spikes_per_sample"}  # no counter, perhaps; no target
        assert all(value for epoch in mine for k, value in epoch.items() if k not in unmeasured)
        assert mine[-1]["test_acc"] == row["test_acc"]
        assert max(float(epoch["test_acc"]) for epoch in mine) == float(row["test_acc_best_test"])


def test_spec_result_events_and_table_agree(done):
    for row in rows(done.first):
        folder = done.first / "runs" / row["run_id"]
        spec = json.loads((folder / "spec.json").read_text())
        result = json.loads((folder / "result.json").read_text())
        assert RunSpec.from_json(spec).run_id == result["run_id"] == row["run_id"]
        assert RunSpec.from_json(result["spec"]) == RunSpec.from_json(spec)
        for key in ("method", "dataset", "model"):
            assert spec[key] == row[key] == result["components"][key]["name"]
        for key in MEASURED:
            if key in result:
                assert float(row[key]) == pytest.approx(result[key])
        logged = [e for e in events(done.first, row["run_id"]) if e["event"] == "epoch"]
        assert logged == result["history"]
        assert [e["event"] for e in events(done.first, row["run_id"])] == [
            "start", "epoch", "epoch", "exit",
        ]  # fmt: skip
        assert result["machine"]["machine_id"] == row["machine_id"]


def test_methods_of_a_seed_are_paired(done):
    for name in ("init_hash", "order_hash"):
        by_seed = {
            seed: {row[name] for row in rows(done.first) if row["seed"] == seed} for seed in "01"
        }
        assert [len(values) for values in by_seed.values()] == [1, 1]
        assert by_seed["0"] != by_seed["1"]
    assert len({row["data_hash"] for row in rows(done.first)}) == 1


def test_the_methods_differ(done):
    spikes = {row["method"]: row["spikes_per_sample"] for row in rows(done.first)}
    assert len(set(spikes.values())) == len(METHODS)


def test_the_same_suite_gives_the_same_results(done):
    assert cells(done.first) == cells(done.second)
    assert len(cells(done.first)["results"]) == 10


def test_what_is_done_is_not_done_again(bench, done):
    before = written_at(done.first)
    again = bench.run("run", done.suite, "--results", done.first.parent)
    assert again.returncode == 0
    assert "10 done already, 0 to do" in again.stderr
    assert written_at(done.first) == before


def test_a_lost_table_is_written_again(bench, done, tmp_path):
    results = done.copy(tmp_path)
    for name in ("runs.csv", "epochs.csv"):
        (results / "tiny" / name).unlink()
    assert bench.run("run", done.suite, "--results", results).returncode == 0
    assert cells(results / "tiny") == cells(done.first)


def test_a_damaged_spec_takes_no_row_out_of_the_table(bench, done, tmp_path):
    results = done.copy(tmp_path)
    damaged = next((results / "tiny" / "runs").iterdir())
    (damaged / "spec.json").write_text('{"dataset": "dig')
    ended = bench.run("run", done.suite, "--results", results)
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr
    assert [row["run_id"] for row in cells(results / "tiny")["runs"]] == [
        row["run_id"] for row in rows(done.first)
    ]
    assert cells(results / "tiny") == cells(done.first)


# --- afterwards -------------------------------------------------------------------------------


def test_plan_as_json(bench, done):
    ended = bench.run("plan", done.suite, "--results", done.first.parent, "--json")
    plan = json.loads(ended.stdout)
    assert (plan["suite"], plan["todo"], plan["estimate_s"]) == ("tiny", 0, 0)
    assert [run["status"] for run in plan["runs"]] == ["done"] * 10
    assert {run["run_id"] for run in plan["runs"]} == {row["run_id"] for row in rows(done.first)}


def test_plan_estimates_more_seeds_from_those_done(bench, done):
    more = ("--set", "axes.seed=[0,1,2]")
    ended = bench.run("plan", done.suite, "--results", done.first.parent, "--json", *more)
    plan = json.loads(ended.stdout)
    assert plan["todo"] == 5
    assert [run["seed"] for run in plan["runs"] if run["todo"]] == [2] * 5
    assert all(run["estimate_s"] > 0 for run in plan["runs"] if run["todo"])


def test_report_in_every_format(bench, done):
    begun = {
        name: bench.start("report", done.first, "--format", name)
        for name in ("md", "csv", "json", "terminal")
    }
    reports = {name: bench.wait(process) for name, process in begun.items()}
    assert [r.returncode for r in reports.values()] == [0] * 4
    for name, ended in reports.items():
        plain = ended.stdout.replace("\\_", "_")  # as Markdown writes it
        assert [m for m in METHODS if m not in plain] == [], name
        assert "Traceback" not in ended.stderr
    json.loads(reports["json"].stdout)
    assert len(list(csv.DictReader(io.StringIO(reports["csv"].stdout)))) >= len(METHODS)
    assert [line for line in reports["md"].stdout.splitlines() if line.startswith("| bptt")]


def test_show_a_run_by_the_beginning_of_its_id(bench, done):
    row = one(rows(done.first), method="rate", seed="1")
    ended = bench.run("show", row["run_id"][:-4], "--results", done.first.parent, "--json")
    shown = json.loads(ended.stdout)
    assert (shown["run_id"], shown["status"]) == (row["run_id"], "done")
    assert shown["result"]["test_acc"] == pytest.approx(float(row["test_acc"]))
    assert len(shown["epochs"]) == 2


# --- choices and outcomes ---------------------------------------------------------------------


@dataclass
class Choices:
    """Three commands that ran at the same time in folders of their own."""

    redo: Ended
    redo_folder: Path
    timeout: Ended
    timeout_folder: Path
    outcome_suite: Path
    outcome: Ended
    outcome_folder: Path


@pytest.fixture(scope="module")
def choices(bench: Bench, done: Done, tmp_path_factory: pytest.TempPathFactory) -> Choices:
    root = tmp_path_factory.mktemp("choices")
    again = done.copy(root)
    redo = bench.start(
        "run", done.suite, "--results", again, "--redo", "--only", "method=tet,seed=1"
    )
    timeout = bench.start(
        "run", done.suite, "--results", root / "timeout", "--set", "train.timeout_s=0.05",
        "--only", "method=bptt", "--only", "seed=0",
    )  # fmt: skip
    suite = write_suite(
        root / "outcomes.toml", ["shortcut", "bptt", "tet"], model="mlp", options="depth = 1"
    )
    outcome = bench.start(
        "run", suite, "--results", root / "outcomes", "--set", "train.lr=1e38", "--fail-fast"
    )
    return Choices(
        bench.wait(redo), again / "tiny",
        bench.wait(timeout), root / "timeout" / "tiny",
        suite, bench.wait(outcome), root / "outcomes" / "tiny",
    )  # fmt: skip


def test_redo_does_the_chosen_run_again_and_keeps_the_old(done, choices):
    assert choices.redo.returncode == 0
    run_id = one(rows(done.first), method="tet", seed="1")["run_id"]
    before, after = written_at(done.first), written_at(choices.redo_folder)
    assert {name for name in before if before[name] != after[name]} == {run_id}
    (kept,) = (choices.redo_folder / "redone").iterdir()
    assert kept.name.startswith(run_id)
    old = (kept / "result.json").read_text()
    assert old == (done.first / "runs" / run_id / "result.json").read_text()
    assert cells(choices.redo_folder) == cells(done.first)


def test_a_run_that_takes_too_long_is_a_timeout(choices):
    assert choices.timeout.returncode == ExitCode.RUNS_FAILED
    (row,) = rows(choices.timeout_folder)  # one run only: --only twice means both
    assert (row["status"], row["method"], row["seed"]) == ("timeout", "bptt", "0")
    assert row["reason"] == "longer than train.timeout_s = 0.05 s"
    assert row["test_acc"] == ""
    assert "--retry-failed" in choices.timeout.stderr.splitlines()[-1]


def test_a_combination_without_sense_is_skipped_with_its_reason(choices):
    row = one(rows(choices.outcome_folder), method="shortcut")
    assert row["status"] == "skipped"
    assert "to attach a head to" in row["reason"]


def test_a_diverged_run_has_a_reason_and_ends_a_fail_fast_suite(choices):
    assert choices.outcome.returncode == ExitCode.RUNS_FAILED
    table = rows(choices.outcome_folder)
    assert {row["method"]: row["status"] for row in table} == {
        "shortcut": "skipped",
        "bptt": "diverged",
    }  # and tet was not begun
    row = one(table, method="bptt")
    assert "step" in row["reason"]
    assert "loss" in row["reason"]
    assert row["test_acc"] == row["spikes_per_sample"] == ""  # null, never 0


def test_failures_are_reported_and_retried_on_demand(bench, choices, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(choices.outcome_folder, results / "tiny")
    report = bench.run("report", results / "tiny", "--format", "md")
    assert report.returncode == 0
    assert "to attach a head to" in report.stdout
    assert "diverged" in report.stdout

    command = ("run", choices.outcome_suite, "--results", results, "--set", "train.lr=1e38")
    retried = bench.run(*command, "--retry-failed", "--json")
    assert retried.returncode == ExitCode.RUNS_FAILED
    assert json.loads(retried.stdout)["runs"] == {"diverged": 2}
    (kept,) = (results / "tiny" / "redone").iterdir()
    assert "-bptt-" in kept.name

    before = written_at(results / "tiny")
    again = bench.run(*command)
    assert "1 done already, 2 failed (--retry-failed does them again), 0 to do" in again.stderr
    assert again.returncode == ExitCode.RUNS_FAILED
    assert written_at(results / "tiny") == before


def test_only_that_fits_no_run_is_a_mistake(bench, done):
    ended = bench.run("run", done.suite, "--results", done.first.parent, "--only", "T=99")
    assert ended.returncode == ExitCode.USAGE
    assert len(ended.stderr.splitlines()) == 1


def test_settings_make_other_runs(bench, done):
    ended = bench.run(
        "plan", done.suite, "--results", done.first.parent, "--json", "--set", "train.epochs=1"
    )
    plan = json.loads(ended.stdout)
    assert plan["todo"] == 10
    assert not {run["run_id"] for run in plan["runs"]} & written_at(done.first).keys()


def test_timing_is_left_out_of_comparisons_at_every_depth():
    assert without_timing({"a": [{"train_s": 1, "b": 2}], "wall_s": 3}) == {"a": [{"b": 2}]}
