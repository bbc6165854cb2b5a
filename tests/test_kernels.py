"""Kernels against the reference: layer by layer, with injected inputs, in float64.

Never end to end in training mode: one tie that rounds the other way changes the statistics of the
next layer, and everything after it.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import os
import platform
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import make_job
from torch import nn

from snnbench import registry
from snnbench.errors import DivergedError
from snnbench.kernels import choice, compiled, native, pointwise, rates, saved
from snnbench.kernels.choice import choose
from snnbench.kernels.fused import Kernel, cells, uncells
from snnbench.kernels.reference import Reference
from snnbench.measure.memory import saved_bytes
from snnbench.methods import contract, grad_scale
from snnbench.methods.bptt import BPTT
from snnbench.methods.rate import Rate, spikes_and_eligibility
from snnbench.models.convnet import ConvNet
from snnbench.models.layer import Layer, TdBatchNorm2d, applied, over_time
from snnbench.models.mlp import MLP
from snnbench.models.resnet import ResNet18, SEWResNet18
from snnbench.models.vgg import VGG11, VGG11A
from snnbench.neurons import LIF, SURROGATES, ATan, Sigmoid
from snnbench.train import train
from snnbench.training import engine

CPU = torch.device("cpu")
EPS = 1e-4  # |v_pre - v_th| below which rounding may decide
NATIVE = native.unavailable(CPU)
BACKENDS = {"native": native}
needs_native = pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))

RESETS = [("soft", False), ("soft", True), ("hard", False), ("hard", True)]
# Every surrogate with every reset; T, sizes, norm, residual and the rest of the options rotate.
CASES = [
    {
        "surrogate": surrogate,
        "reset": reset,
        "detach": detach,
        "T": (1, 2, 4, 7, 16)[i % 5],
        "C": (1, 5, 16, 33, 80, 300)[i // 2 % 6],
        "side": (1, 3, 4)[i % 3],
        "norm": (None, "bn", "eval", "td")[i % 4],
        "rest": i % 3 == 1,
        "stem": i % 5 == 4,
        "strict": i % 2 == 1,
        "decay_input": i % 4 == 2,
        "learn": i % 3 == 2,
    }
    for i, (surrogate, (reset, detach)) in enumerate(itertools.product(SURROGATES, RESETS))
]


def case_id(case):
    return "-".join(str(v) for v in case.values())


def make_neuron(case):
    return LIF(
        0.7, 0.8, case["reset"], case["detach"], case["strict"], case["decay_input"],
        reset_by=0.9, learn_decay=case["learn"], surrogate=SURROGATES[case["surrogate"]](),
    )  # fmt: skip


def make_layer(case):
    """A layer that only normalises, and one that adds to it."""
    C = case["C"]
    norm = TdBatchNorm2d(C, 0.7) if case["norm"] == "td" else nn.BatchNorm2d(C)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, 0.2, 0.8)
    first = nn.Identity() if case["norm"] is None else nn.Sequential(nn.Identity(), norm)
    rest = [nn.Identity()] if case["rest"] else []
    layer = Layer(first, *rest, neuron=make_neuron(case))
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 2)
    return layer.eval() if case["norm"] == "eval" else layer.train()


def inputs(case, dtype=torch.float32, B=3):
    T, shape = case["T"], (B, case["C"], case["side"], case["side"] + 1)
    x = torch.randn(shape).expand(T, *shape) if case["stem"] else torch.randn(T, *shape)
    x_TB = [x.to(dtype)] + [torch.randn(T, *shape).to(dtype)] * case["rest"]
    return x_TB, torch.randn(T, *shape).to(dtype)


def outcome(layer, x_TB, g_TB, dtype):
    """Spikes and all gradients, as float64."""
    layer = copy.deepcopy(layer).to(dtype)
    leaves = [(x[0] if x.stride(0) == 0 else x).to(dtype).clone().requires_grad_() for x in x_TB]
    fed = [v.expand_as(x) if x.stride(0) == 0 else v for v, x in zip(leaves, x_TB, strict=True)]
    s_TB = layer(*fed)
    s_TB.backward(g_TB.to(dtype))
    grads = {f"x{i}": v.grad for i, v in enumerate(leaves)}
    grads |= {n: p.grad for n, p in layer.named_parameters()}
    stats = {n: b for n, b in layer.named_buffers() if b.is_floating_point()}
    tensors = grads | stats
    return s_TB.detach().double(), {k: v.double() for k, v in tensors.items() if v is not None}


def margins(layer, x_TB):
    """|v_pre - v_th| of every neuron and timestep, in float64."""
    layer = copy.deepcopy(layer).double()
    c_TB = layer.current(*(x.double() for x in x_TB)).detach()
    v, out = None, []
    for c in c_TB:
        _, v_pre, v = layer.neuron.step(c, v)
        out.append((v_pre - layer.neuron.v_th).abs().detach())
    return torch.stack(out)


def check_case(kernel, case, seed=0):
    torch.manual_seed(seed)
    layer = make_layer(case)
    x_TB, g_TB = inputs(case)
    # Neurons that come near the threshold at any time are left out, and so is their gradient.
    near = (margins(layer, x_TB) < EPS).any(0)
    if case["norm"] in (None, "eval"):
        assert near.double().mean() < 0.05
    expected_s, expected = outcome(layer, x_TB, g_TB * ~near, torch.float64)
    layer.kernel = kernel
    got_s, got = outcome(layer, x_TB, g_TB * ~near, torch.float32)
    assert torch.equal(got_s[:, ~near], expected_s[:, ~near])
    # At T = 1 a decay that acts on nothing has no gradient, or one of zero.
    for name in got.keys() - expected.keys():
        assert (name, case["T"], float(got[name])) == ("decay_logit", 1, 0.0)
    for name, grad in expected.items():
        difference = (got[name] - grad).norm() / grad.norm().clamp_min(1e-3)
        # The decay's gradient is one sum over all neurons, of terms that cancel.
        bound = 2e-4 if name == "decay_logit" else 2e-5
        assert difference < bound, (name, float(difference))


@needs_native
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_native_layer_step_against_float64(case):
    check_case(Kernel("native", native), case)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_compiled_layer_step_against_float64(case, monkeypatch):
    """The functions that Inductor compiles, run as they are."""
    monkeypatch.setattr(compiled, "_compiled", lambda f, options: partial(f, **dict(options)))
    check_case(Kernel("compiled", compiled), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[::7], ids=case_id)
def test_compiled_layer_step_through_inductor(case):
    if why := compiled.unavailable(CPU):
        pytest.skip(why)
    check_case(Kernel("compiled", compiled), case)


@needs_native
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {
            "surrogate": st.sampled_from(sorted(SURROGATES)),
            "reset": st.sampled_from(["soft", "hard"]),
            "detach": st.booleans(),
            "T": st.integers(1, 9),
            "C": st.integers(1, 40),
            "side": st.integers(1, 5),
            "norm": st.sampled_from([None, "bn", "eval", "td"]),
            "rest": st.booleans(),
            "stem": st.booleans(),
            "strict": st.booleans(),
            "decay_input": st.booleans(),
            "learn": st.booleans(),
        }
    ),
    st.integers(0, 100),
)
def test_native_layer_step_on_any_combination(case, seed):
    # One value a channel has no variance to divide by, and its gradient is all rounding.
    check_case(Kernel("native", native), case | {"side": case["side"] + 1}, seed)


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels", [3, 64, 700])
def test_native_sums_are_the_same_bits_at_every_call(channels, threads, monkeypatch):
    monkeypatch.setattr(native, "_threads", lambda n: threads)
    y, g = torch.randn(4, 500, channels), torch.randn(4, 500, channels)
    mean, var = native.stats(y)
    torch.testing.assert_close(mean, y.mean((0, 1)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(var, y.var((0, 1), correction=0), atol=1e-6, rtol=1e-5)
    rstd = torch.rsqrt(var)
    neuron, decay = LIF(), torch.full((1,), 0.5)
    args = (g, y, rstd, -mean * rstd, mean, rstd, None, decay, neuron, 4, True)
    first, again = native.fire_backward(*args), native.fire_backward(*args)
    for a, b in zip(first, again, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@needs_native
def test_native_statistics_of_values_far_from_zero():
    y = 1000 + torch.randn(2, 4000, 3)
    _, var = native.stats(y)
    torch.testing.assert_close(var, y.double().var((0, 1), correction=0).float(), rtol=1e-4, atol=0)


@needs_native
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_a_membrane_that_is_not_finite_is_never_silent(value, reset, monkeypatch):
    layer = Layer(nn.Identity(), neuron=LIF(reset=reset))
    layer.kernel = Kernel("native", native)
    x_TB = torch.zeros(3, 2, 5)
    x_TB[1, 1, 3] = value
    s_TB = layer(x_TB)
    assert s_TB[1, 1, 3].isnan()
    assert torch.equal(s_TB.isnan(), Reference().fire(layer.neuron, x_TB, None, None, 3).isnan())
    for backend in (compiled,):
        monkeypatch.setattr(backend, "_compiled", lambda f, options: partial(f, **dict(options)))
        args = (x_TB, *[None] * 5, torch.full((1,), 0.5), layer.neuron, 3)
        assert torch.equal(backend.rate_fire(*args)[0].isnan(), s_TB.isnan())
    rates, _ = native.rate_fire(x_TB, *[None] * 5, torch.full((1,), 0.5), layer.neuron, 3)[:2]
    assert rates[1, 1, 3].isnan()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES[::3], ids=case_id)
def test_native_step_of_half_precision_inputs(case, dtype):
    """The inputs are rounded, the arithmetic is not: the same spikes as from those inputs."""
    torch.manual_seed(1)
    layer = make_layer(case)
    x_TB, g_TB = inputs(case)
    x_TB, g_TB = [x.to(dtype) for x in x_TB], g_TB.to(dtype)
    near = (margins(layer, x_TB) < EPS).any(0)
    expected_s, expected = outcome(layer, x_TB, g_TB * ~near, torch.float64)
    layer.kernel = Kernel("native", native)
    leaves = [(x[0] if x.stride(0) == 0 else x).clone().requires_grad_() for x in x_TB]
    fed = [v.expand_as(x) if x.stride(0) == 0 else v for v, x in zip(leaves, x_TB, strict=True)]
    s_TB = layer(*fed)
    s_TB.backward(g_TB * ~near)
    assert s_TB.dtype == dtype
    assert torch.equal(s_TB.double()[:, ~near], expected_s[:, ~near])
    resolution = torch.finfo(dtype).eps
    for i, leaf in enumerate(leaves):
        difference = (leaf.grad.double() - expected[f"x{i}"]).norm() / expected[f"x{i}"].norm()
        assert difference < 4 * resolution
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            torch.testing.assert_close(
                parameter.grad.double(), expected[name], rtol=8 * resolution, atol=8 * resolution
            )


@needs_native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grad_layout", [torch.contiguous_format, torch.channels_last])
def test_inputs_and_gradients_of_any_memory_format(layout, grad_layout):
    """A gradient in the other format, taken for one in the own, is wrong without a word."""
    case = CASES[5] | {"C": 6, "side": 4, "T": 3, "norm": "bn", "rest": True, "stem": False}
    torch.manual_seed(0)
    layer = make_layer(case)
    x_TB, g_TB = inputs(case)

    def in_layout(x_TB, to):
        return x_TB.flatten(0, 1).contiguous(memory_format=to).unflatten(0, x_TB.shape[:2])

    x_TB = [in_layout(x, layout) for x in x_TB]
    near = (margins(layer, x_TB) < EPS).any(0)
    g_TB = in_layout(g_TB * ~near, grad_layout)
    _, expected = outcome(layer, x_TB, g_TB, torch.float64)
    layer.kernel = Kernel("native", native)
    _, got = outcome(layer, x_TB, g_TB, torch.float32)
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, atol=1e-5, rtol=1e-4)


@needs_native
def test_inputs_that_are_strided_views():
    torch.manual_seed(0)
    wide = torch.randn(4, 6, 5, 8, 8)
    x_TB = wide[:, ::2, 1:4, :, ::2]
    layer = Layer(nn.Sequential(nn.Identity(), nn.BatchNorm2d(3)), neuron=LIF())
    plain = copy.deepcopy(layer)
    layer.kernel = Kernel("native", native)
    assert torch.equal(layer(x_TB), plain(x_TB.clone()))


def test_cells_and_back():
    x_TB = torch.randn(2, 3, 4, 5, 6)
    assert torch.equal(uncells(cells(x_TB), x_TB.shape[1:]), x_TB)
    last = x_TB.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 3))
    assert cells(last).data_ptr() == last.data_ptr()  # a view
    assert cells(torch.randn(2, 3, 4)).shape == (2, 3, 4)


# --- two synapses, two users, and what a backend may do besides -------------------------------


class Plain:
    """The native backend with no more than what every backend does."""

    stats, fire = staticmethod(native.stats), staticmethod(native.fire)
    fire_backward = staticmethod(native.fire_backward)
    rate_fire = staticmethod(native.rate_fire)


KERNELS = {"complete": native, "plain": Plain}


def make_joined(T, C, side, static, training, scale):
    """A layer that normalises both of its inputs."""
    norms = [TdBatchNorm2d(C, scale) for _ in range(2)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.1, 0.5)
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 2)
    layer = Layer(
        *(nn.Sequential(nn.Identity(), norm) for norm in norms),
        neuron=LIF(0.7, 0.8, "hard", surrogate=Sigmoid()),
    )
    shape = (3, C, side, side)
    x = torch.randn(shape).expand(T, *shape) if static else torch.randn(T, *shape)
    return layer.train(training), [x, torch.randn(T, *shape)], torch.randn(T, *shape)


@needs_native
@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("T", "C", "side", "static", "scale"),
    [(4, 16, 4, False, 1.0), (2, 5, 3, False, 0.7), (5, 300, 3, False, 1.0), (4, 7, 4, True, 0.7)],
)
def test_both_normalised_inputs_of_a_layer_against_float64(
    T, C, side, static, scale, backend, training
):
    torch.manual_seed(0)
    layer, x_TB, g_TB = make_joined(T, C, side, static, training, scale)
    near = (margins(layer, x_TB) < EPS).any(0)
    expected_s, expected = outcome(layer, x_TB, g_TB * ~near, torch.float64)
    layer.kernel = Kernel(backend, KERNELS[backend])
    got_s, got = outcome(layer, x_TB, g_TB * ~near, torch.float32)
    assert torch.equal(got_s[:, ~near], expected_s[:, ~near])
    assert got.keys() == expected.keys()
    assert layer.kernel.steps == {backend: 1}
    for name, grad in expected.items():
        difference = (got[name] - grad).norm() / grad.norm().clamp_min(1e-3)
        assert difference < 2e-5, (name, float(difference))


@needs_native
@pytest.mark.parametrize("neuron", [LIF(), LIF(learn_decay=True), LIF(0.6, reset="hard")])
@pytest.mark.parametrize("T", [3, 4])
def test_the_gradients_of_two_users_are_added_in_the_layer_step(T, neuron):
    """The same bits as where autograd adds them, and no sum of whole spike trains."""
    torch.manual_seed(0)
    layers = [Layer(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), neuron=neuron)]
    layers += [copy.deepcopy(layers[0])]
    layers += [Layer(copy.deepcopy(layers[0].synapses[0]), nn.Identity(), neuron=neuron)]
    net = nn.ModuleList(layers).to(memory_format=torch.channels_last)
    x_TB, found = torch.randn(T, 2, 4, 6, 6), {}
    for name, backend in KERNELS.items():
        net.zero_grad(set_to_none=True)
        for layer in net:
            layer.kernel = Kernel(name, backend)
        if name == "complete":
            for layer in net[1:]:
                layer.kernel = net[0].kernel
        s_TB = net[0](x_TB)
        with torch.profiler.profile() as seen:
            (net[2](net[1](s_TB), s_TB) * x_TB).sum().backward()
        sums = sum(e.count for e in seen.key_averages() if e.key == "aten::add")
        found[name] = [p.grad for p in net.parameters()], sums
    (grads, sums), (plain, plain_sums) = found["complete"], found["plain"]
    assert all((a - b).norm() <= 1e-6 * b.norm() + 1e-7 for a, b in zip(grads, plain, strict=True))
    assert sums < plain_sums


@needs_native
def test_spikes_nobody_uses_and_one_user_alone():
    layer = Layer(nn.Sequential(nn.Identity(), nn.BatchNorm2d(3)), neuron=LIF())
    layer.kernel = Kernel("native", native)
    x_TB = torch.randn(4, 2, 3, 5, 5, requires_grad=True)
    s_TB = layer(x_TB)
    twin_TB = layer.kernel.twin(s_TB)
    assert twin_TB.data_ptr() == s_TB.data_ptr()
    assert layer.kernel.twin(x_TB) is x_TB
    (one,) = torch.autograd.grad(s_TB.sum(), x_TB, retain_graph=True)
    (other,) = torch.autograd.grad(twin_TB.sum(), x_TB, retain_graph=True)
    (half,) = torch.autograd.grad((s_TB + twin_TB).sum() / 2, x_TB)
    assert one.abs().max() > 0
    assert torch.equal(one, other)
    torch.testing.assert_close(half, one)
    with torch.no_grad():
        quiet_TB = layer(x_TB)
    assert layer.kernel.twin(quiet_TB) is quiet_TB


@needs_native
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.7, "eps": 0.1}, {"affine": False},
     {"track_running_stats": False}],
    ids=str,
)  # fmt: skip
def test_running_statistics_are_those_of_torch(options):
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(5, **options) for _ in range(2)]
    layer = Layer(nn.Sequential(nn.Identity(), norms[0]), neuron=LIF())
    layer.kernel = Kernel("native", native)
    for training in (True, True, False):
        norms[0].train(training), norms[1].train(training)
        x_TB = 3 + torch.randn(2, 3, 5, 4, 4)
        expected_TB = LIF().scan(norms[1](x_TB.flatten(0, 1)).unflatten(0, (2, 3)))
        assert torch.equal(layer(x_TB), expected_TB)
    for name, expected in norms[1].state_dict().items():
        torch.testing.assert_close(norms[0].state_dict()[name], expected, msg=name)


@needs_native
@pytest.mark.parametrize("training", [True, False])
def test_a_normalisation_in_half_precision(training):
    """Its parameters may be of any dtype; the gradients come back in it."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4).bfloat16().train(training)
    layer = Layer(nn.Sequential(nn.Identity(), norm), neuron=LIF())
    layer.kernel = Kernel("native", native)
    x_TB = torch.randn(3, 2, 4, 5, 5)
    layer(x_TB).sum().backward()
    wide = copy.deepcopy(layer).float()
    wide.zero_grad()
    wide(x_TB).sum().backward()
    assert norm.weight.grad.dtype == torch.bfloat16
    got, expected = norm.weight.grad.float(), wide.synapses[0][1].weight.grad
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


