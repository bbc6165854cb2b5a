"""The terminal: tables and live progress. Data goes to stdout, words go to stderr.

The only module that imports rich.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.markup import escape as unmarked
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table

from snnbench.store import FAILURES

if TYPE_CHECKING:  # they import pandas, which takes half a second
    from snnbench.planner import Plan, Planned
    from snnbench.report.content import Report

COLOURS = {"done": "green", "running": "blue", "missing": "dim", "interrupted": "yellow",
           "skipped": "yellow"} | dict.fromkeys(FAILURES, "red")  # fmt: skip


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escape(text: str) -> str:
    """Text that is shown as it is: no markup, and nothing that the terminal itself would obey."""
    return unmarked(_CONTROL.sub("", text))


def print_data(text: str) -> None:
    """Plain text to stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def print_bytes(content: bytes) -> None:
    """Binary data to stdout."""
    sys.stdout.buffer.write(content)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """An object to stdout."""
    print_data(to_json(value))


def to_json(value: Any) -> str:
    """An object as text; a miss is the string "Infinity"."""
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def say(text: str) -> None:
    """Words to stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(escape(text))


def hint(text: str) -> None:
    """The likely next command, to stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[dim]next:[/] {escape(text)}")


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Iterable[str] = (),
    wrap: Iterable[str] = (),
    strong: Iterable[tuple[int, int]] = (),
    breaks: Iterable[int] = (),
) -> None:
    """A table to stdout: in colour on a terminal, plain in a pipe, never cut off.

    `strong` cells are bold; before the rows of `breaks` stands an empty line.
    """
    strong, breaks = set(strong), set(breaks)
    right, wrap = set(right), set(wrap)
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(escape(name), justify="right" if name in right else "left",
                         no_wrap=name not in wrap, overflow="fold")  # fmt: skip
    body = [list(row) for row in rows]
    for r, row in enumerate(body):
        cells = [_coloured(cell) for cell in row]
        if r in breaks:
            table.add_row()
        table.add_row(*(f"[bold]{c}[/]" if (r, i) in strong else c for i, c in enumerate(cells)))
    needed = Console(width=100_000).measure(table).maximum
    if not console.is_terminal or needed <= console.width or not wrap:
        console = Console(highlight=False, width=max(needed, console.width))
    console.print(table, soft_wrap=not wrap)


def _coloured(cell: str) -> str:
    return f"[{COLOURS[cell]}]{cell}[/]" if cell in COLOURS else escape(cell)


def print_plan(plan: Plan) -> None:
    """Every run of a plan with its status."""
    rows = [
        [r.run_id, f"{r.status}, stale" if r.stale else r.status, "yes" if r.todo else "",
         duration(r.estimate_s)]
        for r in plan.runs
    ]  # fmt: skip
    print_table(["run", "status", "to do", "estimate"], rows, right=["estimate"])


def print_status(states: Sequence[Mapping[str, Any]]) -> None:
    """The runs of a suite: how far each has come, and who works on it."""
    rows = []
    for s in states:
        epochs = f"{s['epoch']}/{s['epochs']}" if s.get("epochs") else ""
        note = s.get("worker") or s.get("job") or s.get("reason") or ""
        status = f"{s['status']}, stale" if s["stale"] else s["status"]
        rows.append([s["run_id"], status, epochs, note])
    print_table(["run", "status", "epoch", ""], rows, right=["epoch"], wrap=[""])


def print_report(
    report: Report,
    legend: str,
    published_columns: Sequence[str],
    across_columns: Sequence[str],
) -> None:
    """A report on the terminal."""
    console = Console(highlight=False)
    console.print(f"[bold]{escape(report.title)}[/]", escape(report.claim), soft_wrap=True)
    for fact in report.facts:
        console.print(f"  {escape(fact)}", soft_wrap=not console.is_terminal)
    console.print()
    for columns in _fitting(report, console):
        chosen = [report.columns[i] for i in columns]
        rows = [[row[i] for i in columns] for row in report.rows]
        strong = {(r, columns.index(i)) for r, i in report.strong if i in columns}
        print_table(chosen, rows, right=chosen[1:], strong=strong, breaks=report.breaks)
        console.print()
    console.print(f"[dim]{escape(legend.replace('*', ''))}[/]")
    for text in report.findings:
        console.print(f"  {escape(text)}", soft_wrap=not console.is_terminal)
    if report.across:
        console.print()
        print_table(across_columns, report.across, right=across_columns[1:])
    if report.published:
        print_table(published_columns, report.published, wrap=["source"])
    for note in report.notes:
        console.print(f"  {escape(note)}", soft_wrap=not console.is_terminal)


