"""Preference optimisation that is held to its reference by the chi-squared divergence beside the KL."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.losses.kl import LARGEST_LOG_RATIO
from rlhf_jax.losses.preference import check_positive, log_ratio


def chi_squared_reward(
    logprob: Float[Array, " B"], reference_logprob: Float[Array, " B"], beta: Float[Array, ""] | float
) -> Float[Array, " B"]:
    """The reward that a policy stands for where the chi-squared divergence holds it to its reference beside the KL.

        z = pi(y | x) / ref(y | x);   r = beta (z + log z)

    The z of the sum is held below e^20, where float32 still tells values apart.

    Args:
        logprob: log-probability of each completion under the policy, its tokens summed, [B], nats.
        reference_logprob: the same under the reference; no gradient flows to it.
        beta: reward units.

    Returns:
        [B]; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: `beta` is a Python number that is not positive.

    Source: Huang et al. 2024 (arXiv:2407.13399), algorithm 1.

    Example:
        >>> print(f"{chi_squared_reward(jnp.array([-1.0]), jnp.array([-1.0]), 0.1)[0]:.2f}")
        0.10
    """
    check_positive("beta", beta)
    ratio = log_ratio(logprob, reference_logprob)
    return beta * (jnp.exp(jnp.minimum(ratio, LARGEST_LOG_RATIO)) + ratio)


def chi_po_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    reference_chosen: Float[Array, " B"],
    reference_rejected: Float[Array, " B"],
    beta: Float[Array, ""] | float,
    reward_bound: Float[Array, ""] | float,
) -> Float[Array, " B"]:
    """Chi-squared preference optimisation: DPO with the link z + log z in place of log z, and a clipped gap.

        delta = r(w) - r(l), with r of `chi_squared_reward`;   loss = -log sigma(clip(delta, -2 R, 2 R))

    A pair beyond the clip has no gradient.

    Args:
        chosen: see `losses.preference.log_ratio_gap`, as the next three.
        rejected: log pi(l).
        reference_chosen: log ref(w).
        reference_rejected: log ref(l).
        beta: reward units.
        reward_bound: R, the largest absolute value that the true reward may have.

    Returns:
        Unreduced losses in nats, [B]; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: `beta` or `reward_bound` is a Python number that is not positive.

    Source: Huang et al. 2024 (arXiv:2407.13399), algorithm 1.

    Example:
        >>> one = jnp.log(jnp.array([2.0]))  # z of the chosen is 2, of the other 1: delta = 1 + log 2
        >>> zero = jnp.zeros(1)
        >>> print(f"{chi_po_loss(one, zero, zero, zero, 1.0, 5.0)[0]:.4f}")  # log(1 + 1 / (2 e))
        0.1688
    """
    check_positive("reward_bound", reward_bound)
    delta = chi_squared_reward(chosen, reference_chosen, beta) - chi_squared_reward(rejected, reference_rejected, beta)
    return -jax.nn.log_sigmoid(jnp.clip(delta, -2.0 * reward_bound, 2.0 * reward_bound))
