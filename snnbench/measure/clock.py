"""Step times: CUDA events on a GPU, the monotonic clock on a CPU.

A step is timed as a whole and in parts, without making the device wait for the host:

    data         fetching and augmenting the batch, encoding it over time
    forward      inside the network's forward pass
    backward     the rest of the method: loss, gradients
    optimizer    clipping and the update

A step's time is all but the fetching, which another process may do meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from snnbench.measure.nvml import Gpu, NoNvml

PARTS = ("data", "forward", "backward", "optimizer")
SPREAD = 0.2  # (third - first quartile) / median above which a median says little


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stretches:
    """Lengths of time on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        """Now, as the device sees it."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, begin: Any) -> None:
        """One stretch, from that mark to now."""
        self._marks.append((begin, self.mark()))

    def drain_ms(self) -> list[float]:
        """Milliseconds of every stretch since the last call."""
        synchronize(self._device)
        marks, self._marks = self._marks, []
        if self._device.type != "cuda":
            return [1e3 * (end - begin) for begin, end in marks]
        return [begin.elapsed_time(end) for begin, end in marks]


class StepClock:
    """Times steps and their parts."""

    def __init__(self, device: torch.device) -> None:
        self._steps = Stretches(device)
        self._parts = {part: Stretches(device) for part in PARTS}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time what is inside as one step."""
        begin = self._steps.mark()
        yield
        self._steps.add(begin)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is inside as a part; the forward pass is taken out of `backward`."""
        begin = self._parts[name].mark()
        yield
        self._parts[name].add(begin)

    @contextmanager
    def watching(self, net: nn.Module) -> Iterator[None]:
        """Time every forward pass of the network inside."""
        began: list[Any] = []
        forward = self._parts["forward"]
        hooks = [
            net.register_forward_pre_hook(lambda *_: began.append(forward.mark())),
            net.register_forward_hook(lambda *_: forward.add(began.pop())),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def drain_ms(self) -> list[float]:
        """Milliseconds of every step since the last call."""
        return self._steps.drain_ms()

    def drain_parts_ms(self) -> dict[str, float]:
        """Milliseconds of every part since the last call, summed over the steps."""
        sums = {part: sum(times.drain_ms()) for part, times in self._parts.items()}
        sums["backward"] -= sums["forward"]
        return sums


def quartiles(times_ms: list[float]) -> dict[str, float]:
    """Median and quartiles of step times."""
    low, median, high = np.percentile(times_ms, [25, 50, 75])
    return {"step_ms_p50": float(median), "step_ms_p25": float(low), "step_ms_p75": float(high)}


def timing_warning(times: dict[str, float], device: torch.device) -> str | None:
    """Why these step times are not to be relied on, or None."""
    why = []
    spread = (times["step_ms_p75"] - times["step_ms_p25"]) / times["step_ms_p50"]
    if spread > SPREAD:
        why.append(f"step times spread by {spread:.0%} of their median (quartiles)")
    if device.type == "cuda":
        with contextlib.suppress(NoNvml):
            if others := Gpu(device).others():
                why.append(f"{len(others)} other processes compute on this GPU")
    else:
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        if load > cores + 1:
            why.append(f"a load of {load:.1f} on {cores} cores: other processes were busy")
    return "; ".join(why) or None
