"""What a report says, independent of how it looks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from snnbench import summary, tables
from snnbench.errors import UsageError
from snnbench.report import columns, source
from snnbench.report.columns import Column
from snnbench.report.findings import across, findings
from snnbench.report.published import flat, published
from snnbench.report.source import Source
from snnbench.spec import canonical, did_you_mean
from snnbench.stats import ALPHA, bootstrap
from snnbench.store import SuiteFolder
from snnbench.summary import Cell

OF_ACCURACIES = (
    "Accuracies are % of the test set. *last*: after the last epoch (headline). *best val*: at "
    "the epoch chosen on a validation split cut from train. *best test*: optimistic, for "
    "comparison with papers only. Mean ± half a 95% Student-t interval (n seeds); Δ is paired by "
    "seed, weights and batches, and bold where its interval excludes 0. "
)
OF_COSTS = (
    "Spikes, SOPs and MACs are per test sample; memory and time are those of training steps, and "
    "compare within one machine only; on a CPU the peak is that of the whole process, torch "
    "included."
)
OF_CAPACITY = (
    "The largest T and the largest batch are those whose training step fits into the memory; ≥ "
    "stands where the search ended at its own limit, and more may fit."
)
LEGEND = OF_ACCURACIES + OF_COSTS
KEYS = ("T", "dataset", "model")
OF_A_NETWORK = ("spikes_per_sample", "sops_per_sample", "energy_ac_mac_nj_per_sample")
NOT_FIGURES = {"T", "seed", "schema", "data_verified", "best_val_epoch"}


@dataclass(frozen=True)
class View:
    """What of the results to show, and in which order; empty means the default."""

    by: Sequence[str] = ()
    columns: Sequence[str] = ()
    sort: str = ""
    baseline: str = "bptt"
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A title, lines above the table, the table, and notes below it."""

    title: str
    claim: str
    facts: list[str]
    columns: list[str]
    rows: list[list[str]]
    keys: int  # columns that say what a row is; the others are figures
    strong: frozenset[tuple[int, int]]  # row and column of what stands out of its interval
    breaks: frozenset[int]  # rows before which a new block begins
    figures: list[Column]
    findings: list[str]
    across: list[list[str]]
    published: list[list[str]]
    notes: list[str]
    cells: list[Cell]
    records: list[dict[str, Any]]
    legend: str


def build(folders: SuiteFolder | Sequence[SuiteFolder], view: View | None = None) -> Report:
    """The report of the results of one suite, or of several together. Raises UsageError."""
    view = view or View()
    folders = [folders] if isinstance(folders, SuiteFolder) else folders
    return of(source.read(folders, view.where), view)


def of(read: Source, view: View, everything: bool = False) -> Report:
    """The report of what was read; with `everything`, every column that has a value."""
    frame, measured = read.runs, _numeric(read.runs)
    by = list(dict.fromkeys([*view.by, *(["results"] if read.apart else [])]))
    unknown = [name for name in by if name not in frame]
    if unknown:
        close = did_you_mean(unknown[0], map(str, frame))
        raise UsageError(f"--by {unknown[0]}: no such column{close}")
    extra = ["kind"] if "kind" in frame and frame["kind"].nunique() > 1 else []
    bound = ["capacity_bound"] if frame["capacity_bound"].notna().any() else []
    bounded = _bounded(frame) if bound else frame
    cells = summary.summarise(bounded, view.baseline, measured, [*extra, *bound, *by])
    _check_baseline(view.baseline, frame, cells)
    lifted = {k: str(cells[0].conditions[k]) for k in KEYS if cells and _constant(cells, k)}
    own = [k for k in KEYS if cells and k not in lifted and k not in by]
    own = [*by, *own, *extra, *summary.differing_settings(cells)]
    figures = _figures(view, frame, cells, everything)
    cells = _in_order(cells, view, by, columns.catalogue(view.baseline, measured))
    named = _named_settings(frame)
    strong = {
        (r, 1 + len(own) + i)
        for r, cell in enumerate(cells)
        for i, column in enumerate(figures)
        if isinstance(column, columns.Difference)
        and cell.versus
        and cell.versus.difference.excludes_zero
    }
    return Report(
        title=read.title,
        claim=read.claim,
        facts=_facts(read, lifted, cells),
        columns=[
            "method",
            *("settings" if k == "settings_hash" else k for k in own),
            *(column.heading for column in figures),
        ],
        rows=[
            [
                c.label,
                *(named.get(c.conditions[k], str(c.conditions[k])) for k in own),
                *(column.text(c) for column in figures),
            ]
            for c in cells
        ],
        keys=1 + len(own),
        strong=frozenset(strong),
        breaks=frozenset(
            i
            for i in range(1, len(cells))
            if any(str(cells[i].conditions[k]) != str(cells[i - 1].conditions[k]) for k in view.by)
        ),
        figures=figures,
        findings=findings(cells, view.baseline, named),
        across=across(cells, view.baseline),
        published=published(read.suites, cells, frame),
        notes=_notes(read),
        cells=cells,
        records=[record(cell, measured) for cell in cells],
        legend=_legend(cells, figures),
    )


