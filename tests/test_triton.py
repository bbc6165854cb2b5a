"""The Triton kernels without a GPU: interpreted against float64, and compiled for a Hopper GPU.

Triton decides when a kernel is defined whether it will be interpreted, so all interpreted cases run
in one process of their own, which is this file as a script: it prints what it measured as JSON,
and the tests below judge that.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from snnbench.kernels import triton as kernel
from snnbench.kernels import triton_launch as launching
from snnbench.kernels.rates import step_backward
from snnbench.methods.rate import spikes_and_eligibility
from snnbench.neurons import LIF, ATan, Rectangle, Sigmoid, Tanh, Triangle

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

FACTORS: dict[str, list[Any]] = {
    "surrogate": [Triangle(width=0.8), Rectangle(width=1.3), Sigmoid(), ATan(), Tanh(height=0.6)],
    "T": [1, 2, 4, 7, 16],
    "size": [(37, 10), (5, 64), (67, 34), (70, 3), (18, 128)],
    "norm": [None, "batch", "frozen"],
    "dtype": ["float32", "float16", "bfloat16"],
    "reset": ["soft", "hard"],
    "detach_reset": [False, True],
    "strict": [False, True],
    "decay_input": [False, True],
    "learn_decay": [False, True],
    "reset_by": [None, 0.6],
    "v_th": [1.0, 0.7],
    "rest": [False, True],
    "stem": [False, True],
}
NEURON = ("surrogate", "reset", "detach_reset", "strict", "decay_input", "learn_decay", "reset_by",
          "v_th")  # fmt: skip
# Norm of the error over norm of the value.  Arrays are rounded to the dtype, some of them twice;
# sums are fp32 whatever the dtype.
BOUND = {"float32": 5e-6, "float16": 1e-3, "bfloat16": 8e-3}
EPS = 1e-5
UNSURE = 2e-5  # a membrane this near to a jump of s or h may round to its other side


def pairwise(seed: int) -> Iterator[dict[str, Any]]:
    """Cases in which any two values of two factors meet at least once."""
    draw = random.Random(seed)
    names = list(FACTORS)

    def pairs(case: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(case), 2))

    every = itertools.combinations([[(f, i) for i in range(len(v))]
                                    for f, v in enumerate(FACTORS.values())], 2)  # fmt: skip
    missing = {pair for one, other in every for pair in itertools.product(one, other)}
    while missing:
        forced = dict(draw.choice(sorted(missing)))
        tries = [
            tuple(forced.get(f, draw.randrange(len(v))) for f, v in enumerate(FACTORS.values()))
            for _ in range(60)
        ]
        best = max(tries, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        yield {name: FACTORS[name][i] for name, i in zip(names, best, strict=True)}


CASES = list(pairwise(seed=0))


def title(case: dict[str, Any]) -> str:
    """A short name of a case."""
    M, C = case["size"]
    flags = [name for name, value in case.items() if value is True]
    norm = case["norm"] or "plain"
    words = case["surrogate"].name, case["reset"], f"T{case['T']}", f"{M}x{C}", norm
    return "-".join([*words, case["dtype"], *flags])


# --- in the interpreter -----------------------------------------------------------------------

PAD = 64
device = "cpu"
ALLOCATORS = {name: f for name, f in vars(kernel).items() if name.startswith("_new_")}
guards: list[Tensor] = []  # arrays with their surroundings, which must stay NaN
worst: dict[str, float] = {}  # errors as a fraction of their bounds


def guarded(x: Tensor) -> Tensor:
    """The same array amid NaN: what is read or written beyond its ends will show."""
    around = torch.full((x.numel() + 2 * PAD,), math.nan, dtype=x.dtype, device=device)
    around[PAD:-PAD] = x.flatten()
    guards.append(around)
    return around[PAD:-PAD].view(x.shape)


def poisoned(new: Callable[..., Any]) -> Callable[..., Any]:
    """An allocator of outputs that hands out NaN, guarded: what is not written will show."""

    def made(*args: Any) -> Any:
        out = new(*args)
        if isinstance(out, Tensor):
            return guarded(torch.full_like(out, math.nan))
        return [guarded(torch.full_like(x, math.nan)) for x in out]

    return made


def close(name: str, found: Tensor, wanted: Tensor, bound: float, scale: float = 0.0) -> None:
    """Assert that the error is below `bound` times the norm of the value (or the scale)."""
    assert found.shape == wanted.shape, (name, found.shape, wanted.shape)
    assert found.isfinite().all(), f"{name} is not finite"
    found, wanted = found.cpu(), wanted.cpu()
    error = (found.double() - wanted).norm().item()
    size = max(wanted.norm().item(), scale)
    key = f"{name} {bound:g}"
    worst[key] = max(worst.get(key, 0.0), error / (bound * size or 1))
    assert error <= bound * size, f"{name}: error {error:.2g} of {size:.3g}, bound {bound:g}"


class Problem:
    """Arrays of one case, and the float64 results for them."""

    def __init__(self, case: dict[str, Any], seed: int = 0) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.T, (M, C), self.norm = case["T"], case["size"], case["norm"]
        self.neuron = LIF(0.6, **{name: case[name] for name in NEURON})
        self.dtype = getattr(torch, case["dtype"])
        self.y = self.array((1 if case["stem"] else self.T, M, C), 1.5, 0.4, self.dtype)
        self.g = self.array((self.T, M, C), 1.0, 0.1, self.dtype)
        self.rest = self.array((self.T, M, C), 0.5, 0.1, self.dtype) if case["rest"] else None
        self.decay = guarded(torch.tensor([0.6]))
        self.a = self.b = self.mean = self.rstd = None
        if self.norm is not None:
            self.weight, self.bias = self.array((C,), 0.3, 1.0), self.array((C,), 0.3, 0.2)
            if self.norm == "batch":
                self.mean, self.var = kernel.stats(self.y)
            else:
                self.mean, self.var = self.array((C,), 0.3, 0.4), self.array((C,), 0.2, 2).abs()
            self.rstd = guarded(torch.rsqrt(self.var + EPS))
            self.a = guarded(self.weight * self.rstd)
            self.b = guarded(self.bias - self.a * self.mean)
        self.solve()

    def array(
        self, shape: tuple[int, ...], spread: float, centre: float, dtype: Any = torch.float32
    ) -> Tensor:
        return guarded((torch.randn(shape, generator=self.draw) * spread + centre).to(dtype))

    def solve(self) -> None:
        """Autograd of `neurons` and of BatchNorm, in float64; cells near a jump get no g."""
        leaf = {
            name: getattr(self, name).double().requires_grad_()
            for name in ("y", "rest", "weight", "bias", "decay")
            if getattr(self, name, None) is not None
        }
        y, x = leaf["y"], leaf["y"]
        if self.norm is not None:
            frozen = self.norm == "frozen"
            running = (self.mean.double(), self.var.double()) if frozen else (None, None)
            rows = y.flatten(0, 1)
            x = batch_norm(rows, *running, leaf["weight"], leaf["bias"], not frozen, eps=EPS)
            x = x.view(y.shape)
        x = x.expand(self.T, *x.shape[1:]) + leaf.get("rest", 0)
        neuron = replace(self.neuron, decay=leaf["decay"])
        sure, v = torch.ones_like(x[0], dtype=torch.bool), None
        for c in x.detach():
            _, v_pre, v = neuron.step(c, v)
            u = (v_pre - neuron.v_th).detach().abs()
            sure &= u > UNSURE
            if isinstance(neuron.surrogate, Rectangle):
                sure &= (u - neuron.surrogate.width / 2).abs() > UNSURE
        self.sure = sure
        self.g *= sure
        s = neuron.scan(x)
        s.backward(self.g.double())
        self.s = s.detach()
        # From rest, and without decay of the input, the first timestep depends on no decay.
        self.grad = {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in leaf.items()}
        still = replace(neuron, decay=self.decay.item())
        _, self.elig = spikes_and_eligibility(still, x.detach())

    def fire(self) -> Tensor:
        return kernel.fire(self.y, self.a, self.b, self.rest, self.decay, self.neuron, self.T)

    def backward(self, g2: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return kernel.fire_backward(
            self.g, self.y, self.a, self.b, self.mean, self.rstd, self.rest, self.decay,
            self.neuron, self.T, self.norm == "batch", g2,
        )  # fmt: skip

    def rate_fire(self) -> tuple[Tensor | None, ...]:
        return kernel.rate_fire(
            self.y, self.a, self.b, self.mean, self.rstd, self.rest, self.decay,
            self.neuron, self.T,
        )  # fmt: skip


def check(case: dict[str, Any]) -> None:
    """Everything that a case can show."""
    p = Problem(case)
    bound, exact = BOUND[case["dtype"]], BOUND["float32"]
    assert p.sure.double().mean() > 0.97, "too little is compared"
    assert 0.02 < p.s.mean() < 0.9, "hardly anything to compare"

    s = p.fire()
    assert s.dtype == p.dtype
    assert torch.equal(s.double()[:, p.sure], p.s[:, p.sure])
    if p.norm is None:  # the same operations in the same order as in plain torch: the same bits
        c = p.y.float().expand(p.g.shape) + (0 if p.rest is None else p.rest.float())
        assert torch.equal(s.float(), p.neuron.scan(c))

    gy, grest, dweight, dbias, ddecay = p.backward()
    assert gy.dtype == p.dtype
    close("gy", gy, p.grad["y"], bound)
    assert (grest is None) == (p.rest is None)
    if grest is not None:
        assert grest.dtype == p.dtype
        close("grest", grest, p.grad["rest"], bound)
    assert (dweight is None) == (dbias is None) == (p.norm is None)
    if dweight is not None:
        close("dweight", dweight, p.grad["weight"], exact)
        close("dbias", dbias, p.grad["bias"], exact)
    assert (ddecay is None) == (not case["learn_decay"])
    if ddecay is not None:
        close("ddecay", ddecay, p.grad["decay"], exact, scale=p.g.norm().item())

    chosen = torch.rand(p.g.shape, generator=p.draw).to(device) < 0.5
    whole, p.g = p.g, p.g * chosen
    in_two = p.backward(g2=guarded(whole * ~chosen))
    for one, other in zip(in_two, (gy, grest, dweight, dbias, ddecay), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    p.g = whole

    again, rate, elig, xhat = p.rate_fire()
    assert torch.equal(again, s)
    assert rate.dtype == p.dtype
    close("rate", rate, s.double().mean(0), bound)
    close("elig", elig[p.sure], p.elig[p.sure], exact)
    assert (xhat is None) == (p.norm is None)
    if xhat is not None:
        y, mean, var = p.y.double(), p.mean.double(), p.var.double()
        close("xhat", xhat, (y.mean(0) - mean) * torch.rsqrt(var + EPS), exact)

    assert all(x[:PAD].isnan().all() and x[-PAD:].isnan().all() for x in guards), "out of bounds"


def plain(neuron: LIF, y: Tensor) -> Tensor:
    """Spikes of y without normalisation, with the neuron's decay."""
    decay = torch.tensor([neuron.decay], device=device)
    return kernel.fire(y.to(device), None, None, None, decay, neuron, len(y)).cpu()


