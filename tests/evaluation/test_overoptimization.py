"""Scaling-law fits: planted coefficients, peaks, intervals, extrapolation, and what is decided for degenerate input."""

import math
from functools import partial

import numpy as np
import pytest

from rlhf_jax.evaluation.overoptimization import (
    bootstrap_fit,
    extrapolation_error,
    fit_best_of_n,
    fit_rl,
    predict,
    predict_rounds,
    regressional_goodhart,
)

DISTANCE = np.linspace(0.3, 6.0, 25)
FITS = pytest.mark.parametrize("fit", [fit_best_of_n, fit_rl])


def law(fit, alpha: float, beta: float, distance: np.ndarray) -> np.ndarray:
    return distance * (alpha - beta * (distance if fit is fit_best_of_n else np.log(distance)))


@FITS
@pytest.mark.parametrize(("alpha", "beta"), [(1.2, 0.15), (0.7, 0.4), (1.0, -0.1), (-0.5, 0.2)])
def test_planted_coefficients_are_recovered(fit, alpha, beta):
    gold = law(fit, alpha, beta, DISTANCE)
    result = fit(DISTANCE, gold)
    assert (result.alpha, result.beta) == (pytest.approx(alpha, rel=1e-10), pytest.approx(beta, rel=1e-10))
    assert result.r_squared == pytest.approx(1.0, abs=1e-10)
    np.testing.assert_allclose(result.covariance, 0.0, atol=1e-20)
    np.testing.assert_allclose(predict(result, DISTANCE), gold, rtol=1e-9, atol=1e-9)


@FITS
def test_the_peak_is_where_the_slope_is_zero_and_the_crossing_where_gold_is(fit):
    result = fit(DISTANCE, law(fit, 1.2, 0.4, DISTANCE))
    near = result.peak_distance + np.linspace(-0.5, 0.5, 101)
    values = predict(result, near)
    assert values.argmax() == 50
    assert result.peak_gold == pytest.approx(float(values[50]), rel=1e-12)
    assert predict(result, np.array([result.zero_crossing]))[0] == pytest.approx(0.0, abs=1e-10)


def test_peak_formulas_worked_by_hand():
    best_of_n = fit_best_of_n(DISTANCE, law(fit_best_of_n, 2.0, 0.5, DISTANCE))
    assert (best_of_n.peak_distance, best_of_n.peak_gold) == (pytest.approx(2.0), pytest.approx(2.0))
    assert best_of_n.zero_crossing == pytest.approx(4.0)
    rl = fit_rl(DISTANCE, law(fit_rl, 1.0, 0.5, DISTANCE))  # exp(2 − 1), 0.5 e, exp(2)
    assert (rl.peak_distance, rl.peak_gold) == (pytest.approx(math.e), pytest.approx(0.5 * math.e))
    assert rl.zero_crossing == pytest.approx(math.e**2)


@FITS
@pytest.mark.parametrize("beta", [0.0, -0.2])
def test_without_a_fall_the_peak_is_at_infinity(fit, beta):
    result = fit(np.array([1.0, 2.0, 4.0]), law(fit, 1.0, beta - 1e-9, np.array([1.0, 2.0, 4.0])))
    assert result.peak_distance == result.peak_gold == result.zero_crossing == math.inf


def test_best_of_n_that_only_falls_peaks_at_zero():
    result = fit_best_of_n(DISTANCE, law(fit_best_of_n, -1.0, 0.5, DISTANCE))
    assert (result.peak_distance, result.peak_gold, result.zero_crossing) == (0.0, 0.0, 0.0)


def test_a_tiny_slope_overflows_to_infinity_without_a_warning():
    result = fit_rl(DISTANCE, law(fit_rl, 1.0, 1e-4, DISTANCE))
    assert result.beta > 0.0 and result.peak_distance == math.inf


@FITS
def test_the_fit_equals_the_normal_equations_and_their_covariance(fit):
    rng = np.random.default_rng(0)
    error = rng.uniform(0.1, 1.0, size=DISTANCE.size)
    gold = law(fit, 1.0, 0.2, DISTANCE) + error * rng.normal(size=DISTANCE.size)
    design = np.stack([DISTANCE, law(fit, 0.0, 1.0, DISTANCE)], axis=1)
    weight = np.diag(1.0 / error**2)
    inverse = np.linalg.inv(design.T @ weight @ design)
    result = fit(DISTANCE, gold, error)
    np.testing.assert_allclose([result.alpha, result.beta], inverse @ design.T @ weight @ gold, rtol=1e-9)
    np.testing.assert_allclose(result.covariance, inverse, rtol=1e-9)
    plain = fit(DISTANCE, gold)
    residual = gold - predict(plain, DISTANCE)
    expected = np.linalg.inv(design.T @ design) * (residual @ residual) / (DISTANCE.size - 2)
    np.testing.assert_allclose(plain.covariance, expected, rtol=1e-9)
    assert plain.r_squared == pytest.approx(1.0 - residual @ residual / np.sum((gold - gold.mean()) ** 2), rel=1e-10)


