"""Temporal efficient training: a cross-entropy at every timestep instead of one of the mean.

    L = (1 - lamb) * 1/T sum_t CE(O(t), y)  +  lamb * 1/T sum_t MSE(O(t), phi)

Nothing else changes.  The mean squared error averages over T, B and K.
Source: Deng et al., ICLR 2022, arXiv 2202.11946, section 4 and eq. 12; lamb = 0.05 for CIFAR,
0.001 for ImageNet and CIFAR10-DVS; phi is the firing threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor

from snnbench.methods.base import Method


class TET(Method):
    """A cross-entropy at every timestep, and a regulariser; overrides loss."""

    @dataclass(frozen=True)
    class Config:
        """`lamb` weighs the regulariser, `phi` is the value it draws the logits to."""

        lamb: Annotated[float, Ge(0), Le(1)] = 0.05
        phi: float = 1.0

    source = "Deng et al. 2022 (TET), ICLR, arXiv 2202.11946"
    bptt_limit = ({"lamb": 0.0}, 1)

    def loss(self, logits_TBK: Tensor, target: Tensor, progress: float) -> Tensor:
        """Mean over timesteps of the cross-entropy, and the regulariser."""
        every_t = target.repeat(len(logits_TBK), *(1 for _ in target.shape[1:]))
        ce = F.cross_entropy(logits_TBK.flatten(0, 1), every_t)
        mse = (logits_TBK - float(self.config.phi)).square().mean()
        lamb: float = self.config.lamb
        return (1 - lamb) * ce + lamb * mse
