"""Positions, what a token may attend to, grouped-query attention and the key-value cache.

The cache is data, not a module's variable. Blocks only *read* it: each returns the keys and values of its new tokens,
and `write` puts those of all layers into the cache at once, so that a decoding loop updates one buffer in place.

`attend` is the reference: all products of queries and keys at once. `ring_attention` and `splash_attention` compute
the same without holding them all; what may see what is said in one place for all, `sees`.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.types import wide


@chex.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far.

    Attributes:
        keys: [L, B, S, key-value heads, head width].
        values: the same shape.
        mask: True on slots that hold a real token, bool [B, S].
        length: number of slots written (padding included), int32 scalar.
    """

    keys: Float[Array, "L B S H W"]
    values: Float[Array, "L B S H W"]
    mask: Bool[Array, "B S"]
    length: Int[Array, ""]


def new_cache(
    keys: Float[Array, "L B N H W"], values: Float[Array, "L B N H W"], mask: Bool[Array, "B N"], slots: int
) -> Cache:
    """A cache of `slots` slots whose first N hold the given keys and values (those of a prefilled prompt)."""
    room = slots - mask.shape[1]
    pad = ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))
    return Cache(
        keys=jnp.pad(keys, pad),
        values=jnp.pad(values, pad),
        mask=jnp.pad(mask, ((0, 0), (0, room))),
        length=jnp.int32(mask.shape[1]),
    )


def write(
    cache: Cache, keys: Float[Array, "L B N H W"], values: Float[Array, "L B N H W"], mask: Bool[Array, "B N"]
) -> Cache:
    """The cache with N more tokens a row; slots beyond its size are not checked."""
    start = cache.length
    return Cache(
        keys=jax.lax.dynamic_update_slice_in_dim(cache.keys, keys, start, axis=2),
        values=jax.lax.dynamic_update_slice_in_dim(cache.values, values, start, axis=2),
        mask=jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, start, axis=1),
        length=start + mask.shape[1],
    )


def positions_of(mask: Bool[Array, "B S"], cache: Cache | None = None) -> Int[Array, "B S"]:
    """Position of every token among the real tokens of its row, from 0; padding gets 0 or its neighbour's.

    Example:
        >>> positions_of(jnp.array([[False, True, True, True]])).tolist()
        [[0, 0, 1, 2]]
    """
    positions = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
    if cache is not None:
        positions = positions + cache.mask.sum(axis=-1, dtype=jnp.int32)[:, None]
    return jnp.maximum(positions, 0)


