"""The reference kernel: the plain-torch scan of `neurons`, on every device and in every dtype."""

from __future__ import annotations

from torch import Tensor

from snnbench.neurons import LIF, ReLU

source = "plain torch, one autograd node per operation and timestep"


def unavailable() -> str | None:
    """Why this kernel cannot run here; None if it can."""
    return None


def scan(neuron: LIF | ReLU, c_TB: Tensor) -> Tensor:
    """Spikes s_TB of a population at rest that is fed the current c_TB."""
    return neuron.scan(c_TB)
