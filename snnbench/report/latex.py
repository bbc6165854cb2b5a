r"""A report as a LaTeX table for a paper: booktabs, bold where the paired interval excludes 0.

Needs \usepackage{booktabs}. Everything that is not the table stands in comments above it.
"""

from __future__ import annotations

import re

from snnbench.report.content import Report

_SPECIAL = str.maketrans(
    {
        "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
        "%": r"\%", "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
        "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
        "–": "--", "±": r"$\pm$", "≥": r"$\geq$", "Δ": r"$\Delta$", "∞": r"$\infty$",
        "`": r"\textasciigrave{}",
    }
)  # fmt: skip
_INTERVAL = re.compile(r"([+-]?\d+\.\d+)(?: ± (\d+\.\d+))?( \(\d+\))?")


def render(report: Report) -> str:
    """A `table` environment, ending in a newline."""
    comments = [report.title, report.claim, *report.facts, *report.findings, *report.notes]
    lines = [f"% {_one_line(text)}" for text in comments if text]
    align = "l" * report.keys + "r" * (len(report.columns) - report.keys)
    lines += [
        r"\begin{table}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{_caption(report)}}}",
        rf"\label{{tab:{re.sub('[^A-Za-z0-9]+', '-', report.title).strip('-')}}}",
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        _row([escape(c) for c in report.columns]),
        r"\midrule",
    ]
    for r, row in enumerate(report.rows):
        if r in report.breaks:
            lines.append(r"\midrule")
        cells = [_figure(c) if i >= report.keys else escape(c) for i, c in enumerate(row)]
        strong = [(r, i) in report.strong for i in range(len(cells))]
        bold = [rf"\textbf{{\boldmath {c}}}" for c in cells]  # math has a weight of its own
        lines.append(_row([b if s else c for s, b, c in zip(strong, bold, cells, strict=True)]))
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text that LaTeX prints as it is, on one line."""
    return _one_line(text).translate(_SPECIAL)


def _one_line(text: str) -> str:
    """Without line breaks, at which a comment would end, or what TeX cannot read."""
    return " ".join("".join(ch if ch.isprintable() else " " for ch in text).split())


def _figure(text: str) -> str:
    """A number in math mode, so that signs are set right; anything else as text."""
    found = _INTERVAL.fullmatch(text)
    if found is None:
        return escape(text)
    value, half, n = found.groups()
    return f"${value}" + (rf" \pm {half}" if half else "") + f"${n or ''}"


def _caption(report: Report) -> str:
    sentences = [report.claim, report.legend.replace("*", ""), "; ".join(report.facts) + "."]
    return escape(" ".join(s for s in sentences if s))


def _row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"
