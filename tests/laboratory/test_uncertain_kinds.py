"""Labels of annotators, last-layer geometries, and what kinds say of themselves; training runs in the experiment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.laboratory.last_layers import GEOMETRIES, natural_square, pair_features
from rlhf_jax.laboratory.rated_kinds import RATED, STANDARDS, careless, rate, standards_of
from rlhf_jax.laboratory.setting import gold_of, repeated, sample
from rlhf_jax.laboratory.uncertain_kinds import COMPARED, Labels, ensemble, rows_between
from rlhf_jax.laboratory.uncertainty_study import KINDS
from rlhf_jax.models.heads import reward_features
from rlhf_jax.rewards.ellipsoid import leverage


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(40, 3)), jnp.float32) for _ in range(2))


def test_a_standard_deviation_in_the_fisher_geometry_has_radius_one(pair):
    head = {"kernel": jnp.array([1.0, -0.5, 0.0])}
    shape = GEOMETRIES["fisher"](pair, head, 0.5)
    np.testing.assert_allclose(natural_square(shape, pair, head, 0.5), 3.0, rtol=1e-4)  # tr(M M^-1) = D


def test_where_nothing_is_known_pairs_say_four_times_as_much_as_their_fisher_information(pair):
    head = {"kernel": jnp.zeros(3)}  # p (1 - p) = 1/4
    pairs, fisher = (GEOMETRIES[name](pair, head, weight) for name, weight in (("pair", 2.0), ("fisher", 0.5)))
    np.testing.assert_allclose(pairs.cholesky, 2.0 * fisher.cholesky, rtol=1e-5)
    np.testing.assert_allclose(natural_square(pairs, pair, head, 0.5), 12.0, rtol=1e-4)


def test_the_geometry_of_single_responses_has_seen_both_sides(pair):
    shape = GEOMETRIES["individual"](pair, None, 1.0)
    both = np.concatenate(pair)
    expected = np.einsum("nd,de,ne->n", both, np.linalg.inv(np.eye(3) + both.T @ both), both)
    np.testing.assert_allclose(leverage(shape, jnp.asarray(both)), expected, rtol=1e-4)


def test_features_of_pairs_are_those_that_a_head_reads(options, setting, pools):
    pool = jax.tree.map(lambda leaf: leaf[0, :3], pools)
    trunk = jax.tree.map(lambda leaf: leaf[0], setting.trunks)
    for side, found in zip((pool.chosen, pool.rejected), pair_features(options, setting, trunk, pool), strict=True):
        expected = reward_features(setting.reward_config, trunk, side.tokens, side.mask, options.features)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_standards_add_up_to_the_gold(setting):
    rollout = sample(setting, repeated(setting.world.prompts, np.arange(48) % 16), jax.random.key(4))
    ratings = standards_of(rollout)
    assert ratings.shape == (48, len(STANDARDS))
    np.testing.assert_allclose(ratings.sum(axis=1), gold_of(setting.world, rollout), atol=1e-12)


def test_careless_ratings_are_those_of_other_responses_at_twice_the_noise():
    true = np.arange(4000.0)[:, None] * np.array([[1.0, -2.0]])
    found = careless(np.random.default_rng(0), true, 0.25)
    np.testing.assert_array_equal(found[:, 1], -2.0 * found[:, 0])  # one response's ratings stay together
    assert 0.46 < np.mean(found[:, 0] != true[:, 0]) < 0.54  # 0.5 less one in 4,000; five standard errors are 0.04
    np.testing.assert_array_equal(careless(np.random.default_rng(0), true, 0.0), true)


def test_rating_i_answers_prompt_i_cycling(setting):
    found = rate(setting, jax.random.key(4), 48, 0.0, np.random.default_rng(0))
    prompts = np.asarray(setting.world.prompts.tokens)
    np.testing.assert_array_equal(found.sequences.tokens[:, : prompts.shape[1]], prompts[np.arange(48) % 16])
    assert found.ratings.shape == (48, len(STANDARDS)) and found.known.all()


def test_an_untrained_ensemble_has_no_offsets():
    members = {"head": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 3))}}
    assert ensemble(members).offset.shape == (2, 3) and not ensemble(members).offset.any()


def test_rows_between():
    assert rows_between({"a": jnp.arange(5)}, 1, 3)["a"].tolist() == [1, 2]


def test_one_reward_model_has_what_adversarial_policies_need(options, setting, pools):
    """The posterior is of the very model that "single" is, so that only the uncertainty differs."""
    labels = Labels(pools, None)
    single = COMPARED["single"].train(options, setting, labels, jax.random.key(3))
    posterior = COMPARED["posterior-fisher"].train(options, setting, labels, jax.random.key(3))
    np.testing.assert_array_equal(posterior.head["kernel"], single["head"]["kernel"])
    np.testing.assert_allclose(posterior.radius, np.ones(options.seeds), rtol=1e-3)


def test_the_table_of_kinds(options):
    assert next(iter(KINDS)) == "single" and set(RATED) == {name for name, kind in KINDS.items() if kind.rated}
    assert [name for name, kind in KINDS.items() if kind.starts] == ["starts"]
    for kind in KINDS.values():
        assert kind.geometry in GEOMETRIES and kind.passes(options) > 0
    assert KINDS["seeds"].passes(options) == options.members * KINDS["single"].passes(options)
