"""The CUDA kernel: the fused layer step in Triton, for fp32, fp16 and bf16 arrays.

All arrays are contiguous [T, M, C] (M batch x pixels, C channels, last).  y has Ty timesteps: T, or
one where the input is the same at all of them; then it is read once and its gradient is the sum of
theirs.  a, b, mean, rstd are fp32 [C], all given or all None; decay is fp32 [1] on the device.  The
input current is x = a y + b + rest, or x = y + rest; dweight and dbias are the gradients of
x = weight xhat + bias with xhat = (y - mean) rstd.  Only y and rest are needed for backward.

All results are deterministic: tiles are chosen by timing only where the results do not depend on
them.  The operations are torch operators (`snnbench::fire` ...), which torch.compile sees whole.
With TRITON_INTERPRET=1 in the environment they run on the CPU, slowly: for tests.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snnbench.kernels import triton_launch as launching
from snnbench.kernels.triton_launch import Given
from snnbench.neurons import LIF

takes_two = True  # gradients of spikes with two users
average_dtypes = (torch.float32, torch.float16, torch.bfloat16)
source = "Triton, one pass forward and one or two backward over all timesteps"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CAPABILITY = (7, 0)  # of the oldest GPUs that Triton compiles for
MOST_T = 128  # the code of all timesteps stands in a row: to compile more would take minutes

Form = Sequence[bool]  # hard, detached, strict, decay_input, learn_decay
Levels = Sequence[float]  # v_th, drop; p and q of the surrogate


# --- the backend ------------------------------------------------------------------------------


def unavailable(device: torch.device) -> str | None:
    """Why this kernel cannot run on the device; None if it can."""
    if device.type != "cuda" and not INTERPRETED:
        return f"the Triton kernel runs on a CUDA device, not on {device.type}"
    try:
        launching.code()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        needed, has = (".".join(map(str, pair)) for pair in (CAPABILITY, found))
        return f"the Triton kernel needs compute capability {needed}, this device has {has}"
    try:
        stats(torch.ones(1, 2, 4, device=device))
    except Exception as error:  # of many kinds: no C compiler, no ptxas, a driver too old
        return f"Triton cannot build here: {' '.join(str(error).split())[:200]}"
    return None


def stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of y [Ty, M, C], fp32."""
    mean, var = torch.ops.snnbench.stats.default(y).unbind()
    return mean, var


def affine(
    y: Tensor, weight: Tensor, bias: Tensor, running: tuple[Given, Given], eps: float,
    share: float, count: int, batch_stats: bool,
) -> Tensor:  # fmt: skip
    """a, b, mean, rstd, [4, C], of a BatchNorm of y [Ty, M, C]; `count` values a channel.

    The running mean and variance move by `share` towards those of the batch, in place.
    """
    out: Tensor = torch.ops.snnbench.affine.default(
        y, weight, bias, *running, eps, share, count, batch_stats
    )
    return out


def fire(y: Tensor, a: Given, b: Given, rest: Given, decay: Tensor, neuron: LIF, T: int) -> Tensor:
    """Spikes [T, M, C], in the dtype of y; NaN from where on a membrane is not finite."""
    s: Tensor = torch.ops.snnbench.fire.default(
        y, a, b, rest, decay, T, *launching.constants(neuron)
    )
    return s


def fire_backward(
    g: Tensor, y: Tensor, a: Given, b: Given, mean: Given, rstd: Given, rest: Given,
    decay: Tensor, neuron: LIF, T: int, batch_stats: bool, g2: Given = None,
) -> tuple[Tensor, Given, Given, Given, Given]:  # fmt: skip
    """Gradients of y, rest, weight, bias and decay for the spikes' gradient g [T, M, C].

    It is g + g2 where they have two users.  The gradients of y and rest are in their dtypes, and
    may be one and the same tensor; those of weight and bias are None without a, that of the decay
    is None unless it is learned.  With `batch_stats`, mean and rstd depend on y, and its gradient
    flows through them too.
    """
    out = torch.ops.snnbench.fire_backward.default(
        g, g2, y, a, b, mean, rstd, rest, decay, batch_stats, T, *launching.constants(neuron)
    )
    gy = out[0]
    grest = None if rest is None else gy if _twins(y, a, rest, T) else out[1]
    dbias, dweight = (None, None) if a is None else (out[-1][0], out[-1][1])
    ddecay = out[-1][-1].sum().view(1) if neuron.learn_decay else None
    return gy, grest, dweight, dbias, ddecay


