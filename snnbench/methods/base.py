"""A training method is a gradient estimator: given a network and a batch, it fills `.grad`.

Shapes: T timesteps, B batch, K classes.  `progress` in [0, 1] is the fraction of training done: a
number, or a tensor [] on the device in a recorded step (`train.graph`), where nothing may ask for
its value.
The target is an int64 class index [B], or class probabilities [B, K] under label smoothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snnbench.models.layer import Layer, Network
from snnbench.neurons import ReLU

HOOKS = ("prepare", "run", "observe", "readout", "loss", "loss_scale", "backward", "predict")


class Method:
    """Every hook has a default, and the defaults are BPTT."""

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters, validated from the suite's [[method]] table."""

    source: ClassVar[str]
    # Set by a method that trains another kind of neuron than the suite's.
    neuron: ClassVar[ReLU | None] = None
    # Hooks that this method's `backward` does not call: no other method can bring them along.
    ignores: ClassVar[tuple[str, ...]] = ()
    # Hyper-parameters and T (None: any) at which the gradients must equal those of BPTT.
    bptt_limit: ClassVar[tuple[dict[str, Any], int | None]] = ({}, None)

    def __init__(self, config: Any = None) -> None:
        self.config: Any = self.Config() if config is None else config
        # Half precision: the trainer scales the loss up before it is sent back, and the gradients
        # down again.
        self.amplify: Callable[[Tensor], Tensor] = lambda loss: loss

    def supports(self, net: Network, T: int) -> str | None:
        """Why this method makes no sense for the network and T; None if it does."""
        return None

    def prepare(self, net: Network) -> nn.Module | None:
        """Auxiliary parameters that are trained along and discarded for evaluation."""
        return None

    def run(self, layer: Layer, *x_TB: Tensor) -> Tensor:
        """How one layer propagates signals and gradients while training."""
        s_TB: Tensor = layer(*x_TB)
        return s_TB

    def observe(self, layer: Layer, s_TB: Tensor) -> None:
        """Look at what a layer sent out; must not change it."""

    def readout(self, logits_TBK: Tensor, progress: float) -> Tensor:
        """The logits that the loss sees, [T, B, K]."""
        return logits_TBK

    def loss(self, logits_TBK: Tensor, target: Tensor, progress: float) -> Tensor:
        """Cross-entropy of the time-mean logits, averaged over the batch."""
        return F.cross_entropy(logits_TBK.mean(0), target)

    def loss_scale(self, T: int) -> float:
        """Constant factor on all gradients that belongs to the method's definition."""
        return 1.0

    def predict(self, net: Network, x_TB: Tensor) -> Tensor | None:
        """Logits with the auxiliary parts, logged for information; None where there are none."""
        return None

    def backward(self, net: Network, x_TB: Tensor, target: Tensor, progress: float) -> Tensor:
        """Fill `.grad` of every trainable parameter; the loss comes back, detached."""

        def run(layer: Layer, *x: Tensor) -> Tensor:
            s_TB = self.run(layer, *x)
            self.observe(layer, s_TB)
            return s_TB

        logits_TBK = self.readout(net(x_TB, run), progress)
        loss = self.loss(logits_TBK, target, progress)
        self.amplify(self.loss_scale(len(x_TB)) * loss).backward()
        return loss.detach()


class OnlineMethod(Method):
    """One backward pass per timestep: membranes are carried on, their gradient is not.

    Memory does not grow with T, and BatchNorm sees one timestep at a time.
    """

    ignores = ("run", "loss_scale")

    def drawn(self, T: int) -> set[int]:
        """Timesteps that are back-propagated."""
        return set(range(T))

    def current(self, layer: Layer, x_1B: tuple[Tensor, ...], memory: dict[Any, Tensor]) -> Tensor:
        """Input current [B, ...] of one timestep; `memory` lasts for the batch."""
        c_1B: Tensor = layer.current(*x_1B)
        return c_1B[0]

    def backward(self, net: Network, x_TB: Tensor, target: Tensor, progress: float) -> Tensor:
        """Fill `.grad` step by step; the loss comes back, detached."""
        T = len(x_TB)
        drawn = self.drawn(T)
        memory: dict[Any, Tensor] = {}
        v: dict[Layer, Tensor] = {}

        def run(layer: Layer, *x_1B: Tensor) -> Tensor:
            if layer.physics is None:
                return layer.current(*x_1B)
            c = self.current(layer, x_1B, memory)
            s, _, after = layer.neuron.step(c, v.get(layer))
            v[layer] = after.detach()
            s_1B: Tensor = s.to(c.dtype)[None]
            self.observe(layer, s_1B)
            return s_1B

        total = torch.zeros((), device=x_TB.device)
        for t, x_B in enumerate(x_TB):
            with torch.set_grad_enabled(t in drawn):
                logits_1BK = self.readout(net(x_B[None], run), progress)
                loss = self.loss(logits_1BK, target, progress) / T
            if t in drawn:
                self.amplify(loss).backward()
            total = total + loss.detach()
        return total
