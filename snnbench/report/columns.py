"""Which figures a report can show: heading, unit, digits, and which of two values is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from snnbench.errors import UsageError
from snnbench.spec import did_you_mean
from snnbench.stats import Estimate
from snnbench.summary import Cell

DASH = "–"
INFINITE = "∞"


def percent(e: Estimate | None, n: bool = False, sign: bool = False) -> str:
    """`97.21 ± 1.03 (3)`; a dash where nothing was measured."""
    if e is None:
        return DASH
    if not math.isfinite(e.mean):
        return _odd(e.mean)
    text = f"{100 * e.mean:{'+' if sign else ''}.2f}"
    text += f" ± {100 * e.half:.2f}" if e.half is not None else ""
    return text + (f" ({e.n})" if n or (sign and e.half is None) else "")


def quantity(e: Estimate | None) -> str:
    """The mean with a k, M or G."""
    if e is None:
        return DASH
    if not math.isfinite(e.mean):
        return _odd(e.mean)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(e.mean) >= 0.9995 * size:  # what rounds to 1.00
            return f"{e.mean / size:.3g} {unit}"
    return f"{e.mean:.4g}"


def number(e: Estimate | None, digits: int, scale: float = 1.0) -> str:
    """The mean with a fixed number of digits."""
    if e is None:
        return DASH
    return f"{e.mean * scale:.{digits}f}" if math.isfinite(e.mean) else _odd(e.mean)


def _odd(value: float) -> str:
    return "not a number" if math.isnan(value) else INFINITE if value > 0 else f"-{INFINITE}"


@dataclass(frozen=True)
class Column:
    """A figure of a cell. `better` is 1 if more is better, -1 if less is, 0 if neither."""

    name: str
    heading: str
    write: Callable[[Estimate | None], str]
    better: int = 0
    meaning: str = ""

    def text(self, cell: Cell) -> str:
        """As it stands in a table."""
        return self.write(self.estimate(cell))

    def estimate(self, cell: Cell) -> Estimate | None:
        """The figure of a cell; None if it was not measured."""
        return cell.estimates.get(self.name)


class Difference(Column):
    """Accuracy less the baseline's."""

    def estimate(self, cell: Cell) -> Estimate | None:
        """The paired difference; None for the baseline itself, or without pairs."""
        return cell.versus.difference if cell.versus else None


class ExactP(Column):
    """p of the exact test, with n, where n could have shown anything."""

    def text(self, cell: Cell) -> str:
        """Such as 0.031; a dash for the baseline."""
        p = cell.versus.p_holm if cell.versus else None
        return DASH if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"

    def estimate(self, cell: Cell) -> Estimate | None:
        """The p itself, to sort by."""
        p = cell.versus.p_holm if cell.versus else None
        return None if p is None else Estimate(p, None, 1)


class WithHeads(Column):
    """Accuracy with the heads of training; nothing where they end at weight 0."""

    def estimate(self, cell: Cell) -> Estimate | None:
        """None where the heads change nothing."""
        e, plain = (cell.estimates.get(k) for k in (self.name, "test_acc"))
        return None if e is None or plain is None or e.mean == plain.mean else e


class Capacity(Column):
    """What fits into a memory; at least that, where the search ended at a limit of its own."""

    def text(self, cell: Cell) -> str:
        """Such as 8, or ≥ 8 where 8 was the most that was tried."""
        found = self.write(self.estimate(cell))
        bounds = str(cell.conditions.get("capacity_bound", "")).split(", ")
        return f"≥ {found}" if self.name.removeprefix("largest_") in bounds else found


def _mib(e: Estimate | None) -> str:
    return number(e, 1, 2**-20)


def _fixed(digits: int, scale: float = 1.0) -> Callable[[Estimate | None], str]:
    return lambda e: number(e, digits, scale)


def core(baseline: str) -> list[Column]:
    """Always shown where accuracy was measured."""
    return [
        Column("test_acc", "last", lambda e: percent(e, n=True), 1, "accuracy, last epoch, %"),
        Column("test_acc_best_val", "best val", percent, 1, "accuracy at the best validation, %"),
        Column("test_acc_best_test", "best test", percent, 1, "best epoch on test, %: optimistic"),
        Difference(
            "test_acc_vs_baseline", f"Δ last vs {baseline}", lambda e: percent(e, sign=True), 1,
            "paired difference to the baseline, points",
        ),
        *COSTS,
    ]  # fmt: skip


