"""Losses of pairs against a reference, on log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.preference import (
    dpo_loss,
    hinge_loss,
    implicit_reward,
    ipo_loss,
    log_ratio_gap,
    robust_dpo_loss,
    xpo_loss,
)

# log pi(w), log pi(l), log ref(w), log ref(l); the gaps are (1) - (-1) = 2, 0 - 1 = -1 and 2 - (-3) = 5
LOGPROBS = np.array([[-10.0, -3.5, -7.0], [-12.0, -3.0, -7.0], [-11.0, -3.5, -9.0], [-11.0, -4.0, -4.0]])
GAPS = np.array([2.0, -1.0, 5.0])
LENGTHS = (jnp.array([4, 1, 2]), jnp.array([2, 5, 1]))
LOSSES = {
    "dpo": lambda *rows: dpo_loss(*rows, 0.3),
    "smoothed dpo": lambda *rows: dpo_loss(*rows, 0.3, 0.2),
    "robust": lambda *rows: robust_dpo_loss(*rows, 0.3, 0.2),
    "ipo": lambda *rows: ipo_loss(*rows, 0.3),
    "ipo by length": lambda *rows: ipo_loss(*rows, 0.3, LENGTHS),
    "hinge": lambda *rows: hinge_loss(*rows, 0.3),
    "xpo": lambda *rows: xpo_loss(*rows, rows[1], 0.3, 0.05),
}


def of(array, dtype=jnp.float32):
    return [jnp.asarray(row, dtype) for row in array]


def test_numbers_worked_by_hand():
    """With beta 0.5 the loss of DPO is log(1 + exp(-gap / 2))."""
    np.testing.assert_allclose(log_ratio_gap(*of(LOGPROBS)), GAPS)
    expected = [np.log1p(np.exp(-1.0)), np.log1p(np.exp(0.5)), np.log1p(np.exp(-2.5))]
    np.testing.assert_allclose(dpo_loss(*of(LOGPROBS), 0.5), expected, rtol=1e-6)
    np.testing.assert_allclose(implicit_reward(*of(LOGPROBS[[0, 2]]), 0.5), [0.5, 0.0, 1.0], rtol=1e-6)
    smoothed = 0.75 * np.log1p(np.exp(-1.0)) + 0.25 * np.log1p(np.exp(1.0))
    np.testing.assert_allclose(dpo_loss(*of(LOGPROBS), 0.5, 0.25)[0], smoothed, rtol=1e-6)
    robust = (0.75 * np.log1p(np.exp(-1.0)) - 0.25 * np.log1p(np.exp(1.0))) / 0.5
    np.testing.assert_allclose(robust_dpo_loss(*of(LOGPROBS), 0.5, 0.25)[0], robust, rtol=1e-6)
    np.testing.assert_allclose(ipo_loss(*of(LOGPROBS), 0.5), [1.0, 4.0, 16.0])
    # The log-ratios are 1, 0, 2 and -1, 1, -3: divided by the lengths, 0.25, 0, 1 and -0.5, 0.2, -3.
    np.testing.assert_allclose(ipo_loss(*of(LOGPROBS), 0.5, LENGTHS), [0.0625, 1.44, 9.0], rtol=1e-6)
    np.testing.assert_allclose(hinge_loss(*of(LOGPROBS), 0.5), [0.0, 1.5, 0.0])
    np.testing.assert_allclose(xpo_loss(*of(LOGPROBS), of(LOGPROBS)[1], 0.5, 0.1), expected + 0.1 * LOGPROBS[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-4), (jnp.float64, 1e-6)])
def test_reference_values(golden_losses, golden_pairs, dtype, tolerance):
    with jax.enable_x64(True):
        *four, chosen_length, rejected_length = golden_pairs(dtype)
        found = {
            "dpo_.1": dpo_loss(*four, 0.1),
            "cdpo_.1_eps.1": dpo_loss(*four, 0.1, 0.1),
            "ipo_tau.1_sum": ipo_loss(*four, 0.1),
            "ipo_tau.1_lenavg": ipo_loss(*four, 0.1, (chosen_length, rejected_length)),
            "slic_hinge_.1": hinge_loss(*four, 0.1),
            "xpo_.1_a.001_refside_losers": xpo_loss(*four, four[1], 0.1, 0.001),
        }
        for name, losses in found.items():
            assert losses.dtype == dtype
            np.testing.assert_allclose(losses.mean(), golden_losses[name], rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences_and_leave_the_reference_alone(name, assert_gradient):
    with jax.enable_x64(True):
        rows = of(LOGPROBS, jnp.float64)
        assert_gradient(lambda *two: LOSSES[name](*two, *rows[2:]).sum(), *rows[:2])
        frozen = jax.grad(lambda *two: LOSSES[name](*rows[:2], *two).sum(), argnums=(0, 1))(*rows[2:])
        np.testing.assert_array_equal(jnp.stack(frozen), 0.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_where_policy_and_reference_are_one(smoothing):
    """The loss is log 2 and its gradient beta (1/2 - e), whatever the completions."""
    chosen, rejected, *_ = of(LOGPROBS)
    loss, (first, second) = jax.value_and_grad(
        lambda c, r: dpo_loss(c, r, chosen, rejected, 0.1, smoothing).sum(), argnums=(0, 1)
    )(chosen, rejected)
    np.testing.assert_allclose(loss, 3 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(first, -0.1 * (0.5 - smoothing), rtol=1e-6)
    np.testing.assert_allclose(second, 0.1 * (0.5 - smoothing), rtol=1e-6)


def test_smoothed_labels_make_a_finite_gap_best():
    """sigma(delta) = 1 - e at delta = log 9 for e = 0.1; further apart, the gradient turns round."""
    zero = jnp.zeros(1)
    slope = jax.grad(lambda c: dpo_loss(c, zero, zero, zero, 0.1, 0.1).sum())
    np.testing.assert_allclose(slope(jnp.array([10 * np.log(9.0)], jnp.float32)), 0.0, atol=1e-7)
    assert float(slope(jnp.array([30.0]))[0]) > 0 > float(slope(jnp.array([10.0]))[0])


def test_flips_average_out_of_the_robust_loss():
    """Over labels flipped at the rate e it has the mean of DPO on the true ones; with e = 0 it is DPO."""
    pair = of(LOGPROBS)
    turned = [pair[place] for place in (1, 0, 3, 2)]
    plain = dpo_loss(*pair, 0.5)
    mean = 0.7 * robust_dpo_loss(*pair, 0.5, 0.3) + 0.3 * robust_dpo_loss(*turned, 0.5, 0.3)
    np.testing.assert_allclose(mean, plain, rtol=1e-5)
    np.testing.assert_allclose(robust_dpo_loss(*pair, 0.5, 0.0), plain, rtol=1e-6)


@pytest.mark.parametrize("lengths", [None, (jnp.array([2]), jnp.array([4]))])
def test_ipo_rests_at_its_gap(lengths):
    """The gradient is 0 at h = 1 / (2 tau) and turns round there."""
    zero, rest = jnp.zeros(1), 5.0 if lengths is None else 10.0
    slope = jax.grad(lambda c: ipo_loss(c, zero, zero, zero, 0.1, lengths).sum())
    assert float(slope(jnp.array([rest]))[0]) == 0.0
    assert float(slope(jnp.array([rest + 1]))[0]) > 0 > float(slope(jnp.array([rest - 1]))[0])


def test_without_optimism_xpo_is_dpo_and_with_it_the_reference_loses_probability():
    rows = of(LOGPROBS)
    np.testing.assert_array_equal(xpo_loss(*rows, rows[0], 0.3, 0.0), dpo_loss(*rows, 0.3))
    slopes = jax.grad(lambda sample: xpo_loss(*rows, sample, 0.3, 0.05).sum())(rows[1])
    np.testing.assert_allclose(slopes, 0.05)


def test_exchanging_the_sides_turns_the_gap_round():
    pair = of(LOGPROBS)
    turned = [pair[place] for place in (1, 0, 3, 2)]
    np.testing.assert_array_equal(log_ratio_gap(*turned), -log_ratio_gap(*pair))
    np.testing.assert_allclose(dpo_loss(*turned, 0.5) - dpo_loss(*pair, 0.5), 0.5 * GAPS, rtol=1e-5)
    # (-h - c)^2 - (h - c)^2 = 4 c h with c = 1 / (2 beta)
    np.testing.assert_allclose(ipo_loss(*turned, 0.5) - ipo_loss(*pair, 0.5), 4 * GAPS, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_gaps_stay_finite_and_narrow_floats_are_raised(name):
    far = jnp.array([-1e4, 1e4, 0.0])
    value, slope = jax.value_and_grad(lambda c: LOSSES[name](c, -c, far, far).sum())(far)
    assert np.isfinite(value) and np.isfinite(slope).all()
    assert LOSSES[name](*of(LOGPROBS, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss, hinge_loss, robust_dpo_loss, xpo_loss])
def test_a_beta_of_0_is_an_error(loss):
    rest = {robust_dpo_loss: (0.0, 0.1), xpo_loss: (jnp.zeros(3), 0.0, 0.1)}.get(loss, (0.0,))
    with pytest.raises(ValueError, match=r"beta is 0.0; it must be positive"):
        loss(*of(LOGPROBS), *rest)


def test_impossible_options_are_errors():
    rows = of(LOGPROBS)
    with pytest.raises(ValueError, match=r"label_smoothing is 0.5"):
        dpo_loss(*rows, 0.1, 0.5)
    with pytest.raises(ValueError, match=r"flip_rate is 0.5; it must be at least 0 and below 1/2"):
        robust_dpo_loss(*rows, 0.1, 0.5)
    with pytest.raises(ValueError, match=r"alpha is -0.1; it must not be negative"):
        xpo_loss(*rows, rows[0], 0.1, -0.1)
