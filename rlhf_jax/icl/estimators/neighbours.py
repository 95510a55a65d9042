"""Nearest neighbours at every prefix of a prompt."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.icl.checks import at_least


def neighbour_prefixes(
    inputs: Float[Array, "B K d"], targets: Float[Array, "B K"], neighbours: int = 3
) -> Float[Array, "B K"]:
    """Predicts for each example the mean target of the nearest examples before it.

    Garg et al. 2022 (arXiv 2208.01066) compare with three neighbours. Of equally distant ones the earlier is taken.

    Args:
        inputs: [B, K, d]; distances are Euclidean.
        targets: [B, K].
        neighbours: how many; where fewer have been seen, all of them.

    Returns:
        Predictions, [B, K]; the first is 0.

    Raises:
        ValueError: the number of neighbours is not whole or below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> inputs = jnp.array([[[0.0], [1.0], [4.0], [0.9]]])
        >>> neighbour_prefixes(inputs, jnp.array([[2.0, 4.0, 6.0, 8.0]]), neighbours=2).tolist()
        [[0.0, 2.0, 3.0, 3.0]]
    """
    neighbours = at_least("number of neighbours", neighbours, 1)
    length = inputs.shape[1]
    difference = inputs[:, :, None] - inputs[:, None]
    distance = jnp.einsum("bkjd,bkjd->bkj", difference, difference, precision="highest")
    seen = jnp.tril(jnp.ones((length, length), bool), -1)
    _, nearest = jax.lax.top_k(jnp.where(seen[None], -distance, -jnp.inf), min(neighbours, length))
    # Places that have not been seen are at -inf: `top_k` gives them last, after all that have been.
    taken = jnp.arange(nearest.shape[2])[None] < jnp.arange(length)[:, None]
    values = jnp.take_along_axis(targets[:, None], nearest, axis=2) * taken.astype(targets.dtype)[None]
    return values.sum(axis=2) / jnp.maximum(taken.sum(axis=1), 1).astype(targets.dtype)[None]
