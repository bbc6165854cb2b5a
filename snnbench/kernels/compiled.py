"""The fused layer step written in torch and compiled by Inductor, on any device that it supports.

Compiling takes tens of seconds for every new combination of options; the number of pixels may
change without compiling again.  Arrays are [T, M, C]; the equations stand in `fused` and `neurons`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from snnbench.neurons import LIF

source = "torch operations fused by Inductor (torch.compile)"


@cache
def unavailable(device: torch.device) -> str | None:
    """Why this kernel cannot run here; None if it can. Compiles something small to find out."""
    if device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++")):
        return "Inductor needs a C++ compiler, and none was found (CXX or g++)"
    try:
        torch.compile(_doubled)(torch.ones(8, device=device))
    except Exception as error:
        return f"Inductor cannot compile here: {' '.join(str(error).split())[:200]}"
    return None


def stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, fp32."""
    var, mean = torch.var_mean(y.float(), (0, 1), correction=0)
    return mean, var


def fire(
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    rest: Tensor | None,
    decay: Tensor,
    neuron: LIF,
    T: int,
) -> Tensor:
    """Spikes [T, M, C], in the dtype of y."""
    s: Tensor = _call(_fire, y, a, b, rest, decay, physics=_constant(neuron), T=T)
    return s


def fire_backward(
    g: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rest: Tensor | None,
    decay: Tensor,
    neuron: LIF,
    T: int,
    batch_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of y, rest, weight, bias and decay for the spikes' gradient g."""
    gy, grest, gweight, gbias, gdecay = _call(
        _fire_backward, g, y, a, b, mean, rstd, rest, decay,
        physics=_constant(neuron), T=T, batch_stats=batch_stats,
    )  # fmt: skip
    return gy, grest, gweight, gbias, gdecay


def rate_fire(
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rest: Tensor | None,
    decay: Tensor,
    neuron: LIF,
    T: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Spikes [T, M, C]; rate, eligibility and mean normalised input [M, C]."""
    s, rate, elig, xhat = _call(
        _rate_fire, y, a, b, mean, rstd, rest, decay, physics=_constant(neuron), T=T
    )
    return s, rate, elig, xhat


def _call(function: Callable[..., Any], *arrays: Tensor | None, **options: Any) -> Any:
    """Run the compiled form; the number of pixels, axis 1, is left open."""
    plain = [None if array is None else array.detach() for array in arrays]
    for array in plain:
        if array is not None and array.dim() == 3 and array.shape[1] > 1:
            torch._dynamo.maybe_mark_dynamic(array, 1)
    return _compiled(function, tuple(options.items()))(*plain)


@cache
def _compiled(function: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> Any:
    def bound(*arrays: Tensor | None) -> Any:
        return function(*arrays, **dict(options))

    # torch counts compilations by code object, and gives up after eight: each has its own.
    bound.__code__ = bound.__code__.replace()
    return torch.compile(bound, dynamic=None)


def _constant(neuron: LIF) -> LIF:
    """The neuron without its decay, which comes as a tensor: so it can be a key."""
    fixed = {k: v for k, v in vars(neuron).items() if k != "decay"}
    return LIF(**fixed, decay=0.5)


def _doubled(x: Tensor) -> Tensor:
    return x + x


def _inputs(
    y: Tensor, a: Tensor | None, b: Tensor | None, rest: Tensor | None, T: int
) -> list[Tensor]:
    """Input currents of all timesteps, fp32."""
    y = y.float() if a is None or b is None else y.float() * a + b
    x_T = [y[0 if len(y) == 1 else t] for t in range(T)]
    return x_T if rest is None else [x + r.float() for x, r in zip(x_T, rest, strict=True)]


def _step(physics: LIF, decay: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes, membrane before and after the reset."""
    v_pre = decay * v + (decay * x if physics.decay_input else x)
    u = v_pre - physics.v_th
    s = ((u > 0) if physics.strict else (u >= 0)).float() + 0 * u
    after = v_pre - physics.drop * s if physics.reset == "soft" else v_pre * (1 - s)
    return s, v_pre, after


def _keep(physics: LIF, v_pre: Tensor, s: Tensor, h: Tensor) -> Tensor:
    """Derivative of the membrane after the reset by that before."""
    keep = torch.ones_like(s) if physics.reset == "soft" else 1 - s
    if physics.detach_reset:
        return keep
    return keep - (physics.drop if physics.reset == "soft" else v_pre) * h


def _fire(
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    rest: Tensor | None,
    decay: Tensor,
    physics: LIF,
    T: int,
) -> Tensor:
    v, s_T = torch.zeros_like(y[0], dtype=torch.float32), []
    for x in _inputs(y, a, b, rest, T):
        s, _, v = _step(physics, decay, v, x)
        s_T.append(s.to(y.dtype))
    return torch.stack(s_T)


def _fire_backward(
    g: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rest: Tensor | None,
    decay: Tensor,
    physics: LIF,
    T: int,
    batch_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    x_T = _inputs(y, a, b, rest, T)
    v = torch.zeros_like(x_T[0])
    trace = []
    for x in x_T:
        before = v
        s, v_pre, v = _step(physics, decay, v, x)
        trace.append((before, s, v_pre))
    gv, gx_T = torch.zeros_like(v), []
    gdecay = torch.zeros_like(v)
    for t in reversed(range(T)):
        before, s, v_pre = trace[t]
        h = physics.fire_grad(v_pre)
        now = g[t].float() * h + gv * _keep(physics, v_pre, s, h)
        gv = decay * now
        gdecay = gdecay + now * (before + x_T[t] if physics.decay_input else before)
        gx_T.append(decay * now if physics.decay_input else now)
    gx = torch.stack(gx_T[::-1])
    learned = gdecay.sum().reshape(1) if physics.learn_decay else None
    grest = None if rest is None else gx.to(rest.dtype)
    gx = gx.sum(0, keepdim=True) if len(y) == 1 else gx
    if a is None or mean is None or rstd is None:
        return gx.to(y.dtype), grest, None, None, learned
    xhat = (y.float() - mean) * rstd
    gbias, gweight = gx.sum((0, 1)), (gx * xhat).sum((0, 1))
    if batch_stats:
        count = y.shape[0] * y.shape[1]
        gx = gx - gbias / count - xhat * (gweight / count)
    return (a * gx).to(y.dtype), grest, gweight, gbias, learned


def _rate_fire(
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rest: Tensor | None,
    decay: Tensor,
    physics: LIF,
    T: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    v = torch.zeros_like(y[0], dtype=torch.float32)
    gain = decay if physics.decay_input else torch.ones_like(decay)
    rho, elig, rate = torch.zeros_like(v) + gain, torch.zeros_like(v), torch.zeros_like(v)
    s_T = []
    for x in _inputs(y, a, b, rest, T):
        s, v_pre, v = _step(physics, decay, v, x)
        h = physics.fire_grad(v_pre)
        elig = elig + h * rho
        rho = gain + decay * _keep(physics, v_pre, s, h) * rho
        rate = rate + s
        s_T.append(s.to(y.dtype))
    xhat = None
    if mean is not None and rstd is not None:
        xhat = (y.float().mean(0) - mean) * rstd
    return torch.stack(s_T), (rate / T).to(y.dtype), elig / T, xhat
