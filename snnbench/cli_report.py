"""The commands that look at results: parse, call one function, render."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snnbench.cli_data import DataRoot, Json, data_root_of
from snnbench.cli_run import Results, Set, device_named
from snnbench.errors import ExitCode, ResultsError, UsageError

if TYPE_CHECKING:  # they import pandas, which takes half a second
    from snnbench.report.content import View
    from snnbench.store import SuiteFolder


class Format(StrEnum):
    """How a report is written."""

    terminal = "terminal"
    md = "md"
    html = "html"
    latex = "latex"
    csv = "csv"
    json = "json"
    parquet = "parquet"


SUFFIXES = {".md": "md", ".html": "html", ".htm": "html", ".tex": "latex", ".csv": "csv",
            ".json": "json", ".parquet": "parquet"}  # fmt: skip


def _known_results(incomplete: str) -> list[str]:
    """Names of suites with results, for the shell."""
    from snnbench.store import suite_folders

    root = Path(os.environ.get("SNNBENCH_RESULTS", "results"))
    return [f.path.name for f in suite_folders(root) if f.path.name.startswith(incomplete)]


def _known_figures(incomplete: str) -> list[str]:
    from snnbench.report.plots import FIGURES

    return [name for name in ("all", *FIGURES) if name.startswith(incomplete)]


def _known_suites(incomplete: str) -> list[str]:
    from snnbench.suite import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SUITE or FOLDER]...",
        help="Default: the suite run last.",
        autocompletion=_known_results,
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="COLUMN=VALUE", help="Only these runs, as T=4,method=tet."),
]
Baseline = Annotated[
    str, typer.Option("--baseline", help="Method, or label, that the others are compared with.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="A file; its suffix gives the format.")
]


def report(
    what: What = None,
    format_: Annotated[
        Format | None, typer.Option("--format", "-f", help="How to write it.")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option("--by", metavar="COLUMN", help="A block of rows for each of its values."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--columns", metavar="NAME", help="Figures, as test_acc,SOPs; or all."),
    ] = None,
    sort: Annotated[
        str, typer.Option("--sort", metavar="COLUMN", help="Order of rows; -COLUMN turns it round.")
    ] = "",
    baseline: Baseline = "bptt",
    where: Where = None,
    output: Output = None,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Write the table of a suite's results, or of several, and what they show."""
    from snnbench import console
    from snnbench.report import content

    folders = results_of(what, results)
    view = _view(by, columns, sort, baseline, where)
    if as_json:
        format_ = Format.json
    elif format_ is None and output is not None:
        if output.suffix not in SUFFIXES:
            raise UsageError(f"--output {output}: give --format, or one of {', '.join(SUFFIXES)}")
        format_ = Format(SUFFIXES[output.suffix])
    if format_ in (None, Format.terminal):
        if output is not None:
            raise UsageError(f"--output {output}: a file needs a --format other than terminal")
        from snnbench.report.findings import ACROSS_COLUMNS
        from snnbench.report.published import PUBLISHED_COLUMNS

        built = content.build(folders, view)
        console.print_report(built, content.LEGEND, PUBLISHED_COLUMNS, ACROSS_COLUMNS)
        name = folders[-1].path.name
        console.hint(f"snnbench report {name} -o report.html, or snnbench show RUN_ID")
        return
    _give(_written(format_, folders, view), output)


Given = list[str] | None


def _view(by: Given, columns: Given, sort: str, baseline: str, where: Given) -> View:
    from snnbench.report.content import View
    from snnbench.report.source import parse_where

    return View(names_in(by), names_in(columns), sort, baseline, parse_where(where or ()))


def names_in(given: Given) -> list[str]:
    """`a,b` and repeated options, as one list."""
    return [n.strip() for part in given or () for n in part.split(",") if n.strip()]


