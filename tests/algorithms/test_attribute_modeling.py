"""Training of reward models of distributions: both stages of URM, quantiles, and PURM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.attribute_modeling import (
    attribute_modeling,
    gate_modeling,
    gaussian_params,
    probabilistic_modeling,
    probabilistic_params,
    quantile_modeling,
    quantile_params,
)
from rlhf_jax.algorithms.fit import fit
from rlhf_jax.algorithms.in_place import in_place
from rlhf_jax.algorithms.optimizer import adam, learning_rate_schedule
from rlhf_jax.losses.attributes import gaussian_likelihood, probabilistic_preference, rating_statistics
from rlhf_jax.losses.reward import bradley_terry
from rlhf_jax.rewards.gaussian import GaussianEnsembleParams, gaussian_ensemble_scorer, gaussian_scorer
from rlhf_jax.rewards.probabilistic import probabilistic_scorer
from rlhf_jax.rewards.quantile import quantile_scorer
from rlhf_jax.types import AttributeBatch, PreferenceBatch, Sequences

K, STEPS = 2, 200
RANDOM = np.random.default_rng(0)


def sequences(key, rows: int, last: int) -> Sequences:
    """A prompt of two tokens and a completion of one to four that ends in `last`, right-padded."""
    length = jax.random.randint(jax.random.fold_in(key, 1), (rows, 1), 3, 7)
    place = jnp.arange(6)[None]
    tokens = jax.random.randint(key, (rows, 6), 5, 10, jnp.int32)
    mask = place < length
    return Sequences(tokens=jnp.where(place == length - 1, last, tokens), mask=mask, loss_mask=mask & (place >= 2))


@pytest.fixture(scope="module")
def rated() -> AttributeBatch:
    """Eight texts; one rating of each attribute is not known, and one text has none."""
    ratings = RANDOM.normal(2.0, 1.5, (8, K)).astype(np.float32)
    ratings[0, 0] = ratings[1, 1] = ratings[5] = np.nan
    ratings = jnp.asarray(ratings)
    return AttributeBatch(sequences=sequences(jax.random.key(0), 8, 10), ratings=ratings, known=~jnp.isnan(ratings))


@pytest.fixture(scope="module")
def pairs() -> PreferenceBatch:
    return PreferenceBatch(
        chosen=sequences(jax.random.key(1), 8, 10),
        rejected=sequences(jax.random.key(2), 8, 11),
        margin=jnp.linspace(0.0, 0.5, 8),
        label=jnp.linspace(0.6, 1.0, 8),
    )


@pytest.fixture(scope="module")
def stage_one(config, rated):
    """`train(**options) -> (state before, state after, metrics)` of one step of gradient descent."""

    @functools.cache
    def update(**options):
        algorithm = attribute_modeling(config, optax.sgd(0.1), K, **options)
        return jax.jit(algorithm.init), jax.jit(algorithm.update)

    def train(batch=rated, steps=0, **options):
        init, step = update(**options)
        mean, scale = rating_statistics(rated.ratings, rated.known)
        state = init(jax.random.key(3), {"mean": mean, "scale": scale}).replace(step=jnp.int32(steps))
        return state, *step(state, batch)

    return train


def close(found, expected, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def pick(tree, rows):
    return jax.tree.map(lambda leaf: leaf[np.array(rows)], tree)


# Stage 1.


def test_the_loss_is_the_likelihood_of_normalised_ratings_averaged_over_rated_texts(config, rated, stage_one):
    state, _, metrics = stage_one()
    ratings = (rated.ratings - state.base["mean"][None]) / state.base["scale"][None]
    score = jax.jit(gaussian_scorer(config))
    columns = []
    for attribute in range(K):
        params = gaussian_params(state)
        output = {**params.gate["output"], "bias": 1e3 * jax.nn.one_hot(attribute, K)}
        found = score(
            params.replace(gate={**params.gate, "output": output}), rated.sequences.tokens, rated.sequences.mask
        )
        columns.append(
            (
                (found.mean - params.mean[attribute]) / params.scale[attribute],
                jnp.log(found.aleatoric / params.scale[attribute]),
            )
        )
    mean, log_deviation = (jnp.stack(parts, axis=1) for parts in zip(*columns, strict=True))
    losses = gaussian_likelihood(mean, log_deviation, ratings, rated.known)
    np.testing.assert_allclose(metrics["loss/attributes"], losses.sum() / 7, rtol=1e-4)
    error = np.nanmean(np.square(np.where(rated.known, ratings - mean, np.nan)))
    np.testing.assert_allclose(metrics["attributes/squared_error"], error, rtol=1e-4)
    np.testing.assert_allclose(metrics["uncertainty/mean"], 1.0, rtol=1e-4)  # a fresh head's standard deviation


def test_texts_without_ratings_or_tokens_only_fill_the_batch(rated, stage_one):
    kept = [0, 1, 2, 3, 4, 6]
    _, expected, metrics = stage_one(pick(rated, kept))
    emptied = rated.sequences.mask & (jnp.arange(8) != 7)[:, None]
    _, found, filled = stage_one(rated.replace(sequences=rated.sequences.replace(mask=emptied)))
    close(found.params, expected.params)
    close(filled, metrics)


def test_an_attribute_that_is_never_rated_is_not_trained(rated, stage_one):
    state, after, _ = stage_one(rated.replace(known=rated.known.at[:, 1].set(False)))
    for name in ("kernel", "bias"):
        before, after_step = (np.moveaxis(np.asarray(one.params["attributes"][name]), -1, 0) for one in (state, after))
        np.testing.assert_array_equal(after_step[[1, 3]], before[[1, 3]])
        assert (after_step[[0, 2]] != before[[0, 2]]).any()


def test_samples_are_the_same_in_microbatches_and_new_in_every_step(stage_one):
    state, whole, metrics = stage_one(loss="sampled")
    _, parts, in_parts = stage_one(loss="sampled", accumulate=2)
    close(parts.params, whole.params)
    close(in_parts, metrics)
    _, again, _ = stage_one(loss="sampled")
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    _, _, next_step = stage_one(loss="sampled", steps=1)  # with the same parameters
    assert float(metrics["loss/attributes"]) != float(next_step["loss/attributes"])
    assert int(whole.step) == int(state.step) + 1


def test_the_warm_up_trains_the_mean_as_under_the_squared_error(stage_one):
    state, after, metrics = stage_one(warmup=1)
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(
            after.params["attributes"][name][..., K:], state.params["attributes"][name][..., K:]
        )
        assert (after.params["attributes"][name][..., :K] != state.params["attributes"][name][..., :K]).any()
    _, later, _ = stage_one()  # a fresh head's deviations are 1, so that its means have the same first step
    close(after.params["attributes"]["kernel"][:, :K], later.params["attributes"]["kernel"][:, :K])
    assert float(metrics["uncertainty/mean"]) == 1.0


# What each can learn: texts of two kinds, with ratings of different spread.


@pytest.fixture(scope="module")
def kinds() -> AttributeBatch:
    """64 texts, alternately "5 10", whose ratings vary by about 0.5, and "5 11", whose ratings vary by about 2."""
    kind = np.arange(64) % 2
    tokens = np.stack([np.full(64, 5), 10 + kind], axis=1).astype(np.int32)
    ratings = np.where(kind, 1.0, 4.0) + np.where(kind, 2.0, 0.5) * np.random.default_rng(1).normal(size=64)
    mask = jnp.ones((64, 2), bool)
    return AttributeBatch(
        sequences=Sequences(tokens=jnp.asarray(tokens), mask=mask),
        ratings=jnp.asarray(ratings[:, None], jnp.float32),
        known=jnp.ones((64, 1), bool),
    )


def trained(algorithm, batch, key, params=None):
    order = jnp.tile(jnp.arange(64, dtype=jnp.int32)[None], (STEPS, 1))
    return fit(algorithm.update, algorithm.init(key, params), batch, order)[0]


def optimizer():
    return adam(learning_rate_schedule(0.03, STEPS, shape="cosine"))


def test_likelihood_learns_the_deviations_and_samples_lower_them(config, kinds):
    mean, scale = rating_statistics(kinds.ratings, kinds.known)
    rows = kinds.sequences.tokens[:2], kinds.sequences.mask[:2]
    groups = np.asarray(kinds.ratings)[0::2], np.asarray(kinds.ratings)[1::2]
    found = {}
    for loss in ("likelihood", "sampled"):
        algorithm = attribute_modeling(config, optimizer(), 1, loss=loss)

        def member(key):
            return gaussian_params(trained(algorithm, kinds, key, {"mean": mean, "scale": scale}))  # noqa: B023

        models = jax.jit(jax.vmap(member))(jax.random.split(jax.random.key(4), 2))
        ensemble = GaussianEnsembleParams(members=models, offset=jnp.zeros(2))
        found[loss] = jax.jit(gaussian_ensemble_scorer(config))(ensemble, *rows)
    likely = found["likelihood"]
    np.testing.assert_allclose(likely.members, np.broadcast_to([x.mean() for x in groups], (2, 2)), atol=0.1)
    np.testing.assert_allclose(likely.aleatoric, [x.std() for x in groups], rtol=0.05)
    assert (found["sampled"].aleatoric < 0.5 * likely.aleatoric).all()


def test_quantile_heads_learn_the_quantiles(config, kinds):
    levels = jnp.array([0.1, 0.25, 0.5, 0.75, 0.9])
    mean, scale = rating_statistics(kinds.ratings, kinds.known)
    algorithm = quantile_modeling(config, optimizer(), levels)
    given = {"mean": mean, "scale": scale}
    params = jax.jit(lambda: quantile_params(trained(algorithm, kinds, jax.random.key(5), given)))()
    score = jax.jit(quantile_scorer(config, centre="median"))
    rows = kinds.sequences.tokens[:2], kinds.sequences.mask[:2]
    median = score(params, *rows)
    ratings = np.asarray(kinds.ratings)[:, 0]
    for kind in range(2):
        mine = np.sort(ratings[kind::2])
        # 32 ratings: every quantile lies between the two that are next to its level, up to the last step's length.
        low, high = mine[15] - 0.1, mine[16] + 0.1
        assert low <= float(median.mean[kind]) <= high
        spread = np.subtract(*np.quantile(mine, [0.75, 0.25])) / 1.349
        np.testing.assert_allclose(median.aleatoric[kind], spread, rtol=0.2)


def test_the_levels_outlive_a_state_that_is_donated(config, kinds):
    levels = jnp.array([0.25, 0.75])
    algorithm = quantile_modeling(config, optax.sgd(0.1), levels)
    state = algorithm.init(jax.random.key(0))
    assert not any(leaf is levels for leaf in jax.tree.leaves(state))
    in_place(algorithm.update)(state, kinds)
    np.testing.assert_array_equal(algorithm.init(jax.random.key(1)).base["levels"], np.float32([0.25, 0.75]))


# Stage 2.


@pytest.fixture(scope="module")
def model(config):
    """A model of stage 1 whose attributes disagree."""
    state = jax.jit(attribute_modeling(config, optax.sgd(0.1), K).init)(jax.random.key(6))
    given = {"mean": jnp.array([3.0, 1.0]), "scale": jnp.array([1.0, 2.0])}
    return {**state.params, **given}


@pytest.mark.parametrize("gate", ["response", "prompt"])
def test_a_gate_is_trained_by_bradley_terry_and_nothing_else_moves(config, pairs, model, gate):
    algorithm = gate_modeling(config, optax.sgd(0.1), gate=gate, hidden=4)
    state, update = jax.jit(algorithm.init)(jax.random.key(7), model), jax.jit(algorithm.update)
    first, metrics = update(state, pairs)
    second, later = update(first, pairs)
    jax.tree.map(np.testing.assert_array_equal, second.base, {name: model[name] for name in second.base})
    assert set(second.params) == {"gate"} and set(second.base) == {"trunk", "attributes", "mean", "scale"}
    score = jax.jit(gaussian_scorer(config, gate=gate, prompt_length=2 if gate == "prompt" else None))
    for at, found in ((state, metrics), (first, later)):
        chosen, rejected = (
            score(gaussian_params(at), side.tokens, side.mask) for side in (pairs.chosen, pairs.rejected)
        )
        expected = bradley_terry(chosen.mean, rejected.mean, pairs.margin, label=pairs.label).mean()
        np.testing.assert_allclose(found["loss/reward"], expected, rtol=1e-4)
        np.testing.assert_allclose(found["rewards/margins"], (chosen.mean - rejected.mean).mean(), rtol=1e-3, atol=1e-5)
        deviation = (chosen.aleatoric + rejected.aleatoric).mean() / 2
        np.testing.assert_allclose(found["uncertainty/mean"], deviation, rtol=1e-4)
    assert float(later["loss/reward"]) < float(metrics["loss/reward"])


def test_a_prompt_gate_needs_to_know_where_prompts_end(config, pairs, model):
    algorithm = gate_modeling(config, optax.sgd(1.0), gate="prompt", hidden=4)
    state = jax.eval_shape(algorithm.init, jax.random.key(7), model)
    blind = pairs.replace(chosen=pairs.chosen.replace(loss_mask=None), rejected=pairs.rejected.replace(loss_mask=None))
    with pytest.raises(ValueError, match="must know where it ends: give sequences with a loss_mask"):
        jax.eval_shape(algorithm.update, state, blind)


# PURM.


def test_probabilistic_rewards_are_trained_by_the_likelihood_of_preferences(config, pairs):
    algorithm = probabilistic_modeling(config, optax.sgd(0.05))
    state, update = jax.jit(algorithm.init)(jax.random.key(8)), jax.jit(algorithm.update)
    after, metrics = update(state, pairs)
    score = jax.jit(probabilistic_scorer(config))
    sides = [score(probabilistic_params(state), side.tokens, side.mask) for side in (pairs.chosen, pairs.rejected)]
    logs = [(side.mean, jnp.log(side.aleatoric)) for side in sides]
    expected = probabilistic_preference(*logs, pairs.margin, pairs.label).mean()
    np.testing.assert_allclose(metrics["loss/reward"], expected, rtol=1e-5)
    assert float(update(after, pairs)[1]["loss/reward"]) < float(metrics["loss/reward"])
    assert (after.params["head"]["kernel"] != state.params["head"]["kernel"]).any(axis=0).all()


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": 0}, "a head for 0 attributes predicts nothing"),
        ({"attributes": 2, "loss": "mse"}, "loss is 'mse'; choose one of likelihood, sampled"),
        ({"attributes": 2, "loss": "sampled", "beta": 0.5}, "leave beta out"),
        ({"attributes": 2, "beta": 2.0}, "beta is 2.0; it must be between 0 and 1"),
        ({"attributes": 2, "warmup": -1}, "warmup is -1"),
    ],
)
def test_impossible_options_are_errors(config, options, message):
    with pytest.raises(ValueError, match=message):
        attribute_modeling(config, optax.sgd(0.1), **options)


def test_other_numbers_of_attributes_and_missing_roles_are_errors(config, rated, model):
    sgd = optax.sgd(0.1)
    three = attribute_modeling(config, sgd, 3)
    with pytest.raises(ValueError, match="the batch has ratings of 2 attributes, the head 3"):
        jax.eval_shape(lambda key: three.update(three.init(key), rated), jax.random.key(0))
    with pytest.raises(ValueError, match="the given head has 2 attributes, not 3"):
        three.init(jax.random.key(0), {"attributes": model["attributes"]})
    with pytest.raises(ValueError, match=r"params\['scale'\] has the shape \(2,\): give one number for each of the 3"):
        three.init(jax.random.key(0), {"scale": jnp.ones(2)})
    with pytest.raises(ValueError, match="there is no role 'head' in this algorithm"):
        three.init(jax.random.key(0), {"head": {}})
    with pytest.raises(ValueError, match=r"give params\['attributes'\], from attribute_modeling"):
        gate_modeling(config, sgd).init(jax.random.key(0), {"trunk": model["trunk"]})
    with pytest.raises(ValueError, match="the gate reads 'middle'; choose one of response, prompt"):
        gate_modeling(config, sgd, gate="middle")
    quantiles = quantile_modeling(config, sgd, jnp.array([0.25, 0.75]))
    with pytest.raises(ValueError, match="give batches of one attribute, not 2"):
        jax.eval_shape(lambda key: quantiles.update(quantiles.init(key), rated), jax.random.key(0))


@pytest.mark.parametrize("levels", [[0.5], [0.75, 0.25], [0.3, 0.9], [0.1, 0.7], [0.0, 0.8], [0.2, 1.0]])
def test_levels_must_increase_and_hold_the_quartiles(config, levels):
    with pytest.raises(ValueError, match="levels of quantiles must increase from"):
        quantile_modeling(config, optax.sgd(0.1), jnp.array(levels))
