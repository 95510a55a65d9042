"""Scores in one unit, rules that fit a kind, and lanes that differ in their rule alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.laboratory.arms import Plan
from rlhf_jax.laboratory.comparison import Schedule
from rlhf_jax.laboratory.uncertain_kinds import Kind
from rlhf_jax.laboratory.uncertainty_study import (
    RULES,
    Coefficients,
    Prepared,
    contest_of,
    flops,
    parameters_trained,
    prepare,
    reward_of,
    served,
    standardised,
    with_offset,
)
from rlhf_jax.rewards.bradley_terry import EnsembleParams, ensemble_scorer
from rlhf_jax.rewards.ellipsoid import Geometry
from rlhf_jax.types import Score


def sums(options, setting):
    """A kind that scores by the sum of the token ids, which is its uncertainty too; "power" is the only parameter."""

    def score(params, tokens, mask):
        total = jnp.where(mask, tokens, 0).sum(axis=1).astype(jnp.float32) / 100.0
        members = jnp.stack([total, 3.0 * total]) * params["power"]
        return Score(mean=members.mean(axis=0), members=members, epistemic=total)

    return score


KIND = Kind("sums", train=None, scorer=sums, trained=lambda params: params)


def test_rules_go_by_what_a_kind_offers():
    rules = tuple(RULES)
    assert served(rules, frozenset()) == ("mean",)
    assert served(rules, frozenset({"aleatoric", "features"})) == ("mean",)
    assert served(rules, frozenset({"members"})) == ("mean", "WCO", "UWO", "LCB")
    assert served(rules, frozenset({"features", "head", "epistemic"})) == (
        "mean", "UWO", "LCB", "AdvPO", "sample-wise",
    )  # fmt: skip


def test_scores_are_put_into_standard_deviations(options, setting, pools, initial):
    params = {"power": jnp.array([1.0, -5.0])}
    prepared, offered = prepare(options, setting, KIND, params, pools, initial.sequences)
    assert offered == {"members", "epistemic"}
    assert prepared.geometry is prepared.radius is None
    for seed, scale in enumerate((1.0, 5.0)):
        own = jax.tree.map(lambda leaf, seed=seed: leaf[seed], prepared)
        score = standardised(sums(options, setting))(own, initial.sequences.tokens, initial.sequences.mask)
        np.testing.assert_allclose([score.mean.mean(), score.mean.std()], [0.0, 1.0], atol=1e-5)
        total = np.where(initial.sequences.mask, initial.sequences.tokens, 0).sum(axis=1)
        np.testing.assert_allclose(score.epistemic, total / (2.0 * scale * total.std()), rtol=1e-4)
        np.testing.assert_allclose(score.members[1], 3.0 * score.members[0], rtol=1e-5)
    prompts = len(setting.world.prompts.tokens)
    assert prepared.reference.mean.shape == (options.seeds, prompts) and prepared.reference.features is None


def test_a_kind_that_scores_everything_alike_is_refused(options, setting, pools, initial):
    with pytest.raises(ValueError, match="sums of seed 1 scores all samples of the initial policy alike"):
        prepare(options, setting, KIND, {"power": jnp.array([1.0, 0.0])}, pools, initial.sequences)


def test_members_are_centred_on_samples_of_the_initial_policy(options, setting, members, initial):
    one = jax.tree.map(lambda leaf: leaf[0], members)
    params = EnsembleParams(members=one, offset=jnp.zeros(options.members))
    scorer = jax.jit(ensemble_scorer(setting.reward_config, options.features))
    rows = initial.sequences
    centred = scorer(with_offset(params, scorer(params, rows.tokens, rows.mask)), rows.tokens, rows.mask)
    np.testing.assert_allclose(centred.members.mean(axis=1), 0.0, atol=1e-5)
    assert with_offset({"head": 1}, centred) == {"head": 1}  # what has no offset stays


@pytest.fixture
def prepared():
    """Two seeds with a score each, and features of width 2."""
    one = Prepared(
        params={"weight": jnp.ones(())},
        centre=jnp.zeros(()),
        spread=jnp.ones(()),
        geometry=Geometry(cholesky=jnp.eye(2)),
        radius=jnp.array(0.5),
        uncertainty=jnp.zeros(()),
        reference=Score(mean=jnp.zeros(3), features=jnp.zeros((3, 2))),
    )
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
    return both._replace(params={"weight": jnp.array([1.0, 2.0])}, radius=jnp.array([0.5, 1.0]))


def test_lanes_of_a_seed_differ_in_their_rule_alone(prepared, setting):
    def scorer(params, tokens, mask):
        return Score(mean=params["weight"] * jnp.ones(2), features=jnp.eye(2), epistemic=jnp.array([1.0, 3.0]))

    rules = ("mean", "UWO", "LCB", "AdvPO", "sample-wise")
    reward = reward_of(scorer, rules, prepared, Coefficients(uwo=0.5, lcb=2.0))
    plan = Plan(model=setting.policy_config, value=setting.reward_config, sampling=setting.sampling)
    contest = contest_of(plan, setting, reward, Schedule(2, 4, 2, 2), jax.random.key(0), len(rules))
    assert contest.schedule.seeds == 10
    for what in ("state", "prompts", "measure"):
        keys = [jax.random.key_data(contest.key_of(what, jnp.int32(lane))).tolist() for lane in range(10)]
        assert keys[:2] * 5 == keys and keys[0] != keys[1]
    rewards = []
    for lane in range(10):
        own = contest.one_seed(jnp.int32(lane), prepared)
        score = reward.scorer(own.params, jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool))
        reference = jax.tree.map(lambda leaf: leaf[:2], own.reference)
        rewards.append(reward.rule.apply(score, reference, own.state)[0])
    half = 0.5**0.5
    expected = [  # by hand: uncertainty is 1 and 3; AdvPO moves by b M^-1 g / |g| with g = (1/2, 1/2); U is b
        [1.0, 1.0], [2.0, 2.0], [0.5, -3.5], [1.5, -2.5], [-1.0, -5.0], [0.0, -4.0],
        [1.0 - 0.5 * half, 1.0 - 0.5 * half], [2.0 - half, 2.0 - half], [0.5, 0.5], [1.0, 1.0],
    ]  # fmt: skip
    np.testing.assert_allclose(np.stack(rewards), expected, rtol=1e-5)


def test_costs_are_of_one_seed(options, setting):
    params = {"power": jnp.ones(2), "more": jnp.ones((2, 7))}
    assert parameters_trained(KIND, params) == 8
    assert flops(options, setting, KIND, params) > 0