def _written(format_: Format, folders: list[SuiteFolder], view: View) -> str | bytes:
    """The report as text, or as bytes where the format is binary."""
    from snnbench.report import content, data, latex, markdown

    if format_ is Format.html:
        from snnbench.report import html, source

        return html.render(source.read(folders, view.where), view)
    built = content.build(folders, view)
    if format_ is Format.parquet:
        return data.to_parquet(built)
    write = {
        Format.md: markdown.render,
        Format.latex: latex.render,
        Format.csv: data.to_csv,
        Format.json: data.to_json,
    }[format_]
    return write(built)


def _give(made: str | bytes, output: Path | None) -> None:
    """To stdout, or to a file, whole or not at all; raises ResultsError."""
    from snnbench import console
    from snnbench.store import publish

    raw = made.encode() if isinstance(made, str) else made
    if output is not None:
        publish(output, lambda temporary: temporary.write_bytes(raw))
        console.say(f"written: {output}")
    elif isinstance(made, str):
        console.print_data(made)
    elif sys.stdout.isatty():
        raise UsageError("this format is binary: name a file with --output")
    else:
        console.print_bytes(made)


def plot(
    figure: Annotated[
        str,
        typer.Argument(
            help="One of `snnbench list figures`, or all.", autocompletion=_known_figures
        ),
    ],
    what: What = None,
    where: Where = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .png, .svg or .pdf file; for all, a folder."),
    ] = None,
    results: Results = Path("results"),
) -> None:
    """Draw a figure of a suite's results, or all that can be drawn."""
    from snnbench import console
    from snnbench.report import plots, source

    folders = results_of(what, results)
    read = source.read(folders, source.parse_where(where or ()))
    into = folders[-1].path
    if figure != "all":
        files = [output] if output else [into / f"{figure}.{end}" for end in ("png", "svg")]
        console.say(f"written: {', '.join(map(str, plots.draw(read, figure, files)))}")
    else:
        into = output or into
        for name in plots.FIGURES:
            try:
                plots.draw(read, name, [into / f"{name}.{end}" for end in ("png", "svg")])
                console.say(f"written: {into / name}.png, .svg")
            except ResultsError as error:
                console.say(f"not drawn: {name}: {error}")
    console.hint(f"snnbench report {folders[-1].path.name}")


