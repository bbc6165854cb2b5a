"""A result against a committed baseline, with limits: what continuous integration can trust.

A baseline file (JSON) holds the figures of every cell and the limits by which a figure may change:

    fall          absolute: accuracy may be lower by so much
    rise_share    relative: bytes, operations or time ratios may be higher by so much; 0 is exact
    change_share  relative, either way: what has no good direction, such as spikes

Times are compared only as ratios to another run of the same session (`yardstick`: one method and
kernel, same workload and seed), so that a slower machine changes nothing. Whatever is absent, did
not end well or is not finite fails: a gate that checks nothing is no gate. A figure without a limit
may change, but not vanish.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import pandas as pd
from annotated_types import Ge, Len

from snnbench.errors import ResultsError, UsageError
from snnbench.report.markdown import escape, table
from snnbench.spec import canonical, validate
from snnbench.store import SuiteFolder
from snnbench.tables import ESTIMATED, TEXT_COLUMNS, read_runs

SCHEMA = 1
RATIO = "step_ratio"
GONE = "not measured any more"
KEY = ("dataset", "model", "T", "kernel", "precision", "memory", "method", "method_config")
# A miss is infinity by definition, and no fault.
MAY_BE_INFINITE = ("_to_target", "_to_target_s", "_to_target_j")
# What some machines cannot measure; a pull request does not choose its machine.
OF_THE_MACHINE = {"energy_measured_j", "energy_to_target_j", "peak_reserved_bytes",
                  "peak_nvml_bytes"}  # fmt: skip


@dataclass(frozen=True)
class Limit:
    """How far a figure may be from the baseline; exactly one of the three."""

    fall: Annotated[float, Ge(0)] | None = None
    rise_share: Annotated[float, Ge(0)] | None = None
    change_share: Annotated[float, Ge(0)] | None = None

    def __post_init__(self) -> None:
        given = (self.fall, self.rise_share, self.change_share)
        if sum(v is not None for v in given) != 1:
            raise ValueError("give one of 'fall', 'rise_share' and 'change_share'")

    def __str__(self) -> str:
        if self.fall is not None:
            return f"-{self.fall:g}"
        if self.rise_share is not None:
            return f"+{100 * self.rise_share:g}%" if self.rise_share else "exact or less"
        assert self.change_share is not None
        return f"±{100 * self.change_share:g}%" if self.change_share else "exact"

    def holds(self, was: float, now: float) -> bool:
        """Whether the figure is within the limit; what rounds is not a change."""
        slack = 1e-9 * max(abs(was), abs(now))
        if self.fall is not None:
            return now >= was - self.fall - slack
        if self.rise_share is not None:
            return now <= was + self.rise_share * abs(was) + slack
        assert self.change_share is not None
        return abs(now - was) <= self.change_share * abs(was) + slack


DEFAULT_LIMITS = {
    "test_acc": Limit(fall=0.03),
    "spikes_per_sample": Limit(change_share=0.15),
    "saved_bytes": Limit(rise_share=0.0),
    "params_train": Limit(change_share=0.0),
    "macs_per_sample": Limit(change_share=0.0),
    RATIO: Limit(rise_share=0.75),
}


@dataclass(frozen=True)
class Yardstick:
    """The run whose step time is 1, within the same workload and seed."""

    method: str
    kernel: str


@dataclass(frozen=True)
class CellBaseline:
    """Figures of one cell, means over its seeds; None was not measured.

    `measured` names all columns that every seed had, with a limit or without.
    """

    dataset: str
    model: str
    T: int
    kernel: str
    precision: str
    memory: str
    method: str
    method_config: dict[str, Any]
    kernel_path: str | None
    seeds: tuple[int, ...]
    figures: dict[str, float | None]
    measured: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        """What a cell of a table must equal."""
        values = {**self.__dict__, "method_config": canonical(self.method_config)}
        return tuple(str(values[k]) for k in KEY)

    def __str__(self) -> str:
        parts = [self.method, self.model, f"T={self.T}", self.kernel]
        parts += [self.precision] if self.precision != "auto" else []
        return " ".join(parts)


@dataclass(frozen=True)
class Baseline:
    """A committed baseline file."""

    schema: int
    suite: str
    made: dict[str, str | None]
    yardstick: Yardstick | None
    limits: dict[str, Limit]
    cells: Annotated[tuple[CellBaseline, ...], Len(1)]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    cell: str
    figure: str
    was: float | None
    now: float | None
    limit: str
    ok: bool
    why: str = ""
    absolute: bool = False  # whether the limit is one of the difference, or of its share


@dataclass(frozen=True)
class Verdict:
    """All checks, and what else is worth a line."""

    suite: str
    checks: list[Check]
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """Checks that stop a pull request."""
        return [c for c in self.checks if not c.ok]


def read(path: Path) -> Baseline:
    """The baseline file; raises ResultsError with one line per mistake."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ResultsError(
            f"{path}: cannot be read: {error.strerror}; `snnbench gate SUITE --baseline FILE "
            "--update` writes one"
        ) from error
    except ValueError as error:
        raise ResultsError(f"{path}: not JSON: {error}") from error
    if isinstance(values, dict) and values.get("schema") != SCHEMA:
        raise ResultsError(f"{path}: schema {values.get('schema')}; this version reads {SCHEMA}")
    errors: list[str] = []
    baseline = validate(Baseline, values, errors)
    if baseline is None:
        raise ResultsError("\n".join(f"{path}: {error}" for error in errors))
    return baseline