def ties_are_exact() -> None:
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(-8, 9, (6, 9, 20), generator=draw) / 4
    for reset, strict in itertools.product(("soft", "hard"), (False, True)):
        neuron = LIF(0.5, 1.0, reset, strict=strict)
        _, v_pre, _ = neuron.step(y[1], neuron.step(y[0], None)[2])
        assert (v_pre == 1).sum() > 3  # there are ties
        assert torch.equal(plain(neuron, y), neuron.scan(y))
        leaf, one = y.double().requires_grad_(), torch.ones_like(y, device=device)
        neuron.scan(leaf).sum().backward()
        decay, none = torch.tensor([0.5], device=device), (None,) * 5
        gy = kernel.fire_backward(one, y.to(device), *none, decay, neuron, len(y), False)[0]
        close("gy at ties", gy, leaf.grad, BOUND["float32"])


def broken_input_is_never_silent() -> None:
    draw = torch.Generator().manual_seed(0)
    for reset, dtype in itertools.product(("soft", "hard"), BOUND):
        y = torch.randn(5, 12, 20, generator=draw).to(getattr(torch, dtype))
        y[1, 2, 3], y[2, 4, 5], y[0, 6, 7] = math.nan, math.inf, -math.inf
        neuron = LIF(0.5, 1.0, reset, surrogate=Rectangle())
        s = plain(neuron, y)
        assert s[1:, 2, 3].isnan().all()
        assert s[2:, 4, 5].isnan().all()
        assert s[:, 6, 7].isnan().all()
        assert torch.equal(s.isnan(), neuron.scan(y).isnan())
        assert torch.equal(s.nan_to_num(9), neuron.scan(y).nan_to_num(9))
        decay = torch.tensor([0.5], device=device)
        y = y.to(device)
        _, rate, _, _ = kernel.rate_fire(y, None, None, None, None, None, decay, neuron, 5)
        assert rate[[2, 4, 6], [3, 5, 7]].isnan().all()
        assert rate.isnan().sum() == 3


