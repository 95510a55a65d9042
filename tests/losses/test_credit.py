"""Advantages without a value function: hand-worked numbers, loops, identities, the shared invariants, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.credit import (
    greedy_difference,
    group_centred,
    group_standardised,
    leave_one_out,
    overlong_penalty,
    response_rewards,
    reward_to_go,
    spread_groups,
    whitened_return,
)

OF_A_GROUP = [group_standardised, group_centred, leave_one_out, greedy_difference]
METHODS = [*OF_A_GROUP, whitened_return]
SAMPLES = 3


def named(function):
    return function.__name__


def random_batch(seed=0):
    """Two groups of three responses of 1 to 4 tokens, with a reward on every token."""
    generator = np.random.default_rng(seed)
    mask = np.arange(4)[None] < generator.integers(1, 5, 6)[:, None]
    rewards = np.where(mask, generator.normal(size=(6, 4)), 0.0).astype(np.float32)
    return jnp.asarray(rewards), jnp.asarray(mask)


def loop(method, rewards, mask):
    """The advantages as loops over groups, responses and tokens, in float64."""
    rewards, mask = np.asarray(rewards, np.float64), np.asarray(mask)
    totals = np.array([sum(r[m]) for r, m in zip(rewards, mask, strict=True)])
    advantages = np.zeros(rewards.shape)
    for row, total in enumerate(totals):
        first = row - row % SAMPLES
        group = totals[first : first + SAMPLES]
        others = np.delete(group, row - first)
        to_go = [sum(rewards[row, t:][mask[row, t:]]) for t in range(mask.shape[1])]
        advantages[row] = {
            group_standardised: (total - group.mean()) / (group.std(ddof=1) + 1e-4),
            group_centred: total - group.mean(),
            leave_one_out: total - others.mean(),
            greedy_difference: total - group[-1],
            whitened_return: np.array(to_go),
        }[method]
    if method is whitened_return:
        advantages = (advantages - advantages[mask].mean()) / np.sqrt(advantages[mask].var() + 1e-8)
    return np.where(mask, advantages, 0.0)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_advantages_equal_a_loop(method):
    rewards, mask = random_batch()
    np.testing.assert_allclose(method(rewards, mask, SAMPLES), loop(method, rewards, mask), atol=1e-5)


def test_advantages_of_groups_worked_by_hand():
    rewards = jnp.array([[-0.25, 1.25], [4.0, 0.0], [0.5, 3.5]])  # a response: 1, 4, 4
    mask = jnp.array([[True, True], [True, False], [True, True]])
    assert group_centred(rewards, mask, 3).tolist() == [[-2.0, -2.0], [1.0, 0.0], [1.0, 1.0]]
    assert leave_one_out(rewards, mask, 3).tolist() == [[-3.0, -3.0], [1.5, 0.0], [1.5, 1.5]]
    assert greedy_difference(rewards, mask, 3).tolist() == [[-3.0, -3.0], [0.0, 0.0], [0.0, 0.0]]
    expected = np.array([[-2.0, -2.0], [1.0, 0.0], [1.0, 1.0]]) / (np.sqrt(3.0) + 1e-4)
    np.testing.assert_allclose(group_standardised(rewards, mask, 3), expected, rtol=1e-6)


def test_whitened_advantages_worked_by_hand():
    rewards = jnp.array([[-1.0, 3.0], [6.0, 0.0]])
    mask = jnp.array([[True, True], [True, False]])
    # To go: 2, 3 and 6. Their mean is 11/3, their variance 26/9.
    expected = np.array([[-5.0, -2.0], [7.0, 0.0]]) / np.sqrt(26.0)
    np.testing.assert_allclose(whitened_return(rewards, mask, 1), expected, rtol=1e-5)


def test_leaving_one_out_stretches_the_centred_rewards():
    rewards, mask = random_batch()
    expected = SAMPLES / (SAMPLES - 1) * np.asarray(group_centred(rewards, mask, SAMPLES))
    np.testing.assert_allclose(leave_one_out(rewards, mask, SAMPLES), expected, rtol=1e-6)


@pytest.mark.parametrize("method", OF_A_GROUP, ids=named)
def test_a_constant_added_to_a_group_changes_nothing(method):
    rewards, mask = random_batch()
    shifts = jnp.repeat(jnp.array([5.0, -2.0]), SAMPLES)
    shifted = rewards.at[jnp.arange(6), mask.sum(axis=1) - 1].add(shifts)
    expected = method(rewards, mask, SAMPLES)
    np.testing.assert_allclose(method(shifted, mask, SAMPLES), expected, atol=1e-5)


@pytest.mark.parametrize("method", [group_standardised, whitened_return], ids=named)
def test_the_unit_of_rewards_does_not_matter(method):
    rewards, mask = random_batch()
    np.testing.assert_allclose(method(100.0 * rewards, mask, SAMPLES), method(rewards, mask, SAMPLES), atol=1e-3)


@pytest.mark.parametrize("method", OF_A_GROUP, ids=named)
def test_groups_of_equal_scores_have_exactly_no_advantage(method):
    _, mask = random_batch()
    last = mask.sum(axis=1) - 1
    rewards = jnp.zeros(mask.shape).at[jnp.arange(6), last].set(jnp.repeat(jnp.array([0.1, -0.7]), SAMPLES))
    assert not np.asarray(method(rewards, mask, SAMPLES)).any()


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_masked_positions_order_of_groups_jit_and_bfloat16_do_not_matter(method):
    rewards, mask = random_batch()
    expected = np.asarray(method(rewards, mask, SAMPLES))
    assert not expected[~np.asarray(mask)].any()
    for junk in (3.0, jnp.nan, -jnp.inf):
        np.testing.assert_array_equal(method(jnp.where(mask, rewards, junk), mask, SAMPLES), expected)
    np.testing.assert_array_equal(method(rewards, mask.astype(jnp.float32), SAMPLES), expected)
    order = np.array([3, 4, 5, 0, 1, 2])
    np.testing.assert_allclose(method(rewards[order], mask[order], SAMPLES), expected[order], atol=1e-6)
    jitted = jax.jit(method, static_argnums=2)(rewards, mask, SAMPLES)
    np.testing.assert_allclose(jitted, expected, atol=1e-6)
    half = rewards.astype(jnp.bfloat16)
    got = method(half, mask, SAMPLES)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, method(half.astype(jnp.float32), mask, SAMPLES))


@pytest.mark.parametrize("method", OF_A_GROUP, ids=named)
def test_groups_that_cannot_be_are_refused(method):
    rewards, mask = random_batch()
    with pytest.raises(ValueError, match="a group of 1 has nothing to compare"):
        method(rewards, mask, 1)
    with pytest.raises(ValueError, match="6 responses are no groups of 4"):
        method(rewards, mask, 4)


def test_an_empty_response_counts_in_its_group_with_zero():
    rewards, mask = jnp.array([[2.0, 4.0], [9.0, 9.0]]), jnp.array([[True, True], [False, False]])
    assert response_rewards(rewards, mask).tolist() == [6.0, 0.0]
    assert group_centred(rewards, mask, 2).tolist() == [[3.0, 3.0], [0.0, 0.0]]


def test_rewards_to_go_worked_by_hand():
    rewards = jnp.array([[1.0, 2.0, 4.0, 8.0], [1.0, 7.0, 4.0, 7.0]])
    mask = jnp.array([[True, True, True, True], [True, False, True, False]])
    assert reward_to_go(rewards, mask, 1).tolist() == [[15.0, 14.0, 12.0, 8.0], [5.0, 0.0, 4.0, 0.0]]
    assert reward_to_go(rewards, mask, jnp.float32(0.5)).tolist() == [[4.0, 6.0, 8.0, 8.0], [3.0, 0.0, 4.0, 0.0]]


# What dynamic sampling and overlong shaping need.


def test_penalty_of_long_responses_worked_by_hand():
    lengths = jnp.array([0, 6, 7, 8, 9, 10, 11, 99])
    expected = [0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0, -1.0]
    for given in (lengths, lengths.astype(jnp.float32)):
        got = overlong_penalty(given, longest=10, buffer=4)
        assert got.dtype == jnp.float32 and got.tolist() == expected


@pytest.mark.parametrize("buffer", [0, -1, 11])
def test_a_buffer_that_is_nothing_or_more_than_the_longest_length_is_refused(buffer):
    with pytest.raises(ValueError, match=f"buffer of the overlong penalty is {buffer}; choose 1 to 10"):
        overlong_penalty(jnp.array([3]), longest=10, buffer=buffer)


def test_exactly_the_groups_without_spread_are_left_out():
    alike, nearly = [0.1, 0.1, 0.1], [0.1, 0.1, np.nextafter(np.float32(0.1), 1, dtype=np.float32)]
    rewards = jnp.array([*alike, *nearly, 0.0, 1.0, 0.0, 2.0, 2.0, 2.0], jnp.float32)
    kept = spread_groups(rewards, 3)
    assert kept.tolist() == [False] * 3 + [True] * 6 + [False] * 3
    with pytest.raises(ValueError, match="a group of 1 has nothing to compare"):
        spread_groups(rewards, 1)


def test_groups_are_kept_where_their_standard_deviation_is_not_zero():
    rewards = np.random.default_rng(0).integers(0, 2, (40, 3)).astype(np.float32)
    kept = np.asarray(spread_groups(jnp.asarray(rewards.reshape(-1)), 3)).reshape(40, 3)
    np.testing.assert_array_equal(kept, np.repeat(rewards.std(axis=1, keepdims=True) > 0, 3, axis=1))
    assert kept.any() and not kept.all()
