"""Token rewards, generalised advantage estimation, whitening, advantages within groups; golden ones: test_golden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.advantages import gae, group_advantages, grouped, token_rewards, whiten


def random_batch(rows=6, steps=5, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, steps + 1, rows)
    lengths[:2] = steps, 0
    mask = np.arange(steps)[None] < lengths[:, None]
    rewards, values = generator.normal(size=(2, rows, steps)).astype(np.float32)
    return rewards, values, mask


def gae_loop(rewards, values, mask, discount, lam):
    """The estimate as a loop over the unmasked steps of each row, last to first."""
    advantages = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        next_value = next_advantage = 0.0
        for t in reversed(np.flatnonzero(mask[row])):
            delta = rewards[row, t] + discount * next_value - values[row, t]
            next_advantage = delta + discount * lam * next_advantage
            next_value = values[row, t]
            advantages[row, t] = next_advantage
    return advantages


def test_score_and_penalty_worked_by_hand():
    mask = jnp.array([[True, True, True], [True, False, False], [False, False, False]])
    kl = jnp.array([[0.1, -0.2, 0.4], [1.0, jnp.nan, 9.0], [9.0, 9.0, 9.0]])
    got = token_rewards(jnp.array([1.5, -2.5, 7.0]), kl, mask, 0.5)
    np.testing.assert_allclose(got, [[-0.05, 0.1, 1.3], [-3.0, 0.0, 0.0], [0.0, 0.0, 0.0]], atol=1e-7)


def test_rewards_per_token_are_taken_as_they_stand():
    mask = jnp.array([[1.0, 1.0, 0.0]])
    got = token_rewards(jnp.array([[0.5, 0.25, 8.0]]), jnp.array([[0.1, 0.2, 0.3]]), mask, jnp.float32(1.0))
    np.testing.assert_allclose(got, [[0.4, 0.05, 0.0]], atol=1e-7)


def test_score_stands_on_the_last_unmasked_token_of_a_mask_with_holes():
    mask = jnp.array([[True, False, True, False]])
    assert token_rewards(jnp.array([0.5]), jnp.zeros((1, 4)), mask, 1).tolist() == [[0.0, 0.0, 0.5, 0.0]]


def test_the_score_is_conserved():
    _, kl, mask = random_batch()
    scores = jnp.asarray(np.random.default_rng(3).normal(size=len(kl)).astype(np.float32))
    got = np.asarray(token_rewards(scores, jnp.asarray(kl), jnp.asarray(mask), 0.3)).sum(1)
    expected = np.where(mask.any(1), np.asarray(scores), 0.0) - 0.3 * np.where(mask, kl, 0.0).sum(1)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_advantages_worked_by_hand():
    rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.5, 0.5, 0.5]])
    advantages, returns = gae(rewards, values, jnp.ones((1, 3), bool), 1.0, 0.5)
    assert advantages.tolist() == [[0.125, 0.25, 0.5]]
    assert returns.tolist() == [[0.625, 0.75, 1.0]]


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.7, 0.0), (1, 1)])
def test_advantages_equal_a_loop(discount, lam):
    rewards, values, mask = random_batch()
    mask[3] = [True, False, True, False, True]
    expected = gae_loop(rewards, values, mask, discount, lam)
    arguments = (jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(mask))
    advantages, returns = gae(*arguments, discount, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0.0), atol=1e-5)
    for got, jitted in zip((advantages, returns), jax.jit(gae)(*arguments, float(discount), float(lam)), strict=True):
        np.testing.assert_allclose(jitted, got, atol=1e-6)


def test_without_values_and_discount_advantages_are_rewards_to_go():
    rewards, _, mask = random_batch()
    advantages, returns = gae(jnp.asarray(rewards), jnp.zeros(rewards.shape), jnp.asarray(mask), 1.0, 1.0)
    kept = np.where(mask, rewards, 0.0)
    to_go = np.where(mask, np.cumsum(kept[:, ::-1], axis=1)[:, ::-1], 0.0)
    np.testing.assert_allclose(advantages, to_go, atol=1e-5)
    np.testing.assert_array_equal(advantages, returns)


def test_perfect_values_leave_no_advantage_and_returns_do_not_depend_on_values_at_lambda_one():
    rewards, values, mask = random_batch()
    arguments = (jnp.asarray(rewards), jnp.asarray(mask), 0.9)
    _, to_go = gae(arguments[0], jnp.zeros(rewards.shape), *arguments[1:], 1.0)
    advantages, _ = gae(arguments[0], to_go, *arguments[1:], 0.3)
    np.testing.assert_allclose(advantages, 0.0, atol=1e-5)
    _, returns = gae(arguments[0], jnp.asarray(values), *arguments[1:], 1.0)
    np.testing.assert_allclose(returns, to_go, atol=1e-5)


@pytest.mark.parametrize("junk", [3.0, np.nan, np.inf])
def test_masked_positions_do_not_matter(junk):
    rewards, values, mask = random_batch()

    def chain(rewards, values):
        rewards, values = jnp.asarray(rewards), jnp.asarray(values)
        kl_rewards = token_rewards(rewards, values, jnp.asarray(mask), 0.1)
        advantages, returns = gae(rewards, values, jnp.asarray(mask), 1.0, 0.95)
        return kl_rewards, advantages, returns, whiten(values, jnp.asarray(mask))

    spoilt = chain(*(np.where(mask, x, junk).astype(np.float32) for x in (rewards, values)))
    for expected, got in zip(chain(rewards, values), spoilt, strict=True):
        np.testing.assert_array_equal(got, expected)
        assert not np.asarray(got)[~mask].any()


def test_right_padding_more_changes_nothing_and_rows_may_be_permuted():
    rewards, values, mask = random_batch()
    wide = [jnp.asarray(np.pad(x, ((0, 0), (0, 3)))) for x in (rewards, values, mask)]
    order = np.array([3, 1, 0, 5, 4, 2])
    for expected, padded, permuted in zip(
        gae(jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(mask), 0.9, 0.8),
        gae(*wide, 0.9, 0.8),
        gae(jnp.asarray(rewards[order]), jnp.asarray(values[order]), jnp.asarray(mask[order]), 0.9, 0.8),
        strict=True,
    ):
        np.testing.assert_allclose(padded[:, :5], expected, atol=1e-6)
        np.testing.assert_allclose(permuted, expected[order], atol=1e-6)


def test_whitened_values_have_mean_zero_and_variance_one():
    _, values, mask = random_batch()
    values = 3.0 * values + 5.0
    whitened = np.asarray(whiten(jnp.asarray(values), jnp.asarray(mask)))[mask]
    np.testing.assert_allclose([whitened.mean(), whitened.std()], [0.0, 1.0], atol=1e-5)
    kept = np.asarray(whiten(jnp.asarray(values), jnp.asarray(mask), shift_mean=False))
    np.testing.assert_allclose([kept[mask].mean(), kept[mask].std()], [values[mask].mean(), 1.0], rtol=1e-5)
    assert not kept[~mask].any()


def test_whitening_constants_and_nothing_gives_zeros():
    ones = jnp.ones((2, 3))
    assert not np.asarray(whiten(ones, jnp.ones((2, 3), bool))).any()
    assert not np.asarray(whiten(ones, jnp.zeros((2, 3), bool))).any()


def test_bfloat16_is_raised_to_float32():
    half = jnp.ones((1, 2), jnp.bfloat16)
    mask = jnp.ones((1, 2), bool)
    assert token_rewards(jnp.ones(1, jnp.bfloat16), half, mask, 0.1).dtype == jnp.float32
    assert gae(half, half, mask, 1.0, 0.95)[0].dtype == whiten(half, mask).dtype == jnp.float32


# Advantages within groups.


def test_group_advantages_do_not_depend_on_a_constant_or_on_the_unit_of_rewards():
    rewards = jnp.array([0.3, -1.2, 0.9, 2.0, 5.0, 3.0, 4.0, 4.5])
    expected = group_advantages(rewards, 4)
    np.testing.assert_allclose(
        group_advantages(rewards + jnp.repeat(jnp.array([7.0, -3.0]), 4), 4), expected, atol=1e-4
    )
    np.testing.assert_allclose(group_advantages(100.0 * rewards, 4), expected, rtol=1e-3)
    np.testing.assert_allclose(np.asarray(expected).reshape(2, 4).sum(axis=1), 0.0, atol=1e-5)
    assert group_advantages(jnp.full(6, 0.1), 3).tolist() == [0.0] * 6
    assert group_advantages(rewards.astype(jnp.bfloat16), 4).dtype == jnp.float32


@pytest.mark.parametrize(("samples", "sentence"), [(1, "a group of 1 has nothing to compare"), (3, "no groups of 3")])
def test_groups_that_cannot_be_are_refused(samples, sentence):
    for function in (group_advantages, grouped):
        with pytest.raises(ValueError, match=sentence):
            function(jnp.zeros(4), samples)
