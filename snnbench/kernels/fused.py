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
are fp32 whatever the dtype of y.  A backend may do more in the same passes:

    affine(y, weight, bias, running, eps, share, count, batch_stats)
                                                       a, b, mean, rstd: [4, C]
    rate_backward(g, elig, xhat, a, rested, batch_stats)           gradients through time-means
    takes_two             fire_backward adds up two gradients, one for each user of the spikes
    normalises_rest       fire and fire_backward normalise the rest as well
    average_dtypes        of arrays that it pools, as `pooling` says

With any other these are torch operations around the backend.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snnbench.kernels import pooling, rates
from snnbench.kernels.rates import Current, cells, uncells, unpixels
from snnbench.kernels.reference import Reference
from snnbench.neurons import LIF, ReLU, wide


class Affine(NamedTuple):
    """BatchNorm as it acts on one batch: x = a y + b, all [C] and fp32."""

    weight: Tensor  # with the gradient's path to the module's parameters
    bias: Tensor
    a: Tensor
    b: Tensor
    mean: Tensor
    rstd: Tensor
    batch_stats: bool


class Rates(NamedTuple):
    """Spikes of a layer, and time-means: rate; eligibility and normalised input as [M, C]."""

    s_TB: Tensor
    rate_B: Tensor
    elig: Tensor
    xhat: Tensor | None
    affine: Affine | None


