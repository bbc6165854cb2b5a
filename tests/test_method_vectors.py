"""The methods against the numbers of shared/design/methods.md, to the digits printed there."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snnbench.methods.base import Method
from snnbench.methods.bptt import BPTT
from snnbench.methods.grad_scale import gradient_scale, traces, weight_grad
from snnbench.methods.rate import spikes_and_eligibility
from snnbench.methods.shortcut import Shortcut
from snnbench.methods.tet import TET
from snnbench.models.convnet import ConvNet
from snnbench.models.mlp import MLP
from snnbench.neurons import LIF, Sigmoid


def f64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got, expected, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got.detach(), f64(expected), atol=atol, rtol=0)


def loss_and_grad(method: Method, logits_TBK: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits_TBK = logits_TBK.clone().requires_grad_()
    loss = method.loss(logits_TBK, target, 0.0)
    (grad_TBK,) = torch.autograd.grad(loss, logits_TBK)
    return loss, grad_TBK


# --- TET, section 2.3 -------------------------------------------------------------------------

LOGITS_TBK = f64([[[1, 0]], [[0, 2]]])
FIRST = torch.tensor([0])


@pytest.mark.parametrize(
    ("method", "loss", "grad"),
    [
        (BPTT(), 0.974077, [[[-0.311230, 0.311230]]] * 2),
        (TET(TET.Config(lamb=0.0)), 1.220095, None),
        (TET(TET.Config(lamb=1.0)), 0.75, [[[0, -0.5]], [[-0.5, 0.5]]]),
        (TET(), 1.196590, [[[-0.127747, 0.102747]], [[-0.443379, 0.443379]]]),
    ],
    ids=["SDT", "TET", "MSE", "total"],
)
def test_losses(method, loss, grad):
    got_loss, got_grad_TBK = loss_and_grad(method, LOGITS_TBK, FIRST)
    close(got_loss, loss)
    if grad is not None:
        close(got_grad_TBK, grad)


@pytest.mark.parametrize("phi", [1.0, 0.3])
def test_tet_regulariser_gradient(phi):
    torch.manual_seed(0)
    logits_TBK = torch.randn(3, 4, 5, dtype=torch.float64)
    method = TET(TET.Config(lamb=1.0, phi=phi))
    _, grad_TBK = loss_and_grad(method, logits_TBK, torch.tensor([0, 1, 2, 3]))
    close(grad_TBK, (2 * (logits_TBK - phi) / (3 * 4 * 5)).tolist(), atol=1e-15)


def test_tet_cross_entropy_gradient():
    """(1/T) (softmax(O(t)) - y) / B, so the losses of SDT and TET differ by Jensen's inequality."""
    torch.manual_seed(0)
    logits_TBK, target = torch.randn(3, 4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 4])
    loss, grad_TBK = loss_and_grad(TET(TET.Config(lamb=0.0)), logits_TBK, target)
    expected = (logits_TBK.softmax(-1) - F.one_hot(target, 5)) / (3 * 4)
    close(grad_TBK, expected.tolist(), atol=1e-15)
    assert loss > BPTT().loss(logits_TBK, target, 0.0)


@pytest.mark.parametrize("method", [BPTT(), TET()], ids=["bptt", "tet"])
def test_losses_take_class_probabilities(method):
    torch.manual_seed(0)
    logits_TBK, target = torch.randn(3, 4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 4])
    hard = loss_and_grad(method, logits_TBK, target)
    soft = loss_and_grad(method, logits_TBK, F.one_hot(target, 5).double())
    torch.testing.assert_close(soft, hard, atol=1e-14, rtol=0)


# --- shortcut, section 3.1 --------------------------------------------------------------------


