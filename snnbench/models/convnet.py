"""A small convolutional network for 8x8 and 28x28 images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor, nn

from snnbench.models.layer import Layer, Network, Run
from snnbench.neurons import LIF


class ConvNet(Network):
    """conv3x3-BN-LIF, average pool, conv3x3-BN-LIF, average pool, linear read-out."""

    @dataclass(frozen=True)
    class Config:
        """`width` channels in the first layer, twice as many in the second."""

        width: Annotated[int, Ge(1)] = 16

    source = "a small network for laptops and continuous integration"

    def __init__(self, config: Any, shape: tuple[int, ...], classes: int, neuron: LIF) -> None:
        super().__init__(config, shape, classes, neuron)
        channels, height, width = shape
        w = config.width
        self.conv1 = Layer(
            nn.Sequential(nn.Conv2d(channels, w, 3, padding=1, bias=False), nn.BatchNorm2d(w)),
            neuron=neuron,
        )
        self.conv2 = Layer(
            nn.Sequential(
                nn.AvgPool2d(2),
                nn.Conv2d(w, 2 * w, 3, padding=1, bias=False),
                nn.BatchNorm2d(2 * w),
            ),
            neuron=neuron,
        )
        features = 2 * w * (height // 4) * (width // 4)
        self.readout = Layer(
            nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(features, classes)),
            neuron=None,
        )

    def forward(self, x_TB: Tensor, run: Run = Layer.__call__) -> Tensor:
        """Logits of every timestep, [T, B, K]."""
        return run(self.readout, run(self.conv2, run(self.conv1, x_TB)))

    def taps(self) -> list[tuple[Layer, int]]:
        """The first convolution."""
        return [(self.conv1, self.config.width)]
