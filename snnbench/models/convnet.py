"""A small convolutional network for 8x8 and 28x28 images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import Tensor, nn

from snnbench.models.layer import Layer, Network, Run
from snnbench.neurons import LIF, ReLU


class ConvNet(Network):
    """conv3x3-BN-LIF, strided conv3x3-BN-LIF, linear read-out: small, for 8x8 and 28x28 images."""

    @dataclass(frozen=True)
    class Config:
        """`width` channels in the first layer, twice as many in the second."""

        width: Annotated[int, Ge(1)] = 16

    source = "a small network for laptops and continuous integration"

    def __init__(
        self, config: Any, shape: tuple[int, ...], classes: int, neuron: LIF | ReLU
    ) -> None:
        super().__init__(config, shape, classes, neuron)
        channels, height, width = shape
        w = config.width
        self.conv1 = Layer(_conv_bn(channels, w, stride=1), neuron=neuron)
        self.conv2 = Layer(_conv_bn(w, 2 * w, stride=2), neuron=neuron)
        features = 2 * w * ((height + 1) // 2) * ((width + 1) // 2)
        self.readout = Layer(nn.Sequential(nn.Flatten(), nn.Linear(features, classes)), neuron=None)

    def forward(self, x_TB: Tensor, run: Run = Layer.__call__) -> Tensor:
        """Logits of every timestep, [T, B, K]."""
        return run(self.readout, run(self.conv2, run(self.conv1, x_TB)))

    def taps(self, each: Literal["stage", "block"] = "stage") -> list[tuple[Layer, int]]:
        """The first convolution."""
        return [(self.conv1, self.config.width)]


def _conv_bn(channels: int, out: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))
