"""Figures from the tables. One that cannot be drawn says in one line what is missing for it.

Only seeds are pooled: whatever else differs, as a report's rows do, has a panel of its own.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from snnbench import stats
from snnbench.errors import ResultsError, UsageError
from snnbench.report import canvas
from snnbench.report.published import flat
from snnbench.report.source import Source
from snnbench.spec import did_you_mean
from snnbench.store import FAILURES
from snnbench.summary import VARIANT, Cell, method_labels, summarise
from snnbench.tables import CELL

MOST_PANELS = 6
TITLE_WIDTH = 46  # characters above a panel
FACTORS = np.geomspace(1, 32, 200)


def draw(source: Source, figure: str, outputs: Sequence[Path]) -> list[Path]:
    """Draw one figure into files, each in the format of its suffix. Raises ResultsError."""
    if figure not in FIGURES:
        raise UsageError(f"unknown figure '{figure}'{did_you_mean(figure, FIGURES)}")
    with canvas.drawing(figure):
        drawn = FIGURES[figure](source)
        return [canvas.save(drawn, path) for path in outputs]


def inline(source: Source, figure: str) -> str:
    """The figure as <svg> for a page; raises ResultsError where it cannot be drawn."""
    with canvas.drawing(figure):
        return canvas.inline(FIGURES[figure](source), figure)


def _measured(source: Source, column: str) -> pd.DataFrame:
    """Runs that are done and have the figure, with their labels; one seed counts once."""
    runs = source.runs
    runs = runs[runs["status"] == "done"]
    found = runs[runs[column].notna()] if column in runs else runs.iloc[:0]
    if found.empty:
        raise ResultsError(f"no run has a value of '{column}'")
    found = found.drop_duplicates([*_keys(source), *VARIANT, "seed"], keep="last")
    return _labelled(source, found)


def _keys(source: Source) -> list[str]:
    """What a workload is, beside its method: runs that differ in it are never pooled."""
    found = [k for k in CELL if k not in VARIANT]
    return [*found, "results"] if source.apart else found


def _labelled(source: Source, frame: pd.DataFrame) -> pd.DataFrame:
    """With a column `label` and the number of its style, and the conditions of the runs."""
    labels = method_labels(source.runs)
    runs = source.runs.drop_duplicates(["results", "run_id"])
    keys = list(zip(runs["method"], runs["method_config"], strict=True))
    names = runs[["results", "run_id", *CELL]].assign(
        label=[labels[k] for k in keys], style=[list(labels).index(k) for k in keys]
    )
    # Tables beside runs.csv have some of the conditions; a run has them all.
    frame = frame.drop(columns=[c for c in (*CELL, "label", "style") if c in frame])
    return frame.merge(names, on=["results", "run_id"])


def _of_done_runs(source: Source, frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table beside runs.csv that belong to runs that are done, one run a seed."""
    done = source.runs[source.runs["status"] == "done"]
    done = done[done["run_id"].isin(set(frame["run_id"]))]
    done = done.drop_duplicates([*_keys(source), *VARIANT, "seed"], keep="last")
    return _labelled(source, frame.merge(done[["results", "run_id"]], on=["results", "run_id"]))


def _workloads(
    source: Source, frame: pd.DataFrame, most: int = MOST_PANELS, but: str = ""
) -> tuple[list[tuple[str, pd.DataFrame]], str]:
    """The rows of each panel with its title, and what to say if there are too many panels.

    What no figure can show along its axes differs between panels; `but` is what this one does.
    """
    names = [k for k in _keys(source) if k != but and frame[k].nunique(dropna=False) > 1]
    if not names:
        return [("", frame)], ""
    settings, groups = _settings(source.runs), frame.groupby(names, dropna=False)
    found = [(_title(dict(zip(names, key, strict=True)), settings), rows) for key, rows in groups]
    return found[:most], _left_out(len(found), most)


def _left_out(count: int, most: int) -> str:
    return f"; the first {most} of {count} panels, --where chooses others" if count > most else ""


