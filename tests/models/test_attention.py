"""Positions, windows and segments by brute force, attention against a slow loop, and the cache as data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.masking_utils import sliding_window_causal_mask_function

from rlhf_jax.models.attention import (
    attend,
    lengths_of,
    new_cache,
    places_of,
    positions_in_segments,
    positions_of,
    visible,
    write,
)
from rlhf_jax.models.quantised import quantise


def slow_attention(query, key, value, mask, scale=None, softcap=None):
    """Causal grouped-query attention of one row at a time, one head at a time, one query at a time (float64)."""
    query, key, value = (np.asarray(t, np.float64) for t in (query, key, value))
    rows, length, heads, width = query.shape
    group, scale = heads // key.shape[2], width**-0.5 if scale is None else scale
    out = np.zeros(query.shape)
    for row in range(rows):
        for head in range(heads):
            for now in range(length):
                seen = [then for then in range(now + 1) if mask[row, then]]
                if seen:
                    logits = scale * np.array([query[row, now, head] @ key[row, then, head // group] for then in seen])
                    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
                    weights = np.exp(logits - logits.max())
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


def test_positions_count_real_tokens_on_either_side_of_padding():
    mask = jnp.array([[False, False, True, True], [True, True, False, False], [False] * 4])
    assert positions_of(mask).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]


def test_positions_go_on_after_the_real_tokens_of_a_cache():
    cached = jnp.array([[False, True, True], [True, True, True]])
    cache = new_cache(jnp.zeros((1, 2, 3, 1, 2)), jnp.zeros((1, 2, 3, 1, 2)), cached, slots=5)
    assert positions_of(jnp.ones((2, 2), bool), cache).tolist() == [[2, 3], [3, 4]]


def test_positions_start_again_in_every_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0], [0, 0, 4, 4, 4, 4, 4]])
    mask = jnp.array([[True] * 6 + [False], [False, False] + [True] * 5])
    assert positions_in_segments(segments, mask).tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 0, 1, 2, 3, 4]]


def test_lengths_are_those_of_the_row_or_of_the_segment():
    positions = jnp.array([[0, 0, 1, 2, 0, 1, 0]])
    assert lengths_of(positions).tolist() == [[3]]
    assert lengths_of(positions, jnp.array([[0, 1, 1, 1, 2, 2, 3]])).tolist() == [[1, 3, 3, 3, 2, 2, 1]]


def slow_visible(mask, segments, window):
    """One row, one query, one key at a time; distances are counted in real tokens."""
    rows, length = mask.shape
    seen = np.zeros((rows, length, length), bool)
    for row in range(rows):
        for now in range(length):
            for then in range(now + 1):
                same = segments is None or segments[row, now] == segments[row, then]
                near = window is None or mask[row, then + 1 : now + 1].sum() < window
                seen[row, now, then] = mask[row, then] and same and near
    return seen


SEGMENTS = np.array([[1, 1, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2], [1, 2, 2, 2, 0, 0]])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 6])
def test_what_a_token_sees_equals_a_slow_loop(window, packed):
    mask, segments = jnp.asarray(MASK), jnp.asarray(SEGMENTS) if packed else None
    found = visible(places_of(mask, segments=segments), window=window)
    expected = slow_visible(MASK, SEGMENTS if packed else None, window)
    np.testing.assert_array_equal(np.asarray(found)[MASK], expected[MASK])


@pytest.mark.parametrize("window", [None, 2, 3])
@pytest.mark.parametrize("split", [1, 3, 5])
def test_what_a_token_sees_of_a_cache_is_what_it_sees_of_the_whole(split, window):
    mask = jnp.asarray(MASK)
    nothing = jnp.zeros((1, 3, split, 1, 2))
    cache = new_cache(nothing, nothing, mask[:, :split], slots=split + 2)
    found = np.asarray(visible(places_of(mask[:, split:], cache), cache, window=window))
    whole = slow_visible(MASK, None, window)[:, split:]
    real = MASK[:, split:]
    np.testing.assert_array_equal(found[..., :split][real], whole[..., :split][real])
    assert not found[..., split : split + 2].any()
    np.testing.assert_array_equal(found[..., split + 2 :][real], whole[..., split:][real])


def test_the_window_is_that_of_transformers():
    theirs = sliding_window_causal_mask_function(3)
    expected = [[bool(theirs(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(6)] for q in range(6)]
    found = visible(places_of(jnp.ones((1, 6), bool)), window=3)
    np.testing.assert_array_equal(found[0], expected)


@pytest.mark.parametrize(
    ("key_value_heads", "scale", "softcap"), [(1, None, None), (2, None, None), (2, 0.5, None), (2, None, 1.5)]
)
def test_attention_equals_a_slow_loop_where_tokens_are_real(heads, key_value_heads, scale, softcap):
    query, key, value = heads[0], heads[1][:, :, :key_value_heads], heads[2][:, :, :key_value_heads]
    mask = jnp.asarray(MASK)
    call = functools.partial(attend, scale=scale, softcap=softcap)
    found = jax.jit(call)(query, key, value, visible(places_of(mask)))
    assert bool(jnp.isfinite(found).all())
    expected = slow_attention(query, key, value, MASK, scale, softcap)
    np.testing.assert_allclose(np.asarray(found)[MASK], expected[MASK], atol=1e-5)


def _as_cached(keys, values):
    """Keys and values [B, N, H, W] with their axes as in a cache."""
    return jnp.transpose(keys, (0, 2, 3, 1)), jnp.transpose(values, (0, 2, 1, 3))


@pytest.mark.parametrize("split", [1, 3, 5])
def test_attention_over_a_cache_and_new_tokens_equals_attention_over_all(heads, split):
    query, key, value = heads
    room = ((0, 0), (0, 2), (0, 0), (0, 0))
    cached = _as_cached(*(jnp.pad(part[:, :split], room, constant_values=9.0) for part in (key, value)))
    whole = jnp.asarray(slow_visible(MASK, None, None))[:, split:]
    allowed = jnp.concatenate([whole[..., :split], jnp.zeros((3, 6 - split, 2), bool), whole[..., split:]], axis=-1)
    found = jax.jit(attend)(query[:, split:], key[:, split:], value[:, split:], allowed, (cached,))
    expected = slow_attention(query, key, value, MASK)[:, split:]
    np.testing.assert_allclose(np.asarray(found)[MASK[:, split:]], expected[MASK[:, split:]], atol=1e-5)


def test_attention_keeps_float64(heads):
    with jax.enable_x64(True):
        query, key, value = (jnp.asarray(np.asarray(t, np.float64)) for t in heads)
        allowed = jnp.asarray(slow_visible(MASK, None, None))
        plain = attend(query, key, value, allowed)
        cached = _as_cached(key[:, :2], value[:, :2])
        split = attend(query[:, 2:], key[:, 2:], value[:, 2:], allowed[:, 2:], (cached,))
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
    np.testing.assert_array_equal(jnp.moveaxis(cache.keys, 4, 2)[:, :, :3], keys)
    np.testing.assert_array_equal(jnp.swapaxes(cache.values, 2, 3)[:, :, :3], -keys)
    assert not cache.keys[..., 3:].any()
    assert cache.positions.tolist() == [[0, 0, 1, 0]]


def test_rows_that_share_a_cache_attend_as_if_each_had_its_own():
    """Two caches: one of a prompt that three rows share, quantised or not, and one of each row."""
    draw = np.random.default_rng(3).normal
    shared = [jnp.asarray(draw(size=shape), jnp.float32) for shape in ((2, 2, 8, 5), (2, 2, 5, 8))]
    own = [jnp.asarray(draw(size=shape), jnp.float32) for shape in ((6, 2, 8, 3), (6, 2, 3, 8))]
    query, key, value = (jnp.asarray(draw(size=(6, 1, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    allowed = jnp.asarray(np.random.default_rng(4).random((6, 1, 9)) < 0.7).at[:, :, -1].set(True)
    each = [jnp.repeat(part, 3, axis=0) for part in shared]
    for softcap in (None, 2.0):
        expected = attend(query, key, value, allowed, (tuple(each), tuple(own)), softcap=softcap)
        found = attend(query, key, value, allowed, (tuple(shared), tuple(own)), softcap=softcap)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        eight = tuple(quantise(part, axis) for part, axis in zip(shared, (-2, -1), strict=True))
        back = tuple(jnp.repeat(part.values.astype(jnp.float32) * part.scale, 3, axis=0) for part in eight)
        rounded = attend(query, key, value, allowed, (back, tuple(own)), softcap=softcap)
        found = attend(query, key, value, allowed, (eight, tuple(own)), softcap=softcap)
        np.testing.assert_allclose(found, rounded, atol=1e-5)
        assert float(jnp.abs(found - expected).max()) > 1e-4


def test_a_full_cache_goes_on_at_its_first_slot():
    keys = jnp.arange(5.0).reshape(1, 1, 5, 1, 1)
    cache = new_cache(keys[:, :, :2], keys[:, :, :2], jnp.ones((1, 2), bool), slots=3)
    for place in (2, 3, 4):
        new = keys[:, :, place : place + 1]
        cache = cache.replace(mask=cache.mask.at[:, cache.length % 3].set(False))  # whoever was there has ended
        cache = write(cache, new, new, jnp.ones((1, 1), bool))
    assert cache.keys.reshape(-1).tolist() == [3.0, 4.0, 2.0]
