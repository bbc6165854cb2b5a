"""Whether a network can learn: where numbers end, where gradients and neurons die.

first bad layer    the first one, in the order of the data, that puts out NaN or infinity
gradient norm      L2 norm of a layer's gradient, by depth: what "vanishing" means
window share       share of (neuron, timestep, sample) whose surrogate derivative is at least a
                   tenth of its largest value: the others pass on next to no gradient
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from snnbench.models.layer import Layer, Network, over_time
from snnbench.neurons import LIF

PART = 0.1  # of the surrogate's peak


class _Found(Exception):
    """Ends the forward pass at the first bad layer."""


@torch.no_grad()
def first_bad_layer(net: Network, x_TB: Tensor) -> str:
    """What is not finite first: the input, a layer's weights or its output, or only the loss."""
    if not x_TB.isfinite().all():
        return "the input"
    names = {layer: name for name, layer in net.layers().items()}

    def run(layer: Layer, *x: Tensor) -> Tensor:
        if not all(p.isfinite().all() for p in layer.parameters()):
            raise _Found(f"the weights of layer '{names[layer]}'")
        s_TB: Tensor = layer(*x)
        if not s_TB.isfinite().all():
            raise _Found(f"the output of layer '{names[layer]}'")
        return s_TB

    kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
    try:
        net(x_TB, run)
    except _Found as found:
        return str(found)
    finally:
        for name, buffer in net.named_buffers():
            buffer.copy_(kept[name])
    return "the loss alone"


def gradient_norms(net: Network) -> dict[str, float | None]:
    """L2 norm of the gradient of each layer's parameters; None where it has none, or overflowed."""
    norms: dict[str, Tensor | None] = {}
    for name, layer in net.layers().items():
        grads = [p.grad.float() for p in layer.parameters() if p.grad is not None]
        norms[name] = torch.stack([g.norm() for g in grads]).norm() if grads else None
    found = {name: None if norm is None else float(norm) for name, norm in norms.items()}
    return {n: v if v is not None and math.isfinite(v) else None for n, v in found.items()}


@torch.no_grad()
def window_shares(net: Network, x_TB: Tensor) -> dict[str, float]:
    """Share of every spiking layer's membranes that are inside the surrogate's window.

    The network is run in plain torch; use it in evaluation mode.
    """
    names = {layer: name for name, layer in net.layers().items()}
    shares: dict[str, float] = {}

    def run(layer: Layer, *x: Tensor) -> Tensor:
        if not isinstance(layer.physics, LIF):
            out_TB: Tensor = layer(*x)
            return out_TB
        neuron, c_TB = layer.neuron, layer.current(*x, apply=over_time)
        peak = neuron.surrogate.grad(torch.zeros((), device=c_TB.device))
        v, inside, s_T = None, torch.zeros((), device=c_TB.device), []
        for c in c_TB.expand(len(x_TB), *c_TB.shape[1:]):
            s, v_pre, v = neuron.step(c, v)
            inside += (neuron.fire_grad(v_pre) >= PART * peak).sum()
            s_T.append(s)
        s_TB = torch.stack(s_T)
        shares[names[layer]] = float(inside) / s_TB.numel()
        return s_TB.to(c_TB.dtype)

    net(x_TB, run)
    return shares


def dead_layers(layers: list[dict[str, Any]]) -> list[str]:
    """Layers of a `Meter` none of whose neurons ever fired."""
    return [entry["layer"] for entry in layers if entry["firing_rate"] == 0]
