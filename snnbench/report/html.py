"""A report as one self-contained page: tables to sort and filter, figures, and every run.

Everything that comes from a suite or a record is escaped by jinja2 or stands in a block of JSON
that the page's script turns into text nodes; a Content-Security-Policy with the script's own hash
lets nothing else run and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from snnbench import __version__, summary
from snnbench.errors import ResultsError, UsageError
from snnbench.report import columns, content, plots
from snnbench.report.findings import ACROSS_COLUMNS
from snnbench.report.published import PUBLISHED_COLUMNS
from snnbench.report.source import Source
from snnbench.runs.overview import end_of
from snnbench.stats import Estimate
from snnbench.store import RunFolder

CURVE_POINTS = 80_000  # of all runs together
LOG_BYTES = 1_500  # the end of each log
LAYER_COLUMNS = (
    "layer", "firing_rate", "silent_share", "saturated_share", "grad_norm", "sops_per_sample",
)  # fmt: skip
RUN_FIGURES = ("test_acc", "spikes_per_sample", "saved_bytes", "step_ms_p50", "train_s")
WIDE = ("curves", "fidelity")
FILTER = """{% macro filter(table, count, noun, statuses=()) %}<div class="tools" data-for="{{ table
}}" data-noun="{{ noun }}"><label>Filter <input type="search" placeholder="words, as tet T4"
autocomplete="off"></label>{% if statuses %}<label>Status <select><option value="">all</option>{%
for s in statuses %}<option>{{ s }}</option>{% endfor %}</select></label>{% endif %}<output
aria-live="polite">{{ count }} of {{ count }} {{ noun }}</output></div>{% endmacro %}"""


def render(source: Source, view: content.View) -> str:
    """The page as text; figures that cannot be drawn are named in its notes."""
    report = content.of(source, view, everything=True)
    figures, not_drawn = _figures(source)
    script = _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    runs = _by_status(source.runs)
    return page.from_string(FILTER + _part("page.html")).render(
        report=report,
        legend=report.legend.replace("*", ""),
        columns=_columns(report),
        cells=_cells(report),
        across_columns=ACROSS_COLUMNS,
        published_columns=PUBLISHED_COLUMNS,
        counts=summary.counts(source.runs),
        missing=source.missing(),
        figures=figures,
        not_drawn=not_drawn,
        run_columns=_run_columns(runs),
        runs=_run_rows(source, runs),
        statuses=list(dict.fromkeys(runs["status"])),
        data=_json(_details(source, runs)),
        script=Markup(script),
        style=Markup(_part("page.css")),
        script_hash=f"sha256-{digest}",
        version=__version__,
        command=f"snnbench report {' '.join(str(f.path) for f in source.folders)} --format html",
    )


def _part(name: str) -> str:
    """A part of the page that comes with the package; never from a record."""
    return (files("snnbench") / "_templates" / "report" / name).read_text("utf-8")


def _json(value: Any) -> Markup:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    odd = "<>&\u2028\u2029"
    return Markup(text.translate({ord(c): f"\\u{ord(c):04x}" for c in odd}))


def _figures(source: Source) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    drawn, missing = [], []
    single = source.runs.groupby("method")["T"].nunique().max() == 1
    for name, shows in plots.SHOWS.items():
        if single and shows.endswith("against T"):
            missing.append((name, "no method was run at two values of T"))
            continue
        try:
            svg = Markup(plots.inline(source, name))
        except (ResultsError, UsageError) as error:
            missing.append((name, str(error)))
            continue
        drawn.append({"name": name, "shows": shows, "svg": svg, "wide": name in WIDE})
    return drawn, missing


def _columns(report: content.Report) -> list[dict[str, Any]]:
    keys = [{"heading": h, "css": "key", "meaning": ""} for h in report.columns[: report.keys]]
    return keys + [
        {"heading": c.heading, "css": _css(c), "meaning": c.meaning} for c in report.figures
    ]


def _css(column: columns.Column) -> str:
    """What is not shown by default is left out on paper."""
    usual = {c.name for c in (*columns.core(""), columns.EXACT_P, *columns.OPTIONAL)}
    return "num" if column.name in usual else "num more"


def _cells(report: content.Report) -> list[dict[str, Any]]:
    """Rows of the table with the numbers to sort by."""
    rows = []
    css = [""] * report.keys + [_css(c) for c in report.figures]
    for r, (texts, cell) in enumerate(zip(report.rows, report.cells, strict=True)):
        values = [None] * report.keys + [_sortable(c.estimate(cell)) for c in report.figures]
        rows.append(
            {
                "break": r in report.breaks,
                "cells": [
                    {
                        "text": text,
                        "value": value,
                        "css": css[i] + (" strong" if (r, i) in report.strong else ""),
                    }
                    for i, (text, value) in enumerate(zip(texts, values, strict=True))
                ],
            }
        )
    return rows


def _sortable(e: Any) -> str | None:
    """A number as JavaScript reads it."""
    if e is None or math.isnan(e.mean):
        return None
    return f"{e.mean:.9g}".replace("inf", "Infinity")


def _by_status(runs: pd.DataFrame) -> pd.DataFrame:
    """What went wrong first, then in the order of the table."""
    order = {"done": 1}
    rank = runs["status"].map(lambda s: order.get(s, 0))
    return runs.assign(_rank=rank).sort_values("_rank", kind="stable").drop(columns="_rank")


def _run_columns(runs: pd.DataFrame) -> list[dict[str, Any]]:
    names = ["run", "status", "method", *_varied(runs)]
    known = {c.name: c.heading for c in columns.catalogue("bptt", ())}
    figures = [known[name] for name in RUN_FIGURES if runs[name].notna().any()]
    headings = [{"heading": name, "key": True} for name in names]
    headings += [{"heading": name, "key": False} for name in figures]
    return [*headings, {"heading": "reason", "key": True}] if _any_reason(runs) else headings


def _any_reason(runs: pd.DataFrame) -> bool:
    return bool((runs["reason"].fillna("") != "").any())


def _varied(runs: pd.DataFrame) -> list[str]:
    names = ("T", "seed", "dataset", "model", "kernel", "precision", "memory", "machine_id")
    return [n for n in names if n in ("T", "seed") or runs[n].nunique(dropna=False) > 1]


def _run_rows(source: Source, runs: pd.DataFrame) -> list[dict[str, Any]]:
    labels = summary.method_labels(source.runs)
    known = {c.name: c for c in columns.catalogue("bptt", ())}
    figures = [name for name in RUN_FIGURES if runs[name].notna().any()]
    varied, reasons = _varied(runs), _any_reason(runs)
    rows = []
    for row in _records(runs):
        texts = [labels[row["method"], row["method_config"]], *(str(row[k]) for k in varied)]
        cells = [{"text": text, "value": None, "css": ""} for text in texts]
        for name in figures:
            e = None if pd.isna(row[name]) else Estimate(float(row[name]), None, 1)
            text = columns.percent(e) if name == "test_acc" else known[name].write(e)
            cells.append({"text": text, "value": _sortable(e), "css": "num"})
        if reasons:
            text = "" if pd.isna(row["reason"]) else str(row["reason"])
            cells.append({"text": text, "value": None, "css": "reason"})
        rows.append({"run_id": row["run_id"], "status": row["status"], "cells": cells})
    return rows


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _details(source: Source, runs: pd.DataFrame) -> dict[str, Any]:
    """What a click shows of each run; settings and machines stand once for all their runs."""
    settings: dict[str, int] = {}
    machines: dict[str, int] = {}
    curves, every = _curves(source, len(runs))
    layers = _layers(source)
    spec = ("dataset", "model", "method", "T", "seed", "kernel", "precision", "memory", "kind")
    hidden = {*spec, "run_id", "status", "reason", "settings", "results", "suite", "null_reasons",
              "method_config", "settings_hash"}  # fmt: skip
    found = []
    for row in _records(runs):
        key = (row["results"], row["run_id"])
        folder = source.run_folder(row)
        machine = json.dumps(_machine(folder, row))
        text = row["settings"] if isinstance(row["settings"], str) else "{}"
        found.append(
            {
                "id": row["run_id"],
                "status": row["status"],
                "reason": _plain(row["reason"]) or "",
                "spec": {k: _plain(row.get(k)) for k in spec}
                | {"options": json.loads(row["method_config"])},
                "settings": settings.setdefault(text, len(settings)),
                "machine": machines.setdefault(machine, len(machines)),
                "figures": {
                    k: v for k in row if k not in hidden and (v := _plain(row[k])) is not None
                },
                "nulls": None if pd.isna(row["null_reasons"]) else json.loads(row["null_reasons"]),
                "curve": curves.get(key),
                "every": every.get(key, 1),
                "layers": layers.get(key),
                "log": end_of(folder.log, LOG_BYTES).strip(),
            }
        )
    return {
        "runs": found,
        "settings": [_named(json.loads(text)) for text in settings],
        "machines": [json.loads(text) for text in machines],
        "layer_columns": [c for c in LAYER_COLUMNS if c in source.layers],
    }


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under keys that are not those of the names beside them."""
    options = {"data": "data options", "model": "model options"}
    return {options.get(k, k): v for k, v in settings.items()}