def broken_channel_stays_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    for value in (math.nan, math.inf):
        y = torch.randn(3, 40, 20, generator=draw)
        y[1, 5, 7] = value
        y, decay = y.to(device), torch.tensor([0.5], device=device)
        mean, var = kernel.stats(y)
        others = torch.arange(20, device=device) != 7
        assert not mean[7].isfinite()
        assert var[7].isnan()
        rstd = torch.rsqrt(var + EPS)
        b = -mean * rstd
        s = kernel.fire(y, rstd, b, None, decay, LIF(), 3)
        assert s[:, :, 7].isnan().all()
        assert s[:, :, others].isfinite().all()
        gradients = kernel.fire_backward(
            y.nan_to_num(), y, rstd, b, mean, rstd, None, decay, LIF(), 3, True
        )
        for x in gradients[:1] + gradients[2:4]:
            assert x[..., others].isfinite().all()


def statistics_survive_large_offsets() -> None:
    """Many programs and parts, the last ragged; values far from 0, first rows unlike the others."""
    draw = torch.Generator().manual_seed(0)
    cells, merge = launching.CELLS, launching.MERGE
    for T, M, C, dtype in ((1, 3000, 20, "float32"), (3, 700, 64, "float16"), (2, 77, 1, "float32"),
                           (4, 500, 48, "bfloat16")):  # fmt: skip
        launching.CELLS, launching.MERGE = (
            (1, launching.Tile(16, 8, 8)) if T == 1 else (cells, merge)
        )
        y = torch.randn(T, M, C, generator=draw) * torch.logspace(-3, 1, C) + 100
        y[0, :40] = 0 if C == 1 else 99
        y = guarded(y.to(getattr(torch, dtype)))
        mean, var = kernel.stats(y)
        launching.CELLS, launching.MERGE = cells, merge
        close("mean", mean, y.double().mean((0, 1)), 1e-7)
        wanted = y.double().var((0, 1), correction=0)
        close("var", var / wanted, torch.ones_like(wanted), 2e-5)
        assert torch.equal(var, kernel.stats(y)[1]) or T == 1
    constant = kernel.stats(torch.full((2, 50, 5), 0.1, device=device))
    assert (constant[0] - 0.1).abs().max() < 1e-7
    assert (constant[1] >= 0).all()
    assert (constant[1] < 1e-12).all()


