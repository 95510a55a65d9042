"""Imitation: what is drawn, kept and weighed, and the step, worked out from all logits for every kind in the table."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.algorithms.compose import ComposedState, compose
from rlhf_jax.algorithms.imitation import IMITATION, Imitation, ImitationConfig, imitating, imitation
from rlhf_jax.losses.imitation import equal_weights
from rlhf_jax.losses.kl import fixed_kl
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.heads import init_policy, response_logits
from rlhf_jax.rewards.ensemble import worst_case
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.types import Score

REWARDS = jnp.array([0.9, -1.6, 0.3, 2.5, -0.4, 0.0, 1.1, -2.2])
BETA, RATE = 0.3, 0.1


def close(found, expected, rtol=2e-4, atol=2e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


@pytest.fixture(scope="module")
def reference(config):
    return jax.jit(init_policy, static_argnums=0)(config, jax.random.key(7))


@pytest.fixture(scope="module")
def two(prompts):
    return jax.tree.map(lambda leaf: leaf[:2], prompts)


@pytest.fixture(scope="module")
def make(config, policy, reference, sampling, two):
    """Options, an algorithm, its jitted update, a state and a rollout of two groups of four; made once each."""
    made, rollouts = {}, {}

    def build(name, **changes):
        if (name, *changes) not in made:
            choices = {"samples": 4, "method": IMITATION[name], "missing_eos_penalty": 10.0}
            options = ImitationConfig(sampling=sampling, **choices, **changes)
            kl = fixed_kl(BETA) if options.method.prior_kl else None
            algorithm = imitation(config, options, optax.sgd(RATE), kl)
            state = algorithm.init(jax.random.key(3), {"policy": policy, "reference": reference})
            source = options.method.proposal
            if source not in rollouts:
                rollouts[source] = jax.jit(algorithm.rollout)(state, two)[1].replace(finished=jnp.ones(8, bool))
            made[(name, *changes)] = options, algorithm, jax.jit(algorithm.update), state, rollouts[source]
        return made[(name, *changes)]

    return build


def of_taken(logprobs, tokens):
    return jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]


@pytest.fixture(scope="module")
def by_hand(config):
    """(loss, its gradient), log-probabilities of the taken under the reference: from all logits, given the weights."""

    def loss(params, reference, taken, shares, held):
        now, fixed = (jax.nn.log_softmax(response_logits(config, tree, taken), axis=-1) for tree in (params, reference))
        divergence = (jnp.exp(fixed) * (fixed - now)).sum(axis=-1)
        value = (held * divergence).sum() - (shares * of_taken(now, taken.tokens)).sum()
        return value, of_taken(fixed, taken.tokens)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def weights_by_hand(options, taken, reference_logprob):
    """Weights of all eight responses from numpy, 0 where they are not kept."""
    behind = np.where(taken.mask, np.asarray(reference_logprob, np.float64) - np.asarray(taken.logprob), 0.0).sum(
        axis=1
    )
    weights = np.zeros(8)
    for group in (slice(0, 4), slice(4, 8)):
        rewards = np.asarray(REWARDS, np.float64)[group]
        if options.keep == 1:
            weights[group] = rewards == rewards.max()
        else:
            raised = np.exp(rewards / 0.5 + (behind[group] if options.method.proposal == "policy" else 0.0))
            weights[group] = raised / raised.sum()
    return weights


@pytest.mark.parametrize("name", ["var", "var_online", "superhf"])
def test_an_update_is_a_step_worked_out_from_all_logits(make, by_hand, name):
    """Mean over prompts of sum w L, or of w L / n and 0.3 times the mean divergence of the kept."""
    options, _, update, state, taken = make(name)
    zero = jnp.zeros(taken.mask.shape)
    (_, fixed), _ = by_hand(state.params, state.reference, taken, zero, zero)
    weights = weights_by_hand(options, taken, fixed)
    by_row = weights / 2
    if options.method.reduction == "sequence_mean":
        by_row = by_row / np.asarray(taken.mask).sum(axis=1)
    shares = jnp.asarray(by_row[:, None] * np.asarray(taken.mask), jnp.float32)
    held = BETA * shares if options.method.prior_kl else zero
    (value, _), slope = by_hand(state.params, state.reference, taken, shares, held)
    found, metrics = update(state, taken, REWARDS)
    np.testing.assert_allclose(metrics["loss/policy"] + BETA * metrics.get("loss/kl", 0.0), value, rtol=1e-4)
    close(found.params, jax.tree.map(lambda leaf, by: leaf - RATE * by, state.params, slope))
    np.testing.assert_allclose(metrics["objective/scores"], REWARDS.mean(), rtol=1e-5)
    kept = (2.5 + 1.1) / 2 if options.keep == 1 else REWARDS.mean()
    np.testing.assert_allclose(metrics["objective/scores_kept"], kept, rtol=1e-5)
    squares = np.square(weights.reshape(2, 4)).sum(axis=1)
    np.testing.assert_allclose(metrics["weights/effective_samples"], (1 / squares).mean(), rtol=1e-4)


def test_samples_come_from_the_reference_or_from_the_policy(make, by_hand):
    _, _, update, state, taken = make("var")
    zero = jnp.zeros(taken.mask.shape)
    (_, drawn), _ = by_hand(state.params, state.reference, taken, zero, zero)
    np.testing.assert_allclose(jnp.where(taken.mask, drawn, 0.0), taken.logprob, atol=1e-4)
    assert not {"objective/kl", "objective/entropy"} & set(update(state, taken, REWARDS)[1])
    _, _, update, state, taken = make("superhf")
    _, metrics = update(state, taken, REWARDS)
    assert abs(float(metrics["val/first_ratio"]) - 1.0) < 1e-4 and float(metrics["policy/max_logprob_gap"]) < 1e-4
    assert {"objective/kl", "objective/entropy"} <= set(metrics)


def test_the_prior_is_at_no_distance_at_the_start(make, policy):
    _, algorithm, update, _, taken = make("superhf")
    state, metrics = update(algorithm.init(jax.random.key(3), {"policy": policy}), taken, REWARDS)
    assert 0.0 <= float(metrics["loss/kl"]) < 1e-6
    assert float(update(state, taken, REWARDS)[1]["loss/kl"]) > 1e-6


def test_only_kept_rows_matter_and_equal_samples_may_come_in_any_order(make):
    _, _, update, state, taken = make("superhf")
    expected, _ = update(state, taken, REWARDS)
    dropped = jnp.array([True, True, True, False, True, True, False, True])
    junk = taken.replace(tokens=jnp.where(dropped[:, None] | ~taken.mask, 11, taken.tokens))
    close(update(state, junk, REWARDS)[0].params, expected.params)
    order = jnp.array([5, 4, 7, 6, 2, 3, 0, 1])
    shuffled = jax.tree.map(lambda leaf: leaf[order], taken)
    close(update(state, shuffled, REWARDS[order])[0].params, expected.params)


def test_unfinished_responses_pay(make):
    """The best of each group ran on to the end: the next best one is imitated."""
    _, _, update, state, taken = make("superhf")
    unfinished = taken.replace(finished=jnp.array([True, True, True, False, True, True, False, True]))
    _, metrics = update(state, unfinished, REWARDS)
    np.testing.assert_allclose(metrics["objective/scores_kept"], (0.9 + 0.0) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], REWARDS.mean() - 2.5, rtol=1e-5)


def test_microbatches_on_eight_devices_equal_one_batch_on_one(make):
    """Each response twice, which changes no mean, so four kept rows in two parts; and rewards by token."""
    _, _, update, state, taken = make("superhf")
    expected, metrics = update(state, taken, REWARDS)
    _, algorithm, *_ = make("superhf", accumulate=2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    by_token = jnp.zeros(taken.mask.shape).at[:, 0].set(REWARDS)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), (taken, by_token))
    with jax.set_mesh(mesh):
        update = jax.jit(algorithm.update, in_shardings=(everywhere, spread, spread), out_shardings=everywhere)
        given = (jax.device_put(state, everywhere), *jax.device_put(twice, spread))
        found, found_metrics = jax.block_until_ready(update(*given))
    close(found.params, expected.params)
    close(found_metrics, metrics, atol=1e-5)


def test_an_adapter_is_trained_on_a_transformed_reward_in_one_program(config, policy, sampling, two):
    """The whole step with an ensemble's worst case; the base stays and is the prior."""
    adapter = AdapterConfig(kind="lora", targets=("query", "value"), rank=2)
    options = ImitationConfig(sampling=sampling, samples=4, method=IMITATION["superhf"])
    algorithm = imitation(config, options, optax.sgd(RATE), fixed_kl(BETA), adapter)

    def scorer(params, tokens, mask):
        members = jnp.stack([(tokens == token).sum(axis=1).astype(jnp.float32) for token in (5, 6)])
        return Score(mean=members.mean(axis=0), members=members)

    step = jax.jit(compose(algorithm, scorer, worst_case()))
    state = ComposedState(algorithm=algorithm.init(jax.random.key(3), {"policy": policy}), transform=())
    after, output = step(state, two, ())
    best = jnp.minimum(*output.score.members).reshape(2, 4).max(axis=1)
    np.testing.assert_allclose(output.metrics["objective/scores_kept"], best.mean(), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after.algorithm.reference, policy)
    assert float(output.metrics["grad_norm"]) > 0 and float(output.metrics["loss/kl"]) < 1e-6


