"""From logits to the log-probability of the token taken, and to the entropy; the softmax is float32 or better."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.types import at_least_float32


def token_logprob(
    logits: Float[Array, "*batch V"],
    tokens: Int[Array, "*batch"],
    temperature: Float[Array, ""] | float | int = 1.0,
) -> Float[Array, "*batch"]:
    """Log-probability of given tokens under the temperature-scaled softmax of the logits.

        log p(y) = z_y / tau - log sum_v exp(z_v / tau)

    The caller aligns the two: logits at position t-1 score the token at position t. The same temperature must be used
    for sampling, for the policy's update and for its reference, or the first ratio is not 1.

    Args:
        logits: [..., V], any float dtype; bfloat16 and float16 are raised to float32 before the softmax.
        tokens: ids in [0, V), int [...].
        temperature: tau > 0.

    Returns:
        Log-probabilities in nats, [...], float32 (float64 for float64 logits).

    Raises:
        ValueError: the temperature is a Python number that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
        >>> print(f"{token_logprob(logits, jnp.array([1]))[0]:.4f}")  # log 1/4
        -1.3863
        >>> print(f"{token_logprob(logits, jnp.array([1]), temperature=0.5)[0]:.4f}")  # log 1/6
        -1.7918
    """
    scaled = _scale(logits, temperature)
    taken = jnp.take_along_axis(scaled, tokens[..., None], axis=-1)[..., 0]
    return taken - jax.nn.logsumexp(scaled, axis=-1)


def entropy(
    logits: Float[Array, "*batch V"], temperature: Float[Array, ""] | float | int = 1.0
) -> Float[Array, "*batch"]:
    """Entropy of the temperature-scaled softmax of the logits.

        H = -sum_v p_v log p_v

    A logit of minus infinity is a token of probability 0; it adds nothing, to the gradient neither.

    Args:
        logits: [..., V], any float dtype; bfloat16 and float16 are raised to float32 before the softmax.
        temperature: tau > 0.

    Returns:
        Entropies in nats, [...], between 0 and log V; float32 (float64 for float64 logits).

    Raises:
        ValueError: the temperature is a Python number that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{entropy(jnp.array([0.0, 0.0, -jnp.inf])):.4f}")  # log 2
        0.6931
    """
    logprobs = jax.nn.log_softmax(_scale(logits, temperature), axis=-1)
    possible = logprobs > -jnp.inf
    return -jnp.sum(jnp.exp(logprobs) * jnp.where(possible, logprobs, 0.0), axis=-1)


def _scale(logits: Float[Array, "*batch V"], temperature: Float[Array, ""] | float | int) -> Float[Array, "*batch V"]:
    """The logits in float32 or better, divided by the temperature."""
    if isinstance(temperature, float | int) and temperature <= 0:
        raise ValueError(f"temperature is {temperature!r}; it must be positive (greedy choice is a sampler's setting)")
    return at_least_float32(logits) / temperature
