"""Attention one row after the other, for CPUs: the products of a row stay in the cache of a core.

All rows at once, the products of queries and keys go through main memory several times, forward and back; that takes
longer than the arithmetic. Here a row's products are made, used and dropped before the next row's, and the backward
pass makes them again from the kept logarithms of the sums (Dao et al. 2022, 2205.14135):

    s = q k^T scale,  p = exp(s - l),  o = p v,   with l = log sum exp s
    dv = p^T do,  ds = p (do v^T - do . o) scale,  dq = ds k,  dk = ds^T q
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from rlhf_jax.models.attention import Places, logits_of, sees
from rlhf_jax.models.partitioning import divided
from rlhf_jax.models.shares import on_shares


class Scaling(NamedTuple):
    """The factor and the cap of the logits, see `attention.logits_of`."""

    scale: float | None
    softcap: float | None


def row_attend(
    query: Float[Array, "B N Q W"],
    key: Float[Array, "B N H W"],
    value: Float[Array, "B N H W"],
    places: Places,
    window: Int[Array, ""] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B N Q W"]:
    """What `attention.attend` computes over the same tokens, where each device has whole rows.

    Args:
        query: queries; Q is a multiple of H.
        key: keys.
        value: values.
        places: where the tokens stand.
        window: tokens that are looked back on, the token itself included; None: all.
        scale: see `attention.logits_of`.
        softcap: see `attention.logits_of`.

    Returns:
        The attended values; finite and meaningless where a token sees nothing.
    """
    (rows,), (heads,) = divided(("batch",), query.shape[:1]), divided(("heads",), key.shape[2:3])
    axes = (rows, None, heads, None)
    attend = functools.partial(_attend, Scaling(scale, softcap))
    return on_shares(attend, (axes, axes, axes, (rows, None), ()), axes)(query, key, value, places, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scaling, query, key, value, places, window) -> Float[Array, "B N Q W"]:
    return _forward(scaling, query, key, value, places, window)[0]


def _by_head(array: Float[Array, "N Q W"], heads: int) -> Float[Array, "H G N W"]:
    return rearrange(array, "n (h g) w -> h g n w", h=heads)


def _heads_first(query, key, value) -> tuple:
    """Queries [H, G, N, W], keys and values [H, S, W] of one row: products are then taken without moving anything."""
    return _by_head(query, key.shape[1]), *(rearrange(array, "s h w -> h s w") for array in (key, value))


def parts(tokens: int) -> list[slice]:
    """The tokens in four parts: those of a part need no product with a later one.

    Example:
        >>> parts(5)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    size = -(-tokens // 4)
    return [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]


def _products(
    scaling: Scaling, query: Float[Array, "H G N W"], key: Float[Array, "H S W"], places: Places, part: slice, window
):
    """The logits [H, G, n, s] of the queries of a part with the keys up to them, and which are seen, [1, 1, n, s]."""
    whole = jax.tree.map(lambda leaf: leaf[None], places)
    of = jax.tree.map(lambda leaf: leaf[:, part], whole)
    upto = jax.tree.map(lambda leaf: leaf[:, : part.stop], whole)
    logits = logits_of(query[None, :, :, part], key[None, :, : part.stop], scaling.scale, scaling.softcap)[0]
    return logits, sees(of, upto, window)[:, None]


def _forward(scaling, query, key, value, places, window) -> tuple:
    def attend_row(query, key, value, places):
        query, key, value = _heads_first(query, key, value)

        def attend_part(part: slice):
            logits, seen = _products(scaling, query, key, places, part, window)
            logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
            highest = logits.max(axis=-1, keepdims=True)
            weights = jnp.exp(logits - highest)
            total = weights.sum(axis=-1, keepdims=True)
            out = jnp.einsum("hgns,hsw->hgnw", weights.astype(value.dtype), value[:, : part.stop])
            return out / total.astype(value.dtype), highest + jnp.log(total)

        found = [attend_part(part) for part in parts(query.shape[2])]
        out, log_total = (jnp.concatenate(each, axis=2) for each in zip(*found, strict=True))
        return rearrange(out, "h g n w -> n (h g) w"), log_total

    out, log_total = jax.lax.map(lambda row: attend_row(*row), (query, key, value, places))
    return out, (query, key, value, places, window, out, log_total)


def _backward(scaling, kept, gradient) -> tuple:
    query, key, value, places, window, out, log_total = kept
    scale = query.shape[-1] ** -0.5 if scaling.scale is None else scaling.scale

    def pull_row(query, key, value, places, out, log_total, gradient):
        out, gradient = (_by_head(array, key.shape[1]) for array in (out, gradient))
        query, key, value = _heads_first(query, key, value)
        wide_gradient = gradient.astype(log_total.dtype)
        shared = (wide_gradient * out.astype(log_total.dtype)).sum(axis=-1, keepdims=True)

        def pull_part(part: slice):
            logits, seen = _products(scaling, query, key, places, part, window)
            weights = jnp.where(seen, jnp.exp(logits - log_total[:, :, part]), 0.0)
            given, keys, values = gradient[:, :, part], key[:, : part.stop], value[:, : part.stop]
            of_weights = jnp.einsum("hgnw,hsw->hgns", given, values, preferred_element_type=logits.dtype)
            of_logits = weights * (of_weights - shared[:, :, part]) * scale
            if scaling.softcap is not None:
                of_logits = of_logits * (1.0 - jnp.square(logits / scaling.softcap))
            narrow = of_logits.astype(key.dtype)
            to_query = jnp.einsum("hgns,hsw->hgnw", narrow, keys)
            to_key = jnp.einsum("hgns,hgnw->hsw", narrow, query[:, :, part])
            to_value = jnp.einsum("hgns,hgnw->hsw", weights.astype(value.dtype), given)
            return to_query, to_key, to_value

        every = parts(query.shape[2])
        to_query, *others = zip(*(pull_part(part) for part in every), strict=True)
        to_query = jnp.concatenate(to_query, axis=2)
        to_key, to_value = jnp.zeros_like(key), jnp.zeros_like(value)
        for part, of_key, of_value in zip(every, *others, strict=True):
            to_key, to_value = to_key.at[:, : part.stop].add(of_key), to_value.at[:, : part.stop].add(of_value)
        to_key, to_value = (rearrange(array, "h s w -> s h w") for array in (to_key, to_value))
        return rearrange(to_query, "h g n w -> n (h g) w"), to_key, to_value

    found = jax.lax.map(lambda row: pull_row(*row), (query, key, value, places, out, log_total, gradient))
    return *found, None, None


_attend.defvjp(_forward, _backward)
