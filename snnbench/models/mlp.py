"""A multilayer perceptron of spiking layers, without normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import Tensor, nn

from snnbench.models.layer import Layer, Network, Run
from snnbench.neurons import LIF, ReLU


class MLP(Network):
    """Fully connected layers of equal width; sees the sample as one vector."""

    @dataclass(frozen=True)
    class Config:
        """`hidden` neurons in each of `depth` layers."""

        hidden: Annotated[int, Ge(1)] = 128
        depth: Annotated[int, Ge(1)] = 2

    source = "the textbook network; for tests and small studies"

    def __init__(
        self, config: Any, shape: tuple[int, ...], classes: int, neuron: LIF | ReLU
    ) -> None:
        super().__init__(config, shape, classes, neuron)
        sizes = [prod(shape)] + [config.hidden] * config.depth
        self._hidden = [
            Layer(nn.Sequential(nn.Flatten(), nn.Linear(i, o)), neuron=neuron)
            for i, o in pairwise(sizes)
        ]
        self.hidden = nn.ModuleList(self._hidden)
        self.readout = Layer(nn.Linear(config.hidden, classes), neuron=None)

    def forward(self, x_TB: Tensor, run: Run = Layer.__call__) -> Tensor:
        """Logits of every timestep, [T, B, K]."""
        for layer in self.hidden:
            x_TB = run(layer, x_TB)
        return run(self.readout, x_TB)

    def taps(self, each: Literal["stage", "block"] = "stage") -> list[tuple[Layer, int]]:
        """Every hidden layer but the last."""
        return [(layer, self.config.hidden) for layer in self._hidden[:-1]]