def _title(varied: Mapping[str, Any], settings: Mapping[str, str]) -> str:
    """What sets a panel apart, in words that a reader knows."""
    parts = []
    for name, value in varied.items():
        text = "none" if pd.isna(value) else str(value)
        parts.append(settings.get(text, text) if name == "settings_hash" else f"{name} = {text}")
    return "\n".join(textwrap.wrap(", ".join(parts), TITLE_WIDTH))


def _settings(runs: pd.DataFrame) -> dict[str, str]:
    """By hash of the settings, those in which they differ."""
    both = runs[["settings_hash", "settings"]].dropna().drop_duplicates("settings_hash")
    found = {str(h): flat(json.loads(s)) for h, s in both.itertuples(index=False)}
    keys = sorted({k for f in found.values() for k in f})
    varied = [k for k in keys if len({str(f.get(k)) for f in found.values()}) > 1]
    return {h: ", ".join(f"{k} = {f.get(k)}" for k in varied) or h for h, f in found.items()}


def _by_label(frame: pd.DataFrame) -> list[tuple[str, int, pd.DataFrame]]:
    groups = [(g["label"].iloc[0], int(g["style"].iloc[0]), g) for _, g in frame.groupby("label")]
    return sorted(groups, key=lambda g: g[1])


def _interval(values: pd.Series) -> tuple[float, float]:
    """Mean and half a 95% interval, 0 for one value."""
    e = stats.estimate([float(v) for v in values.dropna()])
    return (math.nan, 0.0) if e is None else (e.mean, e.half or 0.0)


def over_timesteps(
    column: str, name: str, scale: float, cost: bool = False
) -> Callable[[Source], Any]:
    """A figure of one column against the number of timesteps, mean and interval over seeds.

    Both axes of a cost are logarithmic: what grows with T is a line of slope 1.
    """

    def figure_of(source: Source) -> Any:
        frame = _measured(source, column)
        rooms, more = _workloads(source, frame, but="T")
        figure, axes = canvas.grid(
            len(rooms), f"{source.title}: mean and 95% interval over seeds{more}"
        )
        straight = cost and bool((frame[column] > 0).all())
        for axis, (title, rows) in zip(axes, rooms, strict=True):
            for label, i, mine in _by_label(rows):
                at = [(T, *_interval(g[column] * scale)) for T, g in mine.groupby("T")]
                steps, means, halves = zip(*at, strict=True)
                axis.errorbar(steps, means, halves, label=label, **canvas.style(i))
            canvas.timesteps(axis, sorted(rows["T"].unique()))
            if straight:
                canvas.logarithmic(axis, "y")
                canvas.a_decade(axis)
            axis.set(title=title, ylabel=name)
            canvas.accuracies(axis, column)
        canvas.legend(figure, axes)
        return figure

    return figure_of


def pareto(column: str, name: str, scale: float) -> Callable[[Source], Any]:
    """Accuracy against a cost; the line joins what nothing else beats in both."""

    def figure_of(source: Source) -> Any:
        _measured(source, column)
        accurate = _measured(source, "test_acc")
        styles = dict(zip(accurate["label"], accurate["style"], strict=True))
        found = summarise(source.runs, metrics=[column], by=_keys(source))
        known = [c for c in found if _known(c, "test_acc")]
        # Nothing is no cost to weigh: a network without spikes would be the front's left end.
        cells = [c for c in known if _known(c, column, above=0.0)]
        without = dict.fromkeys(c.label for c in known if c not in cells and _known(c, column))
        if not cells:
            raise ResultsError(f"no run has both 'test_acc' and a '{column}' above 0")
        varied = [
            k for k in _keys(source) if k != "T" and len({str(c.conditions[k]) for c in cells}) > 1
        ]
        settings = _settings(source.runs)
        rooms: dict[str, list[Cell]] = {}
        for c in cells:
            title = _title({k: c.conditions[k] for k in varied}, settings)
            rooms.setdefault(title, []).append(c)
        more = f"; without {', '.join(without)}, where it is 0" if without else ""
        more += _left_out(len(rooms), MOST_PANELS)
        shown = list(rooms.items())[:MOST_PANELS]
        figure, axes = canvas.grid(
            len(shown),
            f"{source.title}: 95% intervals, T rising to the label; grey is the Pareto front{more}",
        )
        for axis, (title, members) in zip(axes, shown, strict=True):
            points = []
            for label in dict.fromkeys(c.label for c in members):
                mine = sorted(
                    (c for c in members if c.label == label), key=lambda c: int(c.conditions["T"])
                )
                points += _trail(axis, mine, column, scale, styles[label])
            canvas.front(axis, stats.pareto_front(points))
            if max(x for x, _ in points) > 8 * max(min(x for x, _ in points), 1e-12):
                canvas.logarithmic(axis, "x")
            axis.set(title=title, xlabel=name, ylabel="test accuracy, last epoch, %")
            canvas.accuracies(axis)
        canvas.legend(figure, axes)
        return figure

    return figure_of


