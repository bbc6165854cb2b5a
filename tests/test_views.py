"""The same results seen in other ways: formats, columns, order, baselines, filters, folders."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import Bench
from hypothesis import given
from hypothesis import strategies as st
from records import HOSTILE, MACHINE, SPEC, done, ended, tet, write

from snnbench import stats
from snnbench.errors import ResultsError, UsageError
from snnbench.report import columns, content, data, latex, markdown
from snnbench.report.content import View
from snnbench.report.source import parse_where
from snnbench.stats import Estimate
from snnbench.store import SuiteFolder

OTHER = {"machine": {**MACHINE, "machine_id": "other", "cpu": "Otherium"}}


@pytest.fixture
def folder(tmp_path: Path) -> SuiteFolder:
    """Two methods at T = 2 and 4, six seeds, tet 3 points better, T = 4 one point better."""
    made = SuiteFolder(tmp_path / "results" / "made")
    for T in (2, 4):
        for seed in range(6):
            acc = 0.80 + seed / 1000 + T / 200
            done(made, replace(SPEC, seed=seed, T=T), acc)
            # Not the same difference for every seed, but always one.
            done(made, tet(0.05, T, seed), acc + 0.03 + seed % 2 / 1000)
    return write(made)


def labels(report: content.Report) -> list[tuple[str, str]]:
    return [(c.label, str(c.conditions["T"])) for c in report.cells]


# --- views ------------------------------------------------------------------------------------


def test_columns_by_name_or_heading_in_the_order_asked_for(folder: SuiteFolder) -> None:
    built = content.build(folder, View(columns=("SOPs", "test_acc", "train_s")))
    assert built.columns == ["method", "T", "SOPs", "last", "train s"]
    assert built.rows[0] == ["bptt", "2", "2.5 M", "81.25 ± 0.20 (6)", "1.50"]


def test_all_columns_are_those_with_a_value(folder: SuiteFolder) -> None:
    shown = content.build(folder, View(columns=("all",))).columns
    assert "train s" in shown
    assert "silent %" not in shown
    assert len(shown) == len(set(shown))


def test_a_column_that_a_later_version_added_can_be_asked_for(folder: SuiteFolder) -> None:
    frame = pd.read_csv(folder.runs_csv).assign(brand_new=12_345.0)
    frame.to_csv(folder.runs_csv, index=False)
    built = content.build(folder, View(columns=("brand_new",)))
    assert [row[2] for row in built.rows] == ["12.3 k"] * 4
    assert built.records[0]["brand_new"] == 12_345.0


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (View(columns=("test_ac",)), "no such column; did you mean 'test_acc'"),
        (View(by=("modle",)), "no such column; did you mean 'model'"),
        (View(sort="-lst"), "--sort lst: no such column"),
        (View(baseline="tett"), "no such method here; did you mean 'tet'"),
        (View(where={"sed": ["1"]}), "no such column; did you mean 'seed'"),
    ],
)
def test_what_does_not_exist_is_one_clear_line(folder: SuiteFolder, view: View, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        content.build(folder, view)
    assert "\n" not in str(caught.value)


def test_sorting_up_down_and_by_label(folder: SuiteFolder) -> None:
    up = labels(content.build(folder, View(sort="test_acc")))
    assert up == [("bptt", "2"), ("bptt", "4"), ("tet", "2"), ("tet", "4")]
    assert labels(content.build(folder, View(sort="-test_acc"))) == up[::-1]
    by_label = labels(content.build(folder, View(sort="-method")))
    assert [name for name, _ in by_label] == ["tet", "tet", "bptt", "bptt"]


def test_what_was_not_measured_is_sorted_last_either_way(folder: SuiteFolder) -> None:
    done(folder, replace(SPEC, T=8), 0.5, saved_bytes=None, nulls={"saved_bytes": "no"})
    write(folder)
    for sort in ("saved_bytes", "-saved_bytes"):
        assert labels(content.build(folder, View(sort=sort)))[-1] == ("bptt", "8")


def test_blocks_of_rows(folder: SuiteFolder) -> None:
    built = content.build(folder, View(by=("T",), sort="-test_acc"))
    assert labels(built) == [("tet", "2"), ("bptt", "2"), ("tet", "4"), ("bptt", "4")]
    assert built.breaks == {2}
    assert latex.render(built).count(r"\midrule") == 2


def test_rows_by_seed_have_one_run_each(folder: SuiteFolder) -> None:
    built = content.build(folder, View(by=("seed",), where={"T": ["4"]}))
    assert len(built.rows) == 12
    assert {c.n for c in built.cells} == {1}
    assert built.columns[:2] == ["method", "seed"]


def test_filters(folder: SuiteFolder) -> None:
    built = content.build(folder, View(where=parse_where(["T=4,method=tet", "seed=0,seed=1"])))
    assert [(c.label, c.n) for c in built.cells] == [("tet", 2)]
    assert "only runs with T = 4, method = tet, seed = 0 or 1" in built.facts
    assert content.build(folder, View(where={"test_acc": ["0.81"]})).cells[0].n == 1
    with pytest.raises(UsageError, match="--where T=3,T=5: no run fits, of 24"):
        content.build(folder, View(where={"T": ["3", "5"]}))
    with pytest.raises(UsageError, match="write column=value"):
        parse_where(["T"])


def test_another_baseline(folder: SuiteFolder) -> None:
    built = content.build(folder, View(baseline="tet"))
    assert "Δ last vs tet" in built.columns
    found = {c.label: c.versus for c in built.cells}
    assert found["tet"] is None
    assert found["bptt"] is not None
    assert found["bptt"].difference.mean == pytest.approx(-0.0305)
    record = built.records[0]
    assert record["baseline"] == "tet"
    assert record["test_acc_vs_bptt"] is None


def test_comparison_by_hand(folder: SuiteFolder) -> None:
    versus = next(c.versus for c in content.build(folder).cells if c.versus)
    assert versus.p == versus.p_holm == 0.03125
    assert versus.improvement == 1.0
    assert versus.shown
    built = content.build(folder)
    place = built.columns.index("Δ last vs bptt")
    assert built.strong == {(1, place), (3, place)}
    assert "| **+3.05 ± 0.06** | 0.031 |" in markdown.render(built)
    assert r"\textbf{\boldmath $+3.05 \pm 0.06$} & $0.031$ &" in latex.render(built)
    assert "better (exact p = 0.031 after Holm)" in built.findings[0]


def test_nothing_is_bold_whose_interval_has_zero(folder: SuiteFolder) -> None:
    frame = pd.read_csv(folder.runs_csv)
    frame["test_acc"] = [0.8 + (i * 7919 % 13) / 100 for i in range(len(frame))]
    frame.to_csv(folder.runs_csv, index=False)
    built = content.build(folder)
    assert not any(c.versus.difference.excludes_zero for c in built.cells if c.versus)
    assert built.strong == frozenset()
    assert r"\textbf" not in latex.render(built)


def test_over_workloads_by_hand(folder: SuiteFolder) -> None:
    built = content.build(folder)
    (bptt, tet_) = built.across
    assert bptt[:2] == ["bptt", "2"]
    values = [0.80 + s / 1000 + T / 200 for T in (2, 4) for s in range(6)]
    middle = sorted(values)[3:9]
    assert bptt[2] == f"{100 * sum(middle) / 6:.2f}"
    assert tet_[4] == "1.00"
    assert "interquartile mean" in markdown.render(built)
    one = content.build(folder, View(where={"T": ["4"]}))
    assert one.across == []
    # The twin at T = 1 is no workload that the others would have left out.
    done(folder, replace(SPEC, method="ann", T=1), 0.99)
    write(folder)
    assert content.build(folder).across == built.across


def test_a_truth_value_is_filtered_by_the_word_that_the_report_prints(folder: SuiteFolder) -> None:
    frame = pd.read_csv(folder.runs_csv)
    frame["data_verified"] = [i == 0 for i in range(len(frame))]
    frame.to_csv(folder.runs_csv, index=False)
    for word in ("true", "True"):
        cells = content.build(folder, View(where={"data_verified": [word]})).cells
        assert [c.n for c in cells] == [1]


# --- several folders --------------------------------------------------------------------------


def test_two_machines_keep_rows_of_their_own(folder: SuiteFolder, tmp_path: Path) -> None:
    other = SuiteFolder(tmp_path / "results" / "other")
    for seed in range(3):
        done(other, replace(SPEC, seed=seed, T=8), 0.9, step_ms_p50=99.0, **OTHER)
        done(other, tet(0.05, 8, seed), 0.91, **OTHER)
    built = content.build([folder, write(other)])
    assert built.title == "made, other"
    assert "machine_id" in built.columns
    assert "machine: Otherium (other)" in built.facts
    assert any("no difference spans two" in f for f in built.facts)
    assert len(built.cells) == 6


def test_the_same_runs_in_two_folders_are_not_pooled(folder: SuiteFolder, tmp_path: Path) -> None:
    again = SuiteFolder(tmp_path / "elsewhere" / "made")
    again.path.mkdir(parents=True)
    again.runs_csv.write_bytes(folder.runs_csv.read_bytes())
    built = content.build([folder, again])
    assert "results" in built.columns
    assert len(built.cells) == 8
    assert {c.n for c in built.cells} == {6}
    assert len(content.build([folder, folder]).cells) == 4  # given twice is once


def test_seeds_of_one_suite_done_in_two_folders_are_pooled(tmp_path: Path) -> None:
    parts = [SuiteFolder(tmp_path / name / "made") for name in "ab"]
    for i, part in enumerate(parts):
        for seed in range(3 * i, 3 * i + 3):
            done(part, replace(SPEC, seed=seed), 0.9)
            done(part, tet(0.05, 4, seed), 0.91)
        write(part)
    built = content.build(parts)
    assert [(c.label, c.n) for c in built.cells] == [("bptt", 6), ("tet", 6)]
    assert built.cells[1].versus is not None
    assert len(built.cells[1].versus.values) == 6


# --- formats ----------------------------------------------------------------------------------


def test_parquet_is_the_csv(folder: SuiteFolder) -> None:
    pytest.importorskip("pyarrow")
    built = content.build(folder)
    parquet = pd.read_parquet(io.BytesIO(data.to_parquet(built)))
    text = pd.read_csv(io.StringIO(data.to_csv(built)))
    assert list(parquet.columns) == list(text.columns)
    assert parquet["test_acc"].tolist() == text["test_acc"].tolist()


def test_parquet_without_pyarrow_is_one_clear_line(
    folder: SuiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = content.build(folder)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="parquet needs pyarrow"):
        data.to_parquet(built)


def test_infinity_is_said_in_every_format(tmp_path: Path) -> None:
    folder = SuiteFolder(tmp_path / "made")
    for seed in range(2):
        done(folder, replace(SPEC, seed=seed), 0.9)
    write(folder)
    frame = pd.read_csv(folder.runs_csv).assign(time_to_target_s=[3.0, float("inf")])
    frame.to_csv(folder.runs_csv, index=False)
    built = content.build(folder)
    place = built.columns.index("s to target")
    assert built.rows[0][place] == "∞"
    assert r"$\infty$" in latex.render(built)
    (cell,) = json.loads(data.to_json(built), parse_constant=pytest.fail)["cells"]
    assert cell["time_to_target_s"] == "Infinity"
    assert cell["time_to_target_s_ci95"] is None
    assert ",inf," in data.to_csv(built)


def test_equal_values_are_no_difference(tmp_path: Path) -> None:
    folder = SuiteFolder(tmp_path / "made")
    for seed in range(6):
        done(folder, replace(SPEC, seed=seed), 0.9)
        done(folder, tet(0.05, 4, seed), 0.9)
    built = content.build(write(folder))
    assert built.strong == frozenset()
    assert "no evidence of a difference" in built.findings[0]
    assert "+0.00 ± 0.00" in built.rows[1]


def test_missing_baseline_is_said(tmp_path: Path) -> None:
    folder = SuiteFolder(tmp_path / "made")
    done(folder, tet(0.05, 4, 0), 0.9)
    built = content.build(write(folder))
    assert built.rows[0][built.columns.index("Δ last vs bptt")] == "–"
    assert "No difference to bptt can be given" in built.findings[0]


@given(st.text())
def test_latex_escape_is_one_line_of_balanced_text(text: str) -> None:
    found = latex.escape(text)
    assert len(found.splitlines()) <= 1
    plain = re.sub(r"\\[a-zA-Z]+\{\}|\$\\[a-zA-Z]+\$|\\[{}$&#%_]", "", found)
    assert not set(plain) & set("\\{}$&#%_^~")


def test_latex_of_hostile_records_cannot_leave_its_comments(tmp_path: Path) -> None:
    folder = SuiteFolder(tmp_path / "made")
    done(folder, SPEC, 0.9)
    ended(
        folder,
        replace(SPEC, seed=1),
        "failed",
        f"\\input{{/etc/passwd}}\n\\end{{table}}\r{HOSTILE}",
    )
    lines = latex.render(content.build(write(folder))).splitlines()
    begin = lines.index(r"\begin{table}")
    assert all(line.startswith("% ") for line in lines[:begin])
    assert not any("input" in line for line in lines[begin:])
    assert sum(line.endswith(r"\\") for line in lines[begin:]) == 2
    body = "\n".join(lines[begin:])
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
def test_latex_compiles(folder: SuiteFolder, tmp_path: Path) -> None:
    ended(folder, replace(SPEC, seed=9), "failed", HOSTILE)
    folder.write_plan({"suite": {"name": "made", "claim": f'{HOSTILE} \\ {{ }} $ & % ~ ^ "'}})
    (tmp_path / "t.tex").write_text(latex.render(content.build(write(folder))), "utf-8")
    rules = r"\let\toprule\hline\let\midrule\hline\let\bottomrule\hline"  # if booktabs is absent
    text = rf"\documentclass{{article}}{rules}\begin{{document}}\input{{t}}\end{{document}}"
    (tmp_path / "a.tex").write_text(text)
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
    done_ = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done_.returncode == 0, done_.stdout[-1500:]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_odd_numbers_are_words(value: float) -> None:
    e = Estimate(value, None, 2)
    assert {columns.percent(e), columns.quantity(e), columns.number(e, 2)} <= {"not a number", "-∞"}


# --- sentences --------------------------------------------------------------------------------


def test_many_comparisons_are_summed_up(tmp_path: Path) -> None:
    folder = SuiteFolder(tmp_path / "made")
    for T in range(1, 11):
        for seed in range(3):
            done(folder, replace(SPEC, T=T, seed=seed), 0.9 + seed / 100)
            done(
                folder,
                tet(0.05, T, seed),
                0.9 + seed / 100 + (0.02 + seed / 1e5 if T == 3 else 0.001 * seed - 0.001),
            )
    found = content.build(write(folder)).findings
    assert found[0].startswith("Of 10 differences to bptt, the 95% interval of 1 excludes 0")
    assert "0 hold in an exact test too" in found[0]
    assert found[1].startswith("tet (T = 3): 93.00%, +2.00 ± 0.00 points to bptt over 3 pairs")
    assert "of n = 3 the smallest p is 0.25" in found[1]
    assert any("n = 6 can (0.031)" in text for text in found)
    assert not any("takes" in text for text in found)  # three pairs do not say how many would do


def test_seeds_needed_of_a_finding_are_those_of_the_statistics(tmp_path: Path) -> None:
    folder = SuiteFolder(tmp_path / "made")
    gaps = (-0.01, 0.02, 0.01, 0.0)
    for seed, d in enumerate(gaps):
        done(folder, replace(SPEC, seed=seed), 0.9)
        done(folder, tet(0.05, 4, seed), 0.9 + d)
        done(folder, replace(SPEC, method="rate", seed=seed), 0.9 + d)
    text, _, _, last = content.build(write(folder)).findings
    e = stats.estimate(gaps)
    assert e is not None
    assert f"takes {stats.seeds_needed(e.mean, e.deviation or 0, tests=2)} seeds" in text
    assert f"{stats.seeds_needed(0.005, e.deviation or 0, tests=2)} seeds for one of 0.5" in last


def test_infinite_accuracies_are_said_to_be_so(tmp_path: Path) -> None:
    folder = SuiteFolder(tmp_path / "made")
    for seed in range(6):
        done(folder, replace(SPEC, seed=seed), 0.9)
        done(folder, tet(0.05, 4, seed), 0.9)
    frame = pd.read_csv(write(folder).runs_csv)
    for value, text in ((float("inf"), "∞%, ∞"), (float("-inf"), "-∞%, -∞")):
        frame.loc[frame["method"] == "tet", "test_acc"] = value
        frame.to_csv(folder.runs_csv, index=False)
        built = content.build(folder)
        assert built.findings[0] == (
            f"tet: {text} points to bptt over 6 pairs: no interval: not every value is finite."
        )
        assert built.rows[1][1] == text.partition("%")[0]


def test_the_same_difference_twice_is_not_bold(tmp_path: Path) -> None:
    folder = SuiteFolder(tmp_path / "made")
    for seed, acc in enumerate((0.95, 0.94)):
        done(folder, replace(SPEC, seed=seed), acc)
        done(folder, tet(0.05, 4, seed), acc + 0.0028)
    built = content.build(write(folder))
    assert built.strong == frozenset()
    assert "no evidence of a difference: n = 2 equal ones may be chance" in built.findings[0]


def test_settings_are_named_by_what_differs_in_them(tmp_path: Path) -> None:
    folder = SuiteFolder(tmp_path / "made")
    for decay in (0.5, 0.9):
        done(folder, replace(SPEC, neuron={"decay": decay}), 0.9)
        done(folder, replace(tet(0.05, 4, 0), neuron={"decay": decay}), 0.91)
    found = content.build(write(folder)).findings
    assert {text.partition(":")[0] for text in found[:2]} == {
        "tet (neuron.decay=0.5)", "tet (neuron.decay=0.9)",
    }  # fmt: skip


def test_doubts_about_times_are_one_line_of_each_kind(folder: SuiteFolder) -> None:
    frame = pd.read_csv(folder.runs_csv)
    said = "step times spread by {}% of their median (quartiles)"
    load = "a load of 5.{} on 2 cores: other processes were busy"
    frame["timing_warning"] = pd.Series(
        [said.format(31), said.format(105), f"{said.format(40)}; {load.format(1)}", load.format(3)]
    )
    frame.to_csv(folder.runs_csv, index=False)
    notes = [n for n in content.build(folder).notes if n.startswith("times: ")]
    assert notes == [
        f"times: {said.format('31 to 105')} (3 of 24 runs)",
        "times: a load of 5.1 to 5.3 on 2 cores: other processes were busy (2 of 24 runs)",
    ]


def test_figures_of_a_cost_suite_are_those_of_a_network_that_learned_nothing(
    folder: SuiteFolder,
) -> None:
    line = "kind cost: nothing is trained; spikes, SOPs and energies are those of a network"
    assert not any(f.startswith(line) for f in content.build(folder).facts)
    pd.read_csv(folder.runs_csv).assign(kind="cost").to_csv(folder.runs_csv, index=False)
    assert any(f.startswith(line) for f in content.build(folder).facts)


def test_one_seed_is_one_seed(folder: SuiteFolder) -> None:
    facts = content.build(folder, View(where={"seed": ["0"]})).facts
    assert any(f.startswith("n: 1 seed a row; ") for f in facts)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> SuiteFolder:
    folder = SuiteFolder(tmp_path_factory.mktemp("results") / "made")
    for seed in range(6):
        done(folder, replace(SPEC, seed=seed), 0.8 + seed / 100)
        done(folder, tet(0.05, 4, seed), 0.85 + seed / 100)
    return write(folder)


@pytest.mark.parametrize(
    ("name", "begin"),
    [("a.md", b"## made"), ("a.html", b"<!doctype html>"), ("a.tex", b"% made"),
     ("a.csv", b"label,"), ("a.json", b"{"), ("a.parquet", b"PAR1")],
)  # fmt: skip
def test_the_suffix_gives_the_format(
    bench: Bench, shared: SuiteFolder, tmp_path: Path, name: str, begin: bytes
) -> None:
    found = bench.run("report", shared.path, "-o", tmp_path / name)
    assert found.returncode == 0, found.stderr
    assert found.stdout == ""
    assert f"written: {tmp_path / name}" in found.stderr
    assert (tmp_path / name).read_bytes().startswith(begin)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["-o", "x.docx"], 2, "give --format"),
        (["-f", "terminal", "-o", "x.md"], 2, "other than terminal"),
        (["-o", "/nowhere/there/x.md"], 5, "cannot be written"),
        (["--columns", "nix"], 2, "--columns nix: no such column"),
        (["--where", "T"], 2, "--where T: write column=value"),
        (["--where", "T=99"], 2, "--where T=99: no run fits, of 12"),
        (["--sort", "bar"], 2, "--sort bar: no such column"),
        (["--baseline", "nix"], 2, "--baseline nix: no such method here"),
    ],
)
def test_errors_are_one_line_and_a_code(
    bench: Bench, shared: SuiteFolder, options: list[str], code: int, words: str
) -> None:
    if "/nowhere" in options[-1]:
        options[-1] = "/proc/nowhere/x.md"  # where nobody may write, root included
    found = bench.run("report", shared.path, *options)
    assert found.returncode == code
    (line,) = found.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line


def on_a_terminal(columns: int, *args: object, **env: str) -> str:
    """What a user sees on a terminal of that width."""
    main, side = pty.openpty()
    words = [sys.executable, "-m", "snnbench", *map(str, args)]
    hidden = {"NO_COLOR", "FORCE_COLOR", "TERM"}
    mine = {k: v for k, v in os.environ.items() if k not in hidden}
    mine |= {"COLUMNS": str(columns), "TERM": "xterm-256color", **env}
    process = subprocess.Popen(words, stdout=side, stderr=side, stdin=side, env=mine)
    os.close(side)
    parts = list(_all_of(main))
    assert process.wait(60) == 0
    os.close(main)
    return b"".join(parts).decode()


def _all_of(handle: int) -> Iterator[bytes]:
    try:
        while part := os.read(handle, 65536):
            yield part
    except OSError:  # the other end is closed
        return


def test_a_terminal_of_80_columns_shows_every_figure_without_breaking_a_row(
    shared: SuiteFolder,
) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal(80, "report", shared.path))
    table = [line for line in text.splitlines() if line.startswith(("method", "bptt", "tet "))]
    assert all(len(line) <= 80 for line in table)
    heads = " ".join(line for line in table if line.startswith("method"))
    for name in content.build(shared).columns:
        assert name in heads
    assert len([line for line in table if line.startswith("bptt")]) == heads.count("method")


def test_a_terminal_is_given_no_orders_and_whole_lines(shared: SuiteFolder, tmp_path: Path) -> None:
    folder = SuiteFolder(tmp_path / "results" / "made")
    folder.path.mkdir(parents=True)
    frame = pd.read_csv(shared.runs_csv, dtype=object)
    frame.loc[0, ["status", "reason"]] = ["failed", "boom \x1b[31m\x9b1m\x07" + " word" * 40]
    frame.to_csv(folder.runs_csv, index=False)
    shown = on_a_terminal(80, "report", folder.path, NO_COLOR="1", TERM="dumb")
    assert "boom [31m1m word" in shown
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]", plain)
    told, hint = plain.split("next: ")
    assert all(len(line) <= 80 for line in told.splitlines())
    assert hint.split()[2] == str(folder.path)
    assert f"show RUN_ID --results {folder.path.parent}" in " ".join(hint.split())
    for text in (markdown.render(content.build(folder)), latex.render(content.build(folder))):
        assert "\x1b" not in text
        assert "boom" in text
    assert "\x1b" not in content.build(folder).notes[1]


def test_colour_on_a_terminal_unless_the_user_wants_none(shared: SuiteFolder) -> None:
    assert "\x1b[1m" in on_a_terminal(80, "report", shared.path)
    colours = r"\x1b\[[0-9;]*3[0-9]m"
    assert not re.search(colours, on_a_terminal(80, "report", shared.path, NO_COLOR="1"))


def test_the_shell_is_told_what_fits(shared: SuiteFolder) -> None:
    def completed(words: str) -> list[str]:
        env = {**os.environ, "_SNNBENCH_COMPLETE": "complete_bash", "COMP_WORDS": words,
               "COMP_CWORD": str(len(words.split(" ")) - 1),
               "SNNBENCH_RESULTS": str(shared.path.parent)}  # fmt: skip
        code = "from snnbench.cli import app; app(prog_name='snnbench')"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        return done.stdout.split()

    assert completed("snnbench rep") == ["report"]
    assert completed("snnbench report ma") == ["made"]
    assert completed("snnbench plot pareto-s") == ["pareto-sops", "pareto-spikes"]


def test_plot_all_says_what_it_cannot_draw(
    bench: Bench, shared: SuiteFolder, tmp_path: Path
) -> None:
    found = bench.run("plot", "all", shared.path, "-o", tmp_path)
    assert found.returncode == 0, found.stderr
    assert "not drawn: fidelity: no gradient fidelity was measured" in found.stderr
    assert {p.suffix for p in tmp_path.iterdir()} == {".png", ".svg"}
    assert (tmp_path / "curves.svg").read_text("utf-8").startswith("<?xml")


def test_show_of_a_run_whose_folder_was_not_kept(
    shared: SuiteFolder, bench: Bench, tmp_path: Path
) -> None:
    bare = SuiteFolder(tmp_path / "results" / "made")
    bare.path.mkdir(parents=True)
    for name in ("runs.csv", "epochs.csv"):
        (bare.path / name).write_bytes((shared.path / name).read_bytes())
    run_id = replace(SPEC, seed=3).run_id
    found = bench.run("show", run_id[:-8], "--results", bare.path.parent, "--json")
    assert found.returncode == 0, found.stderr
    kept = json.loads(bench.run("show", run_id, "--results", shared.path.parent, "--json").stdout)
    shown = json.loads(found.stdout)
    assert shown["run_id"] == kept["run_id"] == run_id
    assert shown["status"] == "done"
    assert shown["result"]["test_acc"] == kept["result"]["test_acc"] == pytest.approx(0.83)
    assert shown["spec"]["neuron"] == {"decay": 0.5}
    assert [e["epoch"] for e in shown["epochs"]] == [1, 2]
    assert "made" in bench.run("show", run_id, "--results", bare.path.parent).stderr
    unknown = bench.run("show", "nix", "--results", bare.path.parent)
    assert unknown.returncode == ResultsError.exit_code
    assert len(unknown.stderr.splitlines()) == 1


def test_results_that_do_not_exist_are_named(shared: SuiteFolder, bench: Bench) -> None:
    found = bench.run("report", "mode", "--results", shared.path.parent)
    assert found.returncode == ResultsError.exit_code
    assert "did you mean 'made'" in found.stderr


@pytest.mark.slow
def test_ten_thousand_runs_are_reported_in_seconds(bench: Bench, tmp_path: Path) -> None:
    folder: Any = SuiteFolder(tmp_path / "big")
    done(folder, SPEC, 0.9)
    row = pd.read_csv(write(folder).runs_csv).iloc[0].to_dict()
    methods = ("bptt", "tet", "shortcut", "rate", "grad_scale")
    rows = [
        row | {"run_id": f"r{n}", "method": methods[n % 5], "T": 1 + n // 100, "seed": n // 5 % 20,
               "init_hash": f"i{n // 5}", "test_acc": 0.9 + (n * 7919 % 97) / 1000}
        for n in range(10_000)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder.runs_csv, index=False)
    found = bench.run("report", folder.path, "--format", "md")
    assert found.returncode == 0, found.stderr
    table = found.stdout.partition("Accuracies are")[0]
    assert table.count("\n| ") == 502
    assert "Of 400 differences to bptt" in found.stdout
