"""The loss of a policy that plays against an opponent: being preferred pays, leaving the reference costs."""

import jax
from jaxtyping import Array, Float

from rlhf_jax.losses.preference import check_positive, log_ratio
from rlhf_jax.types import at_least_float32


def nash_md_loss(
    logprob: Float[Array, " B"],
    reference_logprob: Float[Array, " B"],
    preference: Float[Array, " B"],
    beta: Float[Array, ""] | float,
) -> Float[Array, " B"]:
    """Nash mirror descent's policy gradient, on responses of the policy that met those of an opponent.

        A = P(y > y') - 1/2 - beta (log pi(y) - log ref(y));   loss = -A log pi(y), with no gradient through A

    For y drawn from the policy, the mean gradient is that of -E P(y > y') + beta KL(pi || ref), the opponent held
    fixed. The log-ratio is that of the whole response: a token answers for what the later ones cost, which the credit
    of each token with its own log-ratio (as in TRL) leaves out.

    Args:
        logprob: log pi(y), the log-probability of each response with its tokens summed, [B], nats.
        reference_logprob: log ref(y), the same under the reference; no gradient flows to it.
        preference: P(y > y'), the probability that the response is preferred to the opponent's, [B], in [0, 1]; no
            gradient flows to it.
        beta: how strongly the policy is held to its reference, units of preference a nat.

    Returns:
        Unreduced losses, [B]; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: `beta` is a Python number that is not positive.

    Source: Munos et al. 2023 (arXiv:2312.00886), Nash-MD-PG.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = nash_md_loss(jnp.array([-2.0]), jnp.array([-3.0]), jnp.array([0.9]), beta=0.1)  # 2 (0.9 - 0.5 - 0.1)
        >>> print(f"{loss[0]:.2f}")
        0.60
    """
    check_positive("beta", beta)
    logprob = at_least_float32(logprob)
    advantage = preference.astype(logprob.dtype) - 0.5 - beta * log_ratio(logprob, reference_logprob)
    return -jax.lax.stop_gradient(advantage) * logprob
