"""Run folders -> tidy tables: one row per run, one per epoch, and one per layer.

The columns of runs.csv are a stable contract: later versions append.
"""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from snnbench.errors import ResultsError
from snnbench.runs.publish import beside, place
from snnbench.spec import canonical, digest
from snnbench.store import RunFolder, SuiteFolder

Rows = Callable[[str, "Content"], list[dict[str, Any]]]
RowsOfRun = dict[Path, list[dict[str, Any]]]
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
    "kind", "memory_gib", "silent_share", "saturated_share", "dead_layers",
    "dense_macs_per_sample", "membrane_updates_per_sample", "energy_ac_mac_nj_per_sample",
    "energy_memory_nj_per_sample", "energy_measured_j", "params_bytes", "grads_bytes",
    "optimizer_bytes", "activations_bytes", "peak_reserved_bytes", "peak_nvml_bytes", "data_share",
    "forward_share", "backward_share", "optimizer_share", "images_per_s", "timing_warning",
    "warm_up_s", "target", "time_to_target_s", "energy_to_target_j", "epochs_to_target",
    "spikes_to_target", "largest_T", "largest_batch", "capacity_bound", "warnings", "parallel_jobs",
    "batch_split",
)  # fmt: skip
EPOCH_COLUMNS = (
    "run_id", "suite", "dataset", "model", "method", "T", "seed", "epoch", "lr", "train_loss",
    "val_acc", "test_acc", "train_s", "eval_s",
    # appended
    "energy_j", "samples", "spikes_per_sample",
)  # fmt: skip
LAYER_COLUMNS = (
    "run_id", "suite", "dataset", "model", "method", "method_config", "T", "seed", "layer", "depth",
    "neurons", "weights", "spikes_per_sample", "firing_rate", "silent_share", "saturated_share",
    "window_share", "grad_norm_init", "grad_norm", "sops_per_sample", "macs_per_sample",
    "dense_macs_per_sample", "membrane_updates_per_sample",
)  # fmt: skip
FIDELITY_COLUMNS = (
    "run_id", "suite", "dataset", "model", "method", "method_config", "T", "seed", "epoch",
    "layer", "depth", "cos", "norm_ratio",
)  # fmt: skip
# Hashes such as 12e45678 are no numbers.
TEXT_COLUMNS = (
    "run_id", "suite", "status", "reason", "method_config", "init_hash", "order_hash", "data_hash",
    "source_hash", "version", "settings", "settings_hash", "torch", "kernel_fallbacks",
    "kind", "dead_layers", "timing_warning", "capacity_bound", "warnings",
)  # fmt: skip
METRICS = (
    "spikes_per_sample", "firing_rate", "sops_per_sample", "macs_per_sample", "peak_bytes",
    "saved_bytes", "step_ms_p50", "grad_cos_bptt_init", "grad_norm_ratio_init", "grad_cos_bptt",
    "grad_norm_ratio", "test_acc_with_heads", "silent_share", "saturated_share",
    "dense_macs_per_sample", "membrane_updates_per_sample", "energy_ac_mac_nj_per_sample",
    "energy_memory_nj_per_sample", "energy_measured_j", "params_bytes", "grads_bytes",
    "optimizer_bytes", "activations_bytes", "peak_reserved_bytes", "peak_nvml_bytes", "data_share",
    "forward_share", "backward_share", "optimizer_share", "images_per_s", "time_to_target_s",
    "energy_to_target_j", "epochs_to_target", "spikes_to_target", "largest_T", "largest_batch",
)  # fmt: skip
ESTIMATED = ("test_acc", "test_acc_best_val", "test_acc_best_test", "epochs", *METRICS)
# What must be equal for two runs to share a cell, or a comparison (the latter without the method).
CELL = (
    "dataset", "model", "T", "kernel", "precision", "memory", "memory_gib", "settings_hash",
    "machine_id", "method", "method_config",
)  # fmt: skip


