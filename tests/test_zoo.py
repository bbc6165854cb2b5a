"""Every registered network: published parameter counts, shapes, taps, tdBN, and all that passes."""

from collections import Counter
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from snnbench import registry
from snnbench.measure.spikes import Meter
from snnbench.methods.rate import Rate
from snnbench.models.layer import Layer, Network, TdBatchNorm2d
from snnbench.neurons import LIF, ReLU

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, K = 2, 2, 5
CIFAR, DVS, LARGE = (3, 32, 32), (2, 48, 48), (3, 64, 64)
TINY = {"width": 1 / 16}

# Name in the registry, options beside the width, shape of a sample.
CASES = {
    "vgg11": ("vgg11", {}, CIFAR),
    "vgg11_a": ("vgg11_a", {}, CIFAR),
    "vgg13": ("vgg13", {}, CIFAR),
    "vgg16": ("vgg16", {}, CIFAR),
    "vggsnn": ("vggsnn", {}, CIFAR),
    "vggsnn_dvs": ("vggsnn_dvs", {}, DVS),
    "vggsnn_woap": ("vggsnn_woap", {}, DVS),
    "resnet18": ("resnet18", {}, CIFAR),
    "resnet18-imagenet": ("resnet18", {"stem": "imagenet"}, LARGE),
    "resnet19": ("resnet19", {}, CIFAR),
    "resnet19-fc": ("resnet19", {"stem": 128, "head": "fc"}, CIFAR),
    "resnet20": ("resnet20", {}, CIFAR),
    "resnet34": ("resnet34", {}, CIFAR),
    "sew_resnet18": ("sew_resnet18", {}, LARGE),
    "sew_resnet34": ("sew_resnet34", {}, LARGE),
    "sew_resnet50": ("sew_resnet50", {}, LARGE),
    "sew_resnet18-cifar": ("sew_resnet18", {"stem": "cifar"}, CIFAR),
    "preact_resnet34": ("preact_resnet34", {}, LARGE),
    "preact_resnet34-cifar": ("preact_resnet34", {"stem": "cifar"}, CIFAR),
}
ZOO = sorted({name for name, _, _ in CASES.values()})


def build(case: str, **options: object) -> Network:
    name, more, shape = CASES[case]
    model = registry.find("models", name).load()
    torch.manual_seed(0)
    return model(model.Config(**(TINY | more | options)), shape, K, LIF(v_th=0.5))


def full_size(name: str, classes: int, shape: tuple[int, ...], **options: object) -> Network:
    model = registry.find("models", name).load()
    with torch.device("meta"):
        return model(model.Config(**options), shape, classes, LIF())


@pytest.fixture(params=CASES)
def net(request: pytest.FixtureRequest) -> Network:
    return build(request.param)


def batch(net: Network) -> Tensor:
    return torch.randn(T, B, *net.shape)


def parameters(net: Network) -> int:
    return sum(p.numel() for p in net.parameters())


def test_every_network_of_the_registry_is_here():
    assert {*ZOO, "mlp", "convnet"} == {*registry.BUILT_IN["models"]}


