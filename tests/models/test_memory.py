"""What is kept for the backward pass, and parameters in the host's memory."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.models.config import Remat
from rlhf_jax.models.heads import unembed
from rlhf_jax.models.memory import on_device
from rlhf_jax.models.transformer import apply_trunk

Space = jax.memory.Space
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 19, size=(8, 7), dtype=np.int32))
MASK = jnp.ones(TOKENS.shape, bool)


def states(config, trunk):
    return apply_trunk(config, trunk, TOKENS, MASK).final


@jax.jit
def in_host(tree):
    return jax.device_put(tree, Space.Host)


def kept(config, params, remat):
    """How many numbers the backward pass through the blocks keeps: on the device, and in the host's memory."""
    chosen, count = dataclasses.replace(config, remat=remat), {Space.Device: 0, Space.Host: 0}

    def forward(trunk):
        for leaf in jax.tree.leaves(jax.vjp(lambda trunk: states(chosen, trunk), trunk)[1]):
            count[jax.typeof(leaf).memory_space] += leaf.size
        return trunk

    jax.eval_shape(forward, params["trunk"])
    return count[Space.Device], count[Space.Host]


def test_every_policy_keeps_what_it_says(config, params):
    """By hand, a layer and token: the inputs D, the products q, k, v, output, gate, up (down is not needed again)."""
    device, host = zip(*(kept(config, params, remat) for remat in get_args(Remat)), strict=True)
    none, dots, projections, full, projections_on_host, full_on_host = device
    assert none > dots > projections > full > full_on_host
    tokens, width, heads = config.layers * TOKENS.size, config.width, config.heads
    products = tokens * (width + 2 * (width // 2) + width + 2 * config.feed_forward_width)
    attention = 2 * tokens * heads * TOKENS.shape[1]
    assert projections - full == projections - projections_on_host == products
    assert dots - projections >= attention // 2
    assert full - full_on_host == tokens * width
    assert host == (0, 0, 0, 0, products, tokens * width)


def test_no_policy_changes_a_gradient(config, params):
    def gradient(remat):
        chosen = dataclasses.replace(config, remat=remat)
        return jax.jit(jax.grad(lambda trunk: jnp.square(states(chosen, trunk)).mean()))(params["trunk"])

    plain = gradient("none")
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(plain))
    for remat in get_args(Remat)[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, gradient(remat))


@pytest.mark.parametrize("devices", [1, 8])
def test_a_frozen_model_in_the_memory_of_the_host_computes_the_same(config, params, devices):
    """Its layers are fetched one by one: no copy of all of them is made on the device."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",), axis_types=(AxisType.Auto,))

    def split(leaf, kind):
        over = PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp") if leaf.shape[-1] % devices == 0 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, over, memory_kind=kind))

    def logits(params):
        return unembed(config, params, states(config, params["trunk"]))

    near, far = (jax.tree.map(lambda leaf, kind=kind: split(leaf, kind), params) for kind in ("device", "pinned_host"))
    with jax.set_mesh(mesh):
        expected = jax.block_until_ready(jax.jit(logits)(near))
        program = jax.jit(lambda params: (logits(params), params), donate_argnums=0)
        text = str(jax.make_jaxpr(logits)(far))
        found, kept = jax.block_until_ready(program(far))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    stays = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding.memory_kind, kept))
    assert set(stays) == {"pinned_host"}
    kernel = params["trunk"]["layers"]["up"]["kernel"].shape
    assert f"f32<host>[{','.join(map(str, kernel[1:]))}]" in text
    assert not any("device_put" in line and str(list(kernel)).replace(" ", "") in line for line in text.splitlines())


def test_what_is_on_the_device_stays_as_it_is():
    tree = {"a": jnp.ones(2), "b": np.ones(3, np.float32)}
    assert on_device(tree)["a"] is tree["a"] and on_device(tree)["b"] is tree["b"]
    fetched = on_device(in_host(tree))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(in_host(tree))} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(fetched)} == {"device"}
    np.testing.assert_array_equal(fetched["b"], tree["b"])