def _fitting(report: Report, console: Console) -> list[list[int]]:
    """Columns of the table, or of several that fit on the terminal, each with the keys."""
    widths = [
        max(map(cell_len, column)) + 2 for column in zip(report.columns, *report.rows, strict=True)
    ]
    keys = list(range(report.keys))
    if not console.is_terminal or sum(widths) <= console.width:
        return [list(range(len(widths)))]
    tables, used = [list(keys)], sum(widths[: report.keys])
    for i in range(report.keys, len(widths)):
        if used + widths[i] > console.width and len(tables[-1]) > len(keys):
            tables.append(list(keys))
            used = sum(widths[: report.keys])
        tables[-1].append(i)
        used += widths[i]
    return tables


def print_run(details: Mapping[str, Any]) -> None:
    """One run: its settings, its figures, its layers and its epochs."""
    result = details["result"] or {}
    console = Console(highlight=False)
    reason = f": {result['reason']}" if result.get("reason") else ""
    console.print(f"[bold]{escape(details['run_id'])}[/]  {escape(details['status'] + reason)}",
                  soft_wrap=True)  # fmt: skip
    spec = {k: v for k, v in details["spec"].items() if not isinstance(v, dict)}
    nested = {k: v for k, v in details["spec"].items() if isinstance(v, dict)}
    figures = {k: v for k, v in result.items() if isinstance(v, int | float | str)}
    shown = {**spec, **nested, **{k: v for k, v in figures.items() if k not in spec}}
    print_table(["key", "value"], [[k, _short(v)] for k, v in shown.items()], wrap=["value"])
    for name, rows in (("layers", result.get("layers")), ("epochs", details["epochs"])):
        if rows:
            console.print(f"\n[bold]{name}[/]")
            keys = [k for k in rows[0] if k not in ("event", "epochs")]
            print_table(keys, [[_short(row.get(k)) for k in keys] for row in rows], right=keys[1:])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={_short(v)}" for k, v in value.items() if v is not None)
    return f"{value:.6g}" if isinstance(value, float) else "–" if value is None else str(value)


def duration(seconds: float | None) -> str:
    """`3 s`, `4 min`, `2.5 h`; empty for None."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


MOST_BARS = 20


class Lines:
    """Progress as plain lines, for pipes, logs and --quiet (warnings only)."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._engine = EngineNews()
        self._places: dict[str, str] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, plan: Plan) -> None:
        """The suite starts."""
        self._say(begin_line(plan))

    def started(self, planned: Planned, number: int, of: int) -> None:
        """One run starts."""
        self._places[planned.run_id] = f"[{number}/{of}] "

    def message(self, planned: Planned, message: dict[str, Any]) -> None:
        """A run in progress says something."""
        for text, losing in self._engine.news(message):
            self.warn(text) if losing else self._say(text)
        if text := trouble(planned.run_id, message):
            self.warn(text)

    def ended(self, planned: Planned, row: Mapping[str, Any]) -> None:
        """The run has an outcome."""
        place = self._places.pop(planned.run_id, "")
        line = f"{place}{planned.run_id}: {outcome_text(row)}"
        if row["status"] in FAILURES:
            say(line)
        else:
            self._say(line)

    def warn(self, text: str) -> None:
        """Something is odd."""
        say(f"warning: {text}")

    def _say(self, text: str) -> None:
        if not self._quiet:
            say(text)


