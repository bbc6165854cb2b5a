"""Means with intervals, and differences paired by seed.

Few seeds are the rule, so intervals are Student's t: with n = 3 a bootstrap interval would be far
too narrow.  n = 1 has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean, half the width of its 95% interval (None for n = 1), and n."""

    mean: float
    half: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the 95% interval leaves 0 out."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate | None:
    """Mean and Student-t interval; None without values."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    from scipy.stats import t

    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    quantile = float(t.ppf(0.5 + confidence / 2, n - 1))
    return Estimate(mean, quantile * math.sqrt(variance / n), n)


def paired(values: Mapping[str, float], baseline: Mapping[str, float]) -> Estimate | None:
    """Difference to the baseline over the pairs that both have a value for."""
    shared = sorted(values.keys() & baseline.keys())
    return estimate([values[pair] - baseline[pair] for pair in shared])
