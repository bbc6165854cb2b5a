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
from snnbench.models.layer import Layer, has_weights, over_time, weighted


class OTTT(OnlineMethod):
    """One backward pass per timestep, with presynaptic traces; overrides backward."""

    source = "Xiao et al. 2022 (OTTT), NeurIPS, arXiv 2210.04195"
    bptt_limit = ({}, 1)

    def current(self, layer: Layer, x_1B: tuple[Tensor, ...], memory: dict[Any, Tensor]) -> Tensor:
        """Value of the spikes' current, gradient of the traces' at the weights."""
        decay = layer.neuron.decay
        decay = decay.detach() if isinstance(decay, Tensor) else decay
        parts = [_current(f, x, memory, decay) for f, x in zip(layer.synapses, x_1B, strict=True)]
        return sum(parts[1:], start=parts[0])[0]


def _current(synapse: nn.Module, x_1B: Tensor, trace: dict[Any, Tensor], decay: Tensor) -> Tensor:
    """Current with the value of the input and, at the weights, the gradient of its trace."""
    if not has_weights(synapse):
        return over_time(synapse, x_1B)
    before, op, after = weighted(synapse)
    for part in before:
        x_1B = over_time(part, x_1B)
    # The trace's derivative by this timestep's input is 1; what it carried over has none.
    now = x_1B if synapse not in trace else decay * trace[synapse] + x_1B
    trace[synapse] = now.detach()
    by_trace = over_time(op, now)
    with torch.no_grad():
        correction = over_time(op, x_1B) - by_trace
    c_1B = by_trace + correction
    for part in after:
        c_1B = over_time(part, c_1B)
    return c_1B
