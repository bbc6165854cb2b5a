"""Gradients of the methods against BPTT, and against oracles written in numpy from the equations.

The numpy functions use no code of snnbench: of a neuron and a network they read the numbers only.
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from numpy import ndarray as Array
from torch import Tensor, nn

from snnbench import registry
from snnbench.kernels.reference import Reference
from snnbench.methods.base import Method
from snnbench.methods.bptt import BPTT
from snnbench.methods.grad_scale import GradScale, gradient_scale
from snnbench.methods.ottt import OTTT
from snnbench.methods.rate import Rate, both
from snnbench.methods.sltt import SLTT
from snnbench.models.convnet import ConvNet
from snnbench.models.layer import Layer, Network, parts_of
from snnbench.models.mlp import MLP
from snnbench.models.resnet import ResNet18
from snnbench.models.vgg import VGG11
from snnbench.neurons import LIF, SURROGATES, ATan, Sigmoid

METHODS = {name: registry.find("methods", name).load() for name in registry.BUILT_IN["methods"]}
NETS = {
    "convnet": (ConvNet, {"width": 3}, (2, 8, 8)),
    "mlp": (MLP, {"hidden": 7, "depth": 3}, (1, 3, 3)),
    "vgg11": (VGG11, {"width": 1 / 16}, (3, 16, 16)),
    "resnet18": (ResNet18, {"width": 1 / 16}, (3, 8, 8)),
}
NEURONS = {
    "soft": LIF(),
    "hard": LIF(0.8, 0.7, "hard", detach_reset=True, surrogate=Sigmoid()),
}
# Reset, detached, surrogate.
VARIANTS = list(product(["soft", "hard"], [False, True], SURROGATES))
B, K = 4, 5
Grads = dict[str, Tensor]


def make_net(name: str, neuron: LIF) -> Network:
    torch.manual_seed(1)
    model, config, shape = NETS[name]
    net = model(model.Config(**config), shape, K, neuron).double()
    if model is MLP:  # no normalisation: keep the deeper layers awake
        for p in net.parameters():
            p.data.mul_(3)
    return net


def make_batch(net: Network, T: int, static: bool = False) -> tuple[Tensor, Tensor]:
    x_TB = torch.randn(T, B, *net.shape, dtype=torch.float64)
    x_TB = x_TB[:1].expand_as(x_TB) if static else x_TB
    return x_TB, torch.arange(B) % K


def gradients(method: Method, net: Network, x_TB: Tensor, target: Tensor) -> tuple[Tensor, Grads]:
    """Loss and gradients of one step."""
    net.zero_grad()
    loss = method.backward(net, x_TB, target, 0.0)
    return loss, {name: p.grad.clone() for name, p in net.named_parameters()}


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def close(got, expected, tol: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, atol=tol, rtol=tol)


# --- numpy: neurons ---------------------------------------------------------------------------


def sigmoid_np(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


# Derivatives at u = v_pre - v_th, with the default width or slope.
SURROGATE_NP: dict[str, Callable[[Array], Array]] = {
    "triangle": lambda u: np.maximum(0, 1 - np.abs(u)),
    "rectangle": lambda u: 1.0 * (np.abs(u) < 0.5),
    "sigmoid": lambda u: 4 * sigmoid_np(4 * u) * (1 - sigmoid_np(4 * u)),
    "atan": lambda u: 1 / (1 + (np.pi * u) ** 2),
    "tanh": lambda u: 0.5 * (1 - np.tanh(u) ** 2),
}


def lif_np(neuron: LIF, c_TB: Array) -> tuple[Array, Array, Array]:
    """Spikes s, surrogate derivatives h and kappa = dv_pre[t+1] / dv_pre[t], each [T, B, N]."""
    v = np.zeros_like(c_TB[0])
    s_TB, h_TB, kappa_TB = (np.zeros_like(c_TB) for _ in range(3))
    for t in range(len(c_TB)):
        u = neuron.decay * v + c_TB[t]
        s = 1.0 * (u >= neuron.v_th)
        h = SURROGATE_NP[neuron.surrogate.name](u - neuron.v_th)
        if neuron.reset == "soft":
            v = u - neuron.v_th * s
            kappa = 1.0 if neuron.detach_reset else 1 - neuron.v_th * h
        else:
            v = u * (1 - s)
            kappa = 1 - s if neuron.detach_reset else 1 - s - u * h
        s_TB[t], h_TB[t], kappa_TB[t] = s, h, neuron.decay * kappa
    return s_TB, h_TB, kappa_TB


# --- numpy: methods on an MLP -----------------------------------------------------------------


def weights_np(net: MLP) -> list[tuple[Array, Array]]:
    p = [value.detach().numpy() for value in net.parameters()]
    return list(zip(p[::2], p[1::2], strict=True))


def output_error_np(mean_BK: Array, target: Tensor) -> Array:
    """(softmax - y) / B."""
    e = np.exp(mean_BK - mean_BK.max(1, keepdims=True))
    return (e / e.sum(1, keepdims=True) - np.eye(K)[target.numpy()]) / len(target)


def traces_np(s_TB: Array) -> Array:
    trace_TB = np.array(s_TB)
    for t in range(1, len(s_TB)):
        trace_TB[t] += np.exp(-1) * trace_TB[t - 1]
    return trace_TB


def scale_np(S: Array, alpha: float) -> Array:
    return (1 - alpha) + alpha * S / S.max() if S.max() > 0 else np.ones_like(S)


def bptt_np(net: MLP, x_TB: Array, target: Tensor, alpha: float = 0.0) -> list[Array]:
    """Gradients by the recursion of methods.md 1.3; weights between spikes scaled as in 5.3."""
    *hidden, (W_out, b_out) = weights_np(net)
    T, a_TB, layers = len(x_TB), x_TB, []
    for W, b in hidden:
        s_TB, h_TB, kappa_TB = lif_np(net.neuron, a_TB @ W.T + b)
        layers.append((W, a_TB, s_TB, h_TB, kappa_TB))
        a_TB = s_TB
    error = output_error_np((a_TB @ W_out.T + b_out).mean(0), target) / T
    grads = [sum(error.T @ a for a in a_TB), T * error.sum(0)]
    ds_TB = np.stack([error @ W_out] * T)
    for i in reversed(range(len(layers))):
        W, a_TB, s_TB, h_TB, kappa_TB = layers[i]
        pre_TB, post_TB = traces_np(a_TB), traces_np(s_TB)
        du_TB = np.zeros_like(s_TB)
        dW = np.zeros_like(W)
        for t in reversed(range(T)):
            du_TB[t] = ds_TB[t] * h_TB[t]
            if t + 1 < T:
                du_TB[t] += du_TB[t + 1] * kappa_TB[t]
            G = scale_np(post_TB[t].T @ pre_TB[t], alpha) if i > 0 else 1.0
            dW += (du_TB[t].T @ a_TB[t]) * G
        grads = [dW, du_TB.sum((0, 1)), *grads]
        ds_TB = du_TB @ W
    return grads


def rate_np(net: MLP, x_TB: Array, target: Tensor) -> list[Array]:
    """Gradients of the two phases of methods.md 4.2 and 4.3, without the factor 1/T."""
    *hidden, (W_out, b_out) = weights_np(net)
    # Phase one: all timesteps, running means only.
    a_TB, r_B, saved = x_TB, x_TB.mean(0), []
    for W, b in hidden:
        s_TB, h_TB, kappa_TB = lif_np(net.neuron, a_TB @ W.T + b)
        rho, e, g = np.ones_like(s_TB[0]), np.zeros_like(s_TB[0]), np.zeros_like(s_TB[0])
        for t in range(len(s_TB)):
            rho = rho if t == 0 else 1 + rho * kappa_TB[t - 1]
            e = (t * e + s_TB[t]) / (t + 1)
            g = (t * g + h_TB[t] * rho) / (t + 1)
        saved.append((W, r_B, g))
        a_TB, r_B = s_TB, e
    # Phase two: one pass on the rates.
    dc_B = output_error_np(r_B @ W_out.T + b_out, target)
    grads = [dc_B.T @ r_B, dc_B.sum(0)]
    dr_B = dc_B @ W_out
    for W, r_B, g in reversed(saved):
        dc_B = dr_B * g
        grads = [dc_B.T @ r_B, dc_B.sum(0), *grads]
        dr_B = dc_B @ W
    return grads


@pytest.mark.parametrize(
    ("method", "oracle"),
    [
        (BPTT(), bptt_np),
        (Rate(Rate.Config(loss_scale="1")), rate_np),
        (GradScale(GradScale.Config(alpha=0.4)), lambda *a: bptt_np(*a, alpha=0.4)),
    ],
    ids=["bptt", "rate", "grad_scale"],
)
@pytest.mark.parametrize(("reset", "detach", "surrogate"), VARIANTS)
def test_mlp_gradients_match_the_equations(method, oracle, reset, detach, surrogate):
    torch.manual_seed(0)
    neuron = LIF(0.6, 0.8, reset, detach, surrogate=SURROGATES[surrogate]())
    net = MLP(MLP.Config(hidden=6, depth=2), (4,), K, neuron).double()
    for p in net.parameters():
        p.data.mul_(3)
    x_TB, target = make_batch(net, T=5)
    _, got = gradients(method, net, x_TB, target)
    expected = oracle(net, x_TB.numpy(), target)
    assert min(np.abs(grad).max() for grad in expected) > 1e-4
    for grad, by_hand in zip(got.values(), expected, strict=True):
        close(grad, torch.from_numpy(by_hand))


# --- every method at its limit ----------------------------------------------------------------


@pytest.mark.parametrize("static", [True, False], ids=["static", "varying"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_limit_is_bptt(method, name, static):
    net = make_net(name, NEURONS["soft" if static else "hard"])
    start = snapshot(net)
    limit, T = METHODS[method].bptt_limit
    x_TB, target = make_batch(net, T or 4, static)
    expected_loss, expected = gradients(BPTT(), net, x_TB, target)
    expected_state = snapshot(net)
    assert expected[next(iter(expected))].abs().max() > 1e-5
    net.load_state_dict(start)

    at_limit = METHODS[method](METHODS[method].Config(**limit))
    assert at_limit.supports(net, len(x_TB)) is None
    heads = at_limit.prepare(net)
    if heads is not None:
        heads.double()
    loss, got = gradients(at_limit, net, x_TB, target)
    close(loss, expected_loss)
    close(got, expected)
    close(snapshot(net), expected_state)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_step_fills_gradients_and_changes_nothing_else(method, name):
    net = make_net(name, NEURONS["soft"])
    method = METHODS[method]()
    heads = method.prepare(net)
    trained = nn.ModuleList([net] if heads is None else [net, heads.double()])
    x_TB, target = make_batch(net, T=3)
    before = snapshot(trained)
    x_before_TB = x_TB.clone()
    loss = method.backward(net, x_TB, target, 0.5)
    assert not loss.requires_grad
    for key, value in trained.named_parameters():
        assert value.grad is not None, key
        assert value.grad.isfinite().all(), key
        assert value.grad.shape == value.shape
    after = trained.state_dict()
    assert after.keys() == before.keys()
    for key, value in after.items():
        if key.endswith("num_batches_tracked"):
            # The online methods show BatchNorm one timestep at a time.
            assert value == (3 if isinstance(method, SLTT | OTTT) else 1), key
        elif key.endswith(("running_mean", "running_var")):
            assert not torch.equal(value, before[key]), key
        else:
            assert torch.equal(value, before[key]), key
    assert torch.equal(x_TB, x_before_TB)
    assert torch.is_grad_enabled()


# --- rate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_rate_has_the_values_of_the_spikes(name):
    net = make_net(name, NEURONS["hard"])
    start = snapshot(net)
    x_TB, target = make_batch(net, T=3)
    with torch.no_grad():
        spiking_TBK = net(x_TB)
    spiking_state = snapshot(net)
    net.load_state_dict(start)
    sent = {}
    method = Rate()
    method.observe = sent.__setitem__
    logits_TBK = net(x_TB, method.run)
    close(logits_TBK.detach().mean(0), spiking_TBK.mean(0))
    assert torch.equal(logits_TBK.detach(), spiking_TBK)
    net.load_state_dict(start)
    loss = method.backward(net, x_TB, target, 0.0)
    close(loss, nn.functional.cross_entropy(spiking_TBK.mean(0), target))
    close(snapshot(net), spiking_state)
    for layer, s_TB in sent.items():
        if layer.neuron is not None:
            assert ((s_TB == 0) | (s_TB == 1)).all()


@pytest.mark.parametrize("name", ["convnet", "vgg11", "resnet18"])
def test_rate_leaves_batch_norm_as_bptt_does(name):
    states = []
    for method in (BPTT(), Rate()):
        net = make_net(name, NEURONS["soft"])
        torch.manual_seed(2)
        for _ in range(2):
            gradients(method, net, *make_batch(net, T=3))
        states.append({k: v for k, v in net.state_dict().items() if "running" in k or "num" in k})
    assert states[0]
    close(states[1], states[0])


def spikes(*shape: int) -> Tensor:
    return (torch.rand(*shape) < torch.rand(*shape[1:])).double()


@pytest.mark.parametrize("name", ["convnet", "vgg11", "resnet18"])
def test_rate_of_batch_norm_is_its_time_mean(name):
    net = make_net(name, NEURONS["soft"])
    synapses = [f for layer in net.layers().values() for f in layer.synapses]
    for synapse in synapses:
        for bn in (m for m in synapse.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(bn.weight, 0.5, 2)
            nn.init.uniform_(bn.bias, -1, 1)
        convs = [m for m in synapse.modules() if isinstance(m, nn.Conv2d)]
        if convs:
            value_TB, c = both(
                parts_of(synapse), spikes(5, B, convs[0].in_channels, 4, 4), Reference()
            )
            rate_B = c.tensor(value_TB)
            assert not value_TB.requires_grad
            assert rate_B.requires_grad
            close(rate_B.detach(), value_TB.mean(0))


def test_rate_batch_norm_gradient_in_closed_form():
    """gamma / sd * (g - mean g - c^ mean(g c^)), sd and c^ from the statistics of all spikes."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(2).double()
    nn.init.uniform_(bn.weight, 0.5, 2)
    c_TB, g_B = torch.randn(4, 3, 2, 5, 5).double(), torch.randn(3, 2, 5, 5).double()
    x_TB = c_TB.clone().requires_grad_()
    value_TB, c = both([bn], x_TB, Reference())
    (got,) = torch.autograd.grad(c.tensor(value_TB), x_TB, g_B)
    c, g = c_TB.numpy(), g_B.numpy()
    axes, keep = (0, 2, 3), {"keepdims": True}
    mean = c.mean((0, 1, 3, 4), **keep)[0]
    sd = np.sqrt(c.var((0, 1, 3, 4), **keep)[0] + bn.eps)
    normed = (c.mean(0) - mean) / sd
    dc = g - g.mean(axes, **keep) - normed * (g * normed).mean(axes, **keep)
    dc *= bn.weight.detach().numpy()[:, None, None] / sd
    close(got, torch.from_numpy(dc / 4).expand_as(c_TB))


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
@pytest.mark.parametrize(("T", "tol"), [(4, 0), (3, 1e-14)])
def test_rate_loss_scale(name, T, tol):
    net = make_net(name, NEURONS["soft"])
    batch = make_batch(net, T)
    one_loss, one = gradients(Rate(Rate.Config(loss_scale="1")), net, *batch)
    loss, scaled = gradients(Rate(), net, *batch)
    assert loss == one_loss
    for key, grad in one.items():
        torch.testing.assert_close(scaled[key], grad / T, atol=tol, rtol=tol)