class Content:
    """What a run's folder holds, each file read once; raises ResultsError without its spec."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.run_id = folder, folder.run_id
        self.spec = folder.spec()
        self.result: dict[str, Any] = {}  # of a run that has ended
        self.damage = ""
        try:
            self.result = folder.result() or {}
        except ResultsError as error:
            self.damage = str(error)

    @property
    def condition(self) -> dict[str, Any]:
        """What sets its runs apart from others, in every table."""
        return {k: getattr(self.spec, k) for k in ("dataset", "model", "method", "T", "seed")}


def run_row(suite: str, run: Content) -> dict[str, Any]:
    """The row of one run; what was not measured is absent."""
    spec = run.spec
    result = run.result or (
        {"status": "missing", "reason": run.damage}
        if run.damage
        else {"status": run.folder.status(), "reason": ""}
    )
    events = run.folder.events()[0]
    essence = spec.essence()
    settings: dict[str, Any] = {
        "data": spec.data,
        "model": spec.model_options,
        "neuron": spec.neuron,
        **{k: essence[k] for k in ("train", "kind") if k in essence},
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
        **run.condition,
        "run_id": run.run_id,
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
        "kind": spec.kind,
        "memory_gib": None if spec.capacity is None else spec.capacity.memory_gib,
        "dead_layers": ", ".join(result.get("dead_layers") or []) or None,
        "warnings": "; ".join(result.get("warnings") or []) or None,
        **_to_target(spec.measure.target, result, spec.T),
        "null_reasons": canonical(result["nulls"]) if result.get("nulls") else None,
    }


def epoch_rows(suite: str, run: Content) -> list[dict[str, Any]]:
    """One row per finished epoch of a run, from its result or, before that, from its events."""
    fixed = {**run.condition, "run_id": run.run_id, "suite": suite}
    return [
        {k: {**e, **fixed}.get(k) for k in EPOCH_COLUMNS}
        for e in run.result.get("history") or run.folder.epochs()
    ]


def _fidelity_ends(seen: list[dict[str, Any]]) -> dict[str, Any]:
    """Gradient fidelity at initialisation and when it was measured last."""
    if not seen:
        return {}
    at_init = seen[0] if seen[0]["epoch"] == 0 else {}  # that comparison may have failed
    return {
        "grad_cos_bptt_init": at_init.get("cos"),
        "grad_norm_ratio_init": at_init.get("norm_ratio"),
        "grad_cos_bptt": seen[-1]["cos"],
        "grad_norm_ratio": seen[-1]["norm_ratio"],
    }


def _to_target(target: float | None, result: dict[str, Any], T: int) -> dict[str, Any]:
    """What training cost until an epoch's test accuracy reached the target; infinity if none did.

    Epochs at a smaller T, from which a network was inherited, cost and cannot reach it.
    Evaluation does not count. Spikes are those per sample of the validation split after an epoch,
    times the samples trained on in it.
    """
    if target is None or result["status"] != "done":
        return {"target": target}
    time_s = spikes = 0.0
    seen, waiting, counted = 0, 0, True
    for event in result.get("history") or []:
        time_s += event["train_s"]
        waiting, seen = waiting + event["samples"] - seen, event["samples"]
        if event["test_acc"] is None:
            continue
        each = event.get("spikes_per_sample")
        counted &= each is not None
        spikes += (each or 0.0) * waiting
        waiting = 0
        if event["test_acc"] >= target and event["T"] == T:
            return {
                "target": target,
                "time_to_target_s": time_s,
                "energy_to_target_j": event.get("energy_j"),
                "epochs_to_target": event["epoch"],
                "spikes_to_target": spikes if counted else None,
            }
    never = ("time_to_target_s", "energy_to_target_j", "epochs_to_target", "spikes_to_target")
    return {"target": target, **dict.fromkeys(never, math.inf)}


def layer_rows(suite: str, run: Content) -> list[dict[str, Any]]:
    """One row per layer of a finished run, in the order of the data."""
    fixed = run.condition | {"method_config": canonical(run.spec.method_config), "suite": suite}
    return [
        {**fixed, "run_id": run.run_id, "depth": depth, **layer}
        for depth, layer in enumerate(run.result.get("layers") or [])
    ]


def fidelity_rows(suite: str, run: Content) -> list[dict[str, Any]]:
    """One row per layer and epoch at which a finished run's gradients were compared."""
    fixed = run.condition | {"method_config": canonical(run.spec.method_config), "suite": suite}
    return [
        {**fixed, "run_id": run.run_id, "epoch": at["epoch"], "depth": depth, **layer}
        for at in run.result.get("fidelity") or []
        for depth, layer in enumerate(at["layers"])
    ]


