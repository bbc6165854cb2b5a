"""A report as GitHub-flavoured markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from snnbench.report.content import Report
from snnbench.report.findings import ACROSS_COLUMNS
from snnbench.report.published import PUBLISHED_COLUMNS

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\|<>*_`[]#"})
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)))


def render(report: Report) -> str:
    """The whole report, ending in a newline."""
    lines = [f"## {escape(report.title)}", ""]
    if report.claim:
        lines += [f"> {escape(report.claim)}", ""]
    lines += [f"- {escape(fact)}" for fact in report.facts]
    lines += ["", *table(report.columns, report.rows, report.strong)]
    lines += ["", report.legend, ""]
    if report.findings:
        lines += [*(f"- {escape(text)}" for text in report.findings), ""]
    if report.across:
        lines += [
            "Over workloads, all seeds pooled (interquartile mean, stratified bootstrap):",
            "",
        ]
        lines += [*table(ACROSS_COLUMNS, report.across), ""]
    if report.published:
        lines += ["Published figures beside the best test epoch, the papers' own rule:", ""]
        lines += [*table(PUBLISHED_COLUMNS, report.published, right=False), ""]
    lines += [f"- {escape(note)}" for note in report.notes]
    return "\n".join(lines) + "\n"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    strong: Iterable[tuple[int, int]] = (),
    right: bool = True,
) -> list[str]:
    """Lines of a table; every column but the first stands at the right."""
    strong = set(strong)
    align = ["---"] + (["---:"] if right else ["---"]) * (len(columns) - 1)
    lines = [_row(map(escape, columns)), _row(align)]
    for r, row in enumerate(rows):
        cells = [escape(cell) for cell in row]
        lines.append(_row(f"**{c}**" if (r, i) in strong else c for i, c in enumerate(cells)))
    return lines


def escape(text: str) -> str:
    """Text that markdown shows as it is, on one line and without what a terminal would obey."""
    return " ".join(text.split()).translate(_CONTROLS).translate(_SPECIAL)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
