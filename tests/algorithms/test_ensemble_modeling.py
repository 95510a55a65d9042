import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.ensemble_modeling import (
    bootstrap_weights,
    linear_ensemble_modeling,
    linear_ensemble_params,
    lora_ensemble_modeling,
    lora_ensemble_params,
    pair_scores,
)
from rlhf_jax.algorithms.in_place import in_place
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.reward_modeling import reward_modeling
from rlhf_jax.losses.reward import bradley_terry
from rlhf_jax.models.adapters import AdapterConfig, adapter_size
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_reward_model, reward_features
from rlhf_jax.rewards.linear_ensemble import linear_ensemble_scorer
from rlhf_jax.rewards.lora_ensemble import lora_ensemble_scorer, nuclear_diversity
from rlhf_jax.types import PreferenceBatch, Sequences

MEMBERS, PAIRS = 3, 8
NOISY = {"bootstrap": True, "label_smoothing": 0.1, "centring": 0.05}
LORA = AdapterConfig(kind="lora", targets=("query", "down"), rank=2, alpha=4.0)


def sequences(key, rows: int) -> Sequences:
    length = jax.random.randint(jax.random.fold_in(key, 1), (rows, 1), 2, 7)
    place = jnp.arange(6)[None]
    return Sequences(tokens=jax.random.randint(key, (rows, 6), 5, 12, jnp.int32), mask=place < length)


@pytest.fixture(scope="module")
def pairs() -> PreferenceBatch:
    return PreferenceBatch(
        chosen=sequences(jax.random.key(0), PAIRS),
        rejected=sequences(jax.random.key(1), PAIRS),
        margin=jnp.linspace(-0.3, 0.4, PAIRS),
        label=jnp.linspace(0.2, 1.0, PAIRS),
        index=jnp.arange(100, 100 + PAIRS, dtype=jnp.int32),
    )


@functools.cache
def linear(config, optimizer="sgd", members=MEMBERS, **options):
    """An algorithm and its functions, compiled once for all tests."""
    algorithm = linear_ensemble_modeling(config, optimizer_of(optimizer), members, **options)
    return algorithm._replace(init=jax.jit(algorithm.init), update=jax.jit(algorithm.update))


@functools.cache
def lora(config, optimizer="adam", **options):
    algorithm = lora_ensemble_modeling(config, optimizer_of(optimizer), LORA, MEMBERS, **options)
    return algorithm._replace(init=jax.jit(algorithm.init), update=jax.jit(algorithm.update))


@functools.cache
def optimizer_of(name: str):
    return {
        "sgd": optax.sgd(0.1),
        "adam": adam(0.01),
        "decay": optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)),
    }[name]


@functools.cache
def single(config, **options):
    algorithm = reward_modeling(config, optimizer_of("adam"), **options)
    return algorithm._replace(init=jax.jit(algorithm.init), update=jax.jit(algorithm.update))


@functools.cache
def pair_features(config):
    """Features of both sides of the pairs."""
    return jax.jit(
        lambda trunk, batch: tuple(
            reward_features(config, trunk, side.tokens, side.mask) for side in (batch.chosen, batch.rejected)
        )
    )


def rows(batch, count: int):
    return jax.tree.map(lambda leaf: leaf[:count], batch)


def place(tree, member: int):
    return jax.tree.map(lambda leaf: leaf[member], tree)


