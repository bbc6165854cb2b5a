"""The command `snnbench peers`: parse, call one function, render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snnbench.commands.data import Json
from snnbench.errors import ExitCode


def peers(
    net: Annotated[
        list[str] | None,
        typer.Option(
            "--net", help="vgg11, resnet18, digits (default: these), or one layer: lif, bn-lif."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds, forwards and backwards in turn.")] = 7,
    steps: Annotated[int, typer.Option(help="Training steps of a network's turn, at least.")] = 3,
    T: Annotated[int, typer.Option("--T", help="Timesteps.")] = 4,
    batch: Annotated[int | None, typer.Option(help="Batch size; default: the network's.")] = None,
    only: Annotated[
        str | None, typer.Option(help="Contestants, as ours:auto+cl+ma,norse:step.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    timeout: Annotated[
        float, typer.Option(help="Seconds after which a contestant that compiles is given up.")
    ] = 900,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the tables and the report.")
    ] = Path("peers"),
    as_json: Json = False,
) -> None:
    """Time the same network in other libraries and in ours, side by side."""
    from snnbench import console
    from snnbench.peers import bench, lineup, tables
    from snnbench.peers.results import unsuccessful

    settings = bench.Settings(
        nets=tuple(net or lineup.NETS), rounds=rounds, steps=steps, T=T, batch=batch,
        only=tuple(only.split(",")) if only else (), device=device,
        timeout_s=timeout,
    )  # fmt: skip
    results = bench.compare(settings, output, console.say)
    if as_json:
        console.print_json({"results": [tables.to_json(result) for result in results]})
    else:
        for result in results:
            console.print_data(f"{result.net}: B = {result.B}, T = {result.T}")
            console.print_table(
                tables.COLUMNS, tables.cells(result), right=tables.COLUMNS[1:-1], wrap=["note"]
            )
            if doubt := tables.warning(result):
                console.say(f"warning: {doubt}")
        console.hint(f"read {output / 'report.md'}")
    if unsuccessful(results):
        raise typer.Exit(ExitCode.RUNS_FAILED)
