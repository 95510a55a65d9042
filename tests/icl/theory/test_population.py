"""The reduced law of the logits against contexts that are drawn example by example."""

import numpy as np
import pytest

from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.shift import Shift
from rlhf_jax.icl.theory.population import draw

MIXTURE = Mixture(2, classes=3, covariance=((1.0, 0.2), (0.2, 0.5)))
SHIFT = Shift((0.2, 0.5, 0.3), ((2.0, 0.3), (0.3, 0.5)), (1.0, 1.5, 0.5), 0.2, 0.7)


def contexts(population, weights, length, rng):
    """Logits of the reduced model, each from its own context."""
    law, count = population.law, len(population.label)
    c, d = law.mixture.classes, law.mixture.dimension
    labels = rng.choice(c, p=law.probabilities, size=(count, length))
    inputs = population.means[np.arange(count)[:, None], labels]
    inputs = inputs + rng.normal(size=(count, length, d)) @ np.linalg.cholesky(law.covariance).T
    other = (labels + rng.integers(1, c, size=labels.shape)) % c
    shown = np.where(rng.random(labels.shape) < law.label_noise, other, labels)
    sums = np.stack([(inputs * (shown == k)[..., None]).mean(axis=1) for k in range(c)], axis=1)
    return np.einsum("ncd,de,ne->nc", sums, weights, population.query)


@pytest.mark.parametrize("shift", [Shift(), SHIFT], ids=["no shift", "every shift"])
def test_logits_have_the_law_of_drawn_contexts(shift):
    weights = np.array([[1.0, 0.3], [-0.2, 1.5]])
    population = draw(MIXTURE, 2**15, seed=1, shift=shift)
    reduced = population.model_logits(weights, 7)
    drawn = contexts(population, weights, 7, np.random.default_rng(2))
    statistics = [np.tanh, np.square, lambda z: z * population.logits, lambda z: z * np.roll(z, 1, axis=1)]
    for statistic in statistics:
        # The population is the same on both sides, so that the difference has the noise of the contexts alone.
        difference = statistic(reduced) - statistic(drawn)
        error = difference.std(axis=0) / np.sqrt(len(difference))
        assert (np.abs(difference.mean(axis=0)) < 4 * error).all()


def test_queries_have_the_posterior_that_the_logits_say():
    population = draw(MIXTURE, 2**15, seed=3, shift=SHIFT)
    posterior = np.exp(population.logits)
    posterior /= posterior.sum(axis=1, keepdims=True)
    for k in range(3):
        for weight in (1.0, population.query[:, 0], np.sin(population.means[:, 1, 0])):
            difference = ((population.label == k) - posterior[:, k]) * weight
            assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(difference))


def test_means_have_equal_lengths_and_the_prior_of_the_first():
    population = draw(MIXTURE, 2**14, seed=0)
    lengths = np.einsum("ncd,de,nce->nc", population.means, MIXTURE.inverse, population.means)
    np.testing.assert_allclose(lengths, lengths[:, :1] * np.ones(3), rtol=1e-10)
    np.testing.assert_allclose(np.cov(population.means[:, 0].T), np.eye(2), atol=0.01)


def test_counts_are_multinomial_or_exact():
    population = draw(MIXTURE, 2**14, seed=0, shift=Shift(class_probabilities=(0.2, 0.5, 0.3)))
    counts = 10 * population.counts(10).sum(axis=1)
    np.testing.assert_allclose(counts.sum(axis=1), 10)
    np.testing.assert_allclose(counts.mean(axis=0), [2.0, 5.0, 3.0], atol=0.02)
    np.testing.assert_allclose(
        np.cov(counts.T), 10 * (np.diag([0.2, 0.5, 0.3]) - np.outer(p := [0.2, 0.5, 0.3], p)), atol=0.06
    )
    np.testing.assert_allclose(population.counts(10, stratified=True).sum(axis=1)[0], [0.2, 0.5, 0.3])


def test_without_end_the_logits_are_those_of_the_expected_sums():
    population = draw(MIXTURE, 2**10, seed=0, shift=SHIFT)
    law = population.law
    expected = (law.probabilities[:, None] * law.confusion).T @ population.means
    found = population.model_logits(np.eye(2), np.inf)
    np.testing.assert_allclose(found, np.einsum("nkd,nd->nk", expected, population.query), rtol=1e-12)


def test_bad_points_and_lengths_are_refused():
    with pytest.raises(ValueError, match="points is 1000: give a power of two"):
        draw(MIXTURE, 1000)
    population = draw(MIXTURE, 16)
    for length in (0, -5, 0.5, 10.7, -np.inf, np.nan):
        with pytest.raises(ValueError, match=r"context length is .*: give a whole number of at least 1"):
            population.model_logits(np.eye(2), length)
    with pytest.raises(ValueError, match="context length is -5: give a whole number of at least 1"):
        population.counts(-5)
    with pytest.raises(ValueError, match=r"weights have the shape \(3, 3\): give a matrix of shape \(2, 2\)"):
        population.model_logits(np.eye(3), 5)
    with pytest.raises(ValueError, match="weights have entries that are not finite"):
        population.model_logits(np.array([[1.0, np.nan], [0.0, 1.0]]), 5)