def close(found, expected, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def off_span(config, trunk, batch, count=2):
    """Orthonormal directions [count, D] that no difference of the features of a pair has a part in."""
    chosen, rejected = pair_features(config)(trunk, batch)
    directions = np.linalg.svd(np.asarray(chosen, np.float64) - np.asarray(rejected))[2]
    assert len(directions) - len(chosen) >= count
    return directions[-count:]


# Linear heads


def test_one_member_is_one_reward_model(config, pairs):
    one = linear(config, "adam", members=1, label_smoothing=0.1, centring=0.05)
    alone = single(config, label_smoothing=0.1, centring=0.05)
    expected = alone.init(jax.random.key(0))
    heads = jax.tree.map(lambda leaf: leaf[None], expected.params["head"])
    state = one.init(jax.random.key(1), {"trunk": expected.params["trunk"], "heads": heads})
    for _ in range(2):
        state, metrics = one.update(state, pairs)
        expected, expected_metrics = alone.update(expected, pairs)
    found = {"trunk": state.params["trunk"], "head": place(state.params["heads"], 0)}
    close(found, expected.params, atol=1e-5)
    close({name: metrics[name] for name in expected_metrics}, expected_metrics)
    assert float(metrics["uncertainty/mean"]) == 0.0


def test_the_loss_is_the_mean_of_the_members_losses(config, pairs):
    algorithm = linear(config, **NOISY)
    state = algorithm.init(jax.random.key(0))
    score = jax.jit(lambda state: pair_scores(linear_ensemble_scorer(config), linear_ensemble_params(state), pairs))
    chosen, rejected = score(state)
    weights = np.asarray(bootstrap_weights(state.key, pairs.index, MEMBERS))
    losses = [
        bradley_terry(chosen[:, m], rejected[:, m], pairs.margin, 0.1, 0.05, label=pairs.label) for m in range(MEMBERS)
    ]
    _, metrics = algorithm.update(state, pairs)
    np.testing.assert_allclose(metrics["loss/reward"], (np.stack(losses, axis=1) * weights).mean(), rtol=1e-5)
    margins = np.asarray(chosen - rejected)
    np.testing.assert_allclose(metrics["rewards/margins"], margins.mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["rewards/accuracies"], (margins.mean(axis=1) > 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["uncertainty/mean"], margins.std(axis=1).mean(), rtol=1e-4)
    assert weights.std() > 0


def test_the_gradient_of_zero_heads_is_half_the_mean_difference_of_features_a_member(config, pairs):
    """At R = 0 and without margins and labels, d loss / d phi_m = -(1 / 2M) mean(e_chosen - e_rejected)."""
    algorithm, plain = linear(config), pairs.replace(margin=jnp.zeros(PAIRS), label=jnp.ones(PAIRS))
    state = algorithm.init(jax.random.key(0))
    heads = jax.tree.map(jnp.zeros_like, state.params["heads"])
    state = state.replace(params={**state.params, "heads": heads})
    after, _ = algorithm.update(state, plain)
    chosen, rejected = pair_features(config)(state.params["trunk"], pairs)
    expected = 0.1 * 0.5 / MEMBERS * np.asarray(chosen - rejected).mean(axis=0)
    for kernel in after.params["heads"]["kernel"]:
        np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-7)


def test_heads_on_a_frozen_trunk_move_in_the_span_of_the_differences_they_saw_and_the_trunk_does_not(config, pairs):
    algorithm, few = linear(config, train_trunk=False), rows(pairs, 4)
    state = algorithm.init(jax.random.key(0))
    after = state
    for _ in range(5):
        after, _ = algorithm.update(after, few)
    moved = np.asarray(after.params["heads"]["kernel"] - state.params["heads"]["kernel"], np.float64)
    assert (np.linalg.norm(moved, axis=1) > 1e-2).all()
    outside = moved @ off_span(config, state.base["trunk"], few, count=4).T
    np.testing.assert_allclose(outside, 0.0, atol=2e-7)
    assert "trunk" not in state.params
    jax.tree.map(np.testing.assert_array_equal, after.base, state.base)


@pytest.mark.parametrize(("optimizer", "prior_decay"), [("sgd", 0.0), ("sgd", 1.5), ("decay", 0.0)])
def test_decay_to_the_start_keeps_the_disagreement_off_the_span_and_decay_to_zero_destroys_it(
    config, pairs, optimizer, prior_decay
):
    """Weight decay w at the rate l multiplies what the data do not see by (1 - l w) a step, here 0.95."""
    algorithm, few, steps = linear(config, optimizer, train_trunk=False, prior_decay=prior_decay), rows(pairs, 4), 30
    state = algorithm.init(jax.random.key(0))
    after = state
    for _ in range(steps):
        after, _ = algorithm.update(after, few)
    directions = off_span(config, state.base["trunk"], few, count=4)

    def spread(state):
        return (np.asarray(state.params["heads"]["kernel"], np.float64) @ directions.T).std(axis=0)

    left = 0.95**steps if optimizer == "decay" else 1.0
    np.testing.assert_allclose(spread(after), left * spread(state), rtol=1e-4, atol=1e-6)
    assert spread(state).min() > 0.01


def test_prior_decay_pulls_each_head_to_its_own_start(config, pairs):
    """One step of gradient descent: less rate * decay * (head - start) / M, beside the step without decay."""
    plain, decayed = linear(config, **NOISY), linear(config, prior_decay=0.7, **NOISY)
    state = decayed.init(jax.random.key(0))
    heads = jax.tree.map(lambda leaf: leaf + 0.5, state.start)
    moved = {**state.params, "heads": heads}
    found, _ = decayed.update(state.replace(params=moved), pairs)
    expected, _ = plain.update(plain.init(jax.random.key(0)).replace(params=moved), pairs)
    pull = jax.tree.map(lambda leaf: leaf - 0.1 * 0.7 * 0.5 / MEMBERS, expected.params["heads"])
    close(found.params, {"trunk": expected.params["trunk"], "heads": pull}, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found.start, state.start)


def test_a_step_with_prior_decay_may_donate_its_state(config, pairs):
    algorithm = linear(config, prior_decay=1.5)
    state = linear_ensemble_modeling(config, optimizer_of("sgd"), MEMBERS, prior_decay=1.5).init(jax.random.key(3))
    expected, _ = algorithm.update(state, pairs)
    found, _ = in_place(algorithm.update)(state, pairs)
    close(found, expected)


def test_the_order_of_members_does_not_matter(config, pairs):
    algorithm, order = linear(config), jnp.array([2, 0, 1])
    state = algorithm.init(jax.random.key(0))
    permuted = {**state.params, "heads": jax.tree.map(lambda leaf: leaf[order], state.params["heads"])}
    expected, expected_metrics = algorithm.update(state, pairs)
    found, metrics = algorithm.update(state.replace(params=permuted), pairs)
    close(metrics, expected_metrics)
    close(found.params["heads"], jax.tree.map(lambda leaf: leaf[order], expected.params["heads"]))
    close(found.params["trunk"], expected.params["trunk"])


def test_microbatches_are_one_batch(config, pairs):
    whole, parts = (linear(config, prior_decay=0.7, **NOISY, **options) for options in ({}, {"accumulate": 2}))
    state = whole.init(jax.random.key(0))
    state = state.replace(start=jax.tree.map(lambda leaf: leaf - 0.3, state.start))
    found, expected = parts.update(state, pairs), whole.update(state, pairs)
    close((found[0].params, found[1]), (expected[0].params, expected[1]), atol=2e-6)


def test_rows_without_tokens_only_fill_the_batch(config, pairs):
    algorithm = linear(config, prior_decay=0.7, **NOISY)
    state = algorithm.init(jax.random.key(0))
    emptied = jnp.arange(PAIRS)[:, None] >= 6
    filled = pairs.replace(rejected=pairs.rejected.replace(mask=pairs.rejected.mask & ~emptied))
    found, expected = algorithm.update(state, filled), algorithm.update(state, rows(pairs, 6))
    close((found[0].params, found[1]), (expected[0].params, expected[1]))


def test_twenty_heads_train_for_at_most_a_tenth_more_than_one():
    """XLA's own count, which has the body of the scan over layers once: the true ratio is smaller still."""
    config = ModelConfig(
        vocab_size=64, width=64, layers=2, heads=4, key_value_heads=4, feed_forward_width=128, context_length=64
    )
    shape = jax.ShapeDtypeStruct
    side = {"tokens": shape((4, 32), jnp.int32), "mask": shape((4, 32), jnp.bool_)}

    def flops(algorithm) -> float:
        def step(state, chosen, rejected, margin):
            return algorithm.update(
                state, PreferenceBatch(chosen=Sequences(**chosen), rejected=Sequences(**rejected), margin=margin)
            )

        state = jax.eval_shape(algorithm.init, jax.random.key(0))
        return jax.jit(step).lower(state, side, side, shape((4,), jnp.float32)).compile().cost_analysis()["flops"]

    one = flops(reward_modeling(config, optimizer_of("adam")))
    many = flops(linear_ensemble_modeling(config, optimizer_of("adam"), 20, prior_decay=0.1))
    assert one < many <= 1.1 * one


# Bootstrap weights


def test_bootstrap_weights_are_poisson_variables_of_mean_one():
    found = np.asarray(bootstrap_weights(jax.random.key(0), jnp.arange(5000, dtype=jnp.int32), 8))
    assert found.shape == (5000, 8) and (found == found.astype(int)).all()
    error = 5 / found.size**0.5  # five standard errors of a variable of variance 1
    np.testing.assert_allclose(found.mean(), 1.0, atol=error)
    for count, probability in enumerate([0.367879, 0.367879, 0.183940, 0.061313, 0.015328]):
        bound = 5 * (probability * (1 - probability) / found.size) ** 0.5
        np.testing.assert_allclose((found == count).mean(), probability, atol=bound)
    correlation = np.corrcoef(found.T) - np.eye(8)
    assert np.abs(correlation).max() < 5 / 5000**0.5  # members draw independently


def test_a_pair_has_the_same_weights_wherever_it_stands():
    key, index = jax.random.key(0), jnp.array([7, 3, 11, 3], jnp.int32)
    found = np.asarray(bootstrap_weights(key, index, 40))
    np.testing.assert_array_equal(found[1], found[3])
    np.testing.assert_array_equal(np.asarray(bootstrap_weights(key, index[::-1], 40))[::-1], found)
    assert (found[0] != found[1]).any()
    assert (np.asarray(bootstrap_weights(jax.random.key(1), index, 40)) != found).any()


# Low-rank adapters


def test_the_second_stage_is_training_each_member_alone(config, pairs):
    stage_1 = linear(config).init(jax.random.key(0))
    algorithm = lora(config, centring=0.05)
    state = algorithm.init(jax.random.key(1), stage_1.params)
    jax.tree.map(np.testing.assert_array_equal, state.params["heads"], stage_1.params["heads"])
    one, after = single(config, centring=0.05, adapter=LORA), state
    for _ in range(3):
        after, metrics = algorithm.update(after, pairs)
    fresh = one.init(jax.random.key(2), {"trunk": stage_1.params["trunk"], "head": place(stage_1.params["heads"], 0)})
    losses = []
    for member in range(MEMBERS):
        params = {"trunk": place(state.params["adapters"], member), "head": place(state.params["heads"], member)}
        alone = fresh.replace(params=params)
        for _ in range(3):
            alone, alone_metrics = one.update(alone, pairs)
        found = {"trunk": place(after.params["adapters"], member), "head": place(after.params["heads"], member)}
        close(found, alone.params, rtol=1e-3, atol=2e-5)
        losses.append(alone_metrics["loss/reward"])
    np.testing.assert_allclose(metrics["loss/reward"], np.mean(losses), rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, after.base, {"trunk": stage_1.params["trunk"]})


def test_fresh_members_differ_by_their_heads_only_and_then_go_apart(config, pairs):
    algorithm = lora(config, centring=0.05)
    state = algorithm.init(jax.random.key(0))
    assert adapter_size(state.params["adapters"]) == MEMBERS * (2 * (8 + 8) + 2 * (12 + 8))  # query 8 x 8, down 12 x 8
    scorer = jax.jit(lora_ensemble_scorer(config, LORA))
    same = lora_ensemble_params(state)
    same = same.replace(heads=jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], MEMBERS, axis=0), same.heads))
    tokens = pairs.chosen.tokens, pairs.chosen.mask
    np.testing.assert_allclose(scorer(same, *tokens).epistemic, 0.0, atol=1e-6)
    after = state.replace(params={**state.params, "heads": same.heads})
    for _ in range(3):
        after, _ = algorithm.update(after, pairs)
    trained = lora_ensemble_params(after).replace(heads=same.heads)
    assert float(scorer(trained, *tokens).epistemic.max()) > 1e-4  # the adapters differ though the heads do not