class Kernel(Reference):
    """A backend with the layout, the normalisation and the gradients around it."""

    def __init__(self, name: str, backend: Any) -> None:
        super().__init__()
        self.name, self.backend = name, backend
        self.takes_two = getattr(backend, "takes_two", False)
        self.normalises_rest = getattr(backend, "normalises_rest", False)
        self.most_T = getattr(backend, "MOST_T", math.inf)

    def fuses(self, neuron: LIF | ReLU | None, dtype: torch.dtype, T: int) -> bool:
        """Whether the backend computes these neurons in this dtype, over so many timesteps."""
        return isinstance(neuron, LIF) and dtype != torch.float64 and self.most_T >= T

    def fire(
        self,
        neuron: LIF | ReLU,
        y_TB: Tensor,
        norm: nn.BatchNorm2d | None,
        rest_TB: Tensor | None,
        T: int,
        rest_norm: nn.BatchNorm2d | None = None,
    ) -> Tensor:
        """Spikes s_TB of a population at rest, fed with the normalised y_TB plus rest_TB."""
        if not self.fuses(neuron, y_TB.dtype, T):
            return super().fire(neuron, y_TB, norm, rest_TB, T, rest_norm)
        assert isinstance(neuron, LIF)
        self.steps[self.name] += 1
        if rest_norm is not None and (norm is None or not self.normalises_rest):
            assert rest_TB is not None
            rest_TB, rest_norm = normalised(rest_norm, rest_TB), None
        if norm is None and rest_TB is not None:
            y_TB, rest_TB = y_TB + rest_TB, None
        y = cells(y_TB.detach())
        affine = None if norm is None else self._affine(norm, y, T)
        by = None
        if rest_norm is not None:
            assert rest_TB is not None
            by = self._affine(rest_norm, cells(rest_TB.detach()), T)
        twins = self.takes_two and torch.is_grad_enabled()
        plan = Plan(self.backend, neuron, T, y, affine, by, twins)
        parameters = (None if of is None else (of.weight, of.bias) for of in (affine, by))
        (weight, bias), (rest_weight, rest_bias) = (pair or (None, None) for pair in parameters)
        decay = decay_of(neuron, y_TB.device)
        s_TB, twin_TB = _Fire.apply(
            plan, y_TB, weight, bias, rest_TB, decay, rest_weight, rest_bias
        )
        if twin_TB is not None:
            s_TB.twin_TB = twin_TB
        out_TB: Tensor = s_TB
        return out_TB

    def twin(self, x_TB: Tensor) -> Tensor:
        """The same spikes for their second user, whose gradient then needs no sum of its own."""
        twin_TB: Tensor = getattr(x_TB, "twin_TB", x_TB)
        return twin_TB

    def average(self, pool: nn.AvgPool2d, x_B: Tensor) -> Tensor:
        """What a pooling makes of its input."""
        k = pooling.window(pool, x_B)
        if k is None or x_B.dtype not in getattr(self.backend, "average_dtypes", ()):
            return super().average(pool, x_B)
        return pooling.average(x_B, k, self.backend)

    def linear(self, op: nn.Conv2d | nn.Linear, rate_B: Tensor, dtype: torch.dtype) -> Current:
        """What a map makes of a mean input, without computing it."""
        return rates.linear(op, rate_B, dtype)

    def rate_fire(
        self,
        neuron: LIF,
        y_TB: Tensor,
        norm: nn.BatchNorm2d | None,
        rest_TB: Tensor | None,
        T: int,
        c: Current,
        rest_B: Tensor | None,
    ) -> Tensor:
        """Value of the spikes, gradient of the rate, which flows on through c and rest_B.

        y_TB and rest_TB are values without a gradient.
        """
        self.steps[self.name] += 1
        if norm is None and rest_TB is not None:
            y_TB, rest_TB = y_TB + rest_TB, None
        y, rest, shape = cells(y_TB), _rest(rest_TB, y_TB, T), y_TB.shape[1:]
        affine = None if norm is None else self._affine(norm, y, T)
        constants, decay = _constants(affine), decay_of(neuron, y.device)
        s, rate, elig, xhat = self.backend.rate_fire(y, *constants, rest, decay, neuron, T)
        found = Rates(uncells(s, shape), unpixels(rate, shape), elig, xhat, affine)
        weight, bias = (None, None) if affine is None else (affine.weight, affine.bias)
        back = getattr(self.backend, "rate_backward", rates.step_backward)
        s_TB, s_TB.rate_B = rates.Step.apply(*c, rest_B, weight, bias, found, back)
        out_TB: Tensor = s_TB
        return out_TB

    def rate_of(self, x_TB: Tensor) -> Tensor:
        """The time-mean of an input; where a layer here sent it, without a gradient of length T."""
        known: Tensor | None = getattr(x_TB, "rate_B", None)
        if known is None:
            return x_TB[0] if x_TB.stride(0) == 0 else x_TB.mean(0)
        return known

    def _affine(self, norm: nn.BatchNorm2d, y: Tensor, T: int) -> Affine:
        """Statistics of the batch y [Ty, M, C], which update the running ones; in evaluation the
        latter.
        """
        scale = vars(norm).get("scale", 1.0)  # of tdBN
        weight: Tensor = norm.weight
        bias: Tensor = norm.bias
        if not norm.affine:
            weight, bias = torch.ones(2, norm.num_features, device=y.device)
            bias = bias - 1
        weight, bias = wide(weight), wide(bias)
        weight = weight * scale if scale != 1.0 else weight
        running = norm.running_mean, norm.running_var
        batch_stats = norm.training or running[0] is None
        count = T * y.shape[1]
        if batch_stats and count == 1:
            raise ValueError("BatchNorm: expected more than 1 value per channel when training")
        with torch.no_grad():
            in_one = getattr(self.backend, "affine", None)
            if in_one is not None and all(map(_plain, running)):
                share = counted(norm) if norm.training else 0.0
                a, b, mean, rstd = in_one(
                    y, weight, bias, running, norm.eps, share, count, batch_stats
                ).unbind()
                return Affine(weight, bias, a, b, mean, rstd, batch_stats)
            mean, var = self.backend.stats(y) if batch_stats else running
            assert mean is not None
            assert var is not None
            if norm.training and running[0] is not None:
                update_running(norm, mean, var, count)
            rstd = torch.rsqrt(wide(var) + norm.eps)
            a = weight * rstd
            b = torch.addcmul(bias, a, mean, value=-1)
            return Affine(weight, bias, a, b, wide(mean), rstd, batch_stats)


