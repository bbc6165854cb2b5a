"""SLTT, OTTT, truncated BPTT, rate_S, the switches of grad_scale, composition and PLIF."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from snnbench import registry
from snnbench.errors import SuiteError
from snnbench.measure.gradients import fidelity
from snnbench.methods import contract
from snnbench.methods.ann import ANN
from snnbench.methods.bptt import BPTT
from snnbench.methods.grad_scale import (
    GradScale,
    coincidences,
    gradient_scale,
    traces,
    weight_grad,
)
from snnbench.methods.ottt import OTTT
from snnbench.methods.rate import Rate
from snnbench.methods.shortcut import Shortcut
from snnbench.methods.sltt import SLTT
from snnbench.models.convnet import ConvNet
from snnbench.models.mlp import MLP
from snnbench.models.resnet import ResNet18
from snnbench.neurons import LIF, PRESETS, ReLU, Sigmoid, neuron_options
from snnbench.spec import validate

T, B, K = 5, 6, 3
NEURON = LIF(decay=0.6, v_th=0.5, detach_reset=True, surrogate=Sigmoid())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coincidences_do_not_overflow_in_half_precision(dtype):
    """Sums over a batch of images pass the largest number of fp16, 65,504."""
    op = torch.nn.Conv2d(2, 3, 3, padding=1)
    pre, post = torch.full((64, 2, 32, 32), 1.5), torch.full((64, 3, 32, 32), 1.5)
    found = coincidences(op, pre.to(dtype), post.to(dtype), torch.float32)
    assert found.dtype == torch.float32
    exact = weight_grad(op.double(), pre.double(), post.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    assert found.max() > 65_504


def mlp(neuron=NEURON, depth=2):
    torch.manual_seed(0)
    net = MLP(MLP.Config(hidden=7, depth=depth), (4,), K, neuron).double()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p *= 3
    return net


def batch(*shape):
    torch.manual_seed(1)
    return torch.randn(T, B, *shape, dtype=torch.float64), torch.arange(B) % K


def grads(method, net, x_TB, y_B, progress=0.3):
    net = copy.deepcopy(net)
    torch.manual_seed(2)
    extra = method.prepare(net)
    if extra is not None:
        extra.double()
    method.backward(net, x_TB, y_B, progress)
    return {k: p.grad for k, p in net.named_parameters()}


def assert_equal(one, two, tolerance=1e-12):
    assert one.keys() == two.keys()
    for k in one:
        torch.testing.assert_close(one[k], two[k], atol=tolerance, rtol=0, msg=k)


@pytest.mark.parametrize("window", [T, T + 3])
def test_a_window_of_all_timesteps_truncates_nothing(window):
    x, y = batch(4)
    assert_equal(
        grads(BPTT(BPTT.Config(truncation=window)), mlp(), x, y), grads(BPTT(), mlp(), x, y)
    )


def test_truncation_changes_the_gradient_and_not_the_spikes():
    x, y = batch(4)
    net = mlp()
    assert BPTT(BPTT.Config(truncation=2)).run(net.hidden[0], x).equal(net.hidden[0](x))
    full, cut = grads(BPTT(), net, x, y), grads(BPTT(BPTT.Config(truncation=2)), net, x, y)
    assert not torch.allclose(
        full["hidden.0.synapses.0.1.weight"], cut["hidden.0.synapses.0.1.weight"]
    )


class PerStepLoss(BPTT):
    """The mean of the timesteps' cross-entropies, which the online methods descend."""

    def loss(self, logits_TBK, target, progress):
        return torch.stack([F.cross_entropy(z, target) for z in logits_TBK]).mean()


def test_sltt_is_bptt_without_any_gradient_through_the_membrane():
    x, y = batch(4)
    expected = grads(PerStepLoss(BPTT.Config(truncation=1)), mlp(), x, y)
    assert_equal(grads(SLTT(), mlp(), x, y), expected)


