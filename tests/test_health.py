"""The first bad layer, gradient norms, and membranes inside the surrogate's window."""

from __future__ import annotations

import math

import pytest
import torch

from snnbench.measure.health import dead_layers, first_bad_layer, gradient_norms, window_shares
from snnbench.measure.spikes import Meter
from snnbench.models.convnet import ConvNet
from snnbench.models.layer import Layer
from snnbench.neurons import LIF, Rectangle, Sigmoid, Triangle
from tests.test_measure import Chain, linear

pytestmark = pytest.mark.usefixtures("one_thread")


def convnet() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(ConvNet.Config(width=3), (1, 6, 6), 5, LIF())


def test_a_healthy_network_has_only_the_loss_to_blame():
    assert first_bad_layer(convnet(), torch.rand(2, 3, 1, 6, 6)) == "the loss alone"


def test_a_bad_input_is_named():
    x_TB = torch.rand(2, 3, 1, 6, 6)
    x_TB[1, 0, 0, 0, 0] = math.nan
    assert first_bad_layer(convnet(), x_TB) == "the input"


@pytest.mark.parametrize("name", ["conv1", "conv2", "readout"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_weights_are_named(name, value):
    net = convnet()
    next(net.layers()[name].parameters()).data.view(-1)[0] = value
    found = first_bad_layer(net, torch.rand(2, 3, 1, 6, 6))
    assert found == f"the weights of layer '{name}'"


def test_an_output_that_overflows_is_named_and_statistics_are_kept():
    net = convnet()
    net.layers()["readout"].synapses[0][-1].weight.data.fill_(3e38)
    before = {k: v.clone() for k, v in net.named_buffers()}
    assert first_bad_layer(net.train(), torch.rand(2, 3, 1, 6, 6)) == (
        "the output of layer 'readout'"
    )
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())


def test_gradient_norms_by_hand():
    net = Chain(Layer(linear([[3.0, 4.0]]), neuron=None), Layer(linear([[2.0]]), neuron=None))
    assert set(gradient_norms(net).values()) == {None}
    net(torch.tensor([[[1.0, 1.0]]])).sum().backward()
    # d/dw1 = 2 * (1, 1), d/dw2 = 3 + 4
    assert gradient_norms(net) == {
        "chain.0": pytest.approx(math.sqrt(8)),
        "chain.1": pytest.approx(7),
    }


@pytest.mark.parametrize(
    ("surrogate", "inside"),
    [
        # u = v_pre - 1; derivative at least a tenth of its largest value where |u| <= ...
        (Triangle(width=1.0), 0.9),
        (Rectangle(width=1.0), 0.5),
        (Sigmoid(slope=4.0), 0.909),  # 4 q (1 - q) = 0.1
    ],
)
def test_the_window_of_a_surrogate(surrogate, inside):
    def share(v: float) -> float:
        net = Chain(Layer(linear([[1.0]]), neuron=LIF(surrogate=surrogate)))
        return window_shares(net, torch.full((1, 1, 1), 1.0 + v))["chain.0"]

    for sign in (-1, 1):
        assert share(sign * (inside - 0.02)) == 1
        assert share(sign * (inside + 0.02)) == 0


def test_window_shares_by_hand():
    """Membranes 0.5, 0.75, 0.875 of the first neuron: 2 of 3 within 0.45 of the threshold."""
    neuron = LIF(decay=0.5, surrogate=Rectangle(width=0.9))
    net = Chain(Layer(linear([[1.0]]), neuron=neuron), Layer(linear([[1.0]]), neuron=None))
    assert window_shares(net, torch.full((3, 1, 1), 0.5)) == {"chain.0": pytest.approx(2 / 3)}


def test_the_pass_sees_the_spikes_that_the_network_sends():
    net = convnet().eval()
    for layer in (net.conv1, net.conv2):
        layer.synapses[0][1].bias.data.fill_(0.8)
    x_TB = torch.rand(1, 3, 1, 6, 6).expand(4, -1, -1, -1, -1)
    shares = window_shares(net, x_TB)
    assert set(shares) == {"conv1", "conv2"}
    assert all(0 < share <= 1 for share in shares.values())


def test_silent_saturated_and_dead_by_hand():
    """Of three neurons one always fires, one never, one every other step."""
    net = Chain(Layer(linear([[1.0], [0.1], [0.7]]), neuron=LIF(decay=1.0)))
    meter = Meter(net)
    net(torch.ones(4, 2, 1), meter)
    (seen,) = meter.totals()["layers"]
    assert (seen["silent_share"], seen["saturated_share"]) == (1 / 3, 1 / 3)
    # The third: v = 0.7, 1.4 fires (0.4 left), 1.1 fires (0.1 left), 0.8.
    assert seen["spikes_by_step"] == [1, 2, 2, 1]
    assert seen["membrane_updates_per_sample"] == 3 * 4
    assert dead_layers(meter.totals()["layers"]) == []
    quiet = Chain(Layer(linear([[0.1]]), neuron=LIF()))
    meter = Meter(quiet)
    quiet(torch.ones(4, 2, 1), meter)
    assert dead_layers(meter.totals()["layers"]) == ["chain.0"]


def test_shares_of_a_network_are_weighted_by_neurons():
    """A layer of three, one of them silent and one saturated, before a silent layer of one."""
    first = Layer(linear([[1.0], [0.1], [0.7]]), neuron=LIF(decay=1.0))
    net = Chain(first, Layer(linear([[0.0, 0.0, 0.0]]), neuron=LIF()))
    meter = Meter(net)
    net(torch.ones(4, 2, 1), meter)
    totals = meter.totals()
    assert totals["silent_share"] == pytest.approx((1 + 1) / 4)
    assert totals["saturated_share"] == pytest.approx(1 / 4)


def test_a_neuron_that_fires_in_one_sample_only_is_not_saturated():
    net = Chain(Layer(linear([[1.0]]), neuron=LIF(decay=0.0)))
    meter = Meter(net)
    net(torch.tensor([[[1.0], [0.0]]] * 3), meter)  # three steps: sample 0 always, sample 1 never
    (seen,) = meter.totals()["layers"]
    assert (seen["silent_share"], seen["saturated_share"]) == (0, 0)