def _bounded(frame: pd.DataFrame) -> pd.DataFrame:
    """With what bounded the search of any seed of a cell, so that its seeds stay one cell."""

    def joined(values: pd.Series) -> str:
        return ", ".join(dict.fromkeys(n for v in values.dropna() for n in str(v).split(", ")))

    texts = frame["capacity_bound"].astype(object)
    keys = [frame[k] for k in tables.CELL]
    return frame.assign(capacity_bound=texts.groupby(keys, dropna=False).transform(joined))


def _legend(cells: Sequence[Cell], figures: Sequence[Column]) -> str:
    """What the figures that are shown mean."""
    names = {c.name for c in figures}
    parts = {
        OF_ACCURACIES: not cells or any(c.accuracies for c in cells),
        OF_COSTS: bool(names & {c.name for c in columns.COSTS}),
        OF_CAPACITY: any(isinstance(c, columns.Capacity) for c in figures),
    }
    return " ".join(text.strip() for text, said in parts.items() if said)


def _numeric(frame: pd.DataFrame) -> list[str]:
    """Columns of figures that were measured."""
    return [
        str(c)
        for c in frame.columns
        if c not in NOT_FIGURES
        and pd.api.types.is_numeric_dtype(frame[c])
        and not pd.api.types.is_bool_dtype(frame[c])
        and frame[c].notna().any()
    ]


def _constant(cells: Sequence[Cell], key: str) -> bool:
    """Conditions equal in all cells are said once, above the table; the others are columns."""
    return len({str(c.conditions[key]) for c in cells}) == 1


def _check_baseline(wanted: str, frame: pd.DataFrame, cells: Sequence[Cell]) -> None:
    labels = list(summary.method_labels(frame).values())
    if wanted == "bptt" or wanted in labels or wanted in set(frame["method"]) or not cells:
        return
    raise UsageError(f"--baseline {wanted}: no such method here{did_you_mean(wanted, labels)}")


def _figures(
    view: View, frame: pd.DataFrame, cells: Sequence[Cell], everything: bool
) -> list[Column]:
    """Columns of figures: those asked for, or the usual ones and what else was measured."""

    def measured(found: Sequence[Column]) -> list[Column]:
        return [c for c in found if any(c.text(cell) != columns.DASH for cell in cells)]

    known = columns.catalogue(view.baseline, _numeric(frame))
    if view.columns and list(view.columns) != ["all"]:
        return columns.chosen(view.columns, known)
    core = columns.core(view.baseline)
    names = {c.name for c in core}
    # A suite that measures cost only has no accuracy to show.
    if "kind" in frame and not (frame["kind"] == "train").any():
        core = measured(core)
    # p stands where so many pairs could have shown anything.
    able = [c for c in cells if c.versus and c.versus.p_least <= ALPHA]
    core[4:4] = [columns.EXACT_P] if able and len(core) > len(columns.COSTS) else []
    if everything or view.columns:
        more = [c for c in measured(known) if c.name not in {columns.EXACT_P.name} | names]
        return [*core, *more]
    return [*core, *measured(columns.OPTIONAL)]


def _in_order(
    cells: list[Cell], view: View, by: Sequence[str], known: Sequence[Column]
) -> list[Cell]:
    """By blocks, then by the column asked for, missing figures last."""
    if view.sort:
        down, name = view.sort.startswith("-"), view.sort.removeprefix("-")
        if name in (*tables.CELL, "label"):
            text = [c.label if name == "label" else str(c.conditions[name]) for c in cells]
            order = sorted(range(len(cells)), key=lambda i: _natural(text[i]), reverse=down)
        else:
            (column,) = columns.chosen([name], known, "--sort")
            found = [column.estimate(c) for c in cells]
            means = [math.nan if e is None else -e.mean if down else e.mean for e in found]
            order = sorted(range(len(cells)), key=lambda i: (math.isnan(means[i]), means[i]))
        cells = [cells[i] for i in order]
    return sorted(cells, key=lambda c: [_natural(str(c.conditions[k])) for k in by])


