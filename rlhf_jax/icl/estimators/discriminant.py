"""Linear discriminant analysis on the prompt: Bayes' rule with the means and the covariance that the context shows."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax.icl.checks import at_least, check_probabilities


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
        covariance: the known covariance, [d, d]; None: S is estimated, which needs d + c examples or
            shrinkage.
        probabilities: P(k), [c], which sum to 1; None: the shares of the labels in the context.
        shrinkage: s of `(1 - s) S + s tr(S)/d I`, between 0 and 1; only for an estimated covariance.

    Returns:
        Logits, [B, c]. The mean of a class that the context does not show is taken as 0, that of its prior; with shares
        as probabilities its logit is -inf.

    Raises:
        ValueError: fewer than one class, probabilities that are none of these classes, a shrinkage outside [0, 1] or
            beside a known covariance, or fewer than d + c examples for a covariance without shrinkage. What is traced
            is not looked at.

    Example:
        >>> import jax.numpy as jnp
        >>> inputs, labels = jnp.array([[[1.0], [3.0], [-1.0], [-3.0]]]), jnp.array([[1, 1, 0, 0]])
        >>> logits = discriminant_logits(inputs, labels, jnp.array([[0.5]]), classes=2)
        >>> float(logits[0, 1] - logits[0, 0])  # the means are -2 and 2, the variance 1
        2.0
    """
    _check(inputs.shape, classes, covariance, probabilities, shrinkage)
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


def _check(
    shape: tuple[int, ...],
    classes: int,
    covariance: Float[Array, "d d"] | None,
    probabilities: Float[Array, " c"] | None,
    shrinkage: Float[Array, ""] | float,
) -> None:
    """Refuses options of `discriminant_logits` for inputs of this shape."""
    at_least("number of classes", classes, 1)
    if probabilities is not None and not isinstance(probabilities, jax.core.Tracer):
        check_probabilities(np.asarray(probabilities), classes)
    if isinstance(shrinkage, jax.core.Tracer):
        return
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"the shrinkage is {shrinkage}: give a number from 0 to 1.")
    if covariance is not None:
        if shrinkage != 0:
            raise ValueError(f"the covariance is known and the shrinkage is {shrinkage}: give one of the two.")
        return
    _, length, dimension = shape
    if shrinkage == 0 and length < dimension + classes:
        raise ValueError(
            f"{length} examples of {classes} classes are too few for a covariance in {dimension} dimensions: "
            f"give {dimension + classes}, the known covariance, or shrinkage."
        )


def _pooled(deviations: Float[Array, "B N d"], shrinkage: Float[Array, ""] | float) -> Float[Array, "B d d"]:
    """The covariance within classes, shrunk towards a multiple of the identity."""
    _, length, dimension = deviations.shape
    pooled = jnp.einsum("bnd,bne->bde", deviations, deviations, precision="highest") / length
    scale = jnp.trace(pooled, axis1=1, axis2=2) / dimension
    identity = jnp.eye(dimension, dtype=deviations.dtype)
    return (1 - shrinkage) * pooled + shrinkage * scale[:, None, None] * identity[None]
