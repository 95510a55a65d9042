"""Many updates over data in memory, as one scan."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rlhf_jax.types import Metrics

State = TypeVar("State")


def epoch_orders(key: Array, examples: int, batch_size: int, epochs: int) -> Int[Array, "steps batch"]:
    """Row indices of every minibatch of `epochs` passes, each pass in its own random order.

    The last, incomplete minibatch of a pass is dropped; every pass drops other rows.

    Args:
        key: a typed key.
        examples: number of rows of data.
        batch_size: rows a minibatch.
        epochs: number of passes.

    Returns:
        int32 [epochs * (examples // batch_size), batch_size].

    Raises:
        ValueError: the data do not fill one minibatch.

    Example:
        >>> epoch_orders(jax.random.key(0), examples=5, batch_size=2, epochs=3).shape
        (6, 2)
    """
    if examples < batch_size:
        raise ValueError(f"{examples} examples do not fill one minibatch of {batch_size}; lower the batch size.")
    batches = examples // batch_size

    def one_pass(key: Array) -> Array:
        return jax.random.permutation(key, examples)[: batches * batch_size].reshape(batches, batch_size)

    orders = jax.vmap(one_pass)(jax.random.split(key, epochs))
    return orders.reshape(-1, batch_size).astype(jnp.int32)


def fit(
    update: Callable[[State, object], tuple[State, Metrics]],
    state: State,
    data: object,
    order: Int[Array, "steps batch"],
) -> tuple[State, Metrics]:
    """Applies `update(state, batch)` once for every row of `order`, gathering each batch from `data`.

    Args:
        update: the update of an offline algorithm.
        state: its state.
        data: a pytree whose leaves have the examples on axis 0.
        order: row indices of every minibatch, from `epoch_orders`.

    Returns:
        The last state, and the metrics with the steps on axis 0.
    """

    def step(state: State, rows: Int[Array, " batch"]):
        return update(state, jax.tree.map(lambda leaf: leaf[rows], data))

    return jax.lax.scan(step, state, order)
