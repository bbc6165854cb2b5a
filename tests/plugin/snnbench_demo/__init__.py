"""A guest: a method that looks at the last timestep only, and a one-layer network."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch.nn.functional as F
from torch import nn

from snnbench.methods.base import Method
from snnbench.models.layer import Layer, Network


class LastStep(Method):
    """Cross-entropy of the last timestep's logits, mixed with that of the mean."""

    @dataclass(frozen=True)
    class Config:
        share: float = 1.0

    source = "a test of snnbench"
    bptt_limit = ({"share": 0.0}, None)

    def loss(self, logits_TBK, target, progress):
        last = F.cross_entropy(logits_TBK[-1], target)
        share = self.config.share
        return share * last + (1 - share) * super().loss(logits_TBK, target, progress)


class Tiny(Network):
    """One spiking layer and a read-out."""

    @dataclass(frozen=True)
    class Config:
        hidden: int = 32

    source = "a test of snnbench"

    def __init__(self, config, shape, classes, neuron):
        super().__init__(config, shape, classes, neuron)
        linear = nn.Linear(prod(shape), config.hidden)
        self.hidden = Layer(nn.Sequential(nn.Flatten(), linear), neuron=neuron)
        self.readout = Layer(nn.Linear(config.hidden, classes), neuron=None)

    def forward(self, x_TB, run=Layer.__call__):
        return run(self.readout, run(self.hidden, x_TB))