# Bad input.


def test_names_and_choices_are_checked(sampling):
    with pytest.raises(ValueError, match="choose one of var, var_online, raft, superhf"):
        imitating("super_hf")
    with pytest.raises(ValueError, match="the weights of raft have no temperature"):
        imitating("raft", temperature=0.5)
    with pytest.raises(ValueError, match="must be positive"):
        imitating("var", temperature=0.0)
    with pytest.raises(ValueError, match="give it, or weights, not both"):
        imitating("var", temperature=0.5, weights=equal_weights)
    with pytest.raises(ValueError, match="set proposal to policy"):
        Imitation("reference", keep=1, prior_kl=True)
    with pytest.raises(ValueError, match="stand in no groups"):
        imitating("var", keep_scope="batch")
    for name, word in (("proposal", "both"), ("reduction", "constant"), ("keep_scope", "prompt")):
        chosen = copy.copy(IMITATION["raft"])
        object.__setattr__(chosen, name, word)  # the types of the tests would refuse it first
        with pytest.raises(ValueError, match=f"{name} is '{word}': choose"):
            chosen.__post_init__()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"samples": 1}, "give 2 or more"),
        ({"method": imitating("raft", keep=9)}, "keep is 9: give 1 to 8"),
        ({"method": imitating("raft", keep=8)}, "rewards decide nothing"),
        ({"sampling": SamplingConfig(max_new_tokens=2, stop_tokens=(3,), top_k=3)}, "samples from the policy"),
    ],
)
def test_bad_options_are_refused(sampling, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ImitationConfig(**({"sampling": sampling} | options))


def test_a_prior_needs_a_coefficient_and_nothing_else_takes_one(config, sampling):
    superhf = ImitationConfig(sampling=sampling, method=IMITATION["superhf"])
    with pytest.raises(ValueError, match="give kl"):
        imitation(config, superhf, optax.sgd(0.1))
    with pytest.raises(ValueError, match="leave out kl"):
        imitation(config, dataclasses.replace(superhf, method=IMITATION["raft"]), optax.sgd(0.1), fixed_kl(0.1))