def _natural(text: str) -> tuple[bool, float, str]:
    try:
        return (False, float(text), "")
    except ValueError:
        return (True, 0.0, text)


def _named_settings(frame: pd.DataFrame) -> dict[str, str]:
    """What sets the settings of a cell apart from those of the others, by their hash."""
    both = zip(frame["settings_hash"], frame["settings"], strict=True)
    found = {h: flat(json.loads(s)) for h, s in both if isinstance(s, str)}
    keys = sorted({k for f in found.values() for k in f})
    varied = [k for k in keys if len({str(f.get(k)) for f in found.values()}) > 1]
    return {
        h: ", ".join(f"{k}={f.get(k)}" for k in varied) for h, f in found.items() if len(found) > 1
    }


def _facts(read: Source, lifted: dict[str, str], cells: Sequence[Cell]) -> list[str]:
    """Where, with what, on what and how often the figures were measured."""
    frame = read.runs

    def values(name: str) -> str:
        found = sorted({str(v) for v in frame[name].dropna()})
        return ", ".join(found) or "unknown"

    known = "precision_path" in frame and frame["precision_path"].notna().any()
    precision = "precision_path" if known else "precision"
    kernel = "kernel_path" if frame["kernel_path"].notna().any() else "kernel"  # as asked for
    machines = frame.dropna(subset=["machine_id"]).groupby("machine_id")["device"].first()
    facts = [f"{k}: {v}" for k, v in lifted.items()]
    for machine, device in machines.items():
        facts.append(f"machine: {'unknown' if pd.isna(device) else device} ({machine})")
    if len(machines) > 1:
        facts.append("several machines: each has rows of its own, and no difference spans two")
    facts += [
        f"versions: snnbench {values('version')} (source {values('source_hash')}), "
        f"torch {values('torch')}",
        f"kernel: {values(kernel)}, precision: {values(precision)}",
    ]
    if len(caps := frame["memory_gib"].dropna().unique()) == 1:
        facts.append(f"memory cap: {caps[0]:g} GiB")
    if cells:
        ns = sorted({c.n for c in cells})
        n = str(ns[0]) if len(ns) == 1 else f"{ns[0]} to {ns[-1]}"
        last = "; the headline is the last epoch, nothing is selected"
        headline = last if any(c.accuracies for c in cells) else ""
        facts.append(f"n: {n} seed{'s' * (n != '1')} a row{headline}")
    counted = any(c.estimates.get(k) for c in cells for k in OF_A_NETWORK)
    if counted and "kind" in frame and (frame["kind"] == "cost").any():
        facts.append(
            "kind cost: nothing is trained; spikes, SOPs and energies are those of a network "
            "after a few steps"
        )
    if read.where:
        shown = ", ".join(f"{k} = {' or '.join(v)}" for k, v in read.where.items())
        facts.append(f"only runs with {shown}")
    unverified = frame[frame["data_verified"].astype(str).str.lower() == "false"]
    if len(unverified):
        names = ", ".join(sorted(set(unverified["dataset"])))
        facts.append(f"data_verified = false: {names} is not the official copy")
    return facts


def _notes(read: Source) -> list[str]:
    """Counts, failures with their reasons, what is missing, and what the running cost."""
    frame = read.runs
    counts = summary.counts(frame)
    notes = ["runs: " + ", ".join(f"{n} {status}" for status, n in counts.items())]
    for _, row in summary.failures(frame).iterrows():
        notes.append(f"{row['status']}: {row['run_id']}: {row['reason']}")
    if absent := read.missing():
        notes.append(f"missing: {absent} of {read.planned()} planned runs have not begun")
    sources = frame["source_hash"].dropna().nunique()
    if sources > 1:
        notes.append(
            f"stale: the figures come from {sources} versions of the code; --redo-stale renews them"
        )
    for column, what in SHARED.items():
        several = pd.to_numeric(frame.get(column, pd.Series(dtype=float)), errors="coerce") > 1
        if several.any():
            notes.append(f"{what} ({several.sum()} of {len(frame)} runs; --by {column} parts them)")
    bounds = frame["capacity_bound"].dropna()
    if len(bounds):
        axes = ", ".join(dict.fromkeys(f"largest {n}" for b in bounds for n in str(b).split(", ")))
        notes.append(
            f"bounded: {axes} of {len(bounds)} of {len(frame)} runs is the limit of the search and "
            "not of the memory, marked ≥; raise most_T or most_batch in [capacity]"
        )
    notes += _unmeasured(frame)
    if "timing_warning" in frame:
        notes += _doubtful_times(frame["timing_warning"])
    overhead = frame["overhead_s"].dropna().astype(float)
    if len(overhead):
        notes.append(
            f"orchestration: {overhead.median():.2f} s a run (median of {len(overhead)}, most "
            f"{overhead.max():.2f} s) beyond training, evaluation and measurement"
        )
    return notes


