"""Figures: what they pool and leave out, how their axes run; and what bounded a search."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from records import SPEC, done, ended, tet, write

from snnbench.errors import ResultsError
from snnbench.report import canvas, content, data, html, latex, markdown, plots, source
from snnbench.report.content import View
from snnbench.store import SuiteFolder

OTHER = {
    "dataset": "clouds",
    "model": "vgg",
    "kernel": "reference",
    "precision": "fp16",
    "memory": "smallest",
    "settings_hash": "00000002",
    "machine_id": "gpu-1",
}
SPLIT = ("saved", "accuracy", "pareto-memory", "pareto-time", "curves", "layers")


def figure_of(read: source.Source, name: str) -> Any:
    with canvas.drawing(name):
        return plots.FIGURES[name](read)


def tables(path: Path, *variants: Mapping[str, Any]) -> SuiteFolder:
    """bptt and tet of two seeds, once for each variant of their columns, with all tables."""
    made = SuiteFolder(path / "made")
    for seed in (0, 1):
        done(made, replace(SPEC, seed=seed), 0.9 + seed / 100)
        done(made, tet(0.05, 4, seed), 0.93 + seed / 100)
    write(made)
    folder = SuiteFolder(path / "varied")
    folder.path.mkdir()
    runs, epochs = pd.read_csv(made.runs_csv), pd.read_csv(made.epochs_csv)
    keys = ["run_id", "dataset", "model", "method", "T", "seed"]
    layers = pd.concat([runs[keys].assign(layer=f"layer{d}", depth=d) for d in range(2)])
    layers = layers.assign(firing_rate=0.1, cos=0.9, norm_ratio=1.1, epoch=0)
    for n, variant in enumerate(variants):
        for name, frame in (("runs", runs), ("epochs", epochs), ("layers", layers),
                            ("fidelity", layers)):  # fmt: skip
            own = {k: v for k, v in variant.items() if name == "runs" or k in keys}
            mine = frame.assign(run_id=frame["run_id"] + f"-{n}", **own)
            target = folder.path / f"{name}.csv"
            mine.to_csv(target, mode="a", header=not target.exists(), index=False)
    return folder


@pytest.mark.parametrize("column", OTHER)
def test_what_differs_has_a_panel_of_its_own(tmp_path: Path, column: str) -> None:
    """Only seeds are pooled: neither variant's points move when the other is drawn beside it."""
    there = {"saved_bytes": 2**30, "test_acc": 0.1, "train_s": 99.0}
    read = source.read([tables(tmp_path, {}, {column: OTHER[column], **there})])
    for name in SPLIT:
        figure = figure_of(read, name)
        per_panel = 2 if name == "curves" else 1
        assert len(figure.axes) == 2 * per_panel, name
        titles = [t for axis in figure.axes if (t := axis.get_title())]
        assert len(set(titles)) == 2, name
        assert all(column == "settings_hash" or t.startswith(column) for t in titles), name
    low, high = sorted(saved_points(read))
    assert (low, high) == (1.5, 1024.0)


def saved_points(read: source.Source) -> set[float]:
    """Every mean that the figure of saved memory shows, MiB."""
    axes = figure_of(read, "saved").axes
    return {float(y) for axis in axes for c in axis.containers for y in c.lines[0].get_ydata()}


def test_settings_are_named_by_what_differs(tmp_path: Path) -> None:
    texts = [json.dumps({"neuron": {"decay": d, "soft": 1}}) for d in (0.5, 0.25)]
    variants = [{"settings": t, "settings_hash": f"0000000{n}"} for n, t in enumerate(texts)]
    figure = figure_of(source.read([tables(tmp_path, *variants)]), "saved")
    assert [axis.get_title() for axis in figure.axes] == [
        "neuron.decay = 0.5",
        "neuron.decay = 0.25",
    ]


def test_folders_with_the_same_runs_are_not_pooled(tmp_path: Path) -> None:
    first, again = (tables(tmp_path / name, {}) for name in ("a", "b"))
    for name in ("saved", "pareto-memory", "layers"):
        assert len(figure_of(source.read([first, again]), name).axes) == 2
        assert len(figure_of(source.read([first]), name).axes) == 1
    with pytest.raises(ResultsError, match=r"results .*plot each folder alone"):
        figure_of(source.read([first, again]), "fidelity")