def of(
    folder: SuiteFolder,
    suite: str,
    yardstick: Yardstick | None,
    limits: Mapping[str, Limit] = DEFAULT_LIMITS,
) -> dict[str, Any]:
    """A baseline made of results, as plain data; raises ResultsError if a run has no figures."""
    frame = read_runs(folder)
    frame = frame[frame["status"] != "skipped"]
    bad = frame[frame["status"] != "done"]
    if len(bad) or frame.empty:
        what = f"{bad.iloc[0]['run_id']} is {bad.iloc[0]['status']}" if len(bad) else "no runs"
        raise ResultsError(f"{folder.runs_csv}: no baseline can be made of it: {what}")
    if odd := not_finite(folder):
        raise ResultsError(f"{folder.runs_csv}: no baseline can be made of it: {odd[0].why}")
    cells = []
    for key, runs in _cells(frame).items():
        figures = {
            name: _middle(name, v) if (v := _figure(frame, runs, name, yardstick)) else None
            for name in limits
        }
        first = dict(zip(KEY, key, strict=True))
        path = runs["kernel_path"].iloc[0]
        own = {
            "T": int(runs["T"].iloc[0]),
            "method_config": json.loads(first["method_config"]),
            "kernel_path": None if pd.isna(path) else str(path),
            "seeds": sorted(int(s) for s in runs["seed"]),
        }
        cells.append({**first, **own, "figures": figures, "measured": _measured(runs)})
    made = {k: _one(frame, k) for k in ("version", "torch", "machine_id", "device", "source_hash")}
    return {
        "schema": SCHEMA,
        "suite": suite,
        "made": made,
        "yardstick": yardstick.__dict__ if yardstick else None,
        "limits": {
            name: {k: v for k, v in limit.__dict__.items() if v is not None}
            for name, limit in limits.items()
        },
        "cells": cells,
    }


def _one(frame: pd.DataFrame, name: str) -> str | None:
    values = sorted({str(v) for v in frame[name].dropna()})
    return ", ".join(values) or None


def _cells(frame: pd.DataFrame) -> dict[tuple[str, ...], pd.DataFrame]:
    found: dict[tuple[str, ...], pd.DataFrame] = {}
    filled = frame.assign(memory=frame["memory"].fillna("speed"))
    for _, runs in filled.groupby(list(KEY), sort=False, dropna=False):
        found[tuple(str(runs[k].iloc[0]) for k in KEY)] = runs
    return found


