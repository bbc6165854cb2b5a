"""Back-propagation through time with surrogate gradients: the baseline of every table.

    L = CE(1/T sum_t O(t), y)

The gradient flows back through all timesteps and layers.  Memory grows linearly with T.  With
`truncation` = k it flows through the membrane within windows of k steps only.
Source: Wu et al., Spatio-temporal backpropagation, Front. Neurosci. 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from snnbench.methods.base import Method
from snnbench.models.layer import Layer


class BPTT(Method):
    """Back-propagation through time, the baseline: every default of `Method`."""

    @dataclass(frozen=True)
    class Config:
        """Length of the windows that the membrane's gradient stays within; None: all of T."""

        truncation: Annotated[int, Ge(1)] | None = None

    source = "Wu et al. 2018 (STBP), Front. Neurosci. 12:331"

    def run(self, layer: Layer, *x_TB: Tensor) -> Tensor:
        """The layer's spikes."""
        window = self.config.truncation
        if window is None or layer.neuron is None:
            return super().run(layer, *x_TB)
        neuron, c_TB = layer.neuron, layer.current(*x_TB)
        v: Tensor | None = None
        s_T = []
        for t, c in enumerate(c_TB):
            if v is not None and t % window == 0:
                v = v.detach()
            s, _, v = neuron.step(c, v)
            s_T.append(s)
        return torch.stack(s_T).to(c_TB.dtype)