def _trail(
    axis: Any, cells: Sequence[Cell], column: str, scale: float, look: int
) -> list[tuple[float, float]]:
    """One method's points, joined from the smallest T to the largest."""
    pairs = [(c.estimates[column], c.estimates["test_acc"]) for c in cells]
    at = [(x.mean * scale, 100 * y.mean) for x, y in pairs if x and y]
    halves = [((x.half or 0) * scale, 100 * (y.half or 0)) for x, y in pairs if x and y]
    (xs, ys), (across, up) = zip(*at, strict=True), zip(*halves, strict=True)
    axis.errorbar(xs, ys, up, across, label=cells[0].label,
                  **{**canvas.style(look), "linewidth": 0.8, "elinewidth": 0.5})  # fmt: skip
    if len(cells) > 1:
        axis.annotate(f"T={cells[-1].conditions['T']}", at[-1], xytext=(5, 3), fontsize=6,
                      textcoords="offset points")  # fmt: skip
    return at


def _known(cell: Cell, column: str, above: float = -math.inf) -> bool:
    e = cell.estimates.get(column)
    return e is not None and math.isfinite(e.mean) and e.mean > above


def curves(source: Source) -> Any:
    """Training loss and test accuracy by epoch, mean and interval over seeds."""
    frame = source.epochs
    if frame.empty or "train_loss" not in frame:
        raise ResultsError("no epochs.csv with 'train_loss' beside the table of runs")
    frame = _of_done_runs(source, frame)
    if frame.empty:
        raise ResultsError("no run that is done has epochs")
    rooms, more = _workloads(source, frame, most=3)
    down, along = (2, len(rooms)) if len(rooms) > 1 else (1, 2)
    figure, axes = canvas.panels(
        down, along, f"{source.title}: mean and 95% interval over seeds{more}"
    )
    columns = (("test_acc", "test accuracy, %", 100.0), ("train_loss", "training loss", 1.0))
    for place, (title, rows) in enumerate(rooms):
        for which, (column, name, scale) in enumerate(columns):
            axis = axes[which][place] if down == 2 else axes[0][which]
            _bands(axis, rows, column, scale)
            canvas.accuracies(axis, column)
            below = which == down - 1 or down == 1
            axis.set(title="" if which else title, ylabel="" if place else name,
                     xlabel="epoch" if below else "")  # fmt: skip
    canvas.legend(figure, axes.flat)
    return figure


def _bands(axis: Any, rows: pd.DataFrame, column: str, scale: float) -> None:
    """Mean by epoch of every method, in a band of its interval."""
    for label, i, mine in _by_label(rows):
        mine = mine[mine[column].notna()]  # epochs without evaluation
        at = [(e, *_interval(g[column] * scale)) for e, g in mine.groupby("epoch")]
        if not at:
            continue
        epochs, means, halves = map(np.array, zip(*at, strict=True))
        look = {k: canvas.style(i)[k] for k in ("color", "linestyle", "linewidth")}
        marker = canvas.style(i)["marker"] if len(at) == 1 else ""  # one point is no line
        axis.plot(epochs, means, label=label, marker=marker, **look)
        axis.fill_between(epochs, means - halves, means + halves, color=look["color"],
                          alpha=0.12, linewidth=0)  # fmt: skip
    if column == "train_loss" and (rows[column].dropna() > 0).all():
        canvas.logarithmic(axis, "y")
        axis.set_ylim(bottom=0.7 * rows[column].min())
    axis.xaxis.get_major_locator().set_params(integer=True)


