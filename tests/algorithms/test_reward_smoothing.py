"""Soft labels, Iterative Data Smoothing and dropout in reward modelling, on eight pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit

from rlhf_jax.algorithms.fit import fit
from rlhf_jax.algorithms.reward_modeling import preference_scores, refreshed, reward_modeling
from rlhf_jax.losses.reward import bradley_terry
from rlhf_jax.parallel.mesh import MeshShape, make_mesh
from rlhf_jax.parallel.sharding import infer, place_batch
from rlhf_jax.rewards.dropout import draw_masks
from rlhf_jax.training.checkpoints import restore, save
from rlhf_jax.types import PreferenceBatch, Sequences

PAIRS, RATE = 8, 0.3
LABELS = np.linspace(0.3, 1.0, PAIRS, dtype=np.float32)
SCORES = jax.jit(preference_scores, static_argnums=0)


def sequences(seed: int) -> Sequences:
    tokens = jax.random.randint(jax.random.key(seed), (PAIRS, 6), 5, 12, jnp.int32)
    length = jax.random.randint(jax.random.key(seed + 10), (PAIRS, 1), 2, 7)
    return Sequences(tokens=tokens, mask=jnp.arange(6)[None] < length)


@pytest.fixture(scope="module")
def pairs() -> PreferenceBatch:
    return PreferenceBatch(
        chosen=sequences(0),
        rejected=sequences(1),
        margin=jnp.linspace(-0.5, 0.5, PAIRS),
        label=jnp.asarray(LABELS),
        index=jnp.array([3, 1, 4, 0, 5, 9, 2, 6], jnp.int32),
    )


@pytest.fixture(scope="module")
def algorithm(config):
    return reward_modeling(config, optax.sgd(0.5), smoothing_rate=RATE, examples=10)


@pytest.fixture(scope="module")
def update(algorithm):
    return jax.jit(algorithm.update)


@pytest.fixture(scope="module")
def once(algorithm, update, pairs):
    return update(algorithm.init(jax.random.key(0)), pairs)


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def probabilities(config, params, pairs):
    chosen, rejected = SCORES(config, params, pairs)
    return expit(np.asarray(chosen - rejected - pairs.margin))


# Labels.


def test_the_first_visit_uses_the_labels_of_the_batch_and_the_table_moves_to_the_new_model(
    config, algorithm, once, pairs
):
    start, (state, metrics) = algorithm.init(jax.random.key(0)), once
    assert np.isnan(start.labels).all() and start.labels.shape == (10,)
    expected = bradley_terry(*SCORES(config, start.params, pairs), pairs.margin, label=pairs.label).mean()
    np.testing.assert_allclose(metrics["loss/reward"], expected, rtol=1e-5)
    moved = (1 - RATE) * LABELS + RATE * probabilities(config, state.params, pairs)
    np.testing.assert_allclose(state.labels[pairs.index], moved, rtol=1e-5)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(state.labels)), [7, 8])
    np.testing.assert_allclose(metrics["rewards/labels"], moved.mean(), rtol=1e-5)


def test_later_visits_use_the_table(config, once, update, pairs):
    state = once[0]
    again = update(state, pairs.replace(label=jnp.zeros(PAIRS)))[1]["loss/reward"]
    scores = SCORES(config, state.params, pairs)
    expected = bradley_terry(*scores, pairs.margin, label=state.labels[pairs.index]).mean()
    np.testing.assert_allclose(again, expected, rtol=1e-5)


def test_swapped_pairs_train_the_same_model_and_keep_complementary_labels(algorithm, update, once, pairs):
    swapped = PreferenceBatch(
        chosen=pairs.rejected, rejected=pairs.chosen, margin=-pairs.margin, label=1.0 - pairs.label, index=pairs.index
    )
    states = [once[0], update(algorithm.init(jax.random.key(0)), swapped)[0]]
    for _ in range(2):
        close(states[1].params, states[0].params)
        np.testing.assert_allclose(states[1].labels, 1.0 - states[0].labels, rtol=1e-4, atol=1e-6)
        states = [update(state, batch)[0] for state, batch in zip(states, (pairs, swapped), strict=True)]


def test_rows_that_only_fill_the_batch_leave_the_table_alone(algorithm, update, pairs):
    mask = pairs.chosen.mask & (jnp.arange(PAIRS) < 6)[:, None]
    start = algorithm.init(jax.random.key(0))
    state, _ = update(start, pairs.replace(chosen=pairs.chosen.replace(mask=mask)))
    assert np.isnan(state.labels[pairs.index[6:]]).all() and not np.isnan(state.labels[pairs.index[:6]]).any()


def test_a_pair_twice_in_a_batch_has_one_owner():
    found = refreshed(
        jnp.zeros(4), jnp.array([1, 1, 1, 3, 3]), jnp.arange(1.0, 6.0), jnp.array([False, True, True, True, True])
    )
    np.testing.assert_array_equal(found, [0.0, 2.0, 0.0, 4.0])


def test_a_rate_of_0_is_plain_bradley_terry_to_the_bit(config, pairs):
    order = jnp.array([[0, 1, 2, 3], [4, 5, 6, 7], [2, 0, 7, 5]])

    def run(rate, batch):
        algorithm = reward_modeling(
            config, optax.sgd(0.5), smoothing_rate=rate, examples=None if rate is None else PAIRS
        )
        return jax.jit(lambda: fit(algorithm.update, algorithm.init(jax.random.key(0)), batch, order))()

    # Hard labels against no labels: the batch for the smoothed run says nothing of labels either.
    hard = pairs.replace(label=None, index=jnp.arange(PAIRS, dtype=jnp.int32))
    (plain, metrics), (smoothed, with_labels) = run(None, hard.replace(index=None)), run(0.0, hard)
    equal(smoothed.params, plain.params)
    equal({name: with_labels[name] for name in metrics}, metrics)
    np.testing.assert_array_equal(smoothed.labels, np.ones(PAIRS))
    assert plain.labels is None


def test_at_a_rate_of_1_learning_stops_after_a_refresh(config, pairs):
    algorithm = reward_modeling(config, optax.sgd(0.5), smoothing_rate=1.0, examples=10)
    update = jax.jit(algorithm.update)
    state, first = update(algorithm.init(jax.random.key(0)), pairs)
    after, second = update(state, pairs)
    assert float(first["grad_norm"]) > 1e-2 and float(second["grad_norm"]) < 1e-6
    close(after.params, state.params)
    assert ((after.labels[pairs.index] >= 0) & (after.labels[pairs.index] <= 1)).all()


def test_a_resumed_run_is_an_uninterrupted_one(update, once, pairs, tmp_path):
    straight = update(once[0], pairs)
    save(tmp_path / "checkpoint", once[0])
    resumed = update(restore(tmp_path / "checkpoint", once[0]), pairs)
    equal(resumed, straight)


def test_eight_devices_keep_the_table_of_one(config, algorithm, update, once, pairs):
    mesh = make_mesh(MeshShape(data=8))
    expected = update(once[0], pairs)
    with jax.set_mesh(mesh):
        state = jax.device_put(once[0], infer(once[0], mesh, [config]))
        found = jax.block_until_ready(jax.jit(algorithm.update)(state, place_batch(pairs, mesh)))
    close(found[0].labels, expected[0].labels)
    close(found[0].params, expected[0].params)


# Dropout, and microbatches.


def test_microbatches_have_the_masks_and_the_labels_of_the_batch(config, pairs):
    def run(accumulate):
        algorithm = reward_modeling(
            config, optax.sgd(0.5), accumulate=accumulate, smoothing_rate=RATE, examples=10, dropout=0.5
        )
        return jax.jit(algorithm.update)(algorithm.init(jax.random.key(0)), pairs)

    whole, parts = run(1), run(2)
    close((parts[0].params, parts[0].labels, parts[1]), (whole[0].params, whole[0].labels, whole[1]))


def test_the_gradient_of_a_zero_head_with_dropout_is_that_of_masked_features(config, pairs):
    """At r = 0 everywhere, d loss / d head = mean((1/2 - y) m (e_chosen - e_rejected)), m new at every step."""
    algorithm = reward_modeling(config, optax.sgd(1.0), dropout=0.25)
    state = algorithm.init(jax.random.key(0))
    state = state.replace(params={**state.params, "head": jax.tree.map(jnp.zeros_like, state.params["head"])})
    batch = pairs.replace(margin=jnp.zeros(PAIRS))
    units = jnp.eye(config.width)
    features = [
        SCORES(config, {**state.params, "head": {"kernel": unit, "bias": jnp.zeros(())}}, batch) for unit in units
    ]
    difference = np.stack([chosen - rejected for chosen, rejected in features], axis=1)
    update, kernels = jax.jit(algorithm.update), []
    for step in (0, 1):
        after, _ = update(state.replace(step=jnp.int32(step)), batch)
        masks = draw_masks(jax.random.fold_in(state.key, step), PAIRS, config.width, 0.25)
        kernels.append(after.params["head"]["kernel"])
        expected = ((LABELS - 0.5)[:, None] * masks * difference).mean(axis=0)
        np.testing.assert_allclose(kernels[-1], expected, rtol=1e-4, atol=1e-6)
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_without_dropout_and_smoothing_the_state_has_no_more_than_before(config):
    state = jax.eval_shape(reward_modeling(config, optax.sgd(0.1)).init, jax.random.key(0))
    assert state.key is None and state.labels is None


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing_rate": 0.5}, "give examples, the number of pairs"),
        ({"smoothing_rate": 1.5, "examples": 3}, "the smoothing rate is 1.5"),
        ({"dropout": 1.0}, "dropout is 1.0: give a share from 0 to less than 1"),
    ],
)
def test_options_that_cannot_work_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        reward_modeling(config, optax.sgd(0.1), **options)


def test_smoothing_needs_to_know_the_pairs(algorithm, pairs):
    state = jax.eval_shape(algorithm.init, jax.random.key(0))
    with pytest.raises(ValueError, match="give batches an `index`"):
        jax.eval_shape(algorithm.update, state, pairs.replace(index=None))
