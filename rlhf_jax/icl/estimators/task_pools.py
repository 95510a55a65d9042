"""Bayes' prediction when tasks come from a known finite pool: the estimator of a model that remembers its tasks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.estimators.options import check_positive


def pool_prefixes(
    inputs: Float[Array, "B K d"],
    targets: Float[Array, "B K"],
    pool: Float[Array, "M _"],
    noise_variance: Float[Array, ""] | float,
    block: int = 1024,
) -> Float[Array, "B K"]:
    """The discrete minimum-mean-squared-error predictions for each example from those before it.

        yhat_k = sum_m p_m w_m' x_k,    p_m = softmax_m(-sum_{j<k} (y_j - w_m' x_j)^2 / (2 sigma^2))

    The posterior over a pool of M equally likely tasks (Raventos, Paul, Chen, Ganguli 2023, arXiv 2306.15063, eq. 4).
    As M grows it becomes ridge regression. The pool passes through in blocks with a running maximum and running sums,
    so the memory is O(B K block), whatever M.

    Args:
        inputs: [B, K, d].
        targets: [B, K].
        pool: w_m, [M, d], M >= 1.
        noise_variance: sigma^2 > 0; it may be traced.
        block: tasks at a time.

    Returns:
        Predictions, [B, K]; the first is that of the mean task.

    Raises:
        ValueError: an empty pool, one of tasks of another dimension, a noise variance that is not above 0, or a block
            that is not whole or below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> inputs, targets = jnp.array([[[1.0], [1.0]]]), jnp.array([[1.0, 1.0]])
        >>> pool_prefixes(inputs, targets, jnp.array([[1.0], [-1.0]]), 0.05).round(4).tolist()
        [[0.0, 1.0]]
    """
    size, dtype = at_least("number of tasks in the pool", len(pool), 1), inputs.dtype
    if pool.shape[1] != inputs.shape[2]:
        raise ValueError(
            f"the tasks of the pool have {pool.shape[1]} dimensions and the inputs {inputs.shape[2]}: make them equal."
        )
    check_positive("noise variance", noise_variance)
    block = min(at_least("block of tasks", block, 1), size)
    surplus = -size % block
    blocks = jnp.pad(pool, ((0, surplus), (0, 0))).reshape(-1, block, pool.shape[1])
    present = (jnp.arange(size + surplus) < size).reshape(-1, block)

    def pass_block(carry: tuple[Array, Array, Array], part: tuple[Array, Array]) -> tuple[tuple, None]:
        highest, total, weighted = carry
        tasks, real = part
        predictions = jnp.einsum("bkd,md->bkm", inputs, tasks, precision="highest")
        errors = (targets[:, :, None] - predictions) ** 2
        scores = (errors - jnp.cumsum(errors, axis=1)) / (2 * noise_variance)  # of the examples before
        scores = jnp.where(real[None, None], scores.astype(dtype), -jnp.inf)
        peak = jnp.maximum(highest, scores.max(axis=2))
        likelihoods = jnp.exp(scores - peak[:, :, None])
        shrink = jnp.exp(highest - peak)
        total = total * shrink + likelihoods.sum(axis=2)
        weighted = weighted * shrink + jnp.einsum("bkm,bkm->bk", likelihoods, predictions, precision="highest")
        return (peak, total, weighted), None

    zero = jnp.zeros(targets.shape, dtype)
    (_, total, weighted), _ = jax.lax.scan(pass_block, (jnp.full_like(zero, -jnp.inf), zero, zero), (blocks, present))
    return weighted / total
