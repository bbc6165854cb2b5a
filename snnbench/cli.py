"""The command line: parse, call one function, render. Nothing is imported before it is used."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from snnbench import __version__
from snnbench.cli_data import DataRoot, Json, data_app, data_root_of
from snnbench.cli_peers import peers
from snnbench.errors import ExitCode, SnnbenchError, UsageError

app = typer.Typer(
    name="snnbench",
    help="Compare training methods for spiking neural networks: everything equal but the method.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 1 runs failed, 2 usage, 3 suite, 4 data, 5 results folder, "
    "6 worker, 70 bug, 130 interrupted.",
)
app.add_typer(data_app, name="data")
app.command()(peers)
new_app = typer.Typer(help="Write a skeleton.", no_args_is_help=True)
app.add_typer(new_app, name="new")


class Format(StrEnum):
    """How a report is written."""

    terminal = "terminal"
    md = "md"
    csv = "csv"
    json = "json"


class What(StrEnum):
    """What can be listed."""

    methods = "methods"
    models = "models"
    datasets = "datasets"
    kernels = "kernels"
    suites = "suites"


SuiteArgument = Annotated[str, typer.Argument(help="A suite file, or the name of a shipped suite.")]
Results = Annotated[
    Path, typer.Option("--results", envvar="SNNBENCH_RESULTS", help="Folder of all results.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value, as train.epochs=5."),
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="KEY=VALUE", help="Only these runs, as method=tet,T=4."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"snnbench {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["SNNBENCH_DEBUG"] = "1"


@app.command()
def run(
    suite: SuiteArgument,
    set_: Set = None,
    only: Only = None,
    redo: Annotated[
        bool, typer.Option(help="Do runs again that are done; the old are kept.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option(help="Do failed runs again.")] = False,
    fail_fast: Annotated[bool, typer.Option(help="Stop after the first failure.")] = False,
    results: Results = Path("results"),
    data_root: DataRoot = None,
    allow_unverified_data: Annotated[
        bool,
        typer.Option(
            help="Use copies of data that are not the official bytes. Reading one can "
            "run code in it: allow only what you trust."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Warnings and failures only.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Do what is missing of a suite."""
    from snnbench import console, planner, runner
    from snnbench import suite as suites
    from snnbench.store import FAILURES

    choice = planner.Choice(suites.parse_only(only or ()), redo, retry_failed)
    loaded, specs = planner.specs_of(suite, set_ or [])
    plan = planner.make_plan(loaded, specs, results, choice)
    if not plan.runs:
        raise UsageError(f"--only: no run of '{loaded.name}' fits; `snnbench plan` prints all")
    context = {
        "data_root": str(data_root_of(data_root)),
        "allow_unverified_data": allow_unverified_data,
        "device": _device(device),
    }
    lively = sys.stderr.isatty() and not quiet
    listener = console.Bars() if lively else console.Lines(quiet)
    with listener:
        outcome = runner.run(plan, context, listener, fail_fast)
    if as_json:
        console.print_json(
            {
                "suite": loaded.name,
                "results": str(plan.folder.path),
                "runs": outcome.counts,
                "interrupted": outcome.interrupted,
            }
        )
    where = "" if results == Path("results") else f" --results {results}"
    again = _same_command()
    if outcome.interrupted:
        console.say("interrupted; what was done stays done")
        _next(quiet, again)
        raise typer.Exit(ExitCode.INTERRUPTED)
    if cut_short := outcome.counts.get("interrupted"):
        console.say(f"{cut_short} runs were cut short; the same command goes on with them")
        _next(quiet, again)
        raise typer.Exit(ExitCode.RUNS_FAILED)
    if outcome.failed:
        console.say(f"{outcome.failed} runs failed")
        _next(quiet, again if retry_failed else f"{again} --retry-failed")
        raise typer.Exit(ExitCode.RUNS_FAILED)
    if earlier := sum(r.status in FAILURES and not r.todo for r in plan.runs):
        console.say(f"{earlier} runs failed earlier")
        _next(quiet, f"{again} --retry-failed")
        raise typer.Exit(ExitCode.RUNS_FAILED)
    _next(quiet, f"snnbench report {loaded.name}{where} --format md")