@pytest.mark.parametrize(("T", "cosine"), [(1, 1 - 1e-12), (4, 0.95), (32, 0.98)])
def test_rate_approximates_bptt_on_independent_spikes(T, cosine):
    torch.manual_seed(0)
    neuron = LIF(0.2, 1.0, "soft", detach_reset=True, surrogate=Sigmoid(slope=4.0))
    net = MLP(MLP.Config(hidden=64, depth=2), (64,), K, neuron).double()
    for p in net.parameters():
        p.data.mul_(3)
    x_TB = (torch.rand(T, 64, 64) < torch.rand(64, 64)).double()
    target = torch.arange(64) % K
    _, bptt = gradients(BPTT(), net, x_TB, target)
    _, rate = gradients(Rate(Rate.Config(loss_scale="1")), net, x_TB, target)
    for key in bptt:
        a, b = bptt[key].flatten(), rate[key].flatten()
        assert a @ b / a.norm() / b.norm() > cosine, key
        assert b.norm() / a.norm() == pytest.approx(1, abs=0.1), key


# --- gradient scaling -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_grad_scale_leaves_errors_bitwise_equal(name):
    """What reaches the first layer came through all others; only their weights are scaled."""
    net = make_net(name, NEURONS["hard"])
    batch = make_batch(net, T=4)
    _, expected = gradients(BPTT(), net, *batch)
    _, got = gradients(GradScale(GradScale.Config(alpha=0.5)), net, *batch)
    layers = net.layers()
    scaled = {
        f"{key}.{part}"
        for key, layer in layers.items()
        for part, p in layer.named_parameters()
        # Fed by spikes and sending spikes; not a bias, not BatchNorm.
        if p.dim() > 1 and layer.neuron is not None and layer is not next(iter(layers.values()))
    }
    assert scaled
    for key in expected:
        if key.replace("bias", "weight") in scaled and key not in scaled:
            close(got[key], expected[key], 1e-12)  # summed apart from the weights, in another order
        else:
            assert torch.equal(got[key], expected[key]) == (key not in scaled), key