def show(run_id: str, results: Results = Path("results"), as_json: Json = False) -> None:
    """Print everything known of one run; the beginning of its id is enough."""
    from snnbench import console, runner

    suite_folder, folder = runner.find_run(results, run_id)
    details = runner.run_details(folder)
    if as_json:
        console.print_json(details)
        return
    console.print_run(details)
    console.hint(f"snnbench report {suite_folder.path.name}; the log is {folder.log}")


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder, runs.csv, suite or REV:PATH.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; differences are B less A.")],
    columns: Annotated[
        list[str] | None, typer.Option("--columns", metavar="NAME", help="Figures to compare.")
    ] = None,
    where: Where = None,
    format_: Annotated[
        Format, typer.Option("--format", "-f", help="terminal, md or json.")
    ] = Format.terminal,
    output: Output = None,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Compare two results cell by cell: better, worse, no evidence or not comparable."""
    from snnbench import console
    from snnbench.report import compare as rooms
    from snnbench.report import markdown, source

    wanted = source.parse_where(where or ())
    sides = [(name, source.fitting(rooms.read(name, results), wanted)) for name in (a, b)]
    found = rooms.compare(sides[0], sides[1], names_in(columns))
    counted = ", ".join(f"{n} {verdict}" for verdict, n in found.counts.items()) or "nothing shared"
    format_ = Format.json if as_json else format_
    if format_ is Format.json:
        text = console.to_json(rooms.to_json(found))
    elif format_ is Format.md:
        lines = [f"## {markdown.escape(a)} and {markdown.escape(b)}", "", f"{counted}.", ""]
        text = "\n".join([*lines, *markdown.table(rooms.COLUMNS, rooms.cells(found), right=False)])
    elif format_ is Format.terminal and output is None:
        console.print_table(rooms.COLUMNS, rooms.cells(found), wrap=["where", "verdict"])
        console.say(counted)
        return
    else:
        raise UsageError("--format: a comparison is written as md or json, or to the terminal")
    _give(text, output)


def gate(
    suite: Annotated[
        str,
        typer.Argument(help="A suite file, or a shipped suite.", autocompletion=_known_suites),
    ],
    baseline: Annotated[Path, typer.Option("--baseline", help="The committed JSON file.")],
    read: Annotated[
        Path | None,
        typer.Option("--read", metavar="FOLDER", help="Judge these results, and run nothing."),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Write the baseline; limits it has are kept.")
    ] = False,
    yardstick: Annotated[
        str,
        typer.Option(metavar="METHOD[:KERNEL]", help="For --update: whose step time is 1."),
    ] = "bptt",
    set_: Set = None,
    output: Output = None,
    data_root: DataRoot = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Json = False,
) -> None:
    """Run a suite and compare it with a committed baseline: exit code 0, or 1 and a summary."""
    from snnbench import console
    from snnbench.report import gate as judge

    known = None if update and not baseline.exists() else judge.read(baseline)
    with tempfile.TemporaryDirectory() as temporary:
        if read is None:
            context = {"data_root": str(data_root_of(data_root)), "device": device_named(device)}
            folder, name = _run_afresh(suite, set_ or [], Path(temporary), context)
        else:
            (folder,), name = results_of([str(read)], Path()), Path(suite).stem
        if known and known.suite != name:
            raise UsageError(f"{baseline}: a baseline of '{known.suite}', not of '{name}'")
        if update:
            unit = known.yardstick if known else judge.yardstick_of(folder, yardstick)
            limits = known.limits if known else judge.DEFAULT_LIMITS
            _give(console.to_json(judge.of(folder, name, unit, limits)), baseline)
            return
        assert known is not None
        verdict = judge.check(folder, known)
    text = console.to_json(judge.to_json(verdict)) if as_json else judge.to_markdown(verdict)
    _give(text, output)
    if verdict.failed:
        console.say(f"{len(verdict.failed)} of {len(verdict.checks)} checks failed")
        raise typer.Exit(ExitCode.RUNS_FAILED)


def _run_afresh(
    suite: str, settings: list[str], results: Path, context: dict[str, Any]
) -> tuple[SuiteFolder, str]:
    """Run a suite where nothing was run before; its folder and name."""
    from snnbench import console, planner, runner

    loaded, specs = planner.specs_of(suite, settings)
    plan = planner.make_plan(loaded, specs, results)
    with console.Lines(quiet=True) as listener:
        outcome = runner.run(plan, {**context, "allow_unverified_data": False}, listener)
    if outcome.interrupted:
        raise typer.Exit(ExitCode.INTERRUPTED)
    return plan.folder, loaded.name


def results_of(what: list[str] | None, results: Path) -> list[SuiteFolder]:
    """Folders of results, given by path, by suite, or by nothing: the suite run last."""
    from snnbench.spec import did_you_mean
    from snnbench.store import SuiteFolder, suite_folders

    known = suite_folders(results)
    if not what:
        if not known:
            raise ResultsError(f"{results}: no results yet; begin with `snnbench run smoke`")
        return [known[-1]]
    found = []
    for wanted in what:
        name = Path(wanted).stem if wanted.endswith(".toml") else wanted
        for path in (Path(wanted), results / name):
            with contextlib.suppress(OSError, ValueError):  # a name too long, or with a NUL
                if (path / "runs.csv").is_file():
                    found.append(SuiteFolder(path))
                    break
        else:
            close = did_you_mean(name, [f.path.name for f in known])
            raise ResultsError(f"no results of '{wanted}' in {results}{close}")
    return found


def add_to(app: typer.Typer) -> None:
    """Give the app the commands of this module."""
    for command in (report, plot, show, compare, gate):
        app.command()(command)