def _figure(
    frame: pd.DataFrame, runs: pd.DataFrame, name: str, yardstick: Yardstick | None
) -> dict[int, float]:
    """Values by seed; a time is the ratio to the yardstick's of the same workload and seed."""
    if name != RATIO:
        if name not in runs:
            return {}
        values = pd.to_numeric(runs[name], errors="coerce")
        both = zip(runs["seed"], values, strict=True)
        return {int(s): float(v) for s, v in both if pd.notna(v)}
    if yardstick is None:
        return {}
    unit = frame[(frame["method"] == yardstick.method) & (frame["kernel"] == yardstick.kernel)]
    workload = ["dataset", "model", "T"]
    mine = runs.iloc[0]
    for k in workload:
        unit = unit[unit[k] == mine[k]]
    times = _figure(frame, unit, "step_ms_p50", None)
    own = _figure(frame, runs, "step_ms_p50", None)
    return {s: own[s] / times[s] for s in own if times.get(s)}


def _measured(runs: pd.DataFrame) -> list[str]:
    """Figures that every run has and any machine can measure."""
    names = [c for c in ESTIMATED if c in runs and c not in OF_THE_MACHINE]
    return [c for c in names if runs[c].notna().all()]


def not_finite(folder: SuiteFolder) -> list[Check]:
    """A failed check for each figure that is text such as nan or inf, in runs.csv or epochs.csv.

    An empty cell is "not measured"; a table never has nan in it unless something went wrong.
    """
    found = []
    for path in (folder.runs_csv, folder.epochs_csv):
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error):
            continue  # a damaged runs.csv was refused before; epochs.csv need not be kept
        for row in rows:
            for name, text in row.items():
                if name is None or not isinstance(text, str) or name.endswith(MAY_BE_INFINITE):
                    continue
                odd = text.strip().lower().lstrip("+-") in ("nan", "inf", "infinity")
                if odd and name not in TEXT_COLUMNS:
                    at = f" in epoch {row['epoch']}" if row.get("epoch") else ""
                    why = f"{name} is {text}{at}"
                    found.append(
                        Check(str(row.get("run_id")), name, None, None, "finite", False, why)
                    )
    return found


def _middle(figure: str, values: Mapping[int, float]) -> float:
    """Mean over seeds; of times the median, which one disturbed run does not move."""
    return median(values.values()) if figure == RATIO else fmean(values.values())


def check(folder: SuiteFolder, baseline: Baseline) -> Verdict:
    """Every cell and figure of the baseline against what was measured now."""
    frame, checks = read_runs(folder), list(not_finite(folder))
    now = _cells(frame)
    # A run that makes no sense here is no fault, unless the baseline has figures of it.
    for _, row in frame[~frame["status"].isin(["done", "skipped"])].iterrows():
        reason = "" if pd.isna(row["reason"]) else f": {' '.join(str(row['reason']).split())}"
        why = f"{row['status']}{reason}"
        checks.append(Check(str(row["run_id"]), "status", None, None, "done", False, why))
    odd = {c.figure for c in checks}  # has failed before, and is no figure that is absent
    for cell in baseline.cells:
        found = _checked(cell, now.pop(cell.key, None), frame, baseline)
        checks += [c for c in found if c.why != GONE or c.figure not in odd]
    notes = [
        f"not in the baseline, and not checked: {' '.join(key[i] for i in (6, 1, 3))} T={key[2]}"
        for key in now
    ]
    for k in ("machine_id", "torch"):
        if (v := _one(frame, k)) != (was := baseline.made.get(k)):
            notes.append(f"{k} is {v}; the baseline was made with {was}")
    why = "no cell of the baseline has it: misspelt, or to be added by --update"
    known = {f for c in baseline.cells for f, v in c.figures.items() if v is not None}
    unknown = baseline.limits.keys() - known - (set() if baseline.yardstick else {RATIO})
    checks += [Check("every cell", f, None, None, "", False, why) for f in sorted(unknown)]
    notes += [f"{c.figure} of {c.cell}: {c.why}" for c in checks if c.ok and c.why]
    return Verdict(baseline.suite, checks, notes)