def conv_grad_np(conv: nn.Conv2d, x_BCHW: Array, g_BCHW: Array) -> Array:
    """Brute force: sum over batch and positions of g[o, y, x] * input[i, y * s + k, x * s + k]."""
    (pad, _), (stride, _) = conv.padding, conv.stride
    x_BCHW = np.pad(x_BCHW, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    out = np.zeros(conv.weight.shape)
    _, _, height, width = out.shape
    for b, y, x in np.ndindex(len(g_BCHW), *g_BCHW.shape[2:]):
        patch = x_BCHW[b, :, y * stride : y * stride + height, x * stride : x * stride + width]
        out += g_BCHW[b, :, y, x, None, None, None] * patch
    return out


@pytest.mark.parametrize(
    ("name", "layer", "synapse"),
    [
        ("convnet", "conv2", 0),
        ("vgg11", "features.1", 0),
        ("vgg11", "features.3", 0),
        ("resnet18", "stages.0.0.second", 0),
        ("resnet18", "stages.1.0.first", 0),
        ("resnet18", "stages.1.0.second", 1),
    ],
    ids=str,
)
def test_grad_scale_of_a_convolution_by_brute_force(name, layer, synapse):
    alpha = 0.3
    net = make_net(name, NEURONS["soft"])
    batch = make_batch(net, T=3)
    target_layer = net.layers()[layer]
    conv = next(m for m in target_layer.synapses[synapse].modules() if isinstance(m, nn.Conv2d))
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.update(x=inputs[0], c=output)

    class Watch(BPTT):
        def observe(self, layer: Layer, s_TB: Tensor) -> None:
            if layer is target_layer:
                seen["s"] = s_TB

    with conv.register_forward_hook(keep):
        gradients(Watch(), net, *batch)
    _, got = gradients(GradScale(GradScale.Config(alpha=alpha)), net, *batch)
    T = len(batch[0])
    x_TB, g_TB = (v.detach().unflatten(0, (T, B)).numpy() for v in (seen["x"], seen["c"].grad))
    pre_TB, post_TB = traces_np(x_TB), traces_np(seen["s"].detach().numpy())
    expected = sum(
        conv_grad_np(conv, x_TB[t], g_TB[t])
        * scale_np(conv_grad_np(conv, pre_TB[t], post_TB[t]), alpha)
        for t in range(T)
    )
    key = next(key for key, p in net.named_parameters() if p is conv.weight)
    assert np.abs(expected).max() > 1e-6
    close(got[key], torch.from_numpy(expected))


def test_grad_scale_of_silence_is_bptt():
    """The second layer stays silent: no coincidence, and its gradient stays what it was."""
    net = make_net("mlp", LIF(surrogate=ATan()))
    net.hidden[1].synapses[0][1].weight.data.mul_(1e-2)
    net.hidden[1].synapses[0][1].bias.data.zero_()
    batch = make_batch(net, T=4)
    sent = {}

    class Watch(GradScale):
        def observe(self, layer: Layer, s_TB: Tensor) -> None:
            sent[layer] = s_TB

    _, expected = gradients(BPTT(), net, *batch)
    _, got = gradients(Watch(Watch.Config(alpha=0.5)), net, *batch)
    assert sent[net.hidden[0]].any()
    assert not sent[net.hidden[1]].any()
    key = "hidden.1.synapses.0.1.weight"
    assert expected[key].abs().max() > 1e-3
    close(got, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_grad_scale_lies_between_one_minus_alpha_and_one(alpha):
    torch.manual_seed(0)
    G = gradient_scale(torch.rand(20, 30, dtype=torch.float64), alpha)
    assert G.max() == pytest.approx(1, abs=1e-15)
    assert G.min() >= 1 - alpha
