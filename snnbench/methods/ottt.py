"""Online training through time: the gradient of each timestep with the trace of past input.

    tr[t] = decay * tr[t-1] + s_in[t]           presynaptic trace
    dW    = sum_t delta[t] tr[t]^T,   delta[t] from L(t) = 1/T CE(O(t), y), through layers only

The trace stands for the gradient through the membrane, so each timestep is back-propagated at once
and forgotten: memory does not grow with T.  Every weighted map runs twice, on spikes for the value
and on the trace for the gradient.  BatchNorm, which the paper replaces by weight standardisation,
sees one timestep at a time.  Gradients accumulate over T (the paper's OTTT_A).
Source: Xiao et al., NeurIPS 2022, arXiv 2210.04195, section 4 and appendix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snnbench.methods.base import OnlineMethod
from snnbench.models.layer import Layer, over_time


class OTTT(OnlineMethod):
    """One backward pass per timestep, with presynaptic traces; overrides backward."""

    source = "Xiao et al. 2022 (OTTT), NeurIPS, arXiv 2210.04195"
    bptt_limit = ({}, 1)

    def current(self, layer: Layer, x_1B: tuple[Tensor, ...], memory: dict[Any, Tensor]) -> Tensor:
        """Value of the spikes' current, gradient of the traces' at the weights."""
        decay = layer.neuron.decay
        decay = decay.detach() if isinstance(decay, Tensor) else decay

        def apply(op: nn.Module, x_1B: Tensor) -> Tensor:
            # The trace's derivative by this timestep's input is 1; what it carried over has none.
            now = x_1B if op not in memory else decay * memory[op] + x_1B
            memory[op] = now.detach()
            by_trace = over_time(op, now)
            with torch.no_grad():
                correction = over_time(op, x_1B) - by_trace
            return by_trace + correction

        return layer.current(*x_1B, apply=apply)[0]
