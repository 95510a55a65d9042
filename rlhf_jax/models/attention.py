"""Positions, what a token may attend to, grouped-query attention and the key-value cache.

The cache is data, not a module's variable. Blocks only *read* it: each returns the keys and values of its new tokens,
and `write` puts those of all layers into the cache at once, so that a decoding loop updates one buffer in place. There
may be several: one of a prompt, which its K responses share, and one of each response.

`attend` is the reference: all products of queries and keys at once. `ring_attention` and `splash_attention` compute
the same without holding them all; what may see what is said in one place for all, `sees`.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.quantised import Quantised, Storage, as_computed, stored
from rlhf_jax.types import wide


@chex.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far.

    Attributes:
        keys: [L, R, key-value heads, head width, S], or `Quantised`. R is the number of rows B, or B / K where K rows
            that follow each other share these tokens. Axes stand as products are taken: head by head, summed over the
            last axis but one.
        values: [L, R, key-value heads, S, head width], or `Quantised`.
        mask: True on slots that hold a real token, bool [R, S].
        positions: position of each token among the real tokens of its row, int32 [R, S].
        length: slots written so far (padding included, and again where the cache was full), int32 scalar.
    """

    keys: Any
    values: Any
    mask: Bool[Array, "R S"]
    positions: Int[Array, "R S"]
    length: Int[Array, ""]


Caches = Cache | tuple[Cache, ...] | None


def caches_of(cache: Caches) -> tuple[Cache, ...]:
    """The caches that there are, in the order of their tokens."""
    if cache is None:
        return ()
    return (cache,) if isinstance(cache, Cache) else cache


def new_cache(
    keys: Float[Array, "L R N H W"],
    values: Float[Array, "L R N H W"],
    mask: Bool[Array, "R N"],
    slots: int,
    storage: Storage = "computation",
) -> Cache:
    """A cache of `slots` slots whose first N hold the given keys and values (those of a prefilled prompt)."""
    whole = Cache(
        keys=_stored_keys(keys, storage),
        values=_stored_values(values, storage),
        mask=mask,
        positions=positions_of(mask),
        length=jnp.int32(mask.shape[1]),
    )
    return with_room(whole, slots)


def empty_cache(of: Cache, rows: int, slots: int) -> Cache:
    """A cache of so many rows and slots that holds nothing yet, kept as another one is."""

    def blank(leaf: Array, axis: int) -> Array:
        shape = [leaf.shape[0], rows, *leaf.shape[2:]]
        shape[axis] = slots
        return jnp.zeros(shape, leaf.dtype)

    return Cache(
        keys=jax.tree.map(lambda leaf: blank(leaf, 4), of.keys),
        values=jax.tree.map(lambda leaf: blank(leaf, 3), of.values),
        mask=jnp.zeros((rows, slots), bool),
        positions=jnp.zeros((rows, slots), jnp.int32),
        length=jnp.int32(0),
    )


def with_room(cache: Cache, slots: int) -> Cache:
    """The cache with so many slots; the new ones are empty and stand behind those that it has."""

    def fill(array: Array, axis: int) -> Array:
        return jnp.pad(array, [(0, slots - size if place == axis else 0) for place, size in enumerate(array.shape)])

    return cache.replace(
        keys=jax.tree.map(lambda leaf: fill(leaf, 4), cache.keys),
        values=jax.tree.map(lambda leaf: fill(leaf, 3), cache.values),
        mask=fill(cache.mask, 1),
        positions=fill(cache.positions, 1),
    )


