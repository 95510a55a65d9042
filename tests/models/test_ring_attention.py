"""Attention some keys at a time equals attention over all at once: on one device, on rings, and in whole models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.attention import attend, places_of, visible
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy
from rlhf_jax.models.ring_attention import ring_attend
from rlhf_jax.models.row_attention import row_attend
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.parallel.mesh import make_mesh, parse_mesh

ROWS, TOKENS = 4, 16
MASK = np.ones((ROWS, TOKENS), bool)
MASK[0, :5], MASK[1, 11:], MASK[2, :2], MASK[2, 14:] = False, False, False, False
SEGMENTS = np.where(MASK, 1 + (np.arange(TOKENS) >= 6) + (np.arange(TOKENS) >= 13), 0).astype(np.int32)


def heads(dtype=jnp.float32):
    """Queries of four heads, keys and values of two, and the weights of a loss."""
    draw = np.random.default_rng(0).normal
    shapes = [(ROWS, TOKENS, 4, 8), (ROWS, TOKENS, 2, 8), (ROWS, TOKENS, 2, 8), (ROWS, TOKENS, 4, 8)]
    return [jnp.asarray(draw(size=shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("kind", "window", "packed", "scale", "softcap", "block"))
def values_and_gradients(kind, query, key, value, weigh, window=None, packed=False, scale=None, softcap=None, block=5):
    places = places_of(jnp.asarray(MASK), segments=jnp.asarray(SEGMENTS) if packed else None)

    def loss(query, key, value):
        if kind == "reference":
            out = attend(query, key, value, visible(places, window=window), (), scale, softcap)
        else:
            limit = None if window is None else jnp.int32(window)
            options = (limit, scale, softcap) if kind == "rows" else (limit, scale, softcap, block)
            out = (row_attend if kind == "rows" else ring_attend)(query, key, value, places, *options)
        out = jnp.where(MASK[:, :, None, None], out, jnp.zeros((), out.dtype))
        return (out * weigh).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    return out, *gradients


def assert_close(found, expected, tolerance=1e-5):
    found, expected = (np.asarray(leaf, np.float64) for leaf in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


CASES = {
    "causal": {},
    "packed, window, softcap and scale": dict(window=4, packed=True, softcap=1.5, scale=0.7),
}


@pytest.mark.parametrize("block", [1, 5, 16, 512])
def test_blocks_of_keys_on_one_device(block):
    expected = values_and_gradients("reference", *heads(), **CASES["causal"])
    found = values_and_gradients("ring", *heads(), **CASES["causal"], block=block)
    jax.tree.map(assert_close, found, expected)


@pytest.mark.parametrize("words", ["data=1", "sequence=8", "sequence=4,data=2", "sequence=2,tensor=2,fsdp=2"])
def test_a_ring_changes_neither_values_nor_gradients(words):
    options = CASES["packed, window, softcap and scale"]
    expected = values_and_gradients("reference", *heads(), **options)
    shape = parse_mesh(words)
    with jax.set_mesh(make_mesh(shape, jax.devices()[: shape.devices])):
        found = jax.block_until_ready(values_and_gradients("ring", *heads(), **options, block=3))
    jax.tree.map(assert_close, found, expected)


@pytest.mark.parametrize("words", ["data=1", "data=2,tensor=2"])
@pytest.mark.parametrize("case", CASES)
def test_one_row_after_the_other(case, words):
    expected = values_and_gradients("reference", *heads(), **CASES[case])
    shape = parse_mesh(words)
    with jax.set_mesh(make_mesh(shape, jax.devices()[: shape.devices])):
        found = jax.block_until_ready(values_and_gradients("rows", *heads(), **CASES[case]))
    jax.tree.map(assert_close, found, expected)


def test_bfloat16_is_as_close_to_float32_as_the_reference_is():
    exact = values_and_gradients("reference", *heads(), **CASES["causal"])
    for kind in ("reference", "ring", "rows"):
        rough = values_and_gradients(kind, *heads(jnp.bfloat16), **CASES["causal"])
        assert {leaf.dtype for leaf in rough} == {jnp.dtype("bfloat16")}
        jax.tree.map(functools.partial(assert_close, tolerance=2e-2), rough, exact)


def test_a_token_that_sees_nothing_attends_to_nothing():
    query, key, value, _ = heads()
    out = jax.jit(ring_attend)(query, key, value, places_of(jnp.asarray(MASK)))
    assert not np.asarray(out)[0, :5].any()


MODEL = ModelConfig(
    vocab_size=20,
    width=16,
    layers=2,
    heads=4,
    key_value_heads=2,
    feed_forward_width=24,
    context_length=1 << 14,
    initializer_range=0.4,
    window=3,
    local_layers=(True, False),
    query_key_norm="head",
    query_scale=0.4,
    attention_softcap=2.0,
    attention_block=3,
)


def states_and_gradients(config, params, tokens):
    config = dataclasses.replace(config, attention="reference") if config.attention == "auto" else config
    mask, segments = jnp.asarray(MASK), jnp.asarray(SEGMENTS)
    weigh = jnp.asarray(np.random.default_rng(2).normal(size=(*MASK.shape, config.width)), jnp.float32)

    def loss(trunk):
        states = apply_trunk(config, trunk, tokens, mask, None, segments).final
        states = jnp.where(mask[:, :, None], states, 0.0)
        return (weigh * states).sum(), states

    (_, states), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params["trunk"])
    return states, gradients


def test_a_model_of_local_and_global_layers_over_packed_rows():
    params = jax.jit(init_policy, static_argnums=0)(MODEL, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 20, size=MASK.shape), jnp.int32)
    expected = states_and_gradients(MODEL, params, tokens)
    ring = dataclasses.replace(MODEL, attention="ring", remat="full")
    with jax.set_mesh(make_mesh(parse_mesh("sequence=4,data=2"))):
        found = jax.block_until_ready(states_and_gradients(ring, params, tokens))
    jax.tree.map(assert_close, found, expected)
    rows = dataclasses.replace(MODEL, attention="rows")
    jax.tree.map(assert_close, states_and_gradients(rows, params, tokens), expected)


@pytest.mark.parametrize(
    ("attention", "least", "most"), [("ring", 1.8, 2.2), pytest.param("reference", 3.4, 4.1, marks=pytest.mark.slow)]
)
def test_memory_of_a_step_when_the_context_doubles(attention, least, most):
    """Through the loop over layers: what depends on places alone must not be taken out of it and stored."""
    config = dataclasses.replace(MODEL, attention=attention, attention_block=64, remat="full")
    config = dataclasses.replace(config, window=None, local_layers=())
    shapes = jax.eval_shape(lambda key: init_policy(config, key)["trunk"], jax.random.key(0))

    def temporaries(length):
        row = [jax.ShapeDtypeStruct((1, length), dtype) for dtype in (jnp.int32, jnp.bool_)]
        step = jax.grad(lambda trunk, tokens, mask: jnp.square(apply_trunk(config, trunk, tokens, mask).final).sum())
        return jax.jit(step).lower(shapes, *row).compile().memory_analysis().temp_size_in_bytes

    assert least < temporaries(2048) / temporaries(1024) < most
