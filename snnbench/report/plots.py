"""Figures from the tables, one file each. The only door to matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from snnbench.errors import ResultsError, UsageError
from snnbench.store import SuiteFolder
from snnbench.tables import method_labels, read_runs

# Okabe-Ito: told apart by readers with any kind of colour vision, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B4513")
MARKERS = "osD^vPX*"


def draw(folder: SuiteFolder, figure: str, output: Path) -> Path:
    """Draw one figure of a suite's results into a file; its format is that of the suffix."""
    if figure not in FIGURES:
        raise UsageError(f"unknown figure '{figure}'; it can be: {', '.join(FIGURES)}")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UsageError('figures need matplotlib: pip install "snnbench[report]"') from error
    mpl.use("Agg")
    drawn = FIGURES[figure](folder)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(output, dpi=160)
    except (OSError, ValueError) as error:
        raise UsageError(f"{output}: cannot be written: {error}") from error
    return output


def fidelity(folder: SuiteFolder) -> Any:
    """Cosine and norm ratio to BPTT by layer, at initialisation and when measured last."""
    try:
        frame = pd.read_csv(folder.fidelity_csv)
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{folder.fidelity_csv}: no gradient fidelity was measured; set "
            "[measure.gradient_fidelity] every = 1 in the suite"
        ) from error
    last = frame["T"].max()
    frame = frame[frame["T"] == last]
    when = {"at initialisation": frame["epoch"].min(), "after training": frame["epoch"].max()}
    figure, axes = _panels(2, len(when), f"Gradients against exact BPTT, T = {last}")
    labels = method_labels(frame)
    for row, (column, name) in enumerate((("cos", "cosine"), ("norm_ratio", "norm ratio"))):
        for place, (title, epoch) in enumerate(when.items()):
            axis = axes[row][place]
            axis.axhline(1, color="0.7", linewidth=0.8)
            for i, (key, label) in enumerate(labels.items()):
                mine = frame[(frame["method"] == key[0]) & (frame["method_config"] == key[1])]
                mine = mine[mine["epoch"] == epoch].groupby("depth")[column]
                axis.errorbar(
                    mine.mean().index, mine.mean(), mine.std().fillna(0), label=label, **_style(i)
                )
            axis.set_title(title if row == 0 else "")
            axis.set_ylabel(name)
            axis.set_xlabel("layer, by depth" if row else "")
            axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes[0][0])
    return figure


def over_timesteps(column: str, name: str, scale: float) -> Callable[[SuiteFolder], Any]:
    """A figure of one column against the number of timesteps, mean and range over seeds."""

    def figure_of(folder: SuiteFolder) -> Any:
        frame = read_runs(folder)
        frame = frame[(frame["status"] == "done") & frame[column].notna()]
        if frame.empty:
            raise ResultsError(f"{folder.runs_csv}: no run has a value of '{column}'")
        figure, axes = _panels(1, 1, f"{folder.path.name}: mean and range over seeds")
        axis = axes[0][0]
        for i, ((method, config), label) in enumerate(method_labels(frame).items()):
            mine = frame[(frame["method"] == method) & (frame["method_config"] == config)]
            values = (mine[column] * scale).groupby(mine["T"])
            spread = [values.mean() - values.min(), values.max() - values.mean()]
            axis.errorbar(values.mean().index, values.mean(), spread, label=label, **_style(i))
        axis.set_xscale("log", base=2)
        steps = sorted(frame["T"].unique())
        axis.set_xticks(steps, [str(T) for T in steps])
        axis.set_xlabel("timesteps T")
        axis.set_ylabel(name)
        _legend(figure, axis)
        return figure

    return figure_of


FIGURES: dict[str, Callable[[SuiteFolder], Any]] = {
    "fidelity": fidelity,
    "accuracy": over_timesteps("test_acc", "test accuracy after the last epoch, %", 100),
    "saved": over_timesteps("saved_bytes", "saved for backward, MiB", 2**-20),
    "step": over_timesteps("step_ms_p50", "training step, ms", 1),
    "cosine": over_timesteps("grad_cos_bptt_init", "cosine to BPTT at initialisation", 1),
}


def _panels(rows: int, columns: int, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns + 2.2, 3 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title, fontsize=10)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(i: int) -> dict[str, Any]:
    """Colour, marker and line of the i-th method; the second eight are dashed."""
    line = "-" if i < len(COLOURS) else "--"
    look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // 8) % len(MARKERS)]}
    return {**look, "linestyle": line, "markersize": 4, "capsize": 2}


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
