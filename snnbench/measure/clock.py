"""Step times: CUDA events on a GPU, the monotonic clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepClock:
    """Times steps without making the device wait for the host between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times_ms: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time what is inside."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._times_ms.append(1e3 * (time.perf_counter() - began))

    def drain_ms(self) -> list[float]:
        """Milliseconds of every step since the last call."""
        if self._events:
            synchronize(self._device)
            self._times_ms += [begin.elapsed_time(end) for begin, end in self._events]
            self._events = []
        times, self._times_ms = self._times_ms, []
        return times