def write(
    cache: Cache,
    keys: Float[Array, "L B N H W"],
    values: Float[Array, "L B N H W"],
    mask: Bool[Array, "B N"],
    before: Caches = None,
) -> Cache:
    """The cache with N more tokens a row.

    Single tokens (N = 1) may go on when it is full: they take the place of the oldest ones. More than fit are not
    checked.

    Args:
        cache: of these rows.
        keys: of the new tokens.
        values: of the new tokens.
        mask: True where a row has one.
        before: caches of tokens that stand before those of this one.
    """
    start = cache.length % cache.mask.shape[1]
    storage = "int8" if isinstance(cache.keys, Quantised) else "computation"

    def put(old: Any, new: Any, axis: int) -> Any:
        return jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis), old, new
        )

    return Cache(
        keys=put(cache.keys, _stored_keys(keys, storage), 4),
        values=put(cache.values, _stored_values(values, storage), 3),
        mask=put(cache.mask, mask, 1),
        positions=put(cache.positions, positions_of(mask, (*caches_of(before), cache)), 1),
        length=cache.length + mask.shape[1],
    )


def _stored_keys(keys: Float[Array, "L R N H W"], storage: Storage) -> Any:
    return stored(rearrange(keys, "l r n h w -> l r h w n"), storage, axis=-2)


def _stored_values(values: Float[Array, "L R N H W"], storage: Storage) -> Any:
    return stored(rearrange(values, "l r n h w -> l r h n w"), storage)


def positions_of(mask: Bool[Array, "B S"], cache: Caches = None) -> Int[Array, "B S"]:
    """Position of every token among the real tokens of its row, from 0; padding gets 0 or its neighbour's.

    Example:
        >>> positions_of(jnp.array([[False, True, True, True]])).tolist()
        [[0, 0, 1, 2]]
    """
    positions = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
    for earlier in caches_of(cache):
        positions = positions + _of_every_row(earlier.mask.sum(axis=-1, dtype=jnp.int32), len(mask))[:, None]
    return jnp.maximum(positions, 0)


