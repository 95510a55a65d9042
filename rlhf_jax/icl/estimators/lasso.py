"""The Lasso by coordinate descent, for sparse tasks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.estimators.options import check_positive


def lasso(
    inputs: Float[Array, "B N d"],
    targets: Float[Array, "B N"],
    penalty: Float[Array, ""] | float,
    sweeps: int = 100,
) -> Float[Array, "B d"]:
    """Minimises `|y - X w|^2 / (2 N) + penalty |w|_1` (Tibshirani 1996), without an intercept.

    Cyclic coordinate descent on X'X / N (Friedman et al. 2010): each update is exact, `w_j = soft(c_j - sum_{i != j}
    G_ji w_i, penalty) / G_jj`. The scale of the penalty is that of `sklearn.linear_model.Lasso`.

    Args:
        inputs: X, [B, N, d].
        targets: y, [B, N].
        penalty: >= 0; it may be traced.
        sweeps: passes over the coordinates. Correlated inputs with a small penalty need more of them.

    Returns:
        Weights, [B, d].

    Raises:
        ValueError: a penalty below 0, or fewer than one sweep.

    Example:
        >>> import jax.numpy as jnp
        >>> inputs = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
        >>> lasso(inputs, jnp.array([[3.0, 0.5]]), 0.5).tolist()
        [[2.0, 0.0]]
    """
    _check(penalty, sweeps)
    count = jnp.asarray(inputs.shape[1], inputs.dtype)
    gram = jnp.einsum("bnd,bne->bde", inputs, inputs, precision="highest") / count
    moment = jnp.einsum("bnd,bn->bd", inputs, targets, precision="highest") / count
    return jax.vmap(lambda g, c: _descend(g, c, penalty, sweeps))(gram, moment)


def lasso_prefixes(
    inputs: Float[Array, "B K d"],
    targets: Float[Array, "B K"],
    penalty: Float[Array, ""] | float,
    sweeps: int = 100,
) -> Float[Array, "B K"]:
    """Predictions of the Lasso for each example from those before it.

    Args:
        inputs: [B, K, d].
        targets: [B, K].
        penalty: of `lasso`, the same at every prefix, whose N is the number of examples seen.
        sweeps: passes over the coordinates.

    Returns:
        Predictions, [B, K]; the first is 0.

    Raises:
        ValueError: as `lasso`.

    Example:
        >>> import jax.numpy as jnp
        >>> inputs = jnp.array([[[1.0, 0.0], [1.0, 0.0], [2.0, 5.0]]])
        >>> lasso_prefixes(inputs, jnp.array([[3.0, 3.0, 7.0]]), 0.5).tolist()
        [[0.0, 2.5, 5.0]]
    """
    _check(penalty, sweeps)

    def one(x: Float[Array, "K d"], y: Float[Array, " K"]) -> Float[Array, " K"]:
        def add(carry: tuple[Array, Array, Array], example: tuple[Array, Array]) -> tuple[tuple, Array]:
            gram, moment, seen = carry
            features, target = example
            count = jnp.maximum(seen, 1)
            weights = _descend(gram / count, moment / count, penalty, sweeps)
            prediction = jnp.dot(features, weights, precision="highest")
            return (gram + jnp.outer(features, features), moment + features * target, seen + 1), prediction

        d = x.shape[1]
        start = (jnp.zeros((d, d), x.dtype), jnp.zeros(d, x.dtype), jnp.zeros((), x.dtype))
        return jax.lax.scan(add, start, (x, y))[1]

    return jax.vmap(one)(inputs, targets)


def _check(penalty: Float[Array, ""] | float, sweeps: int) -> None:
    check_positive("penalty of the Lasso", penalty, or_zero=True)
    at_least("number of sweeps", sweeps, 1)


def _descend(
    gram: Float[Array, "d d"], moment: Float[Array, " d"], penalty: Float[Array, ""] | float, sweeps: int
) -> Float[Array, " d"]:
    """Sweeps over the coordinates, from 0; a coordinate that no example has stays 0."""
    diagonal = jnp.diagonal(gram)

    def update(j: Array, weights: Float[Array, " d"]) -> Float[Array, " d"]:
        rest = moment[j] - jnp.dot(gram[j], weights, precision="highest") + diagonal[j] * weights[j]
        shrunk = jnp.sign(rest) * jnp.maximum(jnp.abs(rest) - penalty, 0)
        new = jnp.where(diagonal[j] > 0, shrunk / jnp.where(diagonal[j] > 0, diagonal[j], 1), 0)
        return weights.at[j].set(new.astype(weights.dtype))

    def sweep(_: Array, weights: Float[Array, " d"]) -> Float[Array, " d"]:
        return jax.lax.fori_loop(0, gram.shape[0], update, weights)

    return jax.lax.fori_loop(0, sweeps, sweep, jnp.zeros_like(moment))
