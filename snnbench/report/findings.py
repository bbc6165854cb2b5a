"""What the figures show, in sentences, and what they cannot show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from snnbench import stats
from snnbench.report.columns import percent
from snnbench.summary import Cell, Comparison

MOST = 8  # sentences on single comparisons
LEAST = 4  # pairs whose scatter says how many seeds would do; that of fewer says hardly anything
ACROSS_COLUMNS = ["method", "workloads", "IQM of last %", "95% interval", "P(above baseline)"]


def findings(
    cells: Sequence[Cell], baseline: str, named: Mapping[str, str] | None = None
) -> list[str]:
    """A sentence for each comparison, or their sum, and what so many seeds can show.

    `named` has words for conditions that are hashes.
    """
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
    lines += [_sentence(c, c.versus, varied, named or {}) for c in told if c.versus]
    return [*lines, *_power([c.versus for c in compared if c.versus])]


def _varied(cells: Sequence[Cell]) -> list[str]:
    """Conditions that tell workloads apart, in words that a reader knows."""
    names = [k for k in cells[0].conditions if k not in ("method", "method_config")]
    return [k for k in names if len({str(c.conditions[k]) for c in cells}) > 1]


def _sentence(
    cell: Cell, versus: Comparison, varied: Iterable[str], named: Mapping[str, str]
) -> str:
    d = versus.difference
    where = ", ".join(_condition(k, cell.conditions[k], named) for k in varied)
    mine = stats.estimate(cell.accuracies)
    accuracy = percent(None if mine is None else replace(mine, half=None))
    gap = percent(d, sign=True).removesuffix(f" ({d.n})")
    begin = (
        f"{cell.label}{f' ({where})' if where else ''}: {accuracy}%, {gap} points to "
        f"{versus.baseline} over {d.n} pair{'s' * (d.n > 1)}: "
    )
    return begin + verdict(versus) + "."


def _condition(name: str, value: Any, named: Mapping[str, str]) -> str:
    """`T = 4`; settings by what differs in them and not by their hash."""
    if name == "settings_hash" and value in named:
        return named[value]
    return f"{name.removesuffix('_hash')} = {value}"


def verdict(versus: Comparison) -> str:
    """Better, worse, or why neither can be said."""
    d, better = versus.difference, "better" if versus.difference.mean > 0 else "worse"
    if d.half is None:
        return "one pair shows nothing" if d.n == 1 else "no interval: not every value is finite"
    p = "" if versus.p_holm is None else f"exact p = {versus.p_holm:.2g} after Holm"
    if versus.shown:
        return f"{better} ({p})"
    if d.excludes_zero:
        if versus.p_least > stats.ALPHA:
            return (
                f"{better} by the interval, not shown: of n = {d.n}{_over(versus)} the smallest p "
                f"is {versus.p_least:.2g}"
            )
        return f"{better} by the interval, not shown by the exact test ({p})"
    if d.equal:
        return f"no evidence of a difference: n = {d.n} equal ones may be chance"
    needed = None
    if d.n >= LEAST:
        needed = stats.seeds_needed(d.mean, d.deviation or 0.0, tests=versus.tests)
    more = f"; to show a difference of this size takes {needed} seeds" if needed else ""
    return f"no evidence of a difference{more}"


def _over(versus: Comparison) -> str:
    """The comparisons that Holm corrects over, where there are several."""
    return f" and {versus.tests} comparisons" if versus.tests > 1 else ""


def _power(compared: Sequence[Comparison]) -> list[str]:
    """What this number of seeds can show, and how many seeds half a point and one would need."""
    best = min(compared, key=lambda c: (c.p_least, c.tests))
    lines = []
    if best.p_least > stats.ALPHA:
        n = stats.fewest_seeds(best.tests)
        after = f" after Holm over {best.tests} comparisons" if best.tests > 1 else ""
        lines.append(
            f"With n = {best.difference.n} the smallest two-sided p of an exact test is "
            f"{best.p_least:.2g}{after}: no difference can be shown at 5%; n = {n} can "
            f"({stats.smallest_p(n, best.tests):.2g})."
        )
    told = [c for c in compared if c.difference.n >= LEAST and c.difference.deviation]
    spread = [c.difference.deviation or 0.0 for c in told if not c.difference.equal]
    if spread:
        typical, tests = median(spread), max(c.tests for c in told)
        needed = {p: stats.seeds_needed(p / 100, typical, tests=tests) for p in (0.5, 1.0)}
        said = [f"{k} seeds for one of {p:g}" for p, k in needed.items() if k]
        if said:
            lines.append(
                f"Differences of pairs scatter by {100 * typical:.2f} points (median); to show a "
                f"difference with a power of 80% takes {', '.join(said)} points."
            )
    return lines


def across(cells: Sequence[Cell], baseline: str) -> list[list[str]]:
    """Interquartile mean over workloads, where there are several and every method ran in all."""
    # The artificial twin runs at T = 1 only: a workload of its own, which no other method shares.
    workloads = {c.workload for c in cells if c.accuracies and c.conditions["method"] != "ann"}
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