@needs_native
@pytest.mark.parametrize("C", [3, 64, 300])
@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("rested", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_gradients_through_time_means_against_torch(C, batch_stats, rested, normed):
    torch.manual_seed(0)
    g, elig, xhat = torch.randn(3, 90, C)
    given = (xhat, torch.rand(C) + 0.5) if normed else (None, None)
    found = native.rate_backward(g, elig, *given, rested, batch_stats)
    expected = rates.step_backward(g, elig, *given, rested, batch_stats)
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@needs_native
@pytest.mark.parametrize("method", ["bptt", "rate"])
def test_a_second_derivative_is_refused(method):
    """It would lack terms, without a word."""
    layer = Layer(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), neuron=LIF())
    layer.kernel = Kernel("native", native)
    x_TB = torch.randn(4, 2, 2, 6, 6, requires_grad=True)
    s_TB = layer(x_TB) if method == "bptt" else Rate().run(layer, x_TB)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(s_TB.sum(), x_TB, create_graph=True)
    c_B = torch.randn(2, 3, 4, 4, requires_grad=True)
    mean, var = torch.zeros(2, 1, 3, 1, 1)
    out_B = rates.MeanNorm.apply(c_B, torch.ones(3), torch.zeros(3), mean, var, 1e-5)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out_B.sum(), c_B, create_graph=True)


