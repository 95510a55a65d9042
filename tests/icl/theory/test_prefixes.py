"""Errors of least squares, averaging and ridge after k examples."""

import math

import numpy as np
import pytest
from scipy import integrate, special, stats

from rlhf_jax.icl.theory.prefixes import averaging_error, least_squares_error, ridge_error, wishart_trace


def samples(dimension, length, draws, seed=0):
    return np.random.default_rng(seed).normal(size=(draws, length, dimension))


@pytest.mark.parametrize(("dimension", "length"), [(1, 1), (1, 5), (3, 10), (8, 7), (8, 8), (5, 40), (20, 40), (7, 3)])
def test_traces_of_powers_are_the_known_moments(dimension, length):
    k, d = length, dimension
    assert wishart_trace(np.ones_like, d, k) == pytest.approx(d, rel=1e-10)
    assert wishart_trace(lambda x: x, d, k) == pytest.approx(k * d, rel=1e-10)
    assert wishart_trace(lambda x: x**2, d, k) == pytest.approx(k * d * (k + d + 1), rel=1e-10)
    third = k * d * (d**2 + k**2 + 3 * d * k + 3 * d + 3 * k + 4)
    assert wishart_trace(lambda x: x**3, d, k) == pytest.approx(third, rel=1e-10)
    if k > d + 1:
        assert wishart_trace(lambda x: 1 / x, d, k) == pytest.approx(d / (k - d - 1), rel=1e-10)
    if k > d + 3:
        second = d * (k - 1) / ((k - d) * (k - d - 1) * (k - d - 3))
        assert wishart_trace(lambda x: x**-2.0, d, k) == pytest.approx(second, rel=1e-10)


def test_in_one_dimension_the_trace_is_an_integral_over_a_chi_squared_law():
    def expected(length):
        return integrate.quad(lambda x: stats.chi2.pdf(x, length) / (x + 0.3), 0, np.inf)[0]

    for length in (2, 3, 7):
        assert wishart_trace(lambda x: 1 / (x + 0.3), 1, length) == pytest.approx(expected(length), rel=1e-7)


@pytest.mark.parametrize("length", [1, 2])
def test_a_steep_function_is_integrated_or_refused_never_wrong(length):
    """d = 2: the density of the ordered eigenvalues is (1/4) (x y)^{(|k - 2| - 1)/2} (x - y) e^{-(x + y)/2} for k = 2;
    for k = 1 the one that is not 0 has the chi-squared law of 2 degrees."""
    refused = 0
    for penalty in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10):

        def mass(u, v, penalty=penalty):  # x = u^2, y = v^2 take the roots away
            return (u**2 - v**2) * np.exp(-(u**2 + v**2) / 2) * (1 / (u**2 + penalty) + 1 / (v**2 + penalty))

        if length == 1:
            expected = 1 / penalty - np.exp(penalty / 2) * special.expi(-penalty / 2) / 2
        else:
            edges = np.concatenate([[0.0], np.geomspace(1e-7, 12.0, 60)])
            nodes, weights = np.polynomial.legendre.leggauss(12)
            places = (edges[:-1, None] + np.diff(edges)[:, None] * (nodes + 1) / 2).reshape(-1)
            shares = (np.diff(edges)[:, None] * weights / 2).reshape(-1)
            grid = mass(places[:, None], places[None, :]) * (places[:, None] > places[None, :])
            expected = shares @ grid @ shares
        try:
            found = wishart_trace(lambda x, penalty=penalty: 1 / (x + penalty), 2, length)
        except ValueError as refusal:
            assert "did not converge" in str(refusal)
            refused += 1
        else:
            assert found == pytest.approx(expected, rel=5e-3 if length == 2 else 1e-6)
    assert refused < 5 and (length == 1 or refused > 0)


def test_what_does_not_converge_is_refused_in_one_sentence():
    for penalty in (1e-6, 1e-8):
        with pytest.raises(ValueError, match=r"d = 8 and k = 8 did not converge .* a larger penalty"):
            ridge_error(8, [8], 0.25, penalty=penalty)
    with pytest.raises(ValueError, match=r"d = 300 and k = 300 did not converge .nan"):
        wishart_trace(lambda x: 1 / (x + 0.1), 300, 300)
    assert wishart_trace(lambda x: x - 10.0, 3, 10) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("length", [0, 3, 6, 7, 12])
