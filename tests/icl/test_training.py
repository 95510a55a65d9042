import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.icl.training import fit


def test_fit_is_gradient_descent_written_out(key):
    def loss(weight, key):
        return jnp.mean((jax.random.normal(key, (8,)) * weight - 1.0) ** 2)

    found = jax.jit(lambda key: fit(loss, jnp.float32(0.5), optax.sgd(0.1), 6, key))(key)
    weight, weights, losses = jnp.float32(0.5), [], []
    for step in range(6):
        value, gradient = jax.value_and_grad(loss)(weight, jax.random.fold_in(key, step))
        weight = weight - 0.1 * gradient
        weights.append(weight)
        losses.append(value)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-6)
    np.testing.assert_allclose(found.params, weights[-1], rtol=1e-6)
    np.testing.assert_allclose(found.averaged, np.mean(weights[3:]), rtol=1e-6)


def test_no_steps_are_refused(key):
    with pytest.raises(ValueError, match="the number of steps is 0: give a whole number of at least 1"):
        fit(lambda weight, key: weight**2, jnp.float32(0.5), optax.sgd(0.1), 0, key)
