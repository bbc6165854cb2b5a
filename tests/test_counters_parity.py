"""Counts beside those of other libraries, on the same network and batch.

SpikingJelly counts every position of a padded convolution as a MAC, and the arithmetic of
BatchNorm; we count neither.  NeuroBench calls an input binary or not, counts each non-zero input
once, whatever its value, and leaves out zeros of an analog input.  Where these rules do not
matter, the counts are equal.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from snnbench.measure.spikes import Meter
from snnbench.models.convnet import ConvNet
from snnbench.models.layer import Layer, Network
from snnbench.models.mlp import MLP
from snnbench.models.resnet import ResNet18
from snnbench.models.vgg import VGG11
from snnbench.neurons import LIF

pytestmark = pytest.mark.usefixtures("one_thread")

T, B = 3, 4
NETS: dict[str, Callable[[], Network]] = {
    "mlp": lambda: MLP(MLP.Config(hidden=9, depth=3), (3, 8, 8), 5, LIF(v_th=0.1)),
    "convnet": lambda: ConvNet(ConvNet.Config(width=3), (3, 8, 8), 5, LIF()),
    "vgg11": lambda: VGG11(VGG11.Config(width=1 / 16), (3, 16, 16), 5, LIF()),
    "resnet18": lambda: ResNet18(ResNet18.Config(width=1 / 16), (3, 8, 8), 5, LIF()),
}


def awake(name: str) -> tuple[Network, Tensor]:
    """A network whose neurons fire, and frames of positive numbers that vary over time."""
    torch.manual_seed(0)
    net = NETS[name]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.uniform_(0.0, 1.5)
    return net.eval(), torch.rand(T, B, *net.shape) + 0.01


def ours(net: Network, x_TB: Tensor) -> dict[str, float]:
    meter = Meter(net)
    with torch.no_grad():
        net(x_TB, meter)
    return meter.totals()


@pytest.mark.parametrize("name", NETS)
def test_sops_equal_those_of_spikingjelly(name):
    counters = pytest.importorskip("spikingjelly.activation_based.op_counter")
    net, x_TB = awake(name)
    counted = counters.SynOpCounter()
    with torch.no_grad(), counters.DispatchCounterMode([counted]):
        net(x_TB)
    got = ours(net, x_TB)
    assert got["sops_per_sample"] * B == counted.get_total() > 0


def test_macs_of_an_unpadded_convolution_equal_those_of_spikingjelly():
    counters = pytest.importorskip("spikingjelly.activation_based.op_counter")
    torch.manual_seed(0)
    op = nn.Conv2d(3, 4, 3, stride=2, groups=1, bias=False)
    counted = counters.MACCounter()
    x_TB = torch.rand(T, B, 3, 9, 9) + 0.01
    with torch.no_grad(), counters.DispatchCounterMode([counted]):
        op(x_TB.flatten(0, 1))

    class One(Network):
        def __init__(self) -> None:
            super().__init__(None, (3, 9, 9), 4, LIF())
            self.layer = Layer(op, neuron=LIF())

        def forward(self, x_TB, run=Layer.__call__):
            return run(self.layer, x_TB)

    assert ours(One(), x_TB)["macs_per_sample"] * B == counted.get_total() == T * B * 4 * 4 * 4 * 27


@pytest.mark.parametrize("name", ["mlp", "convnet", "vgg11"])
def test_operations_and_sparsity_equal_those_of_neurobench(name):
    models = pytest.importorskip("neurobench.models")
    workload = pytest.importorskip("neurobench.metrics.workload")
    net, x_TB = awake(name)

    class Ours(models.NeuroBenchModel):
        def __call__(self, batch: Tensor) -> Tensor:
            return net(batch)

        def __net__(self) -> nn.Module:
            return net

    model = Ours()
    model.add_activation_module(Layer)
    model.register_hooks()
    # The read-out has no neurons.
    model.activation_hooks = [h for h in model.activation_hooks if h.layer.physics is not None]
    operations, sparsity = workload.SynapticOperations(), workload.ActivationSparsity()
    with torch.no_grad():
        logits = model(x_TB)
        data = (torch.zeros(B), None)
        seen = operations(model, logits, data)
        zeros = sparsity(model, logits, data)
    model.cleanup_hooks()
    got = ours(net, x_TB)
    assert got["sops_per_sample"] == seen["Effective_ACs"] > 0
    # Average-pooled spikes are analog inputs with zeros, which only we count.
    if name != "vgg11":
        assert got["macs_per_sample"] == seen["Effective_MACs"] > 0
    assert got["dense_macs_per_sample"] == seen["Dense"]
    assert 1 - got["firing_rate"] == pytest.approx(zeros, abs=1e-12)
