"""What a report says, independent of how it looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from snnbench import tables
from snnbench.stats import Estimate
from snnbench.store import SuiteFolder
from snnbench.suite import Claim, load, published_claims, shipped
from snnbench.tables import Cell

DASH = "–"
PUBLISHED_COLUMNS = [
    "method", "dataset", "model", "T", "published %", "measured, best test", "verdict", "source",
]  # fmt: skip

LEGEND = (
    "Accuracies are % of the test set. *last*: after the last epoch (headline). *best val*: at "
    "the epoch chosen on a validation split cut from train. *best test*: optimistic, for "
    "comparison with papers only. Mean ± half a 95% Student-t interval (n seeds); Δ is paired by "
    "seed, weights and batches. Spikes, SOPs and MACs are per test sample; memory and time are "
    "those of training steps, and compare within one machine only; on a CPU the peak is that of "
    "the whole process, torch included."
)


@dataclass(frozen=True)
class Report:
    """A title, lines above the table, the table, and notes below it."""

    title: str
    claim: str
    facts: list[str]
    columns: list[str]
    rows: list[list[str]]
    keys: int  # columns that say what a row is; the others are figures
    published: list[list[str]]
    notes: list[str]
    records: list[dict[str, Any]]


def build(folder: SuiteFolder) -> Report:
    """The report of one suite's results."""
    frame = tables.read_runs(folder)
    plan = folder.plan() or {}
    cells = tables.summarise(frame)
    lifted, own = _split_constant(cells)
    own += tables.differing_settings(cells)
    named = _named_settings(frame)
    figures = [*FIGURES, *(f for f in OPTIONAL if any(f[1](c) != DASH for c in cells))]
    suite = plan.get("suite", {})
    return Report(
        title=str(suite.get("name", folder.path.name)),
        claim=str(suite.get("claim", "")),
        facts=_facts(frame, lifted),
        columns=[
            "method",
            *("settings" if k == "settings_hash" else k for k in own),
            *(heading for heading, _ in figures),
        ],
        rows=[
            [
                c.label,
                *(named.get(c.conditions[k], str(c.conditions[k])) for k in own),
                *(write(c) for _, write in figures),
            ]
            for c in cells
        ],
        keys=1 + len(own),
        published=_published(str(suite.get("name", folder.path.name)), cells, frame),
        notes=_notes(frame, plan),
        records=[_record(cell) for cell in cells],
    )


def _split_constant(cells: list[Cell]) -> tuple[dict[str, str], list[str]]:
    """Conditions equal in all cells are said once, above the table; the others are columns."""
    keys = ("T", "dataset", "model")
    values = {k: {str(c.conditions[k]) for c in cells} for k in keys}
    lifted = {k: next(iter(v)) for k, v in values.items() if len(v) == 1}
    return lifted, [k for k in keys if k not in lifted]


def percent(e: Estimate | None, n: bool = False, sign: bool = False) -> str:
    """`97.21 ± 1.03 (3)`; a dash where nothing was measured."""
    if e is None:
        return DASH
    text = f"{100 * e.mean:{'+' if sign else ''}.2f}"
    text += f" ± {100 * e.half:.2f}" if e.half is not None else ""
    return text + (f" ({e.n})" if n or (sign and e.half is None) else "")


def quantity(e: Estimate | None) -> str:
    """The mean with a k, M or G."""
    if e is None:
        return DASH
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(e.mean) >= 0.9995 * size:  # what rounds to 1.00
            return f"{e.mean / size:.3g} {unit}"
    return f"{e.mean:.4g}"


def number(e: Estimate | None, digits: int, scale: float = 1.0) -> str:
    """The mean with a fixed number of digits."""
    return DASH if e is None else f"{e.mean * scale:.{digits}f}"


def _metric(name: str, write: Callable[..., str], *how: float) -> Callable[[Cell], str]:
    return lambda cell: write(cell.estimates[name], *how)


