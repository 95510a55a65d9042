"""k layers against Ahn et al.'s recursion in a loop, against explicit gradient descent, and by eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.icl.models.deep_linear import (
    LinearLayers,
    deep_linear,
    deep_linear_of_moments,
    gradient_descent_layers,
    layers_of_attention,
    with_all_matrices,
)
from rlhf_jax.icl.models.linear_attention import SelfAttention, embed, read_out
from rlhf_jax.icl.precision import in_float64


def regression(dimension: int, length: int, count: int = 4, seed: int = 0):
    """Inputs, noiseless targets, queries and the weights of some tasks, float64."""
    draw = np.random.default_rng(seed)
    inputs, weights = draw.normal(size=(count, length, dimension)), draw.normal(size=(count, dimension))
    return inputs, np.einsum("bnd,bd->bn", inputs, weights), draw.normal(size=(count, dimension)), weights


def ahn(projections, queries, stream):
    """Z_k by the definition, with its (n+1) x (n+1) matrices."""
    size = stream.shape[1]
    mask = np.diag([1.0] * (size - 1) + [0.0])
    for p, q in zip(projections, queries, strict=True):
        stream = stream + p @ stream @ mask @ (stream.T @ q @ stream) / (size - 1)
    return stream


def columns(inputs, targets, query):
    return np.stack([np.vstack([np.c_[x.T, q], np.r_[y, 0.0]]) for x, y, q in zip(inputs, targets, query, strict=True)])


@in_float64
def predictions(preconditioners, rotations, inputs, targets, query):
    layers = LinearLayers(jnp.asarray(preconditioners), None if rotations is None else jnp.asarray(rotations))
    return deep_linear(layers, jnp.asarray(inputs), jnp.asarray(targets), jnp.asarray(query))


@in_float64
def predictions_with_all_matrices(preconditioners, rotations, inputs, targets, query):
    layers = LinearLayers(jnp.asarray(preconditioners), None if rotations is None else jnp.asarray(rotations))
    embedding = embed(jnp.asarray(inputs), jnp.asarray(targets)[..., None], jnp.asarray(query))
    return -read_out(layers_of_attention(with_all_matrices(layers), embedding), 1)[:, 0]


def test_full_layers_equal_the_recursion_by_its_definition():
    draw = np.random.default_rng(1)
    stream = columns(*regression(3, 6)[:3])
    projections, queries = 0.3 * draw.normal(size=(2, 3, 4, 4))

    @in_float64
    def run(projections, queries, stream):
        return layers_of_attention(SelfAttention(jnp.asarray(projections), jnp.asarray(queries)), jnp.asarray(stream))

    expected = np.stack([ahn(projections, queries, one) for one in stream])
    assert np.abs(expected - stream).max() > 0.1
    np.testing.assert_allclose(run(projections, queries, stream), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("length", [4, 20])  # fewer and more examples than features
@pytest.mark.parametrize("rotates", [False, True])
def test_sparse_layers_equal_the_full_ones_and_the_definition(length, rotates):
    draw = np.random.default_rng(2)
    inputs, targets, query, _ = regression(5, length)
    preconditioners = 0.2 * draw.normal(size=(3, 5, 5))
    rotations = 0.2 * draw.normal(size=(3, 5, 5)) if rotates else None
    found = predictions(preconditioners, rotations, inputs, targets, query)
    value = np.zeros((3, 6, 6))
    value[:, 5, 5] = 1
    if rotates:
        value[:, :5, :5] = rotations
    by_definition = [
        -ahn(value, np.pad(preconditioners, ((0, 0), (0, 1), (0, 1))), z)[-1, -1]
        for z in columns(inputs, targets, query)
    ]
    assert np.abs(found).min() > 1e-3
    np.testing.assert_allclose(found, by_definition, rtol=1e-11, atol=1e-12)
    full = predictions_with_all_matrices(preconditioners, rotations, inputs, targets, query)
    np.testing.assert_allclose(full, by_definition, rtol=1e-11, atol=1e-12)


def test_one_layer_by_hand():
    """x = 1, 3 with y = 2, 4 and A = -0.5: p = (2 + 12) / 2 = 7, the prediction is 0.5 * 7 * 0.5."""
    one = LinearLayers(preconditioners=-0.5 * jnp.eye(1)[None])
    found = deep_linear(one, jnp.array([[[1.0], [3.0]]]), jnp.array([[2.0, 4.0]]), jnp.array([[0.5]]))
    np.testing.assert_allclose(found, [1.75], rtol=1e-6)


def test_sparse_layers_are_preconditioned_gradient_descent():
    """k layers predict what w_k predicts, w_{l+1} = w_l - A_l' grad: w_0 = 0, A_l = -(step) P with any matrix P."""
    draw = np.random.default_rng(3)
    inputs, targets, query, _ = regression(4, 7)
    steps = 0.2 * draw.normal(size=(3, 4, 4))
    expected = []
    for x, y, q in zip(inputs, targets, query, strict=True):
        w = np.zeros(4)
        for step in steps:
            w = w - step.T @ (x.T @ (x @ w - y)) / 7
        expected.append(w @ q)
    np.testing.assert_allclose(predictions(-steps, None, inputs, targets, query), expected, rtol=1e-11, atol=1e-12)


