"""Gradients of a batch that is too large to be seen at once, from microbatches of its rows."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax.types import Params, wide

Tree = TypeVar("Tree")


def accumulated_gradients(
    loss: Callable[[Params, Any, Any], tuple[Array, Any]], params: Params, batch: Any, parts: int
) -> tuple[Params, Any]:
    """The gradient of a batch's loss, from as many microbatches in turn: the numbers of the batch as a whole.

    A loss adds up over microbatches if it divides totals over the rows of the part by a weight of the whole batch (see
    `whole` of `losses.reduce.mean`). A mean of the microbatches' means would be another number where lengths differ.
    Sums are taken in float32 at least.

    Part p holds the rows p, p + parts, p + 2 parts, …: where rows are split over devices in blocks, every device then
    has rows of every part, and none are sent around.

    Args:
        loss: `loss(params, part, batch) -> (value, outputs)`; values add up over the parts, and `outputs` is a tree of
            arrays whose first axis counts the rows.
        params: what the gradient is taken with respect to.
        batch: a tree of arrays whose first axis counts the rows.
        parts: number of microbatches.

    Returns:
        Gradients in the dtypes of `params`, and the outputs of all rows in their order.

    Raises:
        ValueError: the rows do not split into so many parts.

    Example:
        >>> def loss(slope, part, batch):
        ...     errors = jnp.square(slope * part["x"] - part["y"])
        ...     return errors.sum() / len(batch["x"]), errors
        >>> batch = {"x": jnp.arange(4.0), "y": jnp.ones(4)}
        >>> gradient, errors = accumulated_gradients(loss, jnp.array(2.0), batch, parts=2)
        >>> float(gradient), errors.tolist()
        (11.0, [1.0, 1.0, 9.0, 25.0])
    """
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        return gradient(params, batch, batch)

    def add(totals: Params, part: Any) -> tuple[Params, Any]:
        found, outputs = gradient(params, part, batch)
        return jax.tree.map(lambda total, one: total + one.astype(total.dtype), totals, found), outputs

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf)), params)
    totals, outputs = jax.lax.scan(add, zero, split_rows(batch, parts))
    gradients = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), totals, params)
    return gradients, _joined(outputs)


def by_parts(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """`function(batch)` of rows that do not depend on one another, from as many microbatches in turn.

    Args:
        function: takes and returns trees of arrays whose first axis counts the rows.
        batch: such a tree.
        parts: number of microbatches.

    Raises:
        ValueError: the rows do not split into so many parts.

    Example:
        >>> by_parts(jnp.square, jnp.arange(4.0), 2).tolist()
        [0.0, 1.0, 4.0, 9.0]
    """
    return function(batch) if parts == 1 else _joined(jax.lax.map(function, split_rows(batch, parts)))


def split_rows(batch: Tree, parts: int) -> Tree:
    """Arrays [B, …] as [parts, B / parts, …]; row r is in part r modulo parts.

    Raises:
        ValueError: the rows do not split into so many parts.

    Example:
        >>> split_rows(jnp.arange(6), 2).tolist()
        [[0, 2, 4], [1, 3, 5]]
    """
    rows = {len(leaf) for leaf in jax.tree.leaves(batch)}
    for count in rows:
        if parts < 1 or count % parts:
            raise ValueError(
                f"{count} rows an optimiser step do not split into {parts} microbatches ({count} / {parts} is no whole "
                "number): choose an --accumulate that divides the rows."
            )
    return jax.tree.map(lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1), batch)


def _joined(parts: Tree) -> Tree:
    """The arrays that `split_rows` split."""
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), parts)
