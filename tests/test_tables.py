"""Run folders -> tables -> summary -> report, with numbers that were worked out by hand.

The golden files are written anew by `SNNBENCH_UPDATE_GOLDEN=1 pytest tests/test_tables.py`; read
the difference before keeping it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import HOSTILE, MACHINE, SPEC, add, done, ended, measured, tet, write

from snnbench import stats, summary
from snnbench.errors import ResultsError
from snnbench.report import columns, content, data, latex, markdown
from snnbench.spec import TrainConfig
from snnbench.stats import Estimate
from snnbench.store import SuiteFolder
from snnbench.summary import Cell, summarise
from snnbench.tables import RUN_COLUMNS, Writer, read_runs

GOLDEN = Path(__file__).parent / "golden"
CONTRACT = [
    "run_id", "suite", "status", "reason", "dataset", "model", "method", "method_config", "T",
    "seed", "kernel", "precision", "epochs", "test_acc", "test_acc_best_val", "test_acc_best_test",
    "spikes_per_sample", "firing_rate", "sops_per_sample", "macs_per_sample", "step_ms_p50",
    "step_ms_p25", "step_ms_p75", "train_s", "peak_bytes", "saved_bytes", "params_train",
    "params_infer", "init_hash", "order_hash", "data_hash", "data_verified", "machine_id",
    "source_hash", "version", "schema",
]  # fmt: skip
T_3 = 4.302653  # 97.5% quantile of Student's t with 2 degrees of freedom
T_2 = 12.706205  # ... with 1


def rows(folder: SuiteFolder) -> list[dict[str, str]]:
    """runs.csv as text, not through pandas."""
    return list(csv.DictReader(io.StringIO(folder.runs_csv.read_text("utf-8"))))


@pytest.fixture
def empty(tmp_path: Path) -> SuiteFolder:
    return SuiteFolder(tmp_path / "results" / "made")


@pytest.fixture
def made(empty: SuiteFolder) -> SuiteFolder:
    """Every status, two T, two variants of one method, null figures and hostile reasons."""
    for seed, acc in enumerate((0.90, 0.92, 0.94)):
        done(empty, replace(SPEC, seed=seed), acc)
        done(empty, tet(0.05, 4, seed), acc + (0.01, 0.02, 0.03)[seed])
    done(empty, tet(0.5, 4, 3), 0.5, init_hash="another", source_hash="0000000000000002")
    done(empty, replace(SPEC, T=2), 0.8, data_verified=False)
    nulls = {"peak_bytes": "no /proc here", "sops_per_sample": "inputs are not binary"}
    rate = replace(SPEC, method="rate", T=2, method_config={"loss_scale": "1/T"})
    done(empty, rate, 0.7, **dict.fromkeys(nulls), nulls=nulls)
    scale = replace(SPEC, method="grad_scale", method_config={"alpha": 0.5})
    ended(empty, scale, "failed", HOSTILE)
    ended(empty, replace(scale, seed=1), "oom", 'CUDA out of memory, at 1,024 MiB; "quoted"')
    ended(empty, replace(scale, seed=2), "timeout", "longer than train.timeout_s = 5 s")
    ended(empty, replace(scale, seed=3), "diverged", "the loss is nan in epoch 2")
    ended(empty, replace(scale, seed=4), "skipped", "tf32 needs a CUDA device")
    shortcut = replace(SPEC, method="shortcut")
    killed = add(empty, shortcut)
    killed.append({"event": "epoch", "epoch": 1, "lr": 0.1, "train_loss": 2.0, "test_acc": 0.3})
    killed.append({"event": "interrupted", "reason": "asked to stop", "time": 0.0})
    empty.run(replace(shortcut, seed=1).run_id).create(replace(shortcut, seed=1))
    empty.write_plan(
        {
            "schema": 1,
            "suite": {"name": "made", "claim": "A <b>claim</b> | with `marks`."},
            "runs": [*(r.run_id for r in empty.runs()), "never-begun"],
        }
    )
    return write(empty)


def cell(cells: list[Cell], label: str, T: int = 4) -> Cell:
    (found,) = [c for c in cells if c.label == label and c.conditions["T"] == T]
    return found


def gap(found: Cell) -> Estimate:
    """The difference to the baseline, which must be there."""
    assert found.versus is not None
    return found.versus.difference


def golden(folder: SuiteFolder, name: str, text: str) -> None:
    """Compare with the kept text.

    Hashes are left out: they change with every key that a spec gains.  Columns and keys may be
    appended without touching the golden files.
    """
    for row in rows(folder):
        text = text.replace(row["run_id"], row["run_id"][:-8] + "HASH")
        text = text.replace(row["settings_hash"], "HASH")
        text = text.replace(row["settings"].replace('"', '""'), "SETTINGS")
    file = GOLDEN / name
    if os.environ.get("SNNBENCH_UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, "utf-8")
    assert golden_part(text, expected := file.read_text("utf-8"), file.suffix) == golden_part(
        expected, expected, file.suffix
    )


def golden_part(text: str, expected: str, suffix: str) -> Any:
    """What of the text has a place in the expected one."""
    if suffix == ".csv":
        names = next(csv.reader(io.StringIO(expected)))
        return [{k: row[k] for k in names} for row in csv.DictReader(io.StringIO(text))]
    if suffix == ".json":
        names = json.loads(expected)["cells"][0]
        document = {k: v for k, v in json.loads(text).items() if k in json.loads(expected)}
        document["cells"] = [{k: cell[k] for k in names} for cell in document["cells"]]
        return document
    return text


# --- runs.csv and epochs.csv ------------------------------------------------------------------


def test_columns_are_the_contract_and_then_the_appended(made: SuiteFolder) -> None:
    header = made.runs_csv.read_text("utf-8").splitlines()[0].split(",")
    assert header[: len(CONTRACT)] == CONTRACT
    assert header == list(RUN_COLUMNS)
    old = (GOLDEN / "runs.csv").read_text("utf-8").splitlines()[0].split(",")
    assert header[: len(old)] == old
    assert len(set(header)) == len(header)


def test_runs_csv_is_golden(made: SuiteFolder) -> None:
    golden(made, "runs.csv", made.runs_csv.read_text("utf-8"))


def test_epochs_csv_is_golden(made: SuiteFolder) -> None:
    golden(made, "epochs.csv", made.epochs_csv.read_text("utf-8"))


def test_one_row_per_run_with_its_status_and_reason(made: SuiteFolder) -> None:
    found = {r["run_id"]: r for r in rows(made)}
    assert set(found) == {r.run_id for r in made.runs()}
    for run in made.runs():
        assert found[run.run_id]["status"] == run.status()
    by_status = {r["status"]: r["reason"] for r in found.values()}
    assert by_status["failed"] == HOSTILE
    assert by_status["interrupted"] == "asked to stop"
    assert by_status["missing"] == ""


def test_what_was_not_measured_is_empty_and_never_0(made: SuiteFolder) -> None:
    (row,) = [r for r in rows(made) if r["method"] == "rate"]
    assert row["peak_bytes"] == row["sops_per_sample"] == ""
    assert "inputs are not binary" in row["null_reasons"]
    for row in rows(made):
        if row["status"] != "done":
            assert row["test_acc"] == row["peak_bytes"] == row["data_verified"] == ""


def test_integers_and_truth_stay_what_they_are_beside_empty_cells(made: SuiteFolder) -> None:
    for row in rows(made):
        if row["status"] == "done":
            assert row["params_train"] == "5000"
            assert row["epochs"] == "2"
            assert row["data_verified"] == ("False" if row["test_acc"] == "0.8" else "True")


def test_unverified_data_is_said_also_beside_a_run_without_figures(empty: SuiteFolder) -> None:
    done(empty, SPEC, 0.9, data_verified=False)
    ended(empty, replace(SPEC, seed=1), "failed", "no")
    facts = content.build(write(empty)).facts
    assert "data_verified = false: digits is not the official copy" in facts


def test_hashes_that_look_like_numbers_come_back(made: SuiteFolder) -> None:
    frame = read_runs(made)
    assert set(frame["init_hash"].dropna()) == {"12e45670", "12e45671", "12e45672", "another"}
    assert set(frame["order_hash"].dropna()) == {"000", "001", "002", "003"}
    assert set(frame["source_hash"].dropna()) > {"0000000000000001"}


def test_every_figure_comes_back(empty: SuiteFolder) -> None:
    acc = 0.1 + 0.2
    done(empty, SPEC, acc)
    row = read_runs(write(empty)).iloc[0]
    result = measured(SPEC, acc)
    for name in set(CONTRACT) & set(result) - {"reason"}:
        assert row[name] == result[name], name
    assert row["overhead_s"] == 2.0 - 1.5 - 0.25 - 0.125


def test_tables_are_the_same_whether_made_step_by_step_or_at_once(empty: SuiteFolder) -> None:
    writer = Writer("made", empty)
    for seed in range(3):
        spec = replace(SPEC, seed=2 - seed)
        row = writer.read(done(empty, spec, 0.5))
        assert row["status"] == "done"
        writer.write()
    texts = [p.read_bytes() for p in (empty.runs_csv, empty.epochs_csv)]
    write(empty)
    assert [p.read_bytes() for p in (empty.runs_csv, empty.epochs_csv)] == texts


def test_damaged_files_of_one_run_do_not_hide_the_others(empty: SuiteFolder) -> None:
    specs = [replace(SPEC, seed=s) for s in range(3)]
    for spec in specs:
        done(empty, spec, 0.5)
    (empty.run(specs[0].run_id).path / "result.json").write_text("{")
    (empty.run(specs[1].run_id).path / "spec.json").write_text("{")
    (empty.run(specs[2].run_id).path / "events.jsonl").write_text('{"event": "exit", "wal')
    found = rows(write(empty))
    assert [(r["seed"], r["status"]) for r in found] == [
        ("0", "missing"),
        ("1", "done"),
        ("2", "done"),
    ]
    assert "not a readable result" in found[0]["reason"]


@pytest.mark.parametrize(
    "event", ['{"event": "exit"}', '{"event": "interrupted"}', '{"event": "exit", "wall_s": null}']
)
def test_event_that_lost_a_key_does_not_crash(empty: SuiteFolder, event: str) -> None:
    run = add(empty, SPEC)
    with (run.path / "events.jsonl").open("a") as file:
        file.write(event + "\n")
    assert [r["status"] for r in rows(write(empty))] == ["interrupted"]


def test_epochs_of_an_unfinished_run_come_from_its_events(made: SuiteFolder) -> None:
    frame = pd.read_csv(made.epochs_csv)
    (row,) = frame[frame["method"] == "shortcut"].to_dict("records")
    assert (row["epoch"], row["test_acc"], row["seed"]) == (1, 0.3, 0)
    assert len(frame) == 9 * 2 + 1


def test_no_runs_at_all(empty: SuiteFolder) -> None:
    assert rows(write(empty)) == []
    assert summarise(read_runs(empty)) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a readable table"),
        ("a,b\n1,2\n", "column 'run_id' is missing"),
        (",".join(c for c in CONTRACT if c != "T") + "\n", "column 'T' is missing"),
        ('a\n1,2,3\n4\n"', "runs.csv: "),
        ("\0", "runs.csv: "),
    ],
)
def test_what_is_no_table(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(ResultsError, match=words) as caught:
        read_runs(SuiteFolder(tmp_path))
    assert "\n" not in str(caught.value)


def test_no_table(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no results yet"):
        read_runs(SuiteFolder(tmp_path))


def test_table_of_an_older_version_has_the_contract_only(made: SuiteFolder) -> None:
    old = pd.read_csv(made.runs_csv, dtype="string")[CONTRACT]
    old.to_csv(made.runs_csv, index=False)
    cells = summarise(read_runs(made))
    assert cell(cells, "bptt").n == 3
    assert cell(cells, "tet lamb=0.05").versus is not None
    assert content.build(made).rows


def test_columns_of_a_newer_version_are_kept(made: SuiteFolder) -> None:
    frame = read_runs(made).assign(energy_j=1.5)
    frame.to_csv(made.runs_csv, index=False)
    assert list(read_runs(made).columns) == [*RUN_COLUMNS, "energy_j"]


# --- intervals --------------------------------------------------------------------------------


def test_interval_of_three() -> None:
    found = stats.estimate([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half == pytest.approx(T_3 / math.sqrt(3), rel=1e-6)


def test_interval_of_two() -> None:
    found = stats.estimate([0.0, 1.0])
    assert found is not None
    assert found.half == pytest.approx(T_2 * math.sqrt(0.5) / math.sqrt(2), rel=1e-6)


def test_no_interval_of_one_and_nothing_of_none() -> None:
    assert stats.estimate([0.7]) == Estimate(0.7, None, 1)
    assert stats.estimate([]) is None
    assert not Estimate(0.7, None, 1).excludes_zero


def test_interval_excludes_zero() -> None:
    assert Estimate(-2.0, 1.9, 3).excludes_zero
    assert not Estimate(2.0, 2.0, 3).excludes_zero
    assert not Estimate(0.0, 0.0, 3).excludes_zero


def test_p_of_two_rivals_is_corrected_by_hand(empty: SuiteFolder) -> None:
    """All six pairs have one sign, so that p is 2/64 twice, and Holm makes it 4/64."""
    for seed in range(6):
        done(empty, replace(SPEC, seed=seed), 0.8)
        for more, lamb in enumerate((0.05, 0.5), 1):
            done(empty, tet(lamb, 4, seed), 0.8 + (more + seed / 10) / 100)
    found = [c.versus for c in summarise(read_runs(write(empty))) if c.versus]
    assert [(v.p, v.p_holm, v.tests, v.p_least) for v in found] == [(1 / 32, 1 / 16, 2, 1 / 16)] * 2
    assert all(v.difference.excludes_zero and not v.shown for v in found)
    built = content.build(empty)
    assert "p" not in built.columns
    assert "not shown: of n = 6 and 2 comparisons the smallest p is 0.062" in built.findings[0]
    assert (
        "With n = 6 the smallest two-sided p of an exact test is 0.062 after Holm over 2 "
        "comparisons: no difference can be shown at 5%; n = 7 can (0.031)."
    ) in built.findings


def test_seven_seeds_of_two_rivals_can_show_something(empty: SuiteFolder) -> None:
    for seed in range(7):
        done(empty, replace(SPEC, seed=seed), 0.8)
        for more, lamb in enumerate((0.05, 0.5), 1):
            done(empty, tet(lamb, 4, seed), 0.8 + (more + seed / 10) / 100)
    built = content.build(write(empty))
    assert "p" in built.columns
    assert "better (exact p = 0.031 after Holm)" in built.findings[0]


def test_reasons_for_what_is_null_stand_in_every_row(made: SuiteFolder) -> None:
    lines = list(csv.DictReader(io.StringIO(data.to_csv(content.build(made)))))
    found = {(r["label"], r["T"]): r["null_reasons"] for r in lines}
    assert json.loads(found.pop(("rate", "2"))) == {
        "peak_bytes": "no /proc here", "sops_per_sample": "inputs are not binary",
    }  # fmt: skip
    assert set(found.values()) == {""}


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.randoms())
def test_interval_does_not_depend_on_the_order(values: list[float], random: Any) -> None:
    turned = list(values)
    random.shuffle(turned)
    assert stats.estimate(values) == stats.estimate(turned)


def test_pairs_are_those_that_both_have() -> None:
    found = stats.differences({"a": 1.0, "b": 3.0, "c": 9.0}, {"b": 1.0, "a": 0.5, "d": 7.0})
    assert found == [0.5, 2.0]
    assert stats.differences({"a": 1.0}, {"b": 1.0}) == []


# --- summary ----------------------------------------------------------------------------------


def test_cells_are_method_variants_by_timesteps(made: SuiteFolder) -> None:
    found = [(c.conditions["T"], c.label, c.n) for c in summarise(read_runs(made))]
    assert found == [
        (2, "bptt", 1),
        (2, "rate", 1),
        (4, "bptt", 3),
        (4, "tet lamb=0.05", 3),
        (4, "tet lamb=0.5", 1),
    ]


def test_means_and_intervals_by_hand(made: SuiteFolder) -> None:
    e = cell(summarise(read_runs(made)), "bptt").estimates["test_acc"]
    assert e is not None
    assert e.mean == pytest.approx(0.92)
    assert e.half == pytest.approx(T_3 * 0.02 / math.sqrt(3), rel=1e-6)
    assert cell(summarise(read_runs(made)), "bptt", 2).estimates["test_acc"] == Estimate(
        0.8, None, 1
    )


def test_paired_difference_by_hand(made: SuiteFolder) -> None:
    difference = gap(cell(summarise(read_runs(made)), "tet lamb=0.05"))
    assert (difference.mean, difference.n) == (pytest.approx(0.02), 3)
    assert difference.half == pytest.approx(T_3 * 0.01 / math.sqrt(3), rel=1e-6)
    assert cell(summarise(read_runs(made)), "bptt").versus is None


@pytest.mark.parametrize("key", ["init_hash", "order_hash", "data_hash"])
def test_pairs_need_equal_weights_batches_and_data(empty: SuiteFolder, key: str) -> None:
    for seed in range(3):
        done(empty, replace(SPEC, seed=seed), 0.5)
        other = {key: "other"} if seed == 2 else {}
        done(empty, tet(0.05, 4, seed), 0.6 + seed / 10, **other)
    difference = gap(cell(summarise(read_runs(write(empty))), "tet"))
    assert (difference.mean, difference.n) == (pytest.approx(0.15), 2)


@pytest.mark.parametrize("key", ["init_hash", "order_hash", "data_hash"])
def test_runs_whose_hash_is_unknown_are_no_pair(empty: SuiteFolder, key: str) -> None:
    done(empty, SPEC, 0.5, **{key: None})
    done(empty, tet(0.05, 4, 0), 0.6, **{key: None})
    assert cell(summarise(read_runs(write(empty))), "tet").versus is None


def test_pairs_need_both_accuracies(empty: SuiteFolder) -> None:
    for seed, acc in enumerate((0.5, 0.6, None)):
        done(empty, replace(SPEC, seed=seed), 0.5)
        done(empty, tet(0.05, 4, seed), 0.5, test_acc=acc)
    found = cell(summarise(read_runs(write(empty))), "tet")
    assert found.estimates["test_acc"] == stats.estimate([0.5, 0.6])
    assert (gap(found).mean, gap(found).n) == (pytest.approx(0.05), 2)


@pytest.mark.parametrize(
    "other",
    [{"T": 2}, {"dataset": "cifar10"}, {"model": "mlp"}, {"kernel": "reference"},
     {"precision": "bf16"}, {"neuron": {"decay": 0.9}}, {"train": TrainConfig(epochs=3)},
     {"data": {"train_limit": 100}}, {"model_options": {"width": 8}}],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_difference_is_taken_within_one_condition_only(
    empty: SuiteFolder, other: dict[str, Any]
) -> None:
    done(empty, replace(SPEC, **other), 0.5)
    done(empty, tet(0.05, 4, 0), 0.6)
    cells = summarise(read_runs(write(empty)))
    assert len(cells) == 2
    assert [c.versus for c in cells] == [None, None]


def test_difference_is_taken_on_one_machine_only(empty: SuiteFolder) -> None:
    done(empty, SPEC, 0.5)
    done(empty, tet(0.05, 4, 0), 0.6, machine={**MACHINE, "machine_id": "other"})
    cells = summarise(read_runs(write(empty)))
    assert [(c.label, c.versus) for c in cells] == [("bptt", None), ("tet", None)]


def test_a_seed_counts_once_though_it_ran_under_two_time_limits(empty: SuiteFolder) -> None:
    for limit in (None, 60.0):
        done(empty, replace(SPEC, train=TrainConfig(epochs=2, timeout_s=limit)), 0.5)
    cells = summarise(read_runs(write(empty)))
    assert [c.n for c in cells if c.label == "bptt"] in ([1], [1, 1])


def test_runs_that_are_not_done_are_in_no_cell(made: SuiteFolder) -> None:
    labels = {c.label for c in summarise(read_runs(made))}
    assert "grad_scale" not in labels
    assert "shortcut" not in labels


def test_labels_name_the_options_that_differ(made: SuiteFolder) -> None:
    labels = summary.method_labels(read_runs(made))
    assert list(labels.values()) == [
        "bptt", "tet lamb=0.05", "tet lamb=0.5", "shortcut", "rate", "grad_scale"
    ]  # fmt: skip


def test_variants_stand_in_the_order_of_their_values(empty: SuiteFolder) -> None:
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    for lamb in values:
        done(empty, tet(lamb, 4, 0), 0.5)
    cells = summarise(read_runs(write(empty)))
    assert [c.label for c in cells] == [f"tet lamb={v}" for v in values]


def test_labels_are_different_though_an_option_is_new(empty: SuiteFolder) -> None:
    done(empty, replace(SPEC, method="tet", method_config={"lamb": 0.1}), 0.5)
    done(empty, replace(SPEC, method="tet", method_config={"lamb": 0.1, "new": 2}), 0.5)
    labels = summary.method_labels(read_runs(write(empty)))
    assert len(set(labels.values())) == 2


@pytest.mark.parametrize("seeds", [20, 2000])
def test_ten_thousand_rows(seeds: int) -> None:
    methods = ("bptt", "tet", "shortcut", "rate", "grad_scale")
    frame = pd.DataFrame(
        [
            dict.fromkeys(RUN_COLUMNS)
            | {"run_id": f"r{n}", "suite": "s", "status": "done", "dataset": "d", "model": "m",
               "method": methods[n % 5], "method_config": "{}", "T": 1 + n // 5 // seeds,
               "seed": n // 5 % seeds, "kernel": "auto", "precision": "fp32",
               "settings_hash": "x", "machine_id": "c", "test_acc": n % 5 / 10 + n % 3 / 100,
               "init_hash": str(n // 5), "order_hash": "o", "data_hash": "d"}
            for n in range(10_000)
        ],
        columns=list(RUN_COLUMNS),
    )  # fmt: skip
    stats.estimate([1.0, 2.0])  # imports scipy
    began = time.process_time()
    cells = summarise(frame)
    assert time.process_time() - began < 5
    assert len(cells) == 10_000 // seeds
    assert {c.n for c in cells} == {seeds}
    assert all(gap(c).n == seeds for c in cells if c.label != "bptt")


# --- report -----------------------------------------------------------------------------------


def rendered(folder: SuiteFolder) -> dict[str, str]:
    built = content.build(folder)
    return {
        "report.md": markdown.render(built),
        "report.csv": data.to_csv(built),
        "report.json": data.to_json(built),
        "report.tex": latex.render(built),
    }


@pytest.mark.parametrize("name", ["report.md", "report.csv", "report.json", "report.tex"])
def test_report_is_golden(made: SuiteFolder, name: str) -> None:
    golden(made, name, rendered(made)[name])


def test_report_from_the_committed_table_only(made: SuiteFolder, tmp_path: Path) -> None:
    bare = SuiteFolder(tmp_path / "elsewhere" / "made")
    bare.path.mkdir(parents=True)
    bare.runs_csv.write_bytes(made.runs_csv.read_bytes())
    with_folders, without = rendered(made), rendered(bare)
    assert without["report.csv"] == with_folders["report.csv"]
    cells, bare_cells = (json.loads(r["report.json"])["cells"] for r in (with_folders, without))
    assert bare_cells == cells
    assert without["report.md"].startswith("## made\n\n- ")


def test_report_is_the_same_after_the_table_was_read_and_written(made: SuiteFolder) -> None:
    first = rendered(made)
    read_runs(made).to_csv(made.runs_csv, index=False)
    assert rendered(made) == first
    text = made.runs_csv.read_bytes()
    read_runs(made).to_csv(made.runs_csv, index=False)
    assert made.runs_csv.read_bytes() == text


def test_reasons_cannot_break_out_of_the_markdown(made: SuiteFolder) -> None:
    text = rendered(made)["report.md"]
    assert "<script>" not in text
    assert "<b>" not in text
    (note,) = [line for line in text.splitlines() if line.startswith("- failed: ")]
    assert note.endswith(
        r"né \| \`x\` \<script\>alert(1)\</script\> C:\\tmp \*b\* \[l\](u) \# end line two"
    )
    assert "\u2028" not in text


def test_rows_of_the_markdown_table_have_one_width(made: SuiteFolder) -> None:
    table = [line for line in rendered(made)["report.md"].splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5
    assert len({line.replace(r"\|", "").count("|") for line in table}) == 1


def test_figures_of_the_markdown_table(made: SuiteFolder) -> None:
    text = rendered(made)["report.md"]
    half, difference = 100 * T_3 * 0.02 / math.sqrt(3), 100 * T_3 * 0.01 / math.sqrt(3)
    assert f"| bptt | 4 | 92.00 ± {half:.2f} (3) |" in text
    assert f"| +2.00 ± {difference:.2f} |" in text
    assert "| bptt | 2 | 80.00 (1) | 79.00 | 81.00 | – | 1.23 k | 0.125 | 2.5 M | 9.22 k |" in text
    assert "| 300.0 | 1.50 | 2.50 |" in text


def test_every_failure_stands_below_the_table_with_its_reason(made: SuiteFolder) -> None:
    notes = content.build(made).notes
    for status in ("failed", "oom", "timeout", "diverged", "skipped", "interrupted"):
        assert len([n for n in notes if n.startswith(f"{status}: ")]) == 1
    assert "missing: 1 of 17 planned runs have not begun" in notes
    assert any(n.startswith("stale: ") for n in notes)
    assert any(n.startswith("orchestration: 0.12 s a run") for n in notes)


def test_interruption_without_a_reason_is_not_said_to_be_na(empty: SuiteFolder) -> None:
    add(empty, SPEC)
    text = rendered(write(empty))["report.md"]
    assert "interrupted" in text
    assert "NA" not in text
    assert "nan" not in text


@pytest.mark.parametrize("reason", ["NA", "None", "null", "nan", "-", "1.0"])
def test_reasons_that_look_like_no_value_come_back(empty: SuiteFolder, reason: str) -> None:
    ended(empty, SPEC, "failed", reason)
    note = content.build(write(empty)).notes[1]
    assert note == f"failed: {SPEC.run_id}: {reason}"


def test_report_without_a_run_that_is_done(empty: SuiteFolder) -> None:
    ended(empty, SPEC, "failed", "no reason at all")
    found = rendered(write(empty))
    assert f"- failed: {SPEC.run_id}: no reason at all" in found["report.md"]
    assert json.loads(found["report.json"])["cells"] == []


def test_csv_without_a_run_that_is_done_has_its_header(made: SuiteFolder) -> None:
    header = data.to_csv(content.build(made)).splitlines()[0]
    frame = read_runs(made)
    frame[frame["status"] != "done"].to_csv(made.runs_csv, index=False)
    (left,) = data.to_csv(content.build(made)).splitlines()
    assert left == ",".join(content.RECORD_COLUMNS)
    assert header.startswith(left)


def test_report_without_any_run(empty: SuiteFolder) -> None:
    found = rendered(write(empty))
    assert found["report.md"].startswith("## made\n")
    assert json.loads(found["report.json"])["cells"] == []


def test_report_with_one_seed_has_no_interval(empty: SuiteFolder) -> None:
    done(empty, SPEC, 0.5)
    done(empty, tet(0.05, 4, 0), 0.6)
    text = rendered(write(empty))["report.md"]
    assert "±" not in text.replace(content.LEGEND, "")
    assert "| 60.00 (1) |" in text
    assert "| +10.00 (1) |" in text


def test_json_report_is_whole_numbers_and_nulls(made: SuiteFolder) -> None:
    document = json.loads(rendered(made)["report.json"], parse_constant=pytest.fail)
    assert set(document) >= {"suite", "claim", "facts", "cells", "notes"}
    (rate,) = [c for c in document["cells"] if c["method"] == "rate"]
    assert rate["T"] == 2
    assert rate["n"] == 1
    assert rate["peak_bytes"] is None
    assert rate["test_acc_ci95"] is None
    assert json.loads(rate["method_config"]) == {"loss_scale": "1/T"}
    (tet_,) = [c for c in document["cells"] if c["label"] == "tet lamb=0.05"]
    assert tet_["test_acc_vs_bptt"] == pytest.approx(0.02)


def test_conditions_that_differ_are_columns(empty: SuiteFolder) -> None:
    for precision in ("fp32", "bf16"):
        done(empty, replace(SPEC, precision=precision), 0.5)
    built = content.build(write(empty))
    assert built.columns[:3] == ["method", "precision", "last"]
    assert sorted(row[1] for row in built.rows) == ["bf16", "fp32"]
    assert "T: 4" in built.facts
    assert "dataset: digits" in built.facts


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (999.4, "999.4"), (1e3, "1 k"), (12345, "12.3 k"), (2.5e6, "2.5 M"), (7e9, "7 G"),
     (999_999.0, "1 M")],
)  # fmt: skip
def test_quantities(value: float, text: str) -> None:
    assert columns.quantity(Estimate(value, None, 1)) == text


def test_quantity_of_nothing() -> None:
    assert columns.quantity(None) == columns.percent(None) == columns.number(None, 2) == "–"


@given(st.text())
def test_markdown_escape_is_one_line_without_markup(text: str) -> None:
    found = markdown.escape(text)
    assert len(found.splitlines()) <= 1
    plain = found.replace("\\\\", "")
    for mark in "|<>*_`[]#":
        assert plain.count(mark) == plain.count("\\" + mark)
    assert not any(unicodedata.category(ch) == "Cc" for ch in found)


def test_a_flush_reads_no_run_again_and_holds_none(
    empty: SuiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(5):
        done(empty, replace(SPEC, seed=seed), 0.5)
    writer = Writer("made", empty)
    writer.write()
    sixth = done(empty, replace(SPEC, seed=5), 0.6)
    read: list[str] = []
    real = Path.read_bytes, Path.read_text
    monkeypatch.setattr(Path, "read_bytes", lambda p: read.append(p.name) or real[0](p))
    monkeypatch.setattr(Path, "read_text", lambda p, *a: read.append(p.name) or real[1](p, *a))
    writer.read(sixth)
    assert sorted(read) == ["events.jsonl", "result.json", "spec.json"]
    writer.write()
    assert len(read) == 3
    assert not writer._new
    assert [(r["seed"], r["test_acc"]) for r in rows(empty)] == [
        *((str(seed), "0.5") for seed in range(5)),
        ("5", "0.6"),
    ]


@pytest.mark.parametrize("damage", ["gone", "cut", "another's"])
def test_tables_that_somebody_else_touched_are_made_anew(empty: SuiteFolder, damage: str) -> None:
    runs = [done(empty, replace(SPEC, seed=seed), 0.5) for seed in range(3)]
    writer = Writer("made", empty)
    writer.write()
    text = empty.runs_csv.read_text("utf-8")
    if damage == "gone":
        empty.runs_csv.unlink()
    else:
        lines = text.splitlines(keepends=True)
        empty.runs_csv.write_text("".join(lines[:2] if damage == "cut" else lines[::-1]))
    writer.read(runs[0])
    writer.write()
    assert empty.runs_csv.read_text("utf-8") == text


def test_rows_in_disorder_and_of_older_columns_are_kept_in_order(empty: SuiteFolder) -> None:
    """As in a clone with committed tables, whose runs have no folders."""
    done(empty, SPEC, 0.5)
    lines = ["status,run_id", "done,zebra", '"fai\nled",aardvark', "", "done,zebra"]
    empty.runs_csv.write_text("\n".join(lines) + "\n")
    found = [(r["run_id"], r["status"], r["seed"]) for r in rows(write(empty))]
    assert found == [
        ("aardvark", "fai\nled", ""),
        (SPEC.run_id, "done", "0"),
        ("zebra", "done", ""),
        ("zebra", "done", ""),
    ]


def test_what_a_table_has_of_a_run_that_cannot_be_read_any_more_is_kept(
    empty: SuiteFolder,
) -> None:
    run = done(empty, SPEC, 0.5)
    write(empty)
    for name in ("spec.json", "result.json"):
        (run.path / name).write_text("{")
    assert [r["test_acc"] for r in rows(write(empty))] == ["0.5"]


def test_a_failure_halfway_leaves_all_tables_as_they_were(
    empty: SuiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(empty, SPEC, 0.5)
    writer = Writer("made", empty)
    writer.write()
    before = {p.name: p.read_bytes() for p in empty.path.glob("*.csv")}
    writer.read(done(empty, replace(SPEC, seed=1), 0.5))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("snnbench.tables.Sheet.end", full)
        with pytest.raises(ResultsError, match="disk is full"):
            writer.write()
    assert {p.name: p.read_bytes() for p in empty.path.glob("*.csv")} == before
    assert not list(empty.path.glob(".*.tmp"))
    writer.write()  # nothing that was read is lost
    assert [r["seed"] for r in rows(empty)] == ["0", "1"]
