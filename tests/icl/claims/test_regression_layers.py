"""Trained linear transformers end where theory says, at small sizes."""

import jax.numpy as jnp
import numpy as np

from rlhf_jax.icl.claims import regression_layers as claims
from rlhf_jax.icl.models.deep_linear import LinearLayers
from rlhf_jax.icl.theory import preconditioned

SMALL = dict(dimension=2, length=10, seeds=2, batch=500)


def failed(rows):
    return [row for row in rows if not row.passed]


def test_sparse_layers_learn_the_best_steps():
    found = claims.sparse_layers(layers=(1, 2), steps=900, rate=3e-2, **SMALL)
    assert not failed(found.comparisons)
    assert found.trained.shape == (2, 2) and found.curves.shape == (2, 2, 900)
    assert (found.trained[1] < found.shared[1]).all()  # one layer has one step, so that its two losses are equal
    np.testing.assert_allclose(found.shared[0], found.predicted[0], rtol=1e-10)
    untrained = claims.sparse_layers(layers=(1,), steps=3, **SMALL)
    assert len(failed(untrained.comparisons)) == 3


def test_gd_plus_plus_is_compared_with_the_nearest_minimum_of_theory():
    found = claims.gd_plus_plus(steps=5, starts=10, **SMALL)
    minima = [one.loss for one in preconditioned.gd_plus_plus_minima(2, 10, 2, starts=10)]
    assert [row.predicted for row in found.comparisons] == [minima[-1]] * 2
    assert len(failed(found.comparisons)) == 2  # five steps of training
    assert f"minimum {len(minima)} of {len(minima)}" in found.comparisons[0].quantity
    assert found.minima.tolist() == minima
    assert found.curves.shape == (1, 2, 5) and found.trained.min() > minima[-1]


def test_the_loss_of_given_layers_is_that_of_prompts_and_of_theory():
    steps = np.array([0.4, 1.1])
    layers = LinearLayers(-jnp.asarray(steps, jnp.float32)[:, None, None] * jnp.eye(3)[None])
    assert np.isclose(claims.trained_loss(layers, 8), preconditioned.loss_of_steps(steps, 3, 8), rtol=1e-5)
    turned = layers._replace(rotations=jnp.full((2, 3, 3), 0.1))
    inputs = np.random.default_rng(5).standard_normal((20_000, 8, 3))
    moments = np.einsum("bnd,bne->bde", inputs, inputs) / 8
    turn = np.eye(3) - steps[0] * 0.1 * np.ones((3, 3)) @ moments
    # the error as a bilinear form of w and the query: slot by slot, in the order of the layers
    first = np.eye(3) - steps[0] * moments
    second = (turn @ (moments - steps[0] * moments @ moments)).swapaxes(1, 2) @ turn * steps[1]
    losses = ((first - second) ** 2).sum(axis=(1, 2))
    error = losses.std() / np.sqrt(len(losses))
    assert abs(claims.trained_loss(turned, 8) - losses.mean()) < 5 * error
