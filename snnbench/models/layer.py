"""The one primitive of every network, and the one seam that methods and meters pass through.

A `Layer` is a population of neurons fed by one or more stateless synapses.  A network's `forward`
hands every layer to `run(layer, *inputs)` and otherwise composes tensors freely.  Signals are
time-first: x_TB is [T, B, ...].
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from snnbench.kernels.reference import Reference
from snnbench.kernels.saved import Keeper
from snnbench.neurons import LIF, ReLU
from snnbench.training.group import SyncedBatchNorm2d

Run = Callable[..., Tensor]
Apply = Callable[[nn.Module, Tensor], Tensor]


def over_time(
    module: Callable[[Tensor], Tensor], x_TB: Tensor, kernel: Reference | None = None
) -> Tensor:
    """Apply a stateless module to all timesteps at once: [T, B, ...] -> [T, B, ...]."""
    out = applied(module, x_TB.flatten(0, 1), kernel)
    return out.view(*x_TB.shape[:2], *out.shape[1:])


def applied(
    module: Callable[[Tensor], Tensor], x_B: Tensor, kernel: Reference | None = None
) -> Tensor:
    """Apply a stateless module to a batch, keeping no more of it than its gradient needs.

    A kernel may have code of its own for an average; without any, torch's is used.
    """
    # A subclass may save what its gradient does need.
    average = type(module) in (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    with shapes_only() if average else nullcontext():
        if kernel is not None and type(module) is nn.AvgPool2d:
            return kernel.average(module, x_B)
        return module(x_B)


def shapes_only() -> torch.autograd.graph.saved_tensors_hooks:
    """Keep shapes for the backward pass of an average, which needs no values but saves them."""

    def shape(x: Tensor) -> dict[str, Any]:
        layout = {"size": x.shape, "stride": x.stride()}
        return layout | {"dtype": x.dtype, "device": x.device}

    return torch.autograd.graph.saved_tensors_hooks(shape, lambda s: torch.empty_strided(**s))


class Layer(nn.Module):
    """Neurons fed by synapses whose outputs are summed as input current.

    Without a neuron it is a read-out: its output is the current itself.  The kernel normalises the
    first synapse, adds the others and runs the neurons over all timesteps.
    """

    def __init__(self, *synapses: nn.Module, neuron: LIF | ReLU | None) -> None:
        super().__init__()
        self.synapses = nn.ModuleList(synapses)
        self.physics = neuron
        self.kernel = Reference()
        self.keeper: Keeper | None = None  # of what the backward pass needs; None: autograd's own
        if isinstance(neuron, LIF) and neuron.learn_decay:
            self.decay_logit = nn.Parameter(torch.logit(torch.tensor(neuron.decay)))

    @property
    def neuron(self) -> Any:
        """The population's physics, with the decay as learned so far; None for a read-out."""
        if isinstance(self.physics, LIF) and self.physics.learn_decay:
            learned = copy.copy(self.physics)
            object.__setattr__(learned, "decay", torch.sigmoid(self.decay_logit))
            return learned
        return self.physics

    def forward(self, *x_TB: Tensor, apply: Apply = over_time) -> Tensor:
        """Spikes s_TB, or the current where there is no neuron.

        `apply` is how a map with weights acts on its input.
        """
        if self.physics is None:
            return self.current(*x_TB, apply=apply)
        first, *others = self.synapses
        (parts, norm), T = normed(first), len(x_TB[0])
        y_TB = through(parts, frames(x_TB[0]), apply, self.kernel)
        rest_TB, rest_norm = self._rest(others, x_TB[1:], apply)
        # A method's own way through the weights may round otherwise than the recipe would; and a
        # norm that is not fused would count a batch twice.
        same = apply is over_time and not any(isinstance(p, nn.BatchNorm2d) for p in parts)
        if self.keeper is not None and same and torch.is_grad_enabled():
            again = partial(through, parts, apply=over_time, kernel=self.kernel)
            self.keeper.output(y_TB, again, frames(x_TB[0]))
        s_TB = self.kernel.fire(self.neuron, y_TB, norm, rest_TB, T, rest_norm)
        if self.keeper is not None and isinstance(self.physics, LIF):
            self.keeper.spikes(s_TB)
        return s_TB

    def _rest(
        self, synapses: list[nn.Module], x_TB: tuple[Tensor, ...], apply: Apply
    ) -> tuple[Tensor | None, nn.BatchNorm2d | None]:
        """What the synapses after the first add, and a BatchNorm that is still to be applied."""
        inputs = [self.kernel.twin(x) for x in x_TB]
        if len(inputs) == len(synapses) == 1:
            parts, norm = normed(synapses[0])
            return through(parts, inputs[0], apply, self.kernel), norm
        rest = [through(f, x, apply, self.kernel) for f, x in zip(synapses, inputs, strict=True)]
        return (sum(rest[1:], start=rest[0]) if rest else None), None

    def current(self, *x_TB: Tensor, apply: Apply = over_time) -> Tensor:
        """Input current c_TB: one input per synapse."""
        currents = zip(self.synapses, x_TB, strict=True)
        first, *rest = (through(f, x, apply, self.kernel) for f, x in currents)
        return sum(rest, start=first)


