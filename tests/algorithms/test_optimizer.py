import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.optimizer import adam, apply_gradients

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
GRADIENTS = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}


def test_the_norm_is_that_before_clipping():
    optimizer = adam(0.1, max_grad_norm=1.0)
    _, _, norm = apply_gradients(optimizer, GRADIENTS, optimizer.init(PARAMS), PARAMS)
    assert float(norm) == 5.0


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_is_adam_by_hand(max_grad_norm):
    """Two steps: m and v are moving averages of the (clipped) gradient, corrected for their start at 0."""
    rate, decay, b1, b2 = 0.1, 0.02, 0.8, 0.95
    optimizer = adam(rate, max_grad_norm, weight_decay=decay, b1=b1, b2=b2)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(2):
        params, state, _ = apply_gradients(optimizer, GRADIENTS, state, params)
    for name in PARAMS:
        gradient = np.asarray(GRADIENTS[name]) / (1.0 if max_grad_norm is None else 5.0)
        expected, m, v = np.asarray(PARAMS[name]), 0.0, 0.0
        for step in (1, 2):
            m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
            change = (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + 1e-8)
            expected = expected - rate * (change + decay * expected)
        np.testing.assert_allclose(params[name], expected, rtol=1e-5)


def test_the_learning_rate_may_be_a_schedule():
    optimizer = adam(optax.linear_schedule(0.1, 0.0, 1), max_grad_norm=None)
    params, state, _ = apply_gradients(optimizer, GRADIENTS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(params["b"], 2.9, rtol=1e-5)
    after, _, _ = apply_gradients(optimizer, GRADIENTS, state, params)
    np.testing.assert_array_equal(after["b"], params["b"])


def test_jit_changes_nothing():
    optimizer = adam(0.1)
    step = lambda state: apply_gradients(optimizer, GRADIENTS, state, PARAMS)  # noqa: E731
    found, expected = jax.jit(step)(optimizer.init(PARAMS)), step(optimizer.init(PARAMS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
