"""Gradient fidelity: how a method's gradient compares with that of exact BPTT, layer by layer.

    cosine      <g, g_bptt> / (|g| |g_bptt|)       1: the same direction
    norm ratio  |g| / |g_bptt|                     1: the same length

Both are taken on one fixed batch, of the plain loss for BPTT.  Nothing of the network, of its
BatchNorm statistics or of the random state is changed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from snnbench.methods.base import Method
from snnbench.models.layer import Network


def fidelity(
    method: Method, net: Network, x_TB: Tensor, target: Tensor, progress: float
) -> dict[str, Any]:
    """Cosine and norm ratio over all parameters, and of every layer."""
    mine = _gradients(method, net, x_TB, target, progress)
    exact = Method()
    exact.amplify = method.amplify
    bptt = _gradients(exact, net, x_TB, target, progress)
    layers = [{"layer": name, **_compare(mine[name], bptt[name])} for name in mine]
    every = _compare(torch.cat(list(mine.values())), torch.cat(list(bptt.values())))
    return {**every, "layers": layers}


def _gradients(
    method: Method, net: Network, x_TB: Tensor, target: Tensor, progress: float
) -> dict[str, Tensor]:
    """Gradient of each layer's parameters as one vector; the network is left as it was."""
    buffers = {k: b.clone() for k, b in net.named_buffers()}
    kept = [p.grad for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    try:
        with torch.random.fork_rng(devices=[]):
            method.backward(net, x_TB, target, progress)
        return {
            name: torch.cat(
                [
                    torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                    for p in layer.parameters()
                ]
            ).double()
            for name, layer in net.layers().items()
            if list(layer.parameters())
        }
    finally:
        for p, grad in zip(net.parameters(), kept, strict=True):
            p.grad = grad
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])


def _compare(g: Tensor, bptt: Tensor) -> dict[str, float | None]:
    """None where a gradient is zero or overflowed: it has no direction."""
    norm, reference = float(g.norm()), float(bptt.norm())
    if not math.isfinite(norm + reference):
        return {"cos": None, "norm_ratio": None}
    if norm == 0 or reference == 0:
        return {"cos": None, "norm_ratio": norm / reference if reference else None}
    return {"cos": float(g @ bptt) / (norm * reference), "norm_ratio": norm / reference}
