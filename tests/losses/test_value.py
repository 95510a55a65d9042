"""The clipped value loss and its metrics."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.value import clipped_value_loss, value_metrics


def random_batch(rows=6, steps=5, seed=0):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(rows, steps))
    old_values, returns = values + 0.3 * generator.normal(size=(2, rows, steps))
    mask = np.arange(steps)[None] < generator.integers(1, steps + 1, rows)[:, None]
    return (*(jnp.asarray(x.astype(np.float32)) for x in (values, old_values, returns)), jnp.asarray(mask))


def loss(values, old_values, returns, mask):
    return mean(clipped_value_loss(values, old_values, returns, 0.2), mask)


def test_values_worked_by_hand():
    values, old_values, returns = (
        jnp.array([[1.0, 1.0, 0.1]]),
        jnp.array([[0.0, 0.5, 0.0]]),
        jnp.array([[2.0, 0.0, 1.1]]),
    )
    got = clipped_value_loss(values, old_values, returns, 0.25)
    np.testing.assert_allclose(got, [[1.75**2 / 2, 0.5, 0.5]], rtol=1e-6)


def test_loss_matches_the_golden_value(golden_losses):
    inputs, expected = golden_losses["inputs"], golden_losses["ppo"]
    for enable, dtype, tolerance in ((True, jnp.float64, 1e-6), (False, jnp.float32, 1e-4)):
        with jax.enable_x64(enable):
            values, old_values, mask = (jnp.asarray(inputs[name], dtype) for name in ("values", "old_values", "mask"))
            returns = (jnp.asarray(expected["adv"], dtype) + old_values) * mask
            got = loss(values, old_values, returns, mask)
            assert got.dtype == dtype
            np.testing.assert_allclose(got, expected["value_token_mean"], rtol=tolerance)


def test_gradient_is_the_error_or_nothing_and_only_for_the_values():
    values, old_values, returns = jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 0.5]]), jnp.array([[2.0, 0.0]])
    gradients = jax.grad(lambda *x: jnp.sum(clipped_value_loss(*x, 0.25)), argnums=(0, 1, 2))(
        values, old_values, returns
    )
    np.testing.assert_allclose(gradients[0], [[0.0, 1.0]])
    assert not np.asarray(gradients[1]).any() and not np.asarray(gradients[2]).any()


def test_within_the_clip_it_is_the_squared_error_and_its_gradient():
    values, _, returns, _ = random_batch()
    for old_values, clip in ((values, 0.2), (jnp.zeros_like(values), jnp.inf)):
        got, gradient = jax.value_and_grad(
            lambda v, o=old_values, c=clip: jnp.sum(clipped_value_loss(v, o, returns, c))
        )(values)
        np.testing.assert_allclose(got, 0.5 * jnp.sum((values - returns) ** 2), rtol=1e-5)
        np.testing.assert_allclose(gradient, values - returns, rtol=1e-5)


def test_gradient_equals_finite_differences():
    with jax.enable_x64(True):
        values, old_values, returns = (x.astype(jnp.float64) for x in random_batch()[:3])
        mask = random_batch()[3]
        direction = jnp.asarray(np.random.default_rng(7).normal(size=values.shape))
        gradient = jax.grad(loss)(values, old_values, returns, mask)
        above, below = (loss(values + s * direction, old_values, returns, mask) for s in (1e-6, -1e-6))
        np.testing.assert_allclose(jnp.sum(gradient * direction), (above - below) / 2e-6, rtol=1e-6)


def test_masked_positions_permutation_and_jit():
    batch = random_batch()
    mask = batch[3]
    value, gradient = jax.value_and_grad(loss)(*batch)
    spoilt = tuple(jnp.where(mask, x, junk) for x, junk in zip(batch[:3], (7.0, -3.0, jnp.nan), strict=True))
    spoilt_value, spoilt_gradient = jax.value_and_grad(loss)(*spoilt, mask)
    assert float(value) == float(spoilt_value)
    np.testing.assert_array_equal(jnp.where(mask, spoilt_gradient, 0.0), gradient)
    order = np.array([3, 1, 0, 5, 4, 2])
    permuted_value, permuted_gradient = jax.value_and_grad(loss)(*(x[order] for x in batch))
    np.testing.assert_allclose(permuted_value, value, rtol=1e-5)
    np.testing.assert_allclose(permuted_gradient, gradient[order], rtol=1e-5)
    np.testing.assert_allclose(jax.jit(loss)(*batch), value, rtol=1e-5)


def test_bfloat16_is_raised_to_float32():
    half = tuple(x.astype(jnp.bfloat16) for x in random_batch()[:3])
    got = clipped_value_loss(*half, 0.2)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, clipped_value_loss(*(x.astype(jnp.float32) for x in half), 0.2))


def test_metrics_worked_by_hand():
    returns = jnp.array([[0.0, 2.0, 4.0, 50.0]])
    values = jnp.array([[1.0, 2.0, 3.0, 0.0]])
    mask = jnp.array([[True, True, True, False]])
    metrics = value_metrics(values, jnp.array([[2.0, 2.0, 3.0, 9.0]]), returns, mask, 0.5)
    np.testing.assert_allclose(metrics["val/clipfrac"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["val/explained_variance"], 0.75, rtol=1e-6)


def test_explained_variance_of_perfect_values_of_a_constant_and_of_constant_returns():
    _, _, returns, mask = random_batch()

    def explained(values, returns):
        return float(value_metrics(values, values, returns, mask, 0.2)["val/explained_variance"])

    assert explained(returns, returns) == 1.0
    assert abs(explained(jnp.full_like(returns, 3.0), returns)) < 1e-5
    assert explained(returns, jnp.ones_like(returns)) == 0.0


def test_rounding_alone_is_not_counted_as_clipping():
    values, old_values, returns, mask = random_batch(rows=200)
    metrics = value_metrics(values, values + 1e-3 * old_values, returns, mask, 1.0)
    assert float(metrics["val/clipfrac"]) == 0.0
