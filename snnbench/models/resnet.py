"""ResNets of post-activation basic blocks whose residuals join as currents, for 32x32 images.

Block: s = LIF(BN(conv(LIF(BN(conv(x))))) + shortcut(x)), the shortcut being x itself or a
1x1 convolution with BN where the shape changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Gt
from torch import Tensor, nn

from snnbench.models.layer import Layer, Network, Run
from snnbench.neurons import LIF


class Block(nn.Module):
    """Two layers; the second is fed by the first and by the block's input."""

    def __init__(self, channels: int, out: int, stride: int, neuron: LIF) -> None:
        super().__init__()
        self.first = Layer(conv_bn(channels, out, 3, stride), neuron=neuron)
        same = channels == out and stride == 1
        shortcut = nn.Identity() if same else conv_bn(channels, out, 1, stride)
        self.second = Layer(conv_bn(out, out, 3, 1), shortcut, neuron=neuron)

    def forward(self, x_TB: Tensor, run: Run = Layer.__call__) -> Tensor:
        """Spikes of the block."""
        return run(self.second, run(self.first, x_TB), x_TB)


def conv_bn(channels: int, out: int, kernel: int, stride: int) -> nn.Sequential:
    """A convolution without bias and its normalisation."""
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class ResNet(Network):
    """Stem, stages of blocks, global average pooling, linear read-out."""

    @dataclass(frozen=True)
    class Config:
        """`width` scales all channels."""

        width: Annotated[float, Gt(0)] = 1.0

    source = "He et al. 2016; spiking as in Yu et al. 2024, arXiv 2410.11488"
    widths: ClassVar[tuple[int, ...]] = (64, 128, 256, 512)
    depths: ClassVar[tuple[int, ...]]

    def __init__(self, config: Any, shape: tuple[int, ...], classes: int, neuron: LIF) -> None:
        super().__init__(config, shape, classes, neuron)
        widths = [max(1, round(w * config.width)) for w in self.widths]
        channels = widths[0]
        self.stem = Layer(conv_bn(shape[0], channels, 3, 1), neuron=neuron)
        self.stages = nn.ModuleList()
        for i, (out, depth) in enumerate(zip(widths, self.depths, strict=True)):
            strides = [1 if i == 0 else 2] + [1] * (depth - 1)
            blocks = []
            for stride in strides:
                blocks.append(Block(channels, out, stride, neuron))
                channels = out
            self.stages.append(nn.ModuleList(blocks))
        self._widths = widths
        self.readout = Layer(
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)),
            neuron=None,
        )

    def forward(self, x_TB: Tensor, run: Run = Layer.__call__) -> Tensor:
        """Logits of every timestep, [T, B, K]."""
        x_TB = run(self.stem, x_TB)
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x_TB = block(x_TB, run)
        return run(self.readout, x_TB)

    def taps(self) -> list[tuple[Layer, int]]:
        """The last layer of each stage but the last."""
        last = [stage[-1].second for stage in self.stages]  # type: ignore[index]
        return list(zip(last, self._widths, strict=True))[:-1]


class ResNet18(ResNet):
    """Eight blocks of two convolutions, widths 64 to 512; 11.2 M parameters."""

    depths = (2, 2, 2, 2)
