"""Whose log-probabilities an update takes for the old ones, and updates on shorter arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.imitation import ImitationConfig
from rlhf_jax.algorithms.methods import METHODS, Method
from rlhf_jax.algorithms.online_preference import online, online_preference
from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig, policy_gradient
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.rollouts import sampler_weights, taken_scores
from rlhf_jax.losses.policy import sequence_log_ratio, token_log_ratio
from rlhf_jax.models.heads import response_logits
from rlhf_jax.models.quantised import stored_weights
from rlhf_jax.parallel.mesh import MeshShape, make_mesh
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.types import Prompts, Rollout

REWARDS = jnp.array([0.9, -1.6, 0.3, 2.5, -0.4, 0.0, 1.1, -2.2])
RATE = 0.1


def close(found, expected, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def grpo(config, sampling, method=METHODS["grpo"], **options):
    options = PolicyGradientConfig(sampling=sampling, method=method, **({"samples": 4} | options))
    return policy_gradient(config, options, optax.sgd(RATE))


@pytest.fixture(scope="module")
def plain(config, policy, sampling, prompts):
    """GRPO on two groups of four with the log-probabilities of the draws: its update, a state, and a rollout."""
    algorithm = grpo(config, sampling)
    start = algorithm.init(jax.random.key(3), {"policy": policy})
    state, taken = jax.jit(algorithm.rollout)(start, jax.tree.map(lambda leaf: leaf[:2], prompts))
    return jax.jit(algorithm.update), state, taken


@pytest.fixture(scope="module")
def short(plain):
    """The rollout with no response longer than two of six tokens."""
    taken = plain[2]
    mask = taken.mask & (jnp.arange(6) < 2)[None]
    zero = {name: jnp.where(mask, taken[name], 0) for name in ("tokens", "logprob", "sampling_logprob")}
    return taken.replace(mask=mask, **zero)


@pytest.fixture(scope="module")
def recomputed(config, sampling):
    """GRPO that reads its rollouts again, in three lengths."""
    return grpo(config, sampling, old_logprob="recomputed", length_buckets=3)


@pytest.fixture(scope="module")
def again(recomputed):
    return jax.jit(recomputed.update)


def off(taken, size=0.3):
    """The rollout as if something other than the policy had drawn it."""
    noise = size * jax.random.normal(jax.random.key(9), taken.logprob.shape)
    mu = jnp.where(taken.mask, taken.logprob + noise, 0.0)
    return taken.replace(logprob=mu, sampling_logprob=mu)


@pytest.mark.parametrize("lengths", ["long", "short"])
def test_recomputed_log_probabilities_and_cut_responses_change_no_number(plain, short, again, lengths):
    update, state, taken = plain
    taken = short if lengths == "short" else taken
    assert int(taken.mask.sum(axis=1).max()) == (2 if lengths == "short" else 6)
    (expected, metrics), (found, found_metrics) = (each(state, taken, REWARDS) for each in (update, again))
    close(found.params, expected.params)
    close(found_metrics, metrics)
    by_token = jnp.where(taken.mask, REWARDS[:, None] / 3, jnp.nan)  # padding may hold anything
    close(again(state, taken, by_token)[0].params, update(state, taken, by_token)[0].params)


def test_a_mesh_makes_the_same_step(plain, short, recomputed):
    update, state, _ = plain
    mesh = make_mesh(MeshShape(data=2), jax.devices()[:2])
    rows, whole = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    with jax.set_mesh(mesh):
        given = (jax.device_put(state, whole), jax.device_put(short, rows), jax.device_put(REWARDS, rows))
        found = jax.block_until_ready(jax.jit(recomputed.update, out_shardings=whole)(*given))
    expected = update(state, short, REWARDS)
    close(found[0].params, expected[0].params)
    close(found[1], expected[1])


def test_recomputed_ratios_are_one_whatever_drew_and_the_gap_is_measured(plain, again):
    _, state, taken = plain
    other = off(taken)
    expected, found = again(state, taken, REWARDS), again(state, other, REWARDS)
    close(found[0].params, expected[0].params)
    assert float(found[1]["val/first_ratio"]) == pytest.approx(1.0, abs=1e-6)
    gap = float(jnp.abs(other.sampling_logprob - taken.logprob).max())
    assert float(found[1]["policy/max_logprob_gap"]) == pytest.approx(gap, rel=1e-4)
    assert float(plain[0](state, other, REWARDS)[1]["policy/max_logprob_gap"]) == pytest.approx(gap, rel=1e-4)


def test_the_gradient_at_the_old_policy_is_that_of_weighted_tokens(config, sampling, plain):
    """One step of GRPO, where ratios are 1: the mean over responses of the mean over tokens of -w A grad log pi."""
    _, state, taken = plain
    other, cap = off(taken), 1.1
    algorithm = grpo(config, sampling, old_logprob="truncated", importance_cap=cap, keep_reference=False)
    found, metrics = jax.jit(algorithm.update)(state.replace(reference=None), other, REWARDS)
    mask = np.asarray(taken.mask)
    weights = np.exp(np.asarray(taken.logprob - other.sampling_logprob, np.float64))
    assert weights[mask].max() > cap > weights[mask].min()
    weights = np.minimum(weights, cap)
    scores = np.asarray(REWARDS, np.float64).reshape(2, 4)
    gains = (scores - scores.mean(axis=1, keepdims=True)) / (scores.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    pull = -(weights * gains.reshape(8, 1) * mask / mask.sum(axis=1, keepdims=True)) / 8
    _, back = jax.vjp(lambda params: taken_scores(config, params, taken, 1.0)[0], state.params)
    (gradient,) = jax.jit(back)(jnp.asarray(pull, jnp.float32))
    moved = jax.tree.map(lambda old, slope: old - RATE * slope, state.params, gradient)
    close(found.params, moved, atol=1e-6)
    assert float(metrics["policy/importance_weight"]) == pytest.approx(weights[mask].mean(), rel=1e-5)
    assert float(metrics["policy/max_importance_weight"]) == pytest.approx(cap)


def test_weights_are_of_what_the_ratio_is_of(plain):
    taken = plain[2]
    other = off(taken).replace(logprob=taken.logprob)
    by_token, by_response = (sampler_weights(other, ratio, 1e9) for ratio in (token_log_ratio, sequence_log_ratio))
    log = np.where(taken.mask, np.asarray(taken.logprob - other.sampling_logprob), 0.0)
    np.testing.assert_allclose(by_token, np.exp(log), rtol=1e-5)
    mean = log.sum(axis=1, keepdims=True) / np.asarray(taken.mask).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(by_response, np.exp(np.where(taken.mask, mean, 0.0)), rtol=1e-5)


def test_the_value_net_of_ppo_is_not_weighted(config, policy, sampling, plain):
    taken = plain[2]
    options = PPOConfig(sampling=sampling, epochs=1, minibatches=1, old_logprob="truncated")
    algorithm = ppo(config, options, optax.sgd(RATE))
    state = algorithm.init(jax.random.key(3), {"policy": policy})
    update = jax.jit(algorithm.update)
    exact, _ = update(state, taken, REWARDS)
    weighted, metrics = update(state, off(taken), REWARDS)
    close(weighted.params["value"], exact.params["value"], rtol=0.0, atol=0.0)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), weighted.params["policy"], exact.params["policy"])
    assert max(jax.tree.leaves(moved)) > 1e-3 and float(metrics["policy/max_importance_weight"]) > 1.1


def given_rewards(rewards, mask, samples):
    """Advantages that are the rewards."""
    return jnp.where(mask, rewards, 0.0)


def test_weights_make_the_gradient_of_a_sampler_in_eight_bits_that_of_the_policy(config, policy):
    """A bandit: every token once, each with the chance mu(y) that a policy in eight bits draws it.

    sum_y mu(y) w(y) r(y) grad log pi(y) = grad sum_y pi(y) r(y)
    """
    rows, sampling = config.vocab_size, SamplingConfig(max_new_tokens=1, stop_tokens=(3,))
    prompt = jnp.tile(jnp.array([[5, 7]], jnp.int32), (rows, 1))
    prompts = Prompts(tokens=prompt, mask=jnp.ones((rows, 2), bool), index=jnp.arange(rows, dtype=jnp.int32))
    tokens, blank = jnp.arange(rows, dtype=jnp.int32)[:, None], jnp.zeros((rows, 1))
    taken = Rollout(
        prompts=prompts,
        tokens=tokens,
        mask=jnp.ones((rows, 1), bool),
        logprob=blank,
        sampling_logprob=blank,
        finished=jnp.ones(rows, bool),
    )

    def log_chances(params):
        return jnp.take_along_axis(jax.nn.log_softmax(response_logits(config, params, taken)[:, 0]), tokens, axis=1)

    mu = jax.jit(lambda params: log_chances(stored_weights(params, "int8")))(policy)
    assert float(jnp.exp(mu).sum()) == pytest.approx(1.0, abs=1e-5)
    rewards = jnp.linspace(-3.0, 5.0, rows)
    slope = jax.jit(jax.grad(lambda params: (jnp.exp(log_chances(params))[:, 0] * rewards).sum()))(policy)
    method = Method(given_rewards, baseline="batch", reduction="sequence_sum")
    choices = {"old_logprob": "truncated", "importance_cap": 1e9, "samples": 1, "keep_reference": False}
    algorithm = grpo(config, sampling, method, **choices)
    state, update = algorithm.init(jax.random.key(0), {"policy": policy}), jax.jit(algorithm.update)

    def error(sampler):
        """The largest error of the gradient where tokens are drawn by mu and weighted as if by the sampler."""
        drawn = taken.replace(logprob=sampler, sampling_logprob=sampler)
        moved = update(state, drawn, rows * jnp.exp(mu)[:, 0] * rewards)[0].params
        gaps = jax.tree.map(lambda new, old, up: jnp.abs((new - old) / RATE - up).max(), moved, policy, slope)
        return max(float(gap) for gap in jax.tree.leaves(gaps))

    own = jax.jit(log_chances)(policy)
    assert error(mu) < 1e-4 < 10 * 1e-4 < error(own)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"importance_cap": 0.0}, "importance_cap is 0.0: give more than 0"),
        ({"length_buckets": 0}, "length_buckets is 0: give 1, which cuts nothing"),
    ],
)
def test_bad_options_are_refused(sampling, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        PPOConfig(sampling=sampling, **changes)


def test_an_unknown_kind_is_refused(sampling):
    options = PPOConfig(sampling=sampling)
    object.__setattr__(options, "old_logprob", "fresh")  # the types of the tests would refuse it first
    with pytest.raises(ValueError, match="old_logprob is 'fresh': choose rollout, recomputed or truncated"):
        options.__post_init__()


def test_weights_are_refused_where_no_policy_gradient_is(config, sampling):
    options = dataclasses.replace(online("online_dpo", sampling), old_logprob="truncated")
    with pytest.raises(ValueError, match="weighs the tokens of a policy gradient, which this is not"):
        online_preference(config, options, optax.sgd(RATE))
    with pytest.raises(ValueError, match="the reference draws here: choose rollout"):
        ImitationConfig(sampling=sampling, old_logprob="recomputed")
