"""A reward model that predicts quantiles of a rating: its mean is the reward, their spread what the data leave open.

Q linear heads on one trunk, one a level, trained by the pinball loss; nothing is assumed about the shape of the
distribution. Heads that are trained apart may cross (a quantile of a higher level below one of a lower level): they are
put in order where they are used, which never raises their pinball loss (Chernozhukov, Fernandez-Val and Galichon 2010).

Source: Dorka, "Quantile Regression for Distributional Reward Models in RLHF", arXiv:2409.10164.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import reward_features
from rlhf_jax.rewards.gaussian import apply_linear
from rlhf_jax.types import Params, Score

INTERQUARTILE = 1.3489795
"""Distance of the quartiles of a standard normal variable."""


@chex.dataclass(frozen=True)
class QuantileParams:
    """A reward model of Q quantiles.

    Attributes:
        trunk: its trunk.
        quantiles: `{"kernel": [D, Q], "bias": [Q]}`, in the units of the ratings.
        levels: increasing, in (0, 1), float32 [Q].
    """

    trunk: Params
    quantiles: Params
    levels: Float[Array, " Q"]


def even_levels(count: int) -> Float[Array, " Q"]:
    """The levels (i + 1/2) / Q: those at which the mean of the quantiles estimates the mean.

    Raises:
        ValueError: less than two, which have no quartiles between them.

    Example:
        >>> even_levels(4).tolist()
        [0.125, 0.375, 0.625, 0.875]
    """
    if count < 2:
        raise ValueError(f"{count} quantiles show no spread; give at least 2.")
    return (jnp.arange(count, dtype=jnp.float32) + 0.5) / count


def spread(quantiles: Float[Array, "B Q"], levels: Float[Array, " Q"]) -> Float[Array, " B"]:
    """The interquartile range over 1.349: the standard deviation, if the distribution is normal.

    Quartiles are interpolated linearly between neighbouring levels.

    Args:
        quantiles: in any order, [B, Q].
        levels: increasing, the first at most 1/4 and the last at least 3/4, [Q]; beyond them the outermost quantile is
            taken.

    Example:
        >>> print(f"{spread(jnp.array([[1.0, -1.0, 0.0]]), jnp.array([0.25, 0.5, 0.75]))[0]:.4f}")
        1.4826
    """
    ordered = jnp.sort(quantiles, axis=1)
    quarters = jnp.array([0.25, 0.75], levels.dtype)
    low, high = jax.vmap(lambda row: jnp.interp(quarters, levels, row), out_axes=1)(ordered)
    return (high - low) / INTERQUARTILE


def quantile_scorer(
    config: ModelConfig,
    features: Literal["final_norm", "pre_norm"] = "final_norm",
    centre: str = "mean",
):
    """The scorer: `score(QuantileParams, tokens, mask) -> Score(mean, features, aleatoric)`.

    Args:
        config: shape of the trunk.
        features: what the heads read, see `models.heads.reward_features`.
        centre: what `Score.mean` is: the "mean" of the quantiles, which is one linear head (`mean_head`), so that the
            score has features; or the "median", interpolated between ordered quantiles, which is none.

    Raises:
        ValueError: an unknown centre.
    """
    if centre not in ("mean", "median"):
        raise ValueError(f"centre is {centre!r}; choose mean or median.")

    def score(params: QuantileParams, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        vectors = reward_features(config, params.trunk, tokens, mask, features)
        quantiles = apply_linear(params.quantiles, vectors)
        unsure = spread(quantiles, params.levels)
        if centre == "mean":
            return Score(mean=quantiles.mean(axis=1), features=vectors, aleatoric=unsure)
        half = jnp.array(0.5, params.levels.dtype)
        median = jax.vmap(lambda row: jnp.interp(half, params.levels, row))(jnp.sort(quantiles, axis=1))
        return Score(mean=median, aleatoric=unsure)

    return score


def mean_head(quantiles: Params) -> Params:
    """The linear head `{"kernel": [D], "bias": []}` whose score is the mean of the quantiles, for AdvPO's geometry."""
    return {"kernel": quantiles["kernel"].mean(axis=1), "bias": quantiles["bias"].mean()}