def _checked(
    cell: CellBaseline, runs: pd.DataFrame | None, frame: pd.DataFrame, baseline: Baseline
) -> list[Check]:
    name, runs = str(cell), None if runs is None else runs[runs["status"] == "done"]
    seeds = set() if runs is None else {int(s) for s in runs["seed"]}
    if runs is None or not set(cell.seeds) <= seeds:
        absent = ", ".join(str(s) for s in cell.seeds if s not in seeds)
        return [Check(name, "runs", None, None, "present", False, f"no figures of seed {absent}")]
    runs = runs[runs["seed"].isin(cell.seeds)]
    found = []
    path = _one(runs, "kernel_path")
    if path != cell.kernel_path:
        why = f"computed by the kernel {path}, not {cell.kernel_path}: nothing else is comparable"
        return [Check(name, "kernel", None, None, "equal", False, why)]
    for figure, limit in baseline.limits.items():
        was = cell.figures.get(figure)
        values = _figure(frame, runs, figure, baseline.yardstick)
        if was is None:
            continue
        if set(values) != set(cell.seeds):
            found.append(Check(name, figure, was, None, str(limit), False, GONE))
            continue
        now = _middle(figure, values)
        ok = limit.holds(was, now)
        # A limit on one side only: what moved as far to the other side makes the baseline old.
        gained = ok and limit.change_share is None and not limit.holds(-was, -now)
        why = "better than the baseline by more than its limit; --update" if gained else ""
        found.append(Check(name, figure, was, now, str(limit), ok, why, limit.fall is not None))
    still = {*_measured(runs), *baseline.limits}
    lost = [figure for figure in cell.measured if figure not in still]
    return found + [Check(name, f, None, None, "measured", False, GONE) for f in lost]


def to_markdown(verdict: Verdict) -> str:
    """A short summary for a comment on a pull request."""
    failed = verdict.failed
    state = f"FAILED: {len(failed)} of" if failed else "passed:"
    lines = [f"### snnbench gate {escape(verdict.suite)} {state} {len(verdict.checks)} checks", ""]
    if failed:
        shown = [_texts(c) for c in failed[:20]]
        lines += table(["cell", "figure", "baseline", "now", "limit", "why"], shown, right=False)
        lines += [*(["", f"and {len(failed) - 20} more"] if len(failed) > 20 else []), ""]
    figures = dict.fromkeys(c.figure for c in verdict.checks if c.was is not None)
    if figures:
        lines += ["| figure | cells | largest change | limit |", "| --- | ---: | ---: | --- |"]
    for figure in figures:
        mine = [c for c in verdict.checks if c.figure == figure and c.was is not None]
        far = max(mine, key=lambda c: abs(_change(c)))
        lines.append(f"| {escape(figure)} | {len(mine)} | {_moved(far)} | {far.limit} |")
    lines += ["", *(f"- {escape(note)}" for note in verdict.notes[:10])] if verdict.notes else []
    return "\n".join(lines) + "\n"


def _texts(c: Check) -> list[str]:
    was, now = ("" if v is None else f"{v:.6g}" for v in (c.was, c.now))
    return [c.cell, c.figure, was, now, c.limit, c.why or (was and now and _moved(c))]


def _moved(c: Check) -> str:
    """The change as its limit is given: a difference, or a share of the baseline's."""
    change = _change(c)
    if not math.isfinite(change):
        return "not finite"
    if not change:
        return "none" if c.now is not None else "not measured"
    return f"{change:+.3g}" if c.absolute else f"{100 * change:+.3g}%"


def _change(c: Check) -> float:
    if c.was is None or c.now is None:
        return 0.0
    if c.absolute:
        return c.now - c.was
    return (c.now - c.was) / abs(c.was) if c.was else float(c.now != 0)


def to_json(verdict: Verdict) -> dict[str, Any]:
    """The verdict as data."""
    return {
        "suite": verdict.suite,
        "ok": not verdict.failed,
        "checks": [c.__dict__ for c in verdict.checks],
        "notes": verdict.notes,
    }


def yardstick_of(folder: SuiteFolder, wanted: str) -> Yardstick:
    """`METHOD:KERNEL`, or METHOD on the reference kernel if it was run; raises UsageError."""
    frame = read_runs(folder)
    method, _, kernel = wanted.partition(":")
    mine: Sequence[str] = [str(k) for k in frame.loc[frame["method"] == method, "kernel"].unique()]
    if not mine or (kernel and kernel not in mine):
        raise UsageError(f"--yardstick {wanted}: no such runs; write METHOD or METHOD:KERNEL")
    return Yardstick(method, kernel or ("reference" if "reference" in mine else mine[0]))
