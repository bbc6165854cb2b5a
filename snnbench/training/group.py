"""The processes that train one network together, each on its share of every batch.

Alone, everything here gives back what it was given.  Together, all processes must call the same
functions in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(minutes=10)  # with a process that does not answer


def join(rank: int, size: int, address: str, device: torch.device) -> None:
    """Become one of `size` processes that meet at `address` (tcp://host:port)."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=address, rank=rank, world_size=size, timeout=PATIENCE
    )


def leave() -> None:
    """Part from the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if size() > 1 else 0


def share(x_B: Tensor) -> Tensor:
    """This process's part of a batch, which can be divided by the number of processes."""
    return x_B if size() == 1 else x_B.chunk(size())[rank()]


def total(x: Tensor) -> Tensor:
    """Sum of `x` over all processes; its gradient is the sum of theirs."""
    if size() == 1:
        return x
    summed: Tensor = _Total.apply(x)
    return summed


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        summed = x.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        summed = grads[0].clone()
        dist.all_reduce(summed)
        return summed


def mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mean over the axes and over all processes, the axes kept; all have the same shape."""
    return total(x.mean(axes, keepdim=True)) / size()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Let every process have the mean of all gradients: that of the whole batch's mean loss."""
    if size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for grad, summed in zip(
        grads, flat.div_(size()).split([g.numel() for g in grads]), strict=True
    ):
        grad.copy_(summed.view_as(grad))


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes, made from one over a process's own.

    torch's own needs a GPU; this one is the same sums on any device.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.training = norm.training
        self.scale = getattr(norm, "scale", 1.0)  # of tdBN

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input, in its own dtype."""
        axes, shape = (0, 2, 3), (1, -1, 1, 1)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if self.training:
            middle = mean(wide, axes)
            centred = wide - middle
            var = mean(centred.square(), axes)
            with torch.no_grad():
                self._move(middle.flatten(), var.flatten(), x.numel() // x.shape[1] * size())
        else:
            assert self.running_mean is not None
            assert self.running_var is not None
            centred = wide - self.running_mean.view(shape)
            var = self.running_var.view(shape)
        weight = (self.weight * self.scale).view(shape)
        out: Tensor = centred * torch.rsqrt(var + self.eps) * weight + self.bias.view(shape)
        return out.to(x.dtype)

    def _move(self, middle: Tensor, var: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(middle, self.momentum)
        self.running_var.lerp_(var * (count / max(1, count - 1)), self.momentum)


def synchronise(net: nn.Module) -> None:
    """Let every BatchNorm of the network see the batch of all processes."""
    if size() == 1:
        return
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d) and not isinstance(child, SyncedBatchNorm2d):
                setattr(module, name, SyncedBatchNorm2d(child))