class Writer:
    """Keeps the tables of a suite's folder up to date.

    What was read of a run is held until it is written, and no longer: later it is copied from
    one version of a table into the next.  Tables that are not as this writer left them are made
    anew from the folders of all runs.  Rows of runs that have no folder here that can be read, as
    in a clone with committed tables, are kept.
    """

    def __init__(self, suite: str, folder: SuiteFolder) -> None:
        self._suite, self._folder = suite, folder
        self._kinds: dict[Path, tuple[Rows, Sequence[str]]] = {
            folder.runs_csv: (lambda suite, run: [run_row(suite, run)], RUN_COLUMNS),
            folder.epochs_csv: (epoch_rows, EPOCH_COLUMNS),
            folder.layers_csv: (layer_rows, LAYER_COLUMNS),
            folder.fidelity_csv: (fidelity_rows, FIDELITY_COLUMNS),
        }
        self._new: dict[str, RowsOfRun] = {}
        self._left: list[Any] | None = None  # how the last write left the tables

    def read(self, run: RunFolder) -> dict[str, Any]:
        """Take in what a run's folder holds now; its row."""
        try:
            rows = self._rows(run)
        except ResultsError as error:
            return {"status": "missing", "reason": str(error)}
        self._new[run.run_id] = rows
        return rows[self._folder.runs_csv][0]

    def write(self) -> None:
        """Publish the tables, each whole or not at all; those of layers where there are some."""
        ours = self._left is not None and self._left == self._stamps()
        with contextlib.ExitStack() as stack:
            sheets = {
                path: Sheet(path, columns, stack.enter_context(beside(path)), stack)
                for path, (_, columns) in self._kinds.items()
            }
            for run_id, rows in sorted(self._new.items()) if ours else self._all():
                for path, sheet in sheets.items():
                    sheet.add(run_id, rows[path])
            always = (self._folder.runs_csv, self._folder.epochs_csv)
            for path, sheet in sheets.items():
                sheet.end()
                if sheet.rows or path in always or path.exists():
                    place(sheet.temporary, path)
        self._new.clear()
        self._left = self._stamps()

    def _rows(self, run: RunFolder) -> RowsOfRun:
        content = Content(run)
        return {path: make(self._suite, content) for path, (make, _) in self._kinds.items()}

    def _all(self) -> Iterator[tuple[str, RowsOfRun]]:
        """The rows of every run that can be read, in order."""
        for run in self._folder.runs():
            with contextlib.suppress(ResultsError):
                yield run.run_id, self._rows(run)

    def _stamps(self) -> list[Any]:
        """What tells whether anybody else has written a table."""
        found: list[Any] = []
        for path in self._kinds:
            try:
                seen = path.stat()
                found.append((seen.st_ino, seen.st_mtime_ns, seen.st_size))
            except OSError:
                found.append(None)
        return found


class Sheet:
    """The next version of a table: rows come by run, in order, and replace those of before."""

    def __init__(
        self, path: Path, columns: Sequence[str], temporary: Path, stack: contextlib.ExitStack
    ) -> None:
        self.temporary, self.rows = temporary, 0
        self._columns = columns
        self._file = stack.enter_context(temporary.open("w", newline="", encoding="utf-8"))
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(columns)
        self._before = _in_order(path, columns)
        self._next = next(self._before, None)

    def add(self, run_id: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write what comes before this run, and the run's rows."""
        self._copy(run_id)
        while self._next and self._next[0] == run_id:
            self._next = next(self._before, None)
        for row in rows:
            # NaN is written as such: a fault that a gate must see, and no empty cell, which is
            # "not measured".
            self._write([row.get(name) for name in self._columns])

    def end(self) -> None:
        """Write what is left."""
        self._copy()
        self._file.close()

    def _copy(self, before: str | None = None) -> None:
        while self._next and (before is None or self._next[0] < before):
            self._write(self._next[1])
            self._next = next(self._before, None)

    def _write(self, row: Sequence[Any]) -> None:
        self._writer.writerow(row)
        self.rows += 1


def _in_order(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The rows of a table by run; it is read into memory only if somebody has disordered it."""
    ids = (run_id for run_id, _ in _read_rows(path, columns))
    if all(one <= other for one, other in pairwise(ids)):
        return _read_rows(path, columns)
    return iter(sorted(_read_rows(path, columns), key=lambda row: row[0]))


def _read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Run and cells of each row, under these columns; none where there is no readable table."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.reader(file)
            at = {name: i for i, name in enumerate(next(table, []))}
            for row in table:
                cells = [row[at[n]] if n in at and at[n] < len(row) else "" for n in columns]
                if run_id := cells[0]:
                    yield run_id, cells
    except (OSError, ValueError, csv.Error):
        return


def read_runs(folder: SuiteFolder) -> pd.DataFrame:
    """runs.csv as it was written; raises ResultsError if it is missing or no such table."""
    return read_table(folder.runs_csv)


def read_table(path: Path) -> pd.DataFrame:
    """A table of runs by whatever name; raises ResultsError if it is missing or no such table."""
    try:
        frame = pd.read_csv(
            path,
            dtype=dict.fromkeys(TEXT_COLUMNS, "string"),
            keep_default_na=False,  # a reason may read "None"
            na_values={
                name: ["", "nan", "NaN"] if name in ESTIMATED else [""]
                for name in RUN_COLUMNS
                if name != "reason"
            },
        )
    except FileNotFoundError as error:
        raise ResultsError(f"{path}: no results yet; `snnbench run` makes them") from error
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: not a readable table: {error}") from error
    absent = [c for c in RUN_COLUMNS[:36] if c not in frame.columns]
    if absent:
        raise ResultsError(
            f"{path}: column '{absent[0]}' is missing; is this a table that snnbench wrote?"
        )
    return frame.reindex(columns=[*frame.columns, *(c for c in RUN_COLUMNS if c not in frame)])
