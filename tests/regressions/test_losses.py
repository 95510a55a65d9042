"""Failures of other stacks (design.md section 9, whose number each name carries) that the losses must not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.advantages import gae, token_rewards
from rlhf_jax.losses.kl import kl_estimate
from rlhf_jax.losses.logprobs import token_logprob
from rlhf_jax.losses.policy import clipped_surrogate, ratio_metrics, token_log_ratio
from rlhf_jax.losses.reduce import mean, reduce
from rlhf_jax.losses.reward import preference_accuracy

REDUCTION_ARGUMENTS = [("token_mean", None), ("sequence_mean", None), ("sequence_sum", None), ("constant", 7)]


def clipped(logprob, old_logprob, mask, advantages):
    """The loss of each token as PPO has it, clipped at 0.8 and 1.2."""
    return clipped_surrogate(logprob, token_log_ratio(logprob, old_logprob, mask), advantages, 0.2, 0.2)


def test_9_1_float_rewards_are_not_truncated():
    scores = jnp.array([0.9, -1.6])
    tokens = jnp.array([[5, 6, 2], [7, 2, 0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    rewards = token_rewards(scores, jnp.zeros(tokens.shape), mask, 0.1)
    np.testing.assert_allclose(rewards, [[0.0, 0.0, 0.9], [0.0, -1.6, 0.0]], rtol=1e-6)
    _, returns = gae(rewards, jnp.zeros(tokens.shape), mask, 1.0, 0.95)
    np.testing.assert_allclose(returns[:, -1] + jnp.where(mask[:, -1], 0.0, returns[:, 1]), scores, rtol=1e-6)
    faulty = jnp.zeros_like(tokens).at[jnp.arange(2), jnp.array([2, 1])].set(scores.astype(tokens.dtype))
    assert faulty.tolist() == [[0, 0, 0], [0, -1, 0]]


def test_9_3_clipping_engages_when_old_logprobs_come_from_the_rollout():
    old_logprob = jnp.full((1, 2), -1.0)
    logprob = jnp.array([[-0.5, -1.5]])
    mask = jnp.ones((1, 2), bool)
    assert float(ratio_metrics(token_log_ratio(logprob, old_logprob, mask), mask, 0.2, 0.2)["policy/clipfrac"]) == 1.0
    loss = jax.grad(lambda x, old: jnp.sum(clipped(x, old, mask, jnp.array([[1.0, -1.0]]))))
    assert not np.asarray(loss(logprob, old_logprob)).any()
    assert loss(logprob, logprob).tolist() == [
        [-1.0, 1.0]
    ]  # the fault: recomputed from the current policy, no clipping


def test_9_5_first_ratio_is_one_when_the_temperature_is_the_same_everywhere():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 9)).astype(np.float32) * 3)
    tokens = jnp.array([[1, 2, 3, 4]])
    mask = jnp.ones((1, 4), bool)
    sampled = token_logprob(logits, tokens, 0.7)
    metrics = ratio_metrics(token_log_ratio(jax.jit(token_logprob)(logits, tokens, 0.7), sampled, mask), mask, 0.2, 0.2)
    np.testing.assert_allclose(metrics["val/ratio"], 1.0, atol=1e-5)
    faulty = ratio_metrics(token_log_ratio(sampled, token_logprob(logits, tokens, 1.0), mask), mask, 0.2, 0.2)
    assert abs(float(faulty["val/ratio"]) - 1.0) > 0.1


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_9_6_the_score_is_credited_to_the_stop_token_and_never_to_padding(padding):
    mask = jnp.array([[True, True, True] + [False] * padding])
    rewards = token_rewards(jnp.array([0.75]), jnp.zeros(mask.shape), mask, 0.1)
    assert rewards.tolist() == [[0.0, 0.0, 0.75] + [0.0] * padding]
    logprob = jnp.zeros(mask.shape)
    gradient = jax.grad(lambda x: mean(clipped(x, logprob, mask, rewards), mask, "sequence_sum"))(logprob)
    np.testing.assert_allclose(gradient, [[0.0, 0.0, -0.75] + [0.0] * padding])


def test_9_7_k3_has_the_right_sign():
    """Two unit normals 1.5 apart: KL is 1.125; the faulty E_pi[exp(d) - 1 - d], of chi-square type, is 7.36."""
    with jax.enable_x64(True):
        shift, x = 1.5, jnp.linspace(-12.0, 16.0, 20_001)
        logprob, reference = -0.5 * jnp.square(x - shift), -0.5 * jnp.square(x)
        weight = jnp.exp(logprob) / jnp.sum(jnp.exp(logprob))
        np.testing.assert_allclose(jnp.sum(weight * kl_estimate(logprob, reference, "k3")), shift**2 / 2, rtol=1e-9)
        d = logprob - reference
        faulty = jnp.sum(weight * (jnp.exp(d) - 1 - d))
        np.testing.assert_allclose(faulty, np.exp(shift**2) - 1 - shift**2 / 2, rtol=1e-9)
        assert float(faulty) > 6 * shift**2 / 2


def test_9_7_kl_of_prompt_tokens_is_not_summed():
    kl = kl_estimate(jnp.array([[-9.0, -9.0, -1.0, -1.5]]), jnp.array([[-1.0, -1.0, -1.5, -1.5]]), "k3")
    response = jnp.array([[False, False, True, True]])
    np.testing.assert_allclose(mean(kl, response, "sequence_sum"), np.exp(-0.5) - 0.5, rtol=1e-6)
    faulty = mean(kl, jnp.ones_like(response), "sequence_sum")
    assert float(faulty) > 1000 * (np.exp(-0.5) - 0.5)


@pytest.mark.parametrize(("rule", "constant"), REDUCTION_ARGUMENTS)
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_9_10_loss_and_gradient_do_not_depend_on_the_microbatch(rule, constant, size):
    generator = np.random.default_rng(0)
    logprob, old_logprob, advantages = (jnp.asarray(generator.normal(size=(6, 7)).astype(np.float32)) for _ in range(3))
    mask = jnp.arange(7)[None, :] < jnp.array([7, 1, 3, 0, 5, 2])[:, None]

    def total_and_weight(x, rows):
        losses = clipped(x, old_logprob[rows], mask[rows], advantages[rows])
        return reduce(losses, mask[rows], rule, constant)

    everything = slice(0, 6)
    value, gradient = jax.value_and_grad(
        lambda x: mean(clipped(x, old_logprob, mask, advantages), mask, rule, constant)
    )(logprob)
    parts = [slice(start, start + size) for start in range(0, 6, size)]
    outcomes = [jax.value_and_grad(total_and_weight, has_aux=True)(logprob[rows], rows) for rows in parts]
    total = sum(float(t) for (t, _), _ in outcomes)
    weight = sum(float(w) for (_, w), _ in outcomes)
    assert weight == float(total_and_weight(logprob, everything)[1])
    np.testing.assert_allclose(total / weight, value, rtol=1e-5)
    accumulated = np.concatenate([np.asarray(g) for _, g in outcomes])
    np.testing.assert_allclose(accumulated / weight, gradient, rtol=1e-5, atol=1e-7)


def test_9_10_a_mean_of_means_would_be_another_number():
    values = jnp.array([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    mask = jnp.array([[True, True, True], [True, False, False]])
    assert float(mean(values, mask)) == 2.0
    assert np.mean([float(mean(values[i : i + 1], mask[i : i + 1])) for i in range(2)]) == 3.0


def test_9_13_rewards_that_bfloat16_cannot_tell_apart_are_ties():
    chosen, rejected = jnp.array([1.001, 0.999], jnp.bfloat16), jnp.array([1.0, 1.0], jnp.bfloat16)
    assert preference_accuracy(chosen[:1], rejected[:1]).tolist() == [0.5]
    assert preference_accuracy(chosen, rejected).dtype == jnp.float32
