"""Statistics against hand computation, scipy as a second opinion, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from snnbench import stats
from snnbench.stats import Estimate

FINITE = st.floats(-1e3, 1e3).map(lambda v: round(v, 3))
SIMULATIONS = 2_000


def binomial_slack(p: float, n: int = SIMULATIONS) -> float:
    """Four standard errors of a simulated probability."""
    return 4 * math.sqrt(p * (1 - p) / n)


# --- intervals --------------------------------------------------------------------------------


@given(st.lists(FINITE, min_size=2, max_size=9))
def test_interval_is_that_of_scipy(values: list[float]) -> None:
    found = stats.estimate(values)
    assert found is not None
    assert found.half is not None
    spread = scipy.stats.sem(values)
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * spread
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.half == pytest.approx(half, rel=1e-6, abs=1e-9)
    assert found.deviation == pytest.approx(np.std(values, ddof=1), rel=1e-6, abs=1e-9)


@given(st.lists(FINITE, min_size=3, max_size=9).filter(lambda v: np.std(v) > 0.01))
def test_p_of_an_estimate_is_that_of_the_t_test(values: list[float]) -> None:
    found = stats.estimate(values)
    assert found is not None
    assert found.p == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue, rel=1e-6, abs=1e-12)


def test_p_without_spread() -> None:
    assert Estimate(0.0, 0.0, 3).p == 1.0
    assert Estimate(0.1, 0.0, 3).p == 0.25
    assert Estimate(0.1, None, 1).p is None


def test_a_miss_makes_the_mean_infinite_without_an_interval() -> None:
    assert stats.estimate([1.0, math.inf]) == Estimate(math.inf, None, 2)
    found = stats.estimate([1.0, math.nan])
    assert found is not None
    assert math.isnan(found.mean)
    assert found.half is None
    assert stats.estimate([1.0, -math.inf]) == Estimate(-math.inf, None, 2)
    both = stats.estimate([math.inf, -math.inf])
    assert both is not None
    assert math.isnan(both.mean)


def test_an_interval_without_width_shows_no_more_than_its_signs() -> None:
    twice = stats.estimate([0.9528 - 0.95, 0.1028 - 0.1])  # one image of 357, up to rounding
    assert twice is not None
    assert twice.half != 0
    assert twice.equal
    assert not twice.excludes_zero
    assert twice.p == 0.5
    assert not Estimate(0.0028, 0.0, 5).excludes_zero
    assert Estimate(0.0028, 0.0, 6).excludes_zero
    assert not Estimate(0.0, 0.0, 6).excludes_zero
    assert Estimate(0.0028, 0.0001, 2).excludes_zero


@given(
    st.lists(FINITE, min_size=2, max_size=7).filter(lambda v: np.std(v) > 0.01),
    st.lists(FINITE, min_size=2, max_size=7).filter(lambda v: np.std(v) > 0.01),
)
def test_unpaired_interval_is_welch_of_scipy(a: list[float], b: list[float]) -> None:
    found = stats.unpaired(a, b)
    assert found is not None
    assert found.half is not None
    low, high = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert found.mean - found.half == pytest.approx(low, rel=1e-5, abs=1e-6)
    assert found.mean + found.half == pytest.approx(high, rel=1e-5, abs=1e-6)


def test_unpaired_ends() -> None:
    assert stats.unpaired([], [1.0]) is None
    assert stats.unpaired([3.0], [1.0]) == Estimate(2.0, None, 1)
    assert stats.unpaired([3.0, 3.0], [1.0, 1.0]) == Estimate(2.0, 0.0, 2)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_interval_covers_in_19_of_20_simulations(n: int) -> None:
    drawn = np.random.default_rng(n).normal(0, 1, (SIMULATIONS, n)).tolist()
    missed = sum(e.excludes_zero for v in drawn if (e := stats.estimate(v))) / SIMULATIONS
    assert abs(missed - 0.05) < binomial_slack(0.05)


@pytest.mark.parametrize("n", [10, 25])
def test_bootstrap_covers_as_well_from_ten_values_on(n: int) -> None:
    drawn = np.random.default_rng(n).normal(0, 1, (SIMULATIONS // 2, n)).tolist()
    ends = [stats.bootstrap(v) for v in drawn]
    missed = np.mean([not low <= 0 <= high for low, high in filter(None, ends)])
    assert abs(missed - 0.05) < binomial_slack(0.05, SIMULATIONS // 2)


def test_bootstrap_of_three_cannot_and_so_is_not_the_headline() -> None:
    """The range of three values holds the mean in three of four cases: the docstring's bound."""
    drawn = np.random.default_rng(0).normal(0, 1, (SIMULATIONS // 2, 3)).tolist()
    ends = [stats.bootstrap(v) for v in drawn]
    covered = np.mean([low <= 0 <= high for low, high in filter(None, ends)])
    assert abs(covered - 0.75) < binomial_slack(0.75, SIMULATIONS // 2)


def test_bootstrap_agrees_with_scipy_up_to_the_expansion() -> None:
    values = np.random.default_rng(4).gamma(2.0, 1.0, 40)
    ours = stats.bootstrap(values.tolist())
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=9_999, rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours is not None
    width = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.06 * width)
    assert ours[1] - ours[0] > width


def test_bootstrap_ends() -> None:
    assert stats.bootstrap([1.0]) is None
    assert stats.bootstrap([1.0, math.inf, 2.0]) is None
    assert stats.bootstrap([2.0] * 5) == (2.0, 2.0)
    assert stats.bootstrap([1.0, 2.0, 4.0]) == stats.bootstrap([1.0, 2.0, 4.0])


# --- tests ------------------------------------------------------------------------------------


@given(st.lists(FINITE, min_size=1, max_size=8))
def test_sign_flip_is_that_of_scipy(values: list[float]) -> None:
    found = stats.sign_flip(values)
    if len(values) == 1:
        assert found == 1.0
        return
    oracle = scipy.stats.permutation_test(
        (np.array(values),), lambda x, axis: np.sum(x, axis), permutation_type="samples",
        vectorized=True, n_resamples=np.inf,
    )  # fmt: skip
    assert found == pytest.approx(min(1.0, oracle.pvalue), abs=1e-12)


def test_sign_flip_by_hand() -> None:
    assert stats.sign_flip([1.0, 2.0, 3.0]) == 0.25
    assert stats.sign_flip([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == 0.03125
    # sums 6, 4, 2, 0 and their negatives: two of eight patterns reach 6, four reach 4
    assert stats.sign_flip([-1.0, 2.0, 3.0]) == 0.5
    assert stats.sign_flip([0.0, 0.0]) == 1.0
    assert stats.sign_flip([0.1] * 5) == stats.smallest_p(5)  # rounding is no evidence
    assert stats.sign_flip([]) is None
    assert stats.sign_flip([1.0, math.nan]) is None


def test_what_n_can_show() -> None:
    assert [stats.smallest_p(n) for n in (1, 3, 5, 6)] == [1.0, 0.25, 0.0625, 0.03125]


@pytest.mark.parametrize("n", [6, 9, 20])
@pytest.mark.parametrize("kind", ["normal", "laplace", "integers"])
def test_sign_flip_keeps_its_level(n: int, kind: str) -> None:
    rng = np.random.default_rng(n)
    count = 300 if n > stats.EXACT_UP_TO else SIMULATIONS
    drawn = {
        "normal": lambda: rng.normal(0, 1, (count, n)),
        "laplace": lambda: rng.laplace(0, 1, (count, n)),
        "integers": lambda: rng.integers(-2, 3, (count, n)).astype(float),
    }[kind]()
    false = np.mean([stats.sign_flip(d) <= stats.ALPHA for d in drawn])
    assert false < 0.05 + binomial_slack(0.05, count)
    if kind == "normal" and n == 6:
        assert abs(false - 2 / 64) < binomial_slack(2 / 64)


def test_what_n_can_show_after_holm() -> None:
    """The fewest seeds are those with which Holm leaves the least p below 5%."""
    assert [stats.fewest_seeds(m) for m in (1, 2, 3, 4, 6, 7)] == [6, 7, 7, 8, 8, 9]
    for m in range(1, 12):
        n = stats.fewest_seeds(m)
        able = [stats.holm([stats.sign_flip([1.0 + i for i in range(k)]) or 1.0] * m)
                for k in (n - 1, n)]  # fmt: skip
        assert min(able[0]) > stats.ALPHA >= min(able[1])
        assert min(able[1]) == stats.smallest_p(n, m)


def test_random_signs_count_the_seen_ones() -> None:
    """Of 17 equal signs no random pattern is as extreme; p is 1 of 5,000 and never 0."""
    assert stats.sign_flip([1.0 + i / 10 for i in range(17)]) == 1 / (1 + stats.RESAMPLES)


@given(st.lists(FINITE, min_size=2, max_size=5), st.lists(FINITE, min_size=2, max_size=5))
def test_permutation_is_that_of_scipy(a: list[float], b: list[float]) -> None:
    def off(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.round(np.abs(x.mean(axis) - y.mean(axis)), 9)

    oracle = scipy.stats.permutation_test(
        (np.array(a), np.array(b)), off, permutation_type="independent", vectorized=True,
        n_resamples=np.inf, alternative="greater",
    )  # fmt: skip
    assert stats.permutation(a, b) == pytest.approx(oracle.pvalue, abs=1e-12)


def test_permutation_ends() -> None:
    assert stats.permutation([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == 2 / 20
    assert stats.permutation([1.0], [2.0]) == 1.0
    assert stats.permutation([], [1.0]) is None
    assert stats.permutation([1.0, math.inf], [1.0]) is None
    low, high = [float(i) for i in range(12)], [float(i) for i in range(50, 62)]
    assert stats.permutation(low, high) == 1 / (1 + stats.RESAMPLES)
    drawn = np.random.default_rng(0).normal(0, 1, (300, 20))
    false = np.mean([stats.permutation(d[:9].tolist(), d[9:].tolist()) <= 0.05 for d in drawn])
    assert false < 0.05 + binomial_slack(0.05, 300)


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_holm_keeps_the_chance_of_any_false_claim() -> None:
    """Five methods that are all equal to a baseline, whose noise they share."""
    rng = np.random.default_rng(5)
    false = naive = 0
    for _ in range(600):
        d = rng.normal(0, 1, (5, 9)) - rng.normal(0, 1, 9)
        ps = [stats.sign_flip(row) for row in d]
        false += min(stats.holm(ps)) <= stats.ALPHA
        naive += min(ps) <= stats.ALPHA
    assert false / 600 < 0.05 + binomial_slack(0.05, 600)
    assert naive / 600 > 0.08  # so the correction is needed


@pytest.mark.parametrize(("difference", "deviation"), [(1.0, 1.0), (0.5, 0.6)])
def test_seeds_needed_find_the_difference_in_four_of_five_simulations(
    difference: float, deviation: float
) -> None:
    n = stats.seeds_needed(difference, deviation)
    assert n is not None
    drawn = np.random.default_rng(n).normal(difference, deviation, (SIMULATIONS, n)).tolist()
    found = np.mean([e.excludes_zero for v in drawn if (e := stats.estimate(v))])
    assert 0.8 - binomial_slack(0.8) < found < 0.9
    fewer = [e.excludes_zero for v in drawn if (e := stats.estimate(v[:-1]))]
    assert np.mean(fewer) < 0.8 + binomial_slack(0.8)


def test_seeds_needed_ends() -> None:
    assert stats.seeds_needed(0.0, 1.0) is None
    assert stats.seeds_needed(1e-6, 1.0) is None
    assert stats.seeds_needed(1.0, 0.0) == 6
    assert stats.seeds_needed(100.0, 0.01) == 6
    assert stats.seeds_needed(math.inf, 1.0) is None
    assert stats.seeds_needed(1.0, 0.0, tests=4) == stats.seeds_needed(100.0, 0.01, tests=4) == 8


def test_seeds_needed_under_several_tests_find_the_difference_at_the_corrected_level() -> None:
    n = stats.seeds_needed(1.0, 1.0, tests=5)
    alone = stats.seeds_needed(1.0, 1.0)
    assert n is not None
    assert alone is not None
    assert n > alone
    drawn = np.random.default_rng(n).normal(1.0, 1.0, (SIMULATIONS, n))
    found = np.mean(scipy.stats.ttest_1samp(drawn, 0, axis=1).pvalue <= 0.05 / 5)
    assert 0.8 - binomial_slack(0.8) < found < 0.9


# --- over workloads ---------------------------------------------------------------------------


def test_probability_of_improvement_by_hand() -> None:
    assert stats.improvement([2.0, 3.0], [1.0, 2.0]) == (1 + 0.5 + 1 + 1) / 4
    assert stats.improvement([1.0], [1.0]) == 0.5
    assert stats.improvement([], [1.0]) is None


@given(st.lists(FINITE, min_size=1, max_size=6), st.lists(FINITE, min_size=1, max_size=6))
def test_probability_of_improvement_is_mann_whitney(a: list[float], b: list[float]) -> None:
    u = scipy.stats.mannwhitneyu(a, b, method="asymptotic").statistic
    assert stats.improvement(a, b) == pytest.approx(u / len(a) / len(b))


def test_interquartile_mean_by_hand() -> None:
    mean, (low, high) = stats.interquartile_mean([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 100.0]])
    assert mean == 3.5  # of 2, 3, 4, 5
    assert low < mean < high
    # A quarter is cut at either end: of these eight the two that any smaller share would keep.
    assert stats.interquartile_mean([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 60.0, 100.0]])[0] == 3.5
    assert stats.interquartile_mean([[0.5]]) == (0.5, (0.5, 0.5))
    with pytest.raises(ValueError, match="no values"):
        stats.interquartile_mean([])


def test_interval_of_the_interquartile_mean_covers() -> None:
    rng = np.random.default_rng(8)
    workloads, missed, count = np.array([[0.7], [0.8], [0.9]]), 0, 300
    truth = np.mean(
        [stats.interquartile_mean((workloads + rng.normal(0, 0.02, (3, 10))).tolist())[0]
         for _ in range(count)]
    )  # fmt: skip
    for _ in range(count):
        _, (low, high) = stats.interquartile_mean(
            (workloads + rng.normal(0, 0.02, (3, 10))).tolist()
        )
        missed += not low <= truth <= high
    assert missed / count < 0.05 + binomial_slack(0.05, count)


def test_profiles_by_hand() -> None:
    found = stats.profiles(
        {"a": [1.0, 4.0, math.inf], "b": [2.0, 2.0, math.inf]}, factors=[1.0, 2.0, 100.0]
    )
    assert found["a"] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert found["b"] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    zero = stats.profiles({"a": [0.0], "b": [1.0]}, [1.0, 10.0])
    assert zero["a"].tolist() == [1.0, 1.0]
    assert zero["b"].tolist() == [0.0, 0.0]


@given(
    st.integers(1, 5).flatmap(
        lambda w: st.lists(
            st.lists(st.floats(0.1, 1e3) | st.just(math.inf), min_size=w, max_size=w),
            min_size=1,
            max_size=4,
        )
    )
)
def test_profiles_rise_and_end_at_the_share_of_hits(costs: list[list[float]]) -> None:
    named = {str(i): c for i, c in enumerate(costs)}
    found = stats.profiles(named, [1.0, 2.0, 5.0, 1e5])
    for name, shares in found.items():
        assert (np.diff(shares) >= 0).all()
        assert shares[-1] == pytest.approx(np.mean(np.isfinite(named[name])))
