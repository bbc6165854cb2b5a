"""A report's table as csv or json: full numbers, units in the names."""

from __future__ import annotations

import json

import pandas as pd

from snnbench.report.content import PUBLISHED_COLUMNS, RECORD_COLUMNS, Report


def to_csv(report: Report) -> str:
    """One line per cell."""
    return str(pd.DataFrame(report.records, columns=RECORD_COLUMNS).to_csv(index=False))


def to_json(report: Report) -> str:
    """An object with suite, claim, facts, cells and notes; what was not measured is null."""
    frame = pd.DataFrame(report.records)
    cells = json.loads(frame.to_json(orient="records", double_precision=15))
    document = {
        "suite": report.title,
        "claim": report.claim,
        "facts": report.facts,
        "cells": cells,
        "published": [dict(zip(PUBLISHED_COLUMNS, row, strict=True)) for row in report.published],
        "notes": report.notes,
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
