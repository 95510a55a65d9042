"""The clipped surrogate: hand-worked numbers, golden values, gradient identities, the shared invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.advantages import whiten
from rlhf_jax.losses.policy import clipped_surrogate, ratio_metrics
from rlhf_jax.losses.reduce import mean, reduce

ARGUMENTS = [("token_mean", None), ("sequence_mean", None), ("sequence_sum", None), ("constant", 5)]


def random_batch(rows=8, steps=5, seed=0):
    generator = np.random.default_rng(seed)
    logprob = -np.abs(generator.normal(1.0, 0.5, (rows, steps)))
    old_logprob = logprob + 0.3 * generator.normal(size=(rows, steps))
    advantages = generator.normal(size=(rows, steps))
    mask = np.arange(steps)[None] < generator.integers(1, steps + 1, rows)[:, None]
    return (*(jnp.asarray(x.astype(np.float32)) for x in (logprob, old_logprob, advantages)), jnp.asarray(mask))


def loss(logprob, old_logprob, advantages, mask, rule="token_mean", constant=None):
    return mean(clipped_surrogate(logprob, old_logprob, advantages, 0.2, 0.28), mask, rule, constant)


def test_the_four_corners_worked_by_hand():
    logprob = jnp.log(jnp.array([[1.5, 1.5, 0.5, 0.5, 1.1]]))
    advantages = jnp.array([[2.0, -2.0, 2.0, -2.0, 1.0]])
    got = clipped_surrogate(logprob, jnp.zeros((1, 5)), advantages, 0.2, 0.28)
    np.testing.assert_allclose(got, [[-2.56, 3.0, -1.0, 1.6, -1.1]], rtol=1e-6)


def test_gradient_flows_unless_clipping_takes_the_gain_away():
    logprob = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5]))
    gradient = jax.grad(
        lambda x: jnp.sum(clipped_surrogate(x, jnp.zeros(4), jnp.array([1.0, -1.0, 1.0, -1.0]), 0.2, 0.2))
    )
    np.testing.assert_allclose(gradient(logprob), [0.0, 1.5, -0.5, 0.0], rtol=1e-6)


def test_loss_matches_the_golden_value(golden_losses):
    inputs, expected = golden_losses["inputs"], golden_losses["ppo"]
    for enable, dtype, tolerance in ((True, jnp.float64, 1e-6), (False, jnp.float32, 1e-4)):
        with jax.enable_x64(enable):
            logprob, old_logprob, mask = (jnp.asarray(inputs[name], dtype) for name in ("logp", "old", "mask"))
            advantages = whiten(jnp.asarray(expected["adv"], dtype), mask)
            got = mean(clipped_surrogate(logprob, old_logprob, advantages, 0.2, 0.2), mask)
            assert got.dtype == dtype
            np.testing.assert_allclose(got, expected["policy_token_mean"], rtol=tolerance)


@pytest.mark.parametrize(("rule", "constant"), ARGUMENTS)
def test_on_policy_gradient_is_minus_the_advantage_under_the_reduction(rule, constant):
    logprob, _, advantages, mask = random_batch()
    gradient = jax.grad(loss)(logprob, logprob, advantages, mask, rule, constant)
    policy_gradient = jax.grad(lambda x: mean(-advantages * x, mask, rule, constant))(logprob)
    np.testing.assert_allclose(gradient, policy_gradient, rtol=1e-6)


def test_without_advantage_there_is_no_loss_and_no_gradient():
    logprob, old_logprob, advantages, mask = random_batch()
    value, gradient = jax.value_and_grad(loss)(logprob, old_logprob, jnp.zeros_like(advantages), mask)
    assert float(value) == 0.0 and not np.asarray(gradient).any()


def test_gradient_equals_finite_differences():
    with jax.enable_x64(True):
        logprob, old_logprob, advantages, mask = random_batch()
        logprob, old_logprob, advantages = (x.astype(jnp.float64) for x in (logprob, old_logprob, advantages))
        direction = jnp.asarray(np.random.default_rng(7).normal(size=logprob.shape))
        gradient = jax.grad(loss)(logprob, old_logprob, advantages, mask)
        step = 1e-6
        above, below = (loss(logprob + s * direction, old_logprob, advantages, mask) for s in (step, -step))
        np.testing.assert_allclose(jnp.sum(gradient * direction), (above - below) / (2 * step), rtol=1e-6)


def test_old_logprob_and_advantages_get_no_gradient():
    logprob, old_logprob, advantages, mask = random_batch()
    for gradient in jax.grad(loss, argnums=(1, 2))(logprob, old_logprob, advantages, mask):
        assert not np.asarray(gradient).any()


@pytest.mark.parametrize(("rule", "constant"), ARGUMENTS)
def test_masked_positions_change_neither_value_nor_gradient(rule, constant):
    logprob, old_logprob, advantages, mask = random_batch()
    function = jax.value_and_grad(lambda x, old, a: loss(x, old, a, mask, rule, constant))
    value, gradient = function(logprob, old_logprob, advantages)
    spoilt = (jnp.where(mask, x, junk) for x, junk in ((logprob, -9.0), (old_logprob, -0.1), (advantages, jnp.nan)))
    spoilt_value, spoilt_gradient = function(*spoilt)
    assert float(value) == float(spoilt_value)
    np.testing.assert_array_equal(jnp.where(mask, spoilt_gradient, 0.0), gradient)


@pytest.mark.parametrize(("rule", "constant"), ARGUMENTS)
def test_rows_may_be_permuted_and_jit_changes_nothing(rule, constant):
    batch = random_batch()
    order = np.random.default_rng(1).permutation(len(batch[0]))
    value, gradient = jax.value_and_grad(loss)(*batch, rule, constant)
    permuted_value, permuted_gradient = jax.value_and_grad(loss)(*(x[order] for x in batch), rule, constant)
    np.testing.assert_allclose(permuted_value, value, rtol=1e-5)
    np.testing.assert_allclose(permuted_gradient, gradient[order], rtol=1e-5)
    jitted_value, jitted_gradient = jax.jit(jax.value_and_grad(loss), static_argnums=(4, 5))(*batch, rule, constant)
    np.testing.assert_allclose(jitted_value, value, rtol=1e-5)
    np.testing.assert_allclose(jitted_gradient, gradient, rtol=1e-5)


def test_bfloat16_is_raised_to_float32():
    logprob, old_logprob, advantages, _ = (x.astype(jnp.bfloat16) for x in random_batch())
    got = clipped_surrogate(logprob, old_logprob, advantages, 0.2, 0.2)
    raised = clipped_surrogate(*(x.astype(jnp.float32) for x in (logprob, old_logprob, advantages)), 0.2, 0.2)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, raised)


def test_huge_log_ratios_stay_finite():
    for log_ratio in (1e4, -1e4, -np.inf):
        value, gradient = jax.value_and_grad(
            lambda x: clipped_surrogate(x, jnp.float32(0.0), jnp.float32(-1.0), 0.2, 0.2)
        )(jnp.float32(log_ratio))
        assert np.isfinite(value) and float(gradient) == 0.0


def test_sequences_of_any_shape_and_traced_clips():
    logprob, old_logprob, advantages, _ = random_batch()
    whole = clipped_surrogate(logprob, old_logprob, advantages, 0.2, 0.3)
    column = clipped_surrogate(logprob[:, 0], old_logprob[:, 0], advantages[:, 0], 0.2, 0.3)
    np.testing.assert_array_equal(column, whole[:, 0])
    traced = jax.jit(clipped_surrogate)(logprob, old_logprob, advantages, jnp.float32(0.2), jnp.float32(0.3))
    np.testing.assert_allclose(traced, whole, rtol=1e-5)


def test_metrics_worked_by_hand():
    logprob = jnp.log(jnp.array([[2.0, 1.0, 9.0], [0.5, 1.5, 9.0]]))
    mask = jnp.array([[True, True, False], [True, True, False]])
    metrics = ratio_metrics(logprob, jnp.zeros((2, 3)), mask, 0.2, 0.6)
    ratios = np.array([2.0, 1.0, 0.5, 1.5])
    assert set(metrics) == {"policy/approxkl", "policy/clipfrac", "val/ratio", "val/ratio_var"}
    np.testing.assert_allclose(metrics["policy/approxkl"], (ratios - 1 - np.log(ratios)).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["policy/clipfrac"], 0.5)
    np.testing.assert_allclose(metrics["val/ratio"], 1.25, rtol=1e-6)
    np.testing.assert_allclose(metrics["val/ratio_var"], ratios.var(), rtol=1e-6)


def test_metrics_of_an_unchanged_policy_and_of_nothing():
    logprob, _, _, mask = random_batch()
    metrics = ratio_metrics(logprob, logprob, mask, 0.2, 0.2)
    assert {name: float(value) for name, value in metrics.items()} == {
        "policy/approxkl": 0.0,
        "policy/clipfrac": 0.0,
        "val/ratio": 1.0,
        "val/ratio_var": 0.0,
    }
    assert not any(float(x) for x in ratio_metrics(logprob, logprob, jnp.zeros_like(mask), 0.2, 0.2).values())


def test_totals_of_the_loss_add_over_microbatches():
    batch = random_batch()
    whole = reduce(clipped_surrogate(*batch[:3], 0.2, 0.2), batch[3], "token_mean")
    parts = [
        reduce(clipped_surrogate(*(x[rows] for x in batch[:3]), 0.2, 0.2), batch[3][rows], "token_mean")
        for rows in (slice(0, 2), slice(2, 8))
    ]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-5)
