import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import norm

from rlhf_jax.evaluation.calibration import moderated_margin, pair_probability, rating_log_odds, reliability


def test_bins_worked_by_hand():
    """p = 0.85 three times (bin 8), its complement 0.15 in bin 1; p = 0.25 once (bin 2), its complement in bin 7."""
    result = reliability(logit(np.array([0.85, 0.85, 0.85, 0.25])))
    assert result.count.tolist() == [0, 3, 1, 0, 0, 0, 0, 1, 3, 0]
    np.testing.assert_allclose(result.accuracy[[1, 2, 7, 8]], [0.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(result.probability[[1, 2, 7, 8]], [0.15, 0.25, 0.75, 0.85])
    np.testing.assert_allclose(result.expected_error, (6 * 0.15 + 2 * 0.75) / 8)
    np.testing.assert_allclose(result.average_error, (0.15 + 0.75 + 0.75 + 0.15) / 4)
    np.testing.assert_allclose(result.largest_error, 0.75)


def test_both_orders_give_the_error_of_the_more_likely_order():
    margins = np.random.default_rng(0).normal(0.3, 2.0, 500)
    confidence, right = expit(np.abs(margins)), margins > 0
    error = 0.0
    for low in np.arange(5, 10) / 10:
        inside = (confidence >= low) & (confidence < low + 0.1)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    np.testing.assert_allclose(reliability(margins).expected_error, error)


def test_calibrated_margins_have_no_error_and_exaggerated_ones_have():
    """The reference values of a calibrated and a three times exaggerated margin are 0.002 and 0.13."""
    rng = np.random.default_rng(0)
    margins = rng.normal(0.0, 1.5, 200_000)
    signed = np.where(rng.random(margins.size) < expit(margins), margins, -margins)
    assert reliability(signed).expected_error < 0.01
    assert reliability(3 * signed).expected_error > 0.08


def test_ties_and_certain_margins():
    result = reliability(np.array([0.0, 1e9], np.float32))
    assert result.count[[0, 5, 9]].tolist() == [1, 2, 1]
    assert result.expected_error == 0.0


@pytest.mark.parametrize(
    ("margins", "sentence"), [([], "at least one pair"), ([1.0, np.nan], "margin 1 is not finite")]
)
def test_bad_margins(margins, sentence):
    with pytest.raises(ValueError, match=sentence):
        reliability(np.array(margins, np.float64))


def test_moderated_probability_is_near_the_mean_of_the_sigmoid():
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    for margin in (-2.0, 0.0, 1.0, 4.0):
        for sd in (0.0, 0.5, 2.0):
            exact = weights @ expit(margin + sd * nodes) / weights.sum()
            np.testing.assert_allclose(pair_probability(np.array([margin]), np.array([sd]))[0], exact, atol=0.015)
    margin = np.array([1.0, -3.0])
    np.testing.assert_array_equal(moderated_margin(margin, np.zeros(2)), margin)
    np.testing.assert_array_equal(moderated_margin(-margin, np.ones(2)), -moderated_margin(margin, np.ones(2)))


def test_moderation_mends_the_calibration_of_noisy_margins():
    rng = np.random.default_rng(3)
    margin, sd = rng.normal(0.0, 2.0, 20_000), np.full(20_000, 3.0)
    first = rng.random(20_000) < expit(margin + sd * rng.normal(size=20_000))
    signed = np.where(first, margin, -margin)
    assert reliability(signed).expected_error > 0.1
    assert reliability(moderated_margin(signed, sd)).expected_error < 0.02


def test_log_odds_of_ratings_are_those_of_a_gaussian():
    margin, sd = np.array([0.3, -2.0, 0.0, 60.0]), np.array([1.0, 4.0, 2.0, 1.0])
    found = rating_log_odds(margin, sd)
    np.testing.assert_allclose(expit(found), norm.cdf(margin / sd))
    assert np.isfinite(found).all() and found[3] > 1000.0
    np.testing.assert_allclose(rating_log_odds(-margin, sd), -found)
    np.testing.assert_allclose(rating_log_odds(3.0 * margin, 3.0 * sd), found)  # whatever the unit of the ratings
    with pytest.raises(ValueError, match="deviation of pair 1 is not above 0"):
        rating_log_odds(margin, np.array([1.0, 0.0, 1.0, 1.0]))


def test_models_of_ratings_are_calibrated_in_any_unit_and_their_sigmoid_is_not():
    rng = np.random.default_rng(5)
    mean, sd = rng.normal(size=(20_000, 2)), rng.uniform(0.5, 1.5, (20_000, 2))
    first = np.diff(mean + sd * rng.normal(size=mean.shape))[:, 0] < 0
    margin = np.where(first, 1.0, -1.0) * (mean[:, 0] - mean[:, 1])
    both = np.hypot(*sd.T)
    for unit in (0.1, 10.0):  # stars, or points of a hundred
        assert reliability(rating_log_odds(unit * margin, unit * both)).expected_error < 0.015
        assert reliability(unit * margin).expected_error > 0.05
