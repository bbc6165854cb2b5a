"""VGG networks of conv3x3-BN-LIF layers with average pooling, for 32x32 images.

Configurations as in the rate-based paper's code: the convolutions have biases, convolution and
linear weights start as N(0, 0.5^2) and biases at 0, and the read-out sees the global average.
Source: Yu et al. 2024, arXiv 2410.11488, appendix; github.com/Tab-ct/rate-based-backpropagation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Gt
from torch import Tensor, nn

from snnbench.models.layer import Layer, Network, Run
from snnbench.neurons import LIF

A = "A"  # average pooling 2x2, ends a stage


class VGG(Network):
    """Plan of widths, with A for average pooling."""

    @dataclass(frozen=True)
    class Config:
        """`width` scales all channels; `init` "normal" is the paper's code, "default" torch's."""

        width: Annotated[float, Gt(0)] = 1.0
        init: Literal["normal", "default"] = "normal"

    source = "Simonyan & Zisserman 2015; widths of Yu et al. 2024, arXiv 2410.11488"
    plan: ClassVar[tuple[int | str, ...]]

    def __init__(self, config: Any, shape: tuple[int, ...], classes: int, neuron: LIF) -> None:
        super().__init__(config, shape, classes, neuron)
        self.features = nn.ModuleList()
        self._taps: list[tuple[Layer, int]] = []
        channels, pool = shape[0], False
        for item in self.plan:
            if item == A:
                self._taps.append((self.features[-1], channels))  # type: ignore[arg-type]
                pool = True
                continue
            out = max(1, round(int(item) * config.width))
            self.features.append(
                Layer(
                    nn.Sequential(
                        *([nn.AvgPool2d(2)] if pool else []),
                        nn.Conv2d(channels, out, 3, padding=1),
                        nn.BatchNorm2d(out),
                    ),
                    neuron=neuron,
                )
            )
            channels, pool = out, False
        self.readout = Layer(
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)),
            neuron=None,
        )
        if config.init == "normal":
            for m in self.modules():
                if isinstance(m, nn.Conv2d | nn.Linear):
                    nn.init.normal_(m.weight, std=0.5)
                    nn.init.zeros_(m.bias)  # type: ignore[arg-type]

    def forward(self, x_TB: Tensor, run: Run = Layer.__call__) -> Tensor:
        """Logits of every timestep, [T, B, K]."""
        for layer in self.features:
            x_TB = run(layer, x_TB)
        return run(self.readout, x_TB)

    def taps(self) -> list[tuple[Layer, int]]:
        """The last layer before each pooling."""
        return self._taps


class VGG11(VGG):
    """Eight convolutions and a linear read-out; 11.0 M parameters."""

    plan = (64, A, 128, 256, A, 512, 512, A, 512, A, 512, 512)
