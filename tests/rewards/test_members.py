"""Reward models of different shapes as one scorer, and what is refused before they are read."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.rewards import members as members_module
from rlhf_jax.rewards import named
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.members import (
    PENALISED,
    RULES,
    Member,
    MemberParams,
    check_member,
    check_rule,
    members_scorer,
    rule_state,
)
from rlhf_jax.rewards.named import read_reward

SMALL = ModelConfig(
    vocab_size=12, width=8, layers=1, heads=2, key_value_heads=1, feed_forward_width=12, context_length=16
)
WIDE = dataclasses.replace(SMALL, width=16, layers=2, vocab_size=13)


def test_members_of_different_shapes_are_scored_side_by_side():
    trees = tuple(init_reward_model(config, jax.random.key(seed)) for seed, config in enumerate((SMALL, WIDE)))
    tokens = jax.random.randint(jax.random.key(5), (3, 6), 0, 12, jnp.int32)
    mask = jnp.arange(6)[None] >= jnp.array([0, 2, 3])[:, None]
    offset = jnp.array([0.5, -0.25])
    score = members_scorer([SMALL, WIDE])(MemberParams(trees=trees, offset=offset), tokens, mask)
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
    with pytest.raises(ValueError, match="needs at least 2 reward models, not 1"):
        check_rule("uncertainty_weighted", 1)
    check_rule("worst_case", 1)


def tokenizer(vocabulary):
    return SimpleNamespace(get_vocab=lambda: {token: id for id, token in enumerate(vocabulary)})


@pytest.mark.parametrize(
    ("known", "config", "sentence"),
    [
        ("abd", SMALL, "another vocabulary than the policy .1 tokens differ: 'c' is 2 for the policy and no id for"),
        ("acb", SMALL, "2 tokens differ: 'b' is 1 for the policy and 2 for the reward model"),
        ("abc", dataclasses.replace(SMALL, vocab_size=11), "knows 11 tokens and the policy 12"),
        ("abc", dataclasses.replace(SMALL, context_length=9), "reads at most 9 tokens, fewer than the 10"),
    ],
)
def test_a_reward_model_must_be_able_to_read_the_policy(monkeypatch, known, config, sentence):
    monkeypatch.setattr(members_module, "load_config", lambda folder: config)
    monkeypatch.setattr(members_module, "load_tokenizer", lambda folder: tokenizer(known))
    with pytest.raises(ValueError, match=sentence):
        check_member("FOLDER", SMALL, tokenizer("abc"), 10)
    monkeypatch.setattr(members_module, "load_config", lambda folder: SMALL)
    monkeypatch.setattr(members_module, "load_tokenizer", lambda folder: tokenizer("abc<"))
    check_member("FOLDER", SMALL, tokenizer("abc"), 10)


def test_a_reward_is_a_function_or_folders(monkeypatch):
    rest = ("mean", None, SMALL, tokenizer("abc"), 10)
    assert read_reward(["math:hypot"], *rest) is math.hypot
    monkeypatch.setattr(named, "load_members", lambda folders, *_: [Member(SMALL, folder) for folder in folders])
    assert [member.params for member in read_reward(["one", "two"], *rest)] == ["one", "two"]
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        check_member("nowhere", SMALL, tokenizer("abc"), 10)


def test_reward_models_compute_as_the_policy_does(monkeypatch):
    loaded = lambda folder, dtype, param_dtype, placement: (SMALL, {})  # noqa: E731
    monkeypatch.setattr(members_module, "check_member", lambda *given: None)
    monkeypatch.setattr(members_module, "load_reward_model", loaded)
    policy = dataclasses.replace(SMALL, width=2 * SMALL.width, attention="ring", attention_block=3)
    (member,) = members_module.load_members(["a"], policy, None, 10)
    assert member.config == dataclasses.replace(SMALL, attention="ring", attention_block=3)
