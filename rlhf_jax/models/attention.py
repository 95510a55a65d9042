"""Rotary positions, grouped-query attention and the key-value cache.

The cache is data, not a module's variable. Blocks only *read* it: each returns the keys and values of its new tokens,
and `write` puts those of all layers into the cache at once, so that a decoding loop updates one buffer in place.
"""

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


def rotary(x: Float[Array, "B S H W"], positions: Int[Array, "B S"], theta: float) -> Float[Array, "B S H W"]:
    """Rotates the halves (x1, x2) of every head by position times frequency: (x1 cos - x2 sin, x2 cos + x1 sin).

    Frequencies are theta^(-2i / W) for i = 0 … W/2 - 1; the angle is float32. Su et al. 2021 (2104.09864), in the
    half-split layout of Hugging Face checkpoints.
    """
    half = x.shape[-1] // 2
    angle_dtype = wide(x)
    frequency = theta ** (-jnp.arange(half, dtype=angle_dtype) / half)
    angle = (positions.astype(angle_dtype)[..., None] * frequency[None, None, :])[:, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(angle_dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    query: Float[Array, "B N Q W"],
    key: Float[Array, "B N H W"],
    value: Float[Array, "B N H W"],
    mask: Bool[Array, "B N"],
    cached: tuple[Float[Array, "B S H W"], Float[Array, "B S H W"], Bool[Array, "B S"]] | None = None,
) -> Float[Array, "B N Q W"]:
    """Causal softmax attention of N new tokens over themselves and, if given, over cached ones.

    Args:
        query: queries of the new tokens; Q is a multiple of H (grouped queries, Ainslie et al. 2023).
        key: keys of the new tokens.
        value: values of the new tokens.
        mask: True on real new tokens.
        cached: keys, values and mask of earlier tokens; all come before the new ones.

    Returns:
        The attended values; softmax in float32. Rows of padding are finite and meaningless.
    """
    new = mask.shape[1]
    causal = jnp.tril(jnp.ones((new, new), bool))[None] & mask[:, None, :]
    # One softmax over the pieces: the cache is only read, never concatenated with the new keys.
    pieces = [(key, value, causal)]
    if cached is not None:
        cached_key, cached_value, cached_mask = cached
        seen = jnp.broadcast_to(cached_mask[:, None, :], (*causal.shape[:2], cached_mask.shape[1]))
        pieces.insert(0, (cached_key, cached_value, seen))
    query = rearrange(query, "b n (h g) w -> b n h g w", h=key.shape[2])
    accumulate = wide(query)
    scores = [jnp.einsum("bnhgw,bshw->bhgns", query, keys, preferred_element_type=accumulate) for keys, _, _ in pieces]
    allowed = jnp.concatenate([piece[2] for piece in pieces], axis=-1)[:, None, None]
    logits = jnp.where(allowed, jnp.concatenate(scores, axis=-1) * query.shape[-1] ** -0.5, jnp.finfo(accumulate).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    parts = jnp.split(weights, [weights.shape[-1] - new], axis=-1)[-len(pieces) :]
    out = sum(jnp.einsum("bhgns,bshw->bnhgw", part, values) for part, (_, values, _) in zip(parts, pieces, strict=True))
    return rearrange(out, "b n h g w -> b n (h g) w")