@FITS
def test_equal_errors_give_the_coefficients_of_no_errors(fit):
    gold = law(fit, 1.0, 0.2, DISTANCE) + np.sin(7.0 * DISTANCE)
    one, other = fit(DISTANCE, gold), fit(DISTANCE, gold, np.full_like(gold, 0.3))
    assert (one.alpha, one.beta) == (pytest.approx(other.alpha, rel=1e-10), pytest.approx(other.beta, rel=1e-10))
    assert one.r_squared == pytest.approx(other.r_squared, rel=1e-10)


@FITS
def test_order_and_shape_of_points_do_not_matter(fit):
    gold = law(fit, 1.0, 0.2, DISTANCE) + np.sin(7.0 * DISTANCE)
    order = np.random.default_rng(0).permutation(25)
    one, other = fit(DISTANCE, gold), fit(DISTANCE[order].reshape(5, 5), gold[order].reshape(5, 5))
    assert (one.alpha, one.beta) == (pytest.approx(other.alpha, rel=1e-10), pytest.approx(other.beta, rel=1e-10))


def test_points_nearer_than_the_minimum_do_not_matter_and_zero_never_does():
    gold = law(fit_rl, 1.0, 0.2, DISTANCE)
    distance, gold = np.concatenate([[0.0, 0.1], DISTANCE]), np.concatenate([[50.0, -50.0], gold])
    result = fit_rl(distance, gold, minimum_distance=0.2)
    assert result.points == 25 and result.alpha == pytest.approx(1.0, rel=1e-10)
    assert fit_best_of_n(np.array([0.0, 1.0, 2.0]), np.array([9.0, 1.0, 1.0])).points == 2


def test_two_points_are_fitted_exactly_with_an_unknown_covariance():
    result = fit_best_of_n(np.array([1.0, 2.0]), np.array([1.0, 1.0]))
    assert (result.alpha, result.beta) == (pytest.approx(1.5), pytest.approx(0.5))
    assert np.isnan(result.covariance).all()
    assert np.isfinite(fit_best_of_n(np.array([1.0, 2.0]), np.array([1.0, 1.0]), np.array([0.1, 0.1])).covariance).all()


