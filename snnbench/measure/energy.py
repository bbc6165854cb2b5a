"""Energy: two models side by side, and what a counter of the machine measures.

A model multiplies operations of a hypothetical 45 nm chip, 32-bit words, by Horowitz's figures
(ISSCC 2014, figure 1.1.9).  It says nothing of the machine that ran the network:

    compute only    0.9 pJ for an addition (SOP), 4.6 pJ for a multiply-accumulate (MAC); the
                    choice of most papers, and the most flattering to spikes
    with memory     compute, and the SRAM traffic of Lemaire et al. (ICONIP 2022, section 3),
                    each layer with memories of its own:
                    a SOP reads a weight, reads and writes a membrane potential
                    a MAC reads a weight and an input
                    a membrane update reads and writes a potential (leak, threshold, reset)
                    a layer without spiking neurons writes each of its outputs once

Instruction fetch, data movement between chips and idle power are in neither.

The measured figure is the whole GPU or CPU package while it trains, idle power included.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from snnbench.measure.nvml import Gpu
from snnbench.training import group

PJ_ADD, PJ_MAC = 0.9, 4.6
# Bytes of an SRAM -> pJ for one 32-bit word, half of Horowitz's 64-bit access.
SRAM_PJ = ((8 * 2**10, 5.0), (32 * 2**10, 10.0), (2**20, 50.0))
WORD = 4
RAPL = Path("/sys/class/powercap")
# A counter that moves every so many seconds is trusted over windows of 20 times that.
NVML_PERIOD_S, RAPL_PERIOD_S, PERIODS = 0.1, 0.001, 20


def modelled(totals: Mapping[str, Any]) -> dict[str, Any]:
    """Energy per sample in nJ by both models, and its parts, from the totals of a `Meter`."""
    compute = potentials = weights = inputs = outputs = 0.0
    for layer in totals["layers"]:
        sops, macs = layer["sops_per_sample"], layer["macs_per_sample"]
        updates = layer["membrane_updates_per_sample"]
        compute += sops * PJ_ADD + macs * PJ_MAC
        weights += (sops + macs) * access_pj(WORD * layer["weights"])
        inputs += macs * access_pj(WORD * layer["inputs"])
        potentials += 2 * (sops + updates) * access_pj(WORD * layer["outputs"])
        outputs += 0.0 if updates else layer["outputs"] * access_pj(WORD * layer["outputs"])
    parts = {
        "compute": compute / 1e3,
        "weights": weights / 1e3,
        "inputs": inputs / 1e3,
        "potentials": potentials / 1e3,
        "outputs": outputs / 1e3,
    }
    return {
        "energy_ac_mac_nj_per_sample": parts["compute"],
        "energy_memory_nj_per_sample": sum(parts.values()),
        "energy_parts_nj_per_sample": parts,
    }


def access_pj(size: int) -> float:
    """pJ to read or write a 32-bit word of an SRAM of so many bytes: linear between the figures.

    A smaller memory costs what 8 KiB cost; a larger one is made of banks of 1 MiB.
    """
    (low, low_pj), *rest = SRAM_PJ
    if size <= low:
        return low_pj
    for high, high_pj in rest:
        if size <= high:
            return low_pj + (high_pj - low_pj) * (size - low) / (high - low)
        low, low_pj = high, high_pj
    return low_pj


class Joules:
    """The energy counter of the device that trains; `why` says why there is none."""

    def __init__(self, device: torch.device, rapl: Path = RAPL, why: str = "") -> None:
        self.why: str | None = why or None
        self.joules = 0.0
        self._began: tuple[float, list[int]] | None = None
        self.windows, self.length_s = 0, 0.0
        if self.why is not None:
            return
        if device.type == "cuda" and group.size() > 1:
            self.why = "the energy of several GPUs is not added up"
            return
        try:
            self._read, self._ranges, self._per_joule, self._period = (
                _nvml(device) if device.type == "cuda" else _rapl(rapl)
            )
        except RuntimeError as error:
            self.why = str(error)

    def start(self) -> None:
        """Begin a window."""
        if self.why is None:
            before = self._now()
            self._began = None if before is None else (time.perf_counter(), before)

    def stop(self) -> float | None:
        """End it: its joules, or None."""
        if self.why is not None or self._began is None:
            return None
        began, before = self._began
        after = self._now()
        if after is None:
            return None
        spent = sum(
            (now - then) % (most + 1) if most else now - then
            for now, then, most in zip(after, before, self._ranges, strict=True)
        )
        self.windows += 1
        self.length_s += time.perf_counter() - began
        self._began = None
        joules: float = spent / self._per_joule
        self.joules += joules
        return joules

    def _now(self) -> list[int] | None:
        """The counters; from the first time on that they cannot be read there are none."""
        try:
            found: list[int] = self._read()
        except (RuntimeError, OSError, ValueError) as error:
            self.why = f"the energy counter could not be read any more: {error}"
            return None
        return found

    @property
    def doubt(self) -> str | None:
        """Why the sum of the windows is not to be believed, or None."""
        if self.why is not None:
            return self.why
        if not self.windows:
            return "no training step was measured"
        # Each window begins and ends somewhere within a period: what that costs averages out.
        if (mean_s := self.length_s / self.windows) < PERIODS * self._period:
            return (
                f"windows of {mean_s:.2g} s are too short for a counter that moves every "
                f"{self._period:g} s"
            )
        return None

    def resume(self, windows: int, length_s: float, why: str | None) -> None:
        """Go on from what an earlier process measured of the same run."""
        self.windows, self.length_s, self.why = windows, length_s, self.why or why


def _nvml(device: torch.device) -> Any:
    """Counter of one GPU, in mJ."""
    gpu = Gpu(device)
    gpu.energy_mj()

    def read() -> list[int]:
        torch.cuda.synchronize(device)
        return [gpu.energy_mj()]

    return read, [0], 1e3, NVML_PERIOD_S


def _rapl(folder: Path) -> Any:
    """Counters of all CPU packages, in microjoules; they start again at 0 after their range.

    Other zones are parts of a package, or the whole platform with the packages in it.
    """
    try:
        zones = [
            zone
            for zone in sorted(folder.glob("intel-rapl:*"))
            if (zone / "name").read_text().startswith("package")
        ]
        files = [zone / "energy_uj" for zone in zones]
        ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        for file in files:
            file.read_text()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RuntimeError(f"the RAPL energy counter cannot be read: {why}") from error
    if not zones:
        raise RuntimeError("this machine offers no RAPL energy counter")
    return lambda: [int(file.read_text()) for file in files], ranges, 1e6, RAPL_PERIOD_S