def _of_every_row(shared: Array, rows: int) -> Array:
    """What rows share [R, ...], for each of them [B, ...]."""
    return shared if len(shared) == rows else jnp.repeat(shared, rows // len(shared), axis=0)


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
        slots: place in the row, padding and cache counted, int32 [B, N]; whatever is not behind all new tokens will do
            for those of a cache.
        positions: place among the real tokens of the row or segment, int32 [B, N].
        segments: which of the sequences packed into its row a token belongs to, int32 [B, N]; None: rows hold one.
    """

    mask: Bool[Array, "B N"]
    slots: Int[Array, "B N"]
    positions: Int[Array, "B N"]
    segments: Int[Array, "B N"] | None = None


def places_of(mask: Bool[Array, "B N"], cache: Caches = None, segments: Int[Array, "B N"] | None = None) -> Places:
    """Where the new tokens stand, after those of the caches if there are any.

    Example:
        >>> places = places_of(jnp.array([[False, True, True]]))
        >>> places.slots.tolist(), places.positions.tolist()
        ([[0, 1, 2]], [[0, 0, 1]])
    """
    first = sum(earlier.mask.shape[1] for earlier in caches_of(cache))
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


def visible(places: Places, cache: Caches = None, window: int | None = None) -> Bool[Array, "B N S"]:
    """Which slots each new token attends to: those of the caches, if there are any, then the new ones.

    Args:
        places: where the new tokens stand; rows that follow a cache are not packed.
        cache: earlier tokens; all come before the new ones.
        window: see `sees`.
    """
    parts, rows = [], len(places.mask)
    for one in caches_of(cache):
        mask, positions = (_of_every_row(part, rows) for part in (one.mask, one.positions))
        parts.append(Places(mask=mask, slots=jnp.zeros_like(positions), positions=positions))
    return sees(places, jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), *parts, places), window)


def logits_of(
    query: Float[Array, "B H G N W"], key: Float[Array, "B H S W"], scale: float | None, softcap: float | None
) -> Float[Array, "B H G N S"]:
    """The logits of attention in at least float32, hidden keys included.

    Args:
        query: queries, the G of a group beside each other.
        key: keys.
        scale: multiplies the products of queries and keys; None: W ** -0.5.
        softcap: c in c tanh(logits / c), applied to the scaled logits; None: none.
    """
    products = jnp.einsum("bhgnw,bhsw->bhgns", query, key, preferred_element_type=wide(query))
    logits = products * (query.shape[-1] ** -0.5 if scale is None else scale)
    return capped(logits, softcap)


def capped(logits: Float[Array, "*shape"], softcap: float | None) -> Float[Array, "*shape"]:
    """The logits c tanh(logits / c), or as they are where the cap c is None.

    Example:
        >>> print(f"{capped(jnp.float32(30.0), 30.0):.2f}")
        22.85
    """
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def attend(
    query: Float[Array, "B N Q W"],
    key: Float[Array, "B N H W"],
    value: Float[Array, "B N H W"],
    allowed: Bool[Array, "B N S"],
    cached: tuple[tuple[Any, Any], ...] = (),
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B N Q W"]:
    """Softmax attention of N new tokens over C cached ones, if given, and themselves.

    Args:
        query: queries of the new tokens; Q is a multiple of H (grouped queries, Ainslie et al. 2023, 2305.13245).
        key: keys of the new tokens.
        value: values of the new tokens.
        allowed: from `visible`, S = C + N.
        cached: keys [R, H, W, c] and values [R, H, c, W] of earlier tokens, one pair a cache.
        scale: see `logits_of`.
        softcap: see `logits_of`.

    Returns:
        The attended values; softmax in at least float32. A row that is allowed nothing is finite and meaningless.
    """
    # One softmax over the pieces: the caches are only read, never concatenated with the new keys.
    query = rearrange(query, "b n (h g) w -> b h g n w", h=key.shape[2])
    pieces = (*cached, (rearrange(key, "b n h w -> b h w n"), rearrange(value, "b n h w -> b h n w")))
    logits = jnp.concatenate([_piece_logits(query, keys, scale, softcap) for keys, _ in pieces], axis=-1)
    logits = jnp.where(allowed[:, None, None], logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(logits, axis=-1)
    ends = np.cumsum([jax.tree.leaves(values)[0].shape[2] for _, values in pieces])[:-1]
    parts = jnp.split(weights, ends, axis=-1)
    out = sum(_piece_values(part, values, value.dtype) for part, (_, values) in zip(parts, pieces, strict=True))
    return rearrange(out, "b h g n w -> b n (h g) w")


def _piece_logits(
    query: Float[Array, "B H G N W"], keys: Any, scale: float | None, softcap: float | None
) -> Float[Array, "B H G N S"]:
    """`logits_of` for keys that K rows share or that are quantised; keys that rows share are read once."""
    numbers, factor = as_computed(keys, query.dtype)
    folded = rearrange(query, "(r k) h g n w -> r h g (k n) w", r=len(numbers))
    keys = rearrange(numbers, "r h w s -> r h s w")
    logits = logits_of(folded, keys, scale, None if factor is not None else softcap)
    if factor is not None:
        logits = logits * rearrange(factor, "r h 1 s -> r h 1 1 s")
        logits = capped(logits, softcap)
    return rearrange(logits, "r h g (k n) s -> (r k) h g n s", n=query.shape[3])


def _piece_values(weights: Float[Array, "B H G N S"], values: Any, dtype: jnp.dtype) -> Float[Array, "B H G N W"]:
    """The weighted sum of values that K rows share or that are quantised."""
    numbers, factor = as_computed(values, dtype)
    folded = rearrange(weights, "(r k) h g n s -> r h g (k n) s", r=len(numbers))
    if factor is not None:
        folded = folded * rearrange(factor, "r h s 1 -> r h 1 1 s")
    out = jnp.einsum("bhgns,bhsw->bhgnw", folded.astype(dtype), numbers)
    return rearrange(out, "r h g (k n) w -> (r k) h g n w", n=weights.shape[3])
