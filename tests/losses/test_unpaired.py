"""Kahneman-Tversky optimisation, on log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.unpaired import kto_loss, kto_reference_point

POLICY, REFERENCE = np.array([-3.0, -6.0, -2.0]), np.array([-5.0, -5.0, -2.5])  # log-ratios 2, -1, 0.5
GOOD = jnp.array([True, True, False])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_numbers_worked_by_hand():
    """With z0 = 0.25 the gains are 1.75, -1.25 and 0.25."""
    rows = [jnp.asarray(row, jnp.float32) for row in (POLICY, REFERENCE)]
    expected = [1 - sigmoid(0.5 * 1.75), 1 - sigmoid(-0.5 * 1.25), 1 - sigmoid(-0.5 * 0.25)]
    np.testing.assert_allclose(kto_loss(*rows, GOOD, 0.25, 0.5), expected, rtol=1e-6)
    weighted = kto_loss(*rows, GOOD, jnp.float32(0.25), 0.5, 1.5, 2.0)
    np.testing.assert_allclose(weighted, [1.5 * expected[0], 1.5 * expected[1], 2.0 * expected[2]], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-4), (jnp.float64, 1e-6)])
def test_reference_values(golden_losses, golden_pairs, dtype, tolerance):
    with jax.enable_x64(True):
        chosen, rejected, reference_chosen, reference_rejected, *_ = golden_pairs(dtype)
        policy, reference = jnp.append(chosen, rejected), jnp.append(reference_chosen, reference_rejected)
        losses = kto_loss(policy, reference, jnp.arange(8) < 4, 0.37, 0.1)
        assert losses.dtype == dtype
        np.testing.assert_allclose(losses.mean(), golden_losses["kto_.1_z0.37"], rtol=tolerance)


def test_the_gradient_is_that_of_finite_differences_and_of_the_policy_alone(assert_gradient):
    with jax.enable_x64(True):
        policy, reference = jnp.asarray(POLICY), jnp.asarray(REFERENCE)

        def total(policy, reference=reference, point=0.25):
            return kto_loss(policy, reference, GOOD, point, 0.5, 1.5, 2.0).sum()

        assert_gradient(total, policy)
        frozen = jax.grad(total, argnums=(1, 2))(policy, reference, jnp.array(0.25))
        np.testing.assert_array_equal(jnp.append(*frozen), 0.0)
        slopes = jax.grad(total)(policy)
        assert (slopes[:2] < 0).all() and slopes[2] > 0  # good ones are raised, the bad one lowered


def test_it_saturates():
    """Far from the point, either way, there is nothing left to learn; at the point a slope of beta / 4."""
    far = jnp.array([-1e3, 1e3, 0.0])
    for good in (jnp.ones(3, bool), jnp.zeros(3, bool)):
        slopes = jax.grad(lambda policy: kto_loss(policy, jnp.zeros(3), good, 0.0, 0.4).sum())(far)  # noqa: B023
        np.testing.assert_allclose(jnp.abs(slopes), [0.0, 0.0, 0.1], atol=1e-7)


def test_the_reference_point_is_a_mean_over_rows_that_count_and_never_below_0():
    policy, reference = jnp.array([-3.0, -5.0, 9.0]), jnp.array([-4.0, -7.0, 0.0])
    counted = jnp.array([True, True, False])
    assert float(kto_reference_point(policy, reference, counted)) == 1.5
    assert float(kto_reference_point(reference, policy, counted)) == 0.0
    assert float(kto_reference_point(policy, reference, jnp.zeros(3, bool))) == 0.0
    slope = jax.grad(lambda policy: kto_reference_point(policy, reference, counted))(policy)
    np.testing.assert_array_equal(slope, 0.0)


def test_narrow_floats_are_raised_and_the_order_of_rows_does_not_matter():
    rows = [jnp.asarray(row, jnp.bfloat16) for row in (POLICY, REFERENCE)]
    losses, order = kto_loss(*rows, GOOD, 0.25, 0.5), np.array([2, 0, 1])
    assert losses.dtype == kto_reference_point(*rows, GOOD).dtype == jnp.float32
    np.testing.assert_array_equal(kto_loss(*(row[order] for row in rows), GOOD[order], 0.25, 0.5), losses[order])
    np.testing.assert_array_equal(jax.jit(kto_loss)(*rows, GOOD, 0.25, 0.5), losses)


def test_impossible_input_is_refused():
    zero = jnp.zeros(3)
    for options, name in (((0.0,), "beta"), ((0.1, 0.0), "good_weight"), ((0.1, 1.0, -1.0), "bad_weight")):
        with pytest.raises(ValueError, match=f"{name} is .*; it must be positive"):
            kto_loss(zero, zero, GOOD, 0.0, *options)
    with pytest.raises(ValueError, match="A batch of KTO has 1 row; its reference point needs 2 rows or more"):
        kto_reference_point(jnp.zeros(1), jnp.zeros(1), jnp.ones(1, bool))