def test_one_seed_counts_once(tmp_path: Path) -> None:
    """A second run of the same seed and conditions would make the interval too narrow."""
    once, twice = tables(tmp_path / "a", {}), tables(tmp_path / "b", {}, {"wall_s": 9.0})
    halves = []
    for folder in (once, twice):
        (axis,) = figure_of(source.read([folder]), "accuracy").axes
        ((low, high),) = (s[:, 1] for s in axis.containers[0].lines[2][0].get_segments())
        halves.append(float(high - low) / 2)
    assert halves[0] == pytest.approx(halves[1])
    assert halves[0] == pytest.approx(12.706 * 1 / math.sqrt(2) / math.sqrt(2), rel=1e-3)


@pytest.mark.parametrize("column", OTHER)
def test_fidelity_refuses_to_pool_and_says_how_to_choose(tmp_path: Path, column: str) -> None:
    folder = tables(tmp_path, {}, {column: OTHER[column]})
    with pytest.raises(ResultsError) as caught:
        figure_of(source.read([folder]), "fidelity")
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert f"the runs differ in {column} " in text
    chosen = text.rpartition(f"--where {column}=")[2]
    assert len(figure_of(source.read([folder], {column: [chosen]}), "fidelity").axes) == 2


def test_panels_left_out_are_named(tmp_path: Path) -> None:
    folder = tables(tmp_path, *({"model": f"net{n}"} for n in range(8)))
    read = source.read([folder])
    for name, most in (("saved", 6), ("pareto-memory", 6), ("curves", 3), ("layers", 3)):
        title = " ".join(figure_of(read, name).get_suptitle().split())
        assert f"the first {most} of 8 panels, --where chooses others" in title


def test_costs_against_T_have_two_logarithmic_axes_of_a_decade(tmp_path: Path) -> None:
    """What is proportional to T is a straight line of slope 1, not a curve."""
    by_T = [{"T": T, "saved_bytes": T * 2**20} for T in (1, 2, 16)]
    read = source.read([tables(tmp_path, *by_T)])
    for name in ("saved", "peak", "step"):
        (axis,) = figure_of(read, name).axes
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        low, high = axis.get_ylim()
        assert high / low >= 9.99
    assert figure_of(read, "accuracy").axes[0].get_yscale() == "linear"


def test_pareto_leaves_out_what_costs_nothing_and_says_so(tmp_path: Path) -> None:
    folder = tables(tmp_path, {})
    runs = pd.read_csv(folder.runs_csv)
    ann = runs[runs["method"] == "tet"].assign(
        method="ann", method_config="{}", sops_per_sample=0, spikes_per_sample=0, test_acc=0.99
    )
    ann["run_id"] += "-ann"
    pd.concat([runs, ann]).to_csv(folder.runs_csv, index=False)
    for name in ("pareto-sops", "pareto-spikes"):
        figure = figure_of(source.read([folder]), name)
        assert "without ann, where it is 0" in " ".join(figure.get_suptitle().split())
        drawn = [x for line in figure.axes[0].lines for x in line.get_xdata()]
        assert min(drawn) > 0
    figure = figure_of(source.read([folder]), "pareto-memory")
    assert "without" not in figure.get_suptitle()
    ann.to_csv(folder.runs_csv, index=False)
    with pytest.raises(ResultsError, match="'sops_per_sample' above 0"):
        figure_of(source.read([folder]), "pareto-sops")


# --- profiles ---------------------------------------------------------------------------------


def aimed(path: Path, rows: Sequence[Mapping[str, Any]]) -> source.Source:
    """Runs with a target: the columns given, over those of one run of bptt."""
    folder = SuiteFolder(path)
    done(folder, SPEC, 0.9)
    plain = pd.read_csv(write(folder).runs_csv).iloc[0].to_dict()
    found = [{**plain, "target": 0.9, "run_id": f"run-{n}", **row} for n, row in enumerate(rows)]
    pd.DataFrame(found).to_csv(folder.runs_csv, index=False)
    return source.read([folder])


