"""Spikes and operations against explicit loops and by hand; memory; the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snnbench import registry
from snnbench.measure.clock import StepClock
from snnbench.measure.memory import peak_bytes, reset_peak, saved_bytes
from snnbench.measure.spikes import Meter
from snnbench.models.convnet import ConvNet
from snnbench.models.layer import Layer, Network, Run
from snnbench.models.mlp import MLP
from snnbench.models.resnet import ResNet18
from snnbench.models.vgg import VGG11
from snnbench.neurons import LIF

CPU = torch.device("cpu")
T, B = 3, 2

pytestmark = pytest.mark.usefixtures("one_thread")


class Chain(Network):
    """Layers one after another."""

    def __init__(self, *layers: Layer) -> None:
        super().__init__(None, (), 0, LIF())
        self.chain = nn.ModuleList(layers)

    def forward(self, x_TB: Tensor, run: Run = Layer.__call__) -> Tensor:
        for layer in self.chain:
            x_TB = run(layer, x_TB)
        return x_TB


class Joined(Network):
    """A stem, and a residual block whose shortcut is the second synapse of its last layer."""

    def __init__(self, shortcut: nn.Module, out: int, stride: int) -> None:
        super().__init__(None, (), 0, LIF())
        self.stem = Layer(conv(2, 4), neuron=LIF())
        self.first = Layer(conv(4, 4), neuron=LIF())
        self.second = Layer(conv(4, out, stride=stride), shortcut, neuron=LIF())

    def forward(self, x_TB: Tensor, run: Run = Layer.__call__) -> Tensor:
        s_TB = run(self.stem, x_TB)
        return run(self.second, run(self.first, s_TB), s_TB)


class Summed(Network):
    """Spikes of two layers are added: inputs of 0, 1 and 2."""

    def __init__(self) -> None:
        super().__init__(None, (), 0, LIF())
        self.a, self.b = Layer(conv(2, 3), neuron=LIF()), Layer(conv(2, 3), neuron=LIF())
        self.c = Layer(conv(3, 4), neuron=LIF())

    def forward(self, x_TB: Tensor, run: Run = Layer.__call__) -> Tensor:
        return run(self.c, run(self.a, x_TB) + run(self.b, x_TB))


def conv(i: int, o: int, kernel: Any = 3, **options: Any) -> nn.Conv2d:
    """A convolution that makes its neurons fire about half of the time."""
    options.setdefault("padding", 1)
    op = nn.Conv2d(i, o, kernel, **options)
    nn.init.uniform_(op.weight, -0.4, 0.8)
    nn.init.uniform_(op.bias, 0.0, 0.6)
    return op


def reached_conv(op: nn.Conv2d, shape: tuple[int, int, int], pad: tuple[int, int]) -> Tensor:
    """For each input element, how many (output element, weight) pairs read it: by loops."""
    C, H, W = shape
    (kh, kw), (sh, sw), (dh, dw) = op.kernel_size, op.stride, op.dilation
    out_h = (H + 2 * pad[0] - dh * (kh - 1) - 1) // sh + 1
    out_w = (W + 2 * pad[1] - dw * (kw - 1) - 1) // sw + 1
    count = torch.zeros(shape)
    per_group, out_per_group = C // op.groups, op.out_channels // op.groups
    for o, i, j in product(range(op.out_channels), range(out_h), range(out_w)):
        for c, a, b in product(range(per_group), range(kh), range(kw)):
            y, x = i * sh - pad[0] + a * dh, j * sw - pad[1] + b * dw
            if 0 <= y < H and 0 <= x < W:
                count[o // out_per_group * per_group + c, y, x] += 1
    return count


def recorded(net: Network, x_TB: Tensor) -> dict[Layer, tuple[tuple[Tensor, ...], Tensor]]:
    """Inputs and output of every layer."""
    seen = {}

    def run(layer: Layer, *x: Tensor) -> Tensor:
        out = layer(*x)
        seen[layer] = x, out
        return out

    with torch.no_grad():
        net.eval()(x_TB, run)
    return seen


def measured(net: Network, x_TB: Tensor, chunk: int | None = None) -> dict[str, Any]:
    meter = Meter(net)
    with torch.no_grad():
        net.eval()
        for part in x_TB.split(chunk or x_TB.shape[1], dim=1):
            net(part, meter)
    return meter.totals()


def image(*shape: int, static: bool = False) -> Tensor:
    x = torch.rand(1 if static else T, B, *shape) + 0.01
    return x.expand(T, *x.shape[1:])


# --- convolutions, linear maps and pools against loops ------------------------------------------


@pytest.mark.parametrize(
    ("options", "pad"),
    [
        ({}, (1, 1)),
        ({"stride": 2}, (1, 1)),
        ({"padding": 0}, (0, 0)),
        ({"stride": (2, 1), "padding": (0, 2)}, (0, 2)),
        ({"groups": 2}, (1, 1)),
        ({"groups": 4, "stride": 2}, (1, 1)),
        ({"dilation": 2, "padding": 2}, (2, 2)),
        ({"kernel": 1, "padding": 0, "stride": 2}, (0, 0)),
        ({"kernel": (1, 2), "padding": 0, "stride": 3}, (0, 0)),  # leaves part of the image unread
        ({"padding": "same"}, (1, 1)),
        ({"padding": "valid"}, (0, 0)),
        ({"bias": False}, (1, 1)),
    ],
    ids=str,
)
def test_operations_of_a_convolution_against_loops(options, pad):
    torch.manual_seed(0)
    first = Layer(conv(2, 4), neuron=LIF())
    op = nn.Conv2d(4, 4, options.pop("kernel", 3), **{"padding": 1} | options)
    net = Chain(first, Layer(op, neuron=LIF()))
    x_TB = image(2, 5, 4)
    (_, s_TB), (_, out_TB) = recorded(net, x_TB).values()
    each = reached_conv(op, (4, 5, 4), pad)
    assert 0.1 < s_TB.mean() < 0.9  # there is something to count

    totals = measured(net, x_TB)
    got = totals["layers"][1]
    assert got["sops_per_sample"] == (s_TB * each).sum().item() / B
    assert got["macs_per_sample"] == 0
    assert got["spikes_per_sample"] == out_TB.sum().item() / B
    assert totals["spikes_per_sample"] == (s_TB.sum() + out_TB.sum()).item() / B


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 0), (2, 0)])
@pytest.mark.parametrize("static", [True, False])
def test_an_analog_input_costs_dense_macs(stride, padding, static):
    op = conv(2, 3, stride=stride, padding=padding)
    net = Chain(Layer(op, neuron=LIF()))
    got = measured(net, image(2, 5, 4, static=static))
    each = reached_conv(op, (2, 5, 4), (padding, padding))
    assert got["macs_per_sample"] == T * each.sum().item()  # zeros of the image count too
    assert got["sops_per_sample"] == 0


def test_zeros_of_an_analog_image_count_as_macs():
    x_TB = torch.zeros(T, B, 2, 4, 4)
    x_TB[0, 0, 0, 0, 0] = 0.5
    got = measured(Chain(Layer(conv(2, 3, padding=0), neuron=LIF())), x_TB)
    assert got["macs_per_sample"] == T * (2 * 3 * 9) * (2 * 2)


def test_average_pooled_spikes_cost_dense_macs():
    torch.manual_seed(0)
    op = conv(4, 3)
    pooled = nn.Sequential(nn.AvgPool2d(2), op, nn.BatchNorm2d(3))
    net = Chain(Layer(conv(2, 4), neuron=LIF()), Layer(pooled, neuron=LIF()))
    got = measured(net, image(2, 6, 4))["layers"][1]
    assert got["macs_per_sample"] == T * reached_conv(op, (4, 3, 2), (1, 1)).sum().item()
    assert got["sops_per_sample"] == 0


def test_max_pooled_spikes_stay_spikes():
    torch.manual_seed(0)
    op = conv(4, 3)
    net = Chain(
        Layer(conv(2, 4), neuron=LIF()), Layer(nn.Sequential(nn.MaxPool2d(2), op), neuron=LIF())
    )
    x_TB = image(2, 6, 4)
    s_TB = recorded(net, x_TB)[net.chain[0]][1]
    pooled = nn.functional.max_pool2d(s_TB.flatten(0, 1), 2)
    got = measured(net, x_TB)["layers"][1]
    assert got["sops_per_sample"] == (
        (pooled * reached_conv(op, (4, 3, 2), (1, 1))).sum().item() / B
    )
    assert got["macs_per_sample"] == 0


@pytest.mark.parametrize("flatten", [True, False])
def test_operations_of_a_linear_map_against_loops(flatten):
    torch.manual_seed(0)
    shape = (2, 3, 2) if flatten else (12,)
    first = nn.Linear(12, 9)
    nn.init.uniform_(first.weight, -0.4, 0.8)
    synapse = nn.Sequential(nn.Flatten(), first) if flatten else first
    net = Chain(Layer(synapse, neuron=LIF()), Layer(nn.Linear(9, 5), neuron=None))
    x_TB = image(*shape)
    s_TB = recorded(net, x_TB)[net.chain[0]][1]
    expected = 0
    for t, b, i in product(range(T), range(B), range(9)):
        expected += 5 * int(s_TB[t, b, i])
    assert expected > 0
    hidden, readout = measured(net, x_TB)["layers"]
    assert hidden["macs_per_sample"] == T * 12 * 9
    assert readout["sops_per_sample"] == expected / B
    assert (readout["spikes_per_sample"], readout["firing_rate"]) == (None, None)


@pytest.mark.parametrize(
    ("shortcut", "out", "stride"),
    [(nn.Identity(), 4, 1), (nn.Conv2d(4, 6, 1, stride=2), 6, 2)],
    ids=["identity", "convolution"],
)
def test_two_synapses_of_a_layer_against_loops(shortcut, out, stride):
    torch.manual_seed(0)
    net = Joined(shortcut, out, stride)
    x_TB = image(2, 5, 4)
    seen = recorded(net, x_TB)
    (first_TB, stem_TB), _ = seen[net.second]
    main = reached_conv(net.second.synapses[0], (4, 5, 4), (1, 1))
    expected = (first_TB * main).sum().item()
    if isinstance(shortcut, nn.Conv2d):  # an identity is no operation of a synapse
        expected += (stem_TB * reached_conv(shortcut, (4, 5, 4), (0, 0))).sum().item()
    got = {entry["layer"]: entry for entry in measured(net, x_TB)["layers"]}
    assert list(got) == ["stem", "first", "second"]
    assert got["second"]["sops_per_sample"] == expected / B
    assert got["second"]["macs_per_sample"] == 0


def test_one_spiking_and_one_analog_synapse_are_counted_apart():
    torch.manual_seed(0)
    pooled = conv(4, 4, 1, padding=0)
    shortcut = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), pooled)
    net = Joined(shortcut, 4, 1)
    x_TB = image(2, 5, 4)
    (first_TB, _), _ = recorded(net, x_TB)[net.second]
    got = measured(net, x_TB)["layers"][2]
    main = reached_conv(net.second.synapses[0], (4, 5, 4), (1, 1))
    assert got["sops_per_sample"] == (first_TB * main).sum().item() / B
    assert got["macs_per_sample"] == T * 4 * 4 * 5 * 4


def test_sums_of_spikes_count_by_their_value():
    torch.manual_seed(0)
    net = Summed()
    x_TB = image(2, 5, 4)
    (x,), _ = recorded(net, x_TB)[net.c]
    assert x.max() == 2
    each = reached_conv(net.c.synapses[0], (3, 5, 4), (1, 1))
    assert measured(net, x_TB)["layers"][2]["sops_per_sample"] == (x * each).sum().item() / B


# --- by hand ----------------------------------------------------------------------------------


def linear(weights: list[list[float]]) -> nn.Linear:
    op = nn.Linear(len(weights[0]), len(weights), bias=False)
    op.weight.data = torch.tensor(weights)
    return op


def test_three_neurons_by_hand():
    net = Chain(
        Layer(linear([[2.0], [1.2]]), neuron=LIF(decay=0.5)),
        Layer(linear([[0.7, 0.4]]), neuron=LIF(decay=0.5)),
        Layer(linear([[1.0]] * 4), neuron=None),
    )
    # Input 0.5 at all three timesteps.
    # First neuron: current 1, fires at once and is reset to 0: spikes 1 1 1.
    # Second: current 0.6, v = 0.6, 0.9, 1.05: spikes 0 0 1.
    # Third: currents 0.7, 0.7, 1.1, v = 0.7, 1.05 (fires, 0.05 left), 1.125: spikes 0 1 1.
    got = measured(net, torch.full((3, 1, 1), 0.5))
    first, second, readout = got["layers"]
    assert (first["spikes_per_sample"], first["firing_rate"]) == (4, 4 / 6)
    assert (second["spikes_per_sample"], second["firing_rate"]) == (2, 2 / 3)
    assert (first["macs_per_sample"], first["sops_per_sample"]) == (3 * 2, 0)
    assert (second["macs_per_sample"], second["sops_per_sample"]) == (0, 4)
    assert (readout["macs_per_sample"], readout["sops_per_sample"]) == (0, 2 * 4)
    assert (got["spikes_per_sample"], got["firing_rate"]) == (6, 6 / 9)
    assert (got["macs_per_sample"], got["sops_per_sample"]) == (6, 12)


def convnet(**neuron: Any) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(ConvNet.Config(width=3), (1, 6, 6), 5, LIF(**neuron))


def test_no_neuron_fires_below_a_huge_threshold():
    got = measured(convnet(v_th=1e30), image(1, 6, 6))
    assert got["spikes_per_sample"] == got["firing_rate"] == got["sops_per_sample"] == 0
    assert [entry["firing_rate"] for entry in got["layers"]] == [0, 0, None]
    assert got["macs_per_sample"] > 0


def test_every_neuron_fires_always_on_a_large_current():
    net = convnet()
    for layer in (net.conv1, net.conv2):
        layer.synapses[0][1].bias.data.fill_(100.0)
    got = measured(net, image(1, 6, 6))
    assert got["firing_rate"] == 1
    assert [entry["firing_rate"] for entry in got["layers"]] == [1, 1, None]
    assert got["spikes_per_sample"] == T * (3 * 36 + 6 * 9)
    every = reached_conv(net.conv2.synapses[0][0], (3, 6, 6), (1, 1)).sum().item()
    assert got["sops_per_sample"] == T * (every + 6 * 9 * 5)


# --- whole networks ---------------------------------------------------------------------------

NETS: dict[str, Callable[[], Network]] = {
    "mlp": lambda: MLP(MLP.Config(hidden=9, depth=3), (3, 8, 8), 5, LIF(v_th=0.1)),
    "convnet": lambda: ConvNet(ConvNet.Config(width=3), (3, 8, 8), 5, LIF()),
    "vgg11": lambda: VGG11(VGG11.Config(width=1 / 16), (3, 16, 16), 5, LIF()),
    "resnet18": lambda: ResNet18(ResNet18.Config(width=1 / 16), (3, 8, 8), 5, LIF()),
}


def awake(name: str) -> tuple[Network, Tensor]:
    """A network whose neurons fire, in evaluation mode, and images for it."""
    torch.manual_seed(0)
    net = NETS[name]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.uniform_(0.0, 1.5)
    return net.eval(), torch.rand(T, 5, *net.shape)


@pytest.mark.parametrize("name", NETS)
def test_counting_changes_no_logit(name):
    net, x_TB = awake(name)
    with torch.no_grad():
        plain, counted = net(x_TB), net(x_TB, Meter(net))
    assert torch.equal(plain, counted)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("chunk", [1, 2])
def test_the_batch_size_changes_no_total(name, chunk):
    net, x_TB = awake(name)
    whole = measured(net, x_TB)
    assert whole["spikes_per_sample"] > 0
    assert measured(net, x_TB, chunk) == whole


@pytest.mark.parametrize("name", NETS)
def test_totals_are_the_sums_of_the_layers(name):
    net, x_TB = awake(name)
    got, seen = measured(net, x_TB), recorded(net, x_TB)
    names = {layer: n for n, layer in net.layers().items()}
    assert [entry["layer"] for entry in got["layers"]] == [names[layer] for layer in seen]
    spikes = {names[k]: out.sum().item() for k, (_, out) in seen.items() if k.neuron is not None}
    for entry in got["layers"]:
        if entry["layer"] in spikes:
            assert entry["spikes_per_sample"] == pytest.approx(spikes[entry["layer"]] / 5)
    assert got["spikes_per_sample"] == pytest.approx(sum(spikes.values()) / 5)
    for key in ("sops_per_sample", "macs_per_sample"):
        assert got[key] == pytest.approx(sum(entry[key] for entry in got["layers"]))


# --- memory -----------------------------------------------------------------------------------


def test_saved_bytes_by_hand():
    w = torch.randn(4, 5, requires_grad=True)
    x = torch.randn(3, 4)

    def product_() -> Tensor:
        return x @ w  # saves x for the gradient of w; x itself needs no gradient

    assert saved_bytes(product_, [w]) == 3 * 4 * 4
    assert saved_bytes(product_, [w, x]) == 0

    def two() -> Tensor:  # x, and what sigmoid gave out, of which relu saves its own result
        return (x @ w).sigmoid().relu()

    assert saved_bytes(two, [w, x]) == 2 * 3 * 5 * 4


def test_views_of_one_storage_count_once():
    w = torch.randn(6, requires_grad=True)
    big = torch.randn(10, 6)

    def step() -> Tensor:
        return (big[2] * w).sum() + (big[3] * w).sum() + (big * w).sum()

    assert saved_bytes(step, [w]) == 10 * 6 * 4


def step_bytes(method: str, timesteps: int, batch: int = 4) -> int:
    """Saved bytes of one training step of the small network."""
    torch.manual_seed(0)
    made = registry.find("methods", method).load()
    net = ConvNet(ConvNet.Config(width=4), (1, 8, 8), 10, LIF())
    trained = made(made.Config())
    heads = trained.prepare(net)
    x_TB = torch.rand(1, batch, 1, 8, 8).expand(timesteps, batch, 1, 8, 8)
    y_B = torch.arange(batch)
    known = [*net.parameters(), *net.buffers(), *(heads.parameters() if heads else ()), x_TB]
    return saved_bytes(lambda: trained.backward(net, x_TB, y_B, 0.0), known)


@pytest.mark.parametrize("method", ["bptt", "tet", "shortcut", "rate", "grad_scale"])
def test_saved_bytes_are_the_same_in_every_measurement(method):
    first = step_bytes(method, 4)
    torch.rand(1000)
    assert [step_bytes(method, 4) for _ in range(3)] == [first] * 3


@pytest.mark.parametrize("method", ["bptt", "tet", "shortcut", "grad_scale"])
def test_saved_bytes_through_time_grow_by_the_same_amount_per_timestep(method):
    sizes = [step_bytes(method, timesteps) for timesteps in range(2, 8)]
    steps = {b - a for a, b in pairwise(sizes)}
    assert len(steps) == 1
    assert steps.pop() > 10_000  # 4 samples x 384 neurons x 4 bytes, several times


def test_saved_bytes_of_rates_do_not_grow_with_time():
    sizes = {timesteps: step_bytes("rate", timesteps) for timesteps in (1, 2, 4, 8, 16)}
    assert len(set(sizes.values())) == 1, sizes
    assert sizes[8] < step_bytes("bptt", 8) / 3


def test_saved_bytes_grow_with_the_batch():
    small, large = step_bytes("bptt", 2, batch=4), step_bytes("bptt", 2, batch=8)
    assert 1.9 < large / small <= 2.0


def test_the_peak_grows_with_a_large_tensor_and_is_reset():
    if why := reset_peak(CPU):
        pytest.skip(why)
    size = 256 * 2**20
    before = peak_bytes(CPU)["peak_bytes"]
    block = torch.ones(size, dtype=torch.uint8)
    del block
    grown = peak_bytes(CPU)["peak_bytes"]
    assert 0.9 * size < grown - before < 1.2 * size
    reset_peak(CPU)
    assert peak_bytes(CPU)["peak_bytes"] < before + 0.2 * size


# --- the clock --------------------------------------------------------------------------------


def test_the_clock_times_what_is_inside():
    clock = StepClock(CPU)
    time.sleep(0.1)  # not timed
    for _ in range(5):
        with clock.step():
            time.sleep(0.02)
        time.sleep(0.03)  # not timed
    times = clock.drain_ms()
    assert len(times) == 5
    assert min(times) >= 20
    assert min(times) < 60  # the best of five, since others use this machine too
    assert clock.drain_ms() == []


def test_the_clock_keeps_the_order_of_the_steps():
    clock = StepClock(CPU)
    for seconds in (0.08, 0.0):
        with clock.step():
            time.sleep(seconds)
    first, second = clock.drain_ms()
    assert first >= 80
    assert second < first
