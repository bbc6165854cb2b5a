"""Two results, cell by cell: better, worse, no evidence, or why they cannot be compared.

Runs are paired by seed where they began with the same weights and saw the same batches; otherwise
the difference of means has Welch's interval. A verdict needs p <= 5% after Holm's correction over
the cells of one figure, of an exact test: sign flips of pairs, or permutations. Figures that no
clock and no noise decides (bytes saved, operations that do not depend on spikes) differ or are
equal.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from snnbench import stats
from snnbench.errors import ResultsError, UsageError
from snnbench.report.columns import DASH, Column, catalogue, chosen
from snnbench.report.published import flat
from snnbench.spec import did_you_mean
from snnbench.summary import method_labels
from snnbench.tables import read_table

SAME = ("dataset", "model", "T", "method")
CELL = (*SAME, "method_config", "kernel", "precision", "memory", "memory_gib", "settings_hash")
FIGURES = (
    "test_acc", "spikes_per_sample", "sops_per_sample", "saved_bytes", "peak_bytes", "step_ms_p50",
    "train_s",
)  # fmt: skip
EXACT = {"saved_bytes", "macs_per_sample", "dense_macs_per_sample", "membrane_updates_per_sample",
         "params_train", "params_infer", "params_bytes", "grads_bytes",
         "optimizer_bytes"}  # fmt: skip
OF_A_MACHINE = {"peak_bytes", "peak_reserved_bytes", "peak_nvml_bytes", "energy_measured_j",
                "energy_to_target_j", "activations_bytes", "largest_T",
                "largest_batch"}  # fmt: skip
TIMES = {"step_ms_p50", "step_ms_p25", "step_ms_p75", "train_s", "images_per_s",
         "time_to_target_s", "eval_s", "measure_s", "wall_s", "overhead_s", "data_share",
         "forward_share", "backward_share", "optimizer_share"}  # fmt: skip
DRIFT = 0.1  # by which two sessions on one machine may differ without any reason in the code
VERDICTS = ("worse", "better", "differs", "no evidence", "equal", "not comparable")


@dataclass(frozen=True)
class Row:
    """One figure of one cell on both sides; the difference is B less A."""

    label: str
    where: str
    figure: str
    a: stats.Estimate | None
    b: stats.Estimate | None
    difference: stats.Estimate | None
    paired: bool
    p: float | None
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """Both names, every row, and the columns that say how figures are written."""

    a: str
    b: str
    rows: list[Row]
    columns: dict[str, Column]

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows by verdict."""
        return {v: n for v in VERDICTS if (n := sum(row.verdict == v for row in self.rows))}


def read(name: str, results: Path) -> pd.DataFrame:
    """The table of runs of a folder, a file, a suite, or of `REVISION:PATH` in git."""
    for path in (Path(name), results / name):
        if path.is_dir():
            return read_table(path / "runs.csv")
        if path.is_file():
            return read_table(path)
    revision, colon, inside = name.partition(":")
    if not colon or not revision or not inside or revision.startswith("-"):
        known = [p.name for p in results.iterdir()] if results.is_dir() else []
        raise ResultsError(
            f"{name}: no such folder, file or suite{did_you_mean(name, known)}; a table in git "
            "is named REVISION:PATH, as HEAD~1:results/smoke"
        )
    return _from_git(revision, inside)


