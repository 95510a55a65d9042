"""Least squares, averaging, ridge, neighbours and Lasso at every prefix, against slow loops and scikit-learn."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.icl.estimators.lasso import lasso, lasso_prefixes
from rlhf_jax.icl.estimators.least_squares import averaging_prefixes, minimum_norm, minimum_norm_prefixes
from rlhf_jax.icl.estimators.neighbours import neighbour_prefixes
from rlhf_jax.icl.estimators.noise_mixture import noise_mixture_prefixes
from rlhf_jax.icl.estimators.ridge import ridge, ridge_prefixes
from rlhf_jax.icl.estimators.task_pools import pool_prefixes

POOL = jnp.asarray(np.random.default_rng(9).normal(size=(5, 4)), jnp.float32)
PREFIXES = {
    "least squares": minimum_norm_prefixes,
    "averaging": averaging_prefixes,
    "ridge": lambda x, y: ridge_prefixes(x, y, 0.25).predictions,
    "neighbours": neighbour_prefixes,
    "lasso": lambda x, y: lasso_prefixes(x, y, 0.1),
    "pool": lambda x, y: pool_prefixes(x, y, POOL, 0.25, block=2),
    "noise mixture": lambda x, y: noise_mixture_prefixes(x, y, jnp.array([0.1, 1.0]), 1.0).mixture,
}


@functools.cache
def jitted(name):
    return jax.jit(PREFIXES[name])


def prompts(count=3, length=9, dimension=4, noise=0.5, seed=0):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(count, length, dimension))
    weights = generator.normal(size=(count, dimension))
    targets = np.einsum("bkd,bd->bk", inputs, weights) + noise * generator.normal(size=(count, length))
    return inputs, targets


def single(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def by_loop(fit, inputs, targets):
    """Predictions from `fit(X, y) -> w` (or a function of the query) called anew on each prefix; 0 for the first."""
    out = np.zeros(targets.shape)
    for b, k in np.ndindex(*targets.shape):
        if k:
            found = fit(inputs[b, :k], targets[b, :k])
            out[b, k] = found(inputs[b, k]) if callable(found) else found @ inputs[b, k]
    return out


@pytest.mark.parametrize("name", PREFIXES)
def test_a_prediction_uses_only_the_examples_before_it(name):
    inputs, targets = prompts()
    whole = jitted(name)(*single(inputs, targets))
    changed_targets, changed_inputs = targets.copy(), inputs.copy()
    changed_targets[:, 5:] += 7.0
    changed_inputs[:, 6:] *= -2.0
    np.testing.assert_array_equal(jitted(name)(*single(changed_inputs, changed_targets))[:, :6], whole[:, :6])
    assert (np.abs(jitted(name)(*single(inputs, changed_targets))[:, 6:] - whole[:, 6:]) > 1e-4).any()


@pytest.mark.parametrize("name", PREFIXES)
def test_the_order_of_the_examples_before_does_not_matter_and_prompts_do_not_mix(name):
    inputs, targets = prompts()
    order = np.array([3, 0, 4, 1, 2, 5, 6, 7, 8])
    turned = jitted(name)(*single(inputs[::-1][:, order], targets[::-1][:, order]))[::-1]
    np.testing.assert_allclose(turned[:, 5:], jitted(name)(*single(inputs, targets))[:, 5:], atol=2e-4)


@pytest.mark.parametrize("name", [name for name in PREFIXES if name != "pool"])
def test_without_an_example_the_prediction_is_0(name):
    np.testing.assert_array_equal(jitted(name)(*single(*prompts()))[:, 0], 0.0)


def test_minimum_norm_is_the_pseudoinverse_on_both_sides_of_the_dimension():
    inputs, targets = prompts(length=9, dimension=4)
    found = jitted("least squares")(*single(inputs, targets))
    expected = by_loop(lambda x, y: np.linalg.lstsq(x, y, rcond=None)[0], inputs, targets)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    weights = minimum_norm(*single(inputs[:, :3], targets[:, :3]))
    np.testing.assert_allclose(np.einsum("bkd,bd->bk", inputs[:, :3], weights), targets[:, :3], atol=1e-4)


def test_averaging_is_a_mean_of_products():
    inputs, targets = prompts()
    expected = by_loop(lambda x, y: (y[:, None] * x).mean(axis=0), inputs, targets)
    np.testing.assert_allclose(jitted("averaging")(*single(inputs, targets)), expected, atol=1e-5)


@pytest.mark.parametrize("penalty", [0.01, 0.25, 20.0])
def test_ridge_at_every_prefix_is_a_solve_at_every_prefix_to_float32(penalty):
    inputs, targets = prompts(count=4, length=30, dimension=8)
    found = jax.jit(ridge_prefixes)(*single(inputs, targets, penalty))
    expected = by_loop(lambda x, y: np.linalg.solve(x.T @ x + penalty * np.eye(8), x.T @ y), inputs, targets)
    np.testing.assert_allclose(found.predictions, expected, rtol=2e-4, atol=2e-4 * np.abs(targets).max())
    leverages = by_loop(
        lambda x, y: lambda query: query @ np.linalg.solve(x.T @ x + penalty * np.eye(8), query), inputs, targets
    )
    np.testing.assert_allclose(found.leverages[:, 1:], leverages[:, 1:], rtol=2e-3)
    np.testing.assert_allclose(found.leverages[:, 0], (inputs[:, 0] ** 2).sum(axis=1) / penalty, rtol=1e-5)


def test_ridge_follows_float64_and_takes_a_penalty_a_lane():
    inputs, targets = prompts(length=20, dimension=6)
    with jax.enable_x64(True):
        found = ridge_prefixes(jnp.asarray(inputs), jnp.asarray(targets), 0.1).predictions
        direct = ridge(jnp.asarray(inputs[:, :19]), jnp.asarray(targets[:, :19]), 0.1)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found[:, 19], np.einsum("bd,bd->b", inputs[:, 19], direct), rtol=1e-10)
    lanes = jax.vmap(lambda penalty: ridge_prefixes(*single(inputs, targets), penalty).predictions)
    both = lanes(jnp.array([0.1, 3.0]))
    np.testing.assert_allclose(both[0], found, atol=1e-3)
    np.testing.assert_allclose(both[1], ridge_prefixes(*single(inputs, targets), 3).predictions, atol=1e-6)


@given(st.sampled_from([1, 5]), st.floats(0.05, 5.0), st.integers(0, 50))
def test_ridge_interpolates_between_least_squares_and_0(dimension, penalty, seed):
    inputs, targets = prompts(count=1, length=12, dimension=dimension, seed=seed)
    shrunk = np.linalg.norm(ridge(*single(inputs, targets), penalty))
    assert shrunk < np.linalg.norm(minimum_norm(*single(inputs, targets)))
    assert np.linalg.norm(ridge(*single(inputs, targets), 2 * penalty)) < shrunk


@pytest.mark.parametrize("name", ["least squares", "averaging", "ridge"])
def test_a_query_orthogonal_to_the_context_is_predicted_as_0(name):
    inputs, targets = prompts(length=4, dimension=4)
    inputs[:, :, 3] = 0.0
    inputs[:, 3] = [0.0, 0.0, 0.0, 5.0]
    np.testing.assert_allclose(jitted(name)(*single(inputs, targets))[:, 3], 0.0, atol=1e-5)


@pytest.mark.parametrize("neighbours", [1, 3, 50])
def test_neighbours_are_those_of_a_sort(neighbours):
    inputs, targets = prompts()

    def fit(x, y):
        return lambda query: y[np.argsort(((x - query) ** 2).sum(axis=1))[:neighbours]].mean()

    found = neighbour_prefixes(*single(inputs, targets), neighbours)
    np.testing.assert_allclose(found, by_loop(fit, inputs, targets), atol=1e-5)


@pytest.mark.parametrize(
    ("estimator", "options", "sentence"),
    [
        (neighbour_prefixes, (0,), "number of neighbours is 0"),
        (inspect.unwrap(neighbour_prefixes), (1.5,), "number of neighbours is 1.5"),
        (ridge, (-1.0,), "penalty of ridge is -1.0: give a number of at least 0"),
        (ridge, (math.nan,), "penalty of ridge is nan"),
        (ridge_prefixes, (0.0,), "penalty of ridge is 0.0: give a number above 0"),
        (lasso, (-0.1,), "penalty of the Lasso is -0.1"),
        (lasso, (0.1, 0), "number of sweeps is 0"),
        (lasso_prefixes, (-0.1,), "penalty of the Lasso is -0.1"),
        (lasso_prefixes, (0.1, 0), "number of sweeps is 0"),
    ],
)
def test_options_that_cannot_be_are_refused(estimator, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        estimator(*single(*prompts()), *options)


def test_a_penalty_of_0_is_least_squares_and_needs_as_many_examples_as_dimensions():
    inputs, targets = single(*prompts())
    np.testing.assert_allclose(ridge(inputs, targets, 0.0), minimum_norm(inputs, targets), atol=1e-3)
    with pytest.raises(ValueError, match=r"penalty of ridge is 0.0: give a number above 0"):
        ridge(inputs[:, :3], targets[:, :3], 0.0)
    traced = jax.eval_shape(lambda penalty: ridge_prefixes(inputs, targets, penalty).predictions, jnp.float32(0.0))
    assert traced.shape == (3, 9)


@pytest.mark.parametrize("penalty", [0.02, 0.3])
def test_lasso_is_that_of_scikit_learn(penalty):
    linear_model = pytest.importorskip("sklearn.linear_model")
    inputs, targets = prompts(count=3, length=12, dimension=6)
    targets = np.einsum("bkd,d->bk", inputs, [2.0, 0, 0, -1.0, 0, 0]) + 0.1 * targets

    def fit(x, y):
        return linear_model.Lasso(alpha=penalty, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x, y).coef_

    expected = np.stack([fit(x, y) for x, y in zip(inputs, targets, strict=True)])
    found = jax.jit(lambda x, y, alpha: lasso(x, y, alpha, sweeps=400))(*single(inputs, targets, penalty))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert ((expected == 0) == (np.abs(found) < 1e-6)).all()
    tail = lasso_prefixes(*single(inputs, targets), penalty, sweeps=400)[:, 7:]
    np.testing.assert_allclose(tail, by_loop(fit, inputs, targets)[:, 7:], atol=1e-3)


def test_lasso_meets_its_optimality_conditions_and_vanishes_at_a_large_penalty():
    inputs, targets = prompts(count=2, length=15, dimension=5)
    weights = np.asarray(lasso(*single(inputs, targets), 0.2, sweeps=300))
    residual = targets - np.einsum("bkd,bd->bk", inputs, weights)
    slope = np.einsum("bkd,bk->bd", inputs, residual) / 15
    assert (np.abs(slope) <= 0.2 + 1e-5).all()
    np.testing.assert_allclose(slope[weights != 0], 0.2 * np.sign(weights[weights != 0]), atol=1e-5)
    np.testing.assert_array_equal(lasso(*single(inputs, targets), 100.0), 0.0)
