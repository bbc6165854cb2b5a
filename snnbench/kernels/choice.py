"""Which kernel a run gets: the one it names, or the fastest that works here, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from snnbench.kernels.fused import Kernel
from snnbench.kernels.reference import Reference

# Fastest first; the reference always works.
ORDER = {"cuda": ("triton", "compiled"), "cpu": ("native", "compiled")}


@dataclass(frozen=True)
class Choice:
    """The kernel, its name, and why faster ones were passed over."""

    name: str
    kernel: Reference
    passed_over: tuple[str, ...] = ()


def choose(wanted: str, backends: dict[str, Any], device: torch.device) -> Choice:
    """The kernel for `wanted`: a name, or "auto"; `backends` are the modules by name.

    Raises RuntimeError where a kernel was named and cannot run here.
    """
    if wanted != "auto":
        if wanted != "reference" and (why := backends[wanted].unavailable(device)):
            raise RuntimeError(f"kernel '{wanted}': {why}")
        return _made(wanted, backends)
    passed_over: list[str] = []
    for name in ORDER.get(device.type, ()):
        why = backends[name].unavailable(device)
        if why is None:
            return _made(name, backends, tuple(passed_over))
        passed_over.append(f"{name}: {why}")
    return _made("reference", backends, tuple(passed_over))


def _made(name: str, backends: dict[str, Any], passed_over: tuple[str, ...] = ()) -> Choice:
    kernel = Reference() if name == "reference" else Kernel(name, backends[name])
    return Choice(name, kernel, passed_over)
