"""Networks: published parameter counts, shapes, and the seam that methods pass through."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from snnbench.models.convnet import ConvNet
from snnbench.models.layer import Layer, Network, weighted
from snnbench.models.mlp import MLP
from snnbench.models.resnet import ResNet18
from snnbench.models.vgg import VGG11
from snnbench.neurons import LIF

T, B, K = 2, 3, 10

SMALL = {
    "mlp": (MLP, {"hidden": 6, "depth": 3}, (1, 8, 8)),
    "mlp-28": (MLP, {"hidden": 6, "depth": 2}, (1, 28, 28)),
    "convnet": (ConvNet, {"width": 2}, (1, 8, 8)),
    "convnet-28": (ConvNet, {"width": 2}, (1, 28, 28)),
    "convnet-rgb": (ConvNet, {"width": 2}, (3, 32, 32)),
    "vgg11": (VGG11, {"width": 1 / 16}, (3, 32, 32)),
    "vgg11-default": (VGG11, {"width": 1 / 16, "init": "default"}, (3, 32, 32)),
    "resnet18": (ResNet18, {"width": 1 / 16}, (3, 32, 32)),
}


@pytest.fixture(params=SMALL)
def net(request: pytest.FixtureRequest) -> Network:
    torch.manual_seed(0)
    model, config, shape = SMALL[request.param]
    net = model(model.Config(**config), shape, K, LIF(v_th=0.5))
    if model is MLP:  # no normalisation: keep the deeper layers awake
        for p in net.parameters():
            p.data.mul_(4)
    return net.double()


def batch(net: Network) -> Tensor:
    return torch.randn(T, B, *net.shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("model", "classes", "count"),
    [
        (ResNet18, 10, 11_173_962),
        (ResNet18, 100, 11_220_132),
        (VGG11, 10, 11_001_354),
        (VGG11, 100, 11_047_524),
    ],
)
def test_parameter_count(model, classes, count):
    with torch.device("meta"):
        net = model(model.Config(), (3, 32, 32), classes, LIF())
    assert sum(p.numel() for p in net.parameters()) == count


def test_logits_of_every_timestep(net):
    logits_TBK = net(batch(net))
    assert logits_TBK.shape == (T, B, K)
    assert logits_TBK.dtype == torch.float64
    assert logits_TBK.isfinite().all()
    assert not torch.equal(logits_TBK[0], logits_TBK[1])


def test_run_sees_every_layer_once(net):
    seen = []

    def run(layer: Layer, *x_TB: Tensor) -> Tensor:
        seen.append(layer)
        return layer(*x_TB)

    x_TB = batch(net)
    with torch.no_grad():
        logits_TBK = net(x_TB, run)
        assert torch.equal(net(x_TB), logits_TBK)
    layers = net.layers()
    assert Counter(seen) == Counter(layers.values())
    assert len(set(layers.values())) == len(layers)
    assert seen[-1] is net.readout
    assert [layer for layer in seen if layer.neuron is None] == [net.readout]


def test_layers_send_spikes_of_the_network_neuron(net):
    def run(layer: Layer, *x_TB: Tensor) -> Tensor:
        s_TB = layer(*x_TB)
        if layer.neuron is not None:
            assert layer.neuron is net.neuron
            assert ((s_TB == 0) | (s_TB == 1)).all()
            assert 0 < s_TB.mean() < 1
        return s_TB

    with torch.no_grad():
        net(batch(net), run)


def test_taps_have_the_width_of_their_spikes(net):
    sent = {}

    def run(layer: Layer, *x_TB: Tensor) -> Tensor:
        sent[layer] = layer(*x_TB)
        return sent[layer]

    with torch.no_grad():
        net(batch(net), run)
    taps = net.taps()
    order = list(sent)
    assert taps
    for layer, width in taps:
        assert sent[layer].shape[2] == width
        # Not the stage that the read-out sees.
        assert order.index(layer) < len(order) - 2
    assert len({layer for layer, _ in taps}) == len(taps)


@pytest.mark.parametrize(
    ("model", "widths"), [(ResNet18, [64, 128, 256]), (VGG11, [64, 256, 512, 512])]
)
def test_one_tap_per_stage_but_the_last(model, widths):
    with torch.device("meta"):
        net = model(model.Config(), (3, 32, 32), K, LIF())
    assert [width for _, width in net.taps()] == widths


def test_every_parameter_lies_in_a_layer(net):
    inside = {id(p) for layer in net.layers().values() for p in layer.parameters()}
    assert inside == {id(p) for p in net.parameters() if p.requires_grad}


def test_every_spiking_layer_has_a_weighted_synapse(net):
    for layer in net.layers().values():
        before, op, _ = weighted(layer.synapses[0])
        assert op.weight.requires_grad
        assert not any(list(part.parameters()) for part in before)


def test_vgg_starts_as_published():
    torch.manual_seed(0)
    net = VGG11(VGG11.Config(width=1 / 4), (3, 32, 32), K, LIF())
    for layer in net.layers().values():
        _, op, _ = weighted(layer.synapses[0])
        assert (op.bias == 0).all()
        assert op.weight.std().item() == pytest.approx(0.5, rel=0.1)


def test_a_layer_adds_the_currents_of_its_synapses():
    torch.manual_seed(0)
    parts = [torch.nn.Linear(3, 4).double(), torch.nn.Linear(2, 4).double()]
    layer = Layer(*parts, neuron=None)
    x_TB, y_TB = (torch.randn(T, B, n, dtype=torch.float64) for n in (3, 2))
    expected = parts[0](x_TB) + parts[1](y_TB)
    torch.testing.assert_close(layer(x_TB, y_TB), expected, atol=1e-14, rtol=0)
    with pytest.raises(ValueError, match="shorter"):
        layer(x_TB)
