"""Losses of a policy on pairs of completions that need no reference policy: they look at the mean over tokens.

A completion of n tokens with the log-probability L has the average a = L / n. What keeps the policy near where it began
is the learning rate or, of ORPO, the likelihood of the chosen completions.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.losses.preference import check_not_negative, check_positive, tokens
from rlhf_jax.types import at_least_float32


def average_logprob(logprob: Float[Array, " B"], length: Int[Array, " B"]) -> Float[Array, " B"]:
    """Log-probabilities of whole completions as means over their tokens.

        a = L / n

    Minus a of the chosen completions is their negative log-likelihood, a term of `orpo` and `rpo`: its mean over pairs
    gives every sequence one weight, and its mean with the lengths as weights every token.

    Args:
        logprob: L, the tokens of each completion summed, [B], nats.
        length: n, its number of tokens, [B]; 0 is taken for 1.

    Returns:
        [B], nats a token; float32 for bfloat16 and float16 input.

    Example:
        >>> average_logprob(jnp.array([-6.0, 0.0]), jnp.array([4, 0])).tolist()
        [-1.5, 0.0]
    """
    logprob = at_least_float32(logprob)
    return logprob / tokens(length, logprob)


def simpo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    chosen_length: Int[Array, " B"],
    rejected_length: Int[Array, " B"],
    beta: Float[Array, ""] | float,
    gamma: Float[Array, ""] | float,
) -> Float[Array, " B"]:
    """Simple preference optimisation: Bradley-Terry on average log-probabilities, with a margin.

        loss = -log sigma(beta a_w - beta a_l - gamma)

    Args:
        chosen: log pi(w), the log-probability of each preferred completion with its tokens summed, [B], nats.
        rejected: log pi(l), the same of the other completions.
        chosen_length: tokens of the preferred completions, [B].
        rejected_length: tokens of the other ones, [B].
        beta: reward units of a nat a token.
        gamma: by how much the chosen reward is to exceed the other one, reward units, not negative.

    Returns:
        Unreduced losses in nats, [B]; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: `beta` is a Python number that is not positive, or `gamma` one below 0.

    Source: Meng et al. 2024 (arXiv:2405.14734), eq. 6.

    Example:
        >>> chosen, rejected = jnp.array([-4.0]), jnp.array([-4.0])  # averages -1 and -2
        >>> loss = simpo_loss(chosen, rejected, jnp.array([4]), jnp.array([2]), 2.0, 1.0)
        >>> print(f"{loss[0]:.4f}")  # log(1 + 1/e)
        0.3133
    """
    check_positive("beta", beta)
    check_not_negative("gamma", gamma)
    gap = average_logprob(chosen, chosen_length) - average_logprob(rejected, rejected_length)
    return -jax.nn.log_sigmoid(beta * gap - gamma)


def log_odds(average: Float[Array, " B"]) -> Float[Array, " B"]:
    """Log-odds of probabilities that are given as logarithms: log p - log(1 - p).

    Stable on both sides: log(1 - e^a) is taken as log(-expm1(a)) near 0 and as log1p(-e^a) far from it. A logarithm
    above minus the rounding error of its dtype (p = 1) is held there, with no gradient.

    Args:
        average: a = log p, such as from `average_logprob`, [B], nats.

    Returns:
        [B]; float32 or better.

    Example:
        >>> print(f"{log_odds(jnp.log(jnp.array([0.75])))[0]:.4f}")  # log 3
        1.0986
    """
    average = at_least_float32(average)
    average = jnp.minimum(average, -jnp.finfo(average.dtype).eps)
    near = average > -jnp.log(2.0).astype(average.dtype)
    # Each branch is given a number that it can take, or the other one's NaN would enter the gradient.
    above = jnp.log(-jnp.expm1(jnp.where(near, average, -1.0)))
    below = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, average)))
    return average - jnp.where(near, above, below)


def orpo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    chosen_length: Int[Array, " B"],
    rejected_length: Int[Array, " B"],
) -> Float[Array, " B"]:
    """The odds-ratio term of ORPO, which is added to the likelihood of the chosen completions.

        odds = a - log(1 - e^a);   term = -log sigma(odds_w - odds_l)

    The objective is the mean of -a_w over the chosen tokens (see `average_logprob`) plus lambda times the mean of this
    term: `preference_choices` puts them together.

    Args:
        chosen: see `simpo_loss`, as the next three.
        rejected: log pi(l).
        chosen_length: tokens of the preferred completions, [B].
        rejected_length: tokens of the other ones, [B].

    Returns:
        Unreduced terms in nats, [B]; float32 for bfloat16 and float16 input.

    Source: Hong et al. 2024 (arXiv:2403.07691), eq. 7.

    Example:
        >>> half, quarter, one = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])), jnp.array([1])
        >>> print(f"{orpo_loss(half, quarter, one, one)[0]:.4f}")  # odds 1 and 1/3: log(1 + 1/3)
        0.2877
    """
    odds = log_odds(average_logprob(chosen, chosen_length)) - log_odds(average_logprob(rejected, rejected_length))
    return -jax.nn.log_sigmoid(odds)
