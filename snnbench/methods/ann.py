"""The artificial twin: the same network with ReLU for spikes, one timestep, plain backpropagation.

The reference row of a table: what the architecture reaches without spikes, and at what cost.
"""

from __future__ import annotations

from snnbench.methods.base import Method
from snnbench.models.layer import Network
from snnbench.neurons import ReLU


class ANN(Method):
    """The network's artificial twin, ReLU instead of spikes at T = 1: the reference row."""

    source = "the same network, trained by plain backpropagation"
    neuron = ReLU()
    bptt_limit = ({}, 1)

    def supports(self, net: Network, T: int) -> str | None:
        """Identical frames would be computed T times over."""
        return None if T == 1 else "the artificial twin has one timestep; give it T = 1"