@app.command()
def plan(
    suite: SuiteArgument,
    set_: Set = None,
    only: Only = None,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Print every run of a suite, done or missing, and how long the rest may take."""
    from snnbench import console, planner
    from snnbench import suite as suites

    loaded, specs = planner.specs_of(suite, set_ or [])
    choice = planner.Choice(suites.parse_only(only or ()))
    planned = planner.make_plan(loaded, specs, results, choice)
    if as_json:
        console.print_json(planned.to_json())
        return
    console.print_plan(planned)
    time = console.duration(planned.estimate_s)
    console.say(
        f"{len(planned.runs)} runs, {len(planned.todo)} to do"
        + (f", about {time} on this machine" if time and planned.todo else "")
    )
    if not planned.runs:
        raise UsageError(f"--only: no run of '{loaded.name}' fits")
    where = "" if results == Path("results") else f" --results {results}"
    again = _same_command().replace("snnbench plan", "snnbench run", 1)
    console.hint(again if planned.todo else f"snnbench report {loaded.name}{where}")


@app.command()
def report(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[SUITE or FOLDER]", help="Default: the suite run last."),
    ] = None,
    format_: Annotated[
        Format, typer.Option("--format", "-f", help="How to write it.")
    ] = Format.terminal,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Print the table of a suite's results."""
    from snnbench import console
    from snnbench.report import content, data, markdown

    folder = _results_of(what, results)
    built = content.build(folder)
    if as_json or format_ is Format.json:
        console.print_data(data.to_json(built))
    elif format_ is Format.csv:
        console.print_data(data.to_csv(built))
    elif format_ is Format.md:
        console.print_data(markdown.render(built))
    else:
        console.print_report(built, content.LEGEND, content.PUBLISHED_COLUMNS)
        console.hint(f"{_same_command()} --format md, or snnbench show RUN_ID")


@app.command()
def plot(
    figure: Annotated[str, typer.Argument(help="fidelity, accuracy, saved, step or cosine.")],
    what: Annotated[
        str | None,
        typer.Argument(metavar="[SUITE or FOLDER]", help="Default: the suite run last."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .png, .svg or .pdf file."),
    ] = None,
    results: Results = Path("results"),
) -> None:
    """Draw a figure of a suite's results."""
    from snnbench import console
    from snnbench.report import plots

    folder = _results_of(what, results)
    console.say(f"written: {plots.draw(folder, figure, output or folder.path / f'{figure}.png')}")
    console.hint(f"snnbench report {folder.path.name}")


@app.command("list")
def list_(what: What, as_json: Json = False) -> None:
    """List methods, models, datasets, kernels or shipped suites."""
    from snnbench import registry

    if what is What.suites:
        from snnbench import suite as suites

        rows = [{"name": n, "claim": suites.claim_of(p)} for n, p in suites.shipped().items()]
    else:
        rows = [c.describe() for c in registry.components(what.value).values()]
    from snnbench import console

    if as_json:
        console.print_json({what.value: rows})
        return
    columns = [c for c in rows[0] if c not in ("distribution", "version")]
    wrap = [c for c in columns if c != "name"]
    console.print_table(columns, [[r[c] for c in columns] for r in rows], wrap=wrap)
    follow = {"suites": "snnbench plan NAME", "methods": "snnbench check NAME"}
    console.hint(
        follow.get(what.value, "name it in the [axes] of a suite, then snnbench plan SUITE")
    )


@app.command()
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


@app.command()
def check(
    what: Annotated[str, typer.Argument(metavar="SUITE or METHOD", help="Checked, not run.")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Check a suite, or let a method prove that it keeps the contract."""
    from snnbench import console, planner, registry, runner

    if what in registry.components("methods") or "+" in what:
        checks = runner.check_method(what)
        ok = all(c["ok"] for c in checks)
        if as_json:
            console.print_json({"method": what, "ok": ok, "checks": checks})
        else:
            rows = [["pass" if c["ok"] else "FAIL", c["name"], c["detail"]] for c in checks]
            console.print_table(["", "clause", "seen"], rows, wrap=["seen"])
            console.hint(f'write a suite with [[method]] name = "{what}", then snnbench run it')
        raise typer.Exit(ExitCode.OK if ok else ExitCode.RUNS_FAILED)
    loaded, specs = planner.specs_of(what, set_ or [])
    if as_json:
        console.print_json({"suite": loaded.name, "ok": True, "runs": len(specs)})
        return
    console.say(f"{what}: ok, {len(specs)} runs")
    console.hint(f"snnbench plan {what}")


@new_app.command("method")
def new_method(
    name: Annotated[str, typer.Argument(help="A Python name, as my_method.")],
    folder: Annotated[Path, typer.Option("--into", help="Where its folder is made.")] = Path(),
) -> None:
    """Write the skeleton of a package that adds a training method; its own test passes."""
    from snnbench import console, scaffold

    made = scaffold.new_method(name, folder)
    console.say(f"written: {made}")
    console.hint(f"pip install -e {made} && snnbench check {name}")


def _same_command() -> str:
    """The command as the user typed it, to be typed again."""
    arguments = [a for a in sys.argv[1:] if a != "--redo"]
    return shlex.join(["snnbench", *arguments])


def _next(quiet: bool, command: str) -> None:
    if not quiet:
        from snnbench import console

        console.hint(command)


def _device(name: str) -> str:
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise typer.BadParameter(f"--device {name}: it can be auto, cpu, cuda or cuda:N")
    return name


def _results_of(what: str | None, results: Path) -> Any:
    """The folder of a suite's results, given by path, by name, or by nothing: the last one."""
    from snnbench.errors import ResultsError
    from snnbench.spec import did_you_mean
    from snnbench.store import SuiteFolder, suite_folders

    known = suite_folders(results)
    if what is None:
        if not known:
            raise ResultsError(f"{results}: no results yet; begin with `snnbench run smoke`")
        return known[-1]
    name = Path(what).stem if what.endswith(".toml") else what
    for path in (Path(what), results / name):
        with contextlib.suppress(OSError):  # a name too long for a file
            if (path / "runs.csv").is_file():
                return SuiteFolder(path)
    raise ResultsError(
        f"no results of '{what}' in {results}{did_you_mean(name, [f.path.name for f in known])}"
    )


class _CtrlC(BaseException):
    """Ctrl-C outside of a run; typer would end a KeyboardInterrupt with its own exit code."""


def _ctrl_c(*_: object) -> None:
    raise _CtrlC


def main() -> NoReturn:
    """Run the command line; every error is one clear line each and a documented exit code."""
    signal.signal(signal.SIGINT, _ctrl_c)
    code: int = ExitCode.OK
    try:
        app()
    except _CtrlC:
        code = ExitCode.INTERRUPTED
    except SnnbenchError as error:
        code = _explain(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader, such as `head`, has gone
    except Exception as error:
        code = _bug(error)
    sys.exit(code)


def _explain(error: SnnbenchError) -> int:
    if os.environ.get("SNNBENCH_DEBUG"):
        traceback.print_exception(error)
    for line in str(error).splitlines():
        typer.echo(f"error: {line}", err=True)
    return error.exit_code


def _bug(error: Exception) -> int:
    if os.environ.get("SNNBENCH_DEBUG"):
        traceback.print_exception(error)
    typer.echo(
        f"error: this is a bug in snnbench: {type(error).__name__}: {error}; run it again "
        "with `snnbench --debug ...` and report the traceback",
        err=True,
    )
    return ExitCode.INTERNAL
