"""Reward models of different shapes and kinds as one scorer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.linear_ensemble import LinearEnsembleParams, init_heads, linear_ensemble_scorer
from rlhf_jax.rewards.members import (
    PENALISED,
    RULES,
    Member,
    MemberParams,
    centred,
    members_scorer,
    rule_state,
)
from rlhf_jax.types import Prompts, Rollout

SMALL = ModelConfig(
    vocab_size=12, width=8, layers=1, heads=2, key_value_heads=1, feed_forward_width=12, context_length=16
)
WIDE = dataclasses.replace(SMALL, width=16, layers=2, vocab_size=13)


def test_members_of_different_shapes_are_scored_side_by_side():
    trees = tuple(init_reward_model(config, jax.random.key(seed)) for seed, config in enumerate((SMALL, WIDE)))
    tokens = jax.random.randint(jax.random.key(5), (3, 6), 0, 12, jnp.int32)
    mask = jnp.arange(6)[None] >= jnp.array([0, 2, 3])[:, None]
    offset = jnp.array([0.5, -0.25])
    members = [Member(config, tree) for config, tree in zip((SMALL, WIDE), trees, strict=True)]
    score = members_scorer(members)(MemberParams(trees=trees, offset=offset), tokens, mask)
    for row, (config, tree) in enumerate(zip((SMALL, WIDE), trees, strict=True)):
        alone = reward_scorer(config)(tree, tokens, mask).mean
        np.testing.assert_allclose(score.members[row], alone - offset[row], rtol=1e-6)
    np.testing.assert_array_equal(score.mean, score.members[0])
    np.testing.assert_allclose(score.features, reward_scorer(SMALL)(trees[0], tokens, mask).features, rtol=1e-6)
    rewards = {rule: RULES[rule].apply(score, None, rule_state(rule))[0] for rule in RULES}
    spread = np.abs(score.members[0] - score.members[1]) / 2
    np.testing.assert_allclose(rewards["mean"], score.members.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(rewards["worst_case"], rewards["mean"] - spread, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rewards["lower_confidence_bound"], rewards["mean"] - spread, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rewards["uncertainty_weighted"], rewards["mean"] - 0.5 * spread**2, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rewards["single"], score.members[0])


def test_a_coefficient_belongs_to_a_penalty():
    assert {rule: float(rule_state(rule, 0.3)) for rule in PENALISED} == pytest.approx(dict.fromkeys(PENALISED, 0.3))
    with pytest.raises(ValueError, match="the rule mean has no coefficient"):
        rule_state("mean", 0.3)


def test_one_model_of_any_kind_is_centred_member_by_member():
    trunk = init_reward_model(SMALL, jax.random.key(0))["trunk"]
    heads = init_heads(SMALL, jax.random.key(1), 3)
    params = LinearEnsembleParams(trunk=trunk, heads=heads, offset=jnp.array([5.0, -1.0, 0.0]))
    member = Member(SMALL, params, linear_ensemble_scorer(SMALL))
    tokens = jax.random.randint(jax.random.key(5), (4, 6), 0, 12, jnp.int32)
    prompts = Prompts(tokens=tokens[:, :2], mask=jnp.ones((4, 2), bool), index=jnp.arange(4, dtype=jnp.int32))
    zeros = jnp.zeros((4, 4))
    taken = Rollout(
        prompts=prompts,
        tokens=tokens[:, 2:],
        mask=jnp.ones((4, 4), bool),
        logprob=zeros,
        sampling_logprob=zeros,
        finished=jnp.ones(4, bool),
    )
    found = centred([member], [(list(range(4)), taken)])
    score = members_scorer([member])(found, tokens, jnp.ones((4, 6), bool))
    np.testing.assert_allclose(score.members.mean(axis=1), np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(score.mean, score.members.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(score.epistemic, np.std(score.members, axis=0), rtol=1e-5)