@pytest.mark.parametrize(
    ("name", "classes", "shape", "options", "count", "published"),
    [
        ("vgg11", 10, CIFAR, {}, 11_001_354, 11.001),
        ("vgg11", 100, CIFAR, {}, 11_047_524, 11.048),
        ("vgg11_a", 10, CIFAR, {}, 9_231_114, None),
        ("vgg13", 10, CIFAR, {}, 9_416_010, None),
        ("vgg13", 100, CIFAR, {}, 9_462_180, None),
        ("vgg16", 10, CIFAR, {}, 15_255_626, None),  # 15.27 with statistics, see below
        ("vgg16", 100, CIFAR, {}, 15_301_796, None),
        ("vggsnn", 10, CIFAR, {}, 9_272_074, 9.272),
        ("vggsnn", 100, CIFAR, {}, 9_686_884, 9.687),
        ("vggsnn_dvs", 10, DVS, {}, 9_271_498, 9.271),
        ("vggsnn_woap", 10, DVS, {}, 9_271_498, 9.271),
        ("resnet18", 10, CIFAR, {}, 11_173_962, 11.174),
        ("resnet18", 100, CIFAR, {}, 11_220_132, 11.220),
        ("resnet34", 10, CIFAR, {}, 21_282_122, 21.282),
        ("resnet34", 100, CIFAR, {}, 21_328_292, 21.328),
        ("resnet19", 10, CIFAR, {}, 12_630_858, 12.631),
        ("resnet19", 100, CIFAR, {}, 12_653_988, 12.654),
        ("resnet19", 10, CIFAR, {"stem": 128}, 12_697_994, 12.698),
        ("resnet19", 100, CIFAR, {"stem": 128}, 12_721_124, 12.721),
        ("resnet19", 10, CIFAR, {"stem": 128, "head": "fc"}, 12_569_226, 12.569),
        ("resnet19", 100, CIFAR, {"stem": 128, "head": "fc"}, 12_615_396, 12.615),
        ("resnet20", 10, CIFAR, {}, 4_327_754, 4.33),
        ("resnet20", 100, CIFAR, {}, 4_350_884, None),
        # torchvision's resnet18 and resnet34
        ("resnet18", 1000, LARGE, {"stem": "imagenet"}, 11_689_512, None),
        ("resnet34", 1000, LARGE, {"stem": "imagenet"}, 21_797_672, None),
        # torchvision's plus one bias for each of 4800, 8512 and 26560 channels
        ("sew_resnet18", 1000, LARGE, {}, 11_694_312, None),
        ("sew_resnet34", 1000, LARGE, {}, 21_806_184, 21.806),
        ("sew_resnet50", 1000, LARGE, {}, 25_583_592, None),
        ("preact_resnet34", 1000, LARGE, {}, 21_806_184, None),
    ],
)
def test_parameter_count(name, classes, shape, options, count, published):
    found = parameters(full_size(name, classes, shape, **options))
    assert found == count
    if published is not None:
        decimals = len(str(published).partition(".")[2])
        assert round(found / 1e6, decimals) == published


def test_vgg16_has_the_published_count_with_running_statistics():
    net = full_size("vgg16", 10, CIFAR)
    statistics = sum(b.numel() for name, b in net.named_buffers() if "running" in name)
    assert round((parameters(net) + statistics) / 1e6, 2) == 15.27


def test_logits_of_every_timestep(net):
    logits_TBK = net(batch(net))
    assert logits_TBK.shape == (T, B, K)
    assert logits_TBK.isfinite().all()
    assert not torch.equal(logits_TBK[0], logits_TBK[1])


def test_run_sees_every_layer_once_and_changes_nothing(net):
    seen = []

    def run(layer: Layer, *x_TB: Tensor) -> Tensor:
        seen.append(layer)
        s_TB = layer(*x_TB)
        if layer.neuron is not None:
            assert layer.neuron is net.neuron
            assert ((s_TB == 0) | (s_TB == 1)).all()
        return s_TB

    x_TB = batch(net)
    with torch.no_grad():
        assert torch.equal(net(x_TB, run), net(x_TB))
    assert Counter(seen) == Counter(net.layers().values())
    assert seen[-1] is net.readout
    assert net.readout.neuron is None
    inside = {id(p) for layer in seen for p in layer.parameters()}
    assert inside == {id(p) for p in net.parameters()}


@pytest.mark.parametrize("each", ["stage", "block"])
def test_taps_are_spikes_of_the_stated_width_and_never_the_last(net, each):
    sent = {}

    def run(layer: Layer, *x_TB: Tensor) -> Tensor:
        sent[layer] = layer(*x_TB)
        return sent[layer]

    with torch.no_grad():
        net(batch(net), run)
    taps = net.taps(each)
    tapped = [layer for layer, _ in taps]
    assert taps
    assert len(set(tapped)) == len(tapped)
    assert [layer for layer in sent if layer in tapped] == tapped
    last = [layer for layer in sent if layer.neuron is not None][-1]
    for layer, width in taps:
        assert layer.neuron is not None
        assert sent[layer].shape[2] == width
        assert layer is not last


