"""How many examples of each kind a context holds, for a context length that may be traced.

Kinds are classes, or pairs of a true class and a shown label. All contexts of a batch have the same length.
"""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

Scalar: TypeAlias = int | float | Int[Array, ""] | Float[Array, ""]
TABLE = 4096  # numbers that `binomial_counts` tells apart
LEAST_DEVIATIONS = 4.0  # between the mean of a normal count and zero


def binomial_counts(
    key: Key[Array, ""], trials: Scalar, probability: float, count: int, dtype: DTypeLike
) -> Float[Array, " B"]:
    """Draws Binomial(trials, probability) numbers that share their trials, by inversion of one table.

    The table holds the distribution function from ten standard deviations below the mean upwards, made from the ratios
    of successive probabilities, P(n + 1) / P(n) = (N - n) / (n + 1) p / (1 - p). Rejection (`jax.random.binomial`)
    allows each number its own trials and was measured two to eight times slower on a CPU. Where the standard deviation
    is above `TABLE` / 20, the table is too short; the quantile is then expanded about the normal one, to the first term
    of Cornish and Fisher, and rounded.

    Args:
        key: random key.
        trials: N >= 1; may be traced.
        probability: of success, between 0 and 1, both excluded.
        count: how many numbers, B.
        dtype: of the result.

    Returns:
        Whole numbers from 0 to N, [B].
    """
    size = jnp.asarray(trials).astype(dtype)
    spread = jnp.sqrt(size * (probability * (1 - probability)))
    start = jnp.maximum(jnp.floor(size * probability - 10 * spread), 0)
    before = start + jnp.arange(TABLE - 1, dtype=dtype)
    ratio = jnp.maximum(size - before, 1e-30) / (before + 1)
    steps = jnp.maximum(jnp.log(ratio) + math.log(probability / (1 - probability)), -100)
    logs = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(steps)])
    table = jnp.cumsum(jnp.exp(logs - logs.max()))
    uniform = jax.random.uniform(key, (count,), dtype)
    inverted = start + jnp.searchsorted(table / table[-1], uniform, side="right", method="scan_unrolled").astype(dtype)
    quantile = jax.scipy.special.ndtri(jnp.maximum(uniform, jnp.finfo(dtype).tiny))
    skewness = (1 - 2 * probability) / 6 * (quantile**2 - 1)
    rounded = jnp.round(size * probability + spread * quantile + skewness)
    return jnp.clip(jnp.where(spread > TABLE / 20, rounded, inverted), 0, size)


def multinomial_counts(
    key: Key[Array, ""], trials: Scalar, probabilities: np.ndarray, count: int, dtype: DTypeLike
) -> Float[Array, "B kinds"]:
    """Draws Multinomial(trials, probabilities) numbers: one kind after the other, binomial in what is left.

    Args:
        key: random key.
        trials: N >= 1; may be traced.
        probabilities: of the kinds, all above 0, [kinds].
        count: how many draws, B.
        dtype: of the result.

    Returns:
        Whole numbers that sum to N, [B, kinds].
    """
    size = jnp.asarray(trials).astype(dtype)
    if len(probabilities) == 1:
        return jnp.broadcast_to(size, (count, 1))
    first_key, *keys = jax.random.split(key, len(probabilities) - 1)
    first = binomial_counts(first_key, size, float(probabilities[0]), count, dtype)
    if not keys:
        return jnp.stack([first, size - first], axis=1)

    def step(left: Float[Array, " B"], drawn: tuple) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        share, key = drawn
        number = jax.random.binomial(key, left, share, dtype=dtype)
        return left - number, number

    shares = probabilities[1:-1] / np.cumsum(probabilities[::-1])[::-1][1:-1]
    left, middle = jax.lax.scan(step, size - first, (jnp.asarray(shares, dtype), jnp.stack(keys)))
    return jnp.concatenate([first[:, None], middle.T, left[:, None]], axis=1)


def normal_shares(
    key: Key[Array, ""], trials: Scalar, probabilities: np.ndarray, count: int, dtype: DTypeLike
) -> Float[Array, "B kinds"]:
    """Normal numbers with the mean p and the covariance (diag(p) - p p') / N of multinomial counts over their trials.

    With r = sqrt(p) and z ~ N(0, I) they are p + r (z - r r' z) / sqrt(N), and sum to 1. Those below zero are set to
    zero, and all are divided by their sum. For two kinds of p = 1/2, b = 2 share - 1 ~ N(0, 1 / N).

    Args:
        key: random key.
        trials: N >= 1; may be traced.
        probabilities: of the kinds, all above 0, [kinds].
        count: how many draws, B.
        dtype: of the result.

    Returns:
        Numbers from 0 to 1 that sum to 1, [B, kinds].

    Raises:
        ValueError: the trials are not traced and so few that the mean of a share is less than four standard deviations
            above zero, so that setting negative ones to zero would be felt.
    """
    odds = float(np.min(probabilities / np.maximum(1 - probabilities, 1e-300)))
    if not isinstance(trials, jax.core.Tracer) and float(trials) * odds < LEAST_DEVIATIONS**2 * (1 - 1e-9):
        raise ValueError(
            f"normal counts in a context of {trials} examples would often be negative: give a length of at least "
            f'{math.ceil(LEAST_DEVIATIONS**2 / odds - 1e-9)}, or counts="exact".'
        )
    root = jnp.asarray(np.sqrt(probabilities), dtype)[None, :]
    gaussian = jax.random.normal(key, (count, len(probabilities)), dtype)
    centred = root * (gaussian - root * jnp.sum(root * gaussian, axis=1, keepdims=True))
    shares = jnp.maximum(root**2 + centred / jnp.sqrt(jnp.asarray(trials).astype(dtype)), 0)
    return shares / shares.sum(axis=1, keepdims=True)