# What the record says of how a run was done, and what it means for its figures.
SHARED = {
    "parallel_jobs": "times: runs shared their device, which disturbs clocks",
    "batch_split": "batches in parts, each with BatchNorm statistics of its own",
}
_FIGURE = re.compile(r"\d+(?:\.\d+)?(?=[ %])")


def _doubtful_times(warnings: pd.Series) -> list[str]:
    """One line for each kind of doubt about step times, with the range of its figures."""
    found: dict[str, list[list[str]]] = {}
    for warning in warnings.dropna():
        for text in str(warning).split("; "):
            kind = _FIGURE.sub("{}", text.replace("{", "(").replace("}", ")"))
            found.setdefault(kind, []).append(_FIGURE.findall(text))
    lines = []
    for kind, figures in found.items():
        ends = [(min(f, key=float), max(f, key=float)) for f in zip(*figures, strict=True)]
        said = kind.format(*(low if low == high else f"{low} to {high}" for low, high in ends))
        lines.append(f"times: {said} ({len(figures)} of {len(warnings)} runs)")
    return lines


def _unmeasured(frame: pd.DataFrame) -> list[str]:
    """One line for each reason why something was not measured, with what it was."""
    found: dict[str, dict[str, int]] = {}
    for text in frame["null_reasons"].dropna():
        for name, why in json.loads(text).items():
            names = found.setdefault(str(why), {})
            names[name] = names.get(name, 0) + 1
    return [
        f"not measured: {', '.join(names)}: {why} ({max(names.values())} of {len(frame)} runs)"
        for why, names in found.items()
    ]


_DIFFERENCE = ("test_acc_vs_bptt", "test_acc_vs_baseline")
RECORD_COLUMNS = [
    "label", *tables.CELL, "n",
    *(f"{name}{end}" for name in (*tables.ESTIMATED, "test_acc_vs_bptt") for end in ("", "_ci95")),
    "test_acc_boot_low", "test_acc_boot_high", "baseline", "test_acc_vs_baseline",
    "test_acc_vs_baseline_ci95", "test_acc_vs_baseline_boot_low", "test_acc_vs_baseline_boot_high",
    "pairs", "p", "p_holm", "probability_of_improvement", "null_reasons",
]  # fmt: skip


def record(cell: Cell, measured: Sequence[str] = ()) -> dict[str, Any]:
    """One summary row as numbers, for csv, json and parquet."""
    found: dict[str, Any] = {"label": cell.label, **cell.conditions, "n": cell.n}
    versus = cell.versus
    difference = versus.difference if versus else None
    to_bptt = difference if versus and versus.baseline == "bptt" else None
    both = zip(_DIFFERENCE, (to_bptt, difference), strict=True)
    for name, e in (*cell.estimates.items(), *both):
        found[name] = None if e is None else e.mean
        found[f"{name}_ci95"] = None if e is None else e.half
    intervals = {
        "test_acc": cell.accuracies,
        "test_acc_vs_baseline": versus.values if versus else (),
    }
    for name, values in intervals.items():
        ends = bootstrap(values) or (None, None)
        found[f"{name}_boot_low"], found[f"{name}_boot_high"] = ends
    if versus:
        found |= {
            "baseline": versus.baseline, "pairs": len(versus.values), "p": versus.p,
            "p_holm": versus.p_holm, "probability_of_improvement": versus.improvement,
        }  # fmt: skip
    if cell.nulls:
        found["null_reasons"] = canonical(cell.nulls)
    more = [f"{m}{end}" for m in measured if m in cell.estimates for end in ("", "_ci95")]
    by = [k for k in cell.conditions if k not in tables.CELL]
    return {
        k: v.item() if isinstance(v := found.get(k), np.generic) else v
        for k in dict.fromkeys([*RECORD_COLUMNS, *by, *more])
    }