def one_pass_makes_what_batchnorm_makes() -> None:
    """Constants of the normalisation, and running statistics, as torch has them in float64."""
    draw = torch.Generator().manual_seed(0)
    for (T, M, C), share, batch_stats in itertools.product(
        ((1, 3000, 20), (3, 70, 64), (2, 1, 3)), (0.0, 0.1, 1.0), (True, False)
    ):
        y = guarded(torch.randn(T, M, C, generator=draw) * 3 + 2)
        weight, bias, mean, var = (guarded(torch.rand(C, generator=draw) + 0.5) for _ in range(4))
        before = [x.double() for x in (mean, var)]
        wanted = [x.clone() for x in before]
        count = 4 * M
        if batch_stats:
            flat = y.double().flatten(0, 1)
            found = [flat.mean(0), flat.var(0, correction=0)]
            unbiased = (found[0], found[1] * count / (count - 1))
            wanted = [x.lerp(to, share) for x, to in zip(before, unbiased, strict=True)]
        else:
            found = before
        a, b, m, r = kernel.affine(y, weight, bias, (mean, var), EPS, share, count, batch_stats)
        rstd = torch.rsqrt(found[1] + EPS)
        close("mean of a", m, found[0], 1e-6)
        close("rstd", r, rstd, 1e-6)
        close("a", a, weight * rstd, 1e-6)
        close("b", b, bias - weight * rstd * found[0], 2e-6)
        close("running mean", mean, wanted[0], 1e-6)
        close("running var", var, wanted[1], 1e-6)
        if share == 0 or not batch_stats:
            assert torch.equal(mean.double(), before[0])
            assert torch.equal(var.double(), before[1])
    mean, var = kernel.stats(y)
    lone = kernel.affine(y, weight, bias, (None, None), EPS, 0.0, count, True)
    assert torch.equal(lone[2], mean)
    assert all(x[:PAD].isnan().all() and x[-PAD:].isnan().all() for x in guards), "out of bounds"