def by_layer(source: Source) -> Any:
    """Firing rate and gradient norm of every layer, by depth."""
    frame = source.layers
    named = {"firing_rate": "firing rate", "grad_norm": "gradient norm"}
    columns = [c for c in named if c in frame and frame[c].notna().any()]
    if not columns:
        raise ResultsError("no layers.csv with 'firing_rate' or 'grad_norm' was written")
    frame = _of_done_runs(source, frame)
    if frame.empty:
        raise ResultsError("no run that is done has layers")
    frame = frame[frame["T"] == frame["T"].max()]
    rooms, more = _workloads(source, frame, most=3)
    figure, axes = canvas.panels(
        len(rooms), len(columns), f"{source.title}: by layer, T = {frame['T'].max()}{more}"
    )
    for row, (title, rows) in zip(axes, rooms, strict=True):
        for axis, column in zip(row, columns, strict=True):
            for label, i, mine in _by_label(rows):
                mine = mine[mine[column].notna()]
                values = [(d, *_interval(g[column])) for d, g in mine.groupby("depth")]
                if values:
                    axis.errorbar(*zip(*values, strict=True), label=label, **canvas.style(i))
            axis.set(title=title if axis is row[0] else "", ylabel=named[column])
            canvas.depth(axis)
            if column == "grad_norm" and (rows[column].dropna() > 0).all():
                canvas.logarithmic(axis, "y")
    canvas.legend(figure, axes.flat)
    return figure


def fidelity(source: Source) -> Any:
    """Cosine and norm ratio to BPTT by layer, at initialisation and when measured last."""
    frame = source.fidelity
    if frame.empty:
        raise ResultsError(
            "no gradient fidelity was measured; set [measure.gradient_fidelity] every = 1 in the "
            "suite"
        )
    frame = _of_done_runs(source, frame)
    if frame.empty:
        raise ResultsError("no run that is done has its gradients compared")
    last = frame["T"].max()
    frame = frame[frame["T"] == last]
    _one_workload(source, frame)
    after = frame["epoch"].max()
    when = {"at initialisation": 0} if (frame["epoch"] == 0).any() else {}
    when |= {"after training": after} if after > 0 else {}
    figure, axes = canvas.panels(2, len(when), f"Gradients against exact BPTT, T = {last}")
    for row, (column, name) in enumerate((("cos", "cosine"), ("norm_ratio", "norm ratio"))):
        for place, (title, epoch) in enumerate(when.items()):
            axis = axes[row][place]
            axis.axhline(1, color=canvas.INK, alpha=0.3, linewidth=0.8)
            for label, i, mine in _by_label(frame[frame["epoch"] == epoch]):
                at = [(d, *_interval(g[column])) for d, g in mine.groupby("depth")]
                axis.errorbar(*zip(*at, strict=True), label=label, **canvas.style(i))
            axis.set(title="" if row else title, ylabel=name)
            canvas.depth(axis, named=row > 0)
    canvas.legend(figure, axes[0])
    return figure


def _one_workload(source: Source, frame: pd.DataFrame) -> None:
    """Raises ResultsError where a figure without room for panels would pool what differs."""
    settings = _settings(source.runs)
    for k in _keys(source):
        values = [str(v) for v in frame[k].unique()]
        if len(values) > 1:
            how = "plot each folder alone" if k == "results" else f"--where {k}={values[0]}"
            words = [settings.get(v, v) if k == "settings_hash" else v for v in values]
            raise ResultsError(
                f"the runs differ in {k} ({'; '.join(words)}), which must not be pooled; choose "
                f"one: {how}"
            )


