"""Spikes, synaptic operations and multiply-accumulates, counted at evaluation.

The `Meter` is one more `run`: no hooks to register, none to leak.  Counters are exact integers on
the device; no spike tensor is kept.

    spikes   number of spikes, all timesteps
    SOPs     accumulates: for integer inputs (spikes and their sums) value x fan-out, exact at
             borders, strides and groups
    MACs     multiply-accumulates: the dense count, for inputs that are not integers (the analog
             image of the first layer, average-pooled spikes), zeros included

Biases and BatchNorm are not counted: they fold into weights at inference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snnbench.models.layer import Layer, Network, has_weights, over_time, weighted
from snnbench.neurons import LIF


@dataclass
class _Synapse:
    integer: Tensor
    weighted_spikes: Tensor
    dense: int = 0


@dataclass
class _Counts:
    spikes: Tensor
    neuron_steps: int = 0
    synapses: list[_Synapse] = field(default_factory=list)


class Meter:
    """Counts what passes through the layers of a network: `net(x_TB, meter)`."""

    def __init__(self, net: Network) -> None:
        self._names = {layer: name for name, layer in net.layers().items()}
        self._counts: dict[Layer, _Counts] = {}
        self._fan_out: dict[tuple[nn.Module, torch.Size], Tensor] = {}

    def __call__(self, layer: Layer, *x_TB: Tensor) -> Tensor:
        """Run the layer and count."""
        counts = self._counts.get(layer)
        if counts is None:
            zero = torch.zeros((), dtype=torch.int64, device=x_TB[0].device)
            synapses = [_Synapse(zero == 0, zero.clone()) for _ in layer.synapses]
            counts = self._counts[layer] = _Counts(zero.clone(), 0, synapses)
        for synapse, x, c in zip(layer.synapses, x_TB, counts.synapses, strict=True):
            self._count_synapse(synapse, x, c)
        s_TB: Tensor = layer(*x_TB)
        if isinstance(layer.physics, LIF):
            counts.spikes += s_TB.count_nonzero()
            counts.neuron_steps += s_TB.numel()
        return s_TB

    def _count_synapse(self, synapse: nn.Module, x_TB: Tensor, count: _Synapse) -> None:
        if not has_weights(synapse):
            return
        before, op, _ = weighted(synapse)
        for part in before:
            x_TB = over_time(part, x_TB)
        count.integer &= (x_TB == x_TB.round()).all()
        sample = x_TB.shape[2:]
        if (op, sample) not in self._fan_out:
            self._fan_out[op, sample] = fan_out(op, sample).to(x_TB.device)
        each = self._fan_out[op, sample]
        # Sums of integers below 2^53 are exact in float64.
        per_site = x_TB.flatten(0, 1).double().sum(0)
        count.weighted_spikes += (per_site * each).sum().round().long()
        count.dense += int(each.sum()) * x_TB.shape[0] * x_TB.shape[1]

    def totals(self, samples: int) -> dict[str, Any]:
        """Figures per sample, of the network and of each layer, in the order of the data."""
        layers = [self._layer(layer, counts, samples) for layer, counts in self._counts.items()]
        spikes = sum(int(c.spikes) for c in self._counts.values())
        neuron_steps = sum(c.neuron_steps for c in self._counts.values())
        return {
            "spikes_per_sample": spikes / samples if neuron_steps else None,
            "firing_rate": spikes / neuron_steps if neuron_steps else None,
            "sops_per_sample": sum(entry["sops_per_sample"] for entry in layers),
            "macs_per_sample": sum(entry["macs_per_sample"] for entry in layers),
            "layers": layers,
        }

    def _layer(self, layer: Layer, counts: _Counts, samples: int) -> dict[str, Any]:
        fed = [(bool(s.integer), int(s.weighted_spikes), s.dense) for s in counts.synapses]
        spiking = isinstance(layer.physics, LIF)
        return {
            "layer": self._names[layer],
            "spikes_per_sample": int(counts.spikes) / samples if spiking else None,
            "firing_rate": int(counts.spikes) / counts.neuron_steps if spiking else None,
            "sops_per_sample": sum(ops for integer, ops, _ in fed if integer) / samples,
            "macs_per_sample": sum(dense for integer, _, dense in fed if not integer) / samples,
        }


def fan_out(op: nn.Conv2d | nn.Linear, sample: torch.Size) -> Tensor:
    """Number of outputs that each element of the op's input reaches, float64, input-shaped."""
    if isinstance(op, nn.Linear):
        return torch.full(sample, op.out_features, dtype=torch.float64)
    weight = torch.ones(op.weight.shape, dtype=torch.float64)
    options: tuple[Any, ...] = (op.stride, op.padding, op.dilation, op.groups)
    with torch.enable_grad():
        probe = torch.zeros((1, *sample), dtype=torch.float64, requires_grad=True)
        torch.nn.functional.conv2d(probe, weight, None, *options).sum().backward()
    assert probe.grad is not None
    return probe.grad[0]
