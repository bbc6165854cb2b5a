"""Spatial learning through time: no gradient through the membrane, one backward pass per timestep.

    L = 1/T sum_t CE(O(t), y),    dv_pre[t+1] / dv_pre[t] := 0

Each timestep is run, back-propagated through the layers and forgotten: memory does not grow with T.
With `k` < T only k timesteps, drawn anew for every batch, are back-propagated (SLTT-K).  BatchNorm
sees one timestep at a time.
Source: Meng et al., ICCV 2023, arXiv 2302.14311, sections 4.2 and 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from snnbench.methods.base import Method
from snnbench.models.layer import Layer, Network


class SLTT(Method):
    """One backward pass per timestep, none through the membrane; overrides backward."""

    @dataclass(frozen=True)
    class Config:
        """Number of timesteps that are back-propagated; None: all of them."""

        k: Annotated[int, Ge(1)] | None = None

    source = "Meng et al. 2023 (SLTT), ICCV, arXiv 2302.14311"
    bptt_limit = ({}, 1)

    def supports(self, net: Network, T: int) -> str | None:
        """There must be k timesteps to draw."""
        k = self.config.k
        return None if k is None or k <= T else f"k = {k} timesteps cannot be drawn from T = {T}"

    def backward(self, net: Network, x_TB: Tensor, target: Tensor, progress: float) -> Tensor:
        """Fill `.grad` step by step; the loss comes back, detached."""
        T = len(x_TB)
        drawn = set(torch.randperm(T)[: self.config.k].tolist())
        v: dict[Layer, Tensor] = {}

        def run(layer: Layer, *x_1B: Tensor) -> Tensor:
            if layer.neuron is None:
                return self.run(layer, *x_1B)
            (c,) = layer.current(*x_1B)
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
                loss.backward()
            total = total + loss.detach()
        return total