def profiles(source: Source) -> Any:
    """Share of workloads on which a method reaches the target within a factor of the fastest."""
    try:
        _measured(source, "time_to_target_s")
    except ResultsError as error:
        raise ResultsError(f"{error}; set [measure] target in the suite") from error
    runs = _aimed(source)
    # `ann` runs at T = 1 only, where it has no partner.
    frame = _labelled(source, runs[runs["method"] != "ann"])
    # Whoever ends a run from outside does not know its machine: it is that of the others.
    if len(machines := frame["machine_id"].dropna().unique()) == 1:
        frame = frame.assign(machine_id=machines[0])
    at = frame[[*_keys(source), "target", "seed"]].astype("string").fillna("")
    table = frame.assign(at=at.agg("|".join, axis=1)).drop_duplicates(["at", "label"], keep="last")
    table = table.pivot(index="at", columns="label", values="time_to_target_s").dropna()
    if table.empty:
        raise ResultsError("no workload and seed on which every method was tried")
    said = f"{source.title}: time to target over {len(table)} workloads and seeds"
    figure, axes = canvas.panels(1, 1, f"{said}\na run that ended badly has missed it")
    axis = axes[0][0]
    costs = {str(label): table[label].tolist() for label in table}
    shares = stats.profiles(costs, FACTORS.tolist())
    for label, i, _ in _by_label(frame):
        look = canvas.style(i)
        axis.step(FACTORS, shares[label], where="post", label=label, color=look["color"],
                  linestyle=look["linestyle"])  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set(ylim=(-0.02, 1.02), xlabel="time over that of the fastest method",
             ylabel="share of workloads and seeds")  # fmt: skip
    canvas.legend(figure, [axis])
    return figure


def _aimed(source: Source) -> pd.DataFrame:
    """Runs with a target and the time to it: infinity for those that ended without figures."""
    runs = source.runs
    failed = runs["status"].isin(FAILURES) & runs["target"].notna()
    time_s = pd.to_numeric(runs["time_to_target_s"]).mask(failed, math.inf)
    known = time_s.notna() & (failed | (runs["status"] == "done"))
    return runs.assign(time_to_target_s=time_s)[known]


FIGURES: dict[str, Callable[[Source], Any]] = {
    "pareto-time": pareto("train_s", "training time, s", 1),
    "pareto-memory": pareto("saved_bytes", "saved for backward, MiB", 2**-20),
    "pareto-sops": pareto("sops_per_sample", "synaptic operations per sample", 1),
    "pareto-spikes": pareto("spikes_per_sample", "spikes per sample", 1),
    "accuracy": over_timesteps("test_acc", "test accuracy, last epoch, %", 100),
    "saved": over_timesteps("saved_bytes", "saved for backward, MiB", 2**-20, cost=True),
    "peak": over_timesteps("peak_bytes", "peak memory, MiB", 2**-20, cost=True),
    "step": over_timesteps("step_ms_p50", "training step, ms", 1, cost=True),
    "cosine": over_timesteps("grad_cos_bptt_init", "cosine to BPTT at initialisation", 1),
    "curves": curves,
    "layers": by_layer,
    "fidelity": fidelity,
    "profiles": profiles,
}
SHOWS = {
    "pareto-time": "accuracy against training time, with the Pareto front",
    "pareto-memory": "accuracy against bytes saved for backward, with the Pareto front",
    "pareto-sops": "accuracy against synaptic operations, with the Pareto front",
    "pareto-spikes": "accuracy against spikes, with the Pareto front",
    "accuracy": "accuracy against T",
    "saved": "bytes saved for backward against T",
    "peak": "peak memory against T",
    "step": "time of a training step against T",
    "cosine": "cosine to BPTT's gradient at initialisation against T",
    "curves": "accuracy and loss by epoch, in bands over seeds",
    "layers": "firing rate and gradient norm by layer",
    "fidelity": "cosine and norm ratio to BPTT's gradient by layer",
    "profiles": "share of workloads on which a method reaches the target within a factor",
}
