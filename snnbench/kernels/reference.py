"""The reference kernel: torch's BatchNorm and the plain scan of `neurons`, one step after another.

It runs on every device and in every dtype, float64 included, and every other kernel is tested
against it.  T timesteps, B batch; y_TB is [1, B, ...] where all timesteps are the same.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from snnbench.kernels.rates import Current
from snnbench.neurons import LIF, ReLU

source = "plain torch, one autograd node per operation and timestep"


class Reference:
    """How a layer's population is run, unless a faster kernel is put in its place."""

    name = "reference"

    def __init__(self) -> None:
        self.steps: Counter[str] = Counter()  # layer steps done, by who did them

    def __deepcopy__(self, memo: Any) -> Reference:
        return self  # shared by all layers of a network, and by its copies

    def fuses(self, neuron: LIF | ReLU | None, dtype: torch.dtype, T: int) -> bool:
        """Whether this kernel has a layer step of its own for these neurons, dtype and T."""
        return False

    def twin(self, x_TB: Tensor) -> Tensor:
        """An input of several layers, as the second of them gets it."""
        return x_TB

    def average(self, pool: nn.AvgPool2d, x_B: Tensor) -> Tensor:
        """What a pooling makes of its input."""
        out_B: Tensor = pool(x_B)
        return out_B

    def rate_of(self, x_TB: Tensor) -> Tensor:
        """The time-mean of an input."""
        return x_TB.mean(0)

    def linear(self, op: nn.Conv2d | nn.Linear, rate_B: Tensor, dtype: torch.dtype) -> Current:
        """What a map makes of a mean input; of any other input it gave an output of this dtype."""
        return Current(op(rate_B))

    def fire(
        self,
        neuron: LIF | ReLU,
        y_TB: Tensor,
        norm: nn.BatchNorm2d | None,
        rest_TB: Tensor | None,
        T: int,
        rest_norm: nn.BatchNorm2d | None = None,
    ) -> Tensor:
        """Spikes s_TB of a population at rest, fed with the normalised y_TB plus rest_TB.

        `rest_norm` normalises rest_TB before.
        """
        self.steps["reference"] += 1
        c_TB = y_TB.expand(T, *y_TB.shape[1:])
        if norm is not None:
            c_TB = norm(c_TB.flatten(0, 1)).unflatten(0, c_TB.shape[:2])
        if rest_norm is not None and rest_TB is not None:
            rest_TB = rest_norm(rest_TB.flatten(0, 1)).unflatten(0, rest_TB.shape[:2])
        if rest_TB is not None:
            c_TB = c_TB + rest_TB
        return neuron.scan(c_TB)