def means_go_back_as_in_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    for (M, C), dtype, normed, rested, batch_stats in itertools.product(
        ((700, 20), (5, 64), (1, 3)), BOUND, (True, False), (True, False), (True, False)
    ):
        g, elig, xhat = (guarded(torch.randn(M, C, generator=draw)) for _ in range(3))
        g, a = guarded(g.to(getattr(torch, dtype))), guarded(torch.rand(C, generator=draw) + 0.5)
        known = (xhat, a) if normed else (None, None)
        wide = [None if x is None else x.double() for x in (g, elig, *known)]
        wanted = step_backward(*wide, rested, normed and batch_stats)
        found = kernel.rate_backward(g, elig, *known, rested, normed and batch_stats)
        bounds = (BOUND[dtype],) * 2 + (BOUND["float32"],) * 2
        for name, one, other, bound in zip(("gc", "gz", "dweight", "dbias"), found, wanted, bounds,
                                           strict=True):  # fmt: skip
            assert (one is None) == (other is None), name
            if one is not None:
                close(f"mean {name}", one, other.cpu(), bound, scale=g.norm().item())
        assert found[0].dtype == g.dtype
    assert all(x[:PAD].isnan().all() and x[-PAD:].isnan().all() for x in guards), "out of bounds"


def windows_are_averaged() -> None:
    draw = torch.Generator().manual_seed(0)
    for (B, h, w, C, k), dtype in itertools.product(
        ((3, 2, 5, 20, 2), (1, 4, 1, 64, 3), (2, 3, 3, 7, 1)), BOUND
    ):
        x = guarded(torch.randn(B, k * h, k * w, C, generator=draw).to(getattr(torch, dtype)))
        g = guarded(torch.randn(B, h, w, C, generator=draw).to(getattr(torch, dtype)))
        leaf = x.double().permute(0, 3, 1, 2).requires_grad_()
        wanted = torch.nn.functional.avg_pool2d(leaf, k)
        wanted.backward(g.double().permute(0, 3, 1, 2))
        close("means", kernel.average(x, k), wanted.detach().permute(0, 2, 3, 1), BOUND[dtype])
        gx = kernel.average_backward(g, k)
        close("of windows", gx, leaf.grad.permute(0, 2, 3, 1), BOUND[dtype])
    assert all(x[:PAD].isnan().all() and x[-PAD:].isnan().all() for x in guards), "out of bounds"


def long_trains() -> None:
    case = {name: values[0] for name, values in FACTORS.items()}
    check(case | {"T": 32, "size": (20, 16), "norm": "batch", "dtype": "float16"})


def one_cell() -> None:
    case = {name: values[0] for name, values in FACTORS.items()}
    p = Problem(case | {"T": 5, "size": (1, 1)}, seed=3)
    assert torch.equal(p.fire().double(), p.s)
    close("one gy", p.backward()[0], p.grad["y"], BOUND["float32"])


def equal_gradients_are_one_tensor() -> None:
    case = {name: values[0] for name, values in FACTORS.items()} | {"rest": True, "T": 2}
    gy, grest, *_ = Problem(case).backward()
    assert gy is grest
    gy, grest, *_ = Problem(case | {"stem": True}).backward()
    assert gy.shape != grest.shape


