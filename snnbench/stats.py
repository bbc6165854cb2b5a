"""What figures over seeds can show: intervals, paired differences, exact tests, profiles.

Legend: n values of one method, one per seed; R resamples; W workloads (dataset, model, T, ...).

Few seeds are the rule. The headline interval is therefore Student's t. A bootstrap interval of the
mean never leaves the range of the data, and that range holds the mean of a symmetric distribution
with a probability of only 1 - 2^(1-n): 75% at n = 3, 97% at n = 6. The exact sign-flip test has
the same bound from the other side: its smallest two-sided p is 2^(1-n), and m times that after
Holm's correction over m tests.

Sources: Hesterberg, The American Statistician 69:371 (2015), expanded percentiles; Holm,
Scand. J. Statist. 6:65 (1979); Agarwal et al., NeurIPS 2021, interquartile mean and probability of
improvement; Dolan and Moré, Math. Program. 91:201 (2002), performance profiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ALPHA = 0.05
RESAMPLES = 4_999
EXACT_UP_TO = 16  # 2^16 patterns of signs are enumerated; beyond, some are drawn
EXACT_SPLITS = 20_000  # of two groups; that of 8 and 8 values has 12,870
MOST_SEEDS = 1_000
ROUNDING = 1e-9  # of a mean: what its values differ by less is rounding, not spread


@dataclass(frozen=True)
class Estimate:
    """A mean, half the width of its 95% interval (None for n = 1 or infinities), and n."""

    mean: float
    half: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the 95% interval leaves 0 out; one without width if n equal signs do so, too."""
        if self.half is None:
            return False
        return smallest_p(self.n) <= ALPHA if self.equal else abs(self.mean) > self.half

    @property
    def equal(self) -> bool:
        """Whether all values are one, other than 0, so that nothing is known of their spread."""
        return self.half is not None and self.mean != 0 and self.half <= ROUNDING * abs(self.mean)

    @property
    def p(self) -> float | None:
        """Two-sided p of a t-test against 0; None without an interval.

        Values that are all equal say no more than their signs do: the p of a sign-flip test.
        """
        if self.half is None:
            return None
        if self.equal:
            return smallest_p(self.n)
        if self.half == 0:
            return 1.0
        from scipy.special import stdtr

        return float(2 * stdtr(self.n - 1, -abs(self.mean) / self.half * _t(self.n - 1)))

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the values, in their unit."""
        return None if self.half is None else self.half / _t(self.n - 1) * math.sqrt(self.n)


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate | None:
    """Mean and Student-t interval; None without values.

    A miss (infinity) makes the mean one of its sign; what has no mean makes it NaN.
    """
    n = len(values)
    if n == 0:
        return None
    if not all(map(math.isfinite, values)):
        return Estimate(float(sum(v for v in values if not math.isfinite(v))), None, n)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Estimate(mean, _t(n - 1, confidence) * math.sqrt(variance / n), n)


@cache
def _t(freedom: float, confidence: float = 0.95) -> float:
    """Two-sided quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + confidence / 2))


def differences(values: Mapping[str, float], baseline: Mapping[str, float]) -> list[float]:
    """Value less baseline, for every pair that both have."""
    return [values[pair] - baseline[pair] for pair in sorted(values.keys() & baseline.keys())]


def unpaired(values: Sequence[float], baseline: Sequence[float]) -> Estimate | None:
    """Difference of means where nothing pairs them: Welch's interval; n is the smaller n."""
    a, b = estimate(values), estimate(baseline)
    if a is None or b is None:
        return None
    mean, n = a.mean - b.mean, min(a.n, b.n)
    if a.deviation is None or b.deviation is None:
        return Estimate(mean, None, n)
    va, vb = a.deviation**2 / a.n, b.deviation**2 / b.n
    if va + vb == 0:
        return Estimate(mean, 0.0, n)
    freedom = (va + vb) ** 2 / (va**2 / (a.n - 1) + vb**2 / (b.n - 1))
    return Estimate(mean, _t(freedom) * math.sqrt(va + vb), n)


# --- resampling -------------------------------------------------------------------------------


