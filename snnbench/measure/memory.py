"""Memory of a training step: saved-for-backward bytes, and the peak of the device or process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor


def saved_bytes(step: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Most bytes that autograd keeps for backward at one time during `step`.

    Each storage counts once. Storages of `known` tensors (parameters, buffers, the input batch)
    exist anyway and do not count. The figure is deterministic: no allocator, no clock.
    """
    ours = {t.untyped_storage().data_ptr() for t in known}
    held: dict[int, int] = {}  # storage -> how many saved tensors refer to it
    live = peak = 0

    class Saved:
        """A saved tensor; its end is the end of autograd's interest in it."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal live, peak
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.key = 0 if storage.data_ptr() in ours else storage.data_ptr()
            if self.key:
                held[self.key] = held.get(self.key, 0) + 1
                live += storage.nbytes() if held[self.key] == 1 else 0
                peak = max(peak, live)

        def __del__(self) -> None:
            nonlocal live
            if self.key:
                held[self.key] -= 1
                live -= self.tensor.untyped_storage().nbytes() if held[self.key] == 0 else 0

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
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


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Peak since `reset_peak`: allocated and reserved on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    status = Path("/proc/self/status").read_text()
    line = next(ln for ln in status.splitlines() if ln.startswith("VmHWM:"))
    return {"peak_bytes": int(line.split()[1]) * 1024}