def rate_fire(
    y: Tensor, a: Given, b: Given, mean: Given, rstd: Given, rest: Given,
    decay: Tensor, neuron: LIF, T: int,
) -> tuple[Tensor, Tensor, Tensor, Given]:  # fmt: skip
    """Spikes [T, M, C]; their rate, the eligibility and the time-mean of xhat (or None), [M, C].

    Spikes and rate are in the dtype of y, the others fp32.
    """
    s, rate, elig, *xhat = torch.ops.snnbench.rate_fire.default(
        y, a, b, mean, rstd, rest, decay, T, *launching.constants(neuron)
    )
    return s, rate, elig, xhat[0] if xhat else None


def rate_backward(
    g: Tensor, elig: Tensor, xhat: Given, a: Given, rested: bool, batch_stats: bool
) -> tuple[Tensor, Given, Given, Given]:
    """Gradients of the mean input and the rest [M, C], of weight and bias, for that of the rate."""
    if xhat is None or a is None:
        gz = (g * elig).to(g.dtype)
        return gz, gz if rested else None, None, None
    out = torch.ops.snnbench.rate_backward.default(g, elig, xhat, a, rested, batch_stats)
    dbias, dweight = out[-1]
    return out[0], out[1] if rested else None, dweight, dbias


def average(x: Tensor, k: int) -> Tensor:
    """Means of k x k windows of x [B, k h, k w, C], as [B, h, w, C]."""
    out: Tensor = torch.ops.snnbench.average.default(x, k)
    return out


def average_backward(g: Tensor, k: int) -> Tensor:
    """Gradient of x [B, k h, k w, C] for that of the means g [B, h, w, C]."""
    out: Tensor = torch.ops.snnbench.average_backward.default(g, k)
    return out


# --- what the operators return ----------------------------------------------------------------


def _new_stats(y: Tensor) -> Tensor:
    return y.new_empty((2, y.shape[2]), dtype=torch.float32)


def _new_affine(y: Tensor, *norm: Any) -> Tensor:
    return y.new_empty((4, y.shape[2]), dtype=torch.float32)


def _new_spikes(
    y: Tensor, a: Given, b: Given, rest: Given, decay: Tensor, T: int, *neuron: Any
) -> Tensor:
    return y.new_empty((T, *y.shape[1:]))


def _new_gradients(
    g: Tensor, g2: Given, y: Tensor, a: Given, b: Given, mean: Given, rstd: Given, rest: Given,
    decay: Tensor, batch_stats: bool, T: int, form: Form, *neuron: Any,
) -> list[Tensor]:  # fmt: skip
    """gy; grest unless it is gy; sums [Q, C] of bias and weight if there is a, of a decay."""
    out = [torch.empty_like(y)]
    if rest is not None and not _twins(y, a, rest, T):
        out.append(torch.empty_like(rest))
    if Q := _sums(a, form):
        out.append(y.new_empty((Q, y.shape[2]), dtype=torch.float32))
    return out


def _new_rates(
    y: Tensor, a: Given, b: Given, mean: Given, rstd: Given, rest: Given, decay: Tensor, T: int,
    *neuron: Any,
) -> list[Tensor]:  # fmt: skip
    """s, rate, elig; xhat if there is a."""
    cells = y.shape[1:]
    wide = [y.new_empty(cells, dtype=torch.float32) for _ in range(1 if a is None else 2)]
    return [y.new_empty((T, *cells)), y.new_empty(cells), *wide]


def _new_mean_gradients(g: Tensor, elig: Tensor, *norm: Any) -> list[Tensor]:
    """gc; grest if there is a rest; sums [2, C] of bias and weight."""
    _, _, rested, _ = norm
    out = [torch.empty_like(g) for _ in range(1 + rested)]
    return [*out, g.new_empty((2, g.shape[1]), dtype=torch.float32)]


