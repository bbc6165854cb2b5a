"""The command line: parse, call one function, render. Nothing is imported before it is used."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from snnbench import __version__
from snnbench.commands import judge, report
from snnbench.commands.data import Json, data_app
from snnbench.commands.doctor import doctor
from snnbench.commands.peers import peers
from snnbench.commands.run import Set, cancel, logs, plan, run, status
from snnbench.errors import ExitCode, SnnbenchError

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
for command in (run, plan, status, cancel, logs):
    app.command()(command)
app.add_typer(data_app, name="data")
app.command()(peers)
app.command()(doctor)
report.add_to(app)
judge.add_to(app)
new_app = typer.Typer(help="Write a skeleton.", no_args_is_help=True)
app.add_typer(new_app, name="new")


class What(StrEnum):
    """What can be listed."""

    methods = "methods"
    models = "models"
    datasets = "datasets"
    kernels = "kernels"
    suites = "suites"
    figures = "figures"


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


@app.command("list")
def list_(what: What, as_json: Json = False) -> None:
    """List methods, models, datasets, kernels or shipped suites."""
    from snnbench import registry

    if what is What.suites:
        from snnbench import suite as suites

        rows = [{"name": n, "claim": suites.claim_of(p)} for n, p in suites.shipped().items()]
    elif what is What.figures:
        from snnbench.report import plots

        rows = [{"name": n, "shows": s} for n, s in plots.SHOWS.items()]
    else:
        rows = [c.describe() for c in registry.components(what.value).values()]
    from snnbench import console

    if as_json:
        console.print_json({what.value: rows})
        return
    columns = [c for c in rows[0] if c not in ("distribution", "version")]
    wrap = [c for c in columns if c != "name"]
    console.print_table(columns, [[r[c] for c in columns] for r in rows], wrap=wrap)
    follow = {
        "suites": "snnbench plan NAME",
        "methods": "snnbench check NAME",
        "figures": "snnbench plot NAME SUITE",
    }
    console.hint(
        follow.get(what.value, "name it in the [axes] of a suite, then snnbench plan SUITE")
    )


@app.command()
def check(
    what: Annotated[str, typer.Argument(metavar="SUITE or METHOD", help="Checked, not run.")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Check a suite, or let a method prove that it keeps the contract."""
    from snnbench import console, planner, registry, runner

    if what in registry.components("methods") or ("+" in what and not what.endswith(".toml")):
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
