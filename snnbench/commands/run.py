"""The commands about runs: run, plan, status, cancel, logs."""

from __future__ import annotations

import json
import shlex
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from snnbench.commands.data import DataRoot, Json, data_root_of
from snnbench.errors import ExitCode, ResultsError, UsageError

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


class Where(StrEnum):
    """What executes the runs."""

    local = "local"
    slurm = "slurm"


def run(
    suite: SuiteArgument,
    set_: Set = None,
    only: Only = None,
    redo: Annotated[
        bool, typer.Option(help="Do runs again that are done; the old are kept.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option(help="Do failed runs again.")] = False,
    redo_stale: Annotated[
        bool, typer.Option(help="Do runs again whose results other code computed.")
    ] = False,
    fail_fast: Annotated[bool, typer.Option(help="Stop after the first failure.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time; by default one a GPU, or one on a CPU."),
    ] = None,
    executor: Annotated[Where | None, typer.Option(help="Where runs are executed.")] = None,
    detach: Annotated[bool, typer.Option(help="Submit to the cluster, and do not wait.")] = False,
    slurm_partition: Annotated[str | None, typer.Option(help="As in [slurm].")] = None,
    slurm_account: Annotated[str | None, typer.Option(help="As in [slurm].")] = None,
    slurm_qos: Annotated[str | None, typer.Option(help="As in [slurm].")] = None,
    slurm_constraint: Annotated[str | None, typer.Option(help="As in [slurm].")] = None,
    slurm_gpus: Annotated[int | None, typer.Option(min=0, help="GPUs of each job.")] = None,
    slurm_cpus: Annotated[int | None, typer.Option(min=1, help="CPUs of each job.")] = None,
    slurm_memory: Annotated[str | None, typer.Option(help="Memory of each job, as 16G.")] = None,
    slurm_time: Annotated[int | None, typer.Option(min=1, help="Minutes of each job.")] = None,
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
    """Do what is missing of a suite, here or on a cluster."""
    from snnbench import console, planner, runner
    from snnbench import suite as suites
    from snnbench.store import FAILURES

    settings = [*(set_ or [])]
    given: dict[str, Any] = {
        "run.jobs": jobs,
        "run.executor": executor.value if executor else None,
        "slurm.partition": slurm_partition, "slurm.account": slurm_account,
        "slurm.qos": slurm_qos, "slurm.constraint": slurm_constraint, "slurm.gpus": slurm_gpus,
        "slurm.cpus": slurm_cpus, "slurm.memory": slurm_memory, "slurm.time": slurm_time,
    }  # fmt: skip
    settings += [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    choice = planner.Choice(suites.parse_only(only or ()), redo, retry_failed, redo_stale)
    loaded, specs = planner.specs_of(suite, settings)
    if detach and loaded.run.executor == "local":
        raise UsageError("--detach: only a cluster goes on by itself; give --executor slurm")
    if loaded.run.executor == "slurm":
        from snnbench.executors.slurm import require_submitit

        require_submitit()
    plan = planner.make_plan(loaded, specs, results, choice)
    if not plan.runs:
        raise UsageError(f"--only: no run of '{loaded.name}' fits; `snnbench plan` prints all")
    context = {
        "data_root": str(data_root_of(data_root)),
        "allow_unverified_data": allow_unverified_data,
        "device": device_named(device),
    }
    lively = sys.stderr.isatty() and not quiet
    listener = console.Bars() if lively else console.Lines(quiet)
    with listener:
        outcome = runner.run(plan, context, listener, fail_fast, detach)
    if as_json:
        console.print_json(
            {
                "suite": loaded.name,
                "results": str(plan.folder.path),
                "runs": outcome.counts,
                "interrupted": outcome.interrupted,
                "stopped_early": outcome.why or None,
                "queued": outcome.queued,
                "stale": plan.stale,
            }
        )
    where = "" if results == Path("results") else f" --results {results}"
    again = same_command()
    if plan.stale:
        console.say(f"warning: {plan.stale} results were computed by other code: --redo-stale")
    if outcome.queued:
        console.say(f"{outcome.queued} runs go on in the cluster; the same command waits for them")
        _next(quiet, f"snnbench status {loaded.name}{where}")
        raise typer.Exit(ExitCode.INTERRUPTED if outcome.interrupted else ExitCode.OK)
    if outcome.interrupted:
        console.say("interrupted; what was done stays done")
        _next(quiet, again)
        raise typer.Exit(ExitCode.INTERRUPTED)
    if outcome.why:
        console.say(f"error: {outcome.why}")
        _next(quiet, again if retry_failed else f"{again} --retry-failed")
        raise typer.Exit(ExitCode.RUNS_FAILED)
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
    if not planned.runs:
        raise UsageError(f"--only: no run of '{loaded.name}' fits")
    if as_json:
        console.print_json(planned.to_json())
        return
    console.print_plan(planned)
    time = console.duration(planned.estimate_s)
    console.say(
        f"{len(planned.runs)} runs, {len(planned.todo)} to do"
        + (f", about {time} on this machine" if time and planned.todo else "")
        + (f", {planned.stale} stale: computed by other code" if planned.stale else "")
    )
    where = "" if results == Path("results") else f" --results {results}"
    again = same_command().replace("snnbench plan", "snnbench run", 1)
    if planned.stale and not planned.todo:
        again += " --redo-stale"
    console.hint(
        again if planned.todo or planned.stale else f"snnbench report {loaded.name}{where}"
    )


def status(
    suite: Annotated[
        str | None, typer.Argument(metavar="[SUITE]", help="Default: the suite run last.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Print it again every few s.")] = False,
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between two prints.")] = 5.0,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Print how far the runs of a suite have come, here and on other machines."""
    from snnbench import console
    from snnbench.runs import overview

    folder = overview.suite_of(results, suite)
    while True:
        seen = overview.look(folder)
        if as_json:
            console.print_json(seen.to_json())
        else:
            console.print_status(seen.states)
            console.say(seen.summary())
        if not watch or not seen.going_on:
            break
        time.sleep(every)
    where = "" if results == Path("results") else f" --results {results}"
    if not as_json:
        follow = f"snnbench {'cancel' if seen.going_on else 'report'} {folder.path.name}{where}"
        console.hint(follow)


def cancel(
    suite: Annotated[str, typer.Argument(help="A suite; with --run, some of its runs only.")],
    run_: Annotated[
        list[str] | None,
        typer.Option("--run", metavar="RUN_ID", help="A run, by the beginning of its id."),
    ] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for their end.")] = 30.0,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """End the runs of a suite, wherever they are; each saves itself, and can be taken up again."""
    from snnbench import console
    from snnbench.runs import overview

    folder = overview.suite_of(results, suite)
    left = overview.cancel(folder, run_ or (), wait)
    if as_json:
        console.print_json({"suite": folder.path.name, "still_running": left})
    if left:
        raise ResultsError(
            f"{len(left)} runs go on after {wait:g} s, the first is {left[0]}; is their machine "
            "still there?"
        )
    console.say("cancelled; what was done stays done")
    where = "" if results == Path("results") else f" --results {results}"
    console.hint(f"snnbench status {folder.path.name}{where}")


def logs(
    run_id: str,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="The last so many.")] = 1000,
    results: Results = Path("results"),
) -> None:
    """Print what the process of a run printed; the beginning of its id is enough."""
    from snnbench import console
    from snnbench.runs import overview

    suite_folder, folder = overview.find_run(results, run_id)
    found = overview.log_of(suite_folder, folder, lines)
    for path, text in found.items():
        console.say(f"{path}:")
        console.print_data(text)
    if not found:
        console.say(f"{folder.run_id}: nothing was printed")
    console.hint(f"snnbench show {folder.run_id}")


def same_command() -> str:
    """The command as the user typed it, to be typed again."""
    arguments = [a for a in sys.argv[1:] if a not in ("--redo", "--redo-stale")]
    return shlex.join(["snnbench", *arguments])


def _next(quiet: bool, command: str) -> None:
    if not quiet:
        from snnbench import console

        console.hint(command)


def device_named(name: str) -> str:
    """The device as given; raises BadParameter where it is none."""
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise typer.BadParameter(f"--device {name}: it can be auto, cpu, cuda or cuda:N")
    return name
