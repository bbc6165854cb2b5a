"""The commands that judge results, and the one that begins a suite: parse, call, render."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snnbench.commands.data import DataRoot, Json, data_root_of
from snnbench.commands.report import Format, Output, Where, give, names_in, results_of
from snnbench.commands.run import Results, Set, device_named
from snnbench.errors import ExitCode, UsageError

if TYPE_CHECKING:  # it imports much that `--help` need not wait for
    from snnbench.store import SuiteFolder


def known_suites(incomplete: str) -> list[str]:
    """Names of shipped suites, for the shell."""
    from snnbench.suite import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


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
    give(text, output)


def gate(
    suite: Annotated[
        str,
        typer.Argument(help="A suite file, or a shipped suite.", autocompletion=known_suites),
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
    from snnbench.suite import name_of

    known = None if update and not baseline.exists() else judge.read(baseline)
    with tempfile.TemporaryDirectory() as temporary:
        if read is None:
            context = {"data_root": str(data_root_of(data_root)), "device": device_named(device)}
            folder, name = _run_afresh(suite, set_ or [], Path(temporary), context)
        else:
            (folder,), name = results_of([str(read)], Path()), name_of(suite)
        if known and known.suite != name:
            raise UsageError(f"{baseline}: a baseline of '{known.suite}', not of '{name}'")
        if update:
            unit = known.yardstick if known else judge.yardstick_of(folder, yardstick)
            limits = known.limits if known else judge.DEFAULT_LIMITS
            give(console.to_json(judge.of(folder, name, unit, limits)), baseline)
            return
        assert known is not None
        verdict = judge.check(folder, known)
    text = console.to_json(judge.to_json(verdict)) if as_json else judge.to_markdown(verdict)
    give(text, output)
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


def init(
    name: Annotated[str | None, typer.Argument(help="Name of the suite.")] = None,
    claim: Annotated[str | None, typer.Option(help="The sentence that it tests.")] = None,
    dataset: Annotated[str | None, typer.Option(help="One, or several with commas.")] = None,
    model: Annotated[str | None, typer.Option(help="One, or several with commas.")] = None,
    methods: Annotated[str | None, typer.Option(help="As bptt,tet,rate.")] = None,
    T: Annotated[str | None, typer.Option("--T", help="Timesteps, as 2,4.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of training.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: NAME.toml.")
    ] = None,
) -> None:
    """Write a commented suite; asks on a terminal, and never in a script."""
    from snnbench import console, scaffold

    given = {"name": name, "claim": claim, "dataset": dataset, "model": model,
             "methods": methods, "T": T, "seeds": seeds, "epochs": epochs}  # fmt: skip
    ask = not yes and sys.stdin.isatty() and sys.stderr.isatty()
    answers: Any = {}
    for key, value in given.items():
        default = getattr(scaffold.Questions, key)
        if value is None:
            value = typer.prompt(key, default=default, err=True) if ask else default
        answers[key] = value
    path = scaffold.new_suite(
        scaffold.Questions(**answers), output or Path(f"{answers['name']}.toml")
    )
    console.say(f"written: {path}")
    console.hint(f"snnbench plan {path}")


def add_to(app: typer.Typer) -> None:
    """Give the app the commands of this module."""
    for command in (compare, gate, init):
        app.command()(command)