FIGURES: list[tuple[str, Callable[[Cell], str]]] = [
    ("last", lambda cell: percent(cell.estimates["test_acc"], n=True)),
    ("best val", _metric("test_acc_best_val", percent)),
    ("best test", _metric("test_acc_best_test", percent)),
    ("Δ last vs bptt", lambda cell: percent(cell.vs_bptt, sign=True)),
    ("spikes", _metric("spikes_per_sample", quantity)),
    ("rate", _metric("firing_rate", number, 3)),
    ("SOPs", _metric("sops_per_sample", quantity)),
    ("MACs", _metric("macs_per_sample", quantity)),
    ("peak MiB", _metric("peak_bytes", number, 1, 2**-20)),
    ("saved MiB", _metric("saved_bytes", number, 2, 2**-20)),
    ("step ms", _metric("step_ms_p50", number, 2)),
]


def _with_heads(cell: Cell) -> str:
    """Nothing where the heads end at weight 0, and so change nothing."""
    e, plain = cell.estimates["test_acc_with_heads"], cell.estimates["test_acc"]
    return DASH if e is None or plain is None or e.mean == plain.mean else percent(e)


# Shown where at least one cell has them.
OPTIONAL: list[tuple[str, Callable[[Cell], str]]] = [
    ("last with heads", lambda cell: _with_heads(cell)),
    ("cos init", _metric("grad_cos_bptt_init", number, 3)),
    ("norm ratio init", _metric("grad_norm_ratio_init", number, 3)),
    ("cos", _metric("grad_cos_bptt", number, 3)),
    ("norm ratio", _metric("grad_norm_ratio", number, 3)),
]


def _named_settings(frame: pd.DataFrame) -> dict[str, str]:
    """What sets the settings of a cell apart from those of the others, by their hash."""
    both = zip(frame["settings_hash"], frame["settings"], strict=True)
    flat = {h: _flat(json.loads(s)) for h, s in both if isinstance(s, str)}
    keys = sorted({k for f in flat.values() for k in f})
    varied = [k for k in keys if len({str(f.get(k)) for f in flat.values()}) > 1]
    return {
        h: ", ".join(f"{k}={f.get(k)}" for k in varied) for h, f in flat.items() if len(flat) > 1
    }


def _flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings by their key paths."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{path}{key}"
        flat |= _flat(value, f"{where}.") if isinstance(value, dict) else {where: value}
    return flat


def _published(suite: str, cells: list[Cell], frame: pd.DataFrame) -> list[list[str]]:
    """Published figures beside those measured by the papers' rule, and the verdict."""
    rows = []
    settings = dict(zip(frame["settings_hash"], frame["settings"], strict=True))
    for claim in published_claims():
        if claim.suite != suite:
            continue
        keys = ("dataset", "model", "method", "T")
        found = [c for c in cells if all(c.conditions[k] == getattr(claim, k) for k in keys)]
        options = claim.options or {}
        found = [
            c for c in found if options.items() <= json.loads(c.conditions["method_config"]).items()
        ]
        for cell in found:
            value = cell.estimates["test_acc_best_test"]
            recipe = json.loads(settings[cell.conditions["settings_hash"]])
            rows.append(
                [
                    cell.label,
                    claim.dataset,
                    claim.model,
                    str(claim.T),
                    f"{claim.value:.2f}" + ("" if claim.verified else " (unverified)"),
                    percent(value, n=True),
                    _verdict(claim, cell, recipe),
                    claim.source,
                ]
            )
    return rows