@pytest.mark.parametrize("penalty", [None, 0.1, 5.0])
def test_ridge_error_is_that_of_sampled_prompts(length, penalty):
    d, noise, prior, draws = 6, 0.5, 0.8, 4000
    x = samples(d, length, draws, seed=length)
    values = np.linalg.eigvalsh(np.swapaxes(x, 1, 2) @ x)
    used = noise / prior if penalty is None else penalty
    errors = ((prior * used**2 + noise * values) / (values + used) ** 2).sum(axis=1)
    predicted = ridge_error(d, [length], noise, prior, penalty)[0]
    assert abs(errors.mean() - predicted) <= 4 * errors.std() / math.sqrt(draws) + 1e-9


def test_ridge_is_least_squares_at_a_vanishing_penalty_and_the_prior_at_a_large_one():
    lengths = [2, 12, 30]
    least = least_squares_error(8, lengths, noise_variance=0.3)
    np.testing.assert_allclose(ridge_error(8, lengths, 0.3, penalty=1e-7), least, rtol=1e-3)
    np.testing.assert_allclose(ridge_error(8, lengths, 0.3, penalty=1e9), 8.0, rtol=1e-6)


def test_the_best_penalty_is_the_ratio_of_the_variances():
    best = ridge_error(5, [4, 9], 0.6, 1.5)
    for factor in (0.8, 1.25):
        assert (ridge_error(5, [4, 9], 0.6, 1.5, penalty=0.4 * factor) > best).all()


def test_ridge_of_the_task_diversity_setting_stays_within_the_known_range():
    errors = ridge_error(8, range(16), 0.25) / 8
    assert errors[0] == pytest.approx(1.0)
    assert (np.diff(errors) < 0).all()
    assert 0.34 < errors.mean() < 0.36


def test_ridge_of_the_noise_mixture_setting():
    """Within the 2 % of the sampled values known for d = k = 20, w ~ N(0, I/20)."""
    levels = np.array([0.1, 0.25, 0.5, 1.0]) ** 2
    oracle = np.mean([ridge_error(20, [20], level, 0.05)[0] for level in levels])
    fixed = [np.mean([ridge_error(20, [20], level, 0.05, 20 * one)[0] for level in levels]) for one in levels]
    assert oracle == pytest.approx(0.332, rel=0.02)
    assert min(fixed) == fixed[2] == pytest.approx(0.442, rel=0.02)
    assert max(fixed) == fixed[0] == pytest.approx(1.565, rel=0.02)


def test_least_squares_and_averaging_worked_by_hand():
    np.testing.assert_allclose(least_squares_error(20, [0, 5, 19, 20, 30]) / 20, [1, 0.75, 0.05, 0, 0])
    noisy = least_squares_error(20, [0, 10, 18, 19, 20, 21, 22, 41], 0.5, prior_variance=2.0)
    infinite = math.inf
    np.testing.assert_allclose(noisy, [40, 20 + 5 / 9, 4 + 9, infinite, infinite, infinite, 10, 0.5])
    np.testing.assert_allclose(averaging_error(20, [0, 21, 42]) / 20, [1, 1, 0.5])
    np.testing.assert_allclose(averaging_error(3, [6], 0.6, 2.0), 3 * (2 * 4 + 0.6) / 6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: least_squares_error(0, [1]), "dimension d is 0"),
        (lambda: least_squares_error(2, [-1]), "whole numbers of at least 0"),
        (lambda: averaging_error(2, np.array([1.5])), "whole numbers of at least 0"),
        (lambda: averaging_error(2, [1], noise_variance=-1.0), "noise variance is -1"),
        (lambda: ridge_error(2, [1], 0.5, prior_variance=0.0), "prior variance is 0"),
        (lambda: ridge_error(2, [1], 0.0), "penalty of ridge is 0"),
        (lambda: wishart_trace(np.ones_like, 2, -1), "number of examples k is -1"),
    ],
)
def test_bad_numbers_are_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
