"""Intervals and correlations against numbers worked by hand, scipy, and their definitions."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.evaluation.statistics import (
    bootstrap,
    bootstrap_rows,
    mean_interval,
    paired_difference,
    pearson,
    row,
    spearman,
)


def test_mean_interval_worked_by_hand():
    # mean 3, sd √2.5, t(0.975; 4) = 2.776445: half-width 2.776445 √(2.5/5) = 1.963243.
    estimate = mean_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (estimate.mean, estimate.n) == (3.0, 5)
    assert estimate.sd == pytest.approx(math.sqrt(2.5), rel=1e-14)
    assert (estimate.low, estimate.high) == (pytest.approx(1.036757, abs=1e-6), pytest.approx(4.963243, abs=1e-6))


def test_mean_interval_equals_scipy_at_another_level():
    values = np.random.default_rng(0).normal(size=12)
    low, high = stats.t.interval(0.8, 11, loc=values.mean(), scale=stats.sem(values))
    estimate = mean_interval(values, level=0.8)
    assert (estimate.low, estimate.high) == (pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12))


def test_one_replication_has_a_mean_and_no_spread():
    estimate = mean_interval(np.array([1.25]))
    assert estimate.mean == 1.25 and estimate.n == 1
    assert math.isnan(estimate.sd) and math.isnan(estimate.low) and math.isnan(estimate.high)


def test_float32_values_are_averaged_in_float64():
    values = np.full(1000, 0.1, dtype=np.float32)
    assert mean_interval(values).mean == pytest.approx(float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize("values", [np.zeros(0), np.array([1.0, np.nan]), np.array([np.inf, 0.0])])
def test_no_values_or_values_not_finite_are_refused(values):
    with pytest.raises(ValueError):
        mean_interval(values)


def test_a_level_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="95"):
        mean_interval(np.array([1.0, 2.0]), level=95.0)


def test_pairing_removes_what_the_seeds_share():
    shared = np.random.default_rng(0).normal(scale=100.0, size=8)
    gain = np.arange(8.0)
    difference = paired_difference(shared + gain, shared)
    alone = mean_interval(gain)
    np.testing.assert_allclose(
        [difference.mean, difference.sd, difference.low, difference.high],
        [alone.mean, alone.sd, alone.low, alone.high],
        rtol=1e-10,
        atol=1e-10,
    )
    swapped = paired_difference(shared, shared + gain)
    assert swapped.mean == -difference.mean and swapped.low == pytest.approx(-difference.high)


def test_bootstrap_of_a_mean_agrees_with_the_law_of_the_mean_of_resamples():
    # For 3 points the resampled mean takes few values, whose law is known: 27 equally likely draws of 0, 1, 2.
    data = np.array([0.0, 3.0, 6.0])
    means = sorted(sum(data[list(draw)]) / 3 for draw in np.ndindex(3, 3, 3))
    result = bootstrap(np.mean, data, n=4000, rng=np.random.default_rng(0), level=0.8)
    assert float(result.estimate) == 3.0
    assert float(result.low) == pytest.approx(means[math.ceil(0.1 * 27) - 1])
    assert float(result.high) == pytest.approx(means[math.ceil(0.9 * 27) - 1])


def test_bootstrap_resamples_arrays_jointly():
    a = np.random.default_rng(0).normal(size=20)
    result = bootstrap(lambda x, y: np.abs(x - y).max(), a, a.copy(), n=50, rng=np.random.default_rng(1))
    assert float(result.high) == 0.0


def test_bootstrap_gives_an_interval_for_each_entry_and_repeats_with_the_same_seed():
    data = np.random.default_rng(0).normal(size=(15, 4))
    draw = lambda: bootstrap(lambda x: x.mean(axis=0), data, n=100, rng=np.random.default_rng(3))  # noqa: E731
    first, second = draw(), draw()
    assert first.estimate.shape == first.low.shape == first.high.shape == (4,)
    assert (first.low <= first.high).all()
    np.testing.assert_array_equal(first.low, second.low)


def test_bootstrap_keeps_infinite_draws_and_counts_the_undefined():
    data = np.array([0.0, 1.0])
    result = bootstrap(
        lambda x: np.array([math.inf if x.sum() == 0.0 else 1.0, math.nan if x.sum() == 0.0 else 1.0, math.nan]),
        data,
        n=400,
        rng=np.random.default_rng(0),
    )
    assert result.high[0] == math.inf and result.low[0] == 1.0
    assert 0 < result.undefined[1] < 400 and result.high[1] == 1.0
    assert result.undefined[2] == 400 and math.isnan(result.low[2])


def test_bootstrap_refuses_arrays_that_do_not_pair_and_no_draws():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="3, 4"):
        bootstrap(lambda a, b: 0.0, np.zeros(3), np.zeros(4), n=10, rng=rng)
    with pytest.raises(ValueError, match="n is 0"):
        bootstrap(np.mean, np.zeros(3), n=0, rng=rng)
    with pytest.raises(ValueError):
        bootstrap(np.mean, np.zeros(0), n=10, rng=rng)


def test_correlations_equal_their_definitions():
    rng = np.random.default_rng(0)
    a = rng.normal(size=40)
    b = 0.5 * a + rng.normal(size=40)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-12)
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (a, b)]
    assert spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-12)


def test_correlations_do_not_see_the_order_of_rows_and_ranks_not_the_scale():
    rng = np.random.default_rng(0)
    a, b, order = rng.normal(size=40), rng.normal(size=40), rng.permutation(40)
    assert pearson(a[order], b[order]) == pytest.approx(pearson(a, b), rel=1e-10)
    assert pearson(3.0 * a + 1.0, b) == pytest.approx(pearson(a, b), rel=1e-10)
    assert spearman(np.exp(a), b) == pytest.approx(spearman(a, b), rel=1e-12)


def test_a_correlation_with_a_constant_is_undefined():
    assert math.isnan(pearson(np.ones(4), np.arange(4.0)))
    assert math.isnan(spearman(np.arange(4.0), np.ones(4)))
    assert math.isnan(pearson(np.ones(1), np.ones(1)))


def test_a_row_is_plain_json_with_its_interval():
    result = row("final gold", "reward", np.array([1.0, 2.0, 3.0], dtype=np.float32))
    assert set(result) == {"name", "unit", "mean", "sd", "n", "ci95"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["ci95"] == [pytest.approx(-0.484138, abs=1e-6), pytest.approx(4.484138, abs=1e-6)]
    assert json.dumps(row("x", "1", np.array([1.0])), allow_nan=False)


def test_rows_of_several_statistics_come_from_the_same_draws():
    data = np.random.default_rng(0).normal(size=12)
    rows = bootstrap_rows(["mean", "twice"], "m", lambda a: (a.mean(), 2 * a.mean()), data, draws=100)
    assert [row["name"] for row in rows] == ["mean", "twice"]
    assert {row["unit"] for row in rows} == {"m"} and {row["n"] for row in rows} == {12}
    np.testing.assert_allclose(np.multiply(2, rows[0]["ci95"]), rows[1]["ci95"])


def test_groups_are_drawn_whole():
    """Each row three times, in any order, says no more than each row once."""
    data = np.random.default_rng(0).normal(size=12)
    order = np.random.default_rng(1).permutation(36)
    once = bootstrap_rows(["mean"], "", np.mean, data, draws=100)[0]
    thrice = bootstrap_rows(
        ["mean"], "", np.mean, np.tile(data, 3)[order], groups=np.tile(np.arange(12), 3)[order], draws=100
    )[0]
    assert thrice["n"] == 12
    np.testing.assert_allclose([thrice["mean"], *thrice["ci95"]], [once["mean"], *once["ci95"]])
    unequal = bootstrap_rows(["mean"], "", np.mean, np.array([1.0, 1.0, 4.0]), groups=["a", "a", "b"], draws=200)[0]
    assert unequal["mean"] == 2.0 and unequal["ci95"] == [1.0, 4.0]
    with pytest.raises(ValueError, match="3 rows and 2 groups"):
        bootstrap_rows(["mean"], "", np.mean, np.ones(3), groups=["a", "b"])