# --- the rate-based step ----------------------------------------------------------------------


def rate_gradients(net, x_TB, y, kernel):
    net = copy.deepcopy(net)
    if kernel is not None:
        for layer in net.layers().values():
            layer.kernel = kernel
    loss = Rate().backward(net, x_TB, y, 0.0)
    return loss, {n: p.grad for n, p in net.named_parameters()}


NETS = {
    "vgg11": (VGG11, {"width": 1 / 16, "init": "kaiming"}),
    "vgg11_tdbn": (VGG11, {"width": 1 / 16, "init": "kaiming", "norm": "tdbn"}),
    "resnet18": (ResNet18, {"width": 1 / 16}),
    "resnet18_tdbn": (ResNet18, {"width": 1 / 16, "norm": "tdbn"}),
    "sew": (SEWResNet18, {"width": 1 / 16, "stem": "cifar"}),
}


@needs_native
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_rate_without_a_second_forward_pass_is_rate(name, frozen):
    """conv(mean s) = mean conv(s): gradients of the two-phase algorithm, to rounding.

    With frozen BN; in training mode only where no spike flips, which a coarse grid makes likely.
    """
    cls, options = NETS[name]
    torch.manual_seed(3)
    net = cls(cls.Config(**options), (3, 16, 16), 10, LIF(surrogate=Sigmoid(), detach_reset=True))
    net.train(not frozen)
    if frozen:
        for bn in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.running_var.fill_(0.3)
    x = torch.randn(4, 3, 16, 16)
    x_TB, y = x.expand(4, *x.shape), torch.randint(0, 10, (4,))
    loss, expected = rate_gradients(net, x_TB, y, None)
    fast_loss, got = rate_gradients(net, x_TB, y, Kernel("native", native))
    torch.testing.assert_close(fast_loss, loss, atol=1e-6, rtol=1e-5)
    for parameter, grad in expected.items():
        assert got[parameter] is not None, parameter
        error = (got[parameter] - grad).norm() / grad.norm().clamp_min(1e-3)
        assert error < 1e-3, (parameter, float(error))


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (6, 1), (12, 1), (16, 4), (16, 1)])
def test_a_narrow_convolution_with_a_stride_has_the_right_gradients(channels, groups):
    """oneDNN would write past a buffer here, or give wrong gradients: uxlfoundation/oneDNN#6035."""
    torch.manual_seed(0)
    op = pointwise.Pointwise(channels, 8, 1, 2, groups=groups).to(memory_format=torch.channels_last)
    x = torch.randn(8, channels, 9, 8).to(memory_format=torch.channels_last).requires_grad_()
    exact, y = copy.deepcopy(op).double(), x.detach().double().contiguous().requires_grad_()
    out = nn.Conv2d.forward(exact.to(memory_format=torch.contiguous_format), y)
    torch.testing.assert_close(op(x).double(), out, atol=1e-6, rtol=1e-5)
    g = torch.randn(out.shape)
    out.backward(g.double())
    op(x).backward(g)
    direct = pointwise.conv_gradients(op, x.detach(), op.weight.detach(), g, [True, True, True])
    weights = grad_scale.weight_grad(op, x.detach(), g)
    for got in ([x.grad, op.weight.grad, op.bias.grad], direct, [x.grad, weights, op.bias.grad]):
        for one, want in zip(got, (y.grad, exact.weight.grad, exact.bias.grad), strict=True):
            torch.testing.assert_close(one.double(), want, atol=1e-4, rtol=1e-5)
    (seen, stride) = pointwise.unstrided(op, x)
    assert (stride == (1, 1)) == (channels // groups < pointwise.VECTOR)
    assert (seen is x) == (stride == op.stride)


@needs_native
@pytest.mark.parametrize("T", [1, 2, 8, 32])
def test_rate_keeps_the_same_bytes_at_every_T(T):
    from snnbench.measure.memory import saved_bytes

    net = VGG11(VGG11.Config(width=1 / 16), (3, 16, 16), 10, LIF())
    net.to(memory_format=torch.channels_last)
    for layer in net.layers().values():
        layer.kernel = Kernel("native", native)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))

    def kept(T):
        return saved_bytes(
            lambda: Rate().backward(net, x.expand(T, *x.shape), y, 0.0), [*net.parameters(), x]
        )

    # The logits of every timestep are the only thing with a T, 10 numbers a sample.
    assert kept(T) - kept(1) <= 3 * 4 * 10 * 4 * T


