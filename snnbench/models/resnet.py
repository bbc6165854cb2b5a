"""Residual networks: one skeleton, and three ways for a block to join its input.

    ResNet  joins currents   s = LIF(f(LIF(f(x))) + g(x))        x, s spikes
    SEW     adds spikes      s = LIF(f(LIF(f(x)))) + LIF(g(x))   x, s sums of spikes
    PreAct  keeps a current  u = f(LIF(f(LIF(x)))) + g(x)        x, u currents, never spiked

f is a convolution with BN.  Where the shape changes g is a 1x1 convolution with BN; elsewhere the
block's input is added as it is, in SEW without LIF.  tdBN scales by alpha * v_th, alpha being
1 / sqrt(2) where two currents are summed and 1 elsewhere.  The stem is a 3x3 convolution
("cifar"), or a 7x7 one of stride 2 and a 3x3 pooling of stride 2 ("imagenet"); where spikes are
pooled, that is a layer of its own, without neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt
from torch import Tensor, nn

from snnbench.kernels.pointwise import Pointwise
from snnbench.models.layer import Layer, Network, Run, TdBatchNorm2d
from snnbench.neurons import LIF, ReLU

Neuron: TypeAlias = LIF | ReLU
ConvBN: TypeAlias = Callable[..., nn.Sequential]  # (channels, out, kernel, stride, joined=False)


def conv_bn(
    channels: int,
    out: int,
    kernel: int,
    stride: int,
    joined: bool = False,
    *,
    bias: bool,
    td: float | None,
) -> nn.Sequential:
    """A convolution and its BN: plain, or tdBN for the threshold `td`."""
    make = Pointwise if kernel == 1 and stride > 1 else nn.Conv2d
    conv = make(channels, out, kernel, stride, padding=kernel // 2, bias=bias)
    if td is None:
        return nn.Sequential(conv, nn.BatchNorm2d(out))
    return nn.Sequential(conv, TdBatchNorm2d(out, td * (0.5**0.5 if joined else 1.0)))


def averaged(features: int, out: int) -> nn.Sequential:
    """Global average pooling and a linear map."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, out))


class Block(nn.Module):
    """Layers between two joins; `width * expansion` channels leave it."""

    expansion: ClassVar[int] = 1

    def __init__(self, f: ConvBN, channels: int, width: int, stride: int, neuron: Neuron) -> None:
        super().__init__()

    def forward(self, x_TB: Tensor, run: Run) -> Tensor:
        """What the block sends to the next one."""
        raise NotImplementedError

    @property
    def tapped(self) -> Layer:
        """The layer whose spikes an auxiliary head may read."""
        raise NotImplementedError


class CurrentBlock(Block):
    """Two layers; the second is fed by the first and by the block's input."""

    def __init__(self, f: ConvBN, channels: int, width: int, stride: int, neuron: Neuron) -> None:
        super().__init__(f, channels, width, stride, neuron)
        same = channels == width and stride == 1
        self.first = Layer(f(channels, width, 3, stride), neuron=neuron)
        g = nn.Identity() if same else f(channels, width, 1, stride, joined=True)
        self.second = Layer(f(width, width, 3, 1, joined=True), g, neuron=neuron)

    def forward(self, x_TB: Tensor, run: Run) -> Tensor:
        """Spikes of the second layer."""
        return run(self.second, run(self.first, x_TB), x_TB)

    @property
    def tapped(self) -> Layer:
        """The second layer: what the block sends."""
        return self.second


class SEWBlock(Block):
    """Layers in a row, whose spikes are added to the block's input."""

    def __init__(self, f: ConvBN, channels: int, width: int, stride: int, neuron: Neuron) -> None:
        super().__init__(f, channels, width, stride, neuron)
        out = width * self.expansion
        same = channels == out and stride == 1
        self._row = [Layer(s, neuron=neuron) for s in self.synapses(f, channels, width, stride)]
        self.row = nn.ModuleList(self._row)
        self.shortcut = None if same else Layer(f(channels, out, 1, stride), neuron=neuron)

    def synapses(self, f: ConvBN, channels: int, width: int, stride: int) -> list[nn.Sequential]:
        """Synapses of the layers in the row."""
        return [f(channels, width, 3, stride), f(width, width, 3, 1)]

    def forward(self, x_TB: Tensor, run: Run) -> Tensor:
        """Sums of spikes."""
        s_TB = x_TB
        for layer in self._row:
            s_TB = run(layer, s_TB)
        return s_TB + (x_TB if self.shortcut is None else run(self.shortcut, x_TB))

    @property
    def tapped(self) -> Layer:
        """The last layer in the row, before the addition: a sum of spikes is no layer."""
        return self._row[-1]


