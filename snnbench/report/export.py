"""One archive of a result with its provenance, and its figures as NeuroBench names them.

The archive (.zip) holds the tables, the report, the records of every run (spec, result, events,
log; no checkpoints), `provenance.json` with versions, machines, source hashes and the SHA-256 of
every file, and `neurobench.json`. The same results give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

from snnbench import __version__, summary
from snnbench.errors import ResultsError
from snnbench.report import content, data, markdown, source
from snnbench.store import SuiteFolder
from snnbench.summary import Cell

KEPT = (".csv", ".json", ".jsonl", ".txt")  # tables and records; a checkpoint is neither
EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's earliest: no file carries the time of the export
BYTES_PER_PARAMETER = 4
METRICS = {
    "Footprint": "params_infer", "ClassificationAccuracy": "test_acc",
    "ActivationSparsity": "firing_rate", "Effective_MACs": "macs_per_sample",
    "Effective_ACs": "sops_per_sample", "Dense": "dense_macs_per_sample",
    "MembraneUpdates": "membrane_updates_per_sample",
}  # fmt: skip


def archive(folder: SuiteFolder, view: content.View | None = None) -> bytes:
    """The archive of one suite's results. Raises ResultsError if something cannot be read."""
    read = source.read([folder])
    report = content.of(read, view or content.View())
    files: dict[str, bytes] = {
        "report.md": markdown.render(report).encode(),
        "report.json": data.to_json(report).encode(),
        "neurobench.json": _json(neurobench(report.cells)),
    }
    of_this_machine = (folder.index, folder.cancel)
    for path in sorted(set(folder.path.iterdir()) - set(of_this_machine)):
        _add(files, path.name, path)
    for run in folder.runs():
        for path in sorted(run.path.iterdir()):
            _add(files, f"runs/{run.run_id}/{path.name}", path)
    files["provenance.json"] = _json(_provenance(read, files))
    out = io.BytesIO()
    root = folder.path.resolve().name
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive_:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{root}/{name}", EPOCH)
            entry.external_attr = 0o644 << 16
            archive_.writestr(entry, files[name], zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _add(files: dict[str, bytes], name: str, path: Path) -> None:
    """A file if there is one; a link is left out, since it may lead anywhere."""
    odd = path.suffix not in KEPT or path.name.startswith(".") or name in files
    if odd or path.is_symlink() or not path.is_file():
        return
    try:
        files[name] = path.read_bytes()
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _provenance(read: source.Source, files: dict[str, bytes]) -> dict[str, Any]:
    """Where the figures come from, and a hash of every file but this one."""
    frame = read.runs

    def values(name: str) -> list[str]:
        return sorted({str(v) for v in frame[name].dropna()})

    machines: dict[str, Any] = {}
    for run in read.folders[0].runs():
        try:
            machine = (run.result() or {}).get("machine") or {}
        except ResultsError:
            continue
        machines.setdefault(str(machine.get("machine_id")), machine)
    return {
        "schema": 1,
        "written_by": f"snnbench {__version__}",
        "suites": read.suites,
        "claim": read.claim,
        "runs": summary.counts(frame),
        "missing": read.missing(),
        "snnbench": values("version"),
        "torch": values("torch"),
        "source_hash": values("source_hash"),
        "data_hash": values("data_hash"),
        "machine_id": values("machine_id"),
        "machines": [m for key, m in sorted(machines.items()) if m],
        "sha256": {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)},
    }


def neurobench(cells: list[Cell]) -> list[dict[str, Any]]:
    """NeuroBench's algorithm-track metrics of each cell, means over seeds.

    Where its definition is not ours, the difference stands in `notes`; what was not measured is
    null, and `notes` says why. Source: Yik et al., Nature Communications 16:1545 (2025).
    """
    return [_neurobench(cell) for cell in cells]


def _neurobench(cell: Cell) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        e = cell.estimates.get(name)
        return None if e is None or not math.isfinite(e.mean) else e.mean

    rate, params = mean("firing_rate"), mean("params_infer")
    shown = ("dataset", "model", "T", "method", "kernel", "precision", "machine_id")
    absent = [
        f"{theirs}: {cell.nulls.get(ours, 'not measured')}"
        for theirs, ours in METRICS.items()
        if mean(ours) is None
    ]
    return {
        "label": cell.label,
        **{k: _plain(cell.conditions[k]) for k in shown},
        "method_config": json.loads(cell.conditions["method_config"]),
        "seeds": cell.n,
        "Footprint": None if params is None else params * BYTES_PER_PARAMETER,
        "ConnectionSparsity": None,
        "ClassificationAccuracy": mean("test_acc"),
        "ActivationSparsity": None if rate is None else 1 - rate,
        "SynapticOperations": {
            "Effective_MACs": mean("macs_per_sample"),
            "Effective_ACs": mean("sops_per_sample"),
            "Dense": mean("dense_macs_per_sample"),
        },
        "MembraneUpdates": mean("membrane_updates_per_sample"),
        "notes": [
            "Footprint: fp32 parameters at evaluation, without buffers",
            "ConnectionSparsity: not measured",
            *absent,
            "Effective_MACs: dense count of inputs that are no spikes, zeros included",
        ],
    }


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
