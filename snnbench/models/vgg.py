"""VGG networks of conv3x3-BN-LIF layers; all convolutions have biases.

A plan lists channels, and what lies between two layers: A average pooling 2x2, G global average,
G3 average to 3x3, S a stride of 2 in the next convolution.  After G a layer is fully connected
(written as a 1x1 convolution of one pixel).  The read-out sees the last map, flattened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Gt
from torch import Tensor, nn

from snnbench.models.layer import Layer, Network, Run, TdBatchNorm2d
from snnbench.neurons import LIF, ReLU

Plan: TypeAlias = tuple[int | str, ...]
A, G, G3, S = "A", "G", "G3", "S"
SITES = {G: 1, G3: 3}


class VGG(Network):
    """Layers as in the plan, linear read-out."""

    @dataclass(frozen=True)
    class Config:
        """`width` scales all channels; `norm` is plain BN or tdBN; `init` names initial weights.

        "normal": all from N(0, 0.5^2), biases 0 (rate-based paper's code); "kaiming": convolutions
        from N(0, 2 / fan_out) (TET's code); "default": torch's own.
        """

        width: Annotated[float, Gt(0)] = 1.0
        norm: Literal["bn", "tdbn"] = "bn"
        init: Literal["normal", "kaiming", "default"] = "normal"

    source = "Simonyan & Zisserman 2015; as in Yu et al. 2024, arXiv 2410.11488"
    plan: ClassVar[Plan]

    def __init__(
        self, config: Any, shape: tuple[int, ...], classes: int, neuron: LIF | ReLU
    ) -> None:
        super().__init__(config, shape, classes, neuron)
        self._taps: dict[str, list[tuple[Layer, int]]] = {"stage": [], "block": []}
        stages, layers = self._taps.values()
        channels, sites = shape[0], shape[1:]
        before: list[nn.Module] = []
        kernel, stride = 3, 1
        for item in self.plan:
            if item == S:
                stride = 2
            elif isinstance(item, str):
                stages.append(layers[-1])
                before = [nn.AvgPool2d(2) if item == A else nn.AdaptiveAvgPool2d(SITES[item])]
                sites = tuple(n // 2 if item == A else SITES[item] for n in sites)
                kernel = 1 if item == G else 3
            else:
                out = max(1, round(item * config.width))
                conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2)
                synapse = nn.Sequential(*before, conv, self.norm(out))
                layers.append((Layer(synapse, neuron=neuron), out))
                if stride == 2:
                    stages.append(layers[-1])
                    sites = tuple((n + 1) // 2 for n in sites)
                channels, before, stride = out, [], 1
        self.features = nn.ModuleList(layer for layer, _ in layers)
        linear = nn.Linear(channels * sites[0] * sites[1], classes)
        self.readout = Layer(nn.Sequential(*before, nn.Flatten(), linear), neuron=None)
        initialise(self, config.init)

    def norm(self, channels: int) -> nn.BatchNorm2d:
        """BN, or tdBN with the neuron's threshold."""
        if self.config.norm == "bn":
            return nn.BatchNorm2d(channels)
        return TdBatchNorm2d(channels, self.neuron.v_th if isinstance(self.neuron, LIF) else 1.0)

    def forward(self, x_TB: Tensor, run: Run = Layer.__call__) -> Tensor:
        """Logits of every timestep, [T, B, K]."""
        for layer in self.features:
            x_TB = run(layer, x_TB)
        return run(self.readout, x_TB)

    def taps(self, each: Literal["stage", "block"] = "stage") -> list[tuple[Layer, int]]:
        """Layers before a pooling, or with a stride (stage), or all (block); never the last."""
        return [tap for tap in self._taps[each] if tap[0] is not self.features[-1]]


def initialise(net: nn.Module, how: str) -> None:
    """Set initial weights in place."""
    for m in net.modules():
        if how == "kaiming" and isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif how == "normal" and isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.normal_(m.weight, std=0.5)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class VGG11(VGG):
    """Eight convolutions and a linear read-out; 11.0 M parameters."""

    plan = (64, A, 128, 256, A, 512, 512, A, 512, A, 512, 512, G)


class VGG11A(VGG):
    """VGG-11 as first published: maps halved sooner, less than half the cost; 9.2 M parameters."""

    source = "Simonyan & Zisserman 2015, arXiv 1409.1556, table 1, configuration A"
    plan = (64, A, 128, A, 256, 256, A, 512, 512, A, 512, 512, G)


class VGG13(VGG):
    """Ten convolutions and a linear read-out; 9.4 M parameters."""

    plan = (64, 64, A, 128, 128, A, 256, 256, A, 512, 512, 512, A, 512, G)


class VGG16(VGG):
    """Thirteen convolutions, two layers of 512 and a read-out; 15.26 M parameters.

    The published 15.27 M include the running statistics of BN, which the two layers also have.
    """

    @dataclass(frozen=True)
    class Config(VGG.Config):
        """As for VGG; torch's own initial weights."""

        init: Literal["normal", "kaiming", "default"] = "default"

    source = "Park et al. 2023, arXiv 2308.00558: github.com/seongsikpark/TensorFlow-SNNs"
    plan = (64, 64, A, 128, 128, A, *[256] * 3, A, *[512] * 3, A, *[512] * 3, G, 512, 512)


class VGGSNN(VGG):
    """Eight convolutions and a read-out of 3x3 maps, for images; 9.27 M parameters."""

    plan = (64, 128, A, 256, 256, A, 512, 512, A, 512, 512, G3)


class VGGSNNDVS(VGG):
    """Eight convolutions and a read-out of 3x3 maps, for events of 48x48; 9.27 M parameters."""

    @dataclass(frozen=True)
    class Config(VGG.Config):
        """As for VGG; TET's initial weights."""

        init: Literal["normal", "kaiming", "default"] = "kaiming"

    source = "Deng et al. 2022 (TET), ICLR, arXiv 2202.11946"
    plan: ClassVar[Plan] = (64, 128, A, 256, 256, A, 512, 512, A, 512, 512, A)


class VGGSNNwoAP(VGGSNNDVS):
    """VGGSNN with convolutions of stride 2 in place of pooling, for 48x48; 9.27 M parameters."""

    plan = (64, S, 128, 256, S, 256, 512, S, 512, 512, S, 512)
