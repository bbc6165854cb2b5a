"""Memory of a training step: saved-for-backward bytes, and the peak of the device or process.

saved        what autograd keeps for the backward pass: deterministic, the same on any machine
parameters   weights and buffers; gradients and optimizer state by their tensors
activations  the peak of a step over what is allocated between steps: what is saved, gradients
             on their way, workspaces of kernels
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snnbench.measure.nvml import Gpu, NoNvml


def saved_bytes(
    step: Callable[[], object],
    known: Iterable[Tensor],
    pack: Callable[[Tensor], Any] = lambda tensor: tensor,
    unpack: Callable[[Any], Tensor] = lambda kept: kept,
) -> int:
    """Most bytes that autograd keeps for backward at one time during `step`.

    Each storage counts once. Storages of `known` tensors (parameters, buffers, the input batch)
    exist anyway and do not count. The figure is deterministic: no allocator, no clock.
    `pack` says what is kept of a tensor: it, or something with `tensors`; `unpack` gives it back.
    """
    ours = {t.untyped_storage().data_ptr() for t in known}
    held: dict[int, int] = {}  # storage -> how many saved tensors refer to it
    live = peak = 0

    class Saved:
        """A saved tensor; its end is the end of autograd's interest in it."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal live, peak
            self.kept = pack(tensor)
            tensors = [self.kept] if isinstance(self.kept, Tensor) else self.kept.tensors
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
            self.sizes = {key: s.nbytes() for key, s in storages.items() if key not in ours}
            for key, size in self.sizes.items():
                held[key] = held.get(key, 0) + 1
                live += size if held[key] == 1 else 0
            peak = max(peak, live)

        def __del__(self) -> None:
            nonlocal live
            for key, size in self.sizes.items():
                held[key] -= 1
                live -= size if held[key] == 0 else 0

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: unpack(saved.kept)):
        step()
    return peak


def reset_peak(device: torch.device) -> str | None:
    """Start a new peak; says why that cannot be done here, or None."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return None
    except OSError as error:
        return f"the peak resident set cannot be reset on this system: {error.strerror}"


def used_bytes(device: torch.device) -> int:
    """Memory allocated now: of tensors on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the tensors, each storage once."""
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state."""
    values = [v for state in optimizer.state.values() for v in state.values()]
    return tensor_bytes(v for v in values if isinstance(v, Tensor))


def give_back_freed_memory(device: torch.device) -> None:
    """Let the allocator hand freed blocks back: to the driver, or to the system (glibc only)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Peak since `reset_peak`: allocated and reserved on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    return {"peak_bytes": _status("VmHWM")}


def own_gpu_bytes(device: torch.device) -> int | str:
    """Memory that this process holds on the GPU as the driver sees it, or why that is not known."""
    if device.type != "cuda":
        return "no GPU in use"
    try:
        return Gpu(device).own_bytes()
    except NoNvml as error:
        return str(error)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(ln for ln in lines if ln.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