class SEWBottleneck(SEWBlock):
    """Three layers in a row, the last one four times as wide."""

    expansion = 4

    def synapses(self, f: ConvBN, channels: int, width: int, stride: int) -> list[nn.Sequential]:
        """Synapses of the layers in the row."""
        return [f(channels, width, 1, 1), f(width, width, 3, stride), f(width, 4 * width, 1, 1)]


class PreActBlock(Block):
    """Neurons that read a current, a second layer, and what it adds to that current."""

    def __init__(self, f: ConvBN, channels: int, width: int, stride: int, neuron: Neuron) -> None:
        super().__init__(f, channels, width, stride, neuron)
        same = channels == width and stride == 1
        self.first = Layer(nn.Identity(), neuron=neuron)
        self.second = Layer(f(channels, width, 3, stride), neuron=neuron)
        g = nn.Identity() if same else f(channels, width, 1, stride, joined=True)
        self.join = Layer(f(width, width, 3, 1, joined=True), g, neuron=None)

    def forward(self, u_TB: Tensor, run: Run) -> Tensor:
        """The current after the block."""
        return run(self.join, run(self.second, run(self.first, u_TB)), u_TB)

    @property
    def tapped(self) -> Layer:
        """The first layer: the spikes of the current that enters the block."""
        return self.first


class Residual(Network):
    """Stem, stages of blocks, global average pooling, linear read-out."""

    @dataclass(frozen=True)
    class Config:
        """`width` scales all channels; `norm` is plain BN or tdBN; `stem` suits the image size."""

        width: Annotated[float, Gt(0)] = 1.0
        norm: Literal["bn", "tdbn"] = "bn"
        stem: Literal["cifar", "imagenet"] = "cifar"

    block: ClassVar[type[Block]] = CurrentBlock
    widths: ClassVar[tuple[int, ...]] = (64, 128, 256, 512)
    depths: ClassVar[tuple[int, ...]]
    bias: ClassVar[bool] = False  # of the convolutions
    pooling: ClassVar[type[nn.Module]] = nn.AvgPool2d  # of the ImageNet stem
    spiking_stem: ClassVar[bool] = True
    kaiming: ClassVar[bool] = False  # convolution weights from N(0, 2 / fan_out), not torch's
    tap_offset: ClassVar[int] = -1  # the block that is tapped, from the one after the stage

    def __init__(self, config: Any, shape: tuple[int, ...], classes: int, neuron: Neuron) -> None:
        super().__init__(config, shape, classes, neuron)
        v_th = neuron.v_th if isinstance(neuron, LIF) else 1.0
        f = partial(conv_bn, bias=self.bias, td=v_th if config.norm == "tdbn" else None)

        imagenet = config.stem == "imagenet"
        channels = self.scaled(self.stem_width)
        stem = f(shape[0], channels, *((7, 2) if imagenet else (3, 1)))
        pool = self.pooling(3, 2, 1) if imagenet else None
        if pool is not None and not self.spiking_stem:
            stem, pool = stem.append(pool), None
        self.stem = Layer(stem, neuron=neuron if self.spiking_stem else None)
        self.pool = None if pool is None else Layer(pool, neuron=None)

        self._blocks: list[Block] = []
        self._channels: list[int] = []
        for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                self._blocks.append(self.block(f, channels, self.scaled(width), stride, neuron))
                channels = self.scaled(width) * self.block.expansion
                self._channels.append(channels)
        self._ends = list(accumulate(self.depths))
        self.stages = nn.ModuleList(
            nn.ModuleList(self._blocks[end - depth : end])
            for end, depth in zip(self._ends, self.depths, strict=True)
        )

        hidden = None if self.hidden is None else self.scaled(self.hidden)
        self.fc = None if hidden is None else Layer(averaged(channels, hidden), neuron=neuron)
        last = averaged(channels, classes) if hidden is None else nn.Linear(hidden, classes)
        self.readout = Layer(last, neuron=None)
        if self.kaiming:
            for m in self.modules():
                if isinstance(m, nn.Conv2d):
                    nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    @property
    def stem_width(self) -> int:
        """Channels of the stem, before scaling."""
        return self.widths[0]

    @property
    def hidden(self) -> int | None:
        """Neurons of a spiking layer before the read-out, before scaling; None: no such layer."""
        return None

    def scaled(self, width: int) -> int:
        """Channels after scaling."""
        return max(1, round(width * float(self.config.width)))

    def forward(self, x_TB: Tensor, run: Run = Layer.__call__) -> Tensor:
        """Logits of every timestep, [T, B, K]."""
        x_TB = run(self.stem, x_TB)
        if self.pool is not None:
            x_TB = run(self.pool, x_TB)
        for block in self._blocks:
            x_TB = block(x_TB, run)
        if self.fc is not None:
            x_TB = run(self.fc, x_TB)
        return run(self.readout, x_TB)

    def taps(self, each: Literal["stage", "block"] = "stage") -> list[tuple[Layer, int]]:
        """Spikes of each stage (or block) but the last, with their channels."""
        ends = self._ends[:-1] if each == "stage" else range(1, len(self._blocks))
        blocks, channels = self._blocks, self._channels
        return [(blocks[end + self.tap_offset].tapped, channels[end - 1]) for end in ends]


