"""Rows of runs -> cells: all seeds of one method under one set of conditions, and comparisons.

A comparison pairs runs of one seed that started from the same weights, saw the same batches and
data, and ran on one kind of machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from snnbench import stats
from snnbench.errors import ResultsError
from snnbench.registry import BUILT_IN
from snnbench.spec import canonical
from snnbench.store import FAILURES
from snnbench.tables import CELL, ESTIMATED

VARIANT = ("method", "method_config")


@dataclass(frozen=True)
class Comparison:
    """Last-epoch accuracy less the baseline's, by pairs; p are those of exact sign-flip tests.

    `tests` is over how many comparisons Holm corrects, `p_least` the smallest corrected p that
    these numbers of pairs could have given.
    """

    baseline: str
    values: tuple[float, ...]
    difference: stats.Estimate
    p: float | None
    p_holm: float | None
    improvement: float | None
    tests: int = 1
    p_least: float = 1.0

    @property
    def shown(self) -> bool:
        """Whether the interval excludes 0 and an exact test, Holm-corrected, agrees at 5%."""
        low = self.p_holm is not None and self.p_holm <= stats.ALPHA
        return self.difference.excludes_zero and low


@dataclass(frozen=True)
class Cell:
    """All seeds of one method under one set of conditions."""

    conditions: Mapping[str, Any]
    label: str
    n: int
    estimates: Mapping[str, stats.Estimate | None]
    accuracies: tuple[float, ...]
    versus: Comparison | None
    nulls: Mapping[str, str] = field(default_factory=dict)  # what was not measured, and why

    @property
    def workload(self) -> tuple[tuple[str, str], ...]:
        """Everything but the method: what cells that may be compared share."""
        return tuple((k, str(v)) for k, v in self.conditions.items() if k not in VARIANT)


def summarise(
    frame: pd.DataFrame,
    baseline: str = "bptt",
    metrics: Iterable[str] = (),
    by: Sequence[str] = (),
) -> list[Cell]:
    """One cell per method, T, dataset, model and whatever else differs, in the order of runs.

    `baseline` is a method, or a label where it has variants; `metrics` are columns to estimate
    beside the usual ones, and `by` are columns to tell cells apart by.
    """
    labels = method_labels(frame)
    done = frame[frame["status"] == "done"]
    # One seed counts once, however it was measured; a run with more figures is preferred.
    done = done.iloc[done["grad_cos_bptt_init"].notna().argsort(kind="stable")]
    keys = list(dict.fromkeys([*CELL, *by]))
    done = done.drop_duplicates([*keys, "seed"], keep="last").sort_index()
    columns = {m: _floats(done[m]) for m in dict.fromkeys([*ESTIMATED, *metrics]) if m in done}
    pairs = _pairs(done)
    conditions = [c for c in keys if c not in VARIANT]
    done = done.reset_index(drop=True)
    cells = []
    for _, group in done.groupby(conditions, sort=False, dropna=False):
        shared = {c: group[c].iloc[0] for c in conditions}
        members = {
            (str(runs["method"].iloc[0]), str(runs["method_config"].iloc[0])): runs.index.to_numpy()
            for _, runs in group.groupby(list(VARIANT), sort=False)
        }
        found = []
        for (method, config), rows in members.items():
            values = {m: _finite_or_missed(column[rows]) for m, column in columns.items()}
            found.append(
                Cell(
                    {**shared, "method": method, "method_config": config},
                    labels[method, config],
                    len(rows),
                    {m: stats.estimate(v) for m, v in values.items()},
                    tuple(values["test_acc"]),
                    None,
                    _nulls(done["null_reasons"][rows]),
                )
            )
        accuracy = {
            c.label: _by_pair(pairs[rows], columns["test_acc"][rows])
            for c, rows in zip(found, members.values(), strict=True)
        }
        cells += _compared(found, accuracy, _baseline_of(found, baseline))
    order = {label: i for i, label in enumerate(labels.values())}
    names = ("dataset", "model", "kernel", "precision", "settings_hash")
    return sorted(
        cells,
        key=lambda c: (*(str(c.conditions[k]) for k in names), c.conditions["T"], order[c.label]),
    )


def _floats(column: pd.Series) -> np.ndarray[Any, np.dtype[np.float64]]:
    return pd.to_numeric(column, errors="coerce").to_numpy(float, na_value=np.nan)


def _finite_or_missed(values: np.ndarray[Any, Any]) -> list[float]:
    """Measured values; infinity, a miss, is one."""
    return [float(v) for v in values if not np.isnan(v)]


def _nulls(reasons: pd.Series) -> dict[str, str]:
    """Why a figure was not measured, by its name; the reasons of several runs follow each other."""
    found: dict[str, dict[str, None]] = {}
    for text in reasons.dropna().unique():
        for name, why in json.loads(text).items():
            found.setdefault(name, {})[str(why)] = None
    return {name: "; ".join(whys) for name, whys in found.items()}


def _pairs(runs: pd.DataFrame) -> np.ndarray[Any, Any]:
    """What makes two runs a pair; empty for a run of unknown origin, which is nobody's pair."""
    names = ("seed", "init_hash", "order_hash", "data_hash")
    both = zip(*(runs[name] for name in names), strict=True)
    return np.array(["|".join(map(str, v)) if all(map(pd.notna, v)) else "" for v in both], object)


