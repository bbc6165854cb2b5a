"""Gradients on time-means: what the rate-based method sends back through a fused layer.

A convolution or linear map of a mean is the mean of the maps: no second forward pass is run, only
the backward pass of one.  Shapes: T timesteps, B batch, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snnbench.kernels.pointwise import conv_gradients
from snnbench.neurons import wide
from snnbench.training import group


class Current(NamedTuple):
    """A mean input current: a map of rate_B that is not computed, since only its gradient counts.

    Without a map it is rate_B itself.  Whoever uses it sends its gradient `back_through` the map.
    """

    rate_B: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    op: nn.Conv2d | nn.Linear | None = None

    def tensor(self, value_TB: Tensor) -> Tensor:
        """The current as a tensor; where it is not computed, with the values of this time-mean."""
        if self.op is None:
            return self.rate_B
        return straight_through(value_TB.mean(0, keepdim=True), self).squeeze(0)


def straight_through(value_TB: Tensor, mean: Current) -> Tensor:
    """Value of `value_TB`; its time-mean has the gradient of `mean`."""
    out_TB: Tensor = _Carry.apply(value_TB, *mean)
    return out_TB


def linear(op: nn.Conv2d | nn.Linear, rate_B: Tensor, dtype: torch.dtype) -> Current:
    """What the map makes of a mean input, in the dtype of its output on every timestep."""
    bias = None if op.bias is None else op.bias.to(dtype)
    return Current(rate_B.to(dtype), op.weight.to(dtype), bias, op)


def back_through(
    op: nn.Conv2d | nn.Linear | None,
    g_B: Tensor,
    wanted: Sequence[bool],
    rate_B: Tensor,
    weight: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of a map's input, weight and bias as far as wanted, for that of its output."""
    if op is None:
        return g_B, None, None
    g_B = g_B.to(weight.dtype)  # under autocast a GPU sums in fp32
    if isinstance(op, nn.Conv2d):
        return conv_gradients(op, rate_B, weight, g_B, wanted)
    rows = g_B.flatten(0, -2)
    grad_r = g_B @ weight if wanted[0] else None
    grad_w = rows.T @ rate_B.flatten(0, -2) if wanted[1] else None
    return grad_r, grad_w, rows.sum(0) if wanted[2] else None


