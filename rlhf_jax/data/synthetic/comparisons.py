"""Noisy comparisons: which of two responses a careless annotator says is better."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Comparisons(NamedTuple):
    """The labels of N pairs.

    Attributes:
        preferred: 0 where the first response is said to be better, 1 where the second is, int32 [N].
        flipped: True where noise turned the label of the gold round, bool [N].
    """

    preferred: Int[np.ndarray, " N"]
    flipped: Bool[np.ndarray, " N"]


def comparisons(
    rng: np.random.Generator, gold_a: Float[np.ndarray, " N"], gold_b: Float[np.ndarray, " N"], noise: float
) -> Comparisons:
    """Labels pairs by their gold reward, each label turned round with probability `noise`; ties are broken at random.

    Args:
        rng: the source of randomness.
        gold_a: gold reward of the first responses, [N].
        gold_b: gold reward of the second ones, [N].
        noise: probability in [0, 0.5) that a label is wrong; 0.25 and 0.35 are customary.

    Returns:
        `Comparisons`: `preferred` [N] and `flipped` [N].

    Raises:
        ValueError: `noise` is outside [0, 0.5), a gold reward is NaN, or the lengths differ.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> comparisons(rng, np.array([1.0, 0.0]), np.array([0.0, 2.0]), noise=0.0).preferred.tolist()
        [0, 1]
    """
    if not 0.0 <= noise < 0.5:
        raise ValueError(f"noise must lie in [0, 0.5), not {noise}: at 0.5 a label says nothing.")
    if len(gold_a) != len(gold_b):
        raise ValueError(f"gold_a has {len(gold_a)} rows and gold_b {len(gold_b)}: give one of each for a pair.")
    is_nan = np.isnan(gold_a) | np.isnan(gold_b)
    if is_nan.any():
        raise ValueError(f"The gold reward of pair {int(np.argmax(is_nan))} is NaN: it cannot be compared.")
    tie_breaker = rng.random(len(gold_a)) < 0.5
    second_is_better = np.where(gold_a == gold_b, tie_breaker, gold_b > gold_a)
    flipped = rng.random(len(gold_a)) < noise
    return Comparisons(preferred=(second_is_better ^ flipped).astype(np.int32), flipped=flipped)
