"""Run folders -> tidy tables (one row per run, one per epoch) -> grouped summary.

The columns of runs.csv are a stable contract: later versions append.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from snnbench import stats
from snnbench.errors import ResultsError
from snnbench.registry import BUILT_IN
from snnbench.spec import canonical, digest
from snnbench.store import FAILURES, RunFolder, SuiteFolder, publish

RUN_COLUMNS = (
    "run_id", "suite", "status", "reason", "dataset", "model", "method", "method_config", "T",
    "seed", "kernel", "precision", "epochs", "test_acc", "test_acc_best_val", "test_acc_best_test",
    "spikes_per_sample", "firing_rate", "sops_per_sample", "macs_per_sample", "step_ms_p50",
    "step_ms_p25", "step_ms_p75", "train_s", "peak_bytes", "saved_bytes", "params_train",
    "params_infer", "init_hash", "order_hash", "data_hash", "data_verified", "machine_id",
    "source_hash", "version", "schema",
    # appended
    "settings", "settings_hash", "kernel_path", "device", "torch", "steps_timed", "best_val_epoch",
    "eval_s", "measure_s", "wall_s", "overhead_s", "null_reasons", "test_acc_with_heads",
    "grad_cos_bptt_init", "grad_norm_ratio_init", "grad_cos_bptt", "grad_norm_ratio",
    "memory", "precision_path", "kernel_fallbacks", "skipped_steps", "setup_s", "allocator",
)  # fmt: skip
EPOCH_COLUMNS = (
    "run_id", "suite", "dataset", "model", "method", "T", "seed", "epoch", "lr", "train_loss",
    "val_acc", "test_acc", "train_s", "eval_s",
)  # fmt: skip
FIDELITY_COLUMNS = (
    "run_id", "suite", "dataset", "model", "method", "method_config", "T", "seed", "epoch",
    "layer", "depth", "cos", "norm_ratio",
)  # fmt: skip
# Hashes such as 12e45678 are no numbers.
TEXT_COLUMNS = (
    "run_id", "suite", "status", "reason", "method_config", "init_hash", "order_hash", "data_hash",
    "source_hash", "version", "settings", "settings_hash", "torch", "kernel_fallbacks",
)  # fmt: skip
METRICS = (
    "spikes_per_sample", "firing_rate", "sops_per_sample", "macs_per_sample", "peak_bytes",
    "saved_bytes", "step_ms_p50", "grad_cos_bptt_init", "grad_norm_ratio_init", "grad_cos_bptt",
    "grad_norm_ratio", "test_acc_with_heads",
)  # fmt: skip
ESTIMATED = ("test_acc", "test_acc_best_val", "test_acc_best_test", "epochs", *METRICS)
# What must be equal for two runs to share a cell, or a comparison (the latter without the method).
CELL = (
    "dataset", "model", "T", "kernel", "precision", "memory", "settings_hash", "machine_id",
    "method", "method_config",
)  # fmt: skip


def run_row(suite: str, folder: RunFolder) -> dict[str, Any]:
    """The row of one run; what was not measured is absent."""
    spec = folder.spec()
    try:
        result = folder.result() or {"status": folder.status(), "reason": ""}
    except ResultsError as error:
        result = {"status": "missing", "reason": str(error)}
    events = folder.events()[0]
    settings = {
        "data": spec.data,
        "model": spec.model_options,
        "neuron": spec.neuron,
        "train": {k: v for k, v in asdict(spec.train).items() if k != "timeout_s"},
    }
    machine = result.get("machine", {})
    wall_s = sum(e["wall_s"] for e in events if e.get("event") == "exit")
    once = wall_s and sum(e.get("event") == "start" for e in events) == 1
    worked_s = [result[k] for k in ("train_s", "eval_s", "measure_s") if k in result]
    interrupted = [e["reason"] for e in events if e.get("event") == "interrupted"]
    if result["status"] == "interrupted":
        result["reason"] = interrupted[-1] if interrupted else "its process ended without a word"
    return {
        **{k: result.get(k) for k in RUN_COLUMNS},
        **{k: getattr(spec, k) for k in ("dataset", "model", "method", "T", "seed")},
        "run_id": folder.run_id,
        "suite": suite,
        "kernel": spec.kernel,
        "precision": spec.precision,
        "memory": spec.memory,
        "kernel_fallbacks": "; ".join(result.get("kernel_fallbacks") or []) or None,
        "method_config": canonical(spec.method_config),
        "schema": spec.schema,
        "settings": canonical(settings),
        "settings_hash": digest(canonical(settings))[:8],
        "machine_id": machine.get("machine_id"),
        "device": machine.get("gpu") or machine.get("cpu"),
        "torch": machine.get("versions", {}).get("torch"),
        "version": machine.get("snnbench"),
        "wall_s": wall_s or None,
        "overhead_s": wall_s - sum(worked_s) if once and len(worked_s) == 3 else None,
        **_fidelity_ends(result.get("fidelity") or []),
        "null_reasons": canonical(result["nulls"]) if result.get("nulls") else None,
    }


def epoch_rows(suite: str, folder: RunFolder) -> list[dict[str, Any]]:
    """One row per finished epoch of a run, from its result or, before that, from its events."""
    spec = folder.spec()
    try:
        result = folder.result() or {}
    except ResultsError:
        result = {}
    history = result.get("history") or folder.epochs()
    fixed = {k: getattr(spec, k) for k in ("dataset", "model", "method", "T", "seed")}
    return [
        {k: {**e, **fixed, "run_id": folder.run_id, "suite": suite}.get(k) for k in EPOCH_COLUMNS}
        for e in history
    ]


def _fidelity_ends(seen: list[dict[str, Any]]) -> dict[str, Any]:
    """Gradient fidelity at initialisation and when it was measured last."""
    if not seen:
        return {}
    return {
        "grad_cos_bptt_init": seen[0]["cos"],
        "grad_norm_ratio_init": seen[0]["norm_ratio"],
        "grad_cos_bptt": seen[-1]["cos"],
        "grad_norm_ratio": seen[-1]["norm_ratio"],
    }


def fidelity_rows(suite: str, folder: RunFolder) -> list[dict[str, Any]]:
    """One row per layer and epoch at which a finished run's gradients were compared."""
    spec = folder.spec()
    try:
        seen = (folder.result() or {}).get("fidelity") or []
    except ResultsError:
        seen = []
    fixed = {k: getattr(spec, k) for k in ("dataset", "model", "method", "T", "seed")}
    fixed |= {"method_config": canonical(spec.method_config), "suite": suite}
    return [
        {**fixed, "run_id": folder.run_id, "epoch": at["epoch"], "depth": depth, **layer}
        for at in seen
        for depth, layer in enumerate(at["layers"])
    ]


