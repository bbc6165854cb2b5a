"""A report as GitHub-flavoured markdown."""

from __future__ import annotations

from snnbench.report.content import LEGEND, PUBLISHED_COLUMNS, Report

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\|<>*_`[]#"})


def render(report: Report) -> str:
    """The whole report, ending in a newline."""
    lines = [f"## {escape(report.title)}", ""]
    if report.claim:
        lines += [f"> {escape(report.claim)}", ""]
    lines += [f"- {escape(fact)}" for fact in report.facts]
    lines += ["", _row(report.columns), _row(["---"] + ["---:"] * (len(report.columns) - 1), False)]
    lines += [_row(row) for row in report.rows]
    lines += ["", LEGEND, ""]
    if report.published:
        lines += ["Published figures beside the best test epoch, the papers' own rule:", ""]
        lines += [_row(PUBLISHED_COLUMNS), _row(["---"] * len(PUBLISHED_COLUMNS), False)]
        lines += [*(_row(row) for row in report.published), ""]
    lines += [f"- {escape(note)}" for note in report.notes]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text that markdown shows as it is, on one line."""
    return " ".join(text.split()).translate(_SPECIAL)


def _row(cells: list[str], escaped: bool = True) -> str:
    return "| " + " | ".join(escape(c) if escaped else c for c in cells) + " |"