def test_the_diversity_term_raises_the_nuclear_norm(config, pairs):
    plain, diverse = lora(config, "sgd"), lora(config, "sgd", diversity=0.5)
    state = plain.init(jax.random.key(0))
    before = state.params["adapters"]
    found, expected = diverse.update(state, pairs)[0].params, plain.update(state, pairs)[0].params
    gradient = jax.jit(jax.grad(nuclear_diversity))(before)
    pushed = jax.tree.map(lambda leaf, slope: leaf + 0.1 * 0.5 * slope, expected["adapters"], gradient)
    close(found["adapters"], pushed, rtol=1e-3, atol=1e-6)
    close(found["heads"], expected["heads"])
    assert float(nuclear_diversity(found["adapters"])) > float(nuclear_diversity(before)) + 0.1


def test_microbatches_of_adapters_are_one_batch(config, pairs):
    whole, parts = lora(config, "sgd", diversity=0.5), lora(config, "sgd", diversity=0.5, accumulate=2)
    state = whole.init(jax.random.key(0))
    found, expected = parts.update(state, pairs), whole.update(state, pairs)
    close((found[0].params, found[1]), (expected[0].params, expected[1]), atol=2e-6)


# Bad input


def test_bad_options_are_refused(config, pairs):
    make, adapters = linear_ensemble_modeling, lora_ensemble_modeling
    sgd = optimizer_of("sgd")
    with pytest.raises(ValueError, match="an ensemble of 0 members"):
        make(config, sgd, 0)
    with pytest.raises(ValueError, match="an ensemble of -1 members"):
        adapters(config, sgd, LORA, -1)
    with pytest.raises(ValueError, match=r"prior_decay is -0\.1; it must not be negative"):
        make(config, sgd, 2, prior_decay=-0.1)
    with pytest.raises(ValueError, match=r"diversity is -1\.0; it must not be negative"):
        adapters(config, sgd, LORA, 2, diversity=-1.0)
    with pytest.raises(ValueError, match="the matrix a of a low-rank adapter, which 'ssl' has not"):
        adapters(config, sgd, AdapterConfig(kind="ssl"), 2, diversity=0.1)
    with pytest.raises(ValueError, match="there is no role 'head' in this algorithm: name the trees trunk, heads"):
        make(config, sgd, 2).init(jax.random.key(0), {"head": {}})
    with pytest.raises(ValueError, match=r"kernel of shape \[2, 8\], but 3 members of width 8 need \[3, 8\]"):
        jax.eval_shape(
            lambda key: make(config, sgd, 3).init(key, {"heads": {"kernel": jnp.zeros((2, 8)), "bias": jnp.zeros(2)}}),
            jax.random.key(0),
        )
    algorithm = make(config, sgd, 2, bootstrap=True)
    state = jax.eval_shape(algorithm.init, jax.random.key(0))
    with pytest.raises(ValueError, match="fill the `index` of the batch"):
        jax.eval_shape(lambda state: algorithm.update(state, pairs.replace(index=None)), state)


def test_parameters_are_those_of_one_trunk_and_the_heads(config):
    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    one = jax.eval_shape(lambda key: init_reward_model(config, key), jax.random.key(0))
    state = jax.eval_shape(linear_ensemble_modeling(config, optimizer_of("sgd"), 5).init, jax.random.key(0))
    assert size(state.params) == size(one["trunk"]) + 5 * size(one["head"])
