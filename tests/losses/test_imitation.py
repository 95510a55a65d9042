"""Which samples are imitated and how much: limits, invariants, gradients in exact expectation, and reference values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from rlhf_jax.losses.imitation import (
    effective_samples,
    equal_weights,
    importance_log_ratio,
    top_rows,
    uniform_log_ratio,
    var_weights,
    weighted_likelihood_loss,
)
from rlhf_jax.models.divergence import hidden_forward_kl

REWARDS = jnp.array([0.9, -1.6, 0.3, 2.5, -0.4, 0.0, 1.1, -2.2])
REFERENCE = np.array([0.5, 0.25, 0.125, 0.125])
VALUES = np.array([0.3, -0.7, 1.9, 1.0])
OPTIMUM = REFERENCE * np.exp(VALUES / 0.5) / (REFERENCE * np.exp(VALUES / 0.5)).sum()

rewards_of_groups = st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6)


def example(dtype=jnp.float32):
    """Log-probabilities [8, 3], a mask with an empty row, and weights of two groups of four."""
    generator = np.random.default_rng(0)
    logprob = jnp.asarray(-generator.exponential(size=(8, 3)), dtype)
    mask = jnp.arange(3)[None] < jnp.array([3, 1, 2, 3, 3, 0, 2, 1])[:, None]
    return logprob, mask, var_weights(REWARDS.astype(dtype), 4, 0.5)


# Weights.


def test_weights_worked_by_hand():
    """exp(r / lambda) is 1, 4 and 3 in one group, 1, 1 and 2 in the other."""
    rewards = 0.5 * jnp.log(jnp.array([1.0, 4.0, 3.0, 1.0, 1.0, 2.0]))
    by_group = [1 / 8, 4 / 8, 3 / 8, 1 / 4, 1 / 4, 2 / 4]
    np.testing.assert_allclose(var_weights(rewards, 3, 0.5), by_group, rtol=1e-6)
    by_batch = np.array([1, 4, 3, 1, 1, 2]) / 12 * 2
    np.testing.assert_allclose(var_weights(rewards, 3, 0.5, scope="batch"), by_batch, rtol=1e-6)
    ratio = jnp.log(jnp.array([2.0, 1.0, 1.0, 0.5, 0.5, 0.5]))
    np.testing.assert_allclose(
        var_weights(rewards, 3, 0.5, ratio), [2 / 9, 4 / 9, 3 / 9, 1 / 4, 1 / 4, 2 / 4], rtol=1e-6
    )


@given(rewards_of_groups, st.floats(-3, 3, width=32), st.floats(0.25, 4, width=32))
def test_weights_are_shares_that_a_constant_of_the_prompt_does_not_change(rewards, constant, temperature):
    rewards = jnp.asarray(rewards, jnp.float32)
    weights = var_weights(rewards, 3, temperature)
    assert float(weights.min()) >= 0
    np.testing.assert_allclose(weights.reshape(2, 3).sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(var_weights(rewards, 3, temperature, scope="batch").sum(), 2.0, rtol=1e-5)
    shifted = rewards + jnp.repeat(jnp.array([constant, -constant], jnp.float32), 3)
    np.testing.assert_allclose(var_weights(shifted, 3, temperature), weights, atol=1e-4)
    swapped = var_weights(jnp.roll(rewards, 3), 3, temperature)
    np.testing.assert_array_equal(swapped, jnp.roll(weights, 3))


def test_a_high_temperature_is_supervised_fine_tuning_and_a_low_one_keeps_the_best():
    np.testing.assert_allclose(var_weights(REWARDS, 4, 1e8), equal_weights(REWARDS, 4), rtol=1e-6)
    best = jnp.zeros(8).at[top_rows(REWARDS, 4, 1)].set(1.0)
    np.testing.assert_array_equal(var_weights(REWARDS, 4, 1e-3), best)
    logprob, mask, _ = example()
    plain = weighted_likelihood_loss(logprob, equal_weights(REWARDS, 4), mask, 4)
    np.testing.assert_allclose(
        plain, -jnp.where(mask, logprob, 0.0).sum() / 7, rtol=1e-6
    )  # seven responses are not empty
    kept = top_rows(REWARDS, 4, 1)
    one = weighted_likelihood_loss(logprob[kept], equal_weights(REWARDS[kept], 1), mask[kept], 1)
    np.testing.assert_allclose(one, -jnp.where(mask, logprob, 0.0)[kept].sum() / 2, rtol=1e-6)


def test_log_ratios_sum_what_the_mask_leaves():
    reference = jnp.array([[-1.0, -2.0, jnp.nan], [jnp.nan, jnp.nan, jnp.nan]])
    proposal = jnp.array([[-0.5, -0.25, 7.0], [0.0, 0.0, 0.0]])
    mask = jnp.array([[True, True, False], [False, False, False]])
    assert importance_log_ratio(reference, proposal, mask).tolist() == [-2.25, 0.0]
    assert uniform_log_ratio(reference, mask).tolist() == [-1.5, 0.0]
    assert uniform_log_ratio(reference, mask, 0.5).tolist() == [-6.0, 0.0]


def test_effective_samples_count_what_weighs():
    weights = jnp.array([0.25, 0.25, 0.25, 0.25, 0.0, 1.0, 0.0, 0.0, 0.5, 0.25, 0.25, 0.0])
    np.testing.assert_allclose(effective_samples(weights, 4), [4.0, 1.0, 1 / 0.375], rtol=1e-6)
    tiny = jnp.array([1e-30, 1e-30, 0.0, 0.0])
    np.testing.assert_allclose(effective_samples(tiny, 2), [2.0, 0.0], rtol=1e-6)


# The best rows.


@given(rewards_of_groups, st.integers(1, 3))
def test_exactly_the_highest_of_each_group_are_kept_and_the_first_of_equals(rewards, keep):
    rewards = np.round(np.asarray(rewards, np.float32))  # with ties
    slow = [
        3 * group + place
        for group in range(2)
        for place in sorted(sorted(range(3), key=lambda place, g=group: -rewards[3 * g + place])[:keep])
    ]
    assert top_rows(jnp.asarray(rewards), 3, keep).tolist() == slow
    everywhere = sorted(sorted(range(6), key=lambda place: -rewards[place])[: 2 * keep])
    assert top_rows(jnp.asarray(rewards), 3, keep, scope="batch").tolist() == everywhere


def test_a_reward_that_is_nan_is_never_the_best():
    rewards = jnp.array([jnp.nan, -5.0, 2.0, 1.0, jnp.nan, 3.0])
    assert top_rows(rewards, 3, 1).tolist() == [2, 5] and top_rows(rewards, 3, 1, "batch").tolist() == [2, 5]
    assert top_rows(jnp.array([jnp.nan, jnp.nan]), 2, 1).tolist() == [0]


# The loss.


def test_it_matches_the_reference_value(golden_losses):
    expected, inputs = golden_losses["var_group_lam.5"], golden_losses["inputs"]
    for x64, tolerance in ((True, 1e-6), (False, 1e-4)):
        with jax.enable_x64(x64):
            logprob, mask, rewards = (jnp.asarray(inputs[name], float) for name in ("logp", "mask", "rewards"))
            weights = var_weights(rewards.reshape(-1), 4, 0.5)
            found = weighted_likelihood_loss(logprob, weights, mask, 4)
            assert found.dtype == (jnp.float64 if x64 else jnp.float32)
            np.testing.assert_allclose(found, expected, rtol=tolerance)


@pytest.mark.parametrize("reduction", ["sequence_sum", "sequence_mean"])
def test_gradients_agree_with_finite_differences(reduction):
    with jax.enable_x64(True):
        logprob, mask, weights = example(jnp.float64)
        loss = jax.jit(lambda x: weighted_likelihood_loss(x, weights, mask, 4, reduction))
        check_grads(loss, (logprob,), 1, modes=["rev"])


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_it_keeps_the_invariants_of_every_loss(reduction):
    logprob, mask, weights = example()

    def loss(logprob, weights, mask, whole=None):
        return weighted_likelihood_loss(logprob, weights, mask, 4, reduction, whole)

    value, gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))(logprob, weights, mask)
    plain = loss(logprob, weights, mask)
    np.testing.assert_allclose(plain, value, rtol=1e-6)
    np.testing.assert_array_equal(gradient[1], jnp.zeros(8))  # none flows to the weights
    np.testing.assert_array_equal(jnp.where(mask, 0.0, gradient[0]), jnp.zeros((8, 3)))
    assert float(loss(jnp.where(mask, logprob, jnp.nan), weights, mask)) == float(plain)
    order = jnp.array([5, 4, 7, 6, 2, 3, 0, 1])
    np.testing.assert_allclose(loss(logprob[order], weights[order], mask[order]), value, rtol=1e-6)
    parts = [loss(logprob[p::2], weights[p::2], mask[p::2], mask) for p in (0, 1)]
    np.testing.assert_allclose(sum(parts), value, rtol=1e-6)
    half = logprob.astype(jnp.bfloat16)
    assert loss(half, weights, mask).dtype == jnp.float32
    np.testing.assert_allclose(loss(half, weights, mask), loss(half.astype(jnp.float32), weights, mask))


# Expected gradients, by enumeration: four arms, a response is one of them.


@partial(jax.jit, static_argnums=3)
def descent(logits, arms, weights, samples):
    """The gradient of the loss of these responses with respect to the logits of the policy."""

    def loss(logits):
        logprob = jax.nn.log_softmax(logits)[arms][:, None]
        return weighted_likelihood_loss(logprob, weights, jnp.ones(logprob.shape, bool), samples)

    return jax.grad(loss)(logits)


def test_the_optimum_is_where_the_expected_gradient_vanishes():
    """Samples whose frequencies are exactly those of the proposal; with each proposal the target is the optimum."""
    logits, values = jnp.asarray(np.log(OPTIMUM), jnp.float32), jnp.asarray(VALUES, jnp.float32)
    proposal = np.array([1, 1, 2, 4]) / 8
    reference = jnp.asarray(np.log(REFERENCE), jnp.float32)
    from_reference = jnp.repeat(jnp.arange(4), jnp.array([4, 2, 1, 1]))
    from_proposal = jnp.repeat(jnp.arange(4), jnp.array([1, 1, 2, 4]))
    ratio = importance_log_ratio(
        reference[from_proposal][:, None],
        jnp.asarray(np.log(proposal), jnp.float32)[from_proposal][:, None],
        jnp.ones((8, 1), bool),
    )
    uniform = uniform_log_ratio(reference[:, None], jnp.ones((4, 1), bool), 1.0)
    for arms, log_ratio in ((from_reference, None), (from_proposal, ratio), (jnp.arange(4), uniform)):
        weights = var_weights(values[arms], len(arms), 0.5, log_ratio)
        np.testing.assert_allclose(descent(logits, arms, weights, len(arms)), np.zeros(4), atol=1e-6)
        assert float(jnp.abs(descent(reference, arms, weights, len(arms))).max()) > 0.1


def test_counting_the_reference_twice_has_another_target():
    arms = jnp.repeat(jnp.arange(4), jnp.array([4, 2, 1, 1]))
    twice = jnp.asarray(np.log(REFERENCE), jnp.float32)[arms]
    weights = var_weights(jnp.asarray(VALUES, jnp.float32)[arms], 8, 0.5, twice)
    target = REFERENCE * OPTIMUM / (REFERENCE * OPTIMUM).sum()
    found = jax.ops.segment_sum(weights, arms, 4)
    np.testing.assert_allclose(found, target, rtol=1e-5)
    assert np.abs(target - OPTIMUM).sum() > 0.1


def test_imitating_ones_own_samples_changes_nothing_in_expectation():
    """n = 1 and no prior: every arm as often as the policy draws it."""
    logits = jnp.array([0.3, -1.2, 0.8, 0.0])
    expected = sum(
        p * descent(logits, jnp.array([arm]), jnp.ones(1), 1) for arm, p in enumerate(jax.nn.softmax(logits))
    )
    np.testing.assert_allclose(expected, np.zeros(4), atol=1e-7)


@pytest.mark.parametrize("beta", [0.25, 100.0])
def test_a_prior_stops_imitation_at_a_mixture_and_freezes_the_policy_as_it_grows(beta):
    """SuperHF's expected gradient vanishes at (target + beta prior) / (1 + beta)."""
    target = np.array([0.0, 0.1, 0.7, 0.2])
    mixture = (target + beta * REFERENCE) / (1 + beta)
    prior, identity = jnp.asarray(np.log(REFERENCE), jnp.float32)[None, None], jnp.eye(4)

    def loss(logits):
        logprob = jax.nn.log_softmax(logits)[:, None]
        likelihood = weighted_likelihood_loss(
            logprob, jnp.asarray(target, jnp.float32), jnp.ones((4, 1), bool), 4, "sequence_mean"
        )
        return likelihood + beta * hidden_forward_kl(logits[None, None], identity, prior, identity)[0, 0]

    gradient = jax.grad(loss)(jnp.asarray(np.log(mixture), jnp.float32))
    np.testing.assert_allclose(gradient / (1 + beta), np.zeros(4), atol=1e-6)
    assert 0.5 * np.abs(mixture - REFERENCE).sum() <= 1 / (1 + beta)


# Bad input.


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: var_weights(REWARDS, 4, 0.0), "must be positive"),
        (lambda: var_weights(REWARDS, 4, -1), "must be positive"),
        (lambda: var_weights(REWARDS, 3, 1.0), "8 responses are no groups of 3"),
        (lambda: equal_weights(REWARDS, 0), "at least 1"),
        (lambda: top_rows(REWARDS, 4, 5), "5 of 4 responses cannot be kept"),
        (lambda: top_rows(REWARDS, 4, 0), "keep at least 1"),
        (lambda: uniform_log_ratio(jnp.zeros((1, 1)), jnp.ones((1, 1), bool), 0.0), "must be positive"),
    ],
)
def test_bad_input_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize(
    "call", [lambda s: var_weights(REWARDS, 4, 1.0, scope=s), lambda s: top_rows(REWARDS, 4, 1, s)]
)
def test_an_unknown_scope_is_refused(call):
    with pytest.raises(Exception, match="prompts"):  # by the type checks of the tests, or by the function
        call("prompts")
