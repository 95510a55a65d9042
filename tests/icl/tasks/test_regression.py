"""Prompts of regression: functions worked by hand, trees walked in a loop, the laws of inputs, weights and noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from rlhf_jax.icl.tasks.regression import (
    Linear,
    Network,
    Regression,
    Tree,
    draw_function,
    draw_prompt,
    draw_regression,
    evaluate,
)

COVARIANCE = ((1.0, 0.4, 0.1), (0.4, 0.8, -0.2), (0.1, -0.2, 0.6))
KINDS = ["linear", "sparse", "network", "tree"]


def test_functions_worked_by_hand():
    inputs = jnp.array([[[1.0, -2.0], [0.5, 3.0]]])
    assert evaluate(Linear(weights=jnp.array([[2.0, 0.25]])), inputs).tolist() == [[1.5, 1.75]]
    network = Network(inner=jnp.array([[[1.0, -1.0], [0.0, 1.0]]]), outer=jnp.array([[2.0, 10.0]]))
    assert evaluate(network, inputs).tolist() == [[2.0, 26.0]]  # units (1, -3) and (0.5, 2.5)
    tree = Tree(coordinates=jnp.array([[1, 0, 0]]), leaves=jnp.array([[10.0, 11.0, 12.0, 13.0]]))
    assert evaluate(tree, inputs).tolist() == [[11.0, 13.0]]  # (no, yes) and (yes, yes)
    assert evaluate(tree, jnp.array([[[0.0, 0.0], [-1.0, 1.0]]])).tolist() == [[10.0, 12.0]]  # zero is not positive


def test_trees_are_those_of_a_walk_from_the_root(key):
    setting = Regression(5, kind="tree", depth=4)
    tree = draw_function(key, setting, 6)
    prompt = draw_prompt(key, setting, tree, 9)
    inputs, coordinates, leaves = (np.asarray(array) for array in (prompt.inputs, *tree))
    assert coordinates.shape == (6, 15) and leaves.shape == (6, 16)
    for b in range(6):
        for n in range(9):
            node = 0
            for _ in range(4):
                node = 2 * node + (2 if inputs[b, n, coordinates[b, node]] > 0 else 1)
            assert prompt.targets[b, n] == leaves[b, node - 15]


def test_trees_ask_for_every_coordinate_and_use_every_leaf(key):
    tree = draw_function(key, Regression(4, kind="tree", depth=3), 500)
    shares = np.bincount(np.asarray(tree.coordinates).reshape(-1), minlength=4) / 3500
    np.testing.assert_allclose(shares, 0.25, atol=4 * np.sqrt(0.1875 / 3500))
    corners = jnp.array([[[x, y, z, 1.0] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]])
    full = Tree(coordinates=jnp.array([[0, 1, 1, 2, 2, 2, 2]]), leaves=jnp.arange(8.0)[None])
    assert sorted(evaluate(full, corners)[0].tolist()) == list(range(8))


def test_sparse_weights_are_some_of_the_normal_ones(key):
    weights = np.asarray(draw_function(key, Regression(6, kind="sparse", sparsity=2), 2000).weights)
    assert ((weights != 0).sum(axis=1) == 2).all()
    np.testing.assert_allclose((weights != 0).mean(axis=0), 1 / 3, atol=4 * np.sqrt(2 / 9 / 2000))
    np.testing.assert_allclose(np.square(weights).sum(axis=1).mean(), 2, atol=4 * 2 / np.sqrt(2000))


def test_values_have_the_variance_of_the_papers(key):
    """For x ~ N(0, I): f has the variance d s^2, and sparse ones that of their coordinates; networks d s^2 too, as
    (2 / hidden) hidden E relu(u'x)^2 = E |x|^2; trees s^2. Averaged over tasks."""
    for kind, variance in (("linear", 5), ("sparse", 2), ("network", 5), ("tree", 1)):
        setting = Regression(5, kind=kind, sparsity=2, hidden=20, depth=3, prior_scale=1.5)
        values = np.asarray(draw_regression(key, setting, 3000, 2).query_target, np.float64)
        squares = values**2 / 1.5**2
        assert abs(squares.mean() - variance) < 4 * squares.std() / np.sqrt(3000), kind


def test_inputs_have_their_law(key):
    uniform = np.asarray(draw_regression(key, Regression(3, inputs="uniform"), 500, 9).inputs)
    assert uniform.min() < -0.99 and 0.99 < uniform.max() <= 1
    np.testing.assert_allclose(uniform.var(axis=(0, 1)), 1 / 3, atol=0.02)

    prompt = draw_regression(key, Regression(3, covariance=COVARIANCE), 2000, 4)
    for inputs in (np.asarray(prompt.inputs).reshape(-1, 3), np.asarray(prompt.query)):
        np.testing.assert_allclose(inputs.T @ inputs / len(inputs), COVARIANCE, atol=4 * 1.5 / np.sqrt(len(inputs)))


def test_random_covariances_are_diagonal_exponential_and_shared_by_the_prompt(key):
    prompt = draw_regression(key, Regression(2, inputs="random_covariance"), 1000, 400)
    scales = np.asarray(jnp.square(prompt.inputs).mean(axis=1), np.float64)
    np.testing.assert_allclose(scales.mean(axis=0), 1, atol=4 / np.sqrt(1000))
    np.testing.assert_allclose((scales > 1).mean(axis=0), np.exp(-1), atol=4 * np.sqrt(0.24 / 1000))
    standard = np.square(np.asarray(prompt.query)) / scales
    np.testing.assert_allclose(standard.mean(axis=0), 1, atol=4 * np.sqrt(2 / 1000))


def test_the_inverse_prior_makes_every_direction_of_the_inputs_count_the_same(key):
    weights = np.asarray(
        draw_function(
            key, Regression(3, covariance=COVARIANCE, prior="inverse_covariance", prior_scale=0.5), 20_000
        ).weights,
        np.float64,
    )
    expected = 0.25 * np.linalg.inv(np.array(COVARIANCE))
    np.testing.assert_allclose(weights.T @ weights / 20_000, expected, atol=4 * expected.max() * np.sqrt(2 / 20_000))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_on_the_context_alone(kind, key):
    setting = Regression(4, kind=kind, hidden=8, depth=2)
    function = draw_function(key, setting, 400)
    noisy = draw_prompt(key, dataclasses.replace(setting, noise_variance=0.25), function, 10)
    noise = np.asarray(noisy.targets - evaluate(function, noisy.inputs), np.float64)
    assert abs(noise.mean()) < 4 * 0.5 / np.sqrt(4000)
    assert abs(noise.var() - 0.25) < 4 * 0.25 * np.sqrt(2 / 4000)
    np.testing.assert_allclose(noisy.query_target, evaluate(function, noisy.query[:, None])[:, 0], rtol=1e-6)
    clean = draw_prompt(key, setting, function, 10)
    np.testing.assert_allclose(clean.targets, evaluate(function, clean.inputs), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_every_kind(kind, key):
    setting = Regression(4, kind=kind, hidden=8, depth=2, noise_variance=0.1)
    prompt = draw_regression(key, setting, 7, 5)
    assert prompt.inputs.shape == (7, 5, 4) and prompt.targets.shape == (7, 5)
    assert prompt.query.shape == (7, 4) and prompt.query_target.shape == (7,)
    assert (prompt.weights is not None) == (kind in ("linear", "sparse"))
    if prompt.weights is not None:
        np.testing.assert_allclose(prompt.query_target, (prompt.query * prompt.weights).sum(axis=1), rtol=1e-4)
    jitted = jax.jit(lambda key: draw_regression(key, setting, 7, 5))(key)
    for one, other in zip(jax.tree.leaves(prompt), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    with jax.enable_x64(True):
        leaves = jax.tree.leaves(draw_regression(key, setting, 2, 3))
    assert {str(leaf.dtype) for leaf in leaves} == {"float64"}


def test_settings_can_be_compared_and_hashed():
    assert Regression(3, covariance=np.array(COVARIANCE)) == Regression(3, covariance=COVARIANCE)
    assert len({Regression(3), Regression(3), Regression(4)}) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimension": 0}, "the dimension d is 0: give a whole number of at least 1"),
        ({"kind": "cubic"}, "kind"),
        ({"inputs": "cauchy"}, "inputs"),
        ({"prior": "flat"}, "prior"),
        ({"prior_scale": 0.0}, r"the prior scale is 0\.0: give a number above 0"),
        ({"noise_variance": -1.0}, r"the noise variance is -1\.0: give a number of at least 0"),
        ({"kind": "sparse", "sparsity": 4}, "the sparsity is 4 in 3 dimensions: give at most 3"),
        ({"sparsity": 0}, "the sparsity is 0: give a whole number of at least 1"),
        ({"hidden": 0}, "the number of hidden units is 0"),
        ({"depth": 0}, "the depth is 0"),
        ({"covariance": -np.eye(3)}, "the covariance has the eigenvalue -1"),
        ({"covariance": np.eye(3), "inputs": "uniform"}, 'the inputs are uniform: only "gaussian" ones have a covar'),
        ({"prior": "inverse_covariance", "kind": "tree"}, 'the prior "inverse_covariance" is one of linear functions'),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(options, message):
    with pytest.raises((ValueError, TypeCheckError), match=message):  # the tests' type checks come first
        Regression(**{"dimension": 3, **options})


def test_bad_sizes_are_refused_in_one_sentence(key):
    with pytest.raises(ValueError, match="the number of prompts is 0"):
        draw_regression(key, Regression(3), 0, 5)
    with pytest.raises(ValueError, match="the context length N is 0"):
        draw_regression(key, Regression(3), 5, 0)
