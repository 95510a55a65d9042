"""Failures of PPO stacks (design.md section 9): each faulty variant is kept here and shown to fail."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.losses.kl import adaptive_kl
from rlhf_jax.losses.logprobs import token_logprob
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import apply_head, init_policy, init_reward_model, response_logits
from rlhf_jax.models.huggingface import save_reward_model
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.last_layer import adversarial_direction, displacement, geometry, gram
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.training import checkpoints
from rlhf_jax.types import Prompts, Rollout

EOS = 3
CONFIG = ModelConfig(
    vocab_size=12,
    width=8,
    layers=1,
    heads=2,
    key_value_heads=1,
    feed_forward_width=12,
    context_length=16,
    initializer_range=0.5,
)
OPTIONS = PPOConfig(sampling=SamplingConfig(max_new_tokens=6, stop_tokens=(EOS,)), epochs=4, minibatches=1)
PROMPTS = Prompts(
    tokens=jax.random.randint(jax.random.key(1), (8, 3), 4, 12, jnp.int32),
    mask=jnp.ones((8, 3), bool),
    index=jnp.arange(8, dtype=jnp.int32),
)
REWARDS = jnp.array([0.9, -1.6, 0.3, 2.5, -0.4, 0.0, 1.1, -2.2])
DESCENT = optax.sgd(lambda step: 1.0)  # a rate that is a schedule, so that steps are counted


@pytest.fixture(scope="module")
def policy():
    return jax.jit(init_policy, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def reward_model():
    return jax.jit(init_reward_model, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def begun(policy):
    """The state after one rollout, and the rollout: neither depends on how the policy is updated."""
    algorithm = ppo(CONFIG, OPTIONS, DESCENT)
    return jax.jit(algorithm.rollout)(algorithm.init(jax.random.key(2), {"policy": policy}), PROMPTS)


logits_of = jax.jit(response_logits, static_argnums=0)


@functools.cache
def update_of(options):
    return jax.jit(ppo(CONFIG, options, DESCENT).update)


def differ(one, other) -> bool:
    return any((a != b).any() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


# 9.3 Old log-probs recomputed from the current policy inside each minibatch.


def update_that_recomputes_old_logprobs(update_once, state, taken, epochs):
    """The fault: the policy is compared with itself, so the ratio is 1 for ever and clipping idles."""
    seen = []
    for _ in range(epochs):
        logits = logits_of(CONFIG, state.params["policy"], taken)
        logprob = jnp.where(taken.mask, token_logprob(logits, taken.tokens), 0.0)
        state, metrics = update_once(state, taken.replace(logprob=logprob), REWARDS)
        seen.append(metrics)
    return state, jax.tree.map(lambda *values: jnp.stack(values), *seen)


def test_9_3_old_logprobs_come_from_the_rollout_and_clipping_engages(begun):
    state, taken = begun
    _, metrics = update_of(OPTIONS)(state, taken, REWARDS)
    assert float(metrics["policy/clipfrac"]) > 0.1
    assert float(metrics["val/ratio_var"]) > 1e-3
    once = update_of(dataclasses.replace(OPTIONS, epochs=1))
    _, faulty = update_that_recomputes_old_logprobs(once, state, taken, OPTIONS.epochs)
    np.testing.assert_allclose(faulty["val/ratio"], 1.0, atol=1e-4)
    assert float(faulty["policy/clipfrac"].max()) == 0.0


# 9.4 An "epochs" setting that nothing reads.


def update_that_ignores_epochs(options):
    """The fault: the option is accepted, and one pass is made."""
    return update_of(dataclasses.replace(options, epochs=1))


def test_9_4_epochs_are_read(begun):
    def after(update):
        state, _ = update(*begun, REWARDS)
        return state.params, int(optax.tree_utils.tree_get(state.optimizer_state, "count"))

    one, four = (dataclasses.replace(OPTIONS, epochs=epochs) for epochs in (1, 4))
    faulty = [after(update_that_ignores_epochs(options)) for options in (one, four)]
    assert not differ(faulty[0][0], faulty[1][0])
    ours = [after(update_of(options)) for options in (one, four)]
    assert differ(ours[0][0], ours[1][0])
    assert [count for _, count in ours] == [1, 4]


# 9.6 EOS never in the loss; a reward model that scores the wrong token.


def test_9_6_the_stop_token_is_in_the_loss(policy, begun):
    """Responses that are nothing but a stop token: only a loss that counts it can learn to end, or not to."""
    update, (state, _) = update_of(dataclasses.replace(OPTIONS, epochs=1, whiten_advantages=False)), begun
    first = jnp.arange(6)[None] == 0
    taken = Rollout(
        prompts=PROMPTS,
        tokens=jnp.where(first, EOS, jnp.zeros((8, 6), jnp.int32)),
        mask=jnp.tile(first, (8, 1)),
        logprob=jnp.tile(jnp.where(first, -2.0, 0.0), (8, 1)),
        sampling_logprob=jnp.zeros((8, 6)),
        finished=jnp.ones(8, bool),
    )
    logits = logits_of(CONFIG, policy, taken)
    logprob = jnp.where(taken.mask, token_logprob(logits, taken.tokens), 0.0)
    taken = taken.replace(logprob=logprob)

    def chance_to_end(state):
        return jax.nn.softmax(logits_of(CONFIG, state.params["policy"], taken)[:, 0])[:, EOS].mean()

    rewarded, metrics = update(state, taken, jnp.ones(8))
    assert float(chance_to_end(rewarded)) > float(chance_to_end(state)) + 0.01
    np.testing.assert_allclose(metrics["objective/scores"], 1.0)
    # The fault: the mask leaves the stop token out, so its score and its gradient are lost.
    faulty, metrics = update(state, taken.replace(mask=taken.mask & (taken.tokens != EOS)), jnp.ones(8))
    assert not differ(faulty.params, state.params)
    assert float(metrics["objective/scores"]) == 0.0


def score_at_the_last_position(params, tokens, mask):
    """The fault: without knowing its padding, a reward model reads whatever stands last."""
    hidden = apply_trunk(CONFIG, params["trunk"], tokens, mask).final
    return apply_head(params["head"], hidden[:, -1])


@pytest.mark.parametrize("padding", [1, 5])
def test_9_6_a_reward_is_read_at_the_last_real_token(reward_model, padding):
    tokens, mask = PROMPTS.tokens, PROMPTS.mask
    padded = jnp.pad(tokens, ((0, 0), (0, padding))), jnp.pad(mask, ((0, 0), (0, padding)))
    score = jax.jit(reward_scorer(CONFIG))
    expected = score(reward_model, tokens, mask).mean
    np.testing.assert_allclose(score(reward_model, *padded).mean, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score_at_the_last_position(reward_model, tokens, mask), expected, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(score_at_the_last_position(reward_model, *padded) - expected).max()) > 1e-2


def last_before_padding(tokens, pad_token):
    """The fault: where a text ends is guessed from its ids; EOS stands in for a pad token that nobody has set."""
    return (tokens != pad_token).sum(axis=1) - 1


def test_9_6_a_stop_token_that_is_also_the_padding_is_scored(reward_model):
    tokens = np.array([[4, 5, 6, EOS, EOS, EOS], [7, 8, 9, 10, 11, EOS]], np.int32)
    score = jax.jit(reward_scorer(CONFIG))

    def ended(last, padding):
        """The scores of the texts up to a position; what stands behind is masked, and is another token."""
        kept = np.arange(6) <= np.asarray(last)[:, None]
        return np.asarray(score(reward_model, jnp.asarray(np.where(kept, tokens, padding)), jnp.asarray(kept)).mean)

    found = ended([3, 5], EOS)
    np.testing.assert_allclose(found, ended([3, 5], 0), rtol=1e-5, atol=1e-5)
    faulty = last_before_padding(tokens, EOS)
    assert faulty.tolist() == [2, 4]
    assert np.abs(found - ended(faulty, EOS)).min() > 1e-2


def test_9_6_a_reward_model_is_not_saved_without_a_pad_token(reward_model, tmp_path):
    with pytest.raises(ValueError, match="saved with a pad token"):
        save_reward_model(tmp_path / "model", CONFIG, reward_model)
    assert not (tmp_path / "model").exists()


# 9.11 Uncertainty terms computed per device instead of globally.


def test_9_11_the_adversarial_direction_is_one_for_all_devices():
    features = jax.random.normal(jax.random.key(0), (16, 4)) + jnp.linspace(-3.0, 3.0, 16)[:, None]
    reference = jax.random.normal(jax.random.key(1), (16, 4))
    shape = geometry(gram(reference), 1.0)

    def direction(features, reference):
        return adversarial_direction(shape, displacement(features, reference), 2.0)

    expected = direction(features, reference)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    ours = jax.jit(direction, in_shardings=(rows, rows), out_shardings=whole)(
        jax.device_put(features, rows), jax.device_put(reference, rows)
    )
    np.testing.assert_allclose(jax.block_until_ready(ours), expected, rtol=1e-5, atol=1e-6)

    # The fault: each device takes the mean of its own rows, and the directions are averaged.
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    def on_each_device(features, reference):
        return direction(features, reference)[None]

    faulty = jax.block_until_ready(jax.jit(on_each_device)(features, reference))
    assert faulty.shape == (8, 4)
    assert float(jnp.abs(faulty.mean(axis=0) - expected).max()) > 0.1


# 9.12 Checkpoints of parameters only.


def test_9_12_a_checkpoint_holds_the_whole_state(policy, tmp_path):
    options = dataclasses.replace(OPTIONS, epochs=1, minibatches=2)
    algorithm = ppo(CONFIG, options, adam(0.01), adaptive_kl(0.1, 1.0, 100))

    @jax.jit
    def step(state):
        state, taken = algorithm.rollout(state, PROMPTS)
        return algorithm.update(state, taken, REWARDS)[0]

    fresh = algorithm.init(jax.random.key(2), {"policy": policy})
    interrupted = step(step(fresh))
    checkpoints.save(tmp_path / "state", interrupted)
    checkpoints.save(tmp_path / "params", interrupted.params)
    expected = step(interrupted).params
    resumed = checkpoints.restore(tmp_path / "state", jax.eval_shape(lambda: fresh))
    assert not differ(step(resumed).params, expected)
    # The fault: optimiser, key, step and KL coefficient start anew.
    params = checkpoints.restore(tmp_path / "params", jax.eval_shape(lambda: fresh.params))
    faulty = algorithm.init(jax.random.key(2), {**params, "reference": policy})
    assert not differ(faulty.params, interrupted.params)
    assert differ(step(faulty).params, expected)