@needs_native
@pytest.mark.parametrize("backend", [native, compiled], ids=["native", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_time_means_of_a_layer_against_float64(case, backend, monkeypatch):
    """Spikes, rate, eligibility and drive, for every neuron that comes near no threshold."""
    monkeypatch.setattr(compiled, "_compiled", lambda f, options: partial(f, **dict(options)))
    torch.manual_seed(2)
    T, neuron = case["T"], replace(make_neuron(case), learn_decay=False)
    y, rest = torch.randn(1 if case["stem"] else T, 40, 9), torch.randn(T, 40, 9)
    a, b, mean, rstd = torch.rand(9) + 0.5, torch.rand(9), torch.randn(9), torch.rand(9) + 0.5
    decay = torch.full((1,), neuron.decay)
    s, rate, elig, xhat = backend.rate_fire(y, a, b, mean, rstd, rest, decay, neuron, T)
    c_TB = (y.double() * a + b).expand(T, 40, 9) + rest
    expected_s, expected_elig = spikes_and_eligibility(neuron, c_TB)
    near = (margins(Layer(nn.Identity(), neuron=neuron), [c_TB]) < EPS).any(0)
    if neuron.surrogate.name == "rectangle":
        near |= (margins(Layer(nn.Identity(), neuron=neuron), [c_TB]) - 0.5).abs().lt(EPS).any(0)
    assert torch.equal(s.double()[:, ~near], expected_s[:, ~near])
    torch.testing.assert_close(rate.double()[~near], expected_s.mean(0)[~near])
    torch.testing.assert_close(elig.double()[~near], expected_elig[~near], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(xhat, (y.mean(0) - mean) * rstd, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs_native
def test_a_damaged_library_is_built_again(monkeypatch, tmp_path):
    monkeypatch.setattr(native.platformdirs, "user_cache_path", lambda name: tmp_path / "sound")
    native.library.__wrapped__()
    (sound,) = (tmp_path / "sound" / "native").iterdir()
    damaged = tmp_path / "damaged" / "native" / sound.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"")
    monkeypatch.setattr(native.platformdirs, "user_cache_path", lambda name: tmp_path / "damaged")
    assert native.library.__wrapped__() is not None
    assert len(damaged.read_bytes()) == len(sound.read_bytes())


# --- the contract, on every kernel --------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("name", registry.BUILT_IN["methods"])
def test_methods_keep_the_contract_on_the_native_kernel(name, monkeypatch):
    kernel = Kernel("native", native)
    monkeypatch.setattr("snnbench.models.layer.Reference", lambda: kernel)
    monkeypatch.setattr(contract, "DTYPE", torch.float32)
    monkeypatch.setattr(contract, "TOLERANCE", 2e-6)
    method = registry.find("methods", name).load()
    checks = contract.check(lambda options: method(method.Config(**options)), method.bptt_limit[0])
    assert [f"{c.name}: {c.detail}" for c in checks if not c.ok] == []
    assert kernel.steps["native"] > 0 or name == "ann"


# --- what is kept for backward ------------------------------------------------------------------


@given(st.integers(1, 70), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_bits_come_back_as_they_went(n, seed):
    s = (torch.rand(n, generator=torch.Generator().manual_seed(seed)) > 0.5).float()
    bits = saved.pack(s)
    assert bits.dtype == torch.uint8
    assert bits.numel() == (n + 7) // 8
    assert torch.equal(saved.unpack(bits, n, torch.float32), s)


def bytes_per_neuron_step(memory, method=None, dtype=None, width=0.25):
    """Bytes kept for backward of VGG-11, T = 4, B = 32, over its neurons x timesteps."""
    from snnbench.measure.memory import saved_bytes

    T, B = 4, 32
    net = VGG11(VGG11.Config(width=width), (3, 32, 32), 10, LIF())
    run = engine.Engine(CPU, choose("native", BACKENDS, CPU), dtype or "fp32", memory)
    run.take(net)
    x, y = torch.randn(B, 3, 32, 32), torch.randint(0, 10, (B,))
    count = 0
    with torch.no_grad():

        def look(layer, *x_TB):
            nonlocal count
            s_TB = layer(*x_TB)
            count += s_TB.numel() if layer.physics is not None else 0
            return s_TB

        net(x.expand(T, *x.shape), look)
    method = method or BPTT()
    with run.autocast():
        kept = saved_bytes(
            lambda: method.backward(net, x.expand(T, *x.shape), y, 0.0),
            [*net.parameters(), *net.buffers(), x], *run.keeping,
        )  # fmt: skip
    return kept / count


@needs_native
def test_bytes_kept_for_every_neuron_and_timestep():
    """The goals of the engine, exact: no clock, no allocator."""
    shown = {"speed": (5.03, 2.72), "balanced": (3.94, 2.19), "smallest": (0.85, 0.69)}  # README
    for level, (full, half) in shown.items():
        assert bytes_per_neuron_step(level) == pytest.approx(full, rel=0.03)
        assert bytes_per_neuron_step(level, dtype="bf16") == pytest.approx(half, rel=0.03)
        assert bytes_per_neuron_step(level, Rate()) == pytest.approx(2.51, rel=0.03)


@needs_native
def test_operations_of_a_training_step():
    from torch.utils._python_dispatch import TorchDispatchMode

    from snnbench.spec import TrainConfig
    from snnbench.training.recipe import make_optimizer

    class Count(TorchDispatchMode):
        done = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.done += 1
            return func(*args, **(kwargs or {}))

    net = VGG11(VGG11.Config(width=0.25), (3, 32, 32), 10, LIF())
    run = engine.Engine(CPU, choose("native", BACKENDS, CPU))
    run.take(net)
    optimizer = make_optimizer(TrainConfig(epochs=1), net)
    x, y = torch.randn(2, 3, 32, 32), torch.randint(0, 10, (2,))

    def step():
        optimizer.zero_grad(set_to_none=True)
        run.backward(BPTT(), net, x.expand(4, *x.shape), y, 0.0)
        run.update(net.parameters(), optimizer, None)

    step()
    with Count():
        step()
    assert Count.done <= 900


@pytest.mark.parametrize("memory", ["balanced", "smallest"])
def test_sums_of_spikes_and_images_are_kept_as_they_are(memory):
    """SEW blocks send sums of spikes, which are no bits."""
    torch.manual_seed(0)
    net = SEWResNet18(SEWResNet18.Config(width=1 / 16), (3, 8, 8), 10, LIF(surrogate=ATan()))
    x, y = torch.randn(3, 3, 8, 8), torch.randint(0, 10, (3,))
    grads = []
    for level in ("speed", memory):
        run = engine.Engine(CPU, choose("reference", {}, CPU), memory=level)
        copied = run.take(copy.deepcopy(net))
        run.backward(BPTT(), copied, x.expand(3, *x.shape), y, 0.0)
        grads.append([p.grad for p in copied.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_an_address_that_is_used_again_is_not_taken_for_spikes():
    keeper = saved.Keeper("balanced")
    s = torch.ones(64)
    keeper.spikes(s)
    assert not isinstance(keeper.pack(s.view(8, 8)), torch.Tensor)
    assert isinstance(keeper.pack(s[:32]), torch.Tensor)  # a part is not the whole
    address = s.data_ptr()
    del s
    other = torch.rand(64)
    keeper._spikes.pop(other.data_ptr(), None) if other.data_ptr() != address else None
    assert isinstance(keeper.pack(other), torch.Tensor)


# --- choice, building, allocator ----------------------------------------------------------------


class Missing:
    @staticmethod
    def unavailable(device):
        return "there is none today"


def test_auto_takes_the_fastest_and_says_what_it_passed_over():
    found = choose("auto", {"native": Missing, "compiled": Missing}, CPU)
    assert found.name == "reference"
    assert found.passed_over[0] == "native: there is none today"
    assert len(found.passed_over) == 2
    cuda = choose("auto", {"triton": Missing, "compiled": Missing}, torch.device("cuda"))
    assert [line.partition(":")[0] for line in cuda.passed_over] == ["triton", "compiled"]


def test_a_kernel_asked_for_by_name_is_had_or_is_an_error():
    with pytest.raises(RuntimeError, match="kernel 'native': there is none today"):
        choose("native", {"native": Missing}, CPU)
    assert choose("reference", {}, CPU).kernel.name == "reference"
    assert "runs on the CPU" in str(native.unavailable(torch.device("cuda")))


@pytest.mark.parametrize("name", list(registry.BUILT_IN["kernels"]))
def test_every_kernel_has_a_summary_and_a_source(name):
    described = registry.find("kernels", name).describe()
    assert described["summary"]
    assert described["source"]
    if name != "reference":
        assert name in {k for names in choice.ORDER.values() for k in names}


@needs_native
@pytest.mark.parametrize(("method", "told"), [("bptt", False), ("rate", False), ("ottt", True)])
def test_a_method_that_goes_round_the_kernel_is_told_of(method, told):
    method = registry.find("methods", method).load()()
    net = ConvNet(ConvNet.Config(width=4), (1, 8, 8), 10, LIF())
    run = engine.Engine(CPU, choose("native", BACKENDS, CPU))
    run.take(net)
    x_B, y_B = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    run.backward(method, net, x_B.expand(4, *x_B.shape), y_B, 0.0)
    assert (run.fallback is not None) == told
    assert run.describe()["kernel_fallbacks"] == ([run.fallback] if told else [])
    assert not told or "native: this method, or its neuron," in run.fallback
    assert engine.Engine(CPU, choose("reference", {}, CPU)).fallback is None


def test_no_compiler_is_said_and_not_fatal(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(OSError, match=r"no C\+\+ compiler"):
        native.library.__wrapped__()


def test_an_average_that_learns_keeps_what_its_gradient_needs():
    class Scaled(torch.nn.AvgPool2d):
        def __init__(self):
            super().__init__(2)
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, input):
            return super().forward(self.scale * input)

    pool, x_TB = Scaled(), torch.arange(32.0).reshape(2, 1, 1, 4, 4)
    over_time(pool, x_TB).sum().backward()
    assert pool.scale.grad == x_TB.sum() / 4


POOLS = [(2, 3, 2, 5, 16), (2, 40, 8, 8, 24), (3, 4, 3, 2, 5), (1, 2, 3, 2, 4), (4, 1, 1, 1, 1)]


@needs_native
@pytest.mark.parametrize(("k", "B", "h", "w", "C"), POOLS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_pooling_of_the_native_kernel_has_the_bits_of_torch(k, B, h, w, C, layout):
    torch.manual_seed(0)
    pool = torch.nn.AvgPool2d(k)
    x, g = torch.randn(B, C, k * h, k * w), torch.randn(B, C, h, w)
    x[0, 0, 0, 0] = math.nan
    found = []
    for kernel in (Reference(), Kernel("native", native)):
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        out = applied(pool, leaf, kernel)
        out.backward(g)  # a gradient in another layout than the value
        found.append((out.detach(), leaf.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert found[1][0].is_contiguous(memory_format=torch.channels_last)


@needs_native
@pytest.mark.parametrize(
    "pool",
    [torch.nn.AvgPool2d(3, stride=1, padding=1), torch.nn.AvgPool2d(2, stride=1),
     torch.nn.AvgPool2d((2, 1)), torch.nn.AvgPool2d(2, divisor_override=3),
     torch.nn.AvgPool2d(4), torch.nn.AvgPool2d(4, ceil_mode=True)],
)  # fmt: skip
def test_windows_that_overlap_or_do_not_cover_are_left_to_torch(pool, monkeypatch):
    monkeypatch.setattr(native, "average", None)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(applied(pool, x, Kernel("native", native)), pool(x))


@needs_native
def test_a_pooling_in_another_dtype_is_left_to_torch_and_keeps_nothing():
    kernel, pool = Kernel("native", native), torch.nn.AvgPool2d(2)
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.randn(2, 3, 4, 4, dtype=dtype)
        assert applied(pool, x, kernel).dtype == dtype
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert saved_bytes(lambda: applied(pool, x, kernel), []) == 0
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(applied(pool, x, kernel).sum(), x, create_graph=True)


@needs_native
@pytest.mark.parametrize("method", ["bptt", "rate"])
def test_a_network_pools_by_its_kernel(method, monkeypatch):
    """Forward and backward, for all timesteps at once; the reference kernel never does."""
    calls: list[str] = []
    for name in ("average", "average_backward"):
        real = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, n=name, f=real: (calls.append(n), f(*a))[1])
    net = VGG11A(VGG11A.Config(width=0.0625), (3, 32, 32), 10, LIF())
    x_B, y_B = torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
    step = registry.find("methods", method).load()()
    step.backward(net, x_B.expand(2, *x_B.shape), y_B, 0.0)
    assert calls == []
    for layer in net.layers().values():
        layer.kernel = Kernel("native", native)
    step.backward(net, x_B.expand(2, *x_B.shape), y_B, 0.0)
    assert calls.count("average") == (8 if method == "rate" else 4)
    assert calls.count("average_backward") == 4


def test_a_gradient_of_a_mean_comes_in_the_dtype_of_the_map():
    """Under autocast a GPU sums in fp32 what a map in half precision takes."""
    for op, shape in ((nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)), (nn.Linear(3, 4), (2, 3))):
        half = rates.linear(op, torch.randn(shape), torch.bfloat16)
        g_B = torch.ones(2, 4, *shape[2:])
        found = rates.back_through(op, g_B, [True] * 3, half.rate_B, half.weight)
        assert all(grad.dtype == torch.bfloat16 for grad in found)


@needs_native
def test_a_normalisation_of_one_value_is_refused_as_torch_does():
    norm, neuron = torch.nn.BatchNorm2d(3), LIF()
    for kernel in (Reference(), Kernel("native", native)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            kernel.fire(neuron, torch.ones(1, 1, 3, 1, 1), norm, None, 1)


def test_a_compiler_that_fails_is_said_with_its_complaint(monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin:/usr/bin")
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr(native.platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    with pytest.raises(OSError, match="no such header"):
        native.library.__wrapped__()
    assert list((tmp_path / "cache" / "native").iterdir()) == []  # nothing half-built


@needs_native
def test_the_library_is_built_once_and_found_again(monkeypatch, tmp_path):
    builds = []
    monkeypatch.setattr(native.platformdirs, "user_cache_path", lambda name: tmp_path)
    build = native.build
    monkeypatch.setattr(native, "build", lambda *a: (builds.append(a), build(*a)))
    native.library.__wrapped__()
    native.library.__wrapped__()
    assert len(builds) == 1
    (made,) = (tmp_path / "native").iterdir()
    assert made.suffix == ".so"


@pytest.mark.slow
@needs_native
def test_a_cache_that_cannot_be_written_is_no_obstacle(monkeypatch):
    def forbidden(self, *args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    assert native.library.__wrapped__() is not None


def test_freed_memory_is_kept_for_the_next_step():
    """In a process of its own: what was set stays."""
    code = """
import ctypes, resource
from snnbench.training.allocator import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytes(50_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
print(keep_freed_memory(), first, faults(), faults(), sep="|")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told, before, _, after = done.stdout.strip().split("|")
    if platform.libc_ver()[0] != "glibc":
        assert told.startswith("unchanged: ")
    else:
        assert told == "glibc keeps freed memory"
        assert int(after) < int(before) / 4 or int(before) < 1000


@pytest.mark.parametrize(
    ("wanted", "device", "expected"),
    [("auto", "cpu", "fp32"), ("auto", "cuda", "fp16"), ("bf16", "cuda", "bf16")],
)
def test_precision(wanted, device, expected):
    assert engine.resolve_precision(wanted, torch.device(device)) == expected


def test_tf32_needs_cuda():
    assert "CUDA" in str(engine.set_matmul_precision("tf32", CPU))


def resident_bytes():
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


@needs_native
@pytest.mark.parametrize("Model", [ConvNet, MLP])
def test_no_step_leaves_a_tensor_behind(Model):
    """A layer of two dimensions too: its spikes are the kernel's own array, and no view of it."""
    net = Model(Model.Config(), (1, 8, 8), 10, LIF())
    run = engine.Engine(CPU, choose("native", BACKENDS, CPU))
    run.take(net)
    x, y = torch.randn(4, 1, 8, 8), torch.randint(0, 10, (4,))

    def after(steps):
        for _ in range(steps):
            run.backward(BPTT(), net, x.expand(4, *x.shape), y, 0.0)
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    held = after(3)
    assert after(10) == held


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize(
    ("method", "memory"), [("bptt", "speed"), ("rate", "speed"), ("bptt", "smallest")]
)
def test_memory_after_a_thousand_steps_is_that_after_twenty(method, memory):
    """One spike train that stayed behind at each step would be 64 MB."""
    method = registry.find("methods", method).load()()
    net = ConvNet(ConvNet.Config(width=4), (1, 8, 8), 10, LIF())
    run = engine.Engine(CPU, choose("native", BACKENDS, CPU), memory=memory)
    run.take(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, fused=True)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))

    def after(steps):
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            run.backward(method, net, x.expand(4, *x.shape), y, 0.0)
            run.update(net.parameters(), optimizer, None)
        gc.collect()
        held = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        return held, resident_bytes()

    held, resident = after(20)
    held_then, resident_then = after(980)
    assert held_then == held
    assert resident is None or resident_then - resident < 8 * 2**20


@pytest.mark.parametrize("kernel", ["reference", "native"])
def test_fp16_gradients_that_overflow_at_every_step_end_a_run_as_diverged(kernel):
    if kernel == "native" and NATIVE:
        pytest.skip(NATIVE)

    class Overflow(BPTT):
        def loss_scale(self, T):
            return 1e30  # the loss stays finite, its gradients do not

    with pytest.raises(DivergedError, match="fp16 loss scale fell to"):
        train(make_job(method=Overflow(), precision="fp16", kernel=kernel, epochs=20))