@FITS
@pytest.mark.parametrize(
    ("distance", "gold", "error", "message"),
    [
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], None, "there are 1"),
        ([2.0], [1.0], None, "there are 1"),
        ([0.0, 3.0], [0.0, 1.0], None, "there are 1"),
        ([1.0, math.nan], [1.0, 1.0], None, "finite"),
        ([1.0, 2.0], [1.0, math.inf], None, "finite"),
        ([-1.0, 2.0], [1.0, 1.0], None, "at least 0"),
        ([1.0, 2.0], [1.0, 1.0], [0.1, 0.0], "positive"),
    ],
)
def test_input_that_decides_nothing_is_refused(fit, distance, gold, error, message):
    with pytest.raises(ValueError, match=message):
        fit(np.array(distance), np.array(gold), None if error is None else np.array(error))


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_rounds_of_the_rl_law_shift_alpha_by_beta_log_rounds(rounds):
    fit = fit_rl(DISTANCE, law(fit_rl, 1.0, 0.3, DISTANCE))
    expected = DISTANCE * (1.0 - 0.3 * np.log(DISTANCE) + 0.3 * math.log(rounds))
    np.testing.assert_allclose(predict_rounds(fit, DISTANCE, rounds), expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(
        predict_rounds(fit, DISTANCE, rounds), rounds * predict(fit, DISTANCE / rounds), rtol=1e-12
    )
    with pytest.raises(ValueError, match="it is 0"):
        predict_rounds(fit, DISTANCE, 0)


def test_both_laws_start_at_zero():
    for fit in (fit_best_of_n, fit_rl):
        assert predict(fit(DISTANCE, law(fit, 1.0, 0.3, DISTANCE)), np.array([0.0]))[0] == 0.0


def test_without_noise_the_bootstrap_has_no_width_and_holds_the_truth():
    distance = np.random.default_rng(0).uniform(0.5, 5.0, size=(6, 30))
    result = bootstrap_fit(fit_rl, distance, law(fit_rl, 1.0, 0.5, distance), n=50, rng=np.random.default_rng(1))
    for name, truth in (("alpha", 1.0), ("beta", 0.5), ("peak_distance", math.e)):
        np.testing.assert_allclose([result[name].estimate, result[name].low, result[name].high], truth, rtol=1e-8)


def test_bootstrap_draws_whole_replications():
    # Half of the seeds have β = 0.5, half β = −0.5: an interval over seeds spans both, and the peak may be at infinity.
    distance = np.tile(DISTANCE, (6, 1))
    betas = np.repeat([0.5, -0.5], 3)
    gold = np.stack([law(fit_rl, 1.0, beta, DISTANCE) for beta in betas])
    fit = partial(fit_rl, minimum_distance=0.5)
    result = bootstrap_fit(fit, distance, gold, n=300, rng=np.random.default_rng(0))
    assert float(result["alpha"].low) == pytest.approx(1.0) and float(result["alpha"].high) == pytest.approx(1.0)
    assert -0.5 <= float(result["beta"].low) < 0.0 < float(result["beta"].high) <= 0.5
    assert float(result["peak_distance"].high) == math.inf
    # Every draw's β is a mean of six values of ±0.5.
    assert float(result["beta"].low) * 6 == pytest.approx(round(float(result["beta"].low) * 6), abs=1e-8)


def test_extrapolation_of_the_right_law_is_exact_and_of_the_swapped_one_is_not():
    for fit in (fit_best_of_n, fit_rl):
        error = extrapolation_error(fit, DISTANCE, law(fit, 1.0, 0.2, DISTANCE), cutoff=3.0)
        assert error.own == pytest.approx(0.0, abs=1e-9)
        assert error.swapped > 0.1
        assert error.near + error.far == DISTANCE.size


def test_the_swapped_law_sees_the_points_that_the_own_law_saw():
    gold = law(fit_rl, 1.0, 0.2, DISTANCE)
    spoiled = np.where(DISTANCE < 1.0, 40.0, gold)
    fit = partial(fit_rl, minimum_distance=1.0)
    assert extrapolation_error(fit, DISTANCE, spoiled, 3.0) == extrapolation_error(fit, DISTANCE, gold, 3.0)


def test_extrapolation_needs_points_beyond_the_cutoff():
    with pytest.raises(ValueError, match="nothing to predict"):
        extrapolation_error(fit_rl, DISTANCE, DISTANCE, cutoff=6.0)


def test_regressional_goodhart_equals_the_conditional_mean_by_quadrature():
    x = np.linspace(-30.0, 30.0, 20_001)
    for s in (-2.0, 0.5, 4.0):
        density = np.exp(-((x - 1.0) ** 2) / (2 * 4.0) - (s - x + 0.5) ** 2 / (2 * 2.0))  # X ~ N(1, 4), Z ~ N(−0.5, 2)
        expected = np.sum(x * density) / np.sum(density)
        assert regressional_goodhart(np.array([s]), 1.0, -0.5, 4.0, 2.0)[0] == pytest.approx(expected, rel=1e-9)


def test_regressional_goodhart_holds_in_a_simulation_within_a_bound_that_no_seed_decides():
    # Samples made exactly uncorrelated with exact moments: the least-squares line of X on X + Z is then the formula.
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 5000))
    x = 1.0 + 2.0 * (x - x.mean()) / x.std()
    z = z - z.mean()
    z = z - (z @ (x - 1.0)) / ((x - 1.0) @ (x - 1.0)) * (x - 1.0)
    z = -0.5 + math.sqrt(2.0) * z / z.std()
    slope, intercept = np.polyfit(x + z, x, 1)
    line = regressional_goodhart(x + z, 1.0, -0.5, 4.0, 2.0)
    np.testing.assert_allclose(intercept + slope * (x + z), line, rtol=1e-9, atol=1e-9)
    # Cauchy-Schwarz: over any tenth of the samples, the mean of X is off the line's mean by at most √10 residual
    # standard deviations; the residual variance is Var X Var Z / (Var X + Var Z).
    picked = np.argsort(x + z)[-500:]
    bound = math.sqrt(10.0 * 4.0 * 2.0 / 6.0)
    assert abs(x[picked].mean() - line[picked].mean()) <= bound


def test_regressional_goodhart_without_noise_believes_the_proxy_and_without_gold_variance_the_mean():
    proxy = np.array([-1.0, 3.0])
    np.testing.assert_allclose(regressional_goodhart(proxy, 0.7, 0.0, 1.0, 0.0), proxy)
    np.testing.assert_allclose(regressional_goodhart(proxy, 0.7, 0.0, 0.0, 1.0), [0.7, 0.7])
    with pytest.raises(ValueError, match="not both 0"):
        regressional_goodhart(proxy, 0.0, 0.0, 0.0, 0.0)
