"""Attention for long contexts: some keys at a time, on one device or on a ring of them.

The tokens of a row are split over the `sequence` axis of the mesh. Every device keeps its queries, while keys and
values go round the ring of devices until they are home again (Liu et al. 2023, 2310.01889). A device looks at the keys
that pass in blocks and adds up a softmax as it goes, in at least float32 (Milakov & Gimelshein 2018, 1805.02867); the
backward pass computes the weights of each block again from the kept logarithms of the sums (Dao et al. 2022,
2205.14135). Memory grows with N times the block, never with N². Without a mesh the ring has one device.

Hidden products are computed like any, as in the reference: a device spends N² / s products on s devices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from rlhf_jax.models.attention import Places, logits_of, sees
from rlhf_jax.models.partitioning import axes_of, divided, mesh_sizes
from rlhf_jax.models.shares import on_shares
from rlhf_jax.types import wide


class Options(NamedTuple):
    """What is known before anything is computed: the factor and softcap of the logits, and the ring's axis and size."""

    scale: float | None
    softcap: float | None
    axis: str | None
    devices: int


class Block(NamedTuple):
    """Keys, their values and where they stand."""

    key: Float[Array, "*blocks B H S W"]
    value: Float[Array, "*blocks B H S W"]
    places: Places


def ring_attend(
    query: Float[Array, "B N Q W"],
    key: Float[Array, "B N H W"],
    value: Float[Array, "B N H W"],
    places: Places,
    window: Int[Array, ""] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    block: int = 512,
) -> Float[Array, "B N Q W"]:
    """What `attention.attend` computes over the same tokens, without products of all queries and keys at once.

    Rows, tokens and heads that the mesh does not divide lie on every device.

    Args:
        query: queries; Q is a multiple of H.
        key: keys.
        value: values.
        places: where the tokens stand.
        window: tokens that are looked back on, the token itself included; None: all.
        scale: see `attention.logits_of`.
        softcap: see `attention.logits_of`.
        block: keys that are looked at in one step.

    Returns:
        The attended values; 0 where a token sees nothing.
    """
    tokens = divided(("batch", "tokens"), key.shape[:2])
    heads = (*tokens, *divided(("heads", None), key.shape[2:]))
    sizes = mesh_sizes()
    ring = next(iter(axes_of(tokens[1], sizes)), None)
    options = Options(scale, softcap, ring, sizes.get(ring, 1))

    def on_this_device(query, key, value, places, window):
        # What depends on places alone would be taken out of a loop over layers and stored: masks of N² tokens.
        places, _ = jax.lax.optimization_barrier((places, jax.lax.stop_gradient(key)))
        blocks = _in_blocks(Block(key, value, places), min(block, key.shape[1]))
        grouped = rearrange(query, "b n (h g) w -> b h g n w", h=key.shape[2])
        out = _attend(options, grouped, blocks.key, blocks.value, places, blocks.places, window)
        return rearrange(out, "b h g n w -> b n (h g) w").astype(query.dtype)

    return on_shares(on_this_device, (heads, heads, heads, tokens, ()), heads)(query, key, value, places, window)


def _in_blocks(whole: Block, size: int) -> Block:
    """Blocks of `size` keys side by side on a new first axis, the last one filled up with padding."""

    def cut(leaf: Array) -> Array:
        rest = -leaf.shape[1] % size
        filled = jnp.pad(leaf, ((0, 0), (0, rest), *((0, 0),) * (leaf.ndim - 2)))
        order = "b (m s) h w -> m b h s w" if leaf.ndim == 4 else "b (m s) -> m b s"
        return rearrange(filled, order, s=size)

    return jax.tree.map(cut, whole)