class Bars:
    """Live progress of the suite and of the run, on a terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), Remaining(), console=self._console,
        )  # fmt: skip
        self._live = Live(self._progress, console=self._console, transient=True)
        self._engine = EngineNews()
        self._suite: TaskID | None = None
        self._runs: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def begin(self, plan: Plan) -> None:
        """The suite starts."""
        self._print(begin_line(plan))
        self._suite = self._progress.add_task("suite", total=len(plan.todo), note="")

    def started(self, planned: Planned, number: int, of: int) -> None:
        """One run starts."""
        if len(self._runs) < MOST_BARS:
            task = self._progress.add_task(planned.run_id, total=None, note="starting")
            self._runs[planned.run_id] = task

    def message(self, planned: Planned, message: dict[str, Any]) -> None:
        """A run in progress says something."""
        for text, losing in self._engine.news(message):
            self.warn(text) if losing else self._print(text)
        if text := trouble(planned.run_id, message):
            self.warn(text)
        if planned.run_id in self._runs and message.get("event") == "epoch":
            acc = message["val_acc"]
            note = "" if acc is None else f"val {100 * acc:.2f}%"
            self._progress.update(
                self._runs[planned.run_id],
                total=message["epochs"],
                completed=message["epoch"],
                note=note,
            )

    def ended(self, planned: Planned, row: Mapping[str, Any]) -> None:
        """The run has an outcome."""
        if planned.run_id in self._runs:
            self._progress.remove_task(self._runs.pop(planned.run_id))
        if self._suite is not None:
            self._progress.advance(self._suite)
        self._print(f"{planned.run_id}: {outcome_text(row)}", COLOURS.get(row["status"], ""))

    def warn(self, text: str) -> None:
        """Something is odd."""
        self._print(f"warning: {text}", "yellow")

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(escape(text), style=style, soft_wrap=True)


class EngineNews:
    """How runs are computed, said once and not for every run."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def news(self, message: dict[str, Any]) -> list[tuple[str, bool]]:
        """New lines of a message of the worker; True with what a faster kernel was given up for."""
        if message.get("event") == "warning":
            text = str(message["text"])
            new = [] if text in self._said else [(text, True)]
            self._said.add(text)
            return new
        if message.get("event") != "engine":
            return []
        line = "{device}, kernel {kernel}, {precision}; {allocator}".format(**message)
        why = "; ".join(message["passed_over"])
        lost = [f"a faster kernel is not used: {why}"] if why else []
        new = [(text, text != line) for text in (line, *lost) if text not in self._said]
        self._said |= {text for text, _ in new}
        return new


def trouble(run_id: str, message: Mapping[str, Any]) -> str:
    """A word about a run that goes on after a mishap; empty for other messages."""
    if message.get("event") == "oom_retry":
        parts = message["batch_split"]
        return f"{run_id}: {message['reason']}; its batches are now taken in {parts} parts"
    if message.get("event") == "again":
        return f"{run_id}: {message['reason']}; taken up again"
    return ""


def begin_line(plan: Plan) -> str:
    """What is about to be done."""
    failed = sum(r.status in FAILURES and not r.todo for r in plan.runs)
    done = len(plan.runs) - len(plan.todo) - failed
    failures = f", {failed} failed (--retry-failed does them again)" if failed else ""
    left = f", about {duration(plan.estimate_s)}" if plan.todo and plan.estimate_s else ""
    return (
        f"{plan.suite.name}: {len(plan.runs)} runs, {done} done already{failures}, "
        f"{len(plan.todo)} to do"
        f"{left}; results in {plan.folder.path}"
    )


def outcome_text(row: Mapping[str, Any]) -> str:
    """`done: test 97.2% ...`, or the status with its reason."""
    if row["status"] != "done":
        return f"{row['status']}: {row['reason']}"
    if row["kind"] == "capacity":
        return f"done: largest T {row['largest_T']}, largest batch {row['largest_batch']}"
    step = f"step {row['step_ms_p50']:.1f} ms"
    if row["kind"] == "cost":
        return f"done: {step}, {(row['saved_bytes'] or 0) / 2**20:.2f} MiB saved for backward"
    count = row["spikes_per_sample"]
    spikes = "no" if count is None else f"{count:.0f}"
    return f"done: test {100 * row['test_acc']:.2f}%, {spikes} spikes a sample, {step}"
