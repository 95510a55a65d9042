import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.ensemble import lower_confidence_bound, member_offset, uncertainty_weighted, worst_case
from rlhf_jax.rewards.linear_ensemble import LinearEnsembleParams, apply_heads, init_heads, linear_ensemble_scorer

MEMBERS = 3


@pytest.fixture(scope="module")
def params(config) -> LinearEnsembleParams:

    def build(key) -> LinearEnsembleParams:
        trunk_key, heads_key, bias_key = jax.random.split(key, 3)
        heads = init_heads(config, heads_key, MEMBERS) | {"bias": jax.random.normal(bias_key, (MEMBERS,))}
        trunk = init_reward_model(config, trunk_key)["trunk"]
        return LinearEnsembleParams(trunk=trunk, heads=heads, offset=jnp.array([0.5, -1.0, 0.25]))

    return jax.jit(build)(jax.random.key(1))


@functools.cache
def scorer_of(config, lead=None):
    return jax.jit(linear_ensemble_scorer(config, lead=lead))


@functools.cache
def single_scorer(config):
    return jax.jit(reward_scorer(config))


def head(heads, member: int):
    return jax.tree.map(lambda leaf: leaf[member], heads)


def test_numbers_worked_by_hand():
    heads = {"kernel": jnp.array([[1.0, 0.0], [0.5, 2.0], [-1.0, 1.0]]), "bias": jnp.array([0.0, -1.0, 0.25])}
    found = apply_heads(heads, jnp.array([[3.0, 1.5], [0.0, -2.0]]))
    np.testing.assert_allclose(found, [[3.0, 0.0], [3.5, -5.0], [-1.25, -1.75]])


def test_narrow_features_are_widened_before_the_heads():
    features = jnp.array([[1.0, 1.0]], jnp.bfloat16)
    found = apply_heads({"kernel": jnp.array([[1.0, 1.0 / 512]]), "bias": jnp.zeros(1)}, features)
    assert found.dtype == jnp.float32 and float(found[0, 0]) == 1.0 + 1.0 / 512  # no bfloat16 number


def test_an_ensemble_is_a_loop_over_its_heads(params, config, tokens, mask):
    score = scorer_of(config)(params, tokens, mask)
    alone = [
        single_scorer(config)({"trunk": params.trunk, "head": head(params.heads, m)}, tokens, mask)
        for m in range(MEMBERS)
    ]
    each = np.stack([one.mean for one in alone]) - np.asarray(params.offset)[:, None]
    np.testing.assert_allclose(score.members, each, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(score.mean, each.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(score.epistemic, each.std(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(score.features, alone[0].features, rtol=1e-5, atol=1e-6)


def test_the_mean_is_a_linear_head_on_the_features(params, config, tokens, mask):
    score = scorer_of(config)(params, tokens, mask)
    mean_head = np.asarray(params.heads["kernel"], np.float64).mean(axis=0)
    constant = float(jnp.mean(params.heads["bias"] - params.offset))
    np.testing.assert_allclose(score.mean, np.asarray(score.features) @ mean_head + constant, rtol=1e-5, atol=1e-6)


def test_one_head_is_one_reward_model(params, config, tokens, mask):
    one = LinearEnsembleParams(
        trunk=params.trunk, heads=jax.tree.map(lambda leaf: leaf[:1], params.heads), offset=jnp.zeros(1)
    )
    found = scorer_of(config)(one, tokens, mask)
    expected = single_scorer(config)({"trunk": params.trunk, "head": head(params.heads, 0)}, tokens, mask)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found.epistemic, 0.0)


@pytest.mark.parametrize("lead", [0, 2])
def test_the_lead_member_gives_the_mean(params, lead, config, tokens, mask):
    score = scorer_of(config, lead)(params, tokens, mask)
    np.testing.assert_array_equal(score.mean, score.members[lead])
    np.testing.assert_allclose(score.features, scorer_of(config)(params, tokens, mask).features, rtol=1e-6)


def test_the_order_of_members_does_not_matter(params, config, tokens, mask):
    order = jnp.array([2, 0, 1])
    permuted = LinearEnsembleParams(
        trunk=params.trunk, heads=jax.tree.map(lambda leaf: leaf[order], params.heads), offset=params.offset[order]
    )
    found, expected = scorer_of(config)(permuted, tokens, mask), scorer_of(config)(params, tokens, mask)
    np.testing.assert_allclose(found.members, expected.members[order], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.epistemic, expected.epistemic, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [worst_case, uncertainty_weighted, lower_confidence_bound])
def test_constants_of_members_change_no_objective_once_offsets_are_fixed_on_reference_samples(
    params, rule, config, tokens, mask
):
    shifted = {**params.heads, "bias": params.heads["bias"] + jnp.array([3.0, -7.0, 0.0])}
    reference, transform = (tokens[::-1], mask[::-1]), rule()

    def rewards(heads):
        raw = params.replace(heads=heads, offset=jnp.zeros(MEMBERS))
        centred = raw.replace(offset=member_offset(scorer_of(config)(raw, *reference).members))
        return transform.apply(scorer_of(config)(centred, tokens, mask), None, transform.init())[0]

    np.testing.assert_allclose(rewards(shifted), rewards(params.heads), rtol=1e-4, atol=1e-5)


def test_an_ensemble_has_the_parameters_of_one_trunk_and_its_heads(params, config):
    def size(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    one = jax.eval_shape(lambda key: init_reward_model(config, key), jax.random.key(0))
    assert size(params.trunk) + size(params.heads) == size(one["trunk"]) + MEMBERS * size(one["head"])
    assert size(one["head"]) == config.width + 1


def test_members_start_apart_and_like_one_reward_head(config):
    heads = init_heads(config, jax.random.key(5), 400)
    np.testing.assert_allclose(np.std(heads["kernel"]), (config.width + 1) ** -0.5, rtol=5 * (2 * 3200) ** -0.5)
    assert (np.abs(np.diff(np.asarray(heads["kernel"]), axis=0)).max(axis=1) > 0.05).all()
    np.testing.assert_array_equal(heads["bias"], np.zeros(400))


def test_no_members_are_refused(config):
    with pytest.raises(ValueError, match="an ensemble of 0 members cannot be made"):
        init_heads(config, jax.random.key(0), 0)


def test_twenty_heads_cost_at_most_a_tenth_more_than_one():
    """XLA's own count, which has the body of the scan over layers once: the true ratio is smaller still."""
    config = ModelConfig(
        vocab_size=64, width=64, layers=2, heads=4, key_value_heads=4, feed_forward_width=128, context_length=64
    )

    def build(key) -> LinearEnsembleParams:
        heads = init_heads(config, key, 20)
        return LinearEnsembleParams(trunk=init_reward_model(config, key)["trunk"], heads=heads, offset=heads["bias"])

    model = jax.eval_shape(lambda key: init_reward_model(config, key), jax.random.key(0))
    ensemble, shape = jax.eval_shape(build, jax.random.key(0)), jax.ShapeDtypeStruct
    rows = shape((4, 32), jnp.int32), shape((4, 32), jnp.bool_)

    def flops(scorer, params) -> float:
        return jax.jit(scorer).lower(params, *rows).compile().cost_analysis()["flops"]

    one = flops(reward_scorer(config), model)
    many = flops(linear_ensemble_scorer(config), ensemble)
    assert one > 4 * 32 * 2 * 64 * (4 * 64 + 3 * 128)  # at least the linear layers of one block
    assert one < many <= 1.1 * one
