"""Spikes and operations, counted at evaluation.

The `Meter` is one more `run`: no hooks to register, none to leak.  It looks at signals in pieces
and keeps exact sums only: what it adds to memory is one counter per neuron (of a batch of
activations that is 1 / (T B)) and a piece of `PIECE` elements.

    spikes             number of spikes, also of every timestep
    firing rate        spikes / (neurons x T x samples)
    silent, saturated  share of neurons that spike at no step of any sample, or at every one
    SOPs               accumulates: for integer inputs (spikes and their sums) value x fan-out,
                       exact at borders, strides and groups
    MACs               multiply-accumulates: the dense count, for inputs that are not integers (the
                       analog image of the first layer, average-pooled spikes), zeros included
    dense MACs         what the same layers would cost without sparsity
    membrane updates   neurons x T

Biases and BatchNorm are not counted: they fold into weights at inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snnbench.models.layer import Layer, Network, has_weights, weighted
from snnbench.neurons import LIF

PIECE = 2**20  # elements looked at in one go


@dataclass
class _Synapse:
    integer: Tensor
    weighted_spikes: Tensor
    weights: int = 0
    inputs: int = 0
    dense: int = 0


@dataclass
class _Counts:
    by_neuron: Tensor | None = None  # spikes of every neuron, all samples and timesteps
    by_step: Tensor | None = None  # spikes of every timestep, all samples and neurons
    samples: int = 0
    outputs: int = 0
    synapses: list[_Synapse] = field(default_factory=list)


class Meter:
    """Counts what passes through the layers of a network: `net(x_TB, meter)`."""

    def __init__(self, net: Network) -> None:
        self._names = {layer: name for name, layer in net.layers().items()}
        self._counts: dict[Layer, _Counts] = {}
        self._fan_out: dict[tuple[nn.Module, torch.Size], Tensor] = {}
        self._dense: dict[tuple[nn.Module, torch.Size], int] = {}

    def __call__(self, layer: Layer, *x_TB: Tensor) -> Tensor:
        """Run the layer and count."""
        counts = self._counts.get(layer)
        if counts is None:
            zero = torch.zeros((), dtype=torch.int64, device=x_TB[0].device)
            synapses = [_Synapse(zero == 0, zero.clone()) for _ in layer.synapses]
            counts = self._counts[layer] = _Counts(synapses=synapses)
        for synapse, x, c in zip(layer.synapses, x_TB, counts.synapses, strict=True):
            self._count_synapse(synapse, x, c)
        s_TB: Tensor = layer(*x_TB)
        if isinstance(layer.physics, LIF):
            _count_spikes(s_TB, counts)
        counts.samples += s_TB.shape[1]
        counts.outputs = s_TB[0, 0].numel()
        return s_TB

    def _count_synapse(self, synapse: nn.Module, x_TB: Tensor, count: _Synapse) -> None:
        if not has_weights(synapse):
            return
        before, op, _ = weighted(synapse)
        for piece in _pieces(x_TB):
            for part in before:
                piece = part(piece)
            sample = piece.shape[1:]
            if (op, sample) not in self._fan_out:
                reached = fan_out(op, sample)
                self._fan_out[op, sample] = reached.float().to(piece.device)
                self._dense[op, sample] = int(reached.sum())
            each = self._fan_out[op, sample]
            count.integer &= (piece == piece.round()).all()
            # Spikes of a piece, and sums of a few, are far below 2^24: exact in fp32.
            per_site = piece.sum(0, dtype=torch.float32).double()
            count.weighted_spikes += (per_site * each).sum().round().long()
            count.dense += self._dense[op, sample] * len(piece)
            count.inputs = each.numel()
        count.weights = op.weight.numel()

    def spikes(self) -> Tensor:
        """Spikes so far, int64, without waiting for the device."""
        found = [c.by_step.sum() for c in self._counts.values() if c.by_step is not None]
        return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.int64)

    def totals(self) -> dict[str, Any]:
        """Figures per sample, of the network and of each layer, in the order of the data."""
        layers = [self._layer(layer, counts) for layer, counts in self._counts.items()]
        spiking = [entry for entry in layers if entry["firing_rate"] is not None]
        neuron_steps = sum(entry["membrane_updates_per_sample"] for entry in spiking)
        neurons = sum(entry["neurons"] for entry in spiking)
        total = {
            key: sum(entry[key] for entry in layers)
            for key in (
                "sops_per_sample",
                "macs_per_sample",
                "dense_macs_per_sample",
                "membrane_updates_per_sample",
            )
        }
        spikes = sum(entry["spikes_per_sample"] for entry in spiking)
        shares = {
            key: sum(entry[key] * entry["neurons"] for entry in spiking) / neurons
            if neurons
            else None
            for key in ("silent_share", "saturated_share")
        }
        return {
            "spikes_per_sample": spikes if spiking else None,
            "firing_rate": spikes / neuron_steps if spiking else None,
            **shares,
            **total,
            "layers": layers,
        }

    def _layer(self, layer: Layer, counts: _Counts) -> dict[str, Any]:
        """Figures of one layer; those of spikes are None where it has no spiking neurons."""
        n = counts.samples
        fed = [(bool(s.integer), int(s.weighted_spikes), s.dense) for s in counts.synapses]
        seen: dict[str, Any] = dict.fromkeys(
            ("spikes_per_sample", "firing_rate", "silent_share", "saturated_share")
        )
        neurons = steps = 0
        if counts.by_neuron is not None and counts.by_step is not None:
            neurons, steps = counts.by_neuron.numel(), len(counts.by_step)
            spikes = int(counts.by_step.sum())
            seen = {
                "spikes_per_sample": spikes / n,
                "firing_rate": spikes / (neurons * steps * n),
                "silent_share": int((counts.by_neuron == 0).sum()) / neurons,
                "saturated_share": int((counts.by_neuron == steps * n).sum()) / neurons,
                "spikes_by_step": [int(count) / n for count in counts.by_step],
            }
        return {
            "layer": self._names[layer],
            "neurons": neurons,
            "weights": sum(s.weights for s in counts.synapses),
            "inputs": sum(s.inputs for s in counts.synapses),
            "outputs": counts.outputs,
            **seen,
            "sops_per_sample": sum(ops for integer, ops, _ in fed if integer) / n,
            "macs_per_sample": sum(dense for integer, _, dense in fed if not integer) / n,
            "dense_macs_per_sample": sum(dense for _, _, dense in fed) / n,
            "membrane_updates_per_sample": neurons * steps,
        }


def _pieces(x_TB: Tensor) -> Iterator[Tensor]:
    """The frames of a signal, [some of T B, ...], a bounded number of elements at a time."""
    frames = x_TB.flatten(0, 1)
    yield from frames.split(max(1, PIECE // frames[0].numel()))


def _count_spikes(s_TB: Tensor, counts: _Counts) -> None:
    if counts.by_neuron is None or counts.by_step is None:
        counts.by_neuron = torch.zeros(s_TB.shape[2:], dtype=torch.int32, device=s_TB.device)
        counts.by_step = torch.zeros(len(s_TB), dtype=torch.int64, device=s_TB.device)
    by_frame = []
    for piece in _pieces(s_TB):
        counts.by_neuron += piece.sum(0, dtype=torch.float32).int()
        # A frame of more than 2^24 neurons would not be exact in fp32.
        by_frame.append(piece.flatten(1).sum(1, dtype=torch.float32).long())
    counts.by_step += torch.cat(by_frame).view(s_TB.shape[:2]).sum(1)


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