def test_gd_plus_plus_on_whitened_data_is_a_recursion_of_eigenvalues():
    """With A_l = -a_l I, B_l = b_l I: S_l = lam f_l^2, P_{l+1} = P_l (1 - a_l S_l), f_{l+1} = f_l (1 - a_l b_l S_l)."""
    steps, turns = np.array([0.51, 1.7, 0.8]), np.array([0.44, 0.3, 0.0])
    inputs, targets, query, weights = regression(5, 20)
    expected = []
    for x, q, w in zip(inputs, query, weights, strict=True):
        values, vectors = np.linalg.eigh(x.T @ x / 20)
        residual, scale = np.ones(5), np.ones(5)
        for a, b in zip(steps, turns, strict=True):
            spread = values * scale**2
            residual = residual * (1 - a * spread)
            scale = scale * (1 - a * b * spread)
        expected.append(w @ q - (vectors.T @ w) @ (residual * (vectors.T @ q)))
    eye = np.eye(5)
    found = predictions(-steps[:, None, None] * eye, turns[:, None, None] * eye, inputs, targets, query)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def descend(inputs, targets, initial, rates):
    """Weights [s, d] after steps of gradient descent on (1/2n) sum |W x - y|^2."""
    weights = initial
    for rate in rates:
        weights = weights - rate * (inputs @ weights.T - targets).T @ inputs / len(inputs)
    return weights


@pytest.mark.parametrize(("rates", "outputs", "from_zero"), [((0.3,), 1, True), ((0.3, 0.1, 0.2, 0.25), 2, False)])
def test_the_construction_is_gradient_descent_exactly(rates, outputs, from_zero):
    draw = np.random.default_rng(4)
    inputs, query = draw.normal(size=(4, 8, 3)), draw.normal(size=(4, 3))
    targets = draw.normal(size=(4, 8, outputs))
    initial = np.zeros((outputs, 3)) if from_zero else draw.normal(size=(outputs, 3))

    @in_float64
    def run(inputs, targets, query, initial):
        inputs, targets, query, initial = map(jnp.asarray, (inputs, targets, query, initial))
        embedding = embed(inputs, targets, query, -query @ initial.T)
        return layers_of_attention(gradient_descent_layers(jnp.asarray(rates), initial), embedding)

    stream = run(inputs, targets, query, initial)
    for b in range(4):
        weights = descend(inputs[b], targets[b], initial, rates)
        np.testing.assert_allclose(-stream[b, 3:, -1], weights @ query[b], rtol=0, atol=1e-14)
        # What is left in the labels of the examples is what W_k - W_0 does not explain.
        left = targets[b] - inputs[b] @ (weights - initial).T
        np.testing.assert_allclose(stream[b, 3:, :-1].T, left, rtol=0, atol=2e-14)


def test_the_order_of_the_examples_and_a_copy_of_them_do_not_matter():
    inputs, targets, query, _ = regression(3, 6)
    draw = np.random.default_rng(5)
    blocks = 0.3 * draw.normal(size=(2, 2, 3, 3))
    expected = predictions(*blocks, inputs, targets, query)
    order = draw.permutation(6)
    np.testing.assert_allclose(predictions(*blocks, inputs[:, order], targets[:, order], query), expected, atol=1e-12)
    twice = predictions(*blocks, np.tile(inputs, (1, 2, 1)), np.tile(targets, (1, 2)), query)
    np.testing.assert_allclose(twice, expected, atol=1e-12)


def test_opposite_targets_give_opposite_predictions():
    inputs, targets, query, _ = regression(3, 6)
    blocks = 0.3 * np.random.default_rng(6).normal(size=(2, 2, 3, 3))
    expected = predictions(*blocks, inputs, targets, query)
    np.testing.assert_allclose(predictions(*blocks, inputs, -targets, query), -expected, rtol=1e-12)


def test_gradients_reach_every_block_in_float32():
    inputs, targets, query, _ = (jnp.asarray(array.astype("f4")) for array in regression(3, 6))
    layers = LinearLayers(*(0.3 * jax.random.normal(key, (2, 3, 3)) for key in jax.random.split(jax.random.key(0))))
    loss = lambda layers: jnp.square(deep_linear(layers, inputs, targets, query)).mean()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(layers)
    assert gradient.preconditioners.dtype == jnp.float32
    assert float(jnp.abs(gradient.preconditioners).min()) > 0
    assert (np.abs(np.asarray(gradient.rotations)).max(axis=(1, 2)) > 0).tolist() == [
        True,
        False,
    ]  # the last moves nothing


def test_blocks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"inputs have 3 features and the blocks of the layers are \(2, 4, 4\)"):
        deep_linear_of_moments(
            LinearLayers(jnp.zeros((2, 4, 4))), jnp.zeros((1, 3, 3)), jnp.zeros((1, 3)), jnp.zeros((1, 3))
        )
