"""A mixture of experts on meshes: what one device computes, and what travels between devices."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.models.config import Experts, ModelConfig
from rlhf_jax.models.experts import mixture
from rlhf_jax.parallel.mesh import make_mesh, parse_mesh

CONFIG = ModelConfig(
    vocab_size=8,
    width=8,
    layers=1,
    heads=1,
    key_value_heads=1,
    feed_forward_width=4,
    context_length=8,
    experts=Experts(count=8, active=2),
    initializer_range=0.7,
)


class Mixture(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        return mixture(self.config, x)


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(config, params, x):
    weigh = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), x.dtype)

    def loss(params, x):
        out = Mixture(config).apply({"params": params}, x)
        return (out * weigh).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return out, gradients


@pytest.fixture(scope="module")
def case():
    """Tokens, parameters, and what one device makes of them; two thirds of the tokens want expert 5."""
    x = np.random.default_rng(0).normal(size=(8, 6, 8)).astype(np.float32)
    params = nn.unbox(jax.jit(Mixture(CONFIG).init)(jax.random.key(0), jnp.asarray(x)))["params"]
    x[:, :4] += 2 * np.asarray(params["router"]["kernel"])[:, 5]
    return params, jnp.asarray(x), values_and_gradients(CONFIG, params, jnp.asarray(x))


def assert_close(found, expected):
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("words", ["expert=8", "expert=2,tensor=2,fsdp=2", "data=2,sequence=2,expert=2"])
def test_a_mesh_changes_neither_values_nor_gradients(case, words):
    params, x, expected = case
    with jax.set_mesh(make_mesh(parse_mesh(words))):
        found = jax.block_until_ready(values_and_gradients(CONFIG, params, x))
    jax.tree.map(assert_close, found, expected)


def test_rows_and_tokens_that_do_not_divide_lie_on_every_device(case):
    params, x, _ = case
    with jax.set_mesh(make_mesh(parse_mesh("expert=2,sequence=2,fsdp=2"))):
        found = jax.block_until_ready(values_and_gradients(CONFIG, params, x[:1, :5]))
    jax.tree.map(assert_close, found, values_and_gradients(CONFIG, params, x[:1, :5]))


def test_kernels_of_experts_never_leave_their_devices(case):
    """Tokens are gathered along the axis and their sums shared out; no array has the shape of all kernels."""
    params, x, _ = case
    mesh = make_mesh(parse_mesh("expert=8"))
    by_expert, by_row = (NamedSharding(mesh, PartitionSpec("expert")) for _ in range(2))
    kernels = jax.tree.map(lambda leaf: jax.device_put(leaf, by_expert), params["experts"])
    placed = {"router": params["router"], "experts": kernels}
    with jax.set_mesh(mesh):
        compiled = values_and_gradients.lower(CONFIG, placed, jax.device_put(x, by_row)).compile()
    text = compiled.as_text()
    assert re.search(r"f32\[8,6,8\]\S* all-gather", text)
    assert not re.search(r"f32\[8,8,4\]\S* all-", text)


def test_a_mesh_that_does_not_divide_the_experts_is_refused(case):
    _, x, _ = case
    config = dataclasses.replace(CONFIG, experts=Experts(count=6, active=2))
    with (
        jax.set_mesh(make_mesh(parse_mesh("expert=4"), jax.devices()[:4])),
        pytest.raises(ValueError, match="expert=4 does not divide the 6 experts"),
    ):
        jax.eval_shape(lambda x: Mixture(config).init(jax.random.key(0), x), x)
