"""What the figures show, in sentences, and what they cannot show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from snnbench import stats
from snnbench.summary import Cell, Comparison

MOST = 8  # sentences on single comparisons
ACROSS_COLUMNS = ["method", "workloads", "IQM of last %", "95% interval", "P(above baseline)"]


def findings(cells: Sequence[Cell], baseline: str) -> list[str]:
    """A sentence for each comparison, or their sum, and what so many seeds can show."""
    compared = [c for c in cells if c.versus]
    if not compared:
        others = [c for c in cells if baseline not in (c.label, c.conditions["method"])]
        if not others or not any(c.accuracies for c in others):
            return []
        return [
            f"No difference to {baseline} can be given: no run has a partner of {baseline} with "
            "the same seed, weights, batches, data, settings and machine."
        ]
    varied = _varied(cells)
    shown = [c for c in compared if c.versus and c.versus.difference.excludes_zero]
    lines = []
    if len(compared) > MOST:
        lines.append(
            f"Of {len(compared)} differences to {baseline}, the 95% interval of {len(shown)} "
            f"excludes 0 (about {0.05 * len(compared):.0f} would without any difference), and "
            f"{sum(c.versus.shown for c in compared if c.versus)} hold in an exact test too."
        )
    told = compared if len(compared) <= MOST else shown[:MOST]
    lines += [_sentence(c, c.versus, varied) for c in told if c.versus]
    return [*lines, *_power([c.versus for c in compared if c.versus])]


def _varied(cells: Sequence[Cell]) -> list[str]:
    """Conditions that tell workloads apart, in words that a reader knows."""
    names = [k for k in cells[0].conditions if k not in ("method", "method_config")]
    return [k for k in names if len({str(c.conditions[k]) for c in cells}) > 1]


def _sentence(cell: Cell, versus: Comparison, varied: Iterable[str]) -> str:
    d = versus.difference
    where = ", ".join(f"{k} = {cell.conditions[k]}" for k in varied)
    mine = math.fsum(cell.accuracies) / len(cell.accuracies)
    half = "" if d.half is None else f" ± {100 * d.half:.2f}"
    begin = (
        f"{cell.label}{f' ({where})' if where else ''}: {100 * mine:.2f}%, "
        f"{100 * d.mean:+.2f}{half} points to {versus.baseline} over {d.n} "
        f"pair{'s' * (d.n > 1)}: "
    )
    return begin + verdict(versus) + "."


def verdict(versus: Comparison) -> str:
    """Better, worse, or why neither can be said."""
    d, better = versus.difference, "better" if versus.difference.mean > 0 else "worse"
    if d.half is None:
        return "one pair shows nothing"
    p = "" if versus.p_holm is None else f"exact p = {versus.p_holm:.2g} after Holm"
    if versus.shown:
        return f"{better} ({p})"
    if d.excludes_zero:
        if stats.smallest_p(d.n) > stats.ALPHA:
            return (
                f"{better} by the interval, not shown: of n = {d.n} the smallest p is "
                f"{stats.smallest_p(d.n):.2g}"
            )
        return f"{better} by the interval, not shown by the exact test ({p})"
    needed = stats.seeds_needed(d.mean, d.deviation or 0.0)
    more = f"; to show a difference of this size takes {needed} seeds" if needed else ""
    return f"no evidence of a difference{more}"


def _power(compared: Sequence[Comparison]) -> list[str]:
    """What this number of seeds can show, and how many seeds half a point and one would need."""
    n = max(c.difference.n for c in compared)
    smallest = stats.smallest_p(n)
    lines = []
    if smallest > stats.ALPHA:
        lines.append(
            f"With n = {n} the smallest two-sided p of an exact test is {smallest:.2g}: no "
            "difference can be shown at 5%; n = 6 can (0.031)."
        )
    spread = [c.difference.deviation for c in compared if c.difference.deviation]
    if spread:
        typical = median(spread)
        needed = {points: stats.seeds_needed(points / 100, typical) for points in (0.5, 1.0)}
        said = [f"{k} seeds for one of {p:g}" for p, k in needed.items() if k]
        if said:
            lines.append(
                f"Differences of pairs scatter by {100 * typical:.2f} points (median); to show a "
                f"difference with a power of 80% takes {', '.join(said)} points."
            )
    return lines


def across(cells: Sequence[Cell], baseline: str) -> list[list[str]]:
    """Interquartile mean over workloads, where there are several and every method ran in all."""
    workloads = {c.workload for c in cells if c.accuracies}
    if len(workloads) < 2:
        return []
    rows = []
    for label in dict.fromkeys(c.label for c in cells):
        mine = [c for c in cells if c.label == label and c.accuracies]
        if {c.workload for c in mine} != workloads:
            continue
        mean, (low, high) = stats.interquartile_mean([c.accuracies for c in mine])
        above = [
            c.versus.improvement for c in mine if c.versus and c.versus.improvement is not None
        ]
        rows.append(
            [
                label,
                str(len(mine)),
                f"{100 * mean:.2f}",
                f"{100 * low:.2f} to {100 * high:.2f}",
                f"{sum(above) / len(above):.2f}" if above and label != baseline else "–",
            ]
        )
    return rows if len(rows) > 1 else []
