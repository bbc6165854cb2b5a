"""The commands that look at results: parse, call one function, render."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snnbench.commands.data import Json
from snnbench.commands.run import Results
from snnbench.errors import ResultsError, UsageError

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
        console.print_report(built, built.legend, PUBLISHED_COLUMNS, ACROSS_COLUMNS)
        name, there = named(folders[-1]), where_of(folders[-1])
        console.hint(f"snnbench report {name} -o report.html, or snnbench show RUN_ID{there}")
        return
    give(_written(format_, folders, view), output)


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


def give(made: str | bytes, output: Path | None) -> None:
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
    console.hint(f"snnbench report {named(folders[-1])}")


def show(run_id: str, results: Results = Path("results"), as_json: Json = False) -> None:
    """Print everything known of one run; the beginning of its id is enough."""
    from snnbench import console
    from snnbench.runs import overview

    log = ""
    try:
        suite_folder, folder = overview.find_run(results, run_id)
        details, log = overview.run_details(folder), f"; the log is {folder.log}"
    except ResultsError:  # in a clone the tables were kept, and the run folders were not
        from snnbench.report import source

        found = source.find_row(results, run_id)
        if found is None:
            raise
        suite_folder, details = found
    if as_json:
        console.print_json(details)
        return
    console.print_run(details)
    console.hint(f"snnbench report {named(suite_folder)}{log}")


def export(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[SUITE or FOLDER]",
            help="Default: the suite run last.",
            autocompletion=_known_results,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: SUITE.zip; or a .json file.")
    ] = None,
    results: Results = Path("results"),
) -> None:
    """Pack a result with its provenance into one archive, or write NeuroBench's metrics."""
    from snnbench import console
    from snnbench.report import content
    from snnbench.report import export as rooms

    (folder,) = results_of([what] if what else None, results)
    target = output or Path(f"{folder.path.resolve().name}.zip")
    if target.suffix == ".json":
        give(console.to_json(rooms.neurobench(content.build(folder).cells)), target)
    elif target.suffix == ".zip":
        give(rooms.archive(folder), target)
    else:
        raise UsageError(f"--output {target}: write a .zip (everything) or .json (NeuroBench)")


def named(folder: SuiteFolder) -> str:
    """The folder as a command finds it: a suite below `results`, and a path elsewhere."""
    path = folder.path
    return shlex.quote(path.name if path.parent == Path("results") else str(path))


def where_of(folder: SuiteFolder) -> str:
    """The option that names the folder above, where that is not the default."""
    root = folder.path.parent
    return "" if root == Path("results") else f" --results {shlex.quote(str(root))}"


def results_of(what: list[str] | None, results: Path) -> list[SuiteFolder]:
    """Folders of results, given by path, by suite, or by nothing: the suite run last."""
    from snnbench.spec import did_you_mean
    from snnbench.store import SuiteFolder, suite_folders
    from snnbench.suite import name_of

    known = suite_folders(results)
    if not what:
        if not known:
            raise ResultsError(f"{results}: no results yet; begin with `snnbench run smoke`")
        return [known[-1]]
    found = []
    for wanted in what:
        name = name_of(wanted)
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
    for command in (report, plot, show, export):
        app.command()(command)
