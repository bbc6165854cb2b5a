"""The fused layer step: BatchNorm, residual and LIF over all timesteps as one autograd node.

Only the synapse's output y and the residual are kept for backward; membranes are computed anew.
The arithmetic is that of a backend, a module with these functions on contiguous arrays [T, M, C]
(M batch x pixels, C channels; Ty = 1 timesteps of y where all are the same):

    unavailable(device)                                            why not here, or None
    stats(y)                                                       mean, biased variance [C]
    fire(y, a, b, rest, decay, neuron, T)                          s
    fire_backward(g, y, a, b, mean, rstd, rest, decay, neuron, T, batch_stats)
                                                    gradients of y, rest, weight, bias, decay
    rate_fire(y, a, b, mean, rstd, rest, decay, neuron, T)         s, rate, elig, xhat

x = a y + b + rest is the input current; xhat = (y - mean) rstd.  Membranes, statistics and sums
are fp32 whatever the dtype of y.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from snnbench.kernels import rates
from snnbench.kernels.reference import Reference
from snnbench.neurons import LIF, ReLU


@dataclass(frozen=True)
class Affine:
    """BatchNorm as it acts on one batch: x = a y + b, all [C] and fp32."""

    weight: Tensor  # with the gradient's path to the module's parameters
    bias: Tensor
    a: Tensor
    b: Tensor
    mean: Tensor
    rstd: Tensor
    batch_stats: bool


@dataclass(frozen=True)
class Rates:
    """Time-means of a layer: rate, eligibility, normalised input."""

    rate_B: Tensor
    elig_B: Tensor
    xhat_B: Tensor | None
    affine: Affine | None


class Kernel(Reference):
    """A backend with the layout, the normalisation and the gradients around it."""

    def __init__(self, name: str, backend: Any) -> None:
        super().__init__()
        self.name, self.backend = name, backend
        self._rates = WeakIdKeyDictionary()

    def fuses(self, neuron: LIF | ReLU | None, dtype: torch.dtype) -> bool:
        """Whether the backend computes these neurons in this dtype."""
        return isinstance(neuron, LIF) and dtype != torch.float64

    def fire(
        self,
        neuron: LIF | ReLU,
        y_TB: Tensor,
        norm: nn.BatchNorm2d | None,
        rest_TB: Tensor | None,
        T: int,
    ) -> Tensor:
        """Spikes s_TB of a population at rest, fed with the normalised y_TB plus rest_TB."""
        if not self.fuses(neuron, y_TB.dtype):
            return super().fire(neuron, y_TB, norm, rest_TB, T)
        assert isinstance(neuron, LIF)
        self.steps[self.name] += 1
        if norm is None and rest_TB is not None:
            y_TB, rest_TB = y_TB + rest_TB, None
        affine = None if norm is None else self._affine(norm, y_TB, T)
        weight, bias = (None, None) if affine is None else (affine.weight, affine.bias)
        decay = decay_of(neuron, y_TB.device)
        s_TB: Tensor = _Fire.apply(
            self.backend, neuron, T, affine, y_TB, weight, bias, rest_TB, decay
        )
        return s_TB

    def linear(self, op: nn.Conv2d | nn.Linear, rate_B: Tensor, y_TB: Tensor, last: bool) -> Tensor:
        """The map's output on the mean input, without computing it: see `rates.linear`."""
        return rates.linear(op, rate_B, y_TB, last)

    def rate_fire(
        self,
        neuron: LIF,
        y_TB: Tensor,
        norm: nn.BatchNorm2d | None,
        rest_TB: Tensor | None,
        T: int,
        c_B: Tensor,
        rest_B: Tensor | None,
    ) -> Tensor:
        """Value of the spikes, gradient of the rate, which flows on through c_B and rest_B."""
        self.steps[self.name] += 1
        with torch.no_grad():
            if norm is None and rest_TB is not None:
                y_TB, rest_TB = y_TB + rest_TB, None
            affine = None if norm is None else self._affine(norm, y_TB, T)
            a, b, mean, rstd = _constants(affine)
            rest = _rest(rest_TB, y_TB, T)
            decay = decay_of(neuron, y_TB.device)
            s, rate, elig, xhat = self.backend.rate_fire(
                cells(y_TB), a, b, mean, rstd, rest, decay, neuron, T
            )
            shape = y_TB.shape[1:]
            rate, elig = (uncells(m[None], shape)[0] for m in (rate, elig))
            xhat = None if xhat is None else uncells(xhat[None], shape)[0]
            found = Rates(rate, elig, xhat, affine)
        weight, bias = (None, None) if affine is None else (affine.weight, affine.bias)
        rate_B: Tensor = rates.Step.apply(c_B, rest_B, weight, bias, found)
        out_TB: Tensor = rates.Carry.apply(uncells(s, shape), rate_B)
        self._rates[out_TB] = rate_B
        return out_TB

    def rate_of(self, x_TB: Tensor) -> Tensor:
        """The time-mean of an input; where a layer here sent it, without a gradient of length T."""
        known: Tensor | None = self._rates.get(x_TB)
        return x_TB.mean(0) if known is None else known

    def _affine(self, norm: nn.BatchNorm2d, y_TB: Tensor, T: int) -> Affine:
        """Statistics of the batch, which update the running ones; in evaluation the latter."""
        scale = getattr(norm, "scale", 1.0)  # of tdBN
        weight: Tensor = norm.weight
        bias: Tensor = norm.bias
        if not norm.affine:
            weight, bias = torch.ones(2, norm.num_features, device=y_TB.device)
            bias = bias - 1
        weight = weight * scale if scale != 1.0 else weight
        running = norm.running_mean is not None
        batch_stats = norm.training or not running
        with torch.no_grad():
            if batch_stats:
                mean, var = self.backend.stats(cells(y_TB.detach()))
            else:
                mean, var = norm.running_mean, norm.running_var
            assert mean is not None
            assert var is not None
            if norm.training and running:
                update_running(norm, mean, var, T * y_TB.shape[1:].numel() // norm.num_features)
            rstd = torch.rsqrt(var + norm.eps)
            a = weight * rstd
            b = torch.addcmul(bias, a, mean, value=-1)
            return Affine(weight, bias, a, b, mean, rstd, batch_stats)


def update_running(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics towards those of a batch of `count` values a channel."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = norm.momentum
    share = 1 / float(norm.num_batches_tracked) if share is None else share
    norm.running_mean.lerp_(mean, share)
    norm.running_var.lerp_(var * (count / max(1, count - 1)), share)


def decay_of(neuron: LIF, device: torch.device) -> Tensor:
    """The decay as a tensor [1]: a learned one is never read by the host."""
    if isinstance(neuron.decay, Tensor):
        return neuron.decay.reshape(1)
    return _constant(neuron.decay, device)


@cache
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.full((1,), value, device=device)


def cells(x_TB: Tensor) -> Tensor:
    """[T, B, C, H, W] or [T, B, F] as contiguous [T, M, C]; a view if channels are last."""
    if x_TB.dim() == 3:
        return x_TB.contiguous()
    x = x_TB.permute(0, 1, *range(3, x_TB.dim()), 2)
    x = x if x.is_contiguous() else x.contiguous()
    return x.view(len(x), -1, x.shape[-1])


def uncells(x: Tensor, shape: torch.Size) -> Tensor:
    """[T, M, C] as [T, *shape], a view; `shape` is [B, C, ...]."""
    if len(shape) == 2:
        return x
    B, C, *sites = shape
    return x.view(len(x), B, *sites, C).permute(0, 1, len(shape), *range(2, len(shape)))


def _rest(rest_TB: Tensor | None, y_TB: Tensor, T: int) -> Tensor | None:
    return None if rest_TB is None else cells(rest_TB.to(y_TB.dtype).expand(T, *y_TB.shape[1:]))


def _constants(affine: Affine | None) -> tuple[Tensor | None, ...]:
    if affine is None:
        return None, None, None, None
    return affine.a, affine.b, affine.mean, affine.rstd


class _Fire(torch.autograd.Function):
    """One layer step; gradients of y, the normalisation's weight and bias, the rest, the decay."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        neuron: LIF,
        T: int,
        affine: Affine | None,
        y_TB: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rest_TB: Tensor | None,
        decay: Tensor,
    ) -> Tensor:
        constants = _constants(affine)
        y = cells(y_TB)
        rest = _rest(rest_TB, y_TB, T)
        ctx.save_for_backward(y, rest, decay, *constants)
        ctx.backend, ctx.neuron, ctx.T, ctx.shape = backend, neuron, T, y_TB.shape[1:]
        ctx.batch_stats = affine is not None and affine.batch_stats
        if rest_TB is not None:
            ctx.rest_dtype, ctx.rest_shape = rest_TB.dtype, rest_TB.shape
        s = backend.fire(y, constants[0], constants[1], rest, decay, neuron, T)
        return uncells(s, y_TB.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        y, rest, decay, a, b, mean, rstd = ctx.saved_tensors
        # A gradient may come in any layout; `cells` brings it into the one of y.
        g = cells(grads[0])
        g = g if g.dtype == y.dtype else g.to(y.dtype)
        gy, grest, gweight, gbias, gdecay = ctx.backend.fire_backward(
            g, y, a, b, mean, rstd, rest, decay, ctx.neuron, ctx.T, ctx.batch_stats
        )
        gy = uncells(gy, ctx.shape)
        if grest is not None:
            grest = uncells(grest, ctx.shape).to(ctx.rest_dtype).sum_to_size(ctx.rest_shape)
        return None, None, None, None, gy, gweight, gbias, grest, gdecay
