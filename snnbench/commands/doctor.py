"""The command `snnbench doctor`: parse, call one function, render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snnbench.commands.data import DataRoot, Json, data_root_of
from snnbench.commands.run import device_named


def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    results: Annotated[
        Path, typer.Option("--results", envvar="SNNBENCH_RESULTS", help="Folder of all results.")
    ] = Path("results"),
    data_root: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Look whether this machine is fit to measure on; every warning says what to do."""
    from snnbench import console, runner

    seen = runner.examine_machine(device_named(device), data_root_of(data_root), results)
    if as_json:
        console.print_json(seen)
        return
    machine = seen["machine"]
    console.print_data(
        f"{machine['machine_id']}: {machine.get('gpu') or machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, {machine['os']}, "
        f"Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
        + (f", CUDA {machine['cuda']}" if machine["cuda"] else "")
    )
    rows = [
        ["warning" if c["action"] else "", c["name"], c["seen"], c["action"] or ""]
        for c in seen["checks"]
    ]
    console.print_table(["", "what", "seen", "what to do"], rows, wrap=["seen", "what to do"])
    warnings = sum(bool(c["action"]) for c in seen["checks"])
    console.say("1 warning" if warnings == 1 else f"{warnings or 'no'} warnings")
    console.hint("snnbench run smoke")
