"""The gate: it must stop what was planted, and let noise pass."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Bench, write_suite
from records import HOSTILE, SPEC, done, ended, tet, write

from snnbench.errors import ResultsError, UsageError
from snnbench.report import gate
from snnbench.report.gate import Limit, Yardstick
from snnbench.store import SuiteFolder
from snnbench.tables import read_runs

ROOT = Path(__file__).parents[1]
YARDSTICK = Yardstick("bptt", "reference")
Change = Callable[[dict[str, Any]], dict[str, Any]]


def results(path: Path, change: Change = lambda record: record) -> SuiteFolder:
    """bptt and tet, two seeds, on two kernels; `change` is given each record and its figures."""
    folder = SuiteFolder(path)
    for seed in (0, 1):
        for kernel, ms in (("auto", 2.0), ("reference", 4.0)):
            for spec in (replace(SPEC, seed=seed), tet(0.05, 4, seed)):
                record = {"acc": 0.9 + seed / 100, "step_ms_p50": ms * (1 + 0.1 * seed),
                          "kernel_path": "native" if kernel == "auto" else kernel,
                          "method": spec.method, "kernel": kernel, "seed": seed}  # fmt: skip
                record = change(record)
                for name in ("method", "kernel", "seed"):
                    record.pop(name)
                done(folder, replace(spec, kernel=kernel), **record)
    return write(folder)


@pytest.fixture
def baseline(tmp_path: Path) -> gate.Baseline:
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps(gate.of(results(tmp_path / "was"), "made", YARDSTICK)))
    return gate.read(file)


def failures(folder: SuiteFolder, baseline: gate.Baseline) -> list[tuple[str, str]]:
    return [(c.figure, c.why) for c in gate.check(folder, baseline).failed]


def test_the_same_results_pass_every_check(tmp_path: Path, baseline: gate.Baseline) -> None:
    verdict = gate.check(results(tmp_path / "now"), baseline)
    assert verdict.failed == []
    assert verdict.notes == []
    assert len(verdict.checks) == 4 * len(gate.DEFAULT_LIMITS)
    ratios = {c.cell: c.was for c in verdict.checks if c.figure == gate.RATIO}
    assert ratios == {
        "bptt convnet T=4 auto": pytest.approx(0.5), "bptt convnet T=4 reference": 1.0,
        "tet convnet T=4 auto": pytest.approx(0.5), "tet convnet T=4 reference": 1.0,
    }  # fmt: skip


def test_noise_passes(tmp_path: Path, baseline: gate.Baseline) -> None:
    rng = np.random.default_rng(2)

    def noisy(record: dict[str, Any]) -> dict[str, Any]:
        return record | {"acc": record["acc"] + rng.uniform(-0.02, 0.02),
                         "spikes_per_sample": 1234.5 * rng.uniform(0.95, 1.05),
                         "step_ms_p50": record["step_ms_p50"] * rng.uniform(0.9, 1.1)}  # fmt: skip

    for n in range(10):
        assert failures(results(tmp_path / str(n), noisy), baseline) == []


def test_a_slower_machine_passes(tmp_path: Path, baseline: gate.Baseline) -> None:
    slower = results(tmp_path / "now", lambda r: r | {"step_ms_p50": 7 * r["step_ms_p50"]})
    assert failures(slower, baseline) == []


PLANTED: dict[str, tuple[Change, set[str]]] = {
    "accuracy drop": (
        lambda r: r | ({"acc": r["acc"] - 0.05} if r["method"] == "tet" else {}), {"test_acc"}
    ),
    "memory increase of one byte": (
        lambda r: r | {"saved_bytes": 3 * 2**19 + 1}, {"saved_bytes"}
    ),
    "twice the spikes": (lambda r: r | {"spikes_per_sample": 2469.0}, {"spikes_per_sample"}),
    "half the spikes": (lambda r: r | {"spikes_per_sample": 617.0}, {"spikes_per_sample"}),
    "slower engine": (
        lambda r: r | ({"step_ms_p50": 4.0} if r["kernel"] == "auto" else {}), {"step_ratio"}
    ),
    "slower method": (
        lambda r: r | ({"step_ms_p50": 9.0} if r["method"] == "tet" else {}), {"step_ratio"}
    ),
    "more parameters": (lambda r: r | {"params_train": 5001}, {"params_train"}),
    "a figure that is not measured any more": (
        lambda r: r | {"saved_bytes": None, "nulls": {"saved_bytes": "broken"}}, {"saved_bytes"}
    ),
    "fallen back to another kernel": (lambda r: r | {"kernel_path": "reference"}, {"kernel"}),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_what_was_planted_is_stopped(tmp_path: Path, baseline: gate.Baseline, what: str) -> None:
    change, figures = PLANTED[what]
    found = failures(results(tmp_path / "now", change), baseline)
    assert {figure for figure, _ in found} == figures


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-inf"])
@pytest.mark.parametrize("table", ["runs.csv", "epochs.csv"])
def test_a_planted_value_that_is_not_finite_is_stopped(
    tmp_path: Path, baseline: gate.Baseline, text: str, table: str
) -> None:
    folder = results(tmp_path / "now")
    column = "firing_rate" if table == "runs.csv" else "train_loss"
    frame = pd.read_csv(folder.path / table, dtype=str, keep_default_na=False)
    frame.loc[1, column] = text
    frame.to_csv(folder.path / table, index=False)
    found = failures(folder, baseline)
    assert len(found) == 1
    assert found[0][0] == column
    assert f"{column} is {text}" in found[0][1]


def test_a_target_that_was_missed_is_no_fault(tmp_path: Path, baseline: gate.Baseline) -> None:
    folder = results(tmp_path / "now")
    frame = pd.read_csv(folder.runs_csv, dtype=str, keep_default_na=False)
    # The names of measurements of a target end in their unit or in the target itself.
    for name in ("time_to_target_s", "epochs_to_target"):
        frame[name] = "inf"
    frame.to_csv(folder.runs_csv, index=False)
    assert failures(folder, baseline) == []


@pytest.mark.parametrize("status", ["failed", "oom", "timeout", "diverged"])
def test_a_run_that_fails_is_stopped_with_its_reason(
    tmp_path: Path, baseline: gate.Baseline, status: str
) -> None:
    folder = results(tmp_path / "now")
    run = folder.run(replace(SPEC, seed=1).run_id)
    folder.set_aside(run)
    ended(folder, replace(SPEC, seed=1), status, "for some reason")
    found = failures(write(folder), baseline)
    assert ("status", f"{status}: for some reason") in found
    assert ("runs", "no figures of seed 1") in found


def test_a_missing_cell_and_a_missing_seed_are_stopped(
    tmp_path: Path, baseline: gate.Baseline
) -> None:
    folder = results(tmp_path / "now")
    frame = read_runs(folder)
    frame[(frame["method"] != "tet") & (frame["seed"] == 0)].to_csv(folder.runs_csv, index=False)
    found = failures(folder, baseline)
    assert (
        found == [("runs", "no figures of seed 1")] * 2 + [("runs", "no figures of seed 0, 1")] * 2
    )
    frame.iloc[:0].to_csv(folder.runs_csv, index=False)
    assert len(failures(folder, baseline)) == 4


def test_what_the_baseline_does_not_know_is_said(tmp_path: Path, baseline: gate.Baseline) -> None:
    folder = results(tmp_path / "now")
    done(folder, replace(SPEC, method="rate"), 0.9)
    verdict = gate.check(write(folder), baseline)
    assert verdict.failed == []
    assert verdict.notes == ["not in the baseline, and not checked: rate convnet auto T=4"]


def test_a_gain_beyond_the_limit_asks_for_an_update(
    tmp_path: Path, baseline: gate.Baseline
) -> None:
    verdict = gate.check(results(tmp_path / "now", lambda r: r | {"saved_bytes": 1000}), baseline)
    assert verdict.failed == []
    assert len(verdict.notes) == 4
    assert all("better than the baseline" in note for note in verdict.notes)


@pytest.mark.parametrize(
    ("limit", "was", "inside", "outside"),
    [
        (Limit(fall=0.02), 0.9, [0.88, 0.95], [0.8799]),
        (Limit(rise_share=0.0), 1000, [1000, 10], [1001]),
        (Limit(rise_share=0.5), 2.0, [3.0, 0.1], [3.01]),
        (Limit(change_share=0.1), 100, [90, 110], [89.9, 110.1]),
        (Limit(change_share=0.0), 0, [0], [1, -1]),
    ],
)
def test_limits_by_hand(
    limit: Limit, was: float, inside: list[float], outside: list[float]
) -> None:
    assert all(limit.holds(was, now) for now in inside)
    assert not any(limit.holds(was, now) for now in outside)


def test_no_baseline_is_made_of_a_failure(tmp_path: Path) -> None:
    folder = results(tmp_path / "now")
    ended(folder, replace(SPEC, seed=7), "failed", "no")
    with pytest.raises(ResultsError, match="is failed"):
        gate.of(write(folder), "made", YARDSTICK)
    with pytest.raises(ResultsError, match="no runs"):
        gate.of(write(SuiteFolder(tmp_path / "empty")), "made", YARDSTICK)


def test_unknown_yardstick(tmp_path: Path) -> None:
    folder = results(tmp_path / "now")
    assert gate.yardstick_of(folder, "bptt") == YARDSTICK
    assert gate.yardstick_of(folder, "tet:auto") == Yardstick("tet", "auto")
    for wanted in ("nix", "bptt:nix"):
        with pytest.raises(UsageError, match="no such runs"):
            gate.yardstick_of(folder, wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema 2; this version reads 1"),
        ({"cells": []}, "cells"),
        ({"limits": {"test_acc": {"fall": 0.1, "rise_share": 0.1}}}, "give one of"),
        ({"limits": {"test_acc": {"fal": 0.1}}}, "unknown key; did you mean 'fall'"),
        ({"limits": {"test_acc": {"fall": -1}}}, "greater than or equal to 0"),
    ],
)
def test_a_bad_baseline_file_is_one_clear_line(
    tmp_path: Path, baseline: gate.Baseline, change: dict[str, Any], words: str
) -> None:
    values = json.loads((tmp_path / "baseline.json").read_text())
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(copy.deepcopy(values) | change))
    with pytest.raises(ResultsError, match=words) as caught:
        gate.read(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\0"])
def test_what_is_no_baseline_file(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "bad.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ResultsError, match=str(file)):
        gate.read(file)


def test_summary_is_short_escaped_markdown(tmp_path: Path, baseline: gate.Baseline) -> None:
    folder = results(tmp_path / "now", PLANTED["accuracy drop"][0])
    ended(folder, replace(SPEC, seed=9), "failed", HOSTILE)
    text = gate.to_markdown(gate.check(write(folder), baseline))
    assert text.startswith("### snnbench gate made FAILED: 3 of ")
    assert "<script>" not in text
    assert "| tet convnet T=4 auto | test\\_acc | 0.905 | 0.855 | -0.03 | -0.05 |" in text
    assert len(text.splitlines()) < 30
    widths = {line.replace(r"\|", "").count("|") for line in text.splitlines()[2:6]}
    assert len(widths) == 1


def test_a_summary_gives_a_change_as_its_limit_does(
    tmp_path: Path, baseline: gate.Baseline
) -> None:
    """The limit of accuracy is a difference; a value that is not finite is no cell of its own."""
    folder = results(tmp_path / "now", lambda r: r | {"acc": r["acc"] - 0.009,
                                                      "spikes_per_sample": 1300.0})  # fmt: skip
    text = gate.to_markdown(gate.check(folder, baseline))
    assert "| test\\_acc | 4 | -0.009 | -0.03 |" in text
    assert "| spikes\\_per\\_sample | 4 | +5.31% | ±15% |" in text
    frame = pd.read_csv(folder.runs_csv, dtype=str, keep_default_na=False)
    frame.loc[1, "test_acc"] = "inf"
    frame.to_csv(folder.runs_csv, index=False)
    text = gate.to_markdown(gate.check(folder, baseline))
    assert "| test\\_acc | 4 | not finite | -0.03 |" in text


@pytest.mark.parametrize("figure", ["firing_rate", "sops_per_sample", "peak_bytes"])
def test_a_figure_without_a_limit_may_change_but_not_vanish(
    tmp_path: Path, baseline: gate.Baseline, figure: str
) -> None:
    assert figure not in baseline.limits
    changed = results(tmp_path / "changed", lambda r: r | {figure: 17})
    assert failures(changed, baseline) == []
    lost = results(
        tmp_path / "lost", lambda r: r | ({figure: None} if r["method"] == "tet" else {})
    )
    assert failures(lost, baseline) == [(figure, "not measured any more")] * 2


def test_a_baseline_of_an_earlier_version_asks_for_its_limits_only(tmp_path: Path) -> None:
    values = gate.of(results(tmp_path / "was"), "made", YARDSTICK)
    for cell in values["cells"]:
        del cell["measured"]
    file = tmp_path / "old.json"
    file.write_text(json.dumps(values))
    lost = results(tmp_path / "lost", lambda r: r | {"firing_rate": None})
    assert failures(lost, gate.read(file)) == []


def test_what_only_some_machines_measure_may_be_absent(tmp_path: Path) -> None:
    own = dict.fromkeys(gate.OF_THE_MACHINE, 5.0)
    made = gate.of(results(tmp_path / "was", lambda r: r | own), "made", YARDSTICK)
    assert all(not gate.OF_THE_MACHINE & set(cell["measured"]) for cell in made["cells"])
    assert "firing_rate" in made["cells"][0]["measured"]


def test_nan_in_a_record_is_stopped(tmp_path: Path, baseline: gate.Baseline) -> None:
    """It is written as nan, not as the empty cell of what was not measured."""
    folder = results(tmp_path / "now", lambda r: r | {"firing_rate": 0.5})
    run = folder.run(replace(SPEC, kernel="reference").run_id)
    record = json.loads((run.path / "result.json").read_text())
    record["firing_rate"] = float("nan")
    (run.path / "result.json").write_text(json.dumps(record))
    (line,) = failures(write(folder), baseline)
    assert line == ("firing_rate", "firing_rate is nan")
    found = read_runs(folder)["firing_rate"]
    assert found.isna().sum() == 1  # and a column of numbers still
    assert pd.api.types.is_float_dtype(found)
    row = folder.runs_csv.read_text().splitlines()[1:]
    assert sum(",nan," in line for line in row) == 1


# --- the command ------------------------------------------------------------------------------


def test_command_reads_results_and_its_exit_code_is_the_verdict(
    tmp_path: Path, bench: Bench
) -> None:
    good, bad = results(tmp_path / "made"), results(tmp_path / "bad", PLANTED["accuracy drop"][0])
    file = tmp_path / "baseline.json"
    made = bench.run("gate", "made", "--baseline", file, "--read", good.path, "--update")
    assert made.returncode == 0, made.stderr
    passed = bench.run("gate", "made", "--baseline", file, "--read", good.path)
    assert passed.returncode == 0, passed.stderr
    assert passed.stdout.startswith("### snnbench gate made passed: ")
    summary = tmp_path / "summary.md"
    failed = bench.run("gate", "made", "--baseline", file, "--read", bad.path, "-o", summary)
    assert failed.returncode == 1
    assert "test\\_acc" in summary.read_text()
    assert "2 of " in failed.stderr
    found = bench.run("gate", "made", "--baseline", file, "--read", bad.path, "--json")
    assert json.loads(found.stdout)["ok"] is False
    other = bench.run("gate", "other", "--baseline", file, "--read", good.path)
    assert other.returncode == 2
    assert "a baseline of 'made', not of 'other'" in other.stderr


def test_an_update_keeps_the_limits_that_a_person_set(tmp_path: Path, bench: Bench) -> None:
    folder = results(tmp_path / "made")
    file = tmp_path / "baseline.json"
    values = gate.of(folder, "made", YARDSTICK, {"test_acc": Limit(fall=0.123)})
    file.write_text(json.dumps(values))
    assert bench.run(
        "gate", "made", "--baseline", file, "--read", folder.path, "--update"
    ).returncode == 0  # fmt: skip
    assert gate.read(file).limits == {"test_acc": Limit(fall=0.123)}


def test_a_limit_on_what_the_baseline_does_not_know_fails(tmp_path: Path) -> None:
    """A misspelt figure would else be a limit that nothing ever breaks."""
    folder = results(tmp_path / "made")
    limits = {"test_acc": Limit(fall=0.03), "test_accc": Limit(fall=0.03)}
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps(gate.of(folder, "made", YARDSTICK, limits)))
    (failed,) = gate.check(folder, gate.read(file)).failed
    assert failed.figure == "test_accc"
    assert "misspelt" in failed.why


def test_results_are_those_of_the_suite_by_its_name(tmp_path: Path, bench: Bench) -> None:
    """The file may be called otherwise, as those below papers/ are."""
    folder = results(tmp_path / "made")
    suite = tmp_path / "other.toml"
    suite.write_text('name = "made"')
    file = tmp_path / "baseline.json"
    made = bench.run("gate", suite, "--baseline", file, "--read", folder.path, "--update")
    assert made.returncode == 0, made.stderr
    assert gate.read(file).suite == "made"


@pytest.mark.slow
def test_command_runs_a_suite_afresh(tmp_path: Path, bench: Bench) -> None:
    suite = write_suite(tmp_path / "tiny.toml", ["bptt", "tet"], epochs=1)
    file = tmp_path / "baseline.json"
    made = bench.run("gate", suite, "--baseline", file, "--update")
    assert made.returncode == 0, made.stderr
    values = json.loads(file.read_text())
    values["limits"].pop("step_ratio")  # one seed of a few milliseconds
    values["cells"][1]["figures"]["saved_bytes"] -= 1  # as if it had grown by one byte
    file.write_text(json.dumps(values))
    judged = bench.run("gate", suite, "--baseline", file, "--json")
    assert judged.returncode == 1, judged.stderr
    checks = json.loads(judged.stdout)["checks"]
    assert len(checks) == 2 * 5
    (failed,) = [c for c in checks if not c["ok"]]  # nothing else moved by anything
    assert failed["figure"] == "saved_bytes"
    assert failed["now"] == failed["was"] + 1


def test_the_committed_baseline_is_of_the_committed_suite() -> None:
    """It fits the suite as it is, so that CI cannot pass by looking at nothing."""
    from snnbench import planner

    baseline = gate.read(ROOT / "suites" / "gate-baseline.json")
    suite, specs = planner.specs_of(str(ROOT / "suites" / "gate.toml"))
    assert baseline.suite == suite.name
    wanted = {
        (s.dataset, s.model, str(s.T), s.kernel, s.precision, s.memory, s.method) for s in specs
    }
    assert {cell.key[:-1] for cell in baseline.cells} == wanted
    assert {seed for cell in baseline.cells for seed in cell.seeds} == set(suite.axes.seed)
    assert set(baseline.limits) == set(gate.DEFAULT_LIMITS)
    assert all(c.figures["saved_bytes"] for c in baseline.cells)