def ends(read: source.Source) -> dict[str, tuple[float, float]]:
    """Shares at factor 1 and at the largest factor, by method."""
    (axis,) = figure_of(read, "profiles").axes
    return {line.get_label(): (line.get_ydata()[0], line.get_ydata()[-1]) for line in axis.lines}


@pytest.mark.parametrize("status", ["diverged", "oom", "timeout", "failed"])
def test_a_run_that_ended_badly_has_missed_the_target(tmp_path: Path, status: str) -> None:
    rows: list[dict[str, Any]] = []
    for seed in range(4):
        rows.append({"seed": seed, "time_to_target_s": 10.0})
        bad = {"status": status, "time_to_target_s": None, "reason": "nan"} if seed else {}
        rows.append({"method": "rate", "seed": seed, "time_to_target_s": 5.0} | bad)
    assert ends(aimed(tmp_path / "x", rows)) == {"bptt": (0.75, 1.0), "rate": (0.25, 0.25)}


def test_whoever_was_ended_from_outside_has_missed_the_target_too(tmp_path: Path) -> None:
    """The record of a run that timed out is written by its parent, and names no machine."""
    late = {"status": "timeout", "time_to_target_s": None, "machine_id": None, "reason": "late"}
    rows = [{"time_to_target_s": 10.0}, {"method": "rate"} | late,
            {"seed": 1, "time_to_target_s": 10.0},
            {"method": "rate", "seed": 1, "time_to_target_s": 5.0}]  # fmt: skip
    assert ends(aimed(tmp_path / "x", rows)) == {"bptt": (0.5, 1.0), "rate": (0.5, 0.5)}


def test_curves_join_the_epochs_that_were_evaluated(tmp_path: Path) -> None:
    folder = tables(tmp_path, {})
    epochs = pd.read_csv(folder.epochs_csv)
    epochs = pd.concat([epochs.assign(epoch=n, test_acc=0.5 + n / 10) for n in (1, 2, 3)])
    epochs.loc[epochs["epoch"] == 2, "test_acc"] = None
    epochs.to_csv(folder.epochs_csv, index=False)
    left, _ = figure_of(source.read([folder]), "curves").axes
    assert [list(line.get_xdata()) for line in left.lines] == [[1, 3], [1, 3]]
    assert {line.get_marker() for line in left.lines} == {"None", ""} - {"None"}
    epochs[epochs["epoch"] == 1].to_csv(folder.epochs_csv, index=False)
    left, _ = figure_of(source.read([folder]), "curves").axes
    assert all(line.get_marker() not in ("", "None") for line in left.lines)  # a point is seen


@pytest.mark.parametrize(
    ("measured", "titles"),
    [((0, 2), ["at initialisation", "after training"]), ((0,), ["at initialisation"]),
     ((2,), ["after training"])],
)  # fmt: skip
def test_fidelity_names_only_what_was_measured(tmp_path: Path, measured: Any, titles: Any) -> None:
    folder = tables(tmp_path, {})
    path = folder.path / "fidelity.csv"
    frame = pd.read_csv(path)
    pd.concat([frame.assign(epoch=n) for n in measured]).to_csv(path, index=False)
    figure = figure_of(source.read([folder]), "fidelity")
    assert [a.get_title() for a in figure.axes if a.get_title()] == titles


def test_a_profile_takes_kernels_apart(tmp_path: Path) -> None:
    """The luckiest of a method's kernels is not its time."""
    times = {("bptt", "auto"): 2.0, ("rate", "auto"): 4.0,
             ("bptt", "reference"): 3.0, ("rate", "reference"): 1.0}  # fmt: skip
    rows = [{"method": m, "kernel": k, "time_to_target_s": t} for (m, k), t in times.items()]
    assert ends(aimed(tmp_path / "x", rows)) == {"bptt": (0.5, 1.0), "rate": (0.5, 1.0)}


