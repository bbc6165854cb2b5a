"""1x1 convolutions with a stride, led around a fault of oneDNN (uxlfoundation/oneDNN#6035).

Its weight gradient writes past a buffer if the input has channels last, a stride, and fewer
channels than fill a vector register (8 with AVX2, 16 with AVX-512): the heap is damaged, and the
gradient can be wrong without a word.  Leaving out first what the stride passes over: the same map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VECTOR = 16
_BACKWARD = torch.ops.aten.convolution_backward.default


def unstrided(op: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input that the weights see, [B, C, H, W], and the stride with which they still see it."""
    harmless = x.device.type != "cpu" or op.in_channels >= VECTOR * op.groups
    if harmless or op.stride == (1, 1) or op.kernel_size != (1, 1) or any(op.padding):
        return x, op.stride
    down, right = op.stride
    return x[..., ::down, ::right], (1, 1)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution with a stride."""

    def forward(self, input: Tensor) -> Tensor:
        """Its output, [B, C, H, W]."""
        x, stride = unstrided(self, input)
        return F.conv2d(x, self.weight, self.bias, stride, self.padding, groups=self.groups)


def conv_gradients(
    op: nn.Conv2d, x: Tensor, weight: Tensor, g: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients for input, weights and bias, as far as wanted, given that of the output."""

    def backward(x: Tensor, stride: tuple[int, ...], wanted: Sequence[bool]) -> list[Tensor | None]:
        sizes = [op.out_channels] if wanted[2] else None
        found: list[Tensor | None] = _BACKWARD(
            g, x, weight, sizes, stride, op.padding, op.dilation, False, [0, 0], op.groups, wanted
        )
        return found

    seen, stride = unstrided(op, x)
    if seen is x:
        return tuple(backward(x, op.stride, wanted))
    for_x = backward(x, op.stride, [True, False, False])[0] if wanted[0] else None
    return (for_x, *backward(seen, stride, [False, *wanted[1:]])[1:])