class ResNet18(Residual):
    """Eight blocks of two convolutions, currents joined; 11.2 M parameters.

    The ImageNet stem pools by the average, as in MPBN, by the authors of the shortcut paper.
    """

    source = "He et al. 2016; spiking as in Yu et al. 2024, arXiv 2410.11488"
    depths = (2, 2, 2, 2)


class ResNet34(Residual):
    """Sixteen blocks of two convolutions, currents joined; 21.3 M parameters."""

    source = "He et al. 2016; spiking as in Guo et al. 2024, arXiv 2401.04486"
    depths = (3, 4, 6, 3)


class ResNet19(Residual):
    """Eight blocks of widths 128 to 512, currents joined, and an FC layer; 12.6 M parameters.

    Papers differ, and so are not strictly comparable: TET has stem 64 and head "fc256" (the
    default), the rate-based paper 128 and "fc256", MPBN 128 and "fc".
    """

    @dataclass(frozen=True)
    class Config:
        """`stem` channels; a spiking layer of 256 before the read-out ("fc256") or none ("fc")."""

        width: Annotated[float, Gt(0)] = 1.0
        norm: Literal["bn", "tdbn"] = "bn"
        stem: Annotated[int, Ge(1)] = 64
        head: Literal["fc256", "fc"] = "fc256"

    source = "Zheng et al. 2021 (STBP-tdBN), AAAI; as in TET's code, arXiv 2202.11946"
    widths = (128, 256, 512)
    depths = (3, 3, 2)

    @property
    def stem_width(self) -> int:
        """Channels of the stem, before scaling."""
        return int(self.config.stem)

    @property
    def hidden(self) -> int | None:
        """Neurons of the spiking layer before the read-out, before scaling."""
        return 256 if self.config.head == "fc256" else None


class ResNet20(Residual):
    """Nine blocks of widths 64 to 256, currents joined; 4.33 M parameters."""

    source = "Park et al. 2023, arXiv 2308.00558: github.com/seongsikpark/TensorFlow-SNNs"
    widths = (64, 128, 256)
    depths = (3, 3, 3)


class ImageNetResidual(Residual):
    """As in the rate-based paper's code: biases, Kaiming weights, maximum pooling in the stem."""

    @dataclass(frozen=True)
    class Config(Residual.Config):
        """`width` scales all channels; `norm` is plain BN or tdBN; `stem` suits the image size."""

        stem: Literal["cifar", "imagenet"] = "imagenet"

    bias = kaiming = True
    pooling = nn.MaxPool2d


class SEW(ImageNetResidual):
    """Blocks whose spikes are added; Fang et al. have no biases in their convolutions."""

    source = "Fang et al. 2021 (SEW), arXiv 2102.04159; as in Yu et al. 2024, arXiv 2410.11488"
    block = SEWBlock


class SEWResNet18(SEW):
    """Eight blocks of two layers, spikes added; 11.7 M parameters at 1000 classes."""

    depths = (2, 2, 2, 2)


class SEWResNet34(SEW):
    """Sixteen blocks of two layers, spikes added; 21.8 M parameters at 1000 classes."""

    depths = (3, 4, 6, 3)


class SEWResNet50(SEW):
    """Sixteen blocks of three layers, spikes added; 25.6 M parameters at 1000 classes."""

    block = SEWBottleneck
    depths = (3, 4, 6, 3)


class PreActResNet34(ImageNetResidual):
    """Sixteen pre-activation blocks around a current; 21.8 M parameters at 1000 classes.

    The stem has no neurons, and the read-out sees the current.  A stage's spikes are those of the
    neurons that read its current: the first layer of the next block.
    """

    source = "He et al. 2016, arXiv 1603.05027; as in Yu et al. 2024, arXiv 2410.11488"
    block = PreActBlock
    depths = (3, 4, 6, 3)
    spiking_stem = False
    tap_offset = 0