class Plan(NamedTuple):
    """What a layer step needs beside tensors of the graph; `rest` normalises what is added."""

    backend: Any
    neuron: LIF
    T: int
    y: Tensor  # of the synapse, [Ty, M, C]
    affine: Affine | None
    rest: Affine | None
    twins: bool


def normalised(norm: nn.BatchNorm2d, x_TB: Tensor) -> Tensor:
    """x_TB after a BatchNorm over all timesteps."""
    out_TB: Tensor = norm(x_TB.flatten(0, 1)).unflatten(0, x_TB.shape[:2])
    return out_TB


def counted(norm: nn.BatchNorm2d) -> float:
    """The share of one batch more in the running statistics; 0 where there are none."""
    if norm.running_mean is None:
        return 0.0
    batches = norm.num_batches_tracked
    assert batches is not None
    batches.add_(1)
    return 1 / float(batches) if norm.momentum is None else norm.momentum


def _plain(x: Tensor | None) -> bool:
    """Whether this is fp32 and in one piece, or nothing."""
    return x is None or (x.dtype == torch.float32 and x.is_contiguous())


def update_running(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics towards those of a batch of `count` values a channel."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    share = counted(norm)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    unbiased = var * (count / max(1, count - 1))
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)


def decay_of(neuron: LIF, device: torch.device) -> Tensor:
    """The decay as a tensor [1]: a learned one is never read by the host."""
    if isinstance(neuron.decay, Tensor):
        return neuron.decay.reshape(1)
    return _constant(neuron.decay, device)


@cache
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.full((1,), value, device=device)


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
        plan: Plan,
        y_TB: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rest_TB: Tensor | None,
        decay: Tensor,
        rest_weight: Tensor | None,
        rest_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        constants, rest_constants = _constants(plan.affine), _constants(plan.rest)
        y = plan.y
        rest = _rest(rest_TB, y_TB, plan.T)
        ctx.save_for_backward(y, rest, decay, *constants, *rest_constants)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.neuron, ctx.T, ctx.shape = (
            plan.backend,
            plan.neuron,
            plan.T,
            y_TB.shape[1:],
        )
        ctx.batch_stats = plan.affine is not None and plan.affine.batch_stats
        ctx.rest_normed = plan.rest is not None
        if rest_TB is not None:
            ctx.rest_dtype, ctx.rest_shape = rest_TB.dtype, rest_TB.shape
        more = {"rest_affine": rest_constants[:2]} if ctx.rest_normed else {}
        s = plan.backend.fire(
            y, constants[0], constants[1], rest, decay, plan.neuron, plan.T, **more
        )
        # Both are views of what nobody else holds: a twin that were a view of the spikes would hold
        # what holds it, as an attribute, for ever.
        s_TB = uncells(s.view_as(s), ctx.shape)
        return s_TB, s_TB.view_as(s_TB) if plan.twins else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        rates.refuse_second()
        y, rest, decay, a, b, mean, rstd, *rest_constants = ctx.saved_tensors
        # A gradient may come in any layout; `cells` brings it into the one of y.
        parts = [cells(g).to(y.dtype) for g in grads if g is not None]
        if not parts:
            return (None,) * 8
        more: dict[str, Any] = dict(zip(("g2",), parts[1:], strict=False))
        if ctx.rest_normed:
            more["rest_constants"] = tuple(rest_constants)
        gy, grest, gweight, gbias, gdecay, *of_rest = ctx.backend.fire_backward(
            parts[0], y, a, b, mean, rstd, rest, decay, ctx.neuron, ctx.T, ctx.batch_stats, **more
        )
        gy = uncells(gy, ctx.shape)
        if grest is not None:
            grest = uncells(grest, ctx.shape).to(ctx.rest_dtype).sum_to_size(ctx.rest_shape)
        rest_weight, rest_bias = (of_rest[0], gbias) if ctx.rest_normed else (None, None)
        return None, gy, gweight, gbias, grest, gdecay, rest_weight, rest_bias
