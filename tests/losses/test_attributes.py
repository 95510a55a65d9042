"""Losses of predicted distributions: values, gradients, and what each of them can learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from scipy import stats

from rlhf_jax.losses.attributes import (
    bhattacharyya,
    gaussian_likelihood,
    log_expected_preference,
    pinball,
    probabilistic_preference,
    rating_statistics,
    sampled_regression,
)

RANDOM = np.random.default_rng(0)
MEAN, LOG_DEVIATION, RATINGS = (RANDOM.normal(size=(6, 3)).astype(np.float32) for _ in range(3))
KNOWN = RANDOM.random((6, 3)) < 0.6
KNOWN[0] = [True, False, True]
WITH_GAPS = np.where(KNOWN, RATINGS, np.nan).astype(np.float32)

expected_preference = jax.jit(log_expected_preference)
preference_loss = jax.jit(probabilistic_preference)


def arrays(*values):
    return tuple(jnp.asarray(value) for value in values)


# The Gaussian likelihood.


def test_the_likelihood_is_that_of_scipy_and_torch():
    all_known = jnp.ones(RATINGS.shape, bool)
    found = gaussian_likelihood(*arrays(MEAN, LOG_DEVIATION, RATINGS), all_known)
    scipys = -stats.norm.logpdf(RATINGS.astype(float), MEAN, np.exp(LOG_DEVIATION)) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(found, scipys, rtol=1e-5, atol=1e-5)
    inputs = map(torch.from_numpy, (MEAN, RATINGS, np.exp(2 * LOG_DEVIATION)))
    torchs = torch.nn.functional.gaussian_nll_loss(*inputs, reduction="none", eps=0.0)
    np.testing.assert_allclose(found, torchs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_weight_is_a_power_of_the_variance_without_gradient(beta):
    """d/d mu = sigma^(2 beta) (mu - y) / sigma^2: at beta = 1 that of half the squared error."""
    mean, log_deviation, ratings = arrays(MEAN, LOG_DEVIATION, RATINGS)
    known = jnp.ones(ratings.shape, bool)
    to_mean, to_s = jax.grad(lambda m, s: gaussian_likelihood(m, s, ratings, known, beta).sum(), argnums=(0, 1))(
        mean, log_deviation
    )
    variance = np.exp(2 * LOG_DEVIATION)
    np.testing.assert_allclose(to_mean, variance**beta * (MEAN - RATINGS) / variance, rtol=1e-4, atol=1e-6)
    expected = variance**beta * (1 - (MEAN - RATINGS) ** 2 / variance)
    np.testing.assert_allclose(to_s, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_the_gradient_of_the_deviation_vanishes_where_the_variance_is_the_squared_residual(beta):
    mean, ratings = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.5]])
    known = jnp.ones((1, 2), bool)
    gradient = jax.grad(lambda s: gaussian_likelihood(mean, s, ratings, known, beta).sum())
    at = jnp.log(jnp.abs(ratings - mean))
    np.testing.assert_allclose(gradient(at), 0.0, atol=1e-6)
    assert (gradient(at + 0.1) > 0.01).all() and (gradient(at - 0.1) < -0.01).all()


def test_log_deviations_are_clamped():
    one = jnp.ones((1, 2))
    outside, limits = jnp.array([[-9.0, 7.0]]), jnp.array([[-5.0, 2.0]])
    known = jnp.ones((1, 2), bool)
    found, expected = (gaussian_likelihood(one, s, 1.5 * one, known) for s in (outside, limits))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(expected, [[-5 + 0.125 * np.exp(10), 2 + 0.125 * np.exp(-4)]], rtol=1e-6)


@pytest.mark.parametrize("name", ["likelihood", "weighted", "sampled"])
def test_unknown_ratings_have_no_loss_and_no_gradient(name):
    mean, log_deviation, ratings, known = arrays(MEAN, LOG_DEVIATION, WITH_GAPS, KNOWN)
    losses = {
        "likelihood": lambda m, s, y: gaussian_likelihood(m, s, y, known),
        "weighted": lambda m, s, y: gaussian_likelihood(m, s, y, known, 0.5),
        "sampled": lambda m, s, y: sampled_regression(m, s, y, known, jnp.ones_like(m)),
    }
    value, gradients = jax.value_and_grad(lambda m, s: losses[name](m, s, ratings).sum(), argnums=(0, 1))(
        mean, log_deviation
    )
    assert np.isfinite(value)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[~KNOWN], 0.0)
        assert (np.abs(gradient[KNOWN]) > 0).all()
    np.testing.assert_array_equal(losses[name](mean, log_deviation, ratings)[~KNOWN], 0.0)


def test_half_precision_is_computed_in_float32():
    half = (jnp.asarray(array, jnp.bfloat16) for array in (MEAN, LOG_DEVIATION, RATINGS))
    assert gaussian_likelihood(*half, jnp.asarray(KNOWN)).dtype == jnp.float32


# Regression on samples.


def test_the_expected_loss_of_a_sample_adds_the_variance():
    """Noise of +1 and -1 has the first two moments of a normal variable, on which the expectation depends."""
    mean, log_deviation, ratings, known = arrays(MEAN, LOG_DEVIATION, RATINGS, np.ones_like(KNOWN))
    signs = (jnp.full(mean.shape, sign) for sign in (1.0, -1.0))
    found = sum(sampled_regression(mean, log_deviation, ratings, known, noise) for noise in signs) / 2
    np.testing.assert_allclose(found, (MEAN - RATINGS) ** 2 + np.exp(2 * LOG_DEVIATION), rtol=1e-5)


def test_only_the_likelihood_recovers_the_deviation_of_the_ratings():
    """y = 1 - x + exp(0.4 + 0.8 x) eps: the likelihood finds the log deviations, samples lower them without end."""
    with jax.enable_x64(True):
        inputs = jnp.linspace(-1.0, 1.0, 2000)[:, None]
        noise = jax.random.normal(jax.random.key(0), inputs.shape)
        ratings = 1.0 - inputs + jnp.exp(0.4 + 0.8 * inputs) * noise
        known = jnp.ones(inputs.shape, bool)
        optimizer = optax.adam(0.1)

        def predict(lines):
            return [line[0] + line[1] * inputs for line in lines]

        def train(loss):
            def step(carry, key):
                lines, moments = carry
                gradient = jax.grad(lambda lines: loss(*predict(lines), key).mean())(lines)
                with jax.numpy_dtype_promotion("standard"):
                    updates, moments = optimizer.update(gradient, moments)
                return (optax.apply_updates(lines, updates), moments), lines

            lines = jnp.zeros((2, 2))
            keys = jax.random.split(jax.random.key(1), 400)
            return jax.lax.scan(step, (lines, optimizer.init(lines)), keys)[1]

        likely = jax.jit(lambda: train(lambda m, s, key: gaussian_likelihood(m, s, ratings, known)))()
        # Standard errors: 1 / sqrt(2 n) = 0.016 of the level, 0.027 of the slope; four of them.
        np.testing.assert_allclose(likely[-1, 1], [0.4, 0.8], atol=0.11)
        sampled = jax.jit(
            lambda: train(
                lambda m, s, key: sampled_regression(m, s, ratings, known, jax.random.normal(key, inputs.shape))
            )
        )()
        largest = np.exp(sampled[99::100, 1, 0] + np.abs(sampled[99::100, 1, 1]))
        assert (np.diff(largest) < 0).all() and largest[-1] < 0.1 * np.exp(0.4 - 0.8)


# Quantiles.


def test_the_pinball_loss_is_a_loop():
    quantiles = RANDOM.normal(size=(5, 4)).astype(np.float32)
    levels, ratings = np.array([0.1, 0.3, 0.6, 0.9], np.float32), RANDOM.normal(size=5).astype(np.float32)
    known = np.array([True, True, False, True, True])
    expected = np.zeros(5)
    for row in np.flatnonzero(known):
        for level, quantile in zip(levels, quantiles[row], strict=True):
            error = ratings[row] - quantile
            expected[row] += (level * error if error > 0 else (level - 1) * error) / 4
    given = np.where(known, ratings, np.nan).astype(np.float32)
    found, gradient = jax.value_and_grad(
        lambda q: (lambda losses: (losses.sum(), losses))(pinball(q, *arrays(levels, given, known))), has_aux=True
    )(jnp.asarray(quantiles))
    np.testing.assert_allclose(found[1], expected, rtol=1e-5)
    expected = np.where(ratings[:, None] > quantiles, -levels, 1 - levels) / 4 * known[:, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_the_minimisers_of_the_pinball_loss_are_quantiles():
    """Of 99 ratings that are 1 to 99, the 0.25-quantile is 25: one more or less is no better."""
    ratings, known = jnp.arange(1.0, 100.0), jnp.ones(99, bool)
    levels = jnp.array([0.25, 0.505, 0.9])

    def loss(quantiles):
        rows = jnp.broadcast_to(quantiles[None], (99, 3))
        return pinball(rows, levels, ratings, known).sum()

    best = jnp.array([25.0, 50.0, 90.0])
    for place in range(3):
        shift = jnp.zeros(3).at[place].set(1.0)
        assert loss(best) <= loss(best + shift) and loss(best) <= loss(best - shift)
        assert loss(best) < loss(best + 2 * shift) and loss(best) < loss(best - 2 * shift)


# Preferences between Gaussian rewards.


@pytest.mark.parametrize("deviation", [0.0, 0.5, 2.0, 10.4])
def test_the_expected_preference_is_that_of_a_fine_grid(deviation):
    difference = np.array([-20.0, -6.0, -1.0, 0.0, 0.3, 3.0, 12.0])
    grid = np.linspace(-14, 14, 20001)
    weights = stats.norm.pdf(grid) * (grid[1] - grid[0])
    logits = difference[:, None] + deviation * grid
    expected = np.log((np.exp(-np.logaddexp(0, -logits)) * weights).sum(axis=1))
    with jax.enable_x64(True):
        found = expected_preference(jnp.asarray(difference), jnp.full(7, deviation**2))
        np.testing.assert_allclose(found, expected, atol=4e-7, rtol=0)
    single = expected_preference(jnp.asarray(difference, jnp.float32), jnp.full(7, deviation**2))
    np.testing.assert_allclose(single, expected, atol=1e-6, rtol=1e-5)


def test_the_loss_of_a_pair_is_that_of_sampled_rewards():
    random = np.random.default_rng(1)
    (mean, other), (s, other_s) = np.array([[1.2], [0.3]]), np.array([[0.1], [-0.7]])
    draws = 400_000
    rewards = mean + np.exp(s) * random.normal(size=draws), other + np.exp(other_s) * random.normal(size=draws)
    wins = 1 / (1 + np.exp(-(rewards[0] - rewards[1] - 0.25)))
    error = 5 * wins.std() / np.sqrt(draws)
    sides = tuple(tuple(map(jnp.float32, side)) for side in ((mean, s), (other, other_s)))
    sides = tuple(tuple(jnp.asarray(part).reshape(1) for part in side) for side in sides)
    margin = jnp.array([0.25])
    found = preference_loss(*sides, margin)
    assert abs(np.exp(-found[0]) - wins.mean()) < error
    soft = preference_loss(*sides, margin, jnp.array([0.8]))
    p = np.exp(-np.float64(found[0]))
    np.testing.assert_allclose(soft[0], -0.8 * np.log(p) - 0.2 * np.log(1 - p), rtol=1e-5)
    swapped = preference_loss(*sides[::-1], -margin)
    np.testing.assert_allclose(np.exp(-found) + np.exp(-swapped), 1.0, rtol=1e-6)


def test_preferences_alone_do_not_tell_a_certain_small_difference_from_an_uncertain_large_one():
    """d and v matter through d / sqrt(1 + pi v / 8) only, to 0.017 in the probability."""
    difference = jnp.array([0.5, 1.0, 2.0])
    certain = jnp.exp(expected_preference(difference, jnp.zeros(3)))
    for factor in (2.0, 5.0):
        variance = jnp.full(3, (factor**2 - 1) * 8 / np.pi)
        unsure = jnp.exp(expected_preference(factor * difference, variance))
        np.testing.assert_allclose(unsure, certain, atol=0.02)


def test_extreme_rewards_stay_finite():
    far = jnp.array([-1e4, 1e4])
    loss = lambda m, s: probabilistic_preference((m, s), (-m, s)).sum()  # noqa: E731
    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(far, jnp.array([-9.0, 9.0]))
    assert np.isfinite(value) and all(np.isfinite(gradient).all() for gradient in gradients)


def test_overlap_is_the_integral_of_the_root_of_the_product():
    grid = np.linspace(-30, 30, 60001)
    for mean, deviation, other, tau in ((0.0, 1.0, 2.0, 1.0), (1.0, 0.5, -1.0, 3.0), (0.0, 2.0, 0.0, 2.0)):
        product = stats.norm.pdf(grid, mean, deviation) * stats.norm.pdf(grid, other, tau)
        expected = np.sqrt(product).sum() * (grid[1] - grid[0])
        args = (jnp.array([x]) for x in (mean, deviation, other, tau))
        np.testing.assert_allclose(bhattacharyya(*args)[0], expected, rtol=1e-5)
    same = bhattacharyya(*(jnp.array([x]) for x in (other, tau, mean, deviation)))
    np.testing.assert_array_equal(same, bhattacharyya(*(jnp.array([x]) for x in (mean, deviation, other, tau))))


# Statistics of the ratings, bad input.


def test_statistics_are_of_what_is_known():
    mean, scale = rating_statistics(*arrays(WITH_GAPS, KNOWN))
    np.testing.assert_allclose(mean, np.nanmean(WITH_GAPS, axis=0), rtol=1e-5)
    np.testing.assert_allclose(scale, np.nanstd(WITH_GAPS, axis=0), rtol=1e-5)
    alike = jnp.full((7, 2), 0.1) * jnp.array([[1.0, 30.0]])
    known = jnp.ones((7, 2), bool).at[:, 1].set(False)
    mean, scale = rating_statistics(alike, known)
    np.testing.assert_allclose(mean, [0.1, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(scale, 1.0)


def test_a_power_outside_0_and_1_is_refused():
    with pytest.raises(ValueError, match=r"beta is 1\.5; it must be between 0"):
        gaussian_likelihood(*arrays(MEAN, LOG_DEVIATION, RATINGS, KNOWN), beta=1.5)
