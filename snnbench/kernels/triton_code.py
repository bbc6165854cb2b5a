"""The Triton code of the fused layer step: one pass over all timesteps, membranes in registers.

Arrays are contiguous [T, M, C] (M batch x pixels, C channels, last); a program works on tiles of
BM x BC cells, at all timesteps.  y_ptr has one timestep if STEM: its input never changes.  Per
cell, from v = 0 and with the input current x = a y + b + rest (x = y + rest without a_ptr):

    v_pre = decay v + x  (or decay v + decay x);   u = v_pre - v_th;   s = [u >= 0]  (or [u > 0])
    v     = v_pre - drop s   (soft)    or    v_pre - v_pre s   (hard)

Membranes, statistics and sums are fp32.  Backward computes the membranes anew from y and must
round as forward did: launched with enable_fp_fusion=False, no sum of a membrane is contracted, and
each `tl.fma` is exact or belongs to a gradient.  Plain torch rounds likewise: spikes without
normalisation are bit for bit those of `neurons`.  A membrane that is not finite gives spikes NaN.

All results are deterministic: sums are per program, in a fixed order, and without atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

AHEAD = tl.constexpr(4)  # timesteps that are read before they are needed


def code(function: Callable[..., Any]) -> Any:
    """The function as Triton code; another M (a short last batch) never compiles it anew."""
    return triton.jit(function, do_not_specialize=["M", "P", "W", "share", "unbiased"])


# --- one timestep -----------------------------------------------------------------------------


@code
def _current(y: tl.tensor, a: tl.tensor, b: tl.tensor, rest: tl.tensor) -> Any:
    """Input current x; a and b, and rest, may be None."""
    x = y.to(tl.float32)
    if a is not None:
        x = a * x + b
    if rest is not None:
        x += rest.to(tl.float32)
    return x


@code
def _charge(v: tl.tensor, x: tl.tensor, decay: tl.tensor, DECAY_INPUT: tl.constexpr) -> Any:
    """Membrane after the charge, v_pre."""
    if DECAY_INPUT:
        x = decay * x
    return decay * v + x


@code
def _fire(v_pre: tl.tensor, v_th: tl.tensor, STRICT: tl.constexpr) -> Any:
    """Spikes s: NaN where the membrane is not finite."""
    fired = v_pre > v_th if STRICT else v_pre >= v_th
    return tl.fma(v_pre, 0.0, fired.to(tl.float32))


@code
def _after(v_pre: tl.tensor, s: tl.tensor, drop: tl.tensor, HARD: tl.constexpr) -> Any:
    """Membrane after the reset."""
    return tl.fma(-v_pre if HARD else -drop, s, v_pre)


@code
def _surrogate(u: tl.tensor, p: tl.tensor, q: tl.tensor, SURROGATE: tl.constexpr) -> Any:
    """Derivative used for the threshold function: p is its width or slope, q its scale."""
    if SURROGATE == "triangle":
        below = p - tl.abs(u)
        h = q * tl.where(below < 0, 0.0, below)  # keeps NaN, as a maximum would not
    elif SURROGATE == "rectangle":
        h = tl.where(tl.abs(u) < p, q, 0.0)
    elif SURROGATE == "logistic":
        e = tl.exp(-p * tl.abs(u))
        h = q * e / ((1 + e) * (1 + e))
    else:
        tl.static_assert(SURROGATE == "atan")
        h = q / tl.fma(p * u, p * u, 1.0)
    return h


@code
def _through(
    gv: tl.tensor, gs: tl.tensor, h: tl.tensor, v_pre: tl.tensor, v_th: tl.tensor, drop: tl.tensor,
    HARD: tl.constexpr, DETACHED: tl.constexpr, STRICT: tl.constexpr,
) -> Any:  # fmt: skip
    """Gradient of v_pre from those of the membrane after the reset, gv, and of s, gs (or None).

    gs h + gv (keep - reset h), with keep = 1, reset = drop (soft) or 1 - s, v_pre (hard).
    """
    kept = gv
    if HARD:  # not gv (1 - s): all s would have to stay in registers since the forward pass
        kept = tl.where(v_pre <= v_th if STRICT else v_pre < v_th, gv, 0.0)
    if not DETACHED:
        reset = -v_pre if HARD else -drop
        gs = reset * gv if gs is None else tl.fma(reset, gv, gs)
    return kept if gs is None else tl.fma(gs, h, kept)


@code
def _tile(row: tl.tensor, M: tl.tensor, C: tl.tensor, BM: tl.constexpr, BC: tl.constexpr) -> Any:
    """Offsets [BM, BC] of the cells from `row` on, those that exist; their channels, likewise."""
    m = row + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (m[:, None] < M) & (c[None, :] < C)
    return m[:, None].to(tl.int64) * C + c[None, :], inside, c, c < C


@code
def _read(x_ptr: tl.tensor, at: tl.tensor, inside: tl.tensor) -> Any:
    """Cells of an array; 0 where there are none."""
    return tl.load(x_ptr + at, mask=inside, other=0.0)


@code
def _channels(x_ptr: tl.tensor, c: tl.tensor, known: tl.tensor) -> Any:
    """Values of channels, [1, BC]."""
    return tl.load(x_ptr + c, mask=known, other=0.0)[None, :]


# --- all timesteps ----------------------------------------------------------------------------


@code
def fire(
    y_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, rest_ptr: tl.tensor, decay_ptr: tl.tensor,
    s_ptr: tl.tensor, M: tl.tensor, C: tl.tensor, v_th: tl.tensor, drop: tl.tensor, T: tl.constexpr,
    STEM: tl.constexpr, HARD: tl.constexpr, STRICT: tl.constexpr, DECAY_INPUT: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
) -> None:  # fmt: skip
    """Spikes s [T, M, C]."""
    at, inside, c, known = _tile(tl.program_id(0) * BM, M, C, BM, BC)
    step = M.to(tl.int64) * C
    decay = tl.load(decay_ptr)
    a = None if a_ptr is None else _channels(a_ptr, c, known)
    b = None if b_ptr is None else _channels(b_ptr, c, known)
    v = tl.zeros((BM, BC), tl.float32)
    y_T = tl.tuple(())
    rest_T = tl.tuple(())
    for t in tl.static_range(-AHEAD, T):
        if t + AHEAD < T:
            if t + AHEAD == 0 or not STEM:
                y_T += (_read(y_ptr, at + (t + AHEAD) * step, inside),)
            if rest_ptr is not None:
                rest_T += (_read(rest_ptr, at + (t + AHEAD) * step, inside),)
        if t >= 0:
            rest = None if rest_ptr is None else rest_T[t]
            x = _current(y_T[0 if STEM else t], a, b, rest)
            v_pre = _charge(v, x, decay, DECAY_INPUT)
            s = _fire(v_pre, v_th, STRICT)
            v = _after(v_pre, s, drop, HARD)
            tl.store(s_ptr + at + t * step, s.to(s_ptr.dtype.element_ty), mask=inside)


@code
def rate_fire(
    y_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, mean_ptr: tl.tensor, rstd_ptr: tl.tensor,
    rest_ptr: tl.tensor, decay_ptr: tl.tensor, s_ptr: tl.tensor, rate_ptr: tl.tensor,
    elig_ptr: tl.tensor, xhat_ptr: tl.tensor, M: tl.tensor, C: tl.tensor, v_th: tl.tensor,
    drop: tl.tensor, p: tl.tensor, q: tl.tensor, T: tl.constexpr, STEM: tl.constexpr,
    HARD: tl.constexpr, DETACHED: tl.constexpr, STRICT: tl.constexpr, DECAY_INPUT: tl.constexpr,
    SURROGATE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
) -> None:  # fmt: skip
    """Spikes s [T, M, C]; rate, eligibility and mean normalised y [M, C].

    elig = 1/T sum_t h_t rho_t; rho_t is the sensitivity of v_pre_t to a constant current.
    """
    at, inside, c, known = _tile(tl.program_id(0) * BM, M, C, BM, BC)
    step = M.to(tl.int64) * C
    decay = tl.load(decay_ptr)
    a = None if a_ptr is None else _channels(a_ptr, c, known)
    b = None if b_ptr is None else _channels(b_ptr, c, known)
    mean = None if mean_ptr is None else _channels(mean_ptr, c, known)
    v = tl.zeros((BM, BC), tl.float32)
    carried = tl.zeros((BM, BC), tl.float32)
    elig = tl.zeros((BM, BC), tl.float32)
    count = tl.zeros((BM, BC), tl.float32)
    y_sum = tl.zeros((BM, BC), tl.float32)
    y_T = tl.tuple(())
    rest_T = tl.tuple(())
    for t in tl.static_range(-AHEAD, T):
        if t + AHEAD < T:
            if t + AHEAD == 0 or not STEM:
                y_T += (_read(y_ptr, at + (t + AHEAD) * step, inside),)
            if rest_ptr is not None:
                rest_T += (_read(rest_ptr, at + (t + AHEAD) * step, inside),)
        if t >= 0:
            y = y_T[0 if STEM else t]
            if a is not None:
                y_sum += y.to(tl.float32) - mean
            rest = None if rest_ptr is None else rest_T[t]
            v_pre = _charge(v, _current(y, a, b, rest), decay, DECAY_INPUT)
            s = _fire(v_pre, v_th, STRICT)
            v = _after(v_pre, s, drop, HARD)
            tl.store(s_ptr + at + t * step, s.to(s_ptr.dtype.element_ty), mask=inside)
            count += s
            h = _surrogate(v_pre - v_th, p, q, SURROGATE)
            rho = carried + (decay if DECAY_INPUT else 1.0)
            elig = tl.fma(h, rho, elig)
            carried = decay * _through(rho, None, h, v_pre, v_th, drop, HARD, DETACHED, STRICT)
    tl.store(rate_ptr + at, (count / T).to(rate_ptr.dtype.element_ty), mask=inside)
    tl.store(elig_ptr + at, elig / T, mask=inside)
    if a is not None:
        tl.store(xhat_ptr + at, y_sum * (_channels(rstd_ptr, c, known) / T), mask=inside)


@code
def fire_backward(
    g_ptr: tl.tensor, g2_ptr: tl.tensor, y_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor,
    mean_ptr: tl.tensor, rstd_ptr: tl.tensor, rest_ptr: tl.tensor, decay_ptr: tl.tensor,
    gy_ptr: tl.tensor, grest_ptr: tl.tensor, sums_ptr: tl.tensor, M: tl.tensor, C: tl.tensor,
    v_th: tl.tensor, drop: tl.tensor, p: tl.tensor, q: tl.tensor, T: tl.constexpr,
    STEM: tl.constexpr, HARD: tl.constexpr, DETACHED: tl.constexpr, STRICT: tl.constexpr,
    DECAY_INPUT: tl.constexpr, LEARN_DECAY: tl.constexpr, SURROGATE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients gx of the currents, as grest and as gy = a gx, and every program's sums of them.

    The spikes' gradient is g, or g + g2.  gy is without what flows through statistics of the batch:
    that is up to `recentre`.  sums is [Q, programs, C]: the gradients of bias and weight if there
    is a_ptr, of the decay if it learns.  g2_ptr, gy_ptr, grest_ptr and sums_ptr may be None.
    """
    at, inside, c, known = _tile(tl.program_id(0) * BM, M, C, BM, BC)
    step = M.to(tl.int64) * C
    decay = tl.load(decay_ptr)
    a = None if a_ptr is None else _channels(a_ptr, c, known)
    b = None if b_ptr is None else _channels(b_ptr, c, known)
    mean = None if mean_ptr is None else _channels(mean_ptr, c, known)
    v = tl.zeros((BM, BC), tl.float32)
    v_pre_T = tl.tuple(())
    for t in tl.static_range(T):
        if t == 0 or not STEM:
            y = _read(y_ptr, at + t * step, inside)
        rest = None if rest_ptr is None else _read(rest_ptr, at + t * step, inside)
        v_pre = _charge(v, _current(y, a, b, rest), decay, DECAY_INPUT)
        v = _after(v_pre, _fire(v_pre, v_th, STRICT), drop, HARD)
        v_pre_T += (v_pre,)
    # Read ahead: no load is moved up past a store, since for all that is known they overlap.
    g_T = tl.tuple(())  # from the last on
    g2_T = tl.tuple(())
    bias_sum = tl.zeros((BM, BC), tl.float32)
    weight_sum = tl.zeros((BM, BC), tl.float32)
    decay_sum = tl.zeros((BM, BC), tl.float32)
    gv = tl.zeros((BM, BC), tl.float32)
    total = tl.zeros((BM, BC), tl.float32)
    for t in tl.static_range(T - 1 + AHEAD, -1, -1):
        if t >= AHEAD:
            g_T += (_read(g_ptr, at + (t - AHEAD) * step, inside),)
            if g2_ptr is not None:
                g2_T += (_read(g2_ptr, at + (t - AHEAD) * step, inside),)
        if t < T:
            h = _surrogate(v_pre_T[t] - v_th, p, q, SURROGATE)
            g = g_T[T - 1 - t].to(tl.float32)
            if g2_ptr is not None:
                g += g2_T[T - 1 - t].to(tl.float32)
            gv_pre = _through(gv, g, h, v_pre_T[t], v_th, drop, HARD, DETACHED, STRICT)
            gv = decay * gv_pre
            gx = gv if DECAY_INPUT else gv_pre
            if LEARN_DECAY and t > 0:
                s = _fire(v_pre_T[t - 1], v_th, STRICT)
                decay_sum = tl.fma(gv_pre, _after(v_pre_T[t - 1], s, drop, HARD), decay_sum)
            if LEARN_DECAY and DECAY_INPUT:
                rest = None if rest_ptr is None else _read(rest_ptr, at + t * step, inside)
                decay_sum = tl.fma(gv_pre, _current(y, a, b, rest), decay_sum)
            total = total + gx if STEM else gx
            if a is not None and (t == 0 or not STEM):
                bias_sum += total
                weight_sum = tl.fma(total, y.to(tl.float32) - mean, weight_sum)
            if t > 0 and not STEM:  # read again: all of y would fill the registers
                y = _read(y_ptr, at + (t - 1) * step, inside)
            if grest_ptr is not None:
                tl.store(grest_ptr + at + t * step, gx.to(grest_ptr.dtype.element_ty), mask=inside)
            if gy_ptr is not None and (t == 0 or not STEM):
                gy = total if a is None else a * total
                tl.store(gy_ptr + at + t * step, gy.to(gy_ptr.dtype.element_ty), mask=inside)
    to = tl.program_id(0) * C + c
    row = tl.num_programs(0) * C
    if a is not None:
        weight_sum *= _channels(rstd_ptr, c, known)
        tl.store(sums_ptr + to, tl.sum(bias_sum, 0), mask=known)
        tl.store(sums_ptr + to + row, tl.sum(weight_sum, 0), mask=known)
        to += 2 * row
    if LEARN_DECAY:
        tl.store(sums_ptr + to, tl.sum(decay_sum, 0), mask=known)
