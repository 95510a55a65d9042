"""Ridge regression at every prefix of a prompt, in one pass.

A is (X'X + penalty I)^-1 of the examples seen so far. Sherman and Morrison's formula adds one example x, y in O(d^2):

    g = A x,    w <- w + g (y - x'w) / (1 + x'g),    A <- A - g g' / (1 + x'g),     from w = 0, A = I / penalty.

With w ~ N(0, prior_variance I) and noise of variance sigma^2, the penalty sigma^2 / prior_variance makes this the
posterior: x'w is the mean and sigma^2 (1 + x'A x) the variance of the next target. Both come out, because the evidence
of a prompt is the product of these predictive densities.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.icl.estimators.options import check_positive


class RidgePrefixes(NamedTuple):
    """Ridge at every prefix.

    Attributes:
        predictions: x_k'w_k, w_k from the k examples before, [B, K].
        leverages: x_k'(X'X + penalty I)^-1 x_k, X the k examples before, [B, K].
    """

    predictions: Float[Array, "B K"]
    leverages: Float[Array, "B K"]


def ridge(
    inputs: Float[Array, "B N d"], targets: Float[Array, "B N"], penalty: Float[Array, ""] | float | int
) -> Float[Array, "B d"]:
    """Ridge regression, `w = (X'X + penalty I)^-1 X'y`, by one Cholesky factor a prompt.

    Args:
        inputs: X, [B, N, d].
        targets: y, [B, N].
        penalty: > 0, or 0 (least squares) for N >= d; it may be traced.

    Returns:
        Weights, [B, d].

    Raises:
        ValueError: a penalty below 0, or of 0 with fewer examples than dimensions.

    Example:
        >>> import jax.numpy as jnp
        >>> ridge(jnp.array([[[1.0], [2.0]]]), jnp.array([[1.0, 2.0]]), 5.0).tolist()
        [[0.5]]
    """
    _, length, dimension = inputs.shape
    check_positive("penalty of ridge", penalty, or_zero=length >= dimension)
    identity = jnp.eye(dimension, dtype=inputs.dtype)
    gram = jnp.einsum("bnd,bne->bde", inputs, inputs, precision="highest") + (penalty * identity)[None]
    moment = jnp.einsum("bnd,bn->bd", inputs, targets, precision="highest")
    factor = jnp.linalg.cholesky(gram)
    return jax.vmap(lambda lower, right: jax.scipy.linalg.cho_solve((lower, True), right))(factor, moment)


def ridge_prefixes(
    inputs: Float[Array, "B K d"], targets: Float[Array, "B K"], penalty: Float[Array, ""] | float | int
) -> RidgePrefixes:
    """Ridge for each example from those before it, O(K d^2) a prompt.

    Expected errors: `theory.prefixes.ridge_error`.

    Args:
        inputs: [B, K, d].
        targets: [B, K].
        penalty: > 0; it may be traced. In float32 errors grow as the penalty falls below 1e-3 of the sum of squares.

    Returns:
        Predictions, the first of them 0, and leverages.

    Raises:
        ValueError: a penalty that is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> inputs, targets = jnp.array([[[1.0], [2.0], [3.0]]]), jnp.array([[1.0, 2.0, 3.0]])
        >>> ridge_prefixes(inputs, targets, 3.0).predictions.tolist()
        [[0.0, 0.5, 1.875]]
    """

    def add(carry: tuple[Array, Array], example: tuple[Array, Array]) -> tuple[tuple[Array, Array], tuple]:
        weights, inverse = carry
        x, y = example
        gain = jnp.einsum("bde,be->bd", inverse, x, precision="highest")
        prediction = jnp.einsum("bd,bd->b", x, weights, precision="highest")
        leverage = jnp.einsum("bd,bd->b", x, gain, precision="highest")
        share = gain / (1 + leverage)[:, None]
        weights = weights + share * (y - prediction)[:, None]
        inverse = inverse - share[:, :, None] * gain[:, None, :]
        return (weights, inverse), (prediction, leverage)

    check_positive("penalty of ridge", penalty)
    count, _, dimension = inputs.shape
    identity = jnp.eye(dimension, dtype=inputs.dtype) / penalty
    start = (
        jnp.zeros((count, dimension), inputs.dtype),
        jnp.broadcast_to(identity.astype(inputs.dtype), (count, dimension, dimension)),
    )
    _, (predictions, leverages) = jax.lax.scan(add, start, (jnp.swapaxes(inputs, 0, 1), targets.T))
    return RidgePrefixes(predictions=predictions.T, leverages=leverages.T)