class Writer:
    """Keeps the tables of a suite's folder up to date; a run is read again only if told so.

    Rows of runs that have no folder here, as in a clone with committed tables, are kept.
    """

    def __init__(self, suite: str, folder: SuiteFolder) -> None:
        paths = (folder.runs_csv, folder.epochs_csv, folder.fidelity_csv)
        self._before = {path: _rows(path) for path in paths}
        self._suite, self._folder = suite, folder
        self._runs: dict[str, dict[str, Any]] = {}
        self._epochs: dict[str, list[dict[str, Any]]] = {}
        self._fidelity: dict[str, list[dict[str, Any]]] = {}
        for run in folder.runs():
            self.read(run)

    def read(self, run: RunFolder) -> dict[str, Any]:
        """Take in what a run's folder holds now; its row."""
        try:
            row = run_row(self._suite, run)
        except ResultsError as error:
            return {"status": "missing", "reason": str(error)}
        self._runs[run.run_id] = row
        self._epochs[run.run_id] = epoch_rows(self._suite, run)
        self._fidelity[run.run_id] = fidelity_rows(self._suite, run)
        return row

    def write(self) -> None:
        """Publish the tables, each whole or not at all."""
        folder, runs = self._folder, [[row] for row in self._runs.values()]
        self._write(folder.runs_csv, runs, RUN_COLUMNS)
        self._write(folder.epochs_csv, self._epochs.values(), EPOCH_COLUMNS)
        if any(self._fidelity.values()) or self._before[folder.fidelity_csv]:
            self._write(folder.fidelity_csv, self._fidelity.values(), FIDELITY_COLUMNS)

    def _write(
        self, path: Path, by_run: Iterable[list[dict[str, Any]]], columns: Iterable[str]
    ) -> None:
        kept = [row for row in self._before[path] if row.get("run_id") not in self._runs]
        rows = [*kept, *(row for rows in by_run for row in rows)]
        _publish(path, sorted(rows, key=lambda row: str(row["run_id"])), columns)


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table as text; none where there is no readable table."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if row.get("run_id")]
    except (OSError, ValueError, csv.Error):
        return []


def _publish(path: Path, rows: list[dict[str, Any]], columns: Iterable[str]) -> None:
    # dtype object: beside an empty cell an integer stays an integer, and True stays True.
    text = pd.DataFrame(rows, columns=list(columns), dtype=object).to_csv(index=False)
    publish(path, partial(_write_text, text))


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, "utf-8")


def read_runs(folder: SuiteFolder) -> pd.DataFrame:
    """runs.csv as it was written; raises ResultsError if it is missing or no such table."""
    try:
        frame = pd.read_csv(
            folder.runs_csv,
            dtype=dict.fromkeys(TEXT_COLUMNS, "string"),
            keep_default_na=False,  # a reason may read "None"
            na_values={name: [""] for name in RUN_COLUMNS if name != "reason"},
        )
    except FileNotFoundError as error:
        raise ResultsError(
            f"{folder.runs_csv}: no results yet; `snnbench run` makes them"
        ) from error
    except (OSError, ValueError) as error:
        raise ResultsError(f"{folder.runs_csv}: not a readable table: {error}") from error
    absent = [c for c in RUN_COLUMNS[:36] if c not in frame.columns]
    if absent:
        raise ResultsError(
            f"{folder.runs_csv}: column '{absent[0]}' is missing; is this a table "
            "that snnbench wrote?"
        )
    return frame.reindex(columns=[*frame.columns, *(c for c in RUN_COLUMNS if c not in frame)])


