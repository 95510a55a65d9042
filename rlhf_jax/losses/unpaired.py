"""Kahneman-Tversky optimisation: a policy from single completions that are marked good or bad."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.losses.preference import check_positive, log_ratio
from rlhf_jax.losses.reduce import mean


def kto_reference_point(
    mismatched: Float[Array, " B"], reference_mismatched: Float[Array, " B"], counted: Bool[Array, " B"]
) -> Float[Array, ""]:
    """The log-ratio from which gains and losses are counted: an estimate of the KL between policy and reference.

        z0 = max(0, mean over i of log pi(y_{i+1} | x_i) - log ref(y_{i+1} | x_i))

    It is one number a batch, and no gradient flows through it.

    Args:
        mismatched: log pi(y_{i+1} | x_i), each prompt of the batch with the completion of the next row, [B], nats.
        reference_mismatched: the same under the reference.
        counted: which rows count, [B]; where none does, z0 is 0.

    Returns:
        A scalar, nats; float32 or better.

    Raises:
        ValueError: one row alone, which has no other's completion.

    Source: Ethayarajh et al. 2024 (arXiv:2402.01306).

    Example:
        >>> policy, reference = jnp.array([-3.0, -5.0, -9.0]), jnp.array([-4.0, -5.0, -1.0])
        >>> float(kto_reference_point(policy, reference, jnp.array([True, True, False])))
        0.5
    """
    if len(mismatched) < 2:
        raise ValueError("A batch of KTO has 1 row; its reference point needs 2 rows or more.")
    gaps = jax.lax.stop_gradient(log_ratio(mismatched, reference_mismatched))
    return jax.nn.relu(mean(gaps[:, None], counted[:, None]))


def kto_loss(
    logprob: Float[Array, " B"],
    reference_logprob: Float[Array, " B"],
    good: Bool[Array, " B"],
    reference_point: Float[Array, ""] | float,
    beta: Float[Array, ""] | float,
    good_weight: Float[Array, ""] | float = 1.0,
    bad_weight: Float[Array, ""] | float = 1.0,
) -> Float[Array, " B"]:
    """What a completion falls short of: gains of good ones and losses of bad ones both saturate.

        g = log pi(y | x) - log ref(y | x)
        loss = lambda_D (1 - sigma(beta (g - z0))) where y is good, lambda_U (1 - sigma(beta (z0 - g))) where it is bad

    Args:
        logprob: log-probability of each completion under the policy, its tokens summed, [B], nats.
        reference_logprob: the same under the reference; no gradient flows to it.
        good: which completions are good, [B].
        reference_point: z0 of the whole batch, see `kto_reference_point`; no gradient flows to it.
        beta: how strongly the policy is held to its reference, 1 / nat.
        good_weight: lambda_D. With n_D good and n_U bad rows, lambda_D n_D : lambda_U n_U should be from 1 to 4/3.
        bad_weight: lambda_U.

    Returns:
        Unreduced losses between 0 and the weights, [B]; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: `beta` or a weight is a Python number that is not positive.

    Source: Ethayarajh et al. 2024 (arXiv:2402.01306).

    Example:
        >>> policy, reference = jnp.array([-3.0, -3.0]), jnp.array([-5.0, -5.0])
        >>> loss = kto_loss(policy, reference, jnp.array([True, False]), 0.0, 0.5)  # sigma(-1), sigma(1)
        >>> [f"{x:.4f}" for x in loss]
        ['0.2689', '0.7311']
    """
    for name, value in (("beta", beta), ("good_weight", good_weight), ("bad_weight", bad_weight)):
        check_positive(name, value)
    gain = beta * (log_ratio(logprob, reference_logprob) - jax.lax.stop_gradient(reference_point))
    return jnp.where(good, good_weight * jax.nn.sigmoid(-gain), bad_weight * jax.nn.sigmoid(gain))