def _around(options: Options, visit: Callable[..., tuple], carry: Any, blocks: Block, sums: Any = None) -> tuple:
    """Visits the blocks of every device of the ring: `visit(carry, block, its sums) -> (carry, its sums)`.

    Blocks and their sums travel together, and are home at the end.
    """

    def visit_all(carry, blocks, sums):
        return jax.lax.scan(lambda carry, block: visit(carry, *block), carry, (blocks, sums))

    if options.devices == 1:
        return visit_all(carry, blocks, sums)
    following = [(device, (device + 1) % options.devices) for device in range(options.devices)]

    def step(state, _):
        carry, blocks, sums = state
        carry, sums = visit_all(carry, blocks, sums)
        return (carry, *jax.lax.ppermute((blocks, sums), options.axis, following)), None

    (carry, _, sums), _ = jax.lax.scan(step, (carry, blocks, sums), length=options.devices)
    return carry, sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, query, key, value, query_places, key_places, window) -> Float[Array, "B H G N W"]:
    return _forward(options, query, key, value, query_places, key_places, window)[0]


def _seen_logits(options, query, block: Block, query_places: Places, window) -> tuple:
    """Logits, as low as can be where the key is hidden, and which are not hidden."""
    seen = sees(query_places, block.places, window)[:, None, None]
    logits = logits_of(query, block.key, options.scale, options.softcap)
    return jnp.where(seen, logits, jnp.finfo(logits.dtype).min), seen


def _weighted(weights: Float[Array, "B H G N S"], value: Float[Array, "B H S W"]) -> Float[Array, "B H G N W"]:
    return jnp.einsum("bhgns,bhsw->bhgnw", weights.astype(value.dtype), value, preferred_element_type=weights.dtype)


def _forward(options, query, key, value, query_places, key_places, window) -> tuple:
    def visit(carry, block, sums):
        highest, total, weighted = carry
        logits, seen = _seen_logits(options, query, block, query_places, window)
        higher = jnp.maximum(highest, logits.max(axis=-1))
        weights = jnp.where(seen, jnp.exp(logits - higher[..., None]), 0.0)
        shrink = jnp.exp(highest - higher)
        total = total * shrink + weights.sum(axis=-1)
        return (higher, total, weighted * shrink[..., None] + _weighted(weights, block.value)), sums

    zeros = jnp.zeros_like(query, wide(query))
    start = (jnp.full_like(zeros[..., 0], jnp.finfo(zeros.dtype).min), zeros[..., 0], zeros)
    (highest, total, weighted), _ = _around(options, visit, start, Block(key, value, key_places))
    out = weighted / jnp.where(total > 0, total, 1.0)[..., None]
    log_total = jnp.where(total > 0, highest + jnp.log(total), 0.0)
    return out, (query, key, value, query_places, key_places, window, out, log_total)


def _backward(options, kept, out_gradient) -> tuple:
    query, key, value, query_places, key_places, window, out, log_total = kept
    shared = -(out_gradient * out).sum(axis=-1)  # what the softmax takes from the gradient of every weight of a query

    def visit(query_gradient, block, sums):
        def products(query, key, value):
            logits, seen = _seen_logits(options, query, Block(key, value, block.places), query_places, window)
            weights = jnp.where(seen, jnp.exp(logits - log_total[..., None]), 0.0)
            return _weighted(weights, value), weights.sum(axis=-1)

        _, pull = jax.vjp(products, query, block.key, block.value)
        to_query, *to_block = pull((out_gradient, shared))
        return jax.tree.map(_add, (query_gradient, sums), (to_query, tuple(to_block)))

    start, *sums = (jnp.zeros_like(leaf, wide(leaf)) for leaf in (query, key, value))
    to_query, (to_key, to_value) = _around(options, visit, start, Block(key, value, key_places), tuple(sums))
    return to_query.astype(query.dtype), to_key.astype(key.dtype), to_value.astype(value.dtype), None, None, None


def _add(total: Float[Array, "..."], part: Float[Array, "..."]) -> Float[Array, "..."]:
    return total + part.astype(total.dtype)


_attend.defvjp(_forward, _backward)
