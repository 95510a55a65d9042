"""Losses of pairs without a reference, on log-probabilities and lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.preference import dpo_loss
from rlhf_jax.losses.reference_free import average_logprob, log_odds, orpo_loss, simpo_loss

# Averages: -1, -2, -0.1 and -2, -0.5, -3.
CHOSEN, REJECTED = np.array([-4.0, -2.0, -0.2]), np.array([-4.0, -2.5, -3.0])
LENGTHS = (jnp.array([4, 1, 2]), jnp.array([2, 5, 1]))


def test_numbers_worked_by_hand():
    """With beta 2 and gamma 1 the gaps of SimPO are 2 (-1 + 2) - 1 = 1, 2 (-2 + 0.5) - 1 = -4 and 2 (2.9) - 1 = 4.8."""
    chosen, rejected = jnp.asarray(CHOSEN, jnp.float32), jnp.asarray(REJECTED, jnp.float32)
    np.testing.assert_allclose(average_logprob(chosen, LENGTHS[0]), [-1.0, -2.0, -0.1])
    expected = np.log1p(np.exp(-np.array([1.0, -4.0, 4.8])))
    np.testing.assert_allclose(simpo_loss(chosen, rejected, *LENGTHS, 2.0, 1.0), expected, rtol=1e-5)
    averages = np.array([[-1.0, -2.0, -0.1], [-2.0, -0.5, -3.0]])
    odds = np.exp(averages) / (1 - np.exp(averages))
    # -log sigma(log(odds_w / odds_l)) = log(1 + odds_l / odds_w)
    np.testing.assert_allclose(orpo_loss(chosen, rejected, *LENGTHS), np.log1p(odds[1] / odds[0]), rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-4), (jnp.float64, 1e-6)])
def test_reference_values(golden_losses, golden_pairs, dtype, tolerance):
    with jax.enable_x64(True):
        chosen, rejected, _, _, *lengths = golden_pairs(dtype)
        simpo = simpo_loss(chosen, rejected, *lengths, 2.0, 1.0)
        np.testing.assert_allclose(simpo.mean(), golden_losses["simpo_b2_g1"], rtol=tolerance)
        odds, expected = orpo_loss(chosen, rejected, *lengths), golden_losses["orpo_.1"]
        np.testing.assert_allclose(odds.mean(), expected["or_term"], rtol=tolerance)
        weights = lengths[0].astype(dtype) / lengths[0].sum().astype(dtype)
        nll = -(weights * average_logprob(chosen, lengths[0])).sum()
        np.testing.assert_allclose(nll, expected["nll_token_mean_chosen"], rtol=tolerance)


def test_gradients_agree_with_finite_differences(assert_gradient):
    with jax.enable_x64(True):
        rows = [jnp.asarray(CHOSEN), jnp.asarray(REJECTED)]
        assert_gradient(lambda *two: simpo_loss(*two, *LENGTHS, 2.0, 1.0).sum(), *rows)
        assert_gradient(lambda *two: orpo_loss(*two, *LENGTHS).sum(), *rows)


def test_dpo_is_simpo_where_lengths_and_reference_are_equal():
    """Over n tokens each, with equal log-probabilities under the reference, DPO(beta) is SimPO(beta n, 0)."""
    chosen, rejected = jnp.asarray(CHOSEN, jnp.float32), jnp.asarray(REJECTED, jnp.float32)
    same, lengths = jnp.array([-5.0, -2.0, -1.0]), jnp.full(3, 7)
    expected = dpo_loss(chosen, rejected, same, same, 0.3)
    np.testing.assert_allclose(simpo_loss(chosen, rejected, lengths, lengths, 0.3 * 7, 0.0), expected, rtol=1e-5)


def test_log_odds_are_stable_on_both_sides():
    """Against float64; at certainty, where they are infinite, they and their gradient are finite."""
    averages = np.array([-1e-5, -0.01, -np.log(2.0), -1.0, -30.0, -200.0])
    found = log_odds(jnp.asarray(averages, jnp.float32))
    np.testing.assert_allclose(found, averages - np.log(-np.expm1(averages)), rtol=1e-6, atol=1e-7)
    for certain in (0.0, -1e-20, -1e4):
        value, slope = jax.value_and_grad(lambda a: log_odds(a).sum())(jnp.array([certain]))
        assert np.isfinite(value) and np.isfinite(slope).all()


def test_empty_rows_stay_finite_and_narrow_floats_are_raised():
    zero, none = jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.int32)
    for loss in (simpo_loss(zero, zero, none, none, 2.0, 1.0), orpo_loss(zero, zero, none, none)):
        assert loss.dtype == jnp.float32 and np.isfinite(loss).all()


@pytest.mark.parametrize(("beta", "gamma", "name"), [(0.0, 1.0, "beta"), (2.0, -1.0, "gamma")])
def test_impossible_options_are_errors(beta, gamma, name):
    with pytest.raises(ValueError, match=f"{name} is .*; it must"):
        simpo_loss(jnp.zeros(3), jnp.zeros(3), *LENGTHS, beta, gamma)
