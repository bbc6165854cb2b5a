"""Average pooling over windows that do not overlap, in one pass forward and one backward.

Torch's own walks every window of every input position to find its gradient, which costs more than
a layer of neurons.  A backend that has `average_dtypes` does it on contiguous arrays, B images of
h x w windows of k x k sites:

    average(x, k)             x [B, k h, k w, C] to [B, h, w, C]
    average_backward(g, k)    the gradient of x for that of the means
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from snnbench.kernels import rates


def window(pool: nn.AvgPool2d, x_B: Tensor) -> int | None:
    """Side of the square windows that cover x_B [B, C, H, W] exactly; None if they do not."""
    k = _side(pool.kernel_size)
    plain = _side(pool.padding) == 0 and pool.divisor_override is None
    if k is None or not plain or _side(pool.stride) != k or x_B.dim() != 4:
        return None
    return None if x_B.shape[2] % k or x_B.shape[3] % k else k


def average(x_B: Tensor, k: int, backend: Any) -> Tensor:
    """Means of k x k windows of x_B [B, C, H, W], channels last."""
    out_B: Tensor = _Average.apply(x_B, k, backend)
    return out_B


def _side(pair: Any) -> int | None:
    """The number of a pair of equal ones."""
    one, other = _pair(pair)
    return int(one) if one == other else None


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_B: Tensor, k: int, backend: Any) -> Tensor:
        ctx.k, ctx.backend = k, backend
        found: Tensor = backend.average(x_B.permute(0, 2, 3, 1).contiguous(), k)
        return found.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rates.refuse_second()
        g = grads[0].permute(0, 2, 3, 1).contiguous()
        return ctx.backend.average_backward(g, ctx.k).permute(0, 3, 1, 2), None, None