def operators_keep_their_promises() -> None:
    """Schemas, fake tensors, and the graph of torch.compile."""
    case = {name: values[0] for name, values in FACTORS.items()}
    case |= {"T": 2, "size": (5, 4), "norm": "batch", "learn_decay": True, "rest": True}
    for name, new in ALLOCATORS.items():  # guarded arrays lie amid others, which shows
        setattr(kernel, name, new)
    p = Problem(case)
    ops = torch.ops.snnbench
    neuron = launching.constants(p.neuron)
    arrays = (p.y, p.a, p.b, p.mean, p.rstd, p.rest, p.decay)
    none = (p.y, None, None, None, None, None, p.decay)
    for op, args in (
        (ops.stats, (p.y,)),
        (ops.fire, (p.y, p.a, p.b, p.rest, p.decay, p.T, *neuron)),
        (ops.rate_fire, (*arrays, p.T, *neuron)),
        (ops.rate_fire, (*none, p.T, *neuron)),
        (ops.rate_backward, (p.g[0], p.rest[0], p.rest[1], p.a, True, True)),
        (ops.rate_backward, (p.g[0], p.rest[0], p.rest[1], p.a, False, False)),
        (ops.average, (p.y.view(1, 2, 10, 2), 2)),
        (ops.average_backward, (p.y.view(1, 2, 5, 4), 2)),
        (ops.affine, (p.y, p.weight, p.bias, p.mean, p.var, EPS, 0.1, p.y.shape[1], True)),
        (ops.affine, (p.y, p.weight, p.bias, p.mean, p.var, EPS, 0.0, p.y.shape[1], False)),
        (ops.fire_backward, (p.g, p.g, *arrays, True, p.T, *neuron)),
        (ops.fire_backward, (p.g, None, *none, False, p.T, *neuron)),
    ):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(op.default, args, test_utils=tests)


def compilation_sees_whole_operators() -> None:
    case = {name: values[0] for name, values in FACTORS.items()} | {"T": 2, "rest": True}
    p = Problem(case | {"norm": "batch", "learn_decay": True})
    seen: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def step() -> tuple[Any, ...]:
        return *kernel.stats(p.y), p.fire(), *p.backward(), *p.rate_fire()

    found = torch.compile(step, backend=backend, fullgraph=True)()
    assert {
        f"snnbench.{name}.default" for name in ("stats", "fire", "fire_backward", "rate_fire")
    } <= set(seen)
    for one, other in zip(found, step(), strict=True):
        assert torch.equal(one, other)


ANYWHERE = (
    ties_are_exact, broken_input_is_never_silent, broken_channel_stays_alone,
    statistics_survive_large_offsets, one_pass_makes_what_batchnorm_makes, long_trains, one_cell,
    equal_gradients_are_one_tensor, windows_are_averaged, means_go_back_as_in_torch,
)  # fmt: skip
SPECIAL = (*ANYWHERE, operators_keep_their_promises, compilation_sees_whole_operators)


def interpret() -> None:
    """Run all checks and print what each complains of, its seconds, and the worst errors."""
    import traceback

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # also fills new memory with NaN
    assert torch.empty(9).isnan().all()
    complaints: dict[str, str] = {}
    seconds: dict[str, float] = {}
    todo = {title(case): lambda case=case: check(case) for case in CASES}
    for name, run in (todo | {f.__name__: f for f in SPECIAL}).items():
        start = time.perf_counter()
        guards.clear()
        for allocator, new in ALLOCATORS.items():
            setattr(kernel, allocator, poisoned(new))
        try:
            run()
            complaints[name] = ""
        except Exception:
            complaints[name] = traceback.format_exc()
        seconds[name] = time.perf_counter() - start
    sys.stdout.write(json.dumps({"complaints": complaints, "seconds": seconds, "worst": worst}))


@pytest.fixture(scope="module")
def complaints() -> dict[str, str]:
    """What the interpreted checks complain of, by their names."""
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])["complaints"]
    return found


@pytest.mark.parametrize("name", [title(case) for case in CASES])
def test_case_agrees_with_float64(complaints: dict[str, str], name: str) -> None:
    assert complaints[name] == "", complaints[name]


@pytest.mark.parametrize("name", [f.__name__ for f in SPECIAL])
def test_interpreted(complaints: dict[str, str], name: str) -> None:
    assert complaints[name] == "", complaints[name]


# --- on the host ------------------------------------------------------------------------------

