"""The method contract holds for every built-in, and notices each way of breaking it."""

import pytest
import torch
from torch import nn

from snnbench import registry
from snnbench.methods import contract
from snnbench.methods.base import Method
from snnbench.methods.bptt import BPTT


def run(cls):
    def make(options):
        return cls(cls.Config(**options))

    return {c.name: c for c in contract.check(make, cls.bptt_limit[0])}


@pytest.mark.parametrize("name", registry.BUILT_IN["methods"])
def test_every_built_in_method_keeps_the_contract(name):
    checks = run(registry.find("methods", name).load())
    assert len(checks) == 8
    assert [f"{c.name}: {c.detail}" for c in checks.values() if not c.ok] == []


class Doubled(BPTT):
    def loss(self, logits_TBK, target, progress):
        return 2 * super().loss(logits_TBK, target, progress)


class Detached(BPTT):
    def run(self, layer, *x_TB):
        return layer(*(x.detach() for x in x_TB))


class Stepping(BPTT):
    def backward(self, net, x_TB, target, progress):
        loss = super().backward(net, x_TB, target, progress)
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad
        return loss


class Leaking(BPTT):
    def __init__(self, config=None):
        super().__init__(config)
        self.last = 0.0

    def loss(self, logits_TBK, target, progress):
        loss = super().loss(logits_TBK, target, progress) * (1 + self.last)
        self.last = 1.0
        return loss


class Keeping(BPTT):
    def observe(self, layer, s_TB):
        self.kept = s_TB


class Hooking(BPTT):
    def prepare(self, net):
        net.readout.register_forward_hook(lambda m, i, o: o + 1)
        return nn.Identity()


class Ordered(BPTT):
    def loss(self, logits_TBK, target, progress):
        return super().loss(logits_TBK[:, :1], target[:1], progress)


class Random(BPTT):
    count = 0

    def loss_scale(self, T):
        Random.count += 1
        return 1.0 + 0.1 * Random.count


class Unscaled(Method):
    def backward(self, net, x_TB, target, progress):
        loss = self.loss(net(x_TB), target, progress)
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize(
    ("cls", "clause"),
    [
        (Doubled, "gradients equal bptt at the limit"),
        (Detached, "gradients equal bptt at the limit"),
        (Stepping, "no weight is touched"),
        (Leaking, "nothing leaks between steps"),
        (Keeping, "nothing leaks between steps"),
        (Hooking, "evaluation knows no method"),
        (Ordered, "batch order does not matter"),
        (Random, "same seed same gradient"),
        (Unscaled, "gradients follow the scale of the loss"),
    ],
)
def test_the_contract_notices(cls, clause):
    assert not run(cls)[clause].ok


def test_a_method_that_raises_fails_the_clause_with_its_error():
    class Raising(Method):
        def backward(self, net, x_TB, target, progress):
            raise RuntimeError("no idea")

    checks = run(Raising)
    assert not checks["every parameter gets a gradient"].ok
    assert "no idea" in checks["every parameter gets a gradient"].detail
