"""Rate-based backpropagation: spikes of all timesteps forward, their time-means backward.

Forward, per layer and without autograd, with kappa_t = dv_pre[t+1] / dv_pre[t]:

    rho_1 = 1,  rho_t = 1 + kappa_{t-1} rho_{t-1}    sensitivity of v_pre[t] to the currents
    elig  = 1/T sum_t h(v_pre[t]) rho_t              sensitivity of the rate to the mean current

Backward: dL/dc = dL/dr * elig on time-means r and c; convolution, linear map and average pooling
act on means exactly; BatchNorm has the values of the spikes' statistics and the Jacobian of the
means' statistics.  Every tensor therefore carries the *value* of the spikes and the *gradient* of
the rate, and autograd keeps no tensor of length T.

    loss_scale "1/T"     as in the authors' code: the gradient of loss / T (default)
               "1"       equal raw gradients: at T = 1 those of BPTT
    step_mode  "multi"   rate_M: all timesteps of a layer, then the next layer (default)
               "single"  rate_S: all layers of a timestep, then the next timestep; BatchNorm sees
                         one timestep at a time, the mean input drives the pass on means

Source: Yu et al., NeurIPS 2024, arXiv 2410.11488, section 4 and appendix B.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snnbench.kernels.rates import Current, MeanNorm, straight_through
from snnbench.methods.base import Method
from snnbench.models.layer import Layer, Network, applied, frames, normed, over_time, parts_of
from snnbench.neurons import LIF, wide
from snnbench.training import group


class Rate(Method):
    """Spikes forward, mean rates backward: memory flat in T; overrides run, backward and more."""

    @dataclass(frozen=True)
    class Config:
        """`loss_scale` is the constant factor on all gradients, `step_mode` the order of loops."""

        loss_scale: Literal["1/T", "1"] = "1/T"
        step_mode: Literal["multi", "single"] = "multi"

    source = "Yu et al. 2024 (rate-based backpropagation), NeurIPS, arXiv 2410.11488"
    bptt_limit = ({"loss_scale": "1"}, 1)

    def supports(self, net: Network, T: int) -> str | None:
        """Max pooling has no rate, but on a static stem; a learned decay gets no gradient."""
        first, *later = net.layers().values()
        if any(isinstance(m, nn.MaxPool2d) for layer in later for m in layer.modules()):
            return "max pooling of spikes does not commute with the mean over time"
        if any(getattr(layer.neuron, "learn_decay", False) for layer in (first, *later)):
            return "a learned decay gets no gradient from mean rates"
        return None

    def loss_scale(self, T: int) -> float:
        """Factor on all gradients."""
        return 1 / T if self.config.loss_scale == "1/T" else 1.0

    def run(self, layer: Layer, *x_TB: Tensor) -> Tensor:
        """Value of the spikes, gradient of the rate."""
        kernel: Any = layer.kernel
        T = len(x_TB[0])
        if not kernel.fuses(layer.physics, x_TB[0].dtype, T):
            return self._run_plain(layer, *x_TB)
        first, *rest = layer.synapses
        parts, norm = normed(first)
        y_TB, c = both(parts, x_TB[0], kernel)
        rest_TB, rest_B = None, None
        if rest:
            rest_TB, c_rest = self._sum(rest, x_TB[1:], kernel)
            rest_B = c_rest.tensor(rest_TB[:1])
        s_TB: Tensor = kernel.rate_fire(layer.neuron, y_TB, norm, rest_TB, T, c, rest_B)
        return s_TB

    def _run_plain(self, layer: Layer, *x_TB: Tensor) -> Tensor:
        c_TB, c = self._sum(layer.synapses, x_TB, layer.kernel)
        c_TB = c_TB.expand(len(x_TB[0]), *c_TB.shape[1:])
        if layer.physics is None:
            return straight_through(c_TB, c)
        s_TB, elig = spikes_and_eligibility(layer.neuron, c_TB)
        return straight_through(s_TB, Current(elig * c.tensor(c_TB[:1])))

    @staticmethod
    def _sum(
        synapses: Iterable[nn.Module], x_TB: tuple[Tensor, ...], kernel: Any
    ) -> tuple[Tensor, Current]:
        """Summed currents of the synapses, and what carries their gradient."""
        pairs = [both(parts_of(f), x, kernel) for f, x in zip(synapses, x_TB, strict=True)]
        if len(pairs) == 1:
            return pairs[0]
        values_TB = [value_TB for value_TB, _ in pairs]
        means_B = [c.tensor(value_TB[:1]) for value_TB, c in pairs]  # nobody looks at their values
        return sum(values_TB[1:], start=values_TB[0]), Current(sum(means_B[1:], start=means_B[0]))

    def backward(self, net: Network, x_TB: Tensor, target: Tensor, progress: float) -> Tensor:
        """Fill `.grad`; in single-step mode the whole network runs T times, then once on means."""
        if self.config.step_mode == "multi":
            return super().backward(net, x_TB, target, progress)
        memory: dict[Layer, _Running] = {}

        def spike(layer: Layer, *x_1B: Tensor) -> Tensor:
            return memory.setdefault(layer, _Running(layer)).step(*x_1B)

        def rate(layer: Layer, *r_1B: Tensor) -> Tensor:
            s_1B = memory[layer].rate(*r_1B)
            self.observe(layer, s_1B)
            return s_1B

        with torch.no_grad():
            value_TBK = torch.cat([net(x_B[None], spike) for x_B in x_TB])
        logits_TBK = straight_through(value_TBK, Current(net(x_TB.mean(0)[None], rate)[0]))
        loss = self.loss(self.readout(logits_TBK, progress), target, progress)
        self.amplify(self.loss_scale(len(x_TB)) * loss).backward()
        return loss.detach()


class _Running:
    """What one layer keeps of all timesteps in single-step mode: running means, no spikes."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.T = layer, 0
        self.v: Tensor | None = None
        self.rho = self.elig = self.spikes = torch.zeros(())
        self.norms: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def step(self, *x_1B: Tensor) -> Tensor:
        """Spikes (or current) of one timestep; BatchNorm sees this timestep alone."""
        c_1B = [self._spike_synapse(f, x) for f, x in zip(self.layer.synapses, x_1B, strict=True)]
        c = sum(c_1B[1:], start=c_1B[0])[0]
        self.T += 1
        neuron = self.layer.neuron
        if neuron is None:
            return c[None]
        s, v_pre, self.v = neuron.step(c, self.v)
        self.rho = neuron.gain + self.rho
        self.elig = self.elig + neuron.fire_grad(v_pre) * self.rho
        self.rho = neuron.carry(v_pre, s) * self.rho
        self.spikes = self.spikes + s
        s_1B: Tensor = s.to(c.dtype)[None]
        return s_1B

    def _spike_synapse(self, synapse: nn.Module, x_1B: Tensor) -> Tensor:
        for part in parts_of(synapse):
            if isinstance(part, nn.BatchNorm2d) and part.training:
                var, mean = _statistics(x_1B[0])
                old_mean, old_inverse = self.norms.get(part, (0.0, 0.0))
                self.norms[part] = (old_mean + mean, old_inverse + 1 / (var + part.eps))
            x_1B = over_time(part, x_1B)
        return x_1B

    def rate(self, *r_1B: Tensor) -> Tensor:
        """The mean rate (or current) of all timesteps, with its gradient."""
        c = [self._rate_synapse(f, r[0]) for f, r in zip(self.layer.synapses, r_1B, strict=True)]
        c_B = sum(c[1:], start=c[0])
        if self.layer.neuron is None:
            return c_B[None]
        mean_B = Current(self.elig / self.T * c_B)
        return straight_through((self.spikes / self.T)[None], mean_B)

    def _rate_synapse(self, synapse: nn.Module, r_B: Tensor) -> Tensor:
        for part in parts_of(synapse):
            if isinstance(part, nn.BatchNorm2d) and part in self.norms:
                mean, inverse = self.norms[part]
                # The paper's mean of reciprocals; its code uses the last step's, with eps twice.
                r_B = _normalise(part, mean / self.T, self.T / inverse - part.eps, r_B)
            else:
                r_B = part(r_B)
        return r_B