@dataclass(frozen=True)
class Cell:
    """All seeds of one method under one set of conditions."""

    conditions: Mapping[str, Any]
    label: str
    n: int
    estimates: Mapping[str, stats.Estimate | None]
    vs_bptt: stats.Estimate | None


def summarise(frame: pd.DataFrame) -> list[Cell]:
    """One cell per method, T, dataset, model and whatever else differs, in the order of runs.

    The difference to BPTT pairs runs of one seed that started from the same weights, saw the same
    batches and data, and ran on one kind of machine.
    """
    labels = method_labels(frame)
    done = frame[frame["status"] == "done"]
    # One seed counts once, however it was measured; a run with more figures is preferred.
    done = done.iloc[done["grad_cos_bptt_init"].notna().argsort(kind="stable")]
    done = done.drop_duplicates([*CELL, "seed"], keep="last").sort_index()
    pair = zip(done["seed"], done["init_hash"], done["order_hash"], done["data_hash"], strict=True)
    # A run of unknown origin is nobody's pair.
    done = done.assign(pair=["|".join(map(str, v)) if all(map(pd.notna, v)) else "" for v in pair])
    cells = []
    conditions = [c for c in CELL if c not in ("method", "method_config")]
    for key, group in done.groupby(conditions, sort=False, dropna=False):
        baseline = group[group["method"] == "bptt"]
        shared = dict(zip(conditions, key, strict=True))
        for (method, config), runs in group.groupby(["method", "method_config"], sort=False):
            estimates = {name: stats.estimate(_values(runs[name])) for name in ESTIMATED}
            difference = None
            if method != "bptt" and baseline["method_config"].nunique() == 1:
                difference = stats.paired(_by_pair(runs), _by_pair(baseline))
            where = {**shared, "method": method, "method_config": config}
            label = labels[str(method), str(config)]
            cells.append(Cell(where, label, len(runs), estimates, difference))
    order = {label: i for i, label in enumerate(labels.values())}
    keys = ("dataset", "model", "kernel", "precision", "settings_hash")
    return sorted(
        cells,
        key=lambda c: (*(str(c.conditions[k]) for k in keys), c.conditions["T"], order[c.label]),
    )


def _values(column: pd.Series) -> list[float]:
    return [float(v) for v in column if pd.notna(v)]


def _by_pair(runs: pd.DataFrame) -> dict[str, float]:
    """Last-epoch accuracy by everything that makes two runs a pair."""
    both = zip(runs["pair"], runs["test_acc"], strict=True)
    return {pair: float(value) for pair, value in both if pair and pd.notna(value)}


def method_labels(frame: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Name of each method variant: the options that differ within the method are named too."""
    variants: dict[str, list[str]] = {}
    for method, config in zip(frame["method"], frame["method_config"], strict=True):
        if config not in variants.setdefault(method, []):
            variants[method].append(config)
    rank = {name: i for i, name in enumerate(BUILT_IN["methods"])}
    labels = {}
    for method in sorted(variants, key=lambda m: (rank.get(m, len(rank)), m)):
        options = {c: json.loads(c) for c in variants[method]}
        names = dict.fromkeys(k for o in options.values() for k in o)
        varied = [k for k in names if len({canonical(o.get(k)) for o in options.values()}) > 1]
        for config in sorted(options, key=lambda c: [_sortable(options[c].get(k)) for k in varied]):
            named = "".join(f" {k}={options[config].get(k)}" for k in varied)
            labels[method, config] = f"{method}{named}"
    return labels


def _sortable(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, before everything else by text."""
    number = isinstance(value, int | float)
    return (not number, float(value) if number else 0.0, str(value))


def differing_settings(cells: Iterable[Cell]) -> list[str]:
    """Names of conditions beyond dataset, model, method and T in which the cells differ."""
    cells = list(cells)
    names = ("kernel", "precision", "machine_id", "settings_hash")
    return [n for n in names if len({str(c.conditions[n]) for c in cells}) > 1]


def counts(frame: pd.DataFrame) -> dict[str, int]:
    """Number of runs by status."""
    return {str(k): int(v) for k, v in frame["status"].value_counts().items()}


def failures(frame: pd.DataFrame) -> pd.DataFrame:
    """Runs that ended without a measurement, or were skipped, with their reasons."""
    return frame[frame["status"].isin([*FAILURES, "skipped", "interrupted"])]