def _verdict(claim: Claim, cell: Cell, settings: dict[str, Any]) -> str:
    value = cell.estimates["test_acc_best_test"]
    epochs = cell.estimates["epochs"]
    if value is None or epochs is None:
        return "not measured"
    if epochs.mean != claim.epochs:
        return f"not comparable: {epochs.mean:g} epochs, not {claim.epochs}"
    if changed := _changed_recipe(claim.suite, settings):
        return f"not comparable: other {', '.join(changed)}"
    difference = 100 * value.mean - claim.value
    inside = abs(difference) <= claim.tolerance
    return f"{'inside' if inside else 'outside'} ±{claim.tolerance:g} ({difference:+.2f})"


def _facts(frame: pd.DataFrame, lifted: dict[str, str]) -> list[str]:
    """Where, with what and on what the figures were measured."""

    def values(name: str) -> str:
        found = sorted({str(v) for v in frame[name].dropna()})
        return ", ".join(found) or "unknown"

    known = "precision_path" in frame and frame["precision_path"].notna().any()
    precision = "precision_path" if known else "precision"
    facts = [f"{k}: {v}" for k, v in lifted.items()]
    facts += [
        f"machine: {values('device')} ({values('machine_id')})",
        f"versions: snnbench {values('version')}, torch {values('torch')}",
        f"kernel: {values('kernel_path')}, precision: {values(precision)}",
    ]
    unverified = frame[frame["data_verified"].astype(str).str.lower() == "false"]
    if len(unverified):
        names = ", ".join(sorted(set(unverified["dataset"])))
        facts.append(f"data_verified = false: {names} is not the official copy")
    return facts


def _notes(frame: pd.DataFrame, plan: dict[str, Any]) -> list[str]:
    """Counts, failures with their reasons, what is missing, and what the running cost."""
    counts = tables.counts(frame)
    notes = ["runs: " + ", ".join(f"{n} {status}" for status, n in counts.items())]
    for _, row in tables.failures(frame).iterrows():
        notes.append(f"{row['status']}: {row['run_id']}: {row['reason']}")
    absent = set(plan.get("runs", [])) - set(frame["run_id"])
    if absent:
        notes.append(f"missing: {len(absent)} of {len(plan['runs'])} planned runs have not begun")
    sources = frame["source_hash"].dropna().nunique()
    if sources > 1:
        notes.append(f"stale: the figures come from {sources} versions of the code; --redo renews")
    overhead = frame["overhead_s"].dropna().astype(float)
    if len(overhead):
        notes.append(
            f"orchestration: {overhead.median():.2f} s a run (median of {len(overhead)}, most "
            f"{overhead.max():.2f} s) beyond training, evaluation and measurement"
        )
    return notes


def _changed_recipe(suite: str, settings: dict[str, Any]) -> list[str]:
    """Settings that differ from the shipped suite of that name, or that make the data smaller."""
    shipped_suite = next(s for s in map(load, shipped()) if s.name == suite)
    train = {k: v for k, v in asdict(shipped_suite.train).items() if k != "timeout_s"}
    wanted = {"train": train, "data": shipped_suite.data, "model": shipped_suite.model}
    wanted["data"] = {"train_limit": None, "test_limit": None, **wanted["data"]}
    wanted["model"] = {"width": 1.0, **wanted["model"]}
    mine = _flat(settings)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in _flat(wanted).items()}
    return [k for k, v in plain.items() if mine.get(k, v) != v]


RECORD_COLUMNS = [
    "label", *tables.CELL, "n",
    *(f"{name}{end}" for name in (*tables.ESTIMATED, "test_acc_vs_bptt") for end in ("", "_ci95")),
]  # fmt: skip


def _record(cell: Cell) -> dict[str, Any]:
    """One summary row as numbers, for csv and json."""
    record: dict[str, Any] = {"label": cell.label, **cell.conditions, "n": cell.n}
    for name, e in (*cell.estimates.items(), ("test_acc_vs_bptt", cell.vs_bptt)):
        record[name] = None if e is None else e.mean
        record[f"{name}_ci95"] = None if e is None else e.half
    return {
        k: record[k].item() if hasattr(record[k], "item") else record[k] for k in RECORD_COLUMNS
    }
