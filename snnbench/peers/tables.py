"""How the results of the contestants are written: text, pandas table, JSON, markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from snnbench.peers.results import Goal, Ratio, Result, Rival, Row, goals, quartiles, ratio, rivals

NONE = "–"
COLUMNS = ("contestant", "step ms", "x floor", "x ours", "images/s", "warm-up s", "spikes differ",
           "gradient error", "saved B", "saved MB", "peak MB", "operations",
           "disturbed", "note")  # fmt: skip
NOTES = (
    "The neuron is everywhere v_pre = v / 2 + c, s = [v_pre >= 1], hard reset without gradient, "
    "triangle surrogate of width 1; the input is the same image at every timestep, the loss the "
    "cross-entropy of the time-mean logits, the optimizer fused SGD with momentum.",
    "x floor and x ours are step times over those of the ANN on T * B images (channels_last, "
    "memory kept; on a GPU fp16, as ours is there) and over ours, paired within each round; the "
    "median, and the quartiles in brackets. Below 1 is faster.",
    "spikes differ: share of all spikes of all layers, on 16 images under frozen BatchNorm, that "
    "differ from our reference kernel; the note says where the first ones do. A difference of "
    "rounding at the threshold in one layer cascades through the next. In training the statistics "
    "of the batch would spread it to all neurons, so that is not compared.",
    "gradient error: |g - g_ref| / |g_ref| over all parameters, on the same images.",
    "The order `step` does all layers of a timestep before the next one: its BatchNorm sees one "
    "timestep at a time in training, which is another algorithm than that of all other rows. "
    "Spikes are still compared, since frozen statistics are the same in both orders.",
    "warm-up: building the contestant and its first step, with all that is compiled or loaded for "
    "it; importing libraries is left out. A compiled kernel of ours is cached by the machine "
    "(in brackets: the same with an empty cache), torch.compile begins with empty caches. On a GPU "
    "the imports of contestants that are prepared later may go on at the same time.",
    "saved B: bytes kept for the backward pass for each neuron and timestep; saved MB: all of "
    "them. peak MB: what a step adds to the resident memory (on a GPU: to the allocated memory), "
    "and for compiled contestants what the compiler left behind. MB are 10^6 bytes.",
    "operations: calls of torch's aten operations in a step, those within others included; counted "
    "on a CPU only.",
    "disturbed: rounds in which other processes used more than 8 % of the CPU at every try.",
    "lif and bn-lif are one layer alone: no loss and no optimizer, BatchNorm with the statistics "
    "of the batch, the floor is a copy of the input, and errors are of the input's gradient.",
    "floor:conv has no BatchNorm, and its learning rate is 0; floor:ann-B runs on B images.",
)


def cells(result: Result) -> list[list[str]]:
    """Every contestant as text, in the order of COLUMNS."""
    floor, ours = result.floor, result.ours
    return [_cells(row, result.B, floor, ours) for row in result.rows]


def _cells(row: Row, B: int, floor: Row | None, ours: Row | None) -> list[str]:
    if not row.timed:
        return [row.name, row.status, *[NONE] * (len(COLUMNS) - 3), row.reason]
    step = quartiles(row.round_ms)
    path = "" if row.kernel_path in ("", *row.who) else f" ({row.kernel_path})"
    return [
        row.name + path,
        str(step),
        NONE if floor is None else str(ratio(row, floor)),
        NONE if ours is None else str(ratio(row, ours)),
        f"{1e3 * B / step.median:.0f}",
        _warm_up(row),
        NONE if row.differing is None else f"{row.differing:.0e}" if row.differing else "0",
        NONE if row.parity is None else f"{row.parity['grad_error']:.0e}",
        _number(row.saved_per_neuron_step, ".2f"),
        _number(row.saved_bytes, ".1f", 1e-6),
        _number(row.peak_bytes, ".0f", 1e-6),
        _number(row.aten_ops, "d"),
        f"{row.disturbed} of {len(row.foreign)}",
        f"first {row.parity['first']}" if row.parity and row.differing else "",
    ]


def _warm_up(row: Row) -> str:
    cold = "" if row.cold_warmup_s is None else f" ({row.cold_warmup_s:.1f})"
    return _number(row.warmup_s, ".1f") + cold


def warning(result: Result) -> str:
    """What speaks against the times of this network; empty if nothing does."""
    disturbed = sum(row.disturbed for row in result.rows)
    if not disturbed:
        return ""
    of = sum(len(row.foreign) for row in result.rows)
    return (
        f"{disturbed} of {of} slices were disturbed by other processes at every try: the ratios "
        "need a quieter machine"
    )


def _number(value: float | None, form: str, factor: float | None = None) -> str:
    return NONE if value is None else format(value if factor is None else factor * value, form)


def frame(result: Result) -> pd.DataFrame:
    """One row for each contestant, numbers as they are; empty where nothing was measured."""
    floor, ours = result.floor, result.ours
    rows = []
    for row in result.rows:
        step = quartiles(row.round_ms) if row.timed else None
        entry: dict[str, Any] = {"contestant": row.name, "status": row.status, "reason": row.reason}
        entry |= {"version": row.version, "kernel_path": row.kernel_path, "net": result.net}
        entry |= {"B": result.B, "T": result.T, "rounds": len(row.round_ms)}
        entry |= _spread("step_ms", step)
        entry |= _spread("x_floor", ratio(row, floor) if step and floor else None)
        entry |= _spread("x_ours", ratio(row, ours) if step and ours else None)
        entry["images_per_s"] = 1e3 * result.B / step.median if step else None
        parity = row.parity or {}
        entry |= {"warmup_s": row.warmup_s, "cold_warmup_s": row.cold_warmup_s}
        entry |= {"spikes_differing_share": row.differing}
        entry |= {"first_differing": parity.get("first"), "grad_error": parity.get("grad_error")}
        entry["lowest_firing_rate"] = parity.get("lowest_rate")
        for key in ("saved_bytes", "saved_per_neuron_step", "peak_bytes", "aten_ops", "disturbed"):
            entry[key] = getattr(row, key)
        entry["round_ms"] = " ".join(f"{ms:.4f}" for ms in row.round_ms)
        entry["foreign_cpu_share"] = " ".join(f"{share:.3f}" for share in row.foreign)
        rows.append(entry)
    return pd.DataFrame(rows).convert_dtypes()


def _spread(name: str, value: Ratio | None) -> dict[str, float | None]:
    low, median, high = (
        (None, None, None) if value is None else (value.low, value.median, value.high)
    )
    return {name: median, f"{name}_q1": low, f"{name}_q3": high}


def to_csv(result: Result) -> str:
    """The table of one network."""
    return frame(result).to_csv(index=False, lineterminator="\n")


def to_json(result: Result) -> dict[str, Any]:
    """All that was found, as plain data."""
    claims = [goal._asdict() | {"met": goal.met} for goal in goals(result)]
    for claim in claims:
        if isinstance(claim["measured"], Ratio):
            claim["measured"] = claim["measured"]._asdict()
    return asdict(result) | {"goals": claims}


def to_markdown(results: Sequence[Result]) -> str:
    """A report of all networks, ending in a newline; it holds no date, and so no noise."""
    lines = ["# The same spiking network in other libraries", ""]
    lines += [f"- {fact}" for fact in facts(results)]
    for result in results:
        lines += ["", f"## {result.net}: B = {result.B}, T = {result.T}", ""]
        lines += _table(COLUMNS, cells(result))
        if doubt := warning(result):
            lines += ["", f"**{doubt}**"]
        for half in (False,) if result.on_gpu else (False, True):
            if not (beside := rivals(result, half)):
                continue
            lines += ["", "How much longer a step of the others takes than ours; the strongest "
                      "configuration found counts.", ""]  # fmt: skip
            heads = (
                "rival",
                "strongest configuration",
                "its step over ours",
                "by default",
                "over ours",
            )
            lines += _table(heads, map(_rival, beside))
        if claims := goals(result):
            where = "one H200" if result.on_gpu else "2 CPU cores and T = 4"
            lines += ["", f"Goals, set for {where}:", ""]
            lines += _table(("goal", "what", "bound", "measured", ""), map(_goal, claims))
    return "\n".join([*lines, "", *(f"- {note}" for note in NOTES)]) + "\n"


def facts(results: Sequence[Result]) -> list[str]:
    """Machine, versions and n, one line each."""
    first = results[0]
    machine = next((r.machine for r in results if r.machine), {})
    own = {"snnbench": machine.get("snnbench"), "python": machine.get("python")}
    own |= {"torch": machine.get("versions", {}).get("torch")}
    versions = own | {row.who[0]: row.version for r in results for row in r.rows if row.version}
    counts = [f"{machine.get('cores')} cores", f"{first.threads} threads",
              f"{machine.get('memory_gib')} GiB"]  # fmt: skip
    where = [machine.get("gpu"), machine.get("cpu"), *counts, machine.get("os")]
    return [
        f"machine {machine.get('machine_id')}: {', '.join(filter(None, where))}",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        f"n = {first.rounds} rounds, forwards and backwards in turn, each contestant in a process "
        "of its own; medians over rounds, quartiles in brackets",
    ]


def _rival(rival: Rival) -> list[str]:
    default = [NONE, NONE] if rival.default is None else [rival.default.name, str(rival.default_by)]
    return [rival.library, rival.strongest.name, str(rival.by), *default]


def _goal(goal: Goal) -> list[str]:
    bound = f"{'>=' if goal.at_least else '<='} {goal.bound:g}"
    measured = goal.measured if isinstance(goal.measured, Ratio) else _number(goal.measured, ".4g")
    verdict = {True: "met", False: "not met", None: "not measured"}[goal.met]
    return [goal.id, goal.what, bound, str(measured), verdict]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    head = [columns, ["---"] * len(columns)]
    clean = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in [*head, *clean]]
