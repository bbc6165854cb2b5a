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

from snnbench.methods.base import OnlineMethod
from snnbench.models.layer import Network


class SLTT(OnlineMethod):
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

    def drawn(self, T: int) -> set[int]:
        """k of the timesteps, or all."""
        k = self.config.k
        return super().drawn(T) if k is None else set(torch.randperm(T)[:k].tolist())