def _new_means(x: Tensor, k: int) -> Tensor:
    B, H, W, C = x.shape
    return x.new_empty((B, H // k, W // k, C))


def _new_windows(g: Tensor, k: int) -> Tensor:
    B, h, w, C = g.shape
    return g.new_empty((B, k * h, k * w, C))


def _twins(y: Tensor, a: Given, rest: Tensor, T: int) -> bool:
    """Whether y and rest have the same gradient."""
    return a is None and y.shape[0] == T and rest.dtype == y.dtype


def _sums(a: Given, form: Form) -> int:
    return (0 if a is None else 2) + form[4]


# --- the operators ----------------------------------------------------------------------------


def _stats(y: Tensor) -> Tensor:
    parts, rows = _moments(y)
    out = _new_stats(y)
    launching.launch_tile(
        "merge",
        launching.MERGE,
        (parts, out),
        (rows[0], *parts.shape[:0:-1]),
        programs=1,
        ROWS=rows[1],
    )
    return out


def _affine(
    y: Tensor, weight: Tensor, bias: Tensor, running_mean: Given, running_var: Given, eps: float,
    share: float, count: int, batch_stats: bool,
) -> Tensor:  # fmt: skip
    C, out, running = y.shape[2], _new_affine(y), (running_mean, running_var)
    parts, (rows, of_part), P = None, (1, 1), 0
    if batch_stats:
        parts, (rows, of_part) = _moments(y)
        P = parts.shape[1]
    numbers = (rows, C, P, float(eps), float(share), count / max(1, count - 1))
    update = batch_stats and share > 0 and running_mean is not None
    arrays = (parts, weight, bias, *running, out)
    launching.launch_tile("normalise", launching.MERGE, arrays, numbers, programs=1,
                          UPDATE=update, ROWS=of_part)  # fmt: skip
    return out


def _moments(y: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Moments [2, parts, C] of some rows each; how many rows there are, and how many in a part."""
    assert y.is_contiguous()
    Ty, M, C = y.shape
    tile, steps = launching.stream(C, Ty)
    rows = tile.BM * steps
    parts = y.new_empty((2, launching.blocks(Ty * M, rows), C), dtype=torch.float32)
    launching.launch_tile("moments", tile, (y, parts), (Ty * M, C), STEPS=steps)
    return parts, (Ty * M, rows)


def _fire(
    y: Tensor, a: Given, b: Given, rest: Given, decay: Tensor, T: int,
    form: Form, surrogate: str, levels: Levels,
) -> Tensor:  # fmt: skip
    assert launching.fits(y, T, rest)
    M, C = y.shape[1:]
    s = _new_spikes(y, a, b, rest, decay, T)
    hard, _, strict, decay_input, _ = form
    launching.launch_fastest(
        "fire", (y, a, b, rest, decay, s), (M, C, *levels[:2]),
        T=T, STEM=len(y) < T, HARD=hard, STRICT=strict, DECAY_INPUT=decay_input,
    )  # fmt: skip
    return s


def _fire_backward(
    g: Tensor, g2: Given, y: Tensor, a: Given, b: Given, mean: Given, rstd: Given, rest: Given,
    decay: Tensor, batch_stats: bool, T: int, form: Form, surrogate: str, levels: Levels,
) -> list[Tensor]:  # fmt: skip
    assert launching.fits(y, T, rest, g, g2)
    Ty, M, C = y.shape
    out = _new_gradients(g, g2, y, a, b, mean, rstd, rest, decay, batch_stats, T, form)
    gy = out[0]
    grest = None if rest is None or _twins(y, a, rest, T) else out[1]
    hard, detached, strict, decay_input, learn_decay = form
    few = 4 if learn_decay else 8
    tile = launching.tile_of(C, launching.LONG if few < T else launching.PICKS[0])
    Q, parts = _sums(a, form), None
    if Q:
        parts = y.new_empty((Q, launching.blocks(M, tile.BM), C), dtype=torch.float32)
    # The statistics take their part off gy, or off grest, which then stands for gy.
    centred = a is not None and batch_stats
    by_rest = centred and rest is not None and Ty == T
    launching.launch_tile(
        "fire_backward", tile,
        (g, g2, y, a, b, mean, rstd, rest, decay, None if by_rest else gy, grest, parts),
        (M, C, *levels),
        T=T, STEM=Ty < T, HARD=hard, DETACHED=detached, STRICT=strict, DECAY_INPUT=decay_input,
        LEARN_DECAY=learn_decay, SURROGATE=surrogate,
    )  # fmt: skip
    if parts is not None:
        torch.sum(parts, 1, out=out[-1])
    if centred:
        tensors = (grest if by_rest else gy, y, a, mean, rstd, out[-1], gy)
        tile, steps = launching.stream(C, 1)
        launching.launch_tile(
            "recentre", tile, tensors, (Ty * M, C), SCALED=not by_rest, STEPS=steps
        )
    return out


def _rate_fire(
    y: Tensor, a: Given, b: Given, mean: Given, rstd: Given, rest: Given, decay: Tensor, T: int,
    form: Form, surrogate: str, levels: Levels,
) -> list[Tensor]:  # fmt: skip
    assert launching.fits(y, T, rest)
    M, C = y.shape[1:]
    out = _new_rates(y, a, b, mean, rstd, rest, decay, T)
    s, rate, elig, xhat = out if len(out) == 4 else (*out, None)
    hard, detached, strict, decay_input, _ = form
    launching.launch_fastest(
        "rate_fire", (y, a, b, mean, rstd, rest, decay, s, rate, elig, xhat), (M, C, *levels),
        T=T, STEM=len(y) < T, HARD=hard, DETACHED=detached, STRICT=strict,
        DECAY_INPUT=decay_input, SURROGATE=surrogate,
    )  # fmt: skip
    return out


def _rate_backward(
    g: Tensor, elig: Tensor, xhat: Tensor, a: Tensor, rested: bool, batch_stats: bool
) -> list[Tensor]:
    assert g.is_contiguous()
    M, C = g.shape
    out = _new_mean_gradients(g, elig, xhat, a, rested, batch_stats)
    tile, steps = launching.stream(C, 1)
    parts = g.new_empty((2, launching.blocks(M, tile.BM * steps), C), dtype=torch.float32)
    launching.launch_tile("rate_sums", tile, (g, elig, xhat, parts), (M, C), STEPS=steps)
    torch.sum(parts, 1, out=out[-1])
    centred, grest = out[-1] if batch_stats else None, out[1] if rested else None
    arrays = (g, elig, xhat, a, centred, out[0], grest)
    launching.launch_tile("rate_backward", tile, arrays, (M, C), STEPS=steps)
    return out


def _average(x: Tensor, k: int) -> Tensor:
    out = _new_means(x, k)
    _pool(x, out, k, backward=False)
    return out


def _average_backward(g: Tensor, k: int) -> Tensor:
    out = _new_windows(g, k)
    _pool(out, g, k, backward=True)
    return out


def _pool(windows: Tensor, means: Tensor, k: int, backward: bool) -> None:
    assert all(x.is_contiguous() for x in (windows, means))
    *of_means, C = means.shape
    numbers = (math.prod(of_means), C, of_means[-1])
    tile = launching.tile_of(C, launching.PICKS[0])
    launching.launch_tile("average", tile, (windows, means), numbers, K=k, BACKWARD=backward)


# --- registration -----------------------------------------------------------------------------

_LIBRARY = torch.library.Library("snnbench", "FRAGMENT")
_NEURON = "int T, bool[] form, str surrogate, float[] levels"


def _register(name: str, schema: str, run: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Make `run` a torch operator; `new` makes tensors like those that it returns."""
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CUDA")
    if INTERPRETED:
        _LIBRARY.impl(name, run, "CPU")
    torch.library.register_fake(f"snnbench::{name}", new, lib=_LIBRARY)


_register("stats", "(Tensor y) -> Tensor", _stats, _new_stats)
_register(
    "affine",
    "(Tensor y, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "float eps, float share, int count, bool batch_stats) -> Tensor",
    _affine,
    _new_affine,
)
_register(
    "fire",
    f"(Tensor y, Tensor? a, Tensor? b, Tensor? rest, Tensor decay, {_NEURON}) -> Tensor",
    _fire,
    _new_spikes,
)
_ARRAYS = "Tensor y, Tensor? a, Tensor? b, Tensor? mean, Tensor? rstd, Tensor? rest, Tensor decay"
_register("rate_fire", f"({_ARRAYS}, {_NEURON}) -> Tensor[]", _rate_fire, _new_rates)
_register(
    "rate_backward",
    "(Tensor g, Tensor elig, Tensor xhat, Tensor a, bool rested, bool batch_stats) -> Tensor[]",
    _rate_backward,
    _new_mean_gradients,
)
_register(
    "fire_backward",
    f"(Tensor g, Tensor? g2, {_ARRAYS}, bool batch_stats, {_NEURON}) -> Tensor[]",
    _fire_backward,
    _new_gradients,
)
_register("average", "(Tensor x, int k) -> Tensor", _average, _new_means)
_register("average_backward", "(Tensor g, int k) -> Tensor", _average_backward, _new_windows)
