"""Numbers of examples: the distribution functions of SciPy, moments, and lengths that are traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlhf_jax.icl.tasks.counts import binomial_counts, multinomial_counts, normal_shares


@pytest.mark.parametrize(
    ("trials", "probability"), [(1, 0.5), (20, 0.5), (20, 0.03), (7, 0.999), (1000, 0.7), (100_000, 0.5), (10**6, 0.3)]
)
def test_binomial_counts_invert_the_distribution_function(trials, probability, key, monkeypatch):
    """Fed a grid of uniform numbers they give the quantiles, but for grid points within rounding of a jump."""
    grid = (np.arange(20_000) + 0.5) / 20_000
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.asarray(grid, dtype))
    drawn = np.asarray(jax.jit(lambda: binomial_counts(key, trials, probability, len(grid), jnp.float32))())
    quantiles = stats.binom.ppf(grid, trials, probability)
    assert np.abs(drawn - quantiles).max() <= 1
    # Above 2^18 neighbours among float32 numbers are 1 / 32 apart, and as many are rounded to the wrong side.
    assert (drawn == quantiles).mean() > (0.998 if trials <= 100_000 else 1 - 1 / 32)


def test_multinomial_counts_have_the_moments_of_theirs(key):
    probabilities = np.array([0.5, 0.1, 0.15, 0.25])
    drawn = jax.jit(lambda: multinomial_counts(key, 12, probabilities, 20_000, jnp.float32))()
    drawn = np.asarray(drawn, np.float64)
    assert (drawn.sum(axis=1) == 12).all() and (drawn >= 0).all() and (drawn == np.round(drawn)).all()
    covariance = 12 * (np.diag(probabilities) - np.outer(probabilities, probabilities))
    errors = np.sqrt(np.diag(covariance) / len(drawn))
    assert (np.abs(drawn.mean(axis=0) - 12 * probabilities) < 4 * errors).all()
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=4 * 3 * np.sqrt(2 / len(drawn)))


def test_few_kinds(key):
    assert multinomial_counts(key, 5, np.array([1.0]), 3, jnp.float32).tolist() == [[5.0]] * 3
    two = jax.jit(lambda: multinomial_counts(key, 5, np.array([0.25, 0.75]), 100, jnp.float32))()
    assert two.sum(axis=1).tolist() == [5.0] * 100
    assert normal_shares(key, 5, np.array([1.0]), 3, jnp.float32).tolist() == [[1.0]] * 3


def test_normal_shares_have_the_moments_of_counts_over_their_trials(key):
    probabilities = np.array([0.5, 0.2, 0.3])
    drawn = np.asarray(normal_shares(key, 400, probabilities, 20_000, jnp.float32), np.float64)
    np.testing.assert_allclose(drawn.sum(axis=1), 1, atol=1e-6)
    assert (drawn >= 0).all()
    covariance = (np.diag(probabilities) - np.outer(probabilities, probabilities)) / 400
    np.testing.assert_allclose(drawn.mean(axis=0), probabilities, atol=4 * np.sqrt(covariance.max() / len(drawn)))
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=4 * covariance.max() * np.sqrt(2 / len(drawn)))


def test_normal_shares_of_a_short_traced_context_stay_shares(key):
    drawn = jax.jit(lambda n: normal_shares(key, n, np.array([0.1, 0.9]), 1000, jnp.float32))(jnp.int32(2))
    assert (drawn >= 0).all() and (drawn == 0).any()
    np.testing.assert_allclose(drawn.sum(axis=1), 1, atol=1e-6)


def test_normal_shares_refuse_a_short_context(key):
    with pytest.raises(ValueError, match=r"10 examples would often be negative: give a length of at least 32, or coun"):
        normal_shares(key, 10, np.array([1, 1, 1]) / 3, 5, jnp.float32)
    normal_shares(key, 32, np.array([1, 1, 1]) / 3, 5, jnp.float32)


def test_trials_may_be_traced_and_mapped_over(key):
    probabilities = np.array([0.5, 0.2, 0.3])
    lengths = jnp.array([1, 20, 500])
    for draw in (multinomial_counts, normal_shares):
        traced = jax.jit(lambda n, draw=draw: draw(key, n, probabilities, 50, jnp.float32))
        for row, length in zip(jax.jit(jax.vmap(traced))(lengths), lengths, strict=True):
            np.testing.assert_allclose(row, traced(length), atol=1e-6)
        known = jax.jit(lambda draw=draw: draw(key, 500, probabilities, 50, jnp.float32))()
        np.testing.assert_allclose(known, traced(lengths[2]), atol=1e-6)
        if draw is multinomial_counts:
            assert traced(lengths[0]).sum() == 50