@torch.no_grad()
def spikes_and_eligibility(neuron: LIF, c_TB: Tensor) -> tuple[Tensor, Tensor]:
    """Spikes s_TB of the current c_TB, and the eligibility elig [B, ...]."""
    v: Tensor | None = None
    rho = torch.full_like(wide(c_TB[0]), neuron.gain)
    elig = torch.zeros_like(rho)
    s_T = []
    for c in c_TB:
        s, v_pre, v = neuron.step(c, v)
        elig += neuron.fire_grad(v_pre) * rho
        rho = neuron.gain + neuron.carry(v_pre, s) * rho
        s_T.append(s)
    s_TB = torch.cat(s_T).to(c_TB.dtype).unflatten(0, c_TB.shape[:2])
    return s_TB, elig / len(s_T)


def both(parts: list[nn.Module], x_TB: Tensor, kernel: Any) -> tuple[Tensor, Current]:
    """Output of the modules on every timestep, without gradient, and on the mean input, with.

    A kernel that knows the maps' backward passes alone spares the forward pass on the mean.
    """
    values_TB = [frames(x_TB.detach())]
    with torch.no_grad():
        for i, part in enumerate(parts):
            value_TB = values_TB[-1]
            still = len(value_TB) == 1 and any(isinstance(p, nn.MaxPool2d) for p in parts[i:])
            if isinstance(part, nn.BatchNorm2d):  # counts every timestep
                values_TB[-1] = value_TB = value_TB.expand(len(x_TB), *value_TB.shape[1:])
            elif isinstance(part, nn.MaxPool2d) and len(value_TB) > 1:
                raise ValueError("max pooling of input that varies in time has no rate gradient")
            value_TB = over_time(part, value_TB, kernel)
            values_TB.append(value_TB[:1] if still else value_TB)
    c = Current(kernel.rate_of(x_TB))
    for i, part in enumerate(parts):
        rate_B = c.tensor(values_TB[i])
        if isinstance(part, nn.BatchNorm2d) and part.training:
            c = Current(rate_batch_norm(part, values_TB[i], rate_B))
        elif isinstance(part, nn.Conv2d | nn.Linear):
            c = kernel.linear(part, rate_B, values_TB[i + 1].dtype)
        else:
            c = Current(applied(part, rate_B, kernel))
    return values_TB[-1], c


def rate_batch_norm(bn: nn.BatchNorm2d, c_TB: Tensor, c_B: Tensor) -> Tensor:
    """BatchNorm of mean currents: values of the spikes' statistics, Jacobian of the means'."""
    var, mean = _statistics(c_TB.detach().flatten(0, 1))
    return _normalise(bn, mean, var, c_B)


def _statistics(c_B: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean per channel, [1, C, 1, 1]."""
    c_B = wide(c_B)
    if group.size() > 1:
        mean = group.mean(c_B, (0, 2, 3))
        return group.mean((c_B - mean).square(), (0, 2, 3)), mean
    var, mean = torch.var_mean(c_B, (0, 2, 3), correction=0, keepdim=True)
    return var, mean


def _normalise(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, c_B: Tensor) -> Tensor:
    """Normalised c_B: the statistics' values as given, their gradients those of c_B."""
    weight = bn.weight * getattr(bn, "scale", 1.0)
    normed: Tensor = MeanNorm.apply(c_B, weight, bn.bias, mean, var, bn.eps)
    return normed
