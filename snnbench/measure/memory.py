"""Memory of a training step: saved-for-backward bytes, and the peak of the device or process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor


def saved_bytes(step: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for backward during `step`, each storage counted once.

    Storages of `known` tensors (parameters, buffers, the input batch) exist anyway and do not
    count.  The figure is deterministic: it depends on no allocator and no clock.
    """
    ours = {t.untyped_storage().data_ptr() for t in known}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            seen[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(storage.nbytes() for storage in seen.values())


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