def refuse_second() -> None:
    """Raise where a graph of the backward pass itself is asked for: it would lack terms."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a fused layer step has no second derivative; use the reference kernel for one"
        )


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


def pixels(x_B: Tensor) -> Tensor:
    """[B, C, H, W] or [B, F] as contiguous [M, C]; a view if channels are last."""
    if x_B.dim() == 2:
        return x_B.contiguous()
    return x_B.permute(0, *range(2, x_B.dim()), 1).reshape(-1, x_B.shape[1]).contiguous()


def unpixels(x: Tensor, shape: torch.Size) -> Tensor:
    """[M, C] as [B, C, ...], a view."""
    if len(shape) == 2:
        return x
    B, C, *sites = shape
    return x.view(B, *sites, C).permute(0, len(shape) - 1, *range(1, len(shape) - 1))


class _Carry(torch.autograd.Function):
    """Values of all timesteps; a gradient on any of them is one on the mean `Current`."""

    @staticmethod
    def forward(
        ctx: Any,
        s_TB: Tensor,
        rate_B: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        op: nn.Module | None,
    ) -> Tensor:
        ctx.save_for_backward(*_kept(op, rate_B, weight))
        ctx.op = op
        return s_TB.view_as(s_TB)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second()
        g_B, wanted = grads[0].sum(0), ctx.needs_input_grad[1:4]
        return (None, *back_through(ctx.op, g_B, wanted, *ctx.saved_tensors), None)


class Step(torch.autograd.Function):
    """Spikes and rate: gradient times eligibility, the Jacobian of the BatchNorm of means, the map.

    A gradient on any timestep of the spikes is one on the rate.  `back` works on arrays [M, C]
    (M batch x pixels), as `step_backward`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rate_B: Tensor,
        op_weight: Tensor | None,
        op_bias: Tensor | None,
        op: nn.Module | None,
        rest_B: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        found: Any,
        back: Any,
    ) -> tuple[Tensor, Tensor]:
        """Spikes and rate, as found."""
        ctx.set_materialize_grads(False)
        ctx.op, ctx.back = op, back
        ctx.dtypes = (rate_B.dtype, None if rest_B is None else rest_B.dtype)
        affine = found.affine
        ctx.batch_stats = affine is not None and affine.batch_stats
        a = None if affine is None else affine.a
        ctx.save_for_backward(found.elig, found.xhat, a, *_kept(op, rate_B, op_weight))
        return found.s_TB, found.rate_B

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of what `forward` was given."""
        refuse_second()
        (g_TB, g_B), (elig, xhat, a, *kept) = grads, ctx.saved_tensors
        if g_TB is not None:
            g_B = g_TB.sum(0) if g_B is None else g_B + g_TB.sum(0)
        if g_B is None:
            return (None,) * 9
        dtype, rest_dtype = ctx.dtypes
        rested = rest_dtype is not None
        gc, gz, gweight, gbias = ctx.back(pixels(g_B), elig, xhat, a, rested, ctx.batch_stats)
        gc_B = unpixels(gc, g_B.shape).to(dtype)
        grest_B = None if gz is None else unpixels(gz, g_B.shape).to(rest_dtype)
        of_map = back_through(ctx.op, gc_B, ctx.needs_input_grad[:3], *kept)
        return *of_map, None, grest_B, gweight, gbias, None, None


def _kept(
    op: nn.Module | None, rate_B: Tensor, weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What the gradient of a map needs; nothing where there is none."""
    return (None, None) if op is None else (rate_B, weight)


def step_backward(
    g: Tensor, elig: Tensor, xhat: Tensor | None, a: Tensor | None, rested: bool, batch_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the mean input and the rest [M, C], of weight and bias, for that of the rate."""
    gz = g * elig
    gc, grest = gz, gz if rested else None
    if xhat is None or a is None:
        return gc, grest, None, None
    gbias, gweight = gz.sum(0), (gz * xhat).sum(0)
    if batch_stats:
        gc = gc - gbias / len(gz) - xhat * (gweight / len(gz))
    return gc * a, grest, gweight, gbias


class MeanNorm(torch.autograd.Function):
    """BatchNorm with statistics of other values, whose gradients are those of its own input.

    With xhat = (c - mean) r, r = 1 / sqrt(var + eps) and <.> the mean over a channel:

        d xhat = r (dc - <dc>) - r xhat <xhat (dc - <dc>)>

    Only xhat is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, c_B: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        """The normalised input, in its own dtype."""
        scale = torch.rsqrt(var.clamp_min(0) + eps)
        xhat_B = (wide(c_B) - mean) * scale
        ctx.save_for_backward(xhat_B, weight, scale)
        ctx.dtype = c_B.dtype
        weight, bias = weight.view(1, -1, 1, 1), bias.view(1, -1, 1, 1)
        return torch.addcmul(bias, xhat_B, weight).to(c_B.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what `forward` was given."""
        refuse_second()
        xhat_B, weight, scale = ctx.saved_tensors
        axes, g_B = (0, 2, 3), wide(grads[0])
        by_xhat = g_B * xhat_B
        gbias, gweight = g_B.sum(axes), by_xhat.sum(axes)
        # Means over the batch of all processes, of which the sums above are this one's part.
        mean_g, mean_gx = group.mean(g_B, axes), group.mean(by_xhat, axes)
        centred_B = xhat_B - group.mean(xhat_B, axes)
        gc_B = (g_B - mean_g - centred_B * mean_gx) * (scale * weight.view(1, -1, 1, 1))
        return gc_B.to(ctx.dtype), gweight, gbias, None, None, None
