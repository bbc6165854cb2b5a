"""The Triton code that knows no timesteps: gradients of means, BatchNorm's statistics, pooling.

Arrays are contiguous [M, C]; a program works on tiles of BM x BC cells, STEPS of them.  All sums
are per program, in a fixed order, and without atomics.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from snnbench.kernels.triton_code import (
    _channels,
    _read,
    _tile,
    code,
    fire,
    fire_backward,
    rate_fire,
)

__all__ = ["fire", "fire_backward", "rate_fire"]  # with those below, all that is launched

# --- gradients of means -----------------------------------------------------------------------


@code
def rate_sums(
    g_ptr: tl.tensor, elig_ptr: tl.tensor, xhat_ptr: tl.tensor, sums_ptr: tl.tensor, M: tl.tensor,
    C: tl.tensor, BM: tl.constexpr, BC: tl.constexpr, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """Every program's gradients of bias and weight, sums [2, programs, C], for g of the rate."""
    bias_sum = tl.zeros((BM, BC), tl.float32)
    weight_sum = tl.zeros((BM, BC), tl.float32)
    for i in range(STEPS):
        at, inside, _, _ = _tile((tl.program_id(0) * STEPS + i) * BM, M, C, BM, BC)
        gz = _read(g_ptr, at, inside).to(tl.float32) * _read(elig_ptr, at, inside)
        bias_sum += gz
        weight_sum = tl.fma(gz, _read(xhat_ptr, at, inside), weight_sum)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    to = sums_ptr + tl.program_id(0) * C + c
    tl.store(to, tl.sum(bias_sum, 0), mask=c < C)
    tl.store(to + tl.num_programs(0) * C, tl.sum(weight_sum, 0), mask=c < C)