def _from_git(revision: str, path: str) -> pd.DataFrame:
    """The table as it was at a revision; PATH is that of a folder or file in the repository."""
    file = path if path.endswith(".csv") else f"{path.rstrip('/')}/runs.csv"
    # `./` is from here, as a user names files; without it git counts from the repository's root.
    wanted = f"{revision}:{'' if file.startswith(('/', './')) else './'}{file}"
    try:
        shown = subprocess.run(["git", "show", wanted], capture_output=True, check=False)
    except OSError as error:
        raise UsageError(f"{wanted}: git cannot be run: {error.strerror}") from error
    if shown.returncode:
        said = shown.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ResultsError(f"{wanted}: {said[0] if said else 'git has no such file'}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "runs.csv"
        copy.write_bytes(shown.stdout)
        try:
            return read_table(copy)
        except ResultsError as error:
            raise ResultsError(str(error).replace(str(copy), wanted)) from error


def compare(
    a: tuple[str, pd.DataFrame], b: tuple[str, pd.DataFrame], figures: Sequence[str] = ()
) -> Comparison:
    """Every cell of A and B with a verdict for each figure. Raises UsageError for a bad figure."""
    sides = [_as_run(frame).assign(side=side) for side, frame in (("a", a[1]), ("b", b[1]))]
    both = pd.concat(sides, ignore_index=True)
    numeric = [str(c) for c in both if pd.api.types.is_numeric_dtype(both[c])]
    known = {c.name: c for c in catalogue("bptt", numeric)}
    wanted = [c.name for c in chosen(figures or FIGURES, list(known.values()))]
    labels = method_labels(both)
    done = both[both["status"] == "done"]
    rows: list[Row] = []
    for label, where, mine, theirs, why in _matched(done, labels):
        for name in wanted:
            values = (_by_seed(mine, name), _by_seed(theirs, name))
            if any(values):
                rows.append(_row(label, where, known[name], mine, theirs, why))
    return Comparison(a[0], b[0], _corrected(rows), known)


def _as_run(frame: pd.DataFrame) -> pd.DataFrame:
    """With the kernel and precision that were used, whatever was asked for."""
    kernel, precision = (frame[f"{k}_path"].fillna(frame[k]) for k in ("kernel", "precision"))
    return frame.assign(kernel=kernel, precision=precision, memory=frame["memory"].fillna("speed"))


Match = tuple[str, str, pd.DataFrame, pd.DataFrame, str]
Key = tuple[str, ...]


def _matched(done: pd.DataFrame, labels: dict[tuple[str, str], str]) -> list[Match]:
    """Cells of both sides: exact partners, then partners under other conditions, then the rest."""
    cells: dict[str, dict[Key, pd.DataFrame]] = {"a": {}, "b": {}}
    for _, runs in done.groupby([*CELL, "side"], dropna=False, sort=False):
        first = runs.iloc[0]
        cells[first["side"]][tuple(str(first[k]) for k in CELL)] = runs
    varied = [k for k in ("dataset", "model", "T", "kernel", "precision", "memory")
              if done[k].nunique(dropna=False) > 1]  # fmt: skip

    def named(runs: pd.DataFrame) -> tuple[str, str]:
        first = runs.iloc[0]
        where = ", ".join(f"{k} = {first[k]}" for k in varied)
        return labels[first["method"], first["method_config"]], where

    found: list[Match] = []
    left = dict(cells["b"])
    alone: list[pd.DataFrame] = []
    for key, mine in cells["a"].items():
        if key in left:
            found.append((*named(mine), mine, left.pop(key), ""))
        else:
            alone.append(mine)
    for mine in alone:
        near = [(_differing(mine, theirs), key) for key, theirs in left.items()]
        near = [(names, key) for names, key in near if names is not None]
        if not near:
            found.append((*named(mine), mine, mine.iloc[:0], "only in A"))
            continue
        names, key = min(near, key=lambda n: len(n[0] or ()))
        theirs = left.pop(key)
        found.append((*named(mine), mine, theirs, _other(names or [], mine, theirs)))
    found += [(*named(runs), runs.iloc[:0], runs, "only in B") for runs in left.values()]
    return found


def _differing(mine: pd.DataFrame, theirs: pd.DataFrame) -> list[str] | None:
    """Conditions in which two cells differ; None if they are not the same method and workload.

    An option that only one side knows is one that a version of snnbench added.
    """
    a, b = mine.iloc[0], theirs.iloc[0]
    if any(a[k] != b[k] for k in SAME) or _changed(a["method_config"], b["method_config"]):
        return None
    names = [k for k in ("kernel", "precision", "memory") if str(a[k]) != str(b[k])]
    names += ["memory_gib"] if str(a["memory_gib"]) != str(b["memory_gib"]) else []
    return names + _changed(a["settings"], b["settings"])


def _changed(a: Any, b: Any) -> list[str]:
    """Keys that both sides know, with other values."""
    if not isinstance(a, str) or not isinstance(b, str):
        return []
    mine, theirs = flat(json.loads(a)), flat(json.loads(b))
    return [k for k in mine if k in theirs and mine[k] != theirs[k]]


def _other(names: Iterable[str], mine: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """Why two cells cannot be compared, with the values of both."""

    def values(runs: pd.DataFrame, name: str) -> str:
        if name in runs:
            return ", ".join(sorted(set(map(str, runs[name].dropna()))))
        return str(flat(json.loads(runs["settings"].iloc[0]))[name])

    return "; ".join(f"other {k} ({values(mine, k)} / {values(theirs, k)})" for k in names)


def _by_seed(runs: pd.DataFrame, name: str) -> dict[Any, float]:
    values = pd.to_numeric(runs[name], errors="coerce") if name in runs else pd.Series(dtype=float)
    return {s: float(v) for s, v in zip(runs["seed"], values, strict=False) if pd.notna(v)}


def _row(
    label: str, where: str, column: Column, mine: pd.DataFrame, theirs: pd.DataFrame, why: str
) -> Row:
    """One figure of a cell; times and p are judged later, all cells together."""
    a, b = _by_seed(mine, column.name), _by_seed(theirs, column.name)
    ends = (stats.estimate(list(a.values())), stats.estimate(list(b.values())))
    row = Row(label, where, column.name, *ends, None, False, None, "not comparable", why)
    if why:
        return row
    if not a or not b:
        return replace(row, why=f"not measured in {'A' if not a else 'B'}")
    names = ["data_hash", *(["machine_id"] if column.name in OF_A_MACHINE | TIMES else [])]
    # Runs that share their device disturb each other's clocks.
    told = all(_set(runs, "parallel_jobs") for runs in (mine, theirs))  # not by an earlier version
    names += ["parallel_jobs"] if told and column.name in TIMES else []
    differ = [n for n in names if _set(mine, n) != _set(theirs, n)]
    if differ:
        return replace(row, why=_other(differ, mine, theirs))
    same = _same_start(mine, theirs)
    shared = [s for s in a if s in b and s in same]
    if shared:
        differences = [b[s] - a[s] for s in shared]
        difference, p = stats.estimate(differences), stats.sign_flip(differences)
    else:
        sides = (list(b.values()), list(a.values()))
        difference, p = stats.unpaired(*sides), stats.permutation(*sides)
    return replace(row, difference=difference, paired=bool(shared), p=p, verdict="no evidence")


def _set(runs: pd.DataFrame, name: str) -> set[str]:
    return set(map(str, runs[name].dropna())) if name in runs else set()


def _same_start(mine: pd.DataFrame, theirs: pd.DataFrame) -> set[Any]:
    """Seeds whose runs began with the same weights and saw the same batches on both sides."""

    def starts(runs: pd.DataFrame) -> dict[Any, tuple[Any, Any]]:
        both = zip(runs["init_hash"], runs["order_hash"], strict=True)
        return {
            s: pair for s, pair in zip(runs["seed"], both, strict=True) if all(map(pd.notna, pair))
        }

    a, b = starts(mine), starts(theirs)
    return {s for s in a if a[s] == b.get(s)}


def _corrected(rows: list[Row]) -> list[Row]:
    """Verdicts, with p corrected over the cells of each figure."""
    judged = list(rows)
    for figure in dict.fromkeys(r.figure for r in rows):
        places = [i for i, r in enumerate(rows) if r.figure == figure and r.difference]
        tested = [i for i in places if rows[i].p is not None and not _equal(rows[i])]
        adjusted = stats.holm([rows[i].p or 0.0 for i in tested])
        corrected = dict(zip(tested, adjusted, strict=True))
        for i in places:
            judged[i] = _judged(rows[i], corrected.get(i), len(tested))
    return judged


def _equal(row: Row) -> bool:
    d = row.difference
    return d is not None and d.mean == 0 and not d.half


def _judged(row: Row, p: float | None, cells: int) -> Row:
    assert row.difference is not None
    d, better = row.difference, {c.name: c.better for c in catalogue("bptt", ())}
    direction = better.get(row.figure, 0) * (1 if d.mean > 0 else -1)
    said = {1: "better", -1: "worse", 0: "differs"}[direction]
    if _equal(row) and (row.paired or row.figure in EXACT):
        return replace(row, p=None, verdict="equal")
    if row.figure in EXACT and not d.half:
        return replace(row, p=None, verdict=said)
    if d.n == 1:
        return replace(row, p=None, why="one run a side shows nothing")
    if p is None or row.p is None:
        return replace(row, p=None, why="" if _equal(row) else "not every value is finite")
    if p > stats.ALPHA:
        if row.p <= stats.ALPHA:
            return replace(row, p=p, why=f"not after Holm over {cells} cells")
        return replace(row, p=p, why=_by_interval(row, d, said) if d.excludes_zero else "")
    base = abs(row.a.mean) if row.a else 0.0
    if row.figure in TIMES and abs(d.mean) <= DRIFT * base:
        return replace(row, p=p, why=f"within the {DRIFT:.0%} that two sessions differ by")
    return replace(row, p=p, verdict=said)


def _by_interval(row: Row, d: stats.Estimate, said: str) -> str:
    """What the interval says and the exact test does not, or cannot with so few pairs."""
    least = stats.smallest_p(d.n)
    few = f"; of n = {d.n} at least {least:.2g}" if row.paired and least > stats.ALPHA else ""
    return f"{said} by the interval, not by the exact test (p = {row.p:.2g}{few})"


COLUMNS = ["figure", "method", "where", "A", "B", "B - A", "%", "verdict"]


def cells(found: Comparison) -> list[list[str]]:
    """The rows as texts."""
    order = {name: i for i, name in enumerate(dict.fromkeys(r.figure for r in found.rows))}
    rows = sorted(found.rows, key=lambda r: order[r.figure])
    return [_texts(row, found.columns[row.figure]) for row in rows]


def _texts(row: Row, column: Column) -> list[str]:
    plain: Callable[[stats.Estimate | None], str] = column.write
    d = row.difference
    share = DASH
    if d and row.a and row.a.mean:
        share = f"{100 * d.mean / abs(row.a.mean):+.1f}"
    return [
        column.heading, row.label, row.where, plain(row.a), plain(row.b),
        DASH if d is None else _signed(d, plain), share,
        row.verdict + (f": {row.why}" if row.why else ""),
    ]  # fmt: skip


def _signed(d: stats.Estimate, write: Callable[[stats.Estimate | None], str]) -> str:
    """The difference with its sign and half its interval."""
    value = write(replace(d, mean=abs(d.mean), half=None)).removesuffix(f" ({d.n})")
    half = "" if d.half is None else f" ± {write(replace(d, mean=d.half, half=None))}"
    return f"{'-' if d.mean < 0 else '+'}{value}{half.removesuffix(f' ({d.n})')} ({d.n})"


def to_json(found: Comparison) -> dict[str, Any]:
    """The comparison as data."""
    return {
        "a": found.a,
        "b": found.b,
        "counts": found.counts,
        "rows": [asdict(row) for row in found.rows],
    }
