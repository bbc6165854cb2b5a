"""A report's table as csv, json or parquet: full numbers, units in the names."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pandas as pd

from snnbench.errors import UsageError
from snnbench.report.content import RECORD_COLUMNS, Report
from snnbench.report.findings import ACROSS_COLUMNS
from snnbench.report.published import PUBLISHED_COLUMNS


def to_csv(report: Report) -> str:
    """One line per cell; `null_reasons` says what was not measured, and why, as JSON."""
    return str(_frame(report).to_csv(index=False))


def to_parquet(report: Report) -> bytes:
    """One row per cell; raises UsageError where pyarrow is not installed."""
    out = io.BytesIO()
    try:
        _frame(report).to_parquet(out, index=False, engine="pyarrow")
    except ImportError as error:
        raise UsageError('parquet needs pyarrow: pip install "snnbench[parquet]"') from error
    return out.getvalue()


def to_json(report: Report) -> str:
    """Suite, claim, facts, cells, findings and notes.

    What was not measured is null; a target that was missed is the string "Infinity".
    """
    document = {
        "suite": report.title,
        "claim": report.claim,
        "facts": report.facts,
        "cells": [{k: _plain(v) for k, v in cell.items()} for cell in report.records],
        "published": [dict(zip(PUBLISHED_COLUMNS, row, strict=True)) for row in report.published],
        "notes": report.notes,
        "findings": report.findings,
        "across": [dict(zip(ACROSS_COLUMNS, row, strict=True)) for row in report.across],
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _frame(report: Report) -> pd.DataFrame:
    columns = report.records[0].keys() if report.records else RECORD_COLUMNS
    return pd.DataFrame(report.records, columns=list(columns))


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