def test_a_profile_does_not_wait_for_ann(tmp_path: Path) -> None:
    rows = [{"time_to_target_s": 2.0}, {"method": "rate", "time_to_target_s": 3.0},
            {"method": "ann", "T": 1, "time_to_target_s": 0.1}]  # fmt: skip
    assert ends(aimed(tmp_path / "x", rows)) == {"bptt": (1.0, 1.0), "rate": (0.0, 1.0)}


# --- what bounded a search --------------------------------------------------------------------


@pytest.fixture
def capacity(tmp_path: Path) -> SuiteFolder:
    """Two methods of two seeds; one of bptt's searches ended at its own limits."""
    rows = []
    for method, T, bound in (("bptt", 4, None), ("bptt", 4, "batch"), ("rate", 8, "T, batch")):
        rows.append({"method": method, "seed": len(rows), "largest_T": T, "largest_batch": 256,
                     "capacity_bound": bound, "kind": "capacity", "memory_gib": 0.25,
                     "kernel_path": None, "target": None})  # fmt: skip
    folder = SuiteFolder(tmp_path / "capacity")
    done(folder, SPEC, 0.9)
    plain = pd.read_csv(write(folder).runs_csv).iloc[0].to_dict()
    keep = ("dataset", "model", "T", "kernel", "precision", "memory", "status", "method_config",
            "settings", "settings_hash", "machine_id", "suite", "device")  # fmt: skip
    base = {k: plain[k] if k in keep else None for k in plain}
    found = [{**base, "run_id": f"run-{n}", **row} for n, row in enumerate(rows)]
    pd.DataFrame(found, columns=list(plain)).to_csv(folder.runs_csv, index=False)
    return folder


def test_a_limit_of_the_search_is_no_result_in_any_format(capacity: SuiteFolder) -> None:
    report = content.build(capacity)
    assert report.rows == [["bptt", "4", "≥ 256"], ["rate", "≥ 8", "≥ 256"]]
    said = "bounded: largest batch, largest T of 2 of 3 runs is the limit of the search"
    assert any(note.startswith(said) for note in report.notes)
    text = markdown.render(report)
    assert "| rate | ≥ 8 | ≥ 256 |" in text
    assert said in text
    assert r"rate & $\geq$ 8 & $\geq$ 256 \\" in latex.render(report)
    page = html.render(source.read([capacity]), View())
    assert "≥ 256" in page
    assert said in page
    cells = json.loads(data.to_json(report))["cells"]
    assert [cell["capacity_bound"] for cell in cells] == ["batch", "T, batch"]
    assert "capacity_bound" in data.to_csv(report).splitlines()[0].split(",")


def test_a_capacity_suite_says_its_memory_and_kernel_and_nothing_of_accuracy(
    capacity: SuiteFolder,
) -> None:
    report = content.build(capacity)
    assert "memory cap: 0.25 GiB" in report.facts
    assert any(fact.startswith("kernel: auto, ") for fact in report.facts)
    text = markdown.render(report)
    assert "fits into the memory" in report.legend
    for words in ("Accuracies", "headline", "Spikes", "unknown, precision"):
        assert words not in text


def test_a_suite_with_accuracies_keeps_its_legend(tmp_path: Path) -> None:
    report = content.build(tables(tmp_path, {}))
    assert report.legend == content.LEGEND
    assert "headline is the last epoch" in " ".join(report.facts)
    assert "bounded" not in " ".join(report.notes)
    assert all("capacity_bound" not in record for record in report.records)
    bare = SuiteFolder(tmp_path / "bad")
    ended(bare, SPEC, "failed", "no")
    assert content.build(write(bare)).rows == []


def test_percentages_end_where_they_do() -> None:
    """However wide the interval of a few seeds is."""
    _, axes = canvas.panels(1, 1, "wide")
    axes[0][0].errorbar([1, 2], [27.9, 75.0], [77.0, 4.0])
    canvas.accuracies(axes[0][0])
    assert axes[0][0].get_ylim() == (0.0, 100.0)
    _, axes = canvas.panels(1, 1, "narrow")
    axes[0][0].plot([1, 2], [70.0, 75.0])
    before = axes[0][0].get_ylim()
    canvas.accuracies(axes[0][0])
    assert axes[0][0].get_ylim() == before
