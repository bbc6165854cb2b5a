"""How figures look, and how they become files or parts of a page. The only door to matplotlib."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from snnbench.errors import UsageError

# Okabe-Ito: told apart by readers with any kind of colour vision, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B4513")
MARKERS = "osD^vPX*"
INK = "#20262e"  # text and axes; a page may put its own colour there
LOOK: dict[str, Any] = {
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.fontsize": 8, "axes.spines.top": False,
    "axes.spines.right": False, "svg.fonttype": "none", "font.family": "DejaVu Sans",
    "text.parse_math": False,
}  # fmt: skip


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Draw in our look, the same bytes each time; raises UsageError without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UsageError('figures need matplotlib: pip install "snnbench[report]"') from error
    mpl.use("Agg")
    look: Any = {**LOOK, "svg.hashsalt": name}
    with mpl.rc_context(look):
        yield


def panels(rows: int, columns: int, title: str) -> tuple[Any, Any]:
    """A figure, and its axes as [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * columns + 2.0, 2.9 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    # As much of it on a line as leaves room for the legend, at 21 characters an inch.
    lines = [t for line in title.splitlines() for t in textwrap.wrap(line, 70 * columns)]
    figure.suptitle("\n".join(lines), fontsize=9, x=0.01, ha="left")
    for axis in axes.flat:
        axis.grid(color=INK, alpha=0.12, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def grid(count: int, title: str) -> tuple[Any, list[Any]]:
    """A figure with so many axes, at most three in a row."""
    columns = min(count, 3)
    figure, axes = panels(math.ceil(count / columns), columns, title)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def style(i: int) -> dict[str, Any]:
    """Colour, marker and line of the i-th method; the second eight are dashed."""
    line = "-" if i < len(COLOURS) else "--"
    look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // 8) % len(MARKERS)]}
    # Earlier ones are wider, so that equal curves show as a rim around the last.
    width = {"linewidth": max(1.0, 2.8 - 0.3 * i), "markersize": max(3.5, 7.0 - 0.6 * i)}
    return {**look, **width, "linestyle": line, "capsize": 2, "elinewidth": 0.8}


def legend(figure: Any, axes: Any) -> None:
    """One legend for all axes, at the right."""
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", frameon=False)


def timesteps(axis: Any, values: list[int]) -> None:
    """T on a logarithmic axis, with the measured values as ticks."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [str(T) for T in values])
    axis.minorticks_off()
    axis.set_xlabel("timesteps T")


def logarithmic(axis: Any, which: str) -> None:
    """Make the x or y axis logarithmic, with plain numbers at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    side = axis.xaxis if which == "x" else axis.yaxis
    axis.set(**{f"{which}scale": "log"})
    side.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_formatter(NullFormatter())


def a_decade(axis: Any) -> None:
    """Let a logarithmic y axis span a decade or more, so that it has ticks and no false slopes."""
    low, high = axis.get_ylim()
    if high < 10 * low:
        middle = math.sqrt(low * high)
        axis.set_ylim(middle / math.sqrt(10), middle * math.sqrt(10))


def accuracies(axis: Any, column: str = "test_acc") -> None:
    """Let a y axis of accuracies end at 0 and 100%, however wide an interval of few seeds is."""
    low, high = axis.get_ylim()
    if column == "test_acc":
        axis.set_ylim(max(low, 0.0), min(high, 100.0))


def depth(axis: Any, named: bool = True) -> None:
    """Layers by number along the x axis."""
    axis.set_xlabel("layer, by depth" if named else "")
    axis.xaxis.get_major_locator().set_params(integer=True)


def front(axis: Any, points: list[tuple[float, float]]) -> None:
    """A broad grey line behind everything else."""
    axis.plot(*zip(*points, strict=True), color=INK, alpha=0.3, linewidth=5, marker="o",
              markersize=11, markeredgewidth=0, solid_capstyle="round", zorder=0)  # fmt: skip


def save(figure: Any, path: Path) -> Path:
    """Write a .png, .svg or .pdf file, without the time of day in it."""
    stamp = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata=stamp)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be written: {error}") from error
    return path


def inline(figure: Any, name: str) -> str:
    """An <svg> for a page: transparent, in the page's text colour, with ids of its own."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for own in (INK, "#000000"):
        text = text.replace(own, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