@pytest.mark.parametrize(
    ("case", "stages", "blocks"),
    [
        ("vgg11", [64, 256, 512, 512], 7),
        ("vgg13", [64, 128, 256, 512], 9),
        ("vgg16", [64, 128, 256, 512, 512], 14),
        ("vggsnn", [128, 256, 512], 7),
        ("vggsnn_dvs", [128, 256, 512], 7),
        ("vggsnn_woap", [128, 256, 512], 7),
        ("resnet18", [64, 128, 256], 7),
        ("resnet19", [128, 256], 7),
        ("resnet19-fc", [128, 256], 7),
        ("resnet20", [64, 128], 8),
        ("resnet34", [64, 128, 256], 15),
        ("sew_resnet34", [64, 128, 256], 15),
        ("sew_resnet50", [256, 512, 1024], 15),
        ("preact_resnet34", [64, 128, 256], 15),
    ],
)
def test_one_tap_for_each_stage_or_block_but_the_last(case, stages, blocks):
    name, options, shape = CASES[case]
    net = full_size(name, K, shape, **options)
    assert [width for _, width in net.taps()] == stages
    assert len(net.taps("block")) == blocks
    assert set(net.taps()) <= set(net.taps("block"))


def test_meter_counts_and_changes_nothing(net):
    net.eval()
    meter = Meter(net)
    x_TB = batch(net)
    with torch.no_grad():
        assert torch.equal(net(x_TB, meter), net(x_TB))
    totals = meter.totals()
    assert len(totals["layers"]) == len(net.layers())
    assert 0 < totals["firing_rate"] < 1
    assert totals["sops_per_sample"] > 0
    # The analog image is multiplied.
    assert totals["layers"][0]["macs_per_sample"] > 0


def test_gradients_reach_every_parameter(net):
    net(batch(net)).sum(0).pow(2).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        if p.dim() > 1:  # BN cancels the bias before it
            assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ZOO)
def test_artificial_twin(name):
    model = registry.find("models", name).load()
    shape = next(shape for other, _, shape in CASES.values() if other == name)
    net = model(model.Config(**TINY, norm="tdbn"), shape, K, ReLU())
    assert net(torch.randn(1, B, *shape)).shape == (1, B, K)


@pytest.mark.parametrize("name", ZOO)
def test_described_without_import(name):
    about = registry.find("models", name).describe()
    assert " M parameters" in about["summary"]
    assert "20" in about["source"]
    loaded = registry.find("models", name).load()
    assert about["source"] == loaded.source
    assert len(about["summary"]) <= 100


def test_width_scales_every_layer_and_leaves_one_channel():
    full, half = full_size("resnet19", K, CIFAR), full_size("resnet19", K, CIFAR, width=0.5)
    for a, b in zip(full.parameters(), half.parameters(), strict=True):
        if a.shape[0] != K:
            assert a.shape[0] == 2 * b.shape[0]
    model = registry.find("models", "vgg16").load()
    net = model(model.Config(width=1e-6), CIFAR, K, LIF())
    assert net(torch.randn(T, B, *CIFAR)).shape == (T, B, K)


# tdBN


def test_tdbn_normalises_to_the_threshold():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 2 + 1
    bn = TdBatchNorm2d(3, scale=0.3).double()
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
        bn.bias.copy_(torch.tensor([0.5, -0.25, 0.0]))
    mean = x.mean((0, 2, 3), keepdim=True)
    var = x.var((0, 2, 3), correction=0, keepdim=True)
    weight, bias = (p.view(1, -1, 1, 1) for p in (bn.weight, bn.bias))
    expected = weight * (0.3 * (x - mean) / (var + bn.eps).sqrt()) + bias
    torch.testing.assert_close(bn(x), expected, atol=1e-12, rtol=0)


def test_tdbn_of_scale_one_is_plain_bn():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    td, bn = TdBatchNorm2d(3, scale=1.0), nn.BatchNorm2d(3)
    for norm in (td, bn):
        nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
        nn.init.uniform_(norm.bias, generator=torch.Generator().manual_seed(2))
    assert torch.equal(td(x), bn(x))
    assert torch.equal(td.eval()(x), bn.eval()(x))


