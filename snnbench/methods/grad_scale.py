"""Gradient scaling with spike-dependent local information.

For every synapse with weights W, pre- and post-synaptic spikes and a per-timestep gradient dW_t:

    tr[t] = exp(-1) tr[t-1] + s[t]                       trace of a neuron's spikes
    S_t   = tr_pre[t] (x) tr_post[t]                     coincidence, summed over batch and space
    G_t   = (1 - alpha) + alpha S_t / max(S_t)           in [1 - alpha, 1]; 1 while all is silent
    dW    = sum_t dW_t * G_t

For a convolution (x) is its own weight-gradient correlation.  Errors sent to earlier layers, biases
and BatchNorm are untouched.  A synapse fed by the data, the read-out, and other layers without
neurons (the joins of PreAct networks) lack pre- or post-synaptic spikes, and keep their gradient.

Source: Park et al., ICML 2023 workshop, arXiv 2308.00558.  Only the abstract was readable: the
equations are derived from the first author's repository (TensorFlow-SNNs, "stdp pathway"), with
alpha = 0.1 as in its configurations, and post-synaptic traces of the post-synaptic neuron.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import exp
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from snnbench.kernels.pointwise import unstrided
from snnbench.methods.base import Method
from snnbench.models.layer import Layer, over_time
from snnbench.training import group

TRACE_DECAY = exp(-1)


class GradScale(Method):
    """Weight gradients scaled by pre- and post-synaptic spike traces; overrides run."""

    @dataclass(frozen=True)
    class Config:
        """`alpha` is the largest share of a gradient that can be taken away.

        `post_source` "pre" uses the pre-synaptic trace twice, and `layers` "equal_shape" scales
        only where both populations have one shape, as the repository does; `trace_time` "final"
        uses the traces of the last timestep throughout.
        """

        alpha: Annotated[float, Ge(0), Le(1)] = 0.1
        post_source: Literal["post", "pre"] = "post"
        trace_time: Literal["matching", "final"] = "matching"
        layers: Literal["all", "equal_shape"] = "all"

        def __post_init__(self) -> None:
            if self.post_source == "pre" and self.layers == "all":
                raise ValueError('post_source = "pre" needs layers = "equal_shape"')

    source = "Park et al. 2023 (gradient scaling), ICML workshop, arXiv 2308.00558"
    bptt_limit = ({"alpha": 0.0}, None)

    def run(self, layer: Layer, *x_TB: Tensor) -> Tensor:
        """The layer's own spikes; its weights get the scaled gradient."""
        if layer.physics is None:
            return super().run(layer, *x_TB)
        post = _Post()

        def apply(op: nn.Module, x: Tensor) -> Tensor:
            return self._scaled(op, x, post) if x.requires_grad else over_time(op, x)

        s_TB: Tensor = layer(*x_TB, apply=apply)
        post.s_TB = s_TB.detach()
        return s_TB

    def _scaled(self, op: nn.Module, x_TB: Tensor, post: _Post) -> Tensor:
        c_TB: Tensor = _ScaledWeight.apply(x_TB, op.weight, op, post, self.config)
        if isinstance(op.bias, Tensor):
            c_TB = c_TB + op.bias.to(c_TB.dtype).view(-1, *(1 for _ in c_TB.shape[3:]))
        return c_TB


class _Post:
    """Post-synaptic spikes: known only after the synapse's own forward pass."""

    s_TB: Tensor


