"""Rate-based backpropagation: spikes of all timesteps forward, their time-means backward.

Forward, per layer and without autograd, with kappa_t = dv_pre[t+1] / dv_pre[t]:

    rho_1 = 1,  rho_t = 1 + kappa_{t-1} rho_{t-1}    sensitivity of v_pre[t] to the currents
    elig  = 1/T sum_t h(v_pre[t]) rho_t              sensitivity of the rate to the mean current

Backward: dL/dc = dL/dr * elig on time-means r and c; convolution, linear map and average pooling
act on means exactly; BatchNorm has the values of the spikes' statistics and the Jacobian of the
means' statistics.  Every tensor therefore carries the *value* of the spikes and the *gradient* of
the rate, and autograd keeps no tensor of length T.

    loss_scale "1/T"  as in the authors' code: the gradient of loss / T (default)
               "1"    equal raw gradients: at T = 1 those of BPTT

Source: Yu et al., NeurIPS 2024, arXiv 2410.11488, section 4 and appendix B (rate_M).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from snnbench.methods.base import Method
from snnbench.models.layer import Layer, Network, over_time
from snnbench.neurons import LIF, wide


class Rate(Method):
    """Spikes forward, mean rates backward: memory flat in T; overrides run, loss_scale."""

    @dataclass(frozen=True)
    class Config:
        """`loss_scale` is the constant factor on all gradients."""

        loss_scale: Literal["1/T", "1"] = "1/T"

    source = "Yu et al. 2024 (rate-based backpropagation), NeurIPS, arXiv 2410.11488"
    bptt_limit = ({"loss_scale": "1"}, 1)

    def supports(self, net: Network, T: int) -> str | None:
        """The maximum of means is not the mean of maxima: max pooling has no rate."""
        pools = any(isinstance(m, nn.MaxPool2d | nn.AdaptiveMaxPool2d) for m in net.modules())
        return "max pooling does not commute with the mean over time" if pools else None

    def loss_scale(self, T: int) -> float:
        """Factor on all gradients."""
        return 1 / T if self.config.loss_scale == "1/T" else 1.0

    def run(self, layer: Layer, *x_TB: Tensor) -> Tensor:
        """Value of the spikes, gradient of the rate."""
        pairs = [rate_synapse(f, x) for f, x in zip(layer.synapses, x_TB, strict=True)]
        with torch.no_grad():
            c_TB = sum((value for value, _ in pairs[1:]), start=pairs[0][0])
        c_B = sum((rate for _, rate in pairs[1:]), start=pairs[0][1])
        if layer.neuron is None:
            return straight_through(c_TB, c_B)
        s_TB, elig = spikes_and_eligibility(layer.neuron, c_TB)
        return straight_through(s_TB, elig * c_B)


def straight_through(value_TB: Tensor, rate_B: Tensor) -> Tensor:
    """Value of `value_TB`; its time-mean has the gradient of `rate_B`."""
    return value_TB + (rate_B - rate_B.detach()).to(value_TB.dtype)


@torch.no_grad()
def spikes_and_eligibility(neuron: LIF, c_TB: Tensor) -> tuple[Tensor, Tensor]:
    """Spikes s_TB of the current c_TB, and the eligibility elig [B, ...]."""
    v: Tensor | None = None
    rho = torch.ones_like(wide(c_TB[0]))
    elig = torch.zeros_like(rho)
    s_T = []
    for c in c_TB:
        s, v_pre, v = neuron.step(c, v)
        elig += neuron.fire_grad(v_pre) * rho
        rho = 1 + neuron.carry(v_pre, s) * rho
        s_T.append(s)
    s_TB = torch.cat(s_T).to(c_TB.dtype).unflatten(0, c_TB.shape[:2])
    return s_TB, elig / len(s_T)


def rate_synapse(synapse: nn.Module, x_TB: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the synapse on every timestep, without gradient, and on the mean input, with."""
    parts: Iterable[nn.Module] = synapse if isinstance(synapse, nn.Sequential) else [synapse]
    value_TB, rate_B = x_TB.detach(), x_TB.mean(0)
    for part in parts:
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d) and part.training:
            rate_B = rate_batch_norm(part, value_TB, rate_B)
        else:
            rate_B = part(rate_B)
        with torch.no_grad():
            value_TB = over_time(part, value_TB)
    return value_TB, rate_B


def rate_batch_norm(bn: nn.BatchNorm1d | nn.BatchNorm2d, c_TB: Tensor, c_B: Tensor) -> Tensor:
    """BatchNorm of mean currents: values of the spikes' statistics, Jacobian of the means'."""
    per_channel = [1, -1] + [1] * (c_B.dim() - 2)
    dims = [d for d in range(c_B.dim()) if d != 1]
    with torch.no_grad():
        var_TB, mean_TB = torch.var_mean(c_TB.flatten(0, 1), dims, correction=0, keepdim=True)
    mean = c_B.mean(dims, keepdim=True)
    centred = c_B - (mean_TB + (mean - mean.detach()))
    var = centred.square().mean(dims, keepdim=True)
    var = var_TB + (var - var.detach())
    normed = centred * torch.rsqrt(var + bn.eps)
    return normed * bn.weight.view(per_channel) + bn.bias.view(per_channel)
