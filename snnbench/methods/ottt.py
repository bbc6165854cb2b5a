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

from collections.abc import Callable

import torch
from torch import Tensor, nn

from snnbench.methods.base import Method
from snnbench.models.layer import Layer, Network, has_weights, over_time, weighted


class OTTT(Method):
    """One backward pass per timestep, with presynaptic traces; overrides backward."""

    source = "Xiao et al. 2022 (OTTT), NeurIPS, arXiv 2210.04195"
    bptt_limit = ({}, 1)

    def backward(self, net: Network, x_TB: Tensor, target: Tensor, progress: float) -> Tensor:
        """Fill `.grad` step by step; the loss comes back, detached."""
        v: dict[Layer, Tensor] = {}
        trace: dict[nn.Module, Tensor] = {}

        def run(layer: Layer, *x_1B: Tensor) -> Tensor:
            if layer.neuron is None:
                return self.run(layer, *x_1B)
            decay = layer.neuron.decay
            parts = [
                _current(f, x, lambda f, x: _advance(trace, f, x, decay))
                for f, x in zip(layer.synapses, x_1B, strict=True)
            ]
            c = sum(parts[1:], start=parts[0])[0]
            s, _, after = layer.neuron.step(c, v.get(layer))
            v[layer] = after.detach()
            s_1B: Tensor = s.to(c.dtype)[None]
            self.observe(layer, s_1B)
            return s_1B

        total = torch.zeros((), device=x_TB.device)
        for x_B in x_TB:
            logits_1BK = self.readout(net(x_B[None], run), progress)
            loss = self.loss(logits_1BK, target, progress) / len(x_TB)
            loss.backward()
            total = total + loss.detach()
        return total


def _current(
    synapse: nn.Module, x_1B: Tensor, advance: Callable[[nn.Module, Tensor], Tensor]
) -> Tensor:
    """Current with the value of the input and, at the weights, the gradient of its trace."""
    if not has_weights(synapse):
        return over_time(synapse, x_1B)
    before, op, after = weighted(synapse)
    for part in before:
        x_1B = over_time(part, x_1B)
    by_trace = over_time(op, advance(synapse, x_1B))
    with torch.no_grad():
        correction = over_time(op, x_1B) - by_trace
    c_1B = by_trace + correction
    for part in after:
        c_1B = over_time(part, c_1B)
    return c_1B


def _advance(
    trace: dict[nn.Module, Tensor], synapse: nn.Module, x_1B: Tensor, decay: float
) -> Tensor:
    """The synapse's input trace after this timestep; its derivative by the input is 1."""
    new = x_1B if synapse not in trace else decay * trace[synapse] + x_1B
    trace[synapse] = new.detach()
    return new
