"""A contestant's own process: it builds, steps, compares and measures on request.

Requests are lines of JSON on stdin, answers are lines of JSON on stdout, with one key: `answer`,
`absent` where the contestant cannot be had here, or `error`; the latter two hold a reason.
Whatever libraries print goes to stderr.  The process ends with stdin.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from snnbench import machine
from snnbench.errors import DivergedError, UsageError, WorkerError
from snnbench.measure.clock import StepClock, synchronize
from snnbench.measure.memory import give_back_freed_memory, peak_bytes, reset_peak
from snnbench.peers import alone, contestants
from snnbench.peers.contestants import Entry, Setup
from snnbench.training.allocator import keep_freed_memory

BATCHES = 4  # different ones, in turn
PEAK_STEPS = 3


class Session:
    """One contestant and what is asked of it; every public method is a request."""

    def build(
        self, entry: dict[str, Any], setup: dict[str, Any], keep_memory: bool
    ) -> dict[str, Any]:
        """Build the contestant; what it is, and where."""
        if keep_memory and (done := keep_freed_memory()).startswith("unchanged"):
            raise WorkerError(f"the memory allocator cannot be set here: {done}")
        self.entry = Entry(**entry)
        self.setup = Setup(**setup | {"shape": tuple(setup["shape"])})
        self.device = torch.device(self.setup.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise WorkerError("no CUDA device is available here")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device.index or 0)  # events are those of the current device
        torch.backends.cudnn.benchmark = True
        # Imports are no part of the warm-up; torch does one when the first optimizer is made.
        importlib.import_module("torch._dynamo")
        contestants.load(self.entry)
        self.parts: Any = alone if self.setup.model in alone.LAYERS else contestants
        began = time.perf_counter()
        self.contestant = self.parts.build(self.entry, self.setup)
        synchronize(self.device)
        self.setup_s = time.perf_counter() - began
        laid_out = self.contestant.laid_out
        batches = self.parts.batches(self.setup, BATCHES, self.setup.B)
        both = self.parts is alone  # its second part is an array as well
        self.batches = [(laid_out(x), laid_out(y) if both else y) for x, y in batches]
        del batches
        self.steps_done = 0
        self.base_bytes = self._bytes_now()
        own = self.entry.family in (*contestants.OURS, "floor")
        return {
            "version": "" if own else version(self.entry.family),
            "machine": machine.describe(self.device),
        }

    def warm_up(self) -> dict[str, Any]:
        """The first step, with whatever is compiled or loaded for it; seconds with the building."""
        began = time.perf_counter()
        self.contestant.step(*self.batches[0])
        synchronize(self.device)
        warmup_s = self.setup_s + time.perf_counter() - began
        give_back_freed_memory(self.device)  # others warm up beside it
        return {"warmup_s": warmup_s}

    def steps(self, n: int) -> dict[str, Any]:
        """Milliseconds of each of n training steps, and seconds of CPU time of all that was done.

        One step before them is not timed: a contestant that waits for its turn holds no freed
        memory, or all of them together would need more than the machine has.
        """
        clock, cpu = StepClock(self.device), time.process_time()
        if self.parts is alone:
            self.contestant.step(*self.batches[0])
            step_ms = self.contestant.time_ms(self.batches)
            give_back_freed_memory(self.device)
            return {"step_ms": [step_ms], "cpu_s": time.process_time() - cpu}
        for i in range(n + 1):
            x_B, y_B = self.batches[self.steps_done % BATCHES]
            with clock.step() if i else nullcontext():
                loss = self.contestant.step(x_B, y_B)
            self.steps_done += 1
        step_ms = clock.drain_ms()
        give_back_freed_memory(self.device)
        if not math.isfinite(loss.item()):
            raise DivergedError(f"the loss became {loss.item()} after {self.steps_done} steps")
        return {"step_ms": step_ms, "cpu_s": time.process_time() - cpu}

    def parity(self) -> dict[str, Any] | None:
        """How spikes and gradients compare with our reference; None for a floor."""
        found = self.parts.parity(self.entry, self.setup)
        give_back_freed_memory(self.device)
        return None if found is None else asdict(found)

    def measure(self) -> dict[str, Any]:
        """Memory and operations of a step, each in a pass of its own."""
        x_B, y_B = self.batches[0]
        # A recording uses memory that the allocator does not count again.
        why_not = "recorded" if self.entry.graph else reset_peak(self.device)
        for _ in range(PEAK_STEPS):
            self.contestant.step(x_B, y_B)
        peak = None if why_not else peak_bytes(self.device)["peak_bytes"] - self.base_bytes
        saved = self.contestant.saved_bytes(x_B, y_B)
        neuron_steps = self.parts.neurons(self.setup) * self.setup.B * self.contestant.T
        give_back_freed_memory(self.device)
        return {
            "peak_bytes": peak,
            "saved_bytes": saved,
            "saved_per_neuron_step": saved / neuron_steps,
            "aten_ops": None
            if self.device.type == "cuda"
            else aten_operations(lambda: self.contestant.step(x_B, y_B)),
            "kernel_path": self.contestant.path(),
        }

    def _bytes_now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        try:
            pages = Path("/proc/self/statm").read_text().split()[1]
        except OSError:
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def aten_operations(step: Callable[[], object]) -> int:
    """Operations of torch that a step calls, those called by others included."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    return sum(event.count for event in seen.key_averages() if event.key.startswith("aten::"))


def main() -> None:
    """Answer requests until stdin ends; in the middle of one, until the parent is gone (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    session = Session()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": getattr(session, request.pop("do"))(**request)}
        except (UsageError, WorkerError) as error:
            answer = {"absent": str(error)}
        except DivergedError as error:
            answer = {"error": str(error)}
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