class _ScaledWeight(torch.autograd.Function):
    """A convolution or linear map (without bias) whose weight gradient is scaled per timestep."""

    @staticmethod
    def forward(
        ctx: Any, x_TB: Tensor, weight: Tensor, op: nn.Module, post: _Post, config: Any
    ) -> Tensor:
        c_TB = over_time(lambda x: _apply(op, x, weight), x_TB)
        ctx.save_for_backward(x_TB.to(c_TB.dtype), weight)  # autocast decides the dtype
        ctx.op, ctx.post, ctx.config = op, post, config
        return c_TB

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        x_TB, weight = ctx.saved_tensors
        (g_TB,) = grads
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_grad(ctx.op, x_TB, weight.to(g_TB.dtype), g_TB)
        config, post_TB = ctx.config, ctx.post.s_TB.to(x_TB.dtype)
        if config.layers == "equal_shape" and post_TB.shape != x_TB.shape:
            grad_w = weight_grad(ctx.op, x_TB.flatten(0, 1), g_TB.flatten(0, 1))
            return grad_x, grad_w.to(weight.dtype), None, None, None
        post_TB = x_TB if config.post_source == "pre" else post_TB
        pairs: Iterable[tuple[Tensor, Tensor]] = zip(traces(x_TB), traces(post_TB), strict=True)
        if config.trace_time == "final":
            pairs = [list(pairs)[-1]] * len(x_TB)
        grad_w = torch.zeros_like(weight)
        for x, g, (pre, post) in zip(x_TB, g_TB, pairs, strict=True):
            scale = gradient_scale(coincidences(ctx.op, pre, post, weight.dtype), config.alpha)
            grad_w += weight_grad(ctx.op, x, g) * scale
        return grad_x, grad_w, None, None, None


def traces(s_TB: Tensor) -> Iterator[Tensor]:
    """Exponential trace tr[t] = exp(-1) tr[t-1] + s[t] of every neuron, t = 1..T."""
    trace = torch.zeros_like(s_TB[0])
    for s in s_TB:
        trace = TRACE_DECAY * trace + s
        yield trace


def coincidences(op: nn.Module, pre_B: Tensor, post_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Products of traces, summed over batch and places: in half precision they would overflow."""
    with torch.autocast(pre_B.device.type, enabled=False):
        return group.total(weight_grad(op, pre_B.to(dtype), post_B.to(dtype)))


def gradient_scale(coincidence: Tensor, alpha: float) -> Tensor:
    """Factor G in [1 - alpha, 1] on a weight's gradient; 1 where no spikes coincide anywhere."""
    peak = coincidence.max()
    return torch.where(peak > 0, 1 - alpha + alpha * coincidence / peak, 1.0)


def weight_grad(op: nn.Module, x_B: Tensor, g_B: Tensor) -> Tensor:
    """Gradient of the weights for input x_B and output gradient g_B, summed over the batch."""
    if isinstance(op, nn.Conv2d):
        x_B, stride = unstrided(op, x_B)
        options = (stride, _padding(op), op.dilation, op.groups)
        conv_grad: Tensor = conv2d_weight(x_B, op.weight.shape, g_B, *options)
        return conv_grad
    grad: Tensor = g_B.flatten(0, -2).T @ x_B.flatten(0, -2)
    return grad


def _apply(op: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(op, nn.Conv2d):
        return F.conv2d(x, weight, None, op.stride, op.padding, op.dilation, op.groups)
    return F.linear(x, weight)


def _padding(op: nn.Conv2d) -> tuple[int, ...]:
    """The padding in numbers; torch's gradient functions take no words."""
    if not isinstance(op.padding, str):
        return op.padding
    if op.padding == "valid":
        return (0, 0)
    return tuple(d * (k - 1) // 2 for d, k in zip(op.dilation, op.kernel_size, strict=True))


def _input_grad(op: nn.Module, x_TB: Tensor, weight: Tensor, g_TB: Tensor) -> Tensor:
    grad: Tensor
    if not isinstance(op, nn.Conv2d):
        grad = g_TB @ weight
        return grad
    shape, g = x_TB.flatten(0, 1).shape, g_TB.flatten(0, 1)
    grad = conv2d_input(shape, weight, g, op.stride, _padding(op), op.dilation, op.groups)
    grad = grad.unflatten(0, x_TB.shape[:2])
    return grad
