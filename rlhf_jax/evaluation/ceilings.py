"""What a device can do at best, measured: FLOP/s of one matrix product, bytes a second of a copy.

A share of these says more than one of a data sheet: they hold for this machine as it is, with whatever else it does.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

CALLS = 4
"""Calls that are handed to the device at once, so that it does not wait for Python."""
Product = tuple[int, int, int]
"""M, K and N of a product [M, K] x [K, N]."""


class Ceiling(NamedTuple):
    """The largest rate that was found.

    Attributes:
        rate: FLOP/s, or bytes/s.
        of: what reached it.
    """

    rate: float
    of: str


def matmul_ceiling(dtype: str, products: Sequence[Product], repeats: int = 5) -> Ceiling:
    """The largest FLOP/s over a few matrix products.

        rate = max over products and repeats of 2 M K N / seconds

    Args:
        dtype: of both matrices and of the result.
        products: the products to try: large squares, and those of the model.
        repeats: timed groups of calls of each.

    Returns:
        FLOP/s, and the product that reached it.

    Raises:
        ValueError: there is nothing to time.
    """
    if not products or repeats < 1:
        raise ValueError("a ceiling needs a product, and a repeat or more.")

    def rate(product: Product) -> float:
        rows, inner, columns = product
        keys = jax.random.split(jax.random.key(0))  # of constants a GPU makes a lighter work
        left, right = map(partial(jax.random.normal, dtype=jnp.dtype(dtype)), keys, ((rows, inner), (inner, columns)))
        multiply = jax.jit(jnp.matmul)
        return 2.0 * rows * inner * columns / _fastest(lambda: multiply(left, right), repeats)

    rates = {product: rate(product) for product in products}
    best = max(rates, key=rates.__getitem__)
    return Ceiling(rates[best], "{} x {} x {}".format(*best))


def model_products(tokens: int, width: int, feed_forward_width: int, vocab_size: int) -> tuple[Product, ...]:
    """The large products of a forward pass: into and out of the feed-forward block, and the logits of a tenth.

    Example:
        >>> model_products(40, 4, 8, 16)
        ((40, 4, 8), (40, 8, 4), (4, 4, 16))
    """
    return (
        (tokens, width, feed_forward_width),
        (tokens, feed_forward_width, width),
        (max(tokens // 10, 1), width, vocab_size),
    )


def copy_ceiling(size: int, repeats: int = 5) -> Ceiling:
    """The largest rate at which memory is read and written at once, both counted.

    Args:
        size: bytes of the array that is copied; several times what caches hold.
        repeats: timed groups of calls.

    Returns:
        bytes/s, and whether a new array or the old one was written to.

    Raises:
        ValueError: there is nothing to copy.
    """
    if size < 4 or repeats < 1:
        raise ValueError(
            f"a copy of {size} bytes, {repeats} times, cannot be timed: give 4 bytes and 1 repeat or more."
        )
    array = jnp.zeros(size // 4, jnp.float32)
    elsewhere = jax.jit(lambda x: x + 1.0)
    in_place = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    moved = 2.0 * array.nbytes
    rates = {"into a new array": moved / _fastest(lambda: elsewhere(array), repeats)}

    def call() -> jax.Array:
        nonlocal array
        array = in_place(array)
        return array

    rates["in place"] = moved / _fastest(call, repeats)
    best = max(rates, key=rates.__getitem__)
    return Ceiling(rates[best], best)


def _fastest(call: Callable[[], jax.Array], repeats: int) -> float:
    """Seconds of a call in the fastest group of calls, after one that is not timed."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(CALLS):
            last = call()
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - began) / CALLS)
    return min(seconds)