Launch = dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What would have been launched; nothing is."""
    found: list[Launch] = []

    def launch(name: str, tile: Any, tensors: Any, numbers: Any, **constants: Any) -> None:
        constants.pop("programs", None)
        found.append(
            {"name": name, "tile": tile, "args": [*tensors, *numbers], "constants": constants}
        )

    monkeypatch.setattr(launching, "launch_tile", launch)
    return found


def plan(T: int, M: int, C: int = 64, dtype: torch.dtype = torch.float16) -> None:
    """Ask for every kernel, with its first pick: normalised, with a rest, and plain."""
    y, c, decay = torch.empty(T, M, C, dtype=dtype), torch.empty(C), torch.empty(1)
    neuron = T, *launching.constants(LIF(reset="hard"))
    kernel._stats(y)
    kernel._fire(y, c, c, None, decay, *neuron)
    wide = torch.empty(M, C)
    kernel._rate_backward(y[0], wide, wide, c, True, True)
    kernel._rate_backward(y[0], wide, wide, c, False, False)
    kernel._average(torch.empty(M, 4, 8, C, dtype=dtype), 2)
    kernel._average_backward(torch.empty(M, 2, 4, C, dtype=dtype), 2)
    kernel._affine(y, c, c, c, c, EPS, 0.1, T * M, True)
    kernel._fire_backward(y, None, y, c, c, c, c, None, decay, True, *neuron)
    kernel._fire_backward(y, None, y, c, c, c, c, y, decay, True, *neuron)
    kernel._fire_backward(y, y, y, c, c, c, c, y, decay, True, *neuron)
    kernel._fire_backward(y, None, y, None, None, None, None, None, decay, False, *neuron)
    kernel._rate_fire(y, c, c, c, c, None, decay, *neuron)


def test_another_batch_size_compiles_nothing_anew(launches: list[Launch]) -> None:
    plan(4, 512)
    full, launches[:] = list(launches), []
    plan(4, 37)
    assert [launch["name"] for launch in launches] == [launch["name"] for launch in full]
    for one, other in zip(full, launches, strict=True):
        assert one["tile"] == other["tile"]
        assert one["constants"] == other["constants"]
        for i, (x, y) in enumerate(zip(one["args"], other["args"], strict=True)):
            parameter = getattr(launching.code(), one["name"]).params[i]
            # A number that changes must neither be a constant nor be looked at for its divisors.
            assert isinstance(x, Tensor) or x == y or parameter.do_not_specialize, parameter.name


@pytest.mark.parametrize("pick", [*launching.PICKS, launching.LONG, launching.STREAM])
def test_tiles(pick: launching.Pick) -> None:
    for C in range(1, 600):
        BM, BC, warps = launching.tile_of(C, pick)
        assert pick.cells * 32 * warps == BM * BC
        assert BC & (BC - 1) == 0
        assert BC <= launching.CHANNELS
        assert C % BC == 0 or BC // 2 < C <= BC or BC == 16


def test_the_fastest_pick_is_kept(launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    times = dict(zip(launching.PICKS, (3.0, 1.0, 2.0), strict=True))
    timed: list[launching.Pick] = []

    def milliseconds(launch: Callable[[launching.Pick], None], pick: launching.Pick) -> float:
        launch(pick)
        timed.append(pick)
        return times[pick]

    monkeypatch.setattr(launching, "_fastest", {})
    monkeypatch.setattr(launching, "_milliseconds", milliseconds)
    neuron = 4, *launching.constants(LIF())

    def fire(M: int, C: int, dtype: torch.dtype = torch.float16) -> launching.Tile:
        y = torch.empty(4, M, C, dtype=dtype)
        kernel._fire(y, None, None, None, torch.empty(1), *neuron)
        tile: launching.Tile = launches[-1]["tile"]
        return tile

    first, best = (launching.tile_of(64, pick) for pick in launching.PICKS[:2])
    assert fire(512, 64) == first  # nothing can be timed here, and nothing is kept
    monkeypatch.setattr(launching, "_can_time", lambda _: True)
    assert fire(512, 64) == best
    assert timed == list(launching.PICKS)
    assert fire(37, 64) == best
    assert timed == list(launching.PICKS)
    fire(512, 128)
    fire(512, 64, torch.float32)
    assert timed == list(launching.PICKS) * 3


def test_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert "not on cpu" in str(kernel.unavailable(torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel.unavailable(cuda) == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert "compute capability 7.0, this device has 6.1" in str(kernel.unavailable(cuda))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    # It is tried on something small: here there is no such device, as if nothing could be built.
    assert "Triton cannot build here: " in str(kernel.unavailable(cuda))
    monkeypatch.setattr(kernel, "stats", lambda y: (y, y))
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    assert kernel.unavailable(cuda) is None
    launching.code.cache_clear()
    for module in ("triton_code", "triton_rows"):
        monkeypatch.delitem(sys.modules, f"snnbench.kernels.{module}", raising=False)
        monkeypatch.delattr(f"snnbench.kernels.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton cannot be imported" in str(kernel.unavailable(cuda))


# --- compiled for a Hopper GPU ----------------------------------------------------------------

POINTERS = {torch.float16: "*fp16", torch.float32: "*fp32"}


def compile_for_hopper(launch: Launch) -> Any:
    """The code that a launch on a Hopper GPU would run, specialised as it would be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, tile = getattr(launching.code(), launch["name"]), launch["tile"]
    constants = launch["constants"] | {"BM": tile.BM, "BC": tile.BC}
    names = function.arg_names
    signature = dict.fromkeys(names, "constexpr")
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    divisible = {}
    for i, value in enumerate(launch["args"]):
        if value is None:
            constexprs[i,] = None
        elif isinstance(value, float):
            signature[names[i]] = "fp32"
        else:
            number = isinstance(value, int)
            signature[names[i]] = "i32" if number else POINTERS[value.dtype]
            if not number or (value % 16 == 0 and not function.params[i].do_not_specialize):
                divisible[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=divisible)
    options = {"num_warps": tile.warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers of a thread, and bytes of what did not fit into them (STACK, LOCAL)."""
    from triton import knobs

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {
        k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout + done.stderr)
    }


@pytest.mark.parametrize("T", [4, 8])
def test_hopper_code(
    T: int,
    launches: list[Launch],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    plan(T, 512)
    once = ("moments", "merge", "normalise", "recentre", "average", "rate_sums", "rate_backward")
    for launch in launches:
        name = launch["name"]
        if name in once and T > 4:  # they know nothing of T
            continue
        compiled = compile_for_hopper(launch)
        used = resources(compiled.asm["cubin"], tmp_path)
        record_property(f"{name} T={T}", used["REG"])
        assert used["STACK"] == used["LOCAL"] == 0, f"{name} spills: {used}"
        ptx = compiled.asm["ptx"]
        loads, stores = (re.findall(rf"{op}\.global\S*", ptx) for op in ("ld", "st"))
        # 16 bytes each; but for the decay, and the sums of a program, which are [C].
        narrow = 0 if name in once else 1
        assert [x for x in loads if not x.endswith("v4.b32")] == ["ld.global.b32"] * narrow
        assert {x for x in stores if not x.endswith("v4.b32")} <= {"st.global.b32"}
        if name not in ("moments", "merge", "normalise", "rate_sums"):
            wide = sum(x.endswith("v4.b32") for x in stores)
            assert wide >= (1 if name in once else T)
        if name == "fire":
            # As written, one for the spike and one for the reset: no sum of a membrane was
            # contracted.  The last reset has no effect.
            written = (2 * T - 1) * launching.PICKS[0].cells
            assert len(re.findall(r"fma\.rn\.f32", ptx)) == written


# --- on a GPU ---------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays on the GPU, guarded, and outputs full of NaN."""
    if why := kernel.unavailable(torch.device("cuda")):
        pytest.skip(why)
    monkeypatch.setattr(sys.modules[__name__], "device", "cuda")
    monkeypatch.setattr(
        launching, "PICKS", launching.PICKS[:1]
    )  # to time others is to compile them
    guards.clear()
    for name, new in ALLOCATORS.items():
        monkeypatch.setattr(kernel, name, poisoned(new))


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("case", CASES, ids=title)
def test_case_agrees_with_float64_on_a_gpu(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("run", ANYWHERE, ids=lambda f: f.__name__)
def test_on_a_gpu(run: Callable[[], None]) -> None:
    run()


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", BOUND)
def test_results_on_a_gpu_are_reproducible(dtype: str) -> None:
    case = {name: values[0] for name, values in FACTORS.items()}
    case |= {"T": 4, "size": (4097, 96), "norm": "batch", "dtype": dtype, "learn_decay": True}
    p, q = Problem(case), Problem(case)
    both = zip((p.mean, p.var, *p.backward()), (q.mean, q.var, *q.backward()), strict=True)
    assert all((one is None and other is None) or torch.equal(one, other) for one, other in both)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_a_graph_captures_a_layer_step() -> None:
    case = {name: values[0] for name, values in FACTORS.items()}
    p = Problem(case | {"T": 4, "size": (300, 64), "norm": "batch", "dtype": "float16"})

    def step() -> tuple[Any, ...]:
        return *kernel.stats(p.y), p.fire(), *p.backward()[:1], *p.rate_fire()

    wanted = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


if __name__ == "__main__":
    interpret()