@code
def rate_backward(
    g_ptr: tl.tensor, elig_ptr: tl.tensor, xhat_ptr: tl.tensor, a_ptr: tl.tensor,
    sums_ptr: tl.tensor, gc_ptr: tl.tensor, grest_ptr: tl.tensor, M: tl.tensor, C: tl.tensor,
    BM: tl.constexpr, BC: tl.constexpr, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of the mean input, gc, and of the mean rest, for g of the rate, all [M, C].

    gc = a (gz - (dbias + xhat dweight) / M) with gz = g elig; sums_ptr [2, C] may be None where the
    statistics are not those of the batch, and grest_ptr.
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    known = c < C
    a = _channels(a_ptr, c, known)
    if sums_ptr is not None:
        shift = tl.load(sums_ptr + c, mask=known, other=0.0) / M
        slope = tl.load(sums_ptr + C + c, mask=known, other=0.0) / M
    for i in range(STEPS):
        at, inside, _, _ = _tile((tl.program_id(0) * STEPS + i) * BM, M, C, BM, BC)
        gz = _read(g_ptr, at, inside).to(tl.float32) * _read(elig_ptr, at, inside)
        gc = gz
        if sums_ptr is not None:
            gc -= tl.fma(_read(xhat_ptr, at, inside), slope[None, :], shift[None, :])
        gc = a * gc
        tl.store(gc_ptr + at, gc.to(gc_ptr.dtype.element_ty), mask=inside)
        if grest_ptr is not None:
            tl.store(grest_ptr + at, gz.to(grest_ptr.dtype.element_ty), mask=inside)


# --- statistics of the batch ------------------------------------------------------------------


@code
def recentre(
    g_ptr: tl.tensor, y_ptr: tl.tensor, a_ptr: tl.tensor, mean_ptr: tl.tensor, rstd_ptr: tl.tensor,
    sums_ptr: tl.tensor, gy_ptr: tl.tensor, M: tl.tensor, C: tl.tensor, SCALED: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """gy = a (gx - (dbias + xhat dweight) / M) for all M rows of all timesteps.

    g is gx, or a gx if SCALED, and may be gy itself.  sums [Q, C] begins with dbias, dweight.
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    known = c < C
    a = tl.load(a_ptr + c, mask=known, other=0.0)
    rstd = tl.load(rstd_ptr + c, mask=known, other=0.0)
    shift = a * tl.load(sums_ptr + c, mask=known, other=0.0) / M
    slope = a * rstd * tl.load(sums_ptr + C + c, mask=known, other=0.0) / M
    mean = tl.load(mean_ptr + c, mask=known, other=0.0)
    for i in range(STEPS):
        at, inside, _, _ = _tile((tl.program_id(0) * STEPS + i) * BM, M, C, BM, BC)
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if not SCALED:
            g = a[None, :] * g
        g -= tl.fma(y - mean[None, :], slope[None, :], shift[None, :])
        tl.store(gy_ptr + at, g.to(gy_ptr.dtype.element_ty), mask=inside)


@code
def moments(
    y_ptr: tl.tensor, parts_ptr: tl.tensor, M: tl.tensor, C: tl.tensor, BM: tl.constexpr,
    BC: tl.constexpr, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """Every program's mean of its rows of y [M, C], and its sum of squared deviations from it.

    parts is [2, programs, C].  Deviations are first taken from the mean of BM of the rows: as that
    is a mean of the data itself, their squares cannot drown the variance.
    """
    first = tl.program_id(0) * (STEPS * BM)
    at, inside, c, known = _tile(first, M, C, BM, BC)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    near = tl.sum(y, 0) / tl.minimum(M - first, BM)
    linear = tl.zeros((BM, BC), tl.float32)
    square = tl.zeros((BM, BC), tl.float32)
    for i in range(STEPS):
        at, inside, _, _ = _tile(first + i * BM, M, C, BM, BC)
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        far = tl.where(inside, y - near[None, :], 0.0)
        linear += far
        square = tl.fma(far, far, square)
    rows = tl.minimum(M - first, STEPS * BM)
    offset = tl.sum(linear, 0) / rows
    deviation = tl.sum(square, 0) - offset * offset * rows
    to = parts_ptr + tl.program_id(0) * C + c
    tl.store(to, near + offset, mask=known)
    # Rounding may leave it below 0; a maximum would lose NaN.
    deviation = tl.where(deviation < 0, 0.0, deviation)
    tl.store(to + tl.num_programs(0) * C, deviation, mask=known)


@code
def _merged(
    parts_ptr: tl.tensor, M: tl.tensor, C: tl.tensor, P: tl.tensor, ROWS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
) -> Any:  # fmt: skip
    """Mean and biased variance [BC] of M rows, from the moments of P times ROWS of them.

    A program reads all parts of its channels, BM at a time; the grid is [1, channel blocks].
    """
    linear = tl.zeros((BM, BC), tl.float32)
    part = tl.program_id(0)  # 0
    while part < P:  # not `for`: under NumPy 2.4 an older interpreter cannot count to a value
        at, inside, _, _ = _tile(part, P, C, BM, BC)
        rows = tl.minimum(M - (part + tl.arange(0, BM)) * ROWS, ROWS).to(tl.float32)
        mean = tl.load(parts_ptr + at, mask=inside, other=0.0)
        linear = tl.fma(mean, rows[:, None], linear)
        part += BM
    centre = tl.sum(linear, 0) / M
    square = tl.zeros((BM, BC), tl.float32)
    part = tl.program_id(0)
    while part < P:
        at, inside, _, _ = _tile(part, P, C, BM, BC)
        rows = tl.minimum(M - (part + tl.arange(0, BM)) * ROWS, ROWS).to(tl.float32)
        far = tl.load(parts_ptr + at, mask=inside, other=0.0) - centre[None, :]
        within = tl.load(parts_ptr + P * C + at, mask=inside, other=0.0)
        square += tl.where(inside, tl.fma(far * far, rows[:, None], within), 0.0)
        part += BM
    return centre, tl.sum(square, 0) / M


@code
def merge(
    parts_ptr: tl.tensor, out_ptr: tl.tensor, M: tl.tensor, C: tl.tensor, P: tl.tensor,
    ROWS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
) -> None:  # fmt: skip
    """Mean and biased variance of M rows, out [2, C]."""
    mean, var = _merged(parts_ptr, M, C, P, ROWS, BM, BC)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    tl.store(out_ptr + c, mean, mask=c < C)
    tl.store(out_ptr + C + c, var, mask=c < C)


@code
def normalise(
    parts_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, running_mean_ptr: tl.tensor,
    running_var_ptr: tl.tensor, out_ptr: tl.tensor, M: tl.tensor, C: tl.tensor, P: tl.tensor,
    eps: tl.tensor, share: tl.tensor, unbiased: tl.tensor, UPDATE: tl.constexpr,
    ROWS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
) -> None:  # fmt: skip
    """a, b, mean and rstd of a BatchNorm, out [4, C], by the M rows, or by the running ones.

    The latter without parts_ptr.  With UPDATE they move by their share towards those of the rows.
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    known = c < C
    if parts_ptr is None:
        mean = tl.load(running_mean_ptr + c, mask=known, other=0.0)
        var = tl.load(running_var_ptr + c, mask=known, other=0.0)
    else:
        mean, var = _merged(parts_ptr, M, C, P, ROWS, BM, BC)
    if UPDATE:
        old = tl.load(running_mean_ptr + c, mask=known, other=0.0)
        tl.store(running_mean_ptr + c, old + share * (mean - old), mask=known)
        old = tl.load(running_var_ptr + c, mask=known, other=0.0)
        tl.store(running_var_ptr + c, old + share * (var * unbiased - old), mask=known)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    a = tl.load(weight_ptr + c, mask=known, other=0.0) * rstd
    b = tl.fma(-a, mean, tl.load(bias_ptr + c, mask=known, other=0.0))
    tl.store(out_ptr + c, a, mask=known)
    tl.store(out_ptr + C + c, b, mask=known)
    tl.store(out_ptr + 2 * C + c, mean, mask=known)
    tl.store(out_ptr + 3 * C + c, rstd, mask=known)


# --- pooling ----------------------------------------------------------------------------------


@code
def average(
    x_ptr: tl.tensor, out_ptr: tl.tensor, M: tl.tensor, C: tl.tensor, W: tl.tensor,
    K: tl.constexpr, BACKWARD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
) -> None:  # fmt: skip
    """Means of K x K windows, W in a row: x [M windows of K K sites, C] to out [M, C].

    BACKWARD, the gradient of the windows for that of the means, from out_ptr to x_ptr.
    """
    at, inside, _, _ = _tile(tl.program_id(0) * BM, M, C, BM, BC)
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    site = (m // W) * (K * K * W) + (m % W) * K  # the first of a window
    total = tl.zeros((BM, BC), tl.float32)
    if BACKWARD:
        total = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32) / (K * K)
    for i in tl.static_range(K * K):
        there = (site + (i // K) * K * W + i % K)[:, None] * C + c[None, :]
        if BACKWARD:
            tl.store(x_ptr + there, total.to(x_ptr.dtype.element_ty), mask=inside)
        else:
            total += tl.load(x_ptr + there, mask=inside, other=0.0).to(tl.float32)
    if not BACKWARD:
        tl.store(out_ptr + at, (total / (K * K)).to(out_ptr.dtype.element_ty), mask=inside)
