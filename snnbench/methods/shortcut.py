"""Shortcut back-propagation: linear heads on the stages add their logits to the output.

    O = b_n + lambda * sum_{l<n} b_l,  b_l = FC_l(GlobalAvgPool(s_l)),  L = CE(1/T sum_t O(t), y)

The *logits* are summed and one loss is taken; it is no sum of auxiliary losses.  Each tapped stage
so receives the output error directly.  The heads are gone at inference.

    evolutionary  lambda = lambda0 * (1 - progress): training ends on the plain network (default)
    constant      lambda = lambda0; the paper's "shortcut" rows have lambda0 = 1

Source: Guo et al., NeurIPS 2024, arXiv 2401.04486, section 4.  No code is published; where the
branches attach is read from figure 1 as "after each stage"; `heads = "block"` is the alternative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import Tensor, nn

from snnbench.methods.base import Method
from snnbench.models.layer import Layer, Network, over_time


class Shortcut(Method):
    """Linear heads on inner stages, added to the output; overrides prepare, observe, readout."""

    @dataclass(frozen=True)
    class Config:
        """How the weight of the added logits runs over training, and where heads attach."""

        schedule: Literal["evolutionary", "constant"] = "evolutionary"
        lambda0: Annotated[float, Ge(0)] = 0.25
        heads: Literal["stage", "block"] = "stage"

    source = "Guo et al. 2024 (Take A Shortcut Back), NeurIPS, arXiv 2401.04486"
    bptt_limit = ({"lambda0": 0.0}, None)

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._heads: list[tuple[Layer, nn.Module]] = []
        self._seen: dict[Layer, Tensor] = {}

    def supports(self, net: Network, T: int) -> str | None:
        """A network without an inner stage has nothing to attach a head to."""
        each = self.config.heads
        return None if net.taps(each) else f"the network has no inner {each} to attach a head to"

    def prepare(self, net: Network) -> nn.Module:
        """One linear head per tapped stage."""
        taps = net.taps(self.config.heads)
        heads = nn.ModuleList(nn.Linear(width, net.classes) for _, width in taps)
        self._heads = [(layer, head) for (layer, _), head in zip(taps, heads, strict=True)]
        return heads

    def observe(self, layer: Layer, s_TB: Tensor) -> None:
        """Keep the spikes of tapped layers until the read-out."""
        if any(layer is tapped for tapped, _ in self._heads):
            self._seen[layer] = s_TB

    def weight(self, progress: Any) -> Any:
        """Weight lambda of the added logits; a number, or a tensor [] where progress is one."""
        decay = 1 - progress if self.config.schedule == "evolutionary" else 1.0
        return self.config.lambda0 * decay

    def readout(self, logits_TBK: Tensor, progress: float) -> Tensor:
        """The network's logits plus those of the weighted heads."""
        for layer, head in self._heads:
            s_TB = self._seen.pop(layer)
            pooled_TBC = s_TB.flatten(3).mean(3) if s_TB.dim() > 3 else s_TB
            logits_TBK = logits_TBK + self.weight(progress) * over_time(head, pooled_TBC)
        return logits_TBK

    def predict(self, net: Network, x_TB: Tensor) -> Tensor:
        """Logits with the heads, as weighted at the end of training."""

        def look(layer: Layer, *x: Tensor) -> Tensor:
            s_TB: Tensor = layer(*x)
            self.observe(layer, s_TB)
            return s_TB

        return self.readout(net(x_TB, look), 1.0)
