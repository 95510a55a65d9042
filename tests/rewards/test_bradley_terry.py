import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.rewards.bradley_terry import EnsembleParams, check_rewards, ensemble_scorer, reward_scorer
from rlhf_jax.rewards.ensemble import member_offset, uncertainty_weighted, worst_case


@pytest.fixture(scope="module")
def members(config):
    return jax.jit(jax.vmap(lambda key: init_reward_model(config, key)))(jax.random.split(jax.random.key(1), 3))


@functools.cache
def scorer_of(config, features="final_norm"):
    """A scorer that is compiled once for all tests."""
    return jax.jit(reward_scorer(config, features))


@functools.cache
def ensemble_scorer_of(config, lead=None):
    return jax.jit(ensemble_scorer(config, lead=lead))


def member(members, place: int):
    return jax.tree.map(lambda leaf: leaf[place], members)


@pytest.mark.parametrize("features", ["final_norm", "pre_norm"])
def test_the_score_is_rebuilt_from_features_head_and_bias(members, features, config, tokens, mask):
    params = member(members, 0)
    params = {**params, "head": {**params["head"], "bias": jnp.float32(0.75)}}
    score = scorer_of(config, features)(params, tokens, mask)
    head = np.asarray(params["head"]["kernel"], np.float64)
    np.testing.assert_allclose(score.mean, np.asarray(score.features, np.float64) @ head + 0.75, rtol=1e-5, atol=1e-6)
    assert score.mean.dtype == score.features.dtype == jnp.float32


@pytest.mark.parametrize("features", ["final_norm", "pre_norm"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 4), (4, 0), (3, 2)])
def test_padding_does_not_matter(members, features, left, right, config, tokens, mask):
    scorer = scorer_of(config, features)
    expected = scorer(member(members, 0), tokens, mask)
    widths = ((0, 0), (left, right))
    padded = jnp.pad(jnp.where(mask, tokens, 9), widths, constant_values=9)
    found = scorer(member(members, 0), padded, jnp.pad(mask, widths))
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.features, expected.features, rtol=1e-4, atol=1e-5)


def test_an_ensemble_is_a_loop_over_its_members(members, config, tokens, mask):
    params = EnsembleParams(members=members, offset=jnp.array([0.5, -1.0, 0.0]))
    score = ensemble_scorer_of(config)(params, tokens, mask)
    each = [scorer_of(config)(member(members, m), tokens, mask).mean - params.offset[m] for m in range(3)]
    np.testing.assert_allclose(score.members, np.stack(each), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score.mean, np.mean(each, axis=0), rtol=1e-4, atol=1e-5)
    assert score.features is None


@pytest.mark.parametrize("lead", [0, 2])
def test_the_lead_member_gives_mean_and_features(members, lead, config, tokens, mask):
    params = EnsembleParams(members=members, offset=jnp.array([0.5, -1.0, 0.25]))
    score = ensemble_scorer_of(config, lead)(params, tokens, mask)
    alone = scorer_of(config)(member(members, lead), tokens, mask)
    np.testing.assert_allclose(score.mean, alone.mean - params.offset[lead], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score.features, alone.features, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(score.mean, score.members[lead])


def test_a_constant_added_to_a_member_changes_nothing_once_offsets_are_fixed_on_reference_samples(
    members, config, tokens, mask
):
    head = members["head"]
    shifted = {**members, "head": {**head, "bias": head["bias"] + jnp.array([3.0, -7.0, 0.0])}}
    scorer = ensemble_scorer_of(config)
    reference = tokens[::-1]

    def centred(stack):
        raw = scorer(EnsembleParams(members=stack, offset=jnp.zeros(3)), reference, mask[::-1])
        return scorer(EnsembleParams(members=stack, offset=member_offset(raw.members)), tokens, mask)

    found, expected = centred(shifted), centred(members)
    np.testing.assert_allclose(found.members, expected.members, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.members.mean(axis=1), 0.0, atol=1e-5)  # here the samples are the reference's
    for rule in (worst_case(), uncertainty_weighted()):
        state = rule.init() if rule.init.__code__.co_argcount == 0 else rule.init(0.5)
        np.testing.assert_allclose(
            rule.apply(found, None, state)[0], rule.apply(expected, None, state)[0], rtol=1e-4, atol=1e-4
        )


def test_the_order_of_sequences_does_not_matter(members, config, tokens, mask):
    params = EnsembleParams(members=members, offset=jnp.zeros(3))
    scorer = ensemble_scorer_of(config)
    found, expected = scorer(params, tokens[::-1], mask[::-1]), scorer(params, tokens, mask)
    np.testing.assert_allclose(found.members[:, ::-1], expected.members, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_is_an_error_that_names_its_row(bad):
    rewards = np.array([0.5, 1.0, bad, 2.0, bad])
    with pytest.raises(ValueError, match=r"the judge returned -?(nan|inf) for row 2 \(2 of 5 values are not finite\)"):
        check_rewards(rewards, "the judge")
    by_token = np.zeros((3, 4))
    by_token[1, 3] = bad
    with pytest.raises(ValueError, match="for row 1"):
        check_rewards(by_token)
    check_rewards(jnp.array([0.0, -1.5]))
