"""Least squares of minimum norm, and averaging: what a prompt of linear regression says without a prior.

Prefixes: prediction k of [B, K] is for example k (counted from 0) and uses the k examples before it, as the predictions
of a transformer at every input token do (Garg et al. 2022, arXiv 2208.01066). With no example it is 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def minimum_norm(inputs: Float[Array, "B N d"], targets: Float[Array, "B N"]) -> Float[Array, "B d"]:
    """The least-squares solution of the least norm, `w = X^+ y`.

    With fewer examples than dimensions it interpolates them; with more it is ordinary least squares. Expected errors:
    `theory.prefixes.least_squares_error`.

    Args:
        inputs: X, [B, N, d], N >= 1.
        targets: y, [B, N].

    Returns:
        Weights, [B, d]; the prediction for a query x is `x @ w`.

    Example:
        >>> import jax.numpy as jnp
        >>> minimum_norm(jnp.array([[[1.0, 1.0]]]), jnp.array([[4.0]])).round(4).tolist()
        [[2.0, 2.0]]
    """
    inverse = jnp.linalg.pinv(inputs)
    return jnp.einsum("bdn,bn->bd", inverse, targets, precision="highest")


def minimum_norm_prefixes(inputs: Float[Array, "B K d"], targets: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """Predictions of least squares of minimum norm for each example from those before it.

    One singular value decomposition a prefix: rows that have not been seen are set to 0, which changes no solution of
    minimum norm.

    Args:
        inputs: [B, K, d].
        targets: [B, K].

    Returns:
        Predictions, [B, K]; the first is 0.

    Example:
        >>> import jax.numpy as jnp
        >>> inputs = jnp.array([[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]])
        >>> minimum_norm_prefixes(inputs, jnp.array([[3.0, 4.0, 9.0]])).round(4).tolist()
        [[0.0, 3.0, 2.0]]
    """
    place = jnp.arange(inputs.shape[1])

    def at(k: Array) -> Float[Array, " B"]:
        seen = (place < k).astype(inputs.dtype)
        weights = minimum_norm(inputs * seen[None, :, None], targets * seen[None])
        query = jax.lax.dynamic_index_in_dim(inputs, k, axis=1, keepdims=False)
        return jnp.einsum("bd,bd->b", query, weights, precision="highest")

    return jax.lax.map(at, place).T


def averaging_prefixes(inputs: Float[Array, "B K d"], targets: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """Predictions of averaging, `x_k' w_k` with `w_k = (1/k) sum_{i<k} y_i x_i`.

    It is one step of gradient descent from 0, and what one layer of linear attention can do without a preconditioner.
    Expected errors: `theory.prefixes.averaging_error`.

    Args:
        inputs: [B, K, d].
        targets: [B, K].

    Returns:
        Predictions, [B, K]; the first is 0.

    Example:
        >>> import jax.numpy as jnp
        >>> inputs = jnp.array([[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]])
        >>> averaging_prefixes(inputs, jnp.array([[3.0, 4.0, 9.0]])).tolist()
        [[0.0, 3.0, 4.0]]
    """
    sums = jnp.cumsum(inputs * targets[:, :, None], axis=1)
    before = jnp.concatenate([jnp.zeros_like(sums[:, :1]), sums[:, :-1]], axis=1)
    count = jnp.maximum(jnp.arange(inputs.shape[1]), 1).astype(inputs.dtype)
    return jnp.einsum("bkd,bkd->bk", inputs, before, precision="highest") / count[None]
