"""What autograd keeps of a layer until the backward pass: the `memory` axis.

    speed      the synapse's output y and the spikes, as they are (default)
    balanced   y as it is, spikes as bits: eight to a byte
    smallest   spikes as bits; y is computed from them once more in the backward pass

Gradients are the same to the last bit.  A method that goes its own way through the weights, as
gradient scaling does, keeps y at `smallest` too.  Other tensors (images, pooled spikes, sums of
spikes) are kept as they are.  The levels are a pair of hooks on saved tensors, so they work for
every method and kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Level: TypeAlias = Literal["speed", "balanced", "smallest"]


@dataclass(frozen=True)
class Bits:
    """Spikes as bits, and the layout that they had."""

    bits: Tensor
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """What is really held."""
        return [self.bits]

    def restored(self) -> Tensor:
        """The spikes as they were saved."""
        flat = unpack(self.bits, self.size.numel(), self.dtype)
        return flat.as_strided(self.size, self.stride)


@dataclass(frozen=True)
class Recipe:
    """How to compute a tensor again from what is kept of its input."""

    compute: Callable[[Tensor], Tensor]
    of: Any
    autocast: tuple[str, torch.dtype, bool]
    size: torch.Size
    stride: tuple[int, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """What is really held."""
        return self.of.tensors if hasattr(self.of, "tensors") else [self.of]

    def restored(self) -> Tensor:
        """The tensor, computed as the first time."""
        x = self.of.restored() if hasattr(self.of, "restored") else self.of
        device, dtype, enabled = self.autocast
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            return self.compute(x).as_strided(self.size, self.stride)


class Keeper:
    """Hooks on saved tensors that replace those it was told of by something smaller."""

    def __init__(self, level: Level) -> None:
        self.level = level
        # By address, for as long as the tensor lives: an address of its own cannot be another's.
        self._spikes: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._outputs: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._known_bits, self._recipes = WeakIdKeyDictionary(), WeakIdKeyDictionary()

    def __deepcopy__(self, memo: Any) -> Keeper:
        return self

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context in which a method's backward runs."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def spikes(self, s_TB: Tensor) -> None:
        """Tell of a tensor that holds only zeros and ones."""
        self._spikes[s_TB.data_ptr()] = s_TB

    def output(self, y_TB: Tensor, compute: Callable[[Tensor], Tensor], x_TB: Tensor) -> None:
        """Tell that y_TB = compute(x_TB), without further effects."""
        if self.level == "smallest" and y_TB.data_ptr() != x_TB.data_ptr():
            self._recipes[y_TB] = compute, self.pack(x_TB.detach())
            self._outputs[y_TB.data_ptr()] = y_TB

    def pack(self, tensor: Tensor) -> Any:
        """What autograd shall keep of a tensor."""
        address = tensor.data_ptr()
        whole = self._spikes.get(address)
        if whole is not None and same_memory(whole, tensor):
            return self._bits(whole, tensor)
        output = self._outputs.get(address)
        if output is not None and same_memory(output, tensor):
            device = tensor.device.type
            autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
            compute, of = self._recipes[output]
            return Recipe(compute, of, autocast, tensor.shape, tensor.stride())
        return tensor

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        """The tensor that autograd saved."""
        restored: Tensor = kept if isinstance(kept, Tensor) else kept.restored()
        return restored

    def _bits(self, whole: Tensor, tensor: Tensor) -> Bits:
        """Both users of one spike train share its bits."""
        bits = self._known_bits.get(whole)
        if bits is None:
            bits = pack(whole.detach().as_strided((whole.numel(),), (1,)))
            self._known_bits[whole] = bits
        return Bits(bits, whole.dtype, tensor.shape, tensor.stride())


def same_memory(whole: Tensor, part: Tensor) -> bool:
    """Whether two dense tensors of one address cover the same memory."""
    return whole.numel() == part.numel() == dense(whole) == dense(part)


def dense(tensor: Tensor) -> int:
    """Number of places between the first and the last element, both included."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def pack(flat: Tensor) -> Tensor:
    """Zeros and ones as bits, eight to a byte, lowest first."""
    rows = torch.nn.functional.pad(flat != 0, (0, -len(flat) % 8)).view(-1, 8)
    shifted = rows.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=flat.device)
    return shifted.sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The first `count` zeros and ones of `bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)  # made there: nothing waits
    rows = bits[:, None] >> shifts & 1
    return rows.flatten()[:count].to(dtype)
