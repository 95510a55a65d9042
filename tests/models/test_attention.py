"""Rotary positions by hand, attention against a slow loop, and the cache as data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.attention import attend, new_cache, positions_of, rotary, write


def slow_attention(query, key, value, mask):
    """Causal grouped-query attention of one row at a time, one head at a time, one query at a time (float64)."""
    query, key, value = (np.asarray(t, np.float64) for t in (query, key, value))
    rows, length, heads, width = query.shape
    group = heads // key.shape[2]
    out = np.zeros(query.shape)
    for row in range(rows):
        for head in range(heads):
            for now in range(length):
                seen = [then for then in range(now + 1) if mask[row, then]]
                if seen:
                    scores = np.array([query[row, now, head] @ key[row, then, head // group] for then in seen])
                    weights = np.exp(scores / np.sqrt(width) - (scores / np.sqrt(width)).max())
                    weights /= weights.sum()
                    out[row, now, head] = weights @ value[row, seen, head // group]
    return out


@pytest.fixture
def heads(key):
    query_key, key_key, value_key = jax.random.split(key, 3)
    return (
        2.0 * jax.random.normal(query_key, (3, 6, 4, 8)),
        jax.random.normal(key_key, (3, 6, 2, 8)),
        jax.random.normal(value_key, (3, 6, 2, 8)),
    )


MASK = np.array([[True] * 6, [False, False] + [True] * 4, [True] * 4 + [False] * 2])


def test_rotary_turns_two_dimensions_by_the_position_in_radians():
    x = jnp.array([3.0, 4.0])[None, None, None]
    turned = rotary(jnp.tile(x, (1, 3, 1, 1)), jnp.array([[0, 1, 2]]), 10_000.0)[0, :, 0]
    cos, sin = np.cos([0.0, 1.0, 2.0]), np.sin([0.0, 1.0, 2.0])
    np.testing.assert_allclose(turned, np.stack([3 * cos - 4 * sin, 4 * cos + 3 * sin], -1), rtol=1e-6)


def test_rotary_pairs_halves_and_slows_the_later_pairs():
    """Of four dimensions, (0, 2) turn by the position and (1, 3) by position / sqrt(theta)."""
    x = jnp.array([1.0, 2.0, 0.0, 0.0])[None, None, None]
    turned = rotary(x, jnp.array([[5]]), 100.0)[0, 0, 0]
    np.testing.assert_allclose(turned, [np.cos(5), 2 * np.cos(0.5), np.sin(5), 2 * np.sin(0.5)], rtol=1e-5)


def test_rotary_products_depend_on_the_distance_only(heads):
    query, key, _ = heads
    near = jnp.tile(jnp.arange(6)[None], (3, 1))

    def products(positions):
        return jnp.einsum("bnhw,bmhw->bhnm", rotary(query[:, :, :2], positions, 50.0), rotary(key, positions, 50.0))

    np.testing.assert_allclose(products(near), products(near + 37), atol=1e-4)


def test_rotary_angles_stay_exact_in_bfloat16():
    x = jnp.array([1.0, 0.0], jnp.bfloat16)[None, None, None]
    turned = rotary(x, jnp.array([[301]]), 10_000.0)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_allclose(turned[0, 0, 0].astype(jnp.float32), [np.cos(301), np.sin(301)], atol=5e-3)


def test_positions_count_real_tokens_on_either_side_of_padding():
    mask = jnp.array([[False, False, True, True], [True, True, False, False], [False] * 4])
    assert positions_of(mask).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]


def test_positions_go_on_after_the_real_tokens_of_a_cache():
    cached = jnp.array([[False, True, True], [True, True, True]])
    cache = new_cache(jnp.zeros((1, 2, 3, 1, 2)), jnp.zeros((1, 2, 3, 1, 2)), cached, slots=5)
    assert positions_of(jnp.ones((2, 2), bool), cache).tolist() == [[2, 3], [3, 4]]


@pytest.mark.parametrize("key_value_heads", [1, 2])
def test_attention_equals_a_slow_loop_where_tokens_are_real(heads, key_value_heads):
    query, key, value = heads[0], heads[1][:, :, :key_value_heads], heads[2][:, :, :key_value_heads]
    found = jax.jit(attend)(query, key, value, jnp.asarray(MASK))
    assert bool(jnp.isfinite(found).all())
    np.testing.assert_allclose(np.asarray(found)[MASK], slow_attention(query, key, value, MASK)[MASK], atol=1e-5)


@pytest.mark.parametrize("split", [1, 3, 5])
def test_attention_over_a_cache_and_new_tokens_equals_attention_over_all(heads, split):
    query, key, value = heads
    mask = jnp.asarray(MASK)
    room = ((0, 0), (0, 2), (0, 0), (0, 0))
    cached = (
        jnp.pad(key[:, :split], room, constant_values=9.0),
        jnp.pad(value[:, :split], room, constant_values=9.0),
        jnp.pad(mask[:, :split], ((0, 0), (0, 2))),
    )
    found = jax.jit(attend)(query[:, split:], key[:, split:], value[:, split:], mask[:, split:], cached)
    whole = slow_attention(query, key, value, MASK)[:, split:]
    np.testing.assert_allclose(np.asarray(found)[MASK[:, split:]], whole[MASK[:, split:]], atol=1e-5)


def test_attention_keeps_float64(heads):
    with jax.enable_x64(True):
        query, key, value = (jnp.asarray(np.asarray(t, np.float64)) for t in heads)
        plain = attend(query, key, value, jnp.asarray(MASK))
        cached = (key[:, :2], value[:, :2], jnp.asarray(MASK[:, :2]))
        split = attend(query[:, 2:], key[:, 2:], value[:, 2:], jnp.asarray(MASK[:, 2:]), cached)
        assert plain.dtype == split.dtype == jnp.float64
        expected = slow_attention(query, key, value, MASK)
        np.testing.assert_allclose(np.asarray(plain)[MASK], expected[MASK], atol=1e-12)
        np.testing.assert_allclose(np.asarray(split)[MASK[:, 2:]], expected[:, 2:][MASK[:, 2:]], atol=1e-12)


def test_write_puts_tokens_after_those_of_the_cache():
    keys = jnp.arange(12.0).reshape(2, 1, 3, 1, 2)
    cache = new_cache(keys[:, :, :1], -keys[:, :, :1], jnp.array([[False]]), slots=4)
    cache = jax.jit(write)(cache, keys[:, :, 1:], -keys[:, :, 1:], jnp.array([[True, True]]))
    assert int(cache.length) == 3
    assert cache.mask.tolist() == [[False, True, True, False]]
    np.testing.assert_array_equal(cache.keys[:, :, :3], keys)
    np.testing.assert_array_equal(cache.values[:, :, :3], -keys)
    assert not cache.keys[:, :, 3:].any()
