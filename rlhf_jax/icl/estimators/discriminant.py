"""Linear discriminant analysis on the prompt: Bayes' rule with the means and the covariance that the context shows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def discriminant_logits(
    inputs: Float[Array, "B N d"],
    labels: Int[Array, "B N"],
    query: Float[Array, "B d"],
    classes: int,
    covariance: Float[Array, "d d"] | None = None,
    probabilities: Float[Array, " c"] | None = None,
    shrinkage: Float[Array, ""] | float = 0.0,
) -> Float[Array, "B c"]:
    """Logits of the plug-in classifier, `m_k' S^-1 x - m_k' S^-1 m_k / 2 + log P(k)` (Fisher 1936).

    m_k is the mean of the context's inputs of class k, S their pooled covariance within classes (divided by N, the
    maximum-likelihood one) or the known one. Unlike a layer of linear attention it uses each class's own count, and an
    intercept.

    Args:
        inputs: [B, N, d].
        labels: 0 .. c-1, [B, N].
        query: x, [B, d].
        classes: c.
        covariance: the known covariance, [d, d]; None: S is estimated, which needs more than d + c examples or
            shrinkage.
        probabilities: P(k), [c]; None: the shares of the labels in the context.
        shrinkage: s of `(1 - s) S + s tr(S)/d I`, between 0 and 1; only for an estimated covariance.

    Returns:
        Logits, [B, c]. The mean of a class that the context does not show is taken as 0, that of its prior; with shares
        as probabilities its logit is -inf.

    Example:
        >>> import jax.numpy as jnp
        >>> inputs, labels = jnp.array([[[1.0], [3.0], [-1.0], [-3.0]]]), jnp.array([[1, 1, 0, 0]])
        >>> logits = discriminant_logits(inputs, labels, jnp.array([[0.5]]), classes=2)
        >>> float(logits[0, 1] - logits[0, 0])  # the means are -2 and 2, the variance 1
        2.0
    """
    dtype = inputs.dtype
    shown = (labels[:, :, None] == jnp.arange(classes, dtype=labels.dtype)[None, None]).astype(dtype)
    counts = shown.sum(axis=1)
    sums = jnp.einsum("bnk,bnd->bkd", shown, inputs, precision="highest")
    means = sums / jnp.maximum(counts, 1)[:, :, None]
    if covariance is None:
        own = jnp.einsum("bnk,bkd->bnd", shown, means, precision="highest")
        spread = _pooled(inputs - own, shrinkage)
    else:
        spread = jnp.broadcast_to(covariance.astype(dtype), (len(inputs), *covariance.shape))
    prior = jnp.log(counts / inputs.shape[1]) if probabilities is None else jnp.log(probabilities.astype(dtype))[None]
    factor = jnp.linalg.cholesky(spread)
    solved = jax.vmap(lambda lower, right: jax.scipy.linalg.cho_solve((lower, True), right.T).T)(factor, means)
    return jnp.einsum("bkd,bkd->bk", solved, query[:, None] - means / 2, precision="highest") + prior


def _pooled(deviations: Float[Array, "B N d"], shrinkage: Float[Array, ""] | float) -> Float[Array, "B d d"]:
    """The covariance within classes, shrunk towards a multiple of the identity."""
    _, length, dimension = deviations.shape
    pooled = jnp.einsum("bnd,bne->bde", deviations, deviations, precision="highest") / length
    scale = jnp.trace(pooled, axis1=1, axis2=2) / dimension
    identity = jnp.eye(dimension, dtype=deviations.dtype)
    return (1 - shrinkage) * pooled + shrinkage * scale[:, None, None] * identity[None]
