"""The clipped loss of a value function, and what is logged about its fit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.losses.reduce import mean
from rlhf_jax.types import Metrics, at_least_float32


def clipped_value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    clip: Float[Array, ""] | float,
) -> Float[Array, "B T"]:
    """Per-token value loss: the larger of two squared errors, of the value and of the value held near the old one.

        1/2 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)

    Args:
        values: predictions being trained, [B, T].
        old_values: predictions at the rollout, [B, T]; no gradient flows to them.
        returns: targets, [B, T] (see `gae`); no gradient flows to them.
        clip: c, in the units of the value; infinity for the plain squared error.

    Returns:
        Unreduced losses, [B, T]; float32 for bfloat16 and float16 input.

    Source: the PPO of OpenAI Baselines (Dhariwal et al. 2017), as used by Ziegler et al. 2019 (arXiv:1909.08593).

    Example:
        >>> import jax.numpy as jnp
        >>> values, old_values, returns = jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 0.5]]), jnp.array([[2.0, 0.0]])
        >>> clipped_value_loss(values, old_values, returns, 0.25).tolist()
        [[1.53125, 0.5]]
    """
    plain, clipped = _squared_errors(values, old_values, returns, clip)
    return 0.5 * jnp.maximum(plain, clipped)


def value_metrics(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
    clip: Float[Array, ""] | float,
) -> Metrics:
    """How well the values fit the returns, over the tokens that are not masked.

    | name                     | meaning                                                                           |
    |--------------------------|-----------------------------------------------------------------------------------|
    | `val/clipfrac`           | share of tokens where the clipped error is the larger one: no gradient flows there |
    | `val/explained_variance` | 1 - Var(R - V) / Var(R): 1 is perfect, 0 no better than a constant                |

    Args:
        values: predictions being trained, [B, T].
        old_values: predictions at the rollout, [B, T].
        returns: targets, [B, T].
        mask: which tokens count, [B, T].
        clip: as in `clipped_value_loss`.

    Returns:
        A dict of float scalars without gradient. Where the returns do not vary, the explained variance is set to 0.

    Example:
        >>> import jax.numpy as jnp
        >>> values, returns = jnp.array([[0.0, 1.0, 9.0]]), jnp.array([[0.0, 2.0, 0.0]])
        >>> mask = jnp.array([[True, True, False]])
        >>> metrics = value_metrics(values, values, returns, mask, 0.2)
        >>> {name: float(value) for name, value in metrics.items()}
        {'val/clipfrac': 0.0, 'val/explained_variance': 0.75}
    """
    values, old_values, returns = (at_least_float32(jax.lax.stop_gradient(x)) for x in (values, old_values, returns))
    plain, clipped = _squared_errors(values, old_values, returns, clip)
    spread = _variance(returns, mask)
    unexplained = _variance(returns - values, mask) / jnp.where(spread > 0, spread, 1.0)
    return {
        "val/clipfrac": mean((clipped > plain).astype(plain.dtype), mask),
        "val/explained_variance": jnp.where(spread > 0, 1.0 - unexplained, 0.0),
    }


def _squared_errors(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    clip: Float[Array, ""] | float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Squared errors of the values and of the clipped values, in float32 or better."""
    values = at_least_float32(values)
    old_values, returns = (at_least_float32(jax.lax.stop_gradient(x)) for x in (old_values, returns))
    near = jnp.clip(values, old_values - clip, old_values + clip)
    return jnp.square(values - returns), jnp.square(near - returns)


def _variance(values: Float[Array, "B T"], mask: Bool[Array, "B T"] | Float[Array, "B T"]) -> Float[Array, ""]:
    """Variance (divided by n) over the tokens that are not masked."""
    return mean(jnp.square(values - mean(values, mask)), mask)
