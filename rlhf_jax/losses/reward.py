"""The loss of a reward model on pairs of responses, and its accuracy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.types import at_least_float32


def bradley_terry(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    margin: Float[Array, " B"] | None = None,
    label_smoothing: Float[Array, ""] | float = 0.0,
    centring: Float[Array, ""] | float = 0.0,
    label: Float[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Negative log-likelihood of preferences, with a margin, soft labels and a pull of the rewards towards 0.

        delta = chosen - rejected - margin
        p = (1 - s) y + s (1 - y)
        loss = -p log sigma(delta) - (1 - p) log sigma(-delta) + centring (chosen + rejected)^2

    Its gradient in delta is sigma(delta) - p. Soft labels and label smoothing compose: a pair whose first response is
    the better one with probability y has its label turned round with probability s.

    Args:
        chosen: rewards of the preferred responses, [B].
        rejected: rewards of the other ones, [B].
        margin: by how much the first should exceed the second, [B], reward units; None for 0.
        label_smoothing: s in [0, 1/2): the share of labels that are taken to be wrong.
        centring: weight of the squared sum; the likelihood alone leaves the rewards free up to a constant a prompt.
        label: y, the probability that the first response is the better one, [B], between 0 and 1; None for 1.

    Returns:
        Unreduced losses in nats, [B]; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: `label_smoothing` is a Python number outside [0, 1/2), or `centring` one below 0.

    Source: Bradley and Terry 1952; margin: Touvron et al. 2023 (arXiv:2307.09288), eq. 2; centring: Eisenstein et al.
    2023 (arXiv:2312.09244).

    Example:
        >>> import jax.numpy as jnp
        >>> loss = bradley_terry(jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]))  # log 2, log(1 + e)
        >>> [f"{x:.4f}" for x in loss]
        ['0.6931', '1.3133']
        >>> print(f"{bradley_terry(jnp.array([1.0]), jnp.array([1.0]), centring=0.01)[0]:.4f}")
        0.7331
        >>> unsure = bradley_terry(jnp.array([2.0]), jnp.array([0.0]), label=jnp.array([0.5]))  # (0.1269 + 2.1269) / 2
        >>> print(f"{unsure[0]:.4f}")
        1.1269
    """
    if isinstance(label_smoothing, float) and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing!r}; it must be at least 0 and below 1/2")
    if isinstance(centring, float) and centring < 0:
        raise ValueError(f"centring is {centring!r}; it must not be negative")
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)
    delta = chosen - rejected
    if margin is not None:
        delta = delta - margin.astype(delta.dtype)
    first, second = 1.0 - label_smoothing, label_smoothing
    if label is not None:
        label = label.astype(delta.dtype)
        first, second = first * label + second * (1.0 - label), second * label + first * (1.0 - label)
    likelihood = first * jax.nn.log_sigmoid(delta) + second * jax.nn.log_sigmoid(-delta)
    return centring * jnp.square(chosen + rejected) - likelihood


def preference_accuracy(chosen: Float[Array, "*batch"], rejected: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Whether each preferred response has the larger reward: 1 if so, 0 if not, one half at an exact tie.

    Args:
        chosen: rewards of the preferred responses, [B] or any shape.
        rejected: rewards of the other ones, the same shape. The two are compared as they are given: rewards that
            bfloat16 cannot tell apart are ties.

    Returns:
        1, 0.5 or 0 a pair, float32 or better; NaN where a reward is NaN. The mean is the accuracy.

    Example:
        >>> import jax.numpy as jnp
        >>> preference_accuracy(jnp.array([2.0, 1.0, 0.0]), jnp.array([1.0, 1.0, 1.0])).tolist()
        [1.0, 0.5, 0.0]
    """
    dtype = at_least_float32(chosen).dtype
    wins = (chosen > rejected).astype(dtype)
    ties = (chosen == rejected).astype(dtype)
    return jnp.where(jnp.isnan(chosen) | jnp.isnan(rejected), jnp.nan, wins + 0.5 * ties)