def _by_pair(pairs: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    both = zip(pairs, values, strict=True)
    return {pair: float(value) for pair, value in both if pair and not np.isnan(value)}


def _baseline_of(cells: Sequence[Cell], wanted: str) -> str | None:
    """Label of the baseline among the cells of one workload; None where it is not one cell."""
    labels = [c.label for c in cells if c.label == wanted]
    labels = labels or [c.label for c in cells if c.conditions["method"] == wanted]
    return labels[0] if len(labels) == 1 else None


def _compared(
    cells: Sequence[Cell], accuracy: Mapping[str, Mapping[str, float]], baseline: str | None
) -> list[Cell]:
    """The cells of one workload with their comparisons; Holm corrects over its methods."""
    if baseline is None:
        return list(cells)
    found: dict[str, Comparison] = {}
    for cell in cells:
        values = stats.differences(accuracy[cell.label], accuracy[baseline])
        difference = stats.estimate(values)
        # A variant of the baseline's own method is a comparison as well, the baseline is not.
        if cell.label == baseline or difference is None:
            continue
        shared = accuracy[cell.label].keys() & accuracy[baseline].keys()
        above = stats.improvement(
            *([accuracy[c][p] for p in shared] for c in (cell.label, baseline))
        )
        p = stats.sign_flip(values)
        found[cell.label] = Comparison(baseline, tuple(values), difference, p, p, above)
    tested = {label: c.p for label, c in found.items() if c.p is not None}
    corrected = dict(zip(tested, stats.holm(list(tested.values())), strict=True))
    able = stats.holm([stats.smallest_p(len(found[label].values)) for label in tested])
    least = dict(zip(tested, able, strict=True))
    return [
        replace(
            c,
            versus=replace(
                found[c.label],
                p_holm=corrected.get(c.label),
                tests=max(1, len(tested)),
                p_least=least.get(c.label, 1.0),
            ),
        )
        if c.label in found
        else c
        for c in cells
    ]


def method_labels(frame: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Name of each method variant: the options that differ within the method are named too."""
    variants: dict[str, list[str]] = {}
    for method, config in zip(frame["method"], frame["method_config"], strict=True):
        if config not in variants.setdefault(method, []):
            variants[method].append(config)
    rank = {name: i for i, name in enumerate(BUILT_IN["methods"])}
    labels = {}
    for method in sorted(variants, key=lambda m: (rank.get(m, len(rank)), m)):
        options = {c: _options(c) for c in variants[method]}
        names = dict.fromkeys(k for o in options.values() for k in o)
        varied = [k for k in names if len({canonical(o.get(k)) for o in options.values()}) > 1]
        for config in sorted(options, key=lambda c: [_sortable(options[c].get(k)) for k in varied]):
            named = "".join(f" {k}={options[config].get(k)}" for k in varied)
            labels[method, config] = f"{method}{named}"
    return labels


def _options(config: str) -> dict[str, Any]:
    try:
        options = json.loads(config)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ResultsError(f"runs.csv: method_config = {config!r} is no JSON object")
    return options


def _sortable(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, before everything else by text."""
    number = isinstance(value, int | float)
    return (not number, float(value) if number else 0.0, str(value))


def differing_settings(cells: Iterable[Cell]) -> list[str]:
    """Names of conditions beyond dataset, model, method and T in which the cells differ."""
    cells = list(cells)
    names = ("kernel", "precision", "memory", "memory_gib", "machine_id", "settings_hash")
    return [n for n in names if len({str(c.conditions[n]) for c in cells}) > 1]


def counts(frame: pd.DataFrame) -> dict[str, int]:
    """Number of runs by status."""
    return {str(k): int(v) for k, v in frame["status"].value_counts().items()}


def failures(frame: pd.DataFrame) -> pd.DataFrame:
    """Runs that ended without a measurement, or were skipped, with their reasons."""
    return frame[frame["status"].isin([*FAILURES, "skipped", "interrupted"])]