def bootstrap(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Expanded percentile interval of the mean; None for n < 2 or values that are not finite."""
    return bootstrap_of(_means, [values], confidence)


def bootstrap_of(
    statistic: Callable[[Floats], Floats],
    groups: Sequence[Sequence[float]],
    confidence: float = 0.95,
) -> tuple[float, float] | None:
    """Interval of a statistic of [R, N] values along N, resampled within each group (stratum).

    The levels are those at which a percentile interval of a normal mean is as wide as Student's
    t. Deterministic: the resamples are drawn from a fixed seed.
    """
    freedom = sum(map(len, groups)) - len(groups)
    if freedom < 1 or not all(math.isfinite(v) for group in groups for v in group):
        return None
    from scipy.special import ndtr

    drawn = [
        np.asarray(group, float)[_resamples(len(group), stratum)]
        for stratum, group in enumerate(groups)
    ]
    found = np.sort(statistic(np.concatenate(drawn, axis=1)))
    n = freedom + 1
    tail = float(ndtr(-math.sqrt(n / freedom) * _t(freedom, confidence)))
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def _means(values_RN: Floats) -> Floats:
    return np.asarray(values_RN.mean(axis=1))


@cache
def _resamples(n: int, stratum: int) -> NDArray[np.int32]:
    """Indices [R, n] of resamples with replacement."""
    return np.random.default_rng([n, stratum]).integers(0, n, (RESAMPLES, n), np.int32)


# --- tests ------------------------------------------------------------------------------------


def sign_flip(values: Sequence[float]) -> float | None:
    """Two-sided p of the sign-flip permutation test of paired differences; None without any.

    Exact up to n = 16, by all 2^n patterns of signs; beyond, by random ones, of which the seen
    one counts as one more (Phipson and Smyth 2010), so that the level is kept too.
    """
    d = np.asarray(values, float)
    n = len(d)
    if n == 0 or not np.isfinite(d).all():
        return None
    seen = np.abs(2 * (_signs(n) @ d) - d.sum())
    # What differs by rounding only is as extreme.
    extreme = int((seen >= abs(d.sum()) - 1e-12 * np.abs(d).sum()).sum())
    if n > EXACT_UP_TO:
        return (1 + extreme) / (1 + len(seen))
    return extreme / len(seen)


@cache
def _signs(n: int) -> NDArray[np.int8]:
    """Patterns of kept (1) and turned (0) signs [2^n, n]; beyond the exact limit random ones."""
    if n > EXACT_UP_TO:
        return np.random.default_rng(n).integers(0, 2, (RESAMPLES, n), np.int8)
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.int8)


def permutation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of the permutation test of two means that nothing pairs; None without values.

    Exact, by all ways to split the values into groups of these sizes, up to `EXACT_SPLITS`;
    beyond, by random ones, of which the seen one counts as one more.
    """
    both = np.asarray([*a, *b], float)
    if not a or not b or not np.isfinite(both).all():
        return None
    sums = both[_splits(len(a), len(b))].sum(axis=1)
    off = np.abs(sums - both.sum() * len(a) / len(both))
    seen = abs(both[: len(a)].sum() - both.sum() * len(a) / len(both))
    extreme = int((off >= seen - 1e-12 * np.abs(both).sum()).sum())
    if math.comb(len(both), len(a)) > EXACT_SPLITS:
        return (1 + extreme) / (1 + len(off))
    return extreme / len(off)


@cache
def _splits(n: int, m: int) -> NDArray[np.int32]:
    """Places of the first group [splits, n] among n + m values."""
    if math.comb(n + m, n) > EXACT_SPLITS:
        rng = np.random.default_rng([n, m])
        return rng.permuted(np.tile(np.arange(n + m, dtype=np.int32), (RESAMPLES, 1)), axis=1)[
            :, :n
        ]
    return np.array(list(combinations(range(n + m), n)), np.int32)


def smallest_p(n: int, tests: int = 1) -> float:
    """The smallest two-sided p that a sign-flip test of n pairs can give: 0.25 at n = 3.

    Of so many tests of n pairs each, after Holm's correction over them.
    """
    return min(1.0, tests * 2.0 ** (1 - n))


def fewest_seeds(tests: int = 1) -> int:
    """Pairs without which an exact test at 5% can show nothing: 6, or 7 for 2 or 3 tests."""
    return next(n for n in range(2, MOST_SEEDS) if smallest_p(n, tests) <= ALPHA)


def holm(ps: Sequence[float]) -> list[float]:
    """The p of each test adjusted so that the chance of any false claim keeps its level."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def seeds_needed(
    difference: float, deviation: float, power: float = 0.8, tests: int = 1
) -> int | None:
    """Pairs with which a paired t-test at 5% finds the difference; None beyond 1,000.

    Of several tests each is taken at 5% over their number, as Holm takes the first of them. Never
    fewer than exact tests of that level need.
    """
    least = fewest_seeds(tests)
    if not (math.isfinite(difference) and math.isfinite(deviation)) or difference == 0:
        return None
    if deviation == 0:
        return least
    from scipy.stats import nct

    n = np.arange(least, MOST_SEEDS + 1)
    shift = np.minimum(abs(difference) / deviation * np.sqrt(n), 30.0)
    limits = [_t(int(k) - 1, 1 - ALPHA / tests) for k in n]
    found = nct.sf(limits, n - 1, shift) >= power
    return int(n[found][0]) if found.any() else None


# --- over workloads ---------------------------------------------------------------------------


def improvement(values: Sequence[float], baseline: Sequence[float]) -> float | None:
    """Probability that a run of the one is above a run of the other, ties counting half."""
    if not values or not baseline:
        return None
    a, b = np.asarray(values, float)[:, None], np.asarray(baseline, float)[None, :]
    return float(((a > b) + 0.5 * (a == b)).mean())


def interquartile_mean(groups: Sequence[Sequence[float]]) -> tuple[float, tuple[float, float]]:
    """Mean of the middle half of all values over workloads, and its stratified 95% interval.

    Raises ValueError without values; without a second value of any group, the interval is a point.
    """
    values = np.concatenate([np.asarray(g, float) for g in groups]) if groups else np.empty(0)
    if not len(values):
        raise ValueError("no values to take a mean of")
    mean = float(_middle(values[None, :])[0])
    return mean, bootstrap_of(_middle, groups) or (mean, mean)


def _middle(values_RN: Floats) -> Floats:
    from scipy.stats import trim_mean

    trimmed: Floats = trim_mean(values_RN, 0.25, axis=1).astype(np.float64)
    return trimmed


def profiles(costs: Mapping[str, Sequence[float]], factors: Sequence[float]) -> dict[str, Any]:
    """Share of W workloads on which each method's cost is within a factor of the best one's.

    `costs[method]` is [W]; a miss is infinity, and stays one at every factor. The result is
    [len(factors)] by method. A workload that every method misses counts for none.
    """
    table = np.array([list(c) for c in costs.values()], float)  # [methods, W]
    if table.size == 0:
        return {name: np.zeros(len(factors)) for name in costs}
    best = table.min(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(np.isfinite(table), table / best, np.inf)
    ratio = np.where(table == best, np.where(np.isfinite(table), 1.0, np.inf), ratio)
    limits = np.asarray(factors, float)[:, None]
    return {name: (ratio[i] <= limits).mean(axis=1) for i, name in enumerate(costs)}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other is left of (cheaper) and at least as high as, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front