def test_shortcut():
    """Biases carry b_1 and b_2, so that their gradients are those of the branches."""
    T, progress = 2, 0.5
    net = MLP(MLP.Config(hidden=3, depth=3), (4,), 2, LIF()).double()
    method = Shortcut()
    heads = method.prepare(net).double()
    for head, b in zip(heads, [[1, 0], [0, 1]], strict=True):
        head.weight.data.zero_()
        head.bias.data.copy_(f64(b))
    for layer in net.layers().values():
        method.observe(layer, torch.ones(T, 1, 3, dtype=torch.float64))
    b3_TBK = f64([[[2, -1]]]).repeat(T, 1, 1).requires_grad_()

    assert method.weight(progress) == 0.125
    o_TBK = method.readout(b3_TBK, progress)
    close(o_TBK, [[[2.125, -0.875]]] * T)
    loss = method.loss(o_TBK, FIRST, progress)
    close(loss, 0.0485874)
    loss.backward()
    error = f64([-0.0474259, 0.0474259])
    close(b3_TBK.grad.sum((0, 1)), error.tolist())
    for head in heads:
        close(head.bias.grad, (0.125 * error).tolist())


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ({}, [0.25, 0.125, 0.0]),
        ({"lambda0": 1.0}, [1.0, 0.5, 0.0]),
        ({"schedule": "constant", "lambda0": 1.0}, [1.0, 1.0, 1.0]),
    ],
)
def test_shortcut_weight(config, weights):
    method = Shortcut(Shortcut.Config(**config))
    assert [method.weight(progress) for progress in (0.0, 0.5, 1.0)] == weights


def test_shortcut_pools_feature_maps():
    torch.manual_seed(0)
    net = ConvNet(ConvNet.Config(width=2), (1, 8, 8), 3, LIF()).double()
    method = Shortcut(Shortcut.Config(schedule="constant", lambda0=0.7))
    (head,) = method.prepare(net).double()
    s_TBCHW = (torch.rand(2, 3, 2, 8, 8) < 0.5).double()
    method.observe(net.conv1, s_TBCHW)
    logits_TBK = torch.randn(2, 3, 3, dtype=torch.float64)
    branch_TBK = s_TBCHW.mean((3, 4)) @ head.weight.T + head.bias
    close(method.readout(logits_TBK, 0.3), (logits_TBK + 0.7 * branch_TBK).tolist(), atol=1e-14)


# --- rate-based, section 4.5 ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reset", "detach", "elig"),
    [
        ("soft", True, 0.780716),
        ("soft", False, 0.688262),
        ("hard", False, 0.632592),  # the document's "hard, code formula"
        ("hard", True, 0.707232),
    ],
)
def test_eligibility(reset, detach, elig):
    neuron = LIF(0.2, 1.0, reset, detach, surrogate=Sigmoid(slope=4.0))
    s_TB, elig_B = spikes_and_eligibility(neuron, f64([[0.6], [0.9], [1.2], [0.3]]))
    close(elig_B, [elig])
    close(s_TB.mean(0), [0.5])
    close(s_TB, [[0], [1], [1], [0]])


# --- gradient scaling, section 5.10 -----------------------------------------------------------

# Rows = pre, columns = post; a torch weight is [out, in].
SCALES = [
    [[0.9, 1], [0.9, 0.9]],
    [[0.936788, 0.913534], [1, 0.936788]],
    [[0.983, 0.930534], [1, 0.936788]],
    [[0.983, 0.976746], [1, 0.992465]],
]


@pytest.mark.parametrize(
    "op",
    [nn.Linear(2, 2), nn.Conv2d(2, 2, 1)],
    ids=["linear", "conv1x1"],
)
def test_gradient_scale(op):
    pre_TB = f64([[[1, 0]], [[0, 1]], [[1, 1]], [[0, 0]]])
    post_TB = f64([[[0, 1]], [[1, 0]], [[0, 0]], [[1, 1]]])
    if isinstance(op, nn.Conv2d):
        pre_TB, post_TB = pre_TB[..., None, None], post_TB[..., None, None]
    pairs = zip(traces(pre_TB), traces(post_TB), SCALES, strict=True)
    for pre_B, post_B, expected in pairs:
        G = gradient_scale(weight_grad(op, pre_B, post_B), alpha=0.1)
        close(G.view(2, 2).T, expected)


def test_gradient_scale_of_silence_is_one():
    assert torch.equal(gradient_scale(torch.zeros(2, 3), alpha=0.5), torch.ones(2, 3))
