"""`select` is the transform that its index names, whatever batches the states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rewards import ensemble, last_layer
from rlhf_jax.rewards.transforms import select
from rlhf_jax.types import Score

TRANSFORMS = (
    ensemble.single(),
    ensemble.worst_case(),
    ensemble.uncertainty_weighted(),
    last_layer.advpo(ema=0.5, rescale="std"),
    last_layer.samplewise(),
)


@pytest.fixture
def world(key):
    keys = jax.random.split(key, 5)
    members = jax.random.normal(keys[0], (3, 6))
    score = Score(mean=members.mean(axis=0), features=jax.random.normal(keys[1], (6, 4)), members=members)
    reference = Score(mean=jax.random.normal(keys[2], (6,)), features=jax.random.normal(keys[3], (6, 4)))
    geometry = last_layer.geometry(last_layer.gram(jax.random.normal(keys[4], (20, 4))), 0.1)
    radius = 1.5
    states = (
        TRANSFORMS[0].init(),
        TRANSFORMS[1].init(),
        TRANSFORMS[2].init(0.3),
        TRANSFORMS[3].init(geometry, radius),
        TRANSFORMS[4].init(geometry, radius, last_layer.uncertainty(geometry, reference.features, radius).mean()),
    )
    return score, reference, states


def test_each_index_applies_its_transform_and_changes_only_its_state(world):
    score, reference, states = world
    chosen = select(TRANSFORMS)
    traced = []

    @jax.jit
    def apply(*arguments):
        traced.append(arguments)
        return chosen.apply(*arguments)

    for index, transform in enumerate(TRANSFORMS):
        rewards, state, metrics = apply(score, reference, chosen.init(index, states))
        expected, own, expected_metrics = transform.apply(score, reference, states[index])
        np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-6)
        for name, value in metrics.items():
            np.testing.assert_allclose(value, expected_metrics.get(name, np.nan), rtol=1e-5, err_msg=name)
        after = (*states[:index], own, *states[index + 1 :])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.states, after)
        assert int(state.index) == index
    assert len(traced) == 1


def test_metrics_are_the_union_and_missing_ones_are_nan(world):
    score, reference, states = world
    chosen = select(TRANSFORMS)
    metrics = chosen.apply(score, reference, chosen.init(1, states))[2]
    assert {"rewards/robust", "uncertainty/displacement", "uncertainty/multiplier"} <= set(metrics)
    assert np.isnan(metrics["uncertainty/multiplier"]) and np.isfinite(metrics["uncertainty/mean"])


@pytest.mark.parametrize("batched", ["vmap", "map"])
def test_lanes_of_different_methods_are_one_program(batched, world):
    score, reference, states = world
    chosen = select(TRANSFORMS)
    lanes = [chosen.init(index, states) for index in (4, 0, 3, 2, 1, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)

    def step(state):
        return chosen.apply(score, reference, state)[0]

    rewards = jax.jit(jax.vmap(step) if batched == "vmap" else lambda state: jax.lax.map(step, state))(stacked)
    for lane, state in enumerate(lanes):
        index = int(state.index)
        np.testing.assert_allclose(
            rewards[lane], TRANSFORMS[index].apply(score, reference, states[index])[0], rtol=1e-5, atol=1e-6
        )


def test_the_state_keeps_its_structure_through_a_scan(world):
    score, reference, states = world
    chosen = select(TRANSFORMS)

    def step(state, _):
        rewards, state, metrics = chosen.apply(score, reference, state)
        return state, (rewards, metrics)

    state, (rewards, _) = jax.lax.scan(step, chosen.init(3, states), length=4)
    assert rewards.shape == (4, 6) and int(state.states[3].steps) == 4


def test_without_a_reference_transforms_that_need_none_still_run(world):
    score, _, states = world
    chosen = select(TRANSFORMS[:3])
    rewards = chosen.apply(score, None, chosen.init(0, states[:3]))[0]
    np.testing.assert_array_equal(rewards, score.mean)


def test_wrong_use_is_an_error_with_a_remedy(world):
    _, _, states = world
    with pytest.raises(ValueError, match="at least one transform"):
        select([])
    with pytest.raises(ValueError, match="5 transforms but was given 2 states"):
        select(TRANSFORMS).init(0, states[:2])
    with pytest.raises(ValueError, match="index 5 names none"):
        select(TRANSFORMS).init(5, states)
