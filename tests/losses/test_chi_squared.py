"""Chi-squared preference optimisation, on log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.chi_squared import chi_po_loss, chi_squared_reward

ZERO = jnp.zeros(3)


def test_numbers_worked_by_hand():
    """z is 2, 1/2 and 1 of the chosen and 1 of the others: the gaps are 1 + log 2, -1/2 - log 2 and 0."""
    chosen = jnp.log(jnp.array([2.0, 0.5, 1.0]))
    np.testing.assert_allclose(chi_squared_reward(chosen, ZERO, 0.5), [1 + np.log(2) / 2, 0.25 - np.log(2) / 2, 0.5])
    gaps = np.array([1 + np.log(2), -0.5 - np.log(2), 0.0])
    expected = np.log1p(np.exp(-0.5 * gaps))
    np.testing.assert_allclose(chi_po_loss(chosen, ZERO, ZERO, ZERO, 0.5, 5.0), expected, rtol=1e-6)


def test_the_gradient_is_that_of_finite_differences_and_0_beyond_the_clip(assert_gradient):
    """At beta = 1 and R = 1 a gap of 2 is clipped; e^1 + 1 is beyond it, and e^-1 - 2 is not."""
    with jax.enable_x64(True):
        rows = [jnp.array([1.0, 0.1, -0.2]), jnp.array([0.0, 0.3, 0.4]), jnp.zeros(3), jnp.zeros(3)]

        def total(chosen, rejected):
            return chi_po_loss(chosen, rejected, *rows[2:], 1.0, 1.0).sum()

        assert_gradient(total, *rows[:2])
        slopes = jax.grad(total)(*rows[:2])
        assert slopes[0] == 0.0 and (slopes[1:] < 0).all()
        np.testing.assert_allclose(chi_po_loss(*rows, 1.0, 1.0)[0], np.log1p(np.exp(-2.0)))


def test_the_divergence_grows_faster_than_the_kl():
    """Where DPO has the gradient beta sigma(-delta), this loss has it times 1 + z."""
    chosen = jnp.log(jnp.array([2.0, 0.5, 1.0]))
    reward, slope = jax.vjp(lambda c: chi_squared_reward(c, ZERO, 0.3), chosen)
    np.testing.assert_allclose(slope(jnp.ones(3))[0], 0.3 * (1 + jnp.exp(chosen)), rtol=1e-6)
    assert reward.dtype == jnp.float32


def test_extreme_ratios_stay_finite_and_narrow_floats_are_raised():
    far = jnp.array([-1e4, 1e4, 0.0])
    value, slope = jax.value_and_grad(lambda c: chi_po_loss(c, -c, ZERO, ZERO, 0.1, 5.0).sum())(far)
    assert np.isfinite(value) and np.isfinite(slope).all()
    narrow = jnp.zeros(3, jnp.bfloat16)
    assert chi_po_loss(narrow, narrow, narrow, narrow, 0.1, 5.0).dtype == jnp.float32


@pytest.mark.parametrize(("beta", "bound", "name"), [(0.0, 1.0, "beta"), (0.1, -1.0, "reward_bound")])
def test_impossible_options_are_errors(beta, bound, name):
    with pytest.raises(ValueError, match=f"{name} is .*; it must be positive"):
        chi_po_loss(ZERO, ZERO, ZERO, ZERO, beta, bound)
