"""Iterative Data Smoothing: labels of preferences that move to what the reward model says of them.

Trained on a few pairs for several epochs, the Bradley-Terry loss drives the rewards of pairs that were seen once apart
without end. Here every pair keeps a soft label. A step is taken on the loss with the labels (`losses.reward`), and then
the labels take a step to the probabilities of the new model, so that a pair that was compared rarely stays near what
the model said at the start, and one that was compared often goes to its log-odds.
"""

import jax
from jaxtyping import Array, Float

from rlhf_jax.types import at_least_float32


def smoothed_labels(
    label: Float[Array, " B"],
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    rate: float | int,
    margin: Float[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """The labels after a step of size b to the reward model's probabilities.

        y <- (1 - b) y + b sigma(delta),  delta = chosen - rejected - margin

    With step size a of the loss's gradient and a pair of logit D that was compared n times, with the mean label y, the
    quantity y + b / (a n) D is constant in continuous time: both d(D)/dt = a n (y - sigma(D)) and
    dy/dt = b (sigma(D) - y). So the pair ends where sigma(D) + b / (a n) D = y_0 + b / (a n) D_0.

    No gradient flows through the result.

    Args:
        label: y, probabilities that the first response is the better one, [B].
        chosen: rewards of the first responses under the new parameters, [B]; without dropout.
        rejected: rewards of the second ones, [B].
        rate: b, from 0 (the labels stay) to 1 (they are what the model says, whose gradient is 0 there).
        margin: that of the loss, whose delta this is, [B]; None for 0.

    Returns:
        Labels between 0 and 1, float32 or better, [B].

    Raises:
        ValueError: the rate is not between 0 and 1.

    Source: Zhu, Jordan and Jiao 2024, "Iterative Data Smoothing: Mitigating Reward Overfitting and Overoptimization in
    RLHF" (arXiv:2401.16335).

    Example:
        >>> import jax.numpy as jnp
        >>> labels = smoothed_labels(jnp.array([1.0]), jnp.array([0.0]), jnp.array([0.0]), 0.5)  # (1 + 1/2) / 2
        >>> labels.tolist()
        [0.75]
    """
    check_rate(rate)
    label, chosen, rejected = at_least_float32(label), at_least_float32(chosen), at_least_float32(rejected)
    delta = chosen - rejected
    if margin is not None:
        delta = delta - margin.astype(delta.dtype)
    return jax.lax.stop_gradient((1.0 - rate) * label + rate * jax.nn.sigmoid(delta).astype(label.dtype))


def check_rate(rate: float | int) -> None:
    """Refuses a rate at which labels would leave the interval from 0 to 1.

    Raises:
        ValueError: it is not between 0 and 1.

    Example:
        >>> check_rate(1.5)
        Traceback (most recent call last):
            ...
        ValueError: the smoothing rate is 1.5: give 0 (labels stay) to 1 (labels are what the model says).
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"the smoothing rate is {rate}: give 0 (labels stay) to 1 (labels are what the model says).")