def _plain(value: Any) -> Any:
    """A value of a table as JSON has it: six digits, no NaN."""
    if isinstance(value, str | bool | int):
        return value
    if value is None or pd.isna(value):
        return None
    if isinstance(value, float) or hasattr(value, "dtype"):
        number = float(value)
        return float(f"{number:.6g}") if math.isfinite(number) else str(number)
    return str(value)


def _machine(folder: RunFolder, row: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint of the record, or what the table has of it."""
    try:
        machine = (folder.result() or {}).get("machine")
    except ResultsError:
        machine = None
    if isinstance(machine, dict):
        return machine
    names = ("machine_id", "device", "torch", "version")
    return {k: _plain(row[k]) for k in names}


def _curves(source: Source, count: int) -> tuple[dict[Any, Any], dict[Any, int]]:
    """Loss and accuracies by epoch of every run, thinned out where the page would grow too big."""
    frame, most = source.epochs, max(20, CURVE_POINTS // max(count, 1) // 4)
    if "epoch" not in frame:
        return {}, {}
    names = ["epoch", "train_loss", "val_acc", "test_acc"]
    found, every = {}, {}
    for key, rows in _by_run(frame.reindex(columns=["results", "run_id", *names]), names).items():
        every[key] = math.ceil(len(rows) / most)
        kept = rows[:: -every[key]][::-1]  # the last epoch is always shown
        found[key] = [[_plain(v) for v in column] for column in zip(*kept, strict=True)]
    return found, every


def _layers(source: Source) -> dict[Any, list[list[Any]]]:
    frame: pd.DataFrame = source.layers
    names: Sequence[str] = [c for c in LAYER_COLUMNS if c in frame]
    if "layer" not in names:
        return {}
    return {
        key: [[_plain(v) for v in row] for row in rows]
        for key, rows in _by_run(frame, names).items()
    }


def _by_run(frame: pd.DataFrame, names: Sequence[str]) -> dict[Any, list[tuple[Any, ...]]]:
    """These columns of the rows of each run; a frame for each of many runs would take long."""
    found: dict[Any, list[tuple[Any, ...]]] = {}
    values = zip(*(frame[name].tolist() for name in names), strict=True)
    for *key, row in zip(frame["results"], frame["run_id"], values, strict=True):
        found.setdefault(tuple(key), []).append(row)
    return found
