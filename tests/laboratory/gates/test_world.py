import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.fit import epoch_orders
from rlhf_jax.laboratory.gates import lengths, ratings, smoothing, world
from rlhf_jax.laboratory.gates.cheap_ensembles import agreement, cheap_members
from rlhf_jax.laboratory.gates.world import make_ground
from rlhf_jax.types import Score


@pytest.fixture(scope="module")
def sizes(options):
    return dataclasses.replace(options, methods=("PPO",), reward_epochs=2, value_net="separate")


@pytest.fixture(scope="module")
def ground(sizes, setting):
    patch = pytest.MonkeyPatch()
    patch.setattr(world, "VALIDATION", 8)
    yield make_ground(sizes, setting)
    patch.undo()


def test_the_best_of_all_answers_by_gold_is_the_best_there_is(ground):
    assert (ground.gold.shape, ground.lengths.shape) == ((2, 4), (2, 4))
    np.testing.assert_allclose([ground.gold.mean(), ground.gold.std()], [0.0, 1.0], atol=1e-12)
    scores = np.stack([ground.gold.ravel(), -ground.gold.ravel()])
    np.testing.assert_allclose(ground.picked(scores), [ground.gold.max(axis=1).mean(), ground.gold.min(axis=1).mean()])


def test_every_seed_has_comparisons_of_its_own_that_know_their_place(ground, sizes):
    assert np.asarray(ground.pools.index).tolist() == [list(range(sizes.pairs))] * sizes.seeds
    assert not np.array_equal(*np.asarray(ground.pools.chosen.tokens))
    assert ground.validation.index is None and len(ground.validation.margin) == 8


def test_lengths_count_the_response_alone(ground, setting):
    mask = np.asarray(ground.answers.mask)[:, -setting.world.response_length :]
    np.testing.assert_array_equal(ground.lengths.ravel(), mask.sum(axis=1))


def test_smoothing_at_rate_0_is_bradley_terry_and_changes_it_otherwise(ground):
    plain, still, moving = (smoothing.train_by_epoch(ground, rate) for rate in (None, 0.0, 1.0))
    assert plain.loss.shape == plain.accuracy.shape == (2, 2)
    np.testing.assert_allclose(plain.loss, still.loss, rtol=1e-6)
    # With rate 1 labels are what the model says after the first visit: the first epoch is as before, up to its labels.
    np.testing.assert_allclose(plain.loss[:, 0], moving.loss[:, 0], rtol=1e-6)
    assert (np.abs(plain.loss[:, 1] - moving.loss[:, 1]) > 1e-5).all()
    scores = smoothing.scores_of(ground, plain.params)
    assert scores.shape == (2, 8) and np.isfinite(ground.picked(scores)).all()


def test_agreement_by_hand():
    """Members that differ by scale and offset agree; against a third that orders one prompt the other way, by half."""
    one = np.array([0.0, 1.0, 2.0, 3.0, 5.0, 4.0])
    turned = np.concatenate([one[:3], -one[3:]])
    found = agreement(np.stack([[one, 3 * one + 7], [one, turned], [one, -one]]), prompts=2)
    np.testing.assert_allclose(found, [1.0, 0.0, -1.0], atol=1e-12)


def test_cheap_members_score_every_answer(ground, sizes):
    found = cheap_members(ground)
    assert {name: scores.shape for name, scores in found.items()} == {"linear": (2, 2, 8), "LoRA": (2, 2, 8)}
    assert all(np.isfinite(scores).all() and (np.ptp(scores, axis=1) > 0).all() for scores in found.values())


def test_prompts_are_of_the_topics_asked_for_and_ratings_are_terms_of_the_rubric(setting):
    prompts = ratings.prompts_of((3, 7), 40, np.random.default_rng(0))
    topics = ratings.read_prompts(np.asarray(prompts.tokens))[0]
    assert set(topics) == {3, 7}
    rated = ratings.rate(setting, jax.tree.map(lambda leaf: leaf[:4], prompts), 2, jax.random.key(0))
    assert rated.ratings.shape == (8, 5)
    assert ((rated.ratings >= 0) & (rated.ratings <= 1)).all()
    np.testing.assert_array_equal(rated.long[::2], rated.long[1::2])


def test_sharpness_by_hand():
    """Sigma is the error itself in one attribute and one half of it, in the other order, in the other."""
    truth = np.zeros((1, 3, 2))
    error = np.array([1.0, 2.0, 3.0])
    mean = np.stack([error, error], axis=1)[None, None]
    deviation = np.stack([error, 0.5 * error[::-1]], axis=1)[None, None]
    rank, coverage = ratings.sharpness(ratings.Read(mean, deviation, mean[..., 0]), truth)
    np.testing.assert_allclose(rank, [0.0], atol=1e-12)
    np.testing.assert_allclose(coverage, [4 / 6])  # all of the first, and 1 <= 1.5 of the second


def test_the_gates_of_ratings_have_one_number_a_seed(sizes, setting, monkeypatch):
    monkeypatch.setattr(ratings, "setting_of", lambda options: setting)
    stage = ratings.ratings_gates(sizes, answers=4)
    assert [gate.values.shape for gate in stage.gates] == [(2,)] * 8
    assert len({gate.name for gate in stage.gates}) == 8


def test_annotators_who_like_length_pay_for_it(sizes, setting, monkeypatch):
    monkeypatch.setattr(lengths, "setting_of", lambda options: setting)
    found = lengths.long_setting(sizes)
    prompt = np.asarray(setting.world.prompts.tokens[:1]).repeat(2, axis=0)
    tokens = np.zeros((2, 14), np.int32)
    mask = np.arange(14) < np.array([[3], [9]])
    rubric, gold = setting.world.gold(prompt, tokens, mask), found.world.gold(prompt, tokens, mask)
    other = np.arange(14) < np.array([[3], [12]])
    further = setting.world.gold(prompt, tokens, other), found.world.gold(prompt, tokens, other)
    # gold = a rubric + b length + c: from two differences, a and b are positive and the same whatever the lengths.
    slope = np.linalg.solve(
        [[rubric[1] - rubric[0], 6.0], [further[0][1] - further[0][0], 9.0]],
        [gold[1] - gold[0], further[1][1] - further[1][0]],
    )
    assert (slope > 0).all()


def test_correlation_with_length_by_hand():
    """1 in the first prompt, -1 in the second, none in the third, whose answers are equally long."""
    sizes = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])
    scores = np.array([[5.0, 7.0, 9.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert lengths.length_correlation(scores, sizes) == pytest.approx(0.0)
    assert lengths.length_correlation(scores[:1], sizes[:1]) == pytest.approx(1.0)
    assert lengths.length_correlation(scores[2:], sizes[2:]) == 0.0


def test_the_reward_of_length_alone_is_largest_for_the_longest_answers():
    reward = lengths.length_only(4, seeds=2)
    tokens = jnp.zeros((2, 6), jnp.int32)
    mask = jnp.array([[True] * 3 + [False] * 3, [True] * 6])
    score = reward.scorer((), tokens, mask)
    assert isinstance(score, Score)
    assert score.mean.tolist() == [0.25, 1.0]
    assert reward.of(reward.data[0]).reference is None


def test_orders_of_the_epochs_are_of_whole_passes(sizes):
    """What `train_by_epoch` relies on when it cuts orders into epochs."""
    order = epoch_orders(jax.random.key(0), sizes.pairs, sizes.reward_batch, 2).reshape(2, -1)
    assert [sorted(one) for one in order.tolist()] == [list(range(24))] * 2
