"""GRPO: groups, its loss by hand, and a reward that it raises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.grpo import GRPOConfig, grpo, repeat_prompts
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.trained import assemble
from rlhf_jax.losses.advantages import group_advantages
from rlhf_jax.losses.kl import fixed_kl
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.heads import init_policy, response_logits
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.types import Prompts

REWARDS = jnp.array([0.9, -1.6, 0.3, 2.5, -0.4, 0.0, 1.1, -2.2])


def close(found, expected, rtol=1e-4, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


@pytest.fixture(scope="module")
def reference(config):
    return jax.jit(init_policy, static_argnums=0)(config, jax.random.key(7))


@pytest.fixture(scope="module")
def two(prompts) -> Prompts:
    return jax.tree.map(lambda leaf: leaf[:2], prompts)


@pytest.fixture(scope="module")
def plain(config, policy, reference, sampling, two):
    """One plain gradient step on two groups of four, with its jitted update, a state and a rollout."""
    algorithm = grpo(config, GRPOConfig(sampling=sampling, samples=4), optax.sgd(0.1), fixed_kl(0.3))
    start = algorithm.init(jax.random.key(3), {"policy": policy, "reference": reference})
    state, taken = jax.jit(algorithm.rollout)(start, two)
    return algorithm, jax.jit(algorithm.update), state, taken


def test_responses_stand_in_groups_and_differ(plain, two):
    _, _, state, taken = plain
    assert int(state.step) == 1 and taken.tokens.shape == (8, 6)
    np.testing.assert_array_equal(taken.prompts.tokens, jnp.repeat(two.tokens, 4, axis=0))
    np.testing.assert_array_equal(taken.prompts.index, jnp.arange(8))
    drawn = np.where(taken.mask, taken.tokens, 0)
    assert len({row.tobytes() for row in drawn[:4]}) > 1
    assert repeat_prompts(two.replace(index=jnp.array([7, 2], jnp.int32)), 3).index.tolist() == [21, 22, 23, 6, 7, 8]


def test_an_update_is_a_step_worked_out_from_all_logits(config, plain):
    """Mean over responses of the mean over tokens of -min(ratio A, clipped ratio A) + 0.3 k3."""
    _, update, state, taken = plain
    noise = 0.3 * jax.random.normal(jax.random.key(9), taken.logprob.shape)  # ratios that are far from 1
    taken = taken.replace(logprob=jnp.where(taken.mask, taken.logprob + noise, 0.0))
    groups = np.asarray(REWARDS, np.float64).reshape(2, 4)
    spread = groups.std(axis=1, ddof=1, keepdims=True)
    advantages = ((groups - groups.mean(axis=1, keepdims=True)) / (spread + 1e-4)).reshape(-1)

    def logprobs(params):
        logits = jax.nn.log_softmax(response_logits(config, params, taken), axis=-1)
        return jnp.take_along_axis(logits, taken.tokens[..., None], axis=-1)[..., 0]

    fixed = logprobs(state.reference)

    real = taken.mask.astype(jnp.float32)
    weights = real / real.sum(axis=1, keepdims=True) / 8
    gains = jnp.asarray(advantages, jnp.float32)[:, None]

    def loss(params):
        now = logprobs(params)
        ratio, behind = jnp.exp(now - taken.logprob), fixed - now
        gain = jnp.minimum(ratio * gains, jnp.clip(ratio, 0.8, 1.2) * gains)
        return jnp.where(taken.mask, weights * (0.3 * (jnp.exp(behind) - 1.0 - behind) - gain), 0.0).sum()

    value, slope = jax.jit(jax.value_and_grad(loss))(state.params)
    found, metrics = update(state, taken, REWARDS)
    assert float(metrics["policy/clipfrac"]) > 0 and float(metrics["objective/equal_groups"]) == 0.0
    np.testing.assert_allclose(metrics["loss/policy"] + 0.3 * metrics["loss/kl"], value, rtol=1e-4)
    np.testing.assert_allclose(metrics["objective/scores"], REWARDS.mean(), rtol=1e-5)
    close(found.params, jax.tree.map(lambda leaf, by: leaf - 0.1 * by, state.params, slope), rtol=2e-4, atol=2e-6)


def test_the_first_step_sees_the_policy_that_sampled(plain):
    _, update, state, taken = plain
    _, metrics = update(state, taken, REWARDS)
    assert abs(float(metrics["val/first_ratio"]) - 1.0) < 1e-4 and float(metrics["policy/max_logprob_gap"]) < 1e-4
    assert set(metrics) >= {"objective/kl", "policy/entropy", "loss/kl", "completions/mean_length", "grad_norm"}


def test_groups_of_equal_rewards_change_nothing_without_kl(plain):
    _, update, state, taken = plain
    free = state.replace(kl_coefficient=jnp.float32(0.0))
    rewards = jnp.repeat(jnp.array([0.1, -3.3]), 4)
    found, metrics = update(free, taken, rewards)
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
    assert float(metrics["objective/equal_groups"]) == 1.0 and float(metrics["grad_norm"]) == 0.0
    moved, _ = update(state, taken, rewards)
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, moved.params, state.params))) > 1e-4


def test_constants_of_prompts_padding_and_the_order_of_groups_do_not_matter(plain):
    _, update, state, taken = plain
    expected, _ = update(state, taken, REWARDS)
    close(update(state, taken, REWARDS + jnp.repeat(jnp.array([4.0, -8.0]), 4))[0].params, expected.params, atol=1e-5)
    junk = taken.replace(
        tokens=jnp.where(taken.mask, taken.tokens, 11), logprob=jnp.where(taken.mask, taken.logprob, -5.0)
    )
    close(update(state, junk, REWARDS)[0].params, expected.params)
    order = jnp.array([5, 4, 7, 6, 2, 3, 0, 1])
    shuffled = jax.tree.map(lambda leaf: leaf[order], taken)
    close(update(state, shuffled, REWARDS[order])[0].params, expected.params)


def test_an_empty_response_weighs_nothing_but_its_reward_counts_in_its_group(config, plain):
    _, update, state, taken = plain
    empty = taken.replace(mask=taken.mask.at[1].set(False))
    found, metrics = update(state, empty, REWARDS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found.params, metrics)))
    advantages = np.delete(np.asarray(group_advantages(REWARDS, 4)), 1)
    # At a ratio of 1 the surrogate of a response is minus its advantage.
    np.testing.assert_allclose(metrics["loss/policy"], -advantages.mean(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"samples": 1}, "give 2 samples or more, not 1"),
        ({"epochs": 0}, "GRPO needs at least 1 epoch"),
        ({"accumulate": 0}, "1 microbatch"),
        (
            {"sampling": SamplingConfig(max_new_tokens=2, stop_tokens=(3,), top_k=3)},
            "GRPO samples from the policy",
        ),
    ],
)
def test_bad_options_are_refused(sampling, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        GRPOConfig(**({"sampling": sampling} | options))


def test_minibatches_that_do_not_divide_are_refused(config, sampling, plain):
    _, _, state, taken = plain
    algorithm = grpo(config, GRPOConfig(sampling=sampling, samples=4, minibatches=3), optax.sgd(0.1))
    with pytest.raises(ValueError, match="8 responses do not split into 3 minibatches"):
        algorithm.update(state, taken, REWARDS)


def training(config, options, state, prompts, adapter=None):
    """Sixty updates; the reward of a response is the share of token 5 in it, which nobody had to learn."""
    algorithm = grpo(config, options, adam(0.02), adapter=adapter)

    def step(state, _):
        state, taken = algorithm.rollout(state, prompts)
        rewards = jnp.where(taken.mask, taken.tokens == 5, False).sum(axis=1) / taken.mask.sum(axis=1)
        return algorithm.update(state, taken, rewards.astype(jnp.float32))

    return jax.jit(lambda state: jax.lax.scan(step, state, length=60))(state(algorithm))


@pytest.mark.parametrize("adapter", [None, AdapterConfig(kind="lora", targets=("query", "value", "down"), rank=4)])
def test_a_verifiable_reward_is_raised(config, prompts, adapter):
    """From a chance of about 1/12 to a share above 2/5, by Dr. GRPO's choices or with an adapter."""
    plain = {"divide": False, "reduction": "constant"} if adapter is None else {}
    options = GRPOConfig(sampling=SamplingConfig(max_new_tokens=2, stop_tokens=(3,)), samples=8, epochs=2, **plain)
    shape = config if adapter else dataclasses.replace(config, initializer_range=0.02)
    policy = init_policy(shape, jax.random.key(0))
    state, metrics = training(
        config, options, lambda algorithm: algorithm.init(jax.random.key(1), {"policy": policy}), prompts, adapter
    )
    assert float(metrics["objective/scores"][0]) < 0.3
    assert float(metrics["objective/scores"][-20:].mean()) > 0.4
    if adapter is not None:
        jax.tree.map(np.testing.assert_array_equal, state.reference, policy)
        assert jax.tree.structure(assemble(state.reference, state.params, adapter)) != jax.tree.structure(state.params)
