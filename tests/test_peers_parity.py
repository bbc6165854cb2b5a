"""Forward spikes and gradients of one layer against SpikingJelly and snnTorch."""

import warnings

import pytest
import torch

from snnbench.neurons import LIF, ATan, Sigmoid

T, B, N = 6, 5, 32


@pytest.fixture
def c_TB():
    torch.manual_seed(0)
    return torch.randn(T, B, N, dtype=torch.float64) + 0.4


def ours(neuron, c_TB, weight_TB):
    c_TB = c_TB.clone().requires_grad_()
    s_TB = neuron.scan(c_TB)
    (s_TB * weight_TB).sum().backward()
    return s_TB.detach(), c_TB.grad


@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("surrogate", ["sigmoid", "atan"])
def test_spikingjelly_lif_node(c_TB, reset, detach, surrogate):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("spikingjelly", reason='needs the "peers" extra')
        from spikingjelly.activation_based import neuron as sj
        from spikingjelly.activation_based import surrogate as sj_surrogate
    mine = {"sigmoid": Sigmoid(slope=4.0), "atan": ATan(slope=2.0)}[surrogate]
    theirs = {"sigmoid": sj_surrogate.Sigmoid(4.0), "atan": sj_surrogate.ATan(2.0)}[surrogate]
    decay = 0.75
    node = sj.LIFNode(
        tau=1 / (1 - decay),
        decay_input=False,
        v_threshold=1.0,
        v_reset=None if reset == "soft" else 0.0,
        detach_reset=detach,
        surrogate_function=theirs,
        step_mode="m",
    ).double()
    weight_TB = torch.randn_like(c_TB)
    x_TB = c_TB.clone().requires_grad_()
    s_TB = node(x_TB)
    (s_TB * weight_TB).sum().backward()
    got, grad = ours(
        LIF(decay=decay, reset=reset, detach_reset=detach, surrogate=mine), c_TB, weight_TB
    )
    assert 0.05 < got.mean() < 0.95
    assert torch.equal(got, s_TB.detach())
    torch.testing.assert_close(grad, x_TB.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_snntorch_leaky(c_TB, reset):
    """Without delay, snnTorch fires above the threshold only and does not detach the reset.

    Its soft reset subtracts again where the membrane stays above the threshold: the current here
    is too weak for that.
    """
    snntorch = pytest.importorskip("snntorch", reason='needs the "peers" extra')
    c_TB = c_TB.float().clamp(max=1.2)
    neuron = LIF(decay=0.75, reset=reset, strict=True, surrogate=ATan(slope=2.0))
    node = snntorch.Leaky(
        beta=0.75,
        threshold=1.0,
        reset_mechanism="subtract" if reset == "soft" else "zero",
        reset_delay=False,
        spike_grad=snntorch.surrogate.atan(alpha=2.0),
    )
    weight_TB = torch.randn_like(c_TB)
    x_TB = c_TB.clone().requires_grad_()
    v, spikes = torch.zeros_like(c_TB[0]), []
    for x in x_TB:
        s, v = node(x, v)
        spikes.append(s)
    s_TB = torch.stack(spikes)
    (s_TB * weight_TB).sum().backward()
    got, grad = ours(neuron, c_TB, weight_TB)
    assert 0.05 < got.mean() < 0.95
    assert torch.equal(got, s_TB.detach())
    torch.testing.assert_close(grad, x_TB.grad, atol=1e-6, rtol=1e-5)
