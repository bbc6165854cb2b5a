"""How Triton code is told of a neuron, laid out in tiles, and launched.

Kernels work on arrays [M, C], rows and channels, in tiles; see `triton`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snnbench.neurons import LIF, ATan, Rectangle, Sigmoid, Tanh, Triangle

Given = Tensor | None

CHANNELS = 64  # of a tile, at most
CELLS = 8192  # that a program without timesteps works on, tile by tile


class Pick(NamedTuple):
    """How a program is laid out: cells of one thread, warps."""

    cells: int
    warps: int


PICKS = Pick(8, 4), Pick(16, 4), Pick(8, 8)  # the first until all were timed
LONG = Pick(4, 4)  # backward over many timesteps, whose membranes fill the registers
STREAM = Pick(16, 4)  # no timesteps, only rows


class Tile(NamedTuple):
    """Rows and channels that a program works on at a time, and its warps."""

    BM: int
    BC: int
    warps: int


MERGE = Tile(512, 8, 8)


def tile_of(C: int, pick: Pick) -> Tile:
    """The tile of a pick: a power of two of channels that divides C, if at least 16 do."""
    BC = min(CHANNELS, 1 << (C - 1).bit_length())
    while BC > 16 and C % BC:
        BC //= 2
    return Tile(32 * pick.warps * pick.cells // BC, BC, pick.warps)


def stream(C: int, T: int) -> tuple[Tile, int]:
    """Tile, and tiles of a program, for rows of T timesteps.

    It never depends on M: then a short last batch would compile the code anew.
    """
    tile = tile_of(C, STREAM)
    return tile, T * max(1, CELLS // (tile.BM * tile.BC))


def blocks(n: int, size: int) -> int:
    """How many of this size hold n."""
    return -(-n // size)


def fits(y: Tensor, T: int, *others: Given) -> bool:
    """Whether y is [T or 1, M, C], the others [T, M, C], and all contiguous."""
    whole = (T, *y.shape[1:])
    fits = len(y) in (1, T) and y.is_contiguous()
    return fits and all(x is None or (x.shape == whole and x.is_contiguous()) for x in others)


def launch_tile(
    name: str,
    tile: Tile,
    tensors: Sequence[Given],
    numbers: Sequence[float],
    programs: int | None = None,
    **constants: Any,
) -> None:
    """Run a kernel on rows and channels, the first two of the numbers."""
    rows, C = map(int, numbers[:2])
    programs = programs or blocks(rows, tile.BM * constants.get("STEPS", 1))
    kernel = getattr(code(), name)[programs, blocks(C, tile.BC)]
    device = next(x.device for x in tensors if x is not None)
    with torch.cuda.device(device) if _elsewhere(device) else nullcontext():
        kernel(
            *tensors, *numbers, **constants, BM=tile.BM, BC=tile.BC,
            num_warps=tile.warps, enable_fp_fusion=False,
        )  # fmt: skip


def _elsewhere(device: torch.device) -> bool:
    """Whether it is a CUDA device, but not the current one, which is where Triton launches."""
    return device.type == "cuda" and device.index != torch.cuda.current_device()


def launch_fastest(
    name: str, tensors: Sequence[Given], numbers: Sequence[float], **constants: Any
) -> None:
    """Run a kernel whose results no tile changes, with the fastest for these C and arguments."""
    kinds = (None if x is None else x.dtype for x in tensors)
    key = name, numbers[1], *constants.values(), *kinds

    def launch(pick: Pick) -> None:
        launch_tile(name, tile_of(int(numbers[1]), pick), tensors, numbers, **constants)

    pick = _fastest.get(key)
    if pick is None:
        pick = PICKS[0]
        if _can_time(tensors):
            pick = _fastest[key] = min(PICKS, key=lambda pick: _milliseconds(launch, pick))
    launch(pick)


_fastest: dict[Hashable, Pick] = {}


def _can_time(tensors: Sequence[Given]) -> bool:
    """Whether the kernel runs on a GPU, and now, not when a graph is replayed."""
    on_gpu = any(x is not None and x.is_cuda for x in tensors)
    return on_gpu and not torch.cuda.is_current_stream_capturing()


def _milliseconds(launch: Callable[[Pick], None], pick: Pick) -> float:
    """Time of a few launches, the best of three, after one that compiles."""
    launch(pick)
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            launch(pick)
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return min(times)


@cache
def code() -> ModuleType:
    """The kernels; raises ImportError where Triton is missing."""
    from snnbench.kernels import triton_rows

    return triton_rows


def constants(neuron: LIF) -> tuple[list[bool], str, list[float]]:
    """A neuron without its decay, in plain values: form, surrogate, levels."""
    hard = neuron.reset == "hard"
    form = [hard, neuron.detach_reset, neuron.strict, neuron.decay_input, neuron.learn_decay]
    surrogate, p, q = _surrogate(neuron)
    return form, surrogate, [neuron.v_th, neuron.drop, p, q]


def _surrogate(neuron: LIF) -> tuple[str, float, float]:
    """The surrogate as the Triton code knows it."""
    match neuron.surrogate:
        case Triangle(width=width):
            return "triangle", width, width**-2
        case Rectangle(width=width):
            return "rectangle", width / 2, 1 / width
        case Sigmoid(slope=slope):
            return "logistic", slope, slope
        case Tanh(height=height):  # 1 - tanh(u)^2 = 4 q (1 - q), q = sigmoid(2 u)
            return "logistic", 2.0, 4 * height
        case ATan(slope=slope):
            return "atan", math.pi / 2 * slope, slope / 2
