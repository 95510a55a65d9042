"""Bayes over a pool of tasks and over noise levels, and the plug-in classifier."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from rlhf_jax.icl.estimators.discriminant import discriminant_logits
from rlhf_jax.icl.estimators.noise_mixture import noise_mixture_prefixes
from rlhf_jax.icl.estimators.ridge import ridge_prefixes
from rlhf_jax.icl.estimators.task_pools import pool_prefixes


def prompts(count=3, length=7, dimension=3, noise=0.5, seed=0):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(count, length, dimension))
    weights = generator.normal(size=(count, dimension))
    targets = np.einsum("bkd,bd->bk", inputs, weights) + noise * generator.normal(size=(count, length))
    return inputs, targets


def single(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def pool_by_loop(inputs, targets, pool, variance):
    out = np.zeros(targets.shape)
    for b, k in np.ndindex(*targets.shape):
        misfit = ((targets[b, :k, None] - inputs[b, :k] @ pool.T) ** 2).sum(axis=0)
        out[b, k] = special.softmax(-misfit / (2 * variance)) @ (pool @ inputs[b, k])
    return out


@pytest.mark.parametrize("block", [1, 4, 100])
def test_a_pool_streamed_in_blocks_is_the_posterior_mean(block):
    inputs, targets = prompts()
    pool = np.random.default_rng(1).normal(size=(10, 3))
    found = jax.jit(pool_prefixes, static_argnames="block")(*single(inputs, targets, pool), 0.3, block=block)
    np.testing.assert_allclose(found, pool_by_loop(inputs, targets, pool, 0.3), atol=2e-5)


def test_a_pool_of_one_task_is_that_task_and_copies_of_tasks_change_nothing():
    inputs, targets = prompts()
    pool = np.random.default_rng(1).normal(size=(4, 3))
    only = pool_prefixes(*single(inputs, targets, pool[:1]), 0.3)
    np.testing.assert_allclose(only, inputs @ pool[0], atol=1e-5)
    once, twice = (pool_prefixes(*single(inputs, targets, np.tile(pool, (n, 1))), 0.3, block=3) for n in (1, 2))
    np.testing.assert_allclose(once, twice, atol=1e-5)


def test_a_far_pool_does_not_underflow():
    inputs, targets = prompts(length=12)
    pool = 60.0 + np.random.default_rng(1).normal(size=(6, 3))
    found = pool_prefixes(*single(inputs, targets, pool), 0.01, block=2)
    np.testing.assert_allclose(found, pool_by_loop(inputs, targets, pool, 0.01), rtol=1e-4)


def test_a_large_pool_becomes_ridge():
    inputs, targets = prompts(count=64, dimension=2, noise=0.7)
    pool = np.random.default_rng(1).normal(size=(20_000, 2))
    found = pool_prefixes(*single(inputs, targets, pool), 0.49)
    bayes = ridge_prefixes(*single(inputs, targets), 0.49).predictions
    assert np.square(found - bayes).mean() < 2e-3 * np.square(bayes).mean()


@pytest.mark.parametrize(
    ("pool", "variance", "block", "sentence"),
    [
        (np.ones((2, 3)), 0.3, 0, "block of tasks is 0"),
        (np.ones((2, 3)), 0.3, 1.5, "block of tasks is 1.5"),
        (np.ones((2, 3)), 0.0, 1, "noise variance is 0.0: give a number above 0"),
        (np.ones((0, 3)), 0.3, 1, "number of tasks in the pool is 0"),
        (np.ones((2, 4)), 0.3, 1, "tasks of the pool have 4 dimensions and the inputs 3"),
    ],
)
def test_pools_that_cannot_be_are_refused(pool, variance, block, sentence):
    with pytest.raises(ValueError, match=sentence):
        inspect.unwrap(pool_prefixes)(*single(*prompts(), pool), variance, block)


@pytest.mark.parametrize(
    ("levels", "prior", "sentence"),
    [
        ([], 1.0, "number of noise variances is 0"),
        ([0.1, -0.1], 1.0, "noise variance is -0.1"),
        ([0.1], 0.0, "prior variance is 0.0"),
    ],
)
def test_noise_levels_that_cannot_be_are_refused(levels, prior, sentence):
    with pytest.raises(ValueError, match=sentence):
        noise_mixture_prefixes(*single(*prompts(), np.array(levels)), prior)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(classes=0), "number of classes is 0"),
        (dict(shrinkage=1.5), "shrinkage is 1.5: give a number from 0 to 1"),
        (dict(shrinkage=0.5, covariance=jnp.eye(3)), "covariance is known and the shrinkage is 0.5"),
        (dict(probabilities=jnp.array([0.5, 0.6])), "sum to 1.1"),
        (dict(classes=5), "7 examples of 5 classes are too few for a covariance in 3 dimensions: give 8"),
    ],
)
def test_discriminants_that_cannot_be_are_refused(options, sentence):
    inputs, _ = prompts()
    labels, query = jnp.zeros((3, 7), jnp.int32), jnp.zeros((3, 3))
    with pytest.raises(ValueError, match=sentence):
        discriminant_logits(*single(inputs), labels, query, **{"classes": 2, **options})


def test_traced_options_are_taken_as_they_are():
    inputs, targets = single(*prompts())
    pool = jnp.ones((2, 3))
    shapes = jax.eval_shape(
        lambda number, levels: (
            pool_prefixes(inputs, targets, pool, number),
            noise_mixture_prefixes(inputs, targets, levels, number).mixture,
            discriminant_logits(inputs, jnp.zeros((3, 7), jnp.int32), inputs[:, 0], 2, shrinkage=number),
        ),
        jnp.float32(0.5),
        jnp.ones(2),
    )
    assert [one.shape for one in shapes] == [(3, 7), (3, 7), (3, 2)]


def test_the_evidence_of_a_noise_level_is_the_density_of_the_targets():
    inputs, targets = prompts()
    levels, prior = np.array([0.05, 0.4, 2.0]), 0.5
    found = jax.jit(noise_mixture_prefixes)(*single(inputs, targets, levels, prior))
    for (s, b, k), value in np.ndenumerate(np.asarray(found.log_evidence)):
        if k:
            covariance = prior * inputs[b, :k] @ inputs[b, :k].T + levels[s] * np.eye(k)
            expected = stats.multivariate_normal.logpdf(targets[b, :k], np.zeros(k), covariance)
            assert value == pytest.approx(expected, rel=1e-3, abs=1e-3)
    shares = special.softmax(np.asarray(found.log_evidence), axis=0)
    np.testing.assert_allclose(found.mixture, (shares * found.ridges).sum(axis=0), atol=1e-5)
    ridges = np.stack([ridge_prefixes(*single(inputs, targets), one / prior).predictions for one in levels])
    np.testing.assert_allclose(found.ridges, ridges, atol=1e-6)
    best = np.asarray(found.log_evidence).argmax(axis=0)
    np.testing.assert_array_equal(found.selected, np.take_along_axis(np.asarray(found.ridges), best[None], 0)[0])


def test_with_one_noise_level_the_mixture_is_ridge():
    inputs, targets = prompts()
    found = noise_mixture_prefixes(*single(inputs, targets, np.array([0.5])), 2.0)
    expected = ridge_prefixes(*single(inputs, targets), 0.25).predictions
    np.testing.assert_allclose(found.mixture, expected, atol=1e-6)
    np.testing.assert_allclose(found.selected, expected, atol=1e-6)


def classification(count=4, length=40, dimension=3, classes=3, seed=0):
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(count, classes, dimension))
    labels = np.concatenate([np.tile(np.arange(classes), (count, 1)), np.zeros((count, 3), np.int64)], axis=1)
    labels = np.concatenate([labels, generator.integers(0, classes, (count, length - classes - 3))], axis=1)
    inputs = np.take_along_axis(means, labels[:, :, None], 1) + generator.normal(size=(count, length, dimension))
    return inputs, labels, generator.normal(size=(count, dimension))


@pytest.mark.parametrize("priors", [None, [0.2, 0.3, 0.5]])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_the_plug_in_classifier_is_that_of_scikit_learn(priors, shrinkage):
    analysis = pytest.importorskip("sklearn.discriminant_analysis")
    inputs, labels, query = classification()
    probabilities = None if priors is None else jnp.array(priors)
    found = discriminant_logits(
        *single(inputs), jnp.asarray(labels, jnp.int32), *single(query), 3, None, probabilities, shrinkage
    )
    for b in range(len(inputs)):
        # Scikit-learn weighs the classes' covariances by `priors`, we by their counts: give it ours.
        model = analysis.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=None, store_covariance=True)
        model.fit(inputs[b], labels[b])
        spread = (1 - shrinkage) * model.covariance_ + shrinkage * np.trace(model.covariance_) / 3 * np.eye(3)
        solved = np.linalg.solve(spread, model.means_.T).T
        expected = solved @ query[b] - (solved * model.means_).sum(axis=1) / 2
        expected += np.log(model.priors_ if priors is None else priors)
        np.testing.assert_allclose(found[b], expected, rtol=2e-3, atol=2e-3)
        if priors is None and shrinkage == 0.0:
            scores = special.softmax(np.asarray(found[b], np.float64))
            np.testing.assert_allclose(scores, model.predict_proba(query[b : b + 1])[0], atol=1e-3)


def test_a_known_covariance_and_a_class_that_is_not_shown():
    inputs = jnp.array([[[2.0, 0.0], [4.0, 0.0]]])
    labels, query = jnp.array([[0, 0]], jnp.int32), jnp.array([[1.0, 1.0]])
    covariance = jnp.diag(jnp.array([2.0, 1.0]))
    uniform = jnp.array([0.5, 0.5])
    known = discriminant_logits(inputs, labels, query, 2, covariance, uniform)
    np.testing.assert_allclose(known, [[3 / 2 - 9 / 4 + np.log(0.5), np.log(0.5)]], atol=1e-6)
    shares = discriminant_logits(inputs, labels, query, 2, covariance)
    np.testing.assert_allclose(shares, [[3 / 2 - 9 / 4, -np.inf]], atol=1e-6)


def test_the_plug_in_logits_approach_those_of_bayes_like_one_over_the_root_of_the_length():
    mean = np.array([[-1.0, 0.5], [0.8, 1.0]])
    spread = np.array([[1.0, 0.3], [0.3, 0.5]])
    solved = np.linalg.solve(spread, mean.T).T
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 2, (400, 1600))
    inputs = mean[labels] + generator.multivariate_normal(np.zeros(2), spread, size=labels.shape)
    query = generator.normal(size=(400, 2))
    bayes = query @ solved.T - (solved * mean).sum(axis=1) / 2

    def error(length):
        arrays = single(inputs[:, :length]), jnp.asarray(labels[:, :length], jnp.int32), single(query)
        found = np.asarray(discriminant_logits(*arrays[0], arrays[1], *arrays[2], 2))
        return np.sqrt(np.square(found[:, 1] - found[:, 0] - bayes[:, 1] + bayes[:, 0]).mean())

    assert error(1600) / error(100) == pytest.approx(0.25, abs=0.06)
