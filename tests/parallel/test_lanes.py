"""Lanes give the same numbers however they are batched and split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.parallel.lanes import choose_rule, over_lanes

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


def descend(lane, target):
    """A small run: noisy gradient descent with a learning rate and a length of its own."""

    def step(carry):
        position, weights = carry
        noise = jax.random.normal(jax.random.fold_in(lane["key"], position), weights.shape)
        return position + 1, weights - lane["rate"] * (weights - target["centre"] + 0.1 * noise)

    steps, weights = jax.lax.while_loop(lambda carry: carry[0] < lane["steps"], step, (jnp.int32(0), target["start"]))
    return {"weights": weights, "loss": jnp.square(weights - target["centre"]).sum(), "steps": steps}


def lanes_of(count: int):
    return {
        "key": jax.random.split(jax.random.key(0), count),
        "rate": jnp.linspace(0.01, 0.5, count),
        "steps": jnp.arange(count, dtype=jnp.int32) % 4 + 1,
    }


TARGET = {"centre": jnp.array([1.0, -2.0, 0.5]), "start": jnp.zeros(3)}


def python_loop(lanes, target):
    count, alone = lanes["rate"].shape[0], jax.jit(descend)
    runs = [alone(jax.tree.map(lambda leaf: leaf[lane], lanes), target) for lane in range(count)]  # noqa: B023
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("rule", ["vmap", "map"])
@pytest.mark.parametrize(("count", "devices"), [(4, 1), (8, 8), (16, 4), (11, 8), (3, 8), (1, 8)])
def test_rules_and_devices_equal_a_python_loop(rule, count, devices):
    lanes = lanes_of(count)
    lifted = jax.jit(over_lanes(descend, rule, jax.devices()[:devices]))
    assert_equal(jax.block_until_ready(lifted(lanes, TARGET)), python_loop(lanes, TARGET))


def test_all_local_devices_are_the_default():
    lanes = lanes_of(8)
    found = jax.block_until_ready(jax.jit(over_lanes(descend))(lanes, TARGET))
    assert found["loss"].sharding.device_set == set(jax.local_devices())
    assert_equal(found, python_loop(lanes, TARGET))


def test_jit_changes_nothing():
    lanes = lanes_of(5)
    lifted = over_lanes(descend, "vmap")
    assert_equal(jax.block_until_ready(lifted(lanes, TARGET)), jax.block_until_ready(jax.jit(lifted)(lanes, TARGET)))


@pytest.mark.parametrize("rule", ["vmap", "map"])
def test_devices_do_not_communicate_when_lanes_divide(rule):
    text = jax.jit(over_lanes(descend, rule)).lower(lanes_of(16), TARGET).compile().as_text()
    assert not [name for name in COLLECTIVES if name in text]


def test_lanes_that_do_not_divide_are_gathered():
    """The search for collectives above is no formality: where results of surplus lanes are dropped it finds some."""
    text = jax.jit(over_lanes(descend, "map")).lower(lanes_of(11), TARGET).compile().as_text()
    assert [name for name in COLLECTIVES if name in text]


def test_mapped_lanes_stop_alone_and_vmapped_lanes_together():
    """A mapped program runs lanes in a loop around their own; a vmapped one has the one loop."""
    lanes = lanes_of(4)

    def loops(rule):
        return str(jax.make_jaxpr(over_lanes(descend, rule, jax.devices()[:1]))(lanes, TARGET)).count("scan[")

    assert loops("map") == 1
    assert loops("vmap") == 0


def test_auto_maps_on_a_cpu_and_vmaps_elsewhere(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert choose_rule() == "map"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_rule() == "vmap"
    assert choose_rule("map") == "map"


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="the lane rule is 'pmap'; choose one of auto, vmap, map"):
        choose_rule("pmap")