COSTS = [
    Column("spikes_per_sample", "spikes", quantity, -1, "spikes per test sample"),
    Column("firing_rate", "rate", _fixed(3), -1, "spikes per neuron and timestep"),
    Column("sops_per_sample", "SOPs", quantity, -1, "accumulates per test sample"),
    Column("macs_per_sample", "MACs", quantity, -1, "multiply-accumulates per test sample"),
    Column("peak_bytes", "peak MiB", _mib, -1, "peak memory of training steps"),
    Column("saved_bytes", "saved MiB", _fixed(2, 2**-20), -1, "kept for the backward pass"),
    Column("step_ms_p50", "step ms", _fixed(2), -1, "median training step"),
]
# Shown where at least one cell has them.
OPTIONAL: list[Column] = [
    WithHeads("test_acc_with_heads", "last with heads", percent, 1, "with the heads of training"),
    Column("grad_cos_bptt_init", "cos init", _fixed(3), 1, "cosine to BPTT's gradient at first"),
    Column("grad_norm_ratio_init", "norm ratio init", _fixed(3), 0, "norm over BPTT's at first"),
    Column("grad_cos_bptt", "cos", _fixed(3), 1, "cosine to BPTT's gradient, last"),
    Column("grad_norm_ratio", "norm ratio", _fixed(3), 0, "norm over BPTT's, last"),
    Column("energy_ac_mac_nj_per_sample", "AC+MAC nJ", quantity, -1, "energy, compute only"),
    Column("energy_memory_nj_per_sample", "with memory nJ", quantity, -1, "energy with memory"),
    Column("energy_measured_j", "measured J", quantity, -1, "energy by the device's counter"),
    Column("time_to_target_s", "s to target", quantity, -1, "time to the target; a miss is ∞"),
    Capacity("largest_T", "largest T", quantity, 1, "that fits into the memory"),
    Capacity("largest_batch", "largest batch", quantity, 1, "that fits into the memory"),
]
# Shown if asked for by name, by `--columns all`, and in HTML.
MORE: list[Column] = [
    Column("silent_share", "silent %", _fixed(1, 100), -1, "share of neurons that never spike"),
    Column("saturated_share", "saturated %", _fixed(1, 100), -1, "share that always spikes"),
    Column("membrane_updates_per_sample", "membrane updates", quantity, -1, "per test sample"),
    Column("dense_macs_per_sample", "dense MACs", quantity, 0, "of the same layers, not sparse"),
    Column("train_s", "train s", _fixed(2), -1, "all training epochs"),
    Column("images_per_s", "images/s", quantity, 1, "training throughput"),
    Column("step_ms_p25", "step ms p25", _fixed(2), -1, "first quartile"),
    Column("step_ms_p75", "step ms p75", _fixed(2), -1, "third quartile"),
    Column("data_share", "data %", _fixed(1, 100), 0, "share of a step"),
    Column("forward_share", "forward %", _fixed(1, 100), 0, "share of a step"),
    Column("backward_share", "backward %", _fixed(1, 100), 0, "share of a step"),
    Column("optimizer_share", "optimizer %", _fixed(1, 100), 0, "share of a step"),
    Column("peak_reserved_bytes", "reserved MiB", _mib, -1, "reserved by the allocator"),
    Column("params_bytes", "params MiB", _fixed(2, 2**-20), -1, "parameters"),
    Column("grads_bytes", "grads MiB", _fixed(2, 2**-20), -1, "gradients"),
    Column("optimizer_bytes", "optimizer MiB", _fixed(2, 2**-20), -1, "state of the optimizer"),
    Column("activations_bytes", "activations MiB", _fixed(2, 2**-20), -1, "activations"),
    Column("peak_nvml_bytes", "NVML MiB", _mib, -1, "used on the device, by NVML"),
    Column("energy_to_target_j", "J to target", quantity, -1, "a miss is ∞"),
    Column("epochs_to_target", "epochs to target", quantity, -1, "a miss is ∞"),
    Column("spikes_to_target", "spikes to target", quantity, -1, "a miss is ∞"),
    Column("params_train", "params trained", quantity, -1, "parameters while training"),
    Column("params_infer", "params", quantity, -1, "parameters at evaluation"),
    Column("epochs", "epochs", quantity, 0, "epochs trained"),
]
EXACT_P = ExactP("p_holm", "p", percent, -1, "exact sign-flip test, Holm-corrected over methods")


def catalogue(baseline: str, measured: Iterable[str]) -> list[Column]:
    """Every column there is, and one for each further figure that was measured."""
    known = [*core(baseline), EXACT_P, *OPTIONAL, *MORE]
    names = {c.name for c in known}
    return [*known, *(Column(m, m, quantity) for m in dict.fromkeys(measured) if m not in names)]


def chosen(
    wanted: Sequence[str], columns: Sequence[Column], option: str = "--columns"
) -> list[Column]:
    """The columns of these names or headings, in the order asked for; raises UsageError."""
    by_name = {key: c for c in reversed(columns) for key in (c.name, c.heading)}
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        close = did_you_mean(unknown[0], [c.name for c in columns])
        raise UsageError(f"{option} {unknown[0]}: no such column{close}")
    return list(dict.fromkeys(by_name[name] for name in wanted))
