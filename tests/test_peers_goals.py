"""Goal C5, exact: bytes kept for the backward pass, and operations of a step; no clock.

The contestants are those of `snnbench peers`, on its three networks at its batch sizes.
"""

from __future__ import annotations

import pytest
import torch

from snnbench.kernels import native
from snnbench.peers import bench, child, contestants
from snnbench.peers.contestants import Entry, Setup

WHY_NOT = native.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

T = 4
BOUNDS = {"ours:native+cl": 9.0, "ours:native+cl+bf16": 4.6, "ours:native:rate+cl": 3.2}
# Bytes for each neuron and timestep.
KEPT = {
    "vgg11": (4.232, 2.396, 2.384),
    "resnet18": (8.005, 4.092, 3.09),
    "digits": (6.01, 3.081, 3.01),
}


def built(net: str, name: str) -> tuple[contestants.Contestant, Setup]:
    described = bench.NETS[net]
    setup = Setup(**described | {"shape": tuple(described["shape"]), "T": T})
    return contestants.build(Entry(**bench.parse(name)[0]), setup), setup


@pytest.mark.parametrize("net", bench.NETS)
def test_bytes_kept_for_each_neuron_and_timestep(net):
    for (name, bound), shown in zip(BOUNDS.items(), KEPT[net], strict=True):
        contestant, setup = built(net, name)
        ((x_B, y_B),) = contestants.batches(setup, 1, setup.B)
        kept = contestant.saved_bytes(contestant.laid_out(x_B), y_B)
        found = kept / (contestants.neurons(setup) * setup.B * T)
        assert found <= bound
        assert round(found, 3) == shown, name


@pytest.mark.parametrize(
    ("net", "name", "most"),
    [
        ("vgg11", "ours:native+cl", 900),
        ("resnet18", "ours:native+cl", 1600),
        ("digits", "ours:native+cl", 250),
        ("digits", "ours:native:rate+cl", 310),
    ],
)
def test_operations_of_a_step(net, name, most):
    contestant, setup = built(net, name)
    ((x_B, y_B),) = contestants.batches(setup, 1, 2)
    x_B = contestant.laid_out(x_B)
    contestant.step(x_B, y_B)
    assert child.aten_operations(lambda: contestant.step(x_B, y_B)) <= most
