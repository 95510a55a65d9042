"""Rewards and lengths: transforms around others, a reward of length alone, and updates without unfinished responses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.compose import ComposedState, compose
from rlhf_jax.losses.reduce import mean
from rlhf_jax.rewards.ensemble import single, uncertainty_weighted
from rlhf_jax.rewards.length import (
    MeasuredScore,
    length_only,
    length_penalty,
    length_reward,
    length_reward_function,
    omit_unfinished,
    reward_scale,
    with_lengths,
)
from rlhf_jax.rewards.python_reward import call_reward_function
from rlhf_jax.rewards.transforms import select
from rlhf_jax.types import Algorithm, Prompts, Rollout, Score

TARGET = 20


def measured(seed: int, rows: int = 6, **fields) -> MeasuredScore:
    generator = np.random.default_rng(seed)
    mean = jnp.asarray(generator.normal(seed, 1 + seed, rows), jnp.float32)
    return MeasuredScore(mean=mean, lengths=jnp.asarray(generator.integers(0, 60, rows), jnp.float32), **fields)


def run(transform, scores, state=None):
    """Rewards and metrics of batches in turn, in one scan."""
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scores)

    def step(state, score):
        rewards, state, metrics = transform.apply(score, None, state)
        return state, (rewards, metrics)

    return jax.lax.scan(step, transform.init() if state is None else state, batches)[1]


# The penalty.


@pytest.mark.parametrize(("weight", "window"), [(1.0, 10), (2.0, 3), (1, 1)])
def test_the_penalty_equals_a_loop_over_batches(weight, window):
    scores = [measured(seed) for seed in range(12)]
    rewards, metrics = run(length_penalty(single(), TARGET, weight, window), scores)
    deviations = []
    for place, score in enumerate(scores):
        mean, lengths = np.asarray(score.mean, np.float64), np.asarray(score.lengths, np.float64)
        deviations = [*deviations, mean.std()][-window:]
        penalty = weight * (1 - lengths / TARGET) * np.mean(deviations)
        np.testing.assert_allclose(rewards[place], mean + penalty, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(metrics["rewards/length_penalty"][place], penalty.mean(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(metrics["rewards/deviation"][place], np.mean(deviations), rtol=1e-5)
        np.testing.assert_allclose(metrics["rewards/proxy"][place], mean.mean(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(metrics["rewards/transformed"][place], (mean + penalty).mean(), rtol=1e-4, atol=1e-5)


def test_there_is_no_penalty_at_the_target_and_sigma_at_length_0():
    score = measured(1).replace(lengths=jnp.full(6, float(TARGET)))
    transform = length_penalty(single(), TARGET)
    rewards, _, metrics = transform.apply(score, None, transform.init())
    np.testing.assert_array_equal(rewards, score.mean)
    assert float(metrics["rewards/length_penalty"]) == 0.0
    rewards, _, metrics = transform.apply(score.replace(lengths=jnp.zeros(6)), None, transform.init())
    np.testing.assert_allclose(rewards - score.mean, np.asarray(score.mean).std(), rtol=1e-5)


def test_the_transform_within_keeps_its_state_and_its_metrics():
    inner = uncertainty_weighted()
    members = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
    score = measured(2, members=members)
    transform = length_penalty(inner, TARGET)
    rewards, state, metrics = transform.apply(score, None, transform.init(inner.init(0.7)))
    within, _, own = inner.apply(score, None, inner.init(0.7))
    penalty = (1 - np.asarray(score.lengths) / TARGET) * np.asarray(within).std()
    np.testing.assert_allclose(rewards, within + penalty, rtol=1e-5)
    assert float(state.inner) == np.float32(0.7) and metrics["uncertainty/mean"] == own["uncertainty/mean"]


def test_only_the_policys_own_rows_are_measured():
    own = jnp.array([True, True, True, False, False, True])
    score, far = measured(3, own=own), jnp.where(own, 0.0, 100.0)
    for transform in (length_penalty(single(), TARGET), reward_scale(single(), limit=50.0)):
        first = transform.apply(score, None, transform.init())
        second = transform.apply(score.replace(mean=score.mean + far), None, transform.init())
        jax.tree.map(np.testing.assert_array_equal, second[1:], first[1:])
        np.testing.assert_array_equal(second[0][own], first[0][own])


# Scale.


def test_scaled_rewards_equal_a_loop_and_stay_within_the_limit():
    scores = [measured(seed) for seed in range(12)]
    rewards, metrics = run(reward_scale(single()), scores)
    means, deviations, clipped = [], [], []
    for place, score in enumerate(scores):
        mean = np.asarray(score.mean, np.float64)
        means, deviations = [*means, mean.mean()][-10:], [*deviations, mean.std()][-10:]
        scaled = (mean - np.mean(means)) / np.mean(deviations)
        np.testing.assert_allclose(rewards[place], np.clip(scaled, -0.3, 0.3), rtol=1e-4, atol=1e-5)
        clipped.append((np.abs(scaled) > 0.3).mean())
    np.testing.assert_allclose(metrics["rewards/clipped"], clipped, rtol=1e-6)
    assert float(jnp.abs(rewards).max()) <= np.float32(0.3) and 0 < np.mean(clipped) < 1


def test_equal_rewards_are_scaled_to_0():
    transform = reward_scale(single())
    score = Score(mean=jnp.full(4, 3.0))  # lengths are not needed
    np.testing.assert_array_equal(transform.apply(score, None, transform.init())[0], np.zeros(4))


# Length alone.


def test_the_length_reward_is_largest_at_the_target():
    rewards = np.asarray(length_reward(jnp.arange(61.0), TARGET))
    assert rewards.argmax() == TARGET and rewards.max() == 1.0
    assert (np.diff(rewards[: TARGET + 1]) > 0).all() and (np.diff(rewards[TARGET:]) < 0).all()
    assert rewards[0] == rewards[2 * TARGET] == 0.0
    score = measured(0)
    found, _, metrics = length_only(TARGET).apply(score, None, length_only(TARGET).init())
    np.testing.assert_array_equal(found, length_reward(score.lengths, TARGET))
    np.testing.assert_allclose(metrics["rewards/proxy"], score.mean.mean(), rtol=1e-6)


def test_the_python_reward_is_the_same_function_of_counts():
    reward = length_reward_function(3, len)
    completions = ["", "a", "abc", "abcdefg"]
    found = call_reward_function(reward, ["p"] * 4, completions, {"source": [1, 2, 3, 4]})
    np.testing.assert_allclose(found, length_reward(jnp.array([0.0, 1.0, 3.0, 7.0]), 3), rtol=1e-6)


# Where lengths come from.


def rollout(finished=(True, True, False, True)) -> Rollout:
    """Four left-padded prompts with responses of 1 to 4 tokens."""
    prompt_mask = jnp.arange(3)[None] >= jnp.array([[0], [1], [2], [0]])
    mask = jnp.arange(4)[None] < jnp.array([[1], [3], [4], [2]])
    tokens = jax.random.randint(jax.random.key(0), (4, 4), 5, 12, jnp.int32)
    return Rollout(
        prompts=Prompts(tokens=jnp.full((4, 3), 5, jnp.int32), mask=prompt_mask, index=jnp.arange(4, dtype=jnp.int32)),
        tokens=tokens,
        mask=mask,
        logprob=jnp.where(mask, -2.0, 0.0),
        sampling_logprob=jnp.where(mask, -2.0, 0.0),
        finished=jnp.array(finished),
    )


def scorer(params, tokens, mask):
    return Score(mean=params * mask.sum(axis=-1).astype(jnp.float32), epistemic=jnp.ones(len(tokens)))


def test_lengths_are_of_the_responses_alone_and_reach_the_transform():
    taken = rollout()
    found = with_lengths(scorer, 4)(jnp.float32(1.0), taken.sequences.tokens, taken.sequences.mask)
    np.testing.assert_array_equal(found.lengths, [1, 3, 4, 2])
    np.testing.assert_array_equal(found.mean, [4, 5, 5, 5])
    np.testing.assert_array_equal(found.epistemic, np.ones(4))
    rewarded = []
    algorithm = Algorithm(
        init=None,
        rollout=lambda state, prompts: (state, taken),
        update=lambda state, taken, rewards: (rewarded.append(rewards) or state, {}),
    )
    transform = length_only(4)
    step = compose(algorithm, with_lengths(scorer, 4), transform)
    step(ComposedState(algorithm=(), transform=transform.init()), taken.prompts, jnp.float32(1.0))
    np.testing.assert_allclose(rewarded[0], [0.25, 0.75, 1.0, 0.5])


def test_transforms_can_be_chosen_among_and_compile():
    transforms = (single(), length_penalty(single(), TARGET), length_only(TARGET))
    states = tuple(transform.init() for transform in transforms)
    chosen, score = select(transforms), measured(4)
    apply = jax.jit(chosen.apply)
    for index, transform in enumerate(transforms):
        rewards, _, _ = apply(score, None, chosen.init(index, states))
        np.testing.assert_allclose(rewards, transform.apply(score, None, states[index])[0], rtol=1e-5)


def test_what_cannot_work_is_refused():
    for transform in (length_penalty(single(), TARGET), length_only(TARGET)):
        with pytest.raises(ValueError, match="needs the lengths of responses: wrap the scorer"):
            transform.apply(Score(mean=jnp.ones(2)), None, transform.init())
    with pytest.raises(ValueError, match="the target length is 0"):
        length_penalty(single(), 0)
    with pytest.raises(ValueError, match="the window is 0"):
        reward_scale(single(), window=0)
    with pytest.raises(ValueError, match="the limit of scaled rewards is 0"):
        reward_scale(single(), limit=0)


# Unfinished responses.


@pytest.mark.parametrize("rule", ["token_mean", "sequence_mean", "sequence_sum"])
def test_unfinished_responses_have_no_part_in_a_loss(rule):
    """The update of a stand-in: the gradient of the reduced loss with respect to the tokens' weights."""

    def update(state, taken, rewards):
        def loss(weights):
            return mean(weights * rewards[:, None] * taken.tokens.astype(jnp.float32), taken.mask, rule)

        return jax.grad(loss)(state), {}

    whole = Algorithm(init=None, rollout=None, update=update)
    taken, rewards, weights = rollout(), jnp.array([1.0, -1.0, 0.5, 2.0]), jnp.ones((4, 4))
    found, _ = omit_unfinished(whole).update(weights, taken, rewards)
    kept = jnp.array([0, 1, 3])
    alone, _ = update(weights[kept], jax.tree.map(lambda leaf: leaf[kept], taken), rewards[kept])
    np.testing.assert_allclose(found[kept], alone, rtol=1e-6)
    np.testing.assert_array_equal(found[2], np.zeros(4))
    assert np.abs(found - update(weights, taken, rewards)[0]).max() > 0.1
    everything = rollout(finished=(True,) * 4)
    np.testing.assert_array_equal(
        omit_unfinished(whole).update(weights, everything, rewards)[0], update(weights, everything, rewards)[0]
    )
