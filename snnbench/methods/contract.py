"""What every training method must keep, as plain functions that run on any `Method` class.

The networks are tiny and in float64: convolutions with BatchNorm, one with residuals joined as
currents, one joined as spikes; the inputs are static and varying in time.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snnbench.methods.base import Method
from snnbench.models.layer import Layer, Network, Run
from snnbench.neurons import LIF

T, B, K = 4, 6, 3
DTYPE, TOLERANCE = torch.float64, 1e-10


@dataclass(frozen=True)
class Check:
    """One clause, whether it is kept, and what was seen."""

    name: str
    ok: bool
    detail: str


class TinyNet(Network):
    """Stem, a block whose residual joins as current or as spikes, linear read-out."""

    def __init__(self, join: str) -> None:
        neuron = LIF(decay=0.5, v_th=0.5)
        super().__init__(None, (2, 6, 6), K, neuron)
        self.join = join

        def synapse(i: int, o: int, kernel: int = 3) -> nn.Module:
            conv = nn.Conv2d(i, o, kernel, padding=kernel // 2)
            return nn.Sequential(conv, nn.BatchNorm2d(o))

        self.stem = Layer(synapse(2, 4), neuron=neuron)
        self.first = Layer(synapse(4, 4), neuron=neuron)
        more = [synapse(4, 4, 1)] if join == "current" else []
        self.second = Layer(synapse(4, 4), *more, neuron=neuron)
        pooled = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * 9, K))
        self.readout = Layer(pooled, neuron=None)

    def forward(self, x_TB: Tensor, run: Run = Layer.__call__) -> Tensor:
        """Logits of every timestep, [T, B, K]."""
        s_TB = run(self.stem, x_TB)
        h_TB = run(self.first, s_TB)
        if self.join == "current":
            return run(self.readout, run(self.second, h_TB, s_TB))
        return run(self.readout, s_TB + run(self.second, h_TB))

    def taps(self, each: Literal["stage", "block"] = "stage") -> list[tuple[Layer, int]]:
        """The stem and the first layer of the block."""
        return [(self.stem, 4), (self.first, 4)]


def check(make: Callable[[dict[str, Any]], Method], limit: dict[str, Any]) -> list[Check]:
    """All clauses. `make` builds the method from hyper-parameters, {} giving the defaults."""
    clauses: tuple[Callable[..., str], ...] = (
        gradients_equal_bptt_at_the_limit,
        every_parameter_gets_a_gradient,
        no_weight_is_touched,
        nothing_leaks_between_steps,
        evaluation_knows_no_method,
        batch_order_does_not_matter,
        same_seed_same_gradient,
        gradients_follow_the_scale_of_the_loss,
    )
    checks = []
    for clause in clauses:
        try:
            detail = clause(make, limit)
            ok = True
        except Exception as error:
            ok, detail = False, f"{type(error).__name__}: {error}"
        checks.append(Check(clause.__name__.replace("_", " "), ok, detail))
    return checks


def gradients_equal_bptt_at_the_limit(make: Any, limit: dict[str, Any]) -> str:
    """With the hyper-parameters of `bptt_limit`, the network's gradients are those of BPTT."""
    worst = 0.0
    only_T = type(make({})).bptt_limit[1] or T
    for net, (x_TB, y_B) in _cases(only_T):
        mine, bptt = _gradients(make(limit), net, x_TB, y_B), _gradients(Method(), net, x_TB, y_B)
        for name in bptt:
            worst = max(worst, float((mine[name] - bptt[name]).abs().max()))
    _must(worst <= TOLERANCE, f"the largest difference to BPTT is {worst:.1e}")
    return f"largest difference {worst:.1e}"


def every_parameter_gets_a_gradient(make: Any, limit: dict[str, Any]) -> str:
    """Network and auxiliary parameters alike, all finite, the network's not all zero."""
    count = 0
    for net, (x_TB, y_B) in _cases():
        for name, grad in _gradients(make({}), net, x_TB, y_B, auxiliary=True).items():
            _must(grad is not None, f"{name} has no gradient")
            _must(bool(grad.isfinite().all()), f"the gradient of {name} is not finite")
            count += 1
    return f"{count} gradients"


def no_weight_is_touched(make: Any, limit: dict[str, Any]) -> str:
    """`backward` changes no parameter, and no buffer but BatchNorm's running statistics."""
    for net, (x_TB, y_B) in _cases():
        before = {k: v.clone() for k, v in net.state_dict().items()}
        method = make({})
        _prepare(method, net)
        method.backward(net, x_TB, y_B, 0.5)
        for name, value in net.state_dict().items():
            statistics = "running" in name or "num_batches" in name
            _must(statistics or bool(torch.equal(value, before[name])), f"{name} has changed")
    return "weights as before"


