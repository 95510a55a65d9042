"""The clipped surrogate of proximal policy optimisation, and what is logged about its ratio."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.losses.reduce import mean
from rlhf_jax.types import Metrics, at_least_float32

_LARGEST_LOG_RATIO = 20.0


def clipped_surrogate(
    logprob: Float[Array, "*batch"],
    old_logprob: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    clip_low: Float[Array, ""] | float,
    clip_high: Float[Array, ""] | float,
) -> Float[Array, "*batch"]:
    """Per-token policy loss: minus the smaller of the plain and the clipped importance-weighted advantage.

        rho = exp(logprob - old_logprob);   -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)

    The log-ratio is held within 20 of 0 before it is exponentiated. Where logprob equals old_logprob, the gradient with
    respect to logprob is -A.

    Args:
        logprob: log-probabilities of the tokens taken under the policy being trained, [B, T] (any shape).
        old_logprob: the same under the policy that sampled them, from the rollout; no gradient flows to it.
        advantages: same shape; no gradient flows to them.
        clip_low: how far below 1 the ratio may go before the gain stops counting.
        clip_high: how far above 1.

    Returns:
        Unreduced losses of the same shape; float32 for bfloat16 and float16 input.

    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; two bounds as in DAPO (Yu et al. 2025, arXiv:2503.14476).

    Example:
        >>> import jax.numpy as jnp
        >>> logprob, old = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5])), jnp.zeros(4)
        >>> loss = clipped_surrogate(logprob, old, jnp.array([1.0, -1.0, 1.0, -1.0]), 0.2, 0.2)
        >>> [round(float(x), 4) for x in loss]
        [-1.2, 1.5, -0.5, 0.8]
    """
    ratio = jnp.exp(_log_ratio(logprob, old_logprob))
    advantages = jax.lax.stop_gradient(advantages).astype(ratio.dtype)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def ratio_metrics(
    logprob: Float[Array, "B T"],
    old_logprob: Float[Array, "B T"],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
    clip_low: Float[Array, ""] | float,
    clip_high: Float[Array, ""] | float,
) -> Metrics:
    """How far the policy has moved from the one that sampled, over the tokens that are not masked.

    | name               | meaning                                                                  |
    |--------------------|--------------------------------------------------------------------------|
    | `policy/approxkl`  | mean of (rho - 1) - log rho: estimates KL(old policy, policy), never < 0 |
    | `policy/clipfrac`  | share of tokens with rho below 1 - clip_low or above 1 + clip_high       |
    | `val/ratio`        | mean of rho                                                              |
    | `val/ratio_var`    | variance of rho (divided by n)                                           |

    Args:
        logprob: log-probabilities under the policy being trained, [B, T].
        old_logprob: the same under the policy that sampled, [B, T].
        mask: which tokens count, [B, T].
        clip_low: as in `clipped_surrogate`.
        clip_high: as in `clipped_surrogate`.

    Returns:
        A dict of float scalars without gradient; 0 each when nothing counts.

    Example:
        >>> import jax.numpy as jnp
        >>> logprob, mask = jnp.log(jnp.array([[1.5, 0.5]])), jnp.ones((1, 2), bool)
        >>> metrics = ratio_metrics(logprob, jnp.zeros((1, 2)), mask, 0.6, 0.4)
        >>> {name: round(float(value), 4) for name, value in metrics.items()}
        {'policy/approxkl': 0.1438, 'policy/clipfrac': 0.5, 'val/ratio': 1.0, 'val/ratio_var': 0.25}
    """
    log_ratio = jax.lax.stop_gradient(_log_ratio(logprob, old_logprob))
    ratio = jnp.exp(log_ratio)
    outside = (ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)
    mean_ratio = mean(ratio, mask)
    return {
        "policy/approxkl": mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "policy/clipfrac": mean(outside.astype(ratio.dtype), mask),
        "val/ratio": mean_ratio,
        "val/ratio_var": mean(jnp.square(ratio - mean_ratio), mask),
    }


def _log_ratio(logprob: Float[Array, "*batch"], old_logprob: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """logprob - old_logprob in float32 or better, held within 20 of 0."""
    difference = at_least_float32(logprob) - at_least_float32(jax.lax.stop_gradient(old_logprob))
    return jnp.clip(difference, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
