"""Detection of errors and of new data, accuracy–coverage curves, coverage of intervals, uncertain margins."""

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import norm

from rlhf_jax.evaluation.uncertainty import (
    accepted,
    accuracy_coverage,
    auroc,
    coverage_gain,
    coverage_rows,
    error_auroc,
    error_rows,
    gap_rows,
    interval_coverage,
    log_wrong_sign,
    margin_spread,
    pair_uncertainty,
    shift_rows,
)


def means(rows):
    return {row["name"]: row["mean"] for row in rows}


@pytest.fixture
def pairs():
    """Thirty pairs with tied uncertainties, both outcomes among them."""
    rng = np.random.default_rng(0)
    uncertainty = rng.integers(0, 6, 30).astype(float)
    return (rng.random(30) > uncertainty / 8.0).astype(float), uncertainty


def test_auroc_counts_pairs_and_half_the_ties():
    rng = np.random.default_rng(1)
    low, high = rng.integers(0, 5, 40).astype(float), rng.integers(1, 7, 25).astype(float)
    counted = np.mean([(b > a) + 0.5 * (b == a) for a in low for b in high])
    np.testing.assert_allclose(auroc(low, high), counted)
    np.testing.assert_allclose(auroc(high, low), 1.0 - counted)
    np.testing.assert_allclose(auroc(np.exp(low), np.exp(high)), counted)
    assert auroc(np.zeros(3), np.zeros(4)) == 0.5


def test_auroc_is_that_of_scikit_learn(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    right, uncertainty = pairs
    np.testing.assert_allclose(error_auroc(right, uncertainty), metrics.roc_auc_score(1.0 - right, uncertainty))


def test_auroc_without_a_side_is_not_defined():
    assert np.isnan(auroc(np.array([]), np.array([1.0])))
    assert np.isnan(error_auroc(np.ones(3), np.arange(3.0)))
    with pytest.raises(ValueError, match="number 1 is NaN"):
        auroc(np.array([1.0, np.nan]), np.array([1.0]))


def test_a_tied_pair_is_half_right_and_half_wrong():
    right, uncertainty = np.array([1.0, 0.5, 0.0]), np.array([1.0, 2.0, 3.0])
    twice = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]), np.repeat(uncertainty, 2)
    np.testing.assert_allclose(error_auroc(right, uncertainty), error_auroc(*twice))
    np.testing.assert_allclose(
        error_auroc(right > 0.5, uncertainty), error_auroc((right > 0.5).astype(float), uncertainty)
    )


def test_coverage_curve_is_the_expectation_over_the_order_of_ties():
    correct, uncertainty = np.array([1.0, 0.0, 1.0, 0.0, 1.0]), np.array([2.0, 1.0, 2.0, 2.0, 0.5])
    orders = [p for p in permutations(range(5)) if (np.diff(uncertainty[list(p)]) >= 0).all()]
    kept = np.mean([np.cumsum(correct[list(p)]) for p in orders], axis=0) / np.arange(1, 6)
    curve = accuracy_coverage(correct, uncertainty)
    np.testing.assert_allclose(curve.accuracy, kept)
    np.testing.assert_allclose(curve.coverage, np.arange(1, 6) / 5)
    np.testing.assert_allclose(curve.area, kept.mean())
    mixed = np.random.default_rng(0).permutation(5)
    np.testing.assert_allclose(accuracy_coverage(correct[mixed], uncertainty[mixed]).accuracy, kept)


def test_accuracy_at_a_share_between_two_pairs():
    curve = accuracy_coverage(np.array([1.0, 1.0, 0.0, 0.0]), np.arange(4.0))
    np.testing.assert_allclose(curve.at(np.array([0.25, 0.5, 0.625, 1.0])), [1.0, 1.0, 0.8, 0.5])
    assert curve.accuracy[-1] == 0.5


def test_gain_of_perfect_constant_and_perverse_uncertainty(pairs):
    correct, _ = pairs
    np.testing.assert_allclose(coverage_gain(correct, 1.0 - correct), 1.0)
    np.testing.assert_allclose(coverage_gain(correct, np.ones(30)), 0.0, atol=1e-12)
    assert coverage_gain(correct, correct) < 0.0
    assert np.isnan(coverage_gain(np.ones(4), np.arange(4.0)))


def test_refusal_at_a_quantile_of_other_rows():
    calibration = np.arange(1.0, 11.0)
    assert accepted(calibration, calibration, 0.7).sum() == 7
    assert accepted(np.array([7.0, 7.5]), calibration, 0.7).tolist() == [True, False]


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_gaussian_errors_are_covered_as_often_as_the_level_says(factor):
    """Errors at evenly spaced quantiles; a standard deviation that is half too small covers less by a known amount."""
    count, levels, scale = 2000, (0.5, 0.68, 0.95), 3.0
    error = scale * norm.ppf((np.arange(count) + 0.5) / count)
    covered = interval_coverage(error, np.full(count, factor * scale), levels)
    expected = [2.0 * norm.cdf(factor * norm.ppf((1.0 + level) / 2.0)) - 1.0 for level in levels]
    np.testing.assert_allclose(covered, expected, atol=2.0 / count)