@pytest.mark.parametrize("case", ["vgg16", "resnet19", "sew_resnet18", "preact_resnet34"])
def test_tdbn_scales_by_the_threshold_and_less_where_currents_are_summed(case):
    net = build(case, norm="tdbn")
    for layer in net.layers().values():
        alpha = 1 / sqrt(2) if len(layer.synapses) > 1 else 1.0
        norms = [m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            assert isinstance(norm, TdBatchNorm2d)
            assert norm.scale == pytest.approx(alpha * net.neuron.v_th)
    assert net(batch(net)).isfinite().all()


# What single networks are known for.


def test_initial_weights_as_published():
    def convolution(name: str, **options: object) -> tuple[nn.Conv2d, float]:
        model = registry.find("models", name).load()
        torch.manual_seed(0)
        net = model(model.Config(width=1 / 4, **options), CIFAR, K, LIF())
        conv = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)][4]
        return conv, sqrt(2 / (9 * conv.out_channels))

    for name in ("vgg11", "vggsnn"):
        conv, _ = convolution(name)
        assert conv.weight.std().item() == pytest.approx(0.5, rel=0.1)
        assert (conv.bias == 0).all()
    for name in ("vggsnn_dvs", "vggsnn_woap", "sew_resnet34", "preact_resnet34"):
        conv, std = convolution(name)
        assert conv.weight.std().item() == pytest.approx(std, rel=0.1)
    conv, std = convolution("vggsnn", init="kaiming")
    assert conv.weight.std().item() == pytest.approx(std, rel=0.1)


def test_sew_sends_sums_of_spikes():
    net = build("sew_resnet18")
    sums = []
    with torch.no_grad():
        x_TB = net.pool(net.stem(batch(net)))
        for block in net.stages[0]:
            x_TB = block(x_TB, Layer.__call__)
            sums.append(x_TB)
    for s_TB in sums:
        assert torch.equal(s_TB, s_TB.round())
    assert sums[-1].max() > 1


@pytest.mark.parametrize("case", ["preact_resnet34", "preact_resnet34-cifar"])
@pytest.mark.parametrize("step_mode", ["multi", "single"])
def test_rate_goes_through_a_stem_that_pools_a_still_image(case, step_mode):
    """Its BatchNorm counts every timestep; the max pooling behind sees the image stand still."""
    net = build(case).train()
    method = Rate(Rate.Config(step_mode=step_mode))
    assert method.supports(net, 2) is None
    image_B = torch.randn(B, *net.shape)
    loss = method.backward(net, image_B.expand(T, *image_B.shape), torch.zeros(B).long(), 0.0)
    assert loss.isfinite()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def test_preact_keeps_a_current():
    net = build("preact_resnet34")
    assert net.stem.neuron is None
    sent = {}

    def run(layer: Layer, *x_TB: Tensor) -> Tensor:
        sent[layer] = (x_TB, layer(*x_TB))
        return sent[layer][1]

    with torch.no_grad():
        net(batch(net), run)
    (u_TB,) = sent[net.readout][0]
    assert not ((u_TB == 0) | (u_TB == 1)).all()
    # A tap reads the current that its stage sends.
    blocks = [block for stage in net.stages for block in stage]
    for end, (layer, _) in zip((3, 7, 13), net.taps(), strict=True):
        assert sent[layer][0][0] is sent[blocks[end - 1].join][1]


def test_imagenet_stem_divides_the_map_by_four():
    for case in ("resnet18-imagenet", "sew_resnet18", "preact_resnet34"):
        net = build(case)
        sent = []
        with torch.no_grad():
            net(batch(net), lambda layer, *x, sent=sent: sent.append(x) or layer(*x))
        block_input = next(x for x in sent[1:] if x[0].shape[-1] == 16)
        assert block_input[0].shape[-2:] == (16, 16)


def test_stride_replaces_pooling():
    pooled, strided = build("vggsnn_dvs"), build("vggsnn_woap")
    assert not any(isinstance(m, nn.AvgPool2d) for m in strided.modules())
    assert [p.shape for p in pooled.parameters()] == [p.shape for p in strided.parameters()]
