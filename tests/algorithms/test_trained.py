"""Adapters in every algorithm: what is trained, what is not, and that the base with a fresh adapter is the base."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.preference import preference
from rlhf_jax.algorithms.reward_modeling import reward_modeling
from rlhf_jax.algorithms.sft import negative_log_likelihood, sft
from rlhf_jax.algorithms.trained import assemble, reference_policy, trainable
from rlhf_jax.losses.kl import fixed_kl
from rlhf_jax.losses.preference_choices import preference_loss
from rlhf_jax.models.adapters import AdapterConfig, adapter_size, init_adapter, merge
from rlhf_jax.models.heads import init_value_head
from rlhf_jax.types import Demonstrations, PreferenceBatch, Sequences

LORA = AdapterConfig(kind="lora", targets=("query", "value", "down"), rank=2, alpha=4.0)
REWARDS = jnp.array([0.9, -1.6, 0.3, 2.5, -0.4, 0.0, 1.1, -2.2])


def dpo(config, optimizer, **options):
    return preference(config, preference_loss("dpo"), optimizer, **options)


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def moments(state):
    """The sizes of the trees of moments that Adam keeps."""
    kept = optax.tree_utils.tree_get(state.optimizer_state, "mu")
    return sum(leaf.size for leaf in jax.tree.leaves(kept))


@pytest.fixture(scope="module")
def demonstrations() -> Demonstrations:
    tokens = jax.random.randint(jax.random.key(5), (4, 6), 1, 12, jnp.int32)
    mask = jnp.arange(6)[None] < jnp.array([[6], [3], [5], [4]])
    return Demonstrations(tokens=tokens, mask=mask, loss_mask=mask & (jnp.arange(6)[None] >= 2))


@pytest.fixture(scope="module")
def pairs(demonstrations) -> PreferenceBatch:
    chosen = Sequences(tokens=demonstrations.tokens, mask=demonstrations.mask, loss_mask=demonstrations.loss_mask)
    rejected = chosen.replace(tokens=jax.random.randint(jax.random.key(6), (4, 6), 1, 12, jnp.int32))
    return PreferenceBatch(chosen=chosen, rejected=rejected, margin=jnp.zeros(4))


def test_without_adapter_the_model_itself_is_trained(policy, key):
    assert trainable(policy, None, key) is policy
    assert assemble(None, policy, None) is policy


def same_arrays(found, expected) -> bool:
    return all(a is b for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True))


def test_the_reference_is_the_policy_at_the_start_or_the_one_given(policy):
    assert reference_policy({}, policy, None) is policy
    assert reference_policy({}, policy, LORA) is policy
    given = {"reference": {"trunk": 1}}
    assert reference_policy(given, policy, None) is given["reference"]
    with pytest.raises(ValueError, match="An adapter's base is the reference policy; leave out params"):
        reference_policy(given, policy, LORA)


def test_no_array_stands_twice_in_a_state_that_is_donated(config, policy, sampling):
    """Not where the caller gives one tree for two roles either; trees of their own are not copied."""
    value = {"trunk": policy["trunk"], "head": init_value_head(config)}
    other = jax.tree.map(jnp.copy, policy)
    for given in ({"policy": policy}, {"policy": policy, "reference": policy}):
        trained = (dpo(config, adam(0.1)), {}), (ppo(config, PPOConfig(sampling=sampling), adam(0.1)), {"value": value})
        for algorithm, more in trained:
            state = algorithm.init(jax.random.key(0), given | more)
            assert len({id(leaf) for leaf in jax.tree.leaves(state)}) == len(jax.tree.leaves(state))
            equal(state.reference, policy)
    state = dpo(config, adam(0.1)).init(jax.random.key(0), {"policy": policy, "reference": other})
    assert same_arrays(state.reference, other) and same_arrays(state.params, policy)


@pytest.mark.parametrize("algorithm", [sft, dpo])
def test_offline_policies_train_the_adapter_alone(config, policy, demonstrations, pairs, algorithm):
    batch = demonstrations if algorithm is sft else pairs
    adapted, plain = algorithm(config, adam(0.01), adapter=LORA), algorithm(config, adam(0.01))
    start = adapted.init(jax.random.key(0), {"policy": policy})
    base = start.base if algorithm is sft else start.reference
    assert same_arrays(base, policy)
    assert moments(start) == adapter_size(start.params)
    update = jax.jit(adapted.update)
    state, metrics = update(start, batch)
    _, expected = jax.jit(plain.update)(plain.init(jax.random.key(0), {"policy": policy}), batch)
    np.testing.assert_array_equal(metrics["loss/policy"], expected["loss/policy"])
    for _ in range(5):
        state, metrics = update(state, batch)
    assert float(metrics["loss/policy"]) < float(expected["loss/policy"]) - 1e-3
    equal(state.base if algorithm is sft else state.reference, policy)
    for target in LORA.targets:
        assert (state.params[target]["b"] != start.params[target]["b"]).any()


def test_the_gradient_of_an_adapter_is_that_of_the_merged_model(config, policy, demonstrations):
    algorithm = sft(config, optax.sgd(1.0), LORA)
    adapter = jax.tree.map(
        lambda leaf: 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
        init_adapter(LORA, policy, jax.random.key(0)),
    )
    start = algorithm.init(jax.random.key(0), {"policy": policy}).replace(params=adapter)
    state, _ = jax.jit(algorithm.update)(start, demonstrations)
    gradient = jax.jit(
        jax.grad(lambda adapter: negative_log_likelihood(config, merge(policy, adapter, LORA), demonstrations)[0])
    )(adapter)
    expected = jax.tree.map(lambda leaf, slope: leaf - slope, adapter, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state.params, expected)


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_a_reward_model_trains_an_adapter_and_its_head(config, policy, pairs, kind):
    adapter = AdapterConfig(kind=kind, targets=("value", "down"), rank=2)
    adapted, plain = (reward_modeling(config, adam(0.01), adapter=each) for each in (adapter, None))
    start, other = (each.init(jax.random.key(0), {"trunk": policy["trunk"]}) for each in (adapted, plain))
    equal(start.params["head"], other.params["head"])
    assert start.base["trunk"] is policy["trunk"]
    assert moments(start) == adapter_size(start.params["trunk"]) + config.width + 1
    update = jax.jit(adapted.update)
    state, metrics = update(start, pairs)
    _, expected = jax.jit(plain.update)(other, pairs)
    np.testing.assert_allclose(metrics["loss/reward"], expected["loss/reward"], rtol=1e-5)
    state, _ = update(state, pairs)  # LoRA's a has a gradient once b is not 0
    equal(state.base["trunk"], policy["trunk"])
    for after, before in zip(jax.tree.leaves(state.params), jax.tree.leaves(start.params), strict=True):
        assert after.size == 1 or (after != before).any()  # the head's bias has no gradient


@pytest.mark.parametrize("value_net", ["separate", "shared"])
def test_ppo_trains_the_adapter_and_holds_its_base_once(config, policy, prompts, sampling, value_net):
    options = PPOConfig(sampling=sampling, epochs=2, minibatches=2, value_net=value_net)
    algorithm = ppo(config, options, adam(0.02), fixed_kl(0.1), adapter=LORA)
    start = algorithm.init(jax.random.key(3), {"policy": policy})
    assert same_arrays(start.reference, policy)
    assert moments(start) == adapter_size(start.params["policy"]) + sum(
        leaf.size for leaf in jax.tree.leaves(start.params["value"])
    )
    rollout, update = jax.jit(algorithm.rollout), jax.jit(algorithm.update)
    # A fresh adapter samples from the base.
    state, metrics = update(*rollout(start, prompts), REWARDS)
    assert abs(float(metrics["val/first_ratio"]) - 1.0) < 1e-5
    assert abs(float(metrics["objective/kl"])) < 1e-5
    assert float(metrics["policy/max_logprob_gap"]) < 1e-4
    equal(state.reference, policy)
    for target in LORA.targets:
        assert (state.params["policy"][target]["b"] != start.params["policy"][target]["b"]).any()
    # The next rollout comes from the adapted policy, and its ratio is 1 again.
    _, metrics = update(*rollout(state, prompts), REWARDS)
    assert abs(float(metrics["val/first_ratio"]) - 1.0) < 1e-5
    assert float(metrics["objective/kl_k3"]) > 1e-4