def parts_of(synapse: nn.Module) -> list[nn.Module]:
    """The modules of a synapse, in order."""
    return list(synapse) if isinstance(synapse, nn.Sequential) else [synapse]


def normed(synapse: nn.Module) -> tuple[list[nn.Module], nn.BatchNorm2d | None]:
    """The modules of a synapse, and the BatchNorm at its end, if a kernel can normalise."""
    *parts, last = parts_of(synapse)
    if isinstance(last, nn.BatchNorm2d) and not isinstance(last, SyncedBatchNorm2d):
        return parts, last
    return [*parts, last], None


def through(
    parts: nn.Module | list[nn.Module], x_TB: Tensor, apply: Apply, kernel: Reference
) -> Tensor:
    """What the modules of a synapse make of its input."""
    for part in parts if isinstance(parts, list) else parts_of(parts):
        if isinstance(part, nn.Identity):
            continue
        weights = isinstance(part, nn.Conv2d | nn.Linear)
        x_TB = apply(part, x_TB) if weights else over_time(part, x_TB, kernel)
    return x_TB


def frames(x_TB: Tensor) -> Tensor:
    """One frame [1, B, ...] of an input that is the same at every timestep; else the input."""
    return x_TB[:1] if x_TB.stride(0) == 0 else x_TB


class TdBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose normalised value is multiplied by alpha * v_th (STBP-tdBN, eq. 5-8).

    alpha is 1, or 1 / sqrt(2) where two synapses of one layer are summed.
    """

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__(channels)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """The normalised, scaled and shifted input."""
        return super().forward(x) * self.scale + (1 - self.scale) * self.bias.view(1, -1, 1, 1)


def has_weights(synapse: nn.Module) -> bool:
    """Whether the synapse has a convolution or linear map; a shortcut or a pooling has none."""
    return any(isinstance(m, nn.Conv2d | nn.Linear) for m in synapse.modules())


def weighted(synapse: nn.Module) -> tuple[list[nn.Module], nn.Conv2d | nn.Linear, list[nn.Module]]:
    """Split a synapse into what comes before its weights, the weighted map, and what follows."""
    parts = parts_of(synapse)
    for i, part in enumerate(parts):
        if isinstance(part, nn.Conv2d | nn.Linear):
            return parts[:i], part, parts[i + 1 :]
    raise TypeError(f"a synapse needs a Conv2d or Linear, this one has {parts}")


class Network(nn.Module):
    """A spiking network: `forward(x_TB, run) -> logits_TBK`."""

    @dataclass(frozen=True)
    class Config:
        """Architecture options, validated from the suite's [model] table."""

    source: ClassVar[str]

    def __init__(
        self, config: Any, shape: tuple[int, ...], classes: int, neuron: LIF | ReLU
    ) -> None:
        super().__init__()
        self.config, self.shape, self.classes, self.neuron = config, shape, classes, neuron

    def forward(self, x_TB: Tensor, run: Run = Layer.__call__) -> Tensor:
        """Logits of every timestep, [T, B, K]."""
        raise NotImplementedError

    def taps(self, each: Literal["stage", "block"] = "stage") -> list[tuple[Layer, int]]:
        """Layers, with their width, whose spikes an auxiliary head may read; never the last."""
        return []

    def layers(self) -> dict[str, Layer]:
        """Every layer by its name, in the order of definition."""
        return {name: m for name, m in self.named_modules() if isinstance(m, Layer)}