def test_sltt_k_back_propagates_k_of_the_timesteps():
    x, y = batch(4)
    torch.manual_seed(2)
    drawn = torch.randperm(T)[:2].tolist()

    class Drawn(BPTT):
        def loss(self, logits_TBK, target, progress):
            return sum(F.cross_entropy(logits_TBK[t], target) for t in drawn) / T

    expected = grads(Drawn(BPTT.Config(truncation=1)), mlp(), x, y)
    assert_equal(grads(SLTT(SLTT.Config(k=2)), mlp(), x, y), expected)
    assert "cannot be drawn" in SLTT(SLTT.Config(k=T + 1)).supports(mlp(), T)


def test_ottt_follows_its_equations():
    """dW = sum_t delta[t] trace[t]^T, written out for two hidden layers."""
    x, y = batch(4)
    net = mlp()
    (w1, b1), (w2, b2) = ((la.synapses[0][1].weight, la.synapses[0][1].bias) for la in net.hidden)
    w3, b3 = net.readout.synapses[0].weight, net.readout.synapses[0].bias
    d, th, h = NEURON.decay, NEURON.v_th, NEURON.surrogate.grad
    v1 = v2 = tr0 = tr1 = 0.0
    expected = dict.fromkeys(("w1", "b1", "w2", "b2", "w3", "b3"), 0.0)
    with torch.no_grad():
        for t in range(T):
            u1 = d * v1 + x[t] @ w1.T + b1
            s1 = (u1 >= th).double()
            u2 = d * v2 + s1 @ w2.T + b2
            s2 = (u2 >= th).double()
            v1, v2 = u1 - th * s1, u2 - th * s2
            tr0, tr1 = d * tr0 + x[t], d * tr1 + s1
            d3 = (torch.softmax(s2 @ w3.T + b3, 1) - F.one_hot(y, K)) / B / T
            d2 = (d3 @ w3) * h(u2 - th)
            d1 = (d2 @ w2) * h(u1 - th)
            for k, delta, pre in (("1", d1, tr0), ("2", d2, tr1), ("3", d3, s2)):
                expected["w" + k] += delta.T @ pre
                expected["b" + k] += delta.sum(0)
    got = list(grads(OTTT(), net, x, y).values())
    for g, e in zip(got, expected.values(), strict=True):
        torch.testing.assert_close(g, e, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", [SLTT(), OTTT(), Rate(Rate.Config(step_mode="single"))])
def test_online_forward_passes_give_the_spikes_of_the_plain_network(method):
    """Without BatchNorm the order of the loops cannot matter for the values."""
    x, y = batch(4)
    net = mlp()
    with torch.no_grad():
        per_step = torch.stack([F.cross_entropy(z, y) for z in net(x)]).mean()
        of_mean = F.cross_entropy(net(x).mean(0), y)
    loss = method.backward(net, x, y, 0.0)
    torch.testing.assert_close(loss, of_mean if isinstance(method, Rate) else per_step)


def test_rate_single_equals_rate_multi_without_batch_norm():
    x, y = batch(4)
    for scale in ("1", "1/T"):
        one = grads(Rate(Rate.Config(step_mode="single", loss_scale=scale)), mlp(), x, y)
        assert_equal(one, grads(Rate(Rate.Config(loss_scale=scale)), mlp(), x, y))


def test_rate_single_at_one_timestep_is_bptt_with_batch_norm():
    torch.manual_seed(0)
    net = ConvNet(ConvNet.Config(width=4), (1, 8, 8), K, NEURON).double()
    x = torch.randn(1, B, 1, 8, 8, dtype=torch.float64)
    single = Rate(Rate.Config(step_mode="single", loss_scale="1"))
    assert_equal(
        grads(single, net, x, torch.arange(B) % K), grads(BPTT(), net, x, torch.arange(B) % K)
    )


def test_rate_single_normalises_by_the_mean_reciprocal_variance():
    """methods.md, section 4.4: mean over t of the means, and of 1 / (var + eps), eps once."""
    torch.manual_seed(0)
    net = ConvNet(ConvNet.Config(width=4), (1, 8, 8), K, NEURON).double()
    x = torch.randn(T, B, 1, 8, 8, dtype=torch.float64)
    conv, bn = net.conv1.synapses[0]
    c = torch.stack([conv(f) for f in x])
    var, mean = torch.var_mean(c, (1, 3, 4), correction=0)
    inverse = (1 / (var + bn.eps)).mean(0)
    expected = (c.mean(0) - mean.mean(0).view(-1, 1, 1)) * inverse.sqrt().view(-1, 1, 1)
    seen = {}

    class Look(Rate):
        def observe(self, layer, s_TB):
            seen[layer] = s_TB

    method = Look(Rate.Config(step_mode="single"))
    from snnbench.methods.rate import _Running

    running = _Running(net.conv1)
    for frame in x:
        running.step(frame[None])
    torch.testing.assert_close(running._rate_synapse(net.conv1.synapses[0], x.mean(0)), expected)
    method.backward(net, x, torch.arange(B) % K, 0.0)
    assert seen[net.conv1].shape[0] == 1
    assert int(bn.num_batches_tracked) == 2 * T  # running statistics see every timestep


def test_rate_refuses_what_has_no_rate():
    neuron = replace(NEURON, learn_decay=True)
    assert "learned decay" in Rate().supports(mlp(neuron), T)
    net = ConvNet(ConvNet.Config(width=4), (1, 8, 8), K, NEURON)
    net.conv2.synapses[0].insert(0, torch.nn.MaxPool2d(1))
    assert "max pooling" in Rate().supports(net, T)


@pytest.mark.parametrize("trace_time", ["matching", "final"])
@pytest.mark.parametrize("post_source", ["post", "pre"])
def test_grad_scale_switches_against_an_explicit_loop(trace_time, post_source):
    x, y = batch(4)
    net = mlp()
    net_plain = copy.deepcopy(net)
    config = GradScale.Config(
        alpha=0.4, trace_time=trace_time, post_source=post_source, layers="equal_shape"
    )
    got = grads(GradScale(config), net, x, y)
    currents, spikes = {}, {}

    def run(layer, *x_TB):
        if layer.neuron is None:
            return layer(*x_TB)
        currents[layer] = layer.current(*x_TB)
        currents[layer].retain_grad()
        spikes[layer] = layer.neuron.scan(currents[layer])
        return spikes[layer]

    F.cross_entropy(net_plain(x, run).mean(0), y).backward()
    first, second = net_plain.hidden
    pre, delta = spikes[first].detach(), currents[second].grad
    post = pre if post_source == "pre" else spikes[second].detach()
    tr_pre, tr_post = list(traces(pre)), list(traces(post))
    expected = torch.zeros_like(second.synapses[0][1].weight)
    for t in range(T):
        at = t if trace_time == "matching" else T - 1
        scale = gradient_scale(tr_post[at].T @ tr_pre[at], 0.4)
        expected += delta[t].T @ pre[t] * scale
    torch.testing.assert_close(got["hidden.1.synapses.0.1.weight"], expected, atol=1e-12, rtol=0)


def test_grad_scale_leaves_unequal_shapes_alone_if_asked_to():
    torch.manual_seed(0)
    net = ConvNet(ConvNet.Config(width=4), (1, 8, 8), K, NEURON).double()
    x = torch.randn(T, B, 1, 8, 8, dtype=torch.float64)
    y = torch.arange(B) % K
    equal = GradScale(GradScale.Config(alpha=0.5, layers="equal_shape"))
    assert_equal(grads(equal, net, x, y), grads(BPTT(), net, x, y))
    with pytest.raises(ValueError, match="equal_shape"):
        GradScale.Config(post_source="pre")


def test_scaling_helpers_agree_for_convolution_and_linear():
    op = torch.nn.Linear(3, 2)
    x, g = torch.randn(4, 3), torch.randn(4, 2)
    torch.testing.assert_close(weight_grad(op, x, g), g.T @ x)


COMPOSITIONS = ["tet+shortcut", "tet+rate", "tet+grad_scale", "shortcut+rate", "tet+sltt"]


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_keep_the_contract(name):
    cls = registry.find("methods", name).load()
    checks = contract.check(lambda options: cls(cls.Config(**options)), cls.bptt_limit[0])
    assert [f"{c.name}: {c.detail}" for c in checks if not c.ok] == []


def test_a_composition_does_what_both_parts_do():
    torch.manual_seed(0)
    net = ConvNet(ConvNet.Config(width=4), (1, 8, 8), K, NEURON).double()
    x, y = torch.randn(T, B, 1, 8, 8, dtype=torch.float64), torch.arange(B) % K
    cls = registry.find("methods", "tet+shortcut").load()
    both = grads(cls(cls.Config(lamb=0.0, lambda0=0.0)), net, x, y)
    assert_equal(both, grads(PerStepLoss(), net, x, y))
    no_tet = grads(cls(cls.Config(lambda0=0.5)), net, x, y)
    assert not torch.allclose(
        no_tet["conv1.synapses.0.0.weight"], both["conv1.synapses.0.0.weight"]
    )


def test_two_owners_of_a_hook_are_refused_by_name():
    with pytest.raises(SuiteError, match=r"rate and grad_scale both override 'run'"):
        registry.find("methods", "rate+grad_scale").load()
    with pytest.raises(SuiteError, match=r"sltt and ottt both override 'backward'"):
        registry.find("methods", "sltt+ottt").load()


@pytest.mark.parametrize("name", ["grad_scale+ottt", "sltt+bptt", "rate+sltt"])
def test_a_part_that_would_never_run_is_refused(name):
    with pytest.raises(SuiteError, match=r"never calls 'run'|both override"):
        registry.find("methods", name).load()


def test_every_accepted_pair_differs_from_its_parts():
    """No table may carry the name of a method that did not run."""
    torch.manual_seed(0)
    net = ConvNet(ConvNet.Config(width=4), (1, 8, 8), K, NEURON).double()
    x, y = torch.randn(T, B, 1, 8, 8, dtype=torch.float64), torch.arange(B) % K
    names = [n for n in registry.BUILT_IN["methods"] if n not in ("bptt", "ann")]
    alone = {}
    for n in names:
        cls = registry.find("methods", n).load()
        alone[n] = grads(cls(), net, x, y)
    accepted = 0
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            try:
                cls = registry.find("methods", f"{one}+{two}").load()
            except SuiteError:
                continue
            accepted += 1
            both = grads(cls(), net, x, y)
            for part in (one, two):
                assert any(not torch.equal(both[k], alone[part][k]) for k in both), (one, two)
    assert accepted >= 6


def test_ottt_gives_a_learned_decay_no_gradient_through_the_trace():
    x, y = batch(4)
    neuron = replace(NEURON, learn_decay=True)
    ottt, sltt = (grads(m, mlp(neuron), x, y) for m in (OTTT(), SLTT()))
    for k in ("hidden.0.decay_logit", "hidden.1.decay_logit"):
        torch.testing.assert_close(ottt[k], sltt[k], atol=1e-6, rtol=0)


def test_a_composed_config_is_validated_by_each_part():
    cls = registry.find("methods", "tet+grad_scale").load()
    errors = []
    assert validate(cls.Config, {"lamb": 2.0}, errors) is None
    assert validate(cls.Config, {"post_source": "pre"}, errors) is None
    assert validate(cls.Config, {"alhpa": 0.1}, errors) is None
    assert len(errors) == 3
    assert "lamb" in errors[0]
    assert "equal_shape" in errors[1]
    assert "did you mean 'alpha'" in errors[2]


def test_shortcut_heads_per_block():
    net = ResNet18(ResNet18.Config(width=1 / 16), (3, 8, 8), K, NEURON)
    stage, block = (Shortcut(Shortcut.Config(heads=h)).prepare(net) for h in ("stage", "block"))
    assert (len(stage), len(block)) == (3, 7)


def test_logits_with_heads_end_on_the_plain_network_in_the_evolutionary_schedule():
    torch.manual_seed(0)
    net = ConvNet(ConvNet.Config(width=4), (1, 8, 8), K, NEURON).eval()
    x = torch.randn(T, B, 1, 8, 8)
    for schedule, same in (("evolutionary", True), ("constant", False)):
        method = Shortcut(Shortcut.Config(schedule=schedule))
        method.prepare(net)
        assert torch.equal(method.predict(net, x), net(x)) is same


def test_the_artificial_twin_is_the_network_with_relu():
    torch.manual_seed(0)
    net = ConvNet(ConvNet.Config(width=4), (1, 8, 8), K, ANN.neuron).eval()
    x = torch.randn(1, B, 1, 8, 8)
    (c1, n1), (c2, n2) = net.conv1.synapses[0], net.conv2.synapses[0]
    expected = net.readout.synapses[0](torch.relu(n2(c2(torch.relu(n1(c1(x[0])))))))
    torch.testing.assert_close(net(x)[0], expected)
    assert isinstance(ANN.neuron, ReLU)
    assert "T = 1" in ANN().supports(net, 4)


def test_a_learned_decay_starts_at_its_value_and_gets_a_gradient():
    plain, learned = (LIF(decay=0.3, learn_decay=v, surrogate=Sigmoid()) for v in (False, True))
    x, y = batch(4)
    one, two = mlp(plain), mlp(learned)
    two.load_state_dict(one.state_dict(), strict=False)
    torch.testing.assert_close(one(x), two(x), atol=1e-6, rtol=0)
    got = grads(BPTT(), two, x, y)["hidden.0.decay_logit"]
    step = 1e-5  # the smoothed network has no finite difference; the chain rule of one layer has
    layer = two.hidden[0]
    c_TB = layer.current(x).detach()
    assert got.shape == ()
    assert got.isfinite()
    assert got != 0
    v_pre = [
        neuron_v(c_TB, float(torch.sigmoid(layer.decay_logit.detach() + d))) for d in (-step, step)
    ]
    slope = (v_pre[1] - v_pre[0]) / (2 * step)
    neuron = layer.neuron
    v1 = c_TB[0] - neuron.v_th * (c_TB[0] >= neuron.v_th)
    analytic = v1 * neuron.decay * (1 - neuron.decay)
    torch.testing.assert_close(slope, analytic.detach(), atol=1e-6, rtol=1e-4)


def neuron_v(c_TB, decay):
    """Membrane potential before the second reset."""
    neuron = LIF(decay=decay)
    _, _, v = neuron.step(c_TB[0], None)
    return neuron.step(c_TB[1], v)[1]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_neurons(name):
    errors = []
    assert validate(LIF, neuron_options(name), errors) is not None, errors
    changed = validate(
        LIF, neuron_options({"preset": name, "v_th": 2.5, "surrogate": "atan"}), errors
    )
    assert (changed.v_th, changed.surrogate.name) == (2.5, "atan")


def test_the_gradient_scaling_papers_neuron_by_hand():
    """Leak after integration: v_pre = 0.9 (v + c); threshold 0.5; a spike subtracts 1."""
    neuron = validate(LIF, neuron_options("grad_scale"), [])
    v, seen = None, []
    for c in (0.5, 0.2, 2.0):
        s, v_pre, v = neuron.step(torch.tensor(c, dtype=torch.float64), v)
        seen.append((round(float(v_pre), 6), float(s), round(float(v), 6)))
    assert seen == [(0.45, 0.0, 0.45), (0.585, 1.0, -0.415), (1.4265, 1.0, 0.4265)]


def test_fidelity_of_bptt_is_one_and_leaves_the_network_alone():
    torch.manual_seed(0)
    net = ConvNet(ConvNet.Config(width=4), (1, 8, 8), K, NEURON)
    x, y = torch.randn(T, B, 1, 8, 8), torch.arange(B) % K
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    seen = fidelity(BPTT(), net, x, y, 0.0)
    assert seen["cos"] == pytest.approx(1)
    assert seen["norm_ratio"] == pytest.approx(1)
    assert [layer["layer"] for layer in seen["layers"]] == ["conv1", "conv2", "readout"]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(bool((p.grad == 1).all()) for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_fidelity_sees_direction_and_length():
    class Backwards(BPTT):
        def loss_scale(self, T):
            return -3.0

    seen = fidelity(Backwards(), mlp(), *batch(4), 0.0)
    assert seen["cos"] == pytest.approx(-1)
    assert seen["norm_ratio"] == pytest.approx(3)


def test_fidelity_of_a_zero_gradient_has_no_direction():
    class Nothing(BPTT):
        def loss_scale(self, T):
            return 0.0

    seen = fidelity(Nothing(), mlp(), *batch(4), 0.0)
    assert (seen["cos"], seen["norm_ratio"]) == (None, 0)