def positions_in_segments(segments: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Position of every token among the real tokens of its segment, from 0.

    Args:
        segments: which of the sequences packed into its row a token belongs to; equal numbers stand side by side.
        mask: True on real tokens.

    Example:
        >>> positions_in_segments(jnp.array([[1, 1, 2, 2, 2, 0]]), jnp.array([[True] * 5 + [False]])).tolist()
        [[0, 1, 0, 1, 2, 0]]
    """
    upto = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    before = jax.lax.cummax(jnp.where(starts, upto - mask.astype(jnp.int32), 0), axis=1)
    return jnp.maximum(upto - before - 1, 0)


class Places(NamedTuple):
    """Where tokens stand, which decides who sees whom.

    Attributes:
        mask: True on real tokens, bool [B, N].
        slots: place in the row, padding and cache counted, int32 [B, N].
        positions: place among the real tokens of the row or segment, int32 [B, N].
        segments: which of the sequences packed into its row a token belongs to, int32 [B, N]; None: rows hold one.
    """

    mask: Bool[Array, "B N"]
    slots: Int[Array, "B N"]
    positions: Int[Array, "B N"]
    segments: Int[Array, "B N"] | None = None


def places_of(
    mask: Bool[Array, "B N"], cache: Cache | None = None, segments: Int[Array, "B N"] | None = None
) -> Places:
    """Where the new tokens stand, after those of the cache if there is one.

    Example:
        >>> places = places_of(jnp.array([[False, True, True]]))
        >>> places.slots.tolist(), places.positions.tolist()
        ([[0, 1, 2]], [[0, 0, 1]])
    """
    first = 0 if cache is None else cache.mask.shape[1]
    slots = jnp.broadcast_to(first + jnp.arange(mask.shape[1], dtype=jnp.int32), mask.shape)
    positions = positions_of(mask, cache) if segments is None else positions_in_segments(segments, mask)
    return Places(mask=mask, slots=slots, positions=positions, segments=segments)


def lengths_of(positions: Int[Array, "B N"], segments: Int[Array, "B N"] | None = None) -> Int[Array, "B #N"]:
    """Length of each token's sequence (of its segment, where rows are packed) up to the last token given."""
    if segments is None:
        return positions.max(axis=-1, keepdims=True) + 1
    same = segments[:, :, None] == segments[:, None, :]
    return jnp.where(same, positions[:, None, :], 0).max(axis=-1) + 1


def sees(queries: Places, keys: Places, window: Int[Array, ""] | int | None = None) -> Bool[Array, "B N S"]:
    """Which of some keys each of some queries attends to.

    A token sees real tokens up to itself, of its own segment, and within the window: a query at position p sees the
    keys at p - window + 1 … p.

    Args:
        queries: where the queries stand.
        keys: where the keys stand, in the same rows.
        window: tokens that are looked back on, the token itself included; None: all.

    Example:
        >>> places = places_of(jnp.ones((1, 3), bool))
        >>> sees(places, places, window=2)[0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    seen = keys.mask[:, None, :] & (queries.slots[:, :, None] >= keys.slots[:, None, :])
    if queries.segments is not None:
        seen = seen & (queries.segments[:, :, None] == keys.segments[:, None, :])
    if window is not None:
        seen = seen & (queries.positions[:, :, None] - keys.positions[:, None, :] < window)
    return seen


def visible(places: Places, cache: Cache | None = None, window: int | None = None) -> Bool[Array, "B N S"]:
    """Which slots each new token attends to: those of the cache, if there is one, then the new ones.

    Args:
        places: where the new tokens stand; rows that follow a cache are not packed.
        cache: earlier tokens; all come before the new ones.
        window: see `sees`.
    """
    if cache is None:
        return sees(places, places, window)
    earlier = places_of(cache.mask)
    return sees(places, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), earlier, places), window)


def logits_of(
    query: Float[Array, "B N H G W"], key: Float[Array, "B S H W"], scale: float | None, softcap: float | None
) -> Float[Array, "B H G N S"]:
    """The logits of attention in at least float32, hidden keys included.

    Args:
        query: queries, the G of a group beside each other.
        key: keys.
        scale: multiplies the products of queries and keys; None: W ** -0.5.
        softcap: c in c tanh(logits / c), applied to the scaled logits; None: none.
    """
    products = jnp.einsum("bnhgw,bshw->bhgns", query, key, preferred_element_type=wide(query))
    logits = products * (query.shape[-1] ** -0.5 if scale is None else scale)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def attend(
    query: Float[Array, "B N Q W"],
    key: Float[Array, "B N H W"],
    value: Float[Array, "B N H W"],
    allowed: Bool[Array, "B N S"],
    cached: tuple[Float[Array, "B C H W"], Float[Array, "B C H W"]] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B N Q W"]:
    """Softmax attention of N new tokens over C cached ones, if given, and themselves.

    Args:
        query: queries of the new tokens; Q is a multiple of H (grouped queries, Ainslie et al. 2023, 2305.13245).
        key: keys of the new tokens.
        value: values of the new tokens.
        allowed: from `visible`, S = C + N.
        cached: keys and values of earlier tokens.
        scale: see `logits_of`.
        softcap: see `logits_of`.

    Returns:
        The attended values; softmax in at least float32. A row that is allowed nothing is finite and meaningless.
    """
    new = key.shape[1]
    # One softmax over the pieces: the cache is only read, never concatenated with the new keys.
    pieces = [(key, value)] if cached is None else [cached, (key, value)]
    query = rearrange(query, "b n (h g) w -> b n h g w", h=key.shape[2])
    logits = jnp.concatenate([logits_of(query, keys, scale, softcap) for keys, _ in pieces], axis=-1)
    logits = jnp.where(allowed[:, None, None], logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    parts = jnp.split(weights, [weights.shape[-1] - new], axis=-1)[-len(pieces) :]
    out = sum(jnp.einsum("bhgns,bshw->bnhgw", part, values) for part, (_, values) in zip(parts, pieces, strict=True))
    return rearrange(out, "b n h g w -> b n (h g) w")