def test_margins_of_members():
    rng = np.random.default_rng(2)
    chosen, rejected, offset = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), rng.normal(size=(4, 1))
    spread = margin_spread(chosen, rejected)
    loop = [np.sqrt(np.mean((m - m.mean()) ** 2)) for m in (chosen - rejected).T]
    np.testing.assert_allclose(spread, loop)
    np.testing.assert_allclose(margin_spread(chosen + offset, rejected + offset), spread)
    np.testing.assert_array_equal(margin_spread(chosen[:1], rejected[:1]), np.zeros(6))
    shared = np.broadcast_to(offset, (4, 6))
    np.testing.assert_allclose(margin_spread(shared, shared), 0.0)
    assert (pair_uncertainty(shared.std(axis=0), shared.std(axis=0)) > 0.0).all()


def test_a_wrong_sign_is_as_likely_as_a_gaussian_says():
    margin, sd = np.array([1.0, -3.0, 0.0, 40.0, 80.0]), np.array([2.0, 2.0, 5.0, 1.0, 1.0])
    np.testing.assert_allclose(log_wrong_sign(margin, sd), norm.logcdf(-np.abs(margin) / sd))
    # The order of s / |margin|, which the trivial uncertainty and s alone do not have, where the chance is 0 too.
    assert log_wrong_sign(margin, sd)[4] < log_wrong_sign(margin, sd)[3]
    np.testing.assert_array_equal(log_wrong_sign(-margin, sd), log_wrong_sign(margin, sd))


def test_an_error_that_turns_small_margins_only_is_found_by_the_chance_of_a_wrong_sign():
    """Neither the size of the margin nor that of its error tells: 20,000 margins with errors of planted sizes."""
    rng = np.random.default_rng(4)
    sd, truth = rng.choice([0.1, 1.0, 10.0], 20_000), rng.normal(size=20_000)
    margin = sd * (truth + rng.normal(size=20_000))
    right = margin * truth > 0
    found = error_auroc(right, log_wrong_sign(margin, sd))
    assert found > 0.7 and found > error_auroc(right, -np.abs(margin)) + 0.1
    assert error_auroc(right, sd) == pytest.approx(0.5, abs=0.03)  # three standard errors


def test_error_rows_are_the_functions_with_intervals(pairs):
    rows = error_rows(*pairs)
    found, curve = means(rows), accuracy_coverage(*pairs)
    assert found["AUROC of errors"] == pytest.approx(error_auroc(*pairs))
    assert found["area under accuracy-coverage"] == pytest.approx(curve.area)
    assert found["share of the best gain in area"] == pytest.approx(coverage_gain(*pairs))
    halves = found["accuracy of the surest half"], found["accuracy of the least sure half"]
    assert np.mean(halves) == pytest.approx(pairs[0].mean())
    assert found["surest less least sure half"] == pytest.approx(halves[0] - halves[1])
    for row in rows:
        assert row["ci95"][0] < row["mean"] < row["ci95"][1]
        assert row["n"] == 30
    by_prompt = error_rows(*pairs, groups=np.repeat(np.arange(10), 3))
    assert means(by_prompt) == found
    assert by_prompt[0]["n"] == 10


def test_shift_gap_and_coverage_rows():
    rng = np.random.default_rng(4)
    inside, outside = rng.random(40), rng.random(30) + 0.5
    grouped = shift_rows(inside, outside, np.repeat([0, 1], [inside.size, outside.size]))
    assert means(grouped) == means(shift_rows(inside, outside)) and grouped[0]["n"] == 2
    found = means(shift_rows(inside, outside))
    assert found["AUROC out of distribution"] == pytest.approx(auroc(inside, outside))
    assert found["uncertainty out of distribution"] == pytest.approx(outside.mean())
    error = np.array([0.1, -0.2, 0.3, -4.0])
    sizes = means(gap_rows(error, np.arange(1.0, 5.0)))
    assert sizes["Spearman correlation with |error|"] == pytest.approx(1.0)
    assert sizes["Pearson correlation with |error|"] == pytest.approx(np.corrcoef(np.abs(error), np.arange(4))[0, 1])
    covered = coverage_rows(error, np.ones(4), (0.68,))
    assert covered[0]["name"] == "coverage of the 68% interval" and covered[0]["mean"] == 0.75


@pytest.mark.parametrize(
    ("right", "uncertainty", "sentence"),
    [
        ([], [], "there are no pairs"),
        ([2.0, 0.0], [1.0, 1.0], "between 0 and 1"),
        ([1.0, 0.0], [1.0, np.nan], "the uncertainty of pair 1 is NaN"),
    ],
)
def test_bad_pairs(right, uncertainty, sentence):
    for function in (accuracy_coverage, error_auroc):
        with pytest.raises(ValueError, match=sentence):
            function(np.array(right), np.array(uncertainty))


def test_bad_intervals():
    with pytest.raises(ValueError, match="it is 68"):
        interval_coverage(np.ones(2), np.ones(2), (68.0,))
    with pytest.raises(ValueError, match="standard deviations of at least 0"):
        interval_coverage(np.ones(2), -np.ones(2))