def nothing_leaks_between_steps(make: Any, limit: dict[str, Any]) -> str:
    """A step on another batch in between changes no gradient, and no graph is kept alive."""
    for net, (x_TB, y_B) in _cases():
        method = make({})
        _prepare(method, net)
        grads = []
        for scale in (1.0, -2.0, 1.0):
            net.zero_grad()
            method.backward(net, scale * x_TB, y_B, 0.5)
            grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        same = all(torch.equal(a, b) for a, b in zip(grads[0], grads[2], strict=True))
        _must(same, "the same batch gives another gradient after a step on another batch")
        kept = [k for owner in (method, *net.modules()) for k in _graphs(vars(owner))]
        _must(not kept, f"a graph is kept alive in {', '.join(kept)}")
    return "no state"


def evaluation_knows_no_method(make: Any, limit: dict[str, Any]) -> str:
    """Logits in evaluation are bit-equal before the method exists and after it was used."""
    for net, (x_TB, y_B) in _cases():
        plain = copy.deepcopy(net)
        method = make({})
        _prepare(method, net)
        method.backward(net, x_TB, y_B, 0.5)
        plain.load_state_dict(net.state_dict())
        with torch.no_grad():
            same = torch.equal(net.eval()(x_TB), plain.eval()(x_TB))
        _must(same, "the network evaluates differently after training with the method")
        hooks = [m for m in net.modules() if m._forward_hooks or m._backward_hooks]
        _must(not hooks, "module hooks are left on the network")
    return "bit-equal logits"


def batch_order_does_not_matter(make: Any, limit: dict[str, Any]) -> str:
    """Shuffling the batch changes the gradients by rounding only."""
    worst = 0.0
    for net, (x_TB, y_B) in _cases():
        order = torch.arange(B).flip(0)
        one = _gradients(make({}), net, x_TB, y_B)
        two = _gradients(make({}), net, x_TB[:, order], y_B[order])
        worst = max(worst, *(float((one[k] - two[k]).abs().max()) for k in one))
    _must(worst <= 10 * TOLERANCE, f"the largest difference is {worst:.1e}")
    return f"largest difference {worst:.1e}"


def same_seed_same_gradient(make: Any, limit: dict[str, Any]) -> str:
    """Two steps from the same state and seed are bit-equal."""
    for net, (x_TB, y_B) in _cases():
        one, two = (_gradients(make({}), net, x_TB, y_B, auxiliary=True) for _ in range(2))
        _must(all(torch.equal(one[k], two[k]) for k in one), "two equal steps differ")
    return "bit-equal gradients"


def gradients_follow_the_scale_of_the_loss(make: Any, limit: dict[str, Any]) -> str:
    """With `amplify` the gradients grow by its factor and the loss does not: fp16 needs that."""
    for net, (x_TB, y_B) in _cases():
        plain, scaled = make({}), make({})
        scaled.amplify = lambda loss: 1024 * loss
        one, two = (_gradients(m, net, x_TB, y_B, auxiliary=True) for m in (plain, scaled))
        worst = max(float((two[k] / 1024 - one[k]).abs().max()) for k in one)
        _must(worst <= TOLERANCE, f"they differ by {worst:.1e}; send back self.amplify(loss)")
        losses = [_loss(m, net, x_TB, y_B) for m in (plain, scaled)]
        _must(losses[0] == losses[1], "the loss that is handed back is scaled too")
    return "factor 1024"


def _loss(method: Method, net: TinyNet, x_TB: Tensor, y_B: Tensor) -> float:
    net = copy.deepcopy(net)
    _prepare(method, net)
    return float(method.backward(net, x_TB, y_B, 0.5))


def _cases(steps: int = T) -> Iterator[tuple[TinyNet, tuple[Tensor, Tensor]]]:
    """Both joins, each with an input that is static and one that varies in time."""
    for join, static in itertools.product(("current", "spike"), (True, False)):
        torch.manual_seed(3)
        net = TinyNet(join).to(DTYPE).train()
        x_TB = torch.randn(1 if static else steps, B, 2, 6, 6, dtype=DTYPE)
        yield net, (x_TB.expand(steps, -1, -1, -1, -1), torch.arange(B) % K)


def _gradients(
    method: Method, net: TinyNet, x_TB: Tensor, y_B: Tensor, auxiliary: bool = False
) -> dict[str, Any]:
    """Gradients by parameter name, computed on a copy of the network; None where there is none."""
    net = copy.deepcopy(net)
    extra = _prepare(method, net)
    modules = nn.ModuleDict({"net": net})
    if extra is not None and auxiliary:
        modules["auxiliary"] = extra
    method.backward(net, x_TB, y_B, 0.5)
    return {name: p.grad for name, p in modules.named_parameters()}


def _prepare(method: Method, net: TinyNet) -> nn.Module | None:
    torch.manual_seed(4)
    extra = method.prepare(net)
    return None if extra is None else extra.to(DTYPE)


def _graphs(values: dict[str, Any]) -> list[str]:
    """Names of attributes that hold a tensor with a graph behind it."""

    def holds(value: Any) -> bool:
        if isinstance(value, Tensor):
            return value.grad_fn is not None
        if isinstance(value, dict):
            return any(holds(v) for v in value.values())
        return isinstance(value, list | tuple) and any(holds(v) for v in value)

    return [name for name, value in values.items() if holds(value)]


def _must(kept: bool, otherwise: str) -> None:
    if not kept:
        raise AssertionError(otherwise)
