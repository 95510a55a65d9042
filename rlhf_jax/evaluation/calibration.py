"""Whether a reward model's margins mean what they say: sigmoid(margin) against the share of pairs ranked rightly.

Every pair counts in both orders, (p, right) and (1 − p, wrong) with p = sigmoid(chosen − rejected); else "right" would
be the only outcome there is. The error is the same as that of the more likely order's probability on [½, 1].

Where margins are no log-odds, because the model was taught ratings or is unsure of the margin, the log-odds of the
probability that it does state take their place: `rating_log_odds`, `moderated_margin`.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit, log_ndtr

Numbers = Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Reliability:
    """Pairs, in both orders, sorted into bins of equal width over [0, 1] by the probability given.

    Attributes:
        count: entries a bin, int [bins]; they add up to twice the number of pairs.
        probability: mean probability given, float64 [bins]; nan where a bin is empty.
        accuracy: share of entries that came true, float64 [bins]; nan where a bin is empty.
    """

    count: np.ndarray
    probability: np.ndarray
    accuracy: np.ndarray

    @property
    def expected_error(self) -> float:
        """ECE: mean |accuracy − probability| over bins, weighted by their counts."""
        return float(np.average(self._gaps, weights=self.count[self.count > 0]))

    @property
    def average_error(self) -> float:
        """ACE: the same mean over the bins that are not empty, unweighted."""
        return float(self._gaps.mean())

    @property
    def largest_error(self) -> float:
        """MCE: the largest |accuracy − probability| of a bin."""
        return float(self._gaps.max())

    @property
    def _gaps(self) -> np.ndarray:
        return np.abs(self.accuracy - self.probability)[self.count > 0]


def reliability(margins: Float[np.ndarray, " n"], bins: int = 10) -> Reliability:
    """Sorts pairs by the probability that a Bradley-Terry reward model gives to what was preferred.

    Source: Guo et al. 2017 (1706.04599) for the bins.

    Args:
        margins: reward of the chosen minus that of the rejected response, [n]; n ≥ 1.
        bins: number of bins.

    Returns:
        The bins, from probability 0 to 1.

    Raises:
        ValueError: there are no margins, or one is not finite.

    Example:
        >>> result = reliability(np.array([2.0, 2.0, 2.0, -2.0]))  # sigmoid(2) = 0.88; three of four are right
        >>> round(result.expected_error, 3)
        0.131
    """
    if margins.size == 0:
        raise ValueError("calibration needs at least one pair; there are no margins")
    if not np.isfinite(margins).all():
        raise ValueError(
            f"margin {np.flatnonzero(~np.isfinite(margins))[0]} is not finite: look at that pair's rewards"
        )
    wide = margins.astype(np.float64)
    probability = np.concatenate([expit(wide), expit(-wide)])
    right = np.repeat([1.0, 0.0], wide.size)
    place = np.minimum((probability * bins).astype(int), bins - 1)
    count, given, came_true = (
        np.bincount(place, weights=weights, minlength=bins) for weights in (None, probability, right)
    )
    with np.errstate(invalid="ignore"):
        return Reliability(count=count, probability=given / count, accuracy=came_true / count)


def moderated_margin(margin: Numbers, sd: Numbers) -> Numbers:
    """Margin shrunk by its uncertainty, `Δ / √(1 + π s²/8)`, so that its sigmoid is about E[sigmoid(N(Δ, s²))].

    The probit approximation (MacKay 1992, "The evidence framework applied to classification networks"); give it to
    `reliability` to see whether the uncertainty mends over-confidence.

    Args:
        margin: reward of the chosen minus that of the rejected response, float [n].
        sd: standard deviation of the margin, float [n].

    Returns:
        float64 [n], of the same sign and no larger.

    Example:
        >>> moderated_margin(np.array([2.0, 2.0]), np.array([0.0, 2.0])).round(3).tolist()
        [2.0, 1.247]
    """
    return margin / np.sqrt(1.0 + np.pi / 8.0 * sd.astype(np.float64) ** 2)


def pair_probability(margin: Numbers, sd: Numbers) -> Numbers:
    """Probability that the chosen response is preferred when the margin is uncertain: sigmoid of `moderated_margin`.

    Example:
        >>> pair_probability(np.array([0.0, 2.0]), np.array([5.0, 0.0])).round(3).tolist()
        [0.5, 0.881]
    """
    return expit(moderated_margin(margin, sd))


def rating_log_odds(margin: Numbers, sd: Numbers) -> Numbers:
    """Log-odds of what a model of ratings says of a pair: `log p/(1 − p)` with `p = Φ(Δ / s)`.

    A model that predicts ratings as Gaussians says how likely a rating of the one response is above one of the other.
    Its Δ is in the units of the ratings, whose sigmoid is no probability; give these log-odds to `reliability` instead.

    Args:
        margin: mean rating of the chosen less that of the rejected response, float [n].
        sd: standard deviation of that difference, `√(s_chosen² + s_rejected²)`, float [n].

    Returns:
        float64 [n].

    Raises:
        ValueError: a standard deviation is not above 0, and so says nothing.

    Example:
        >>> rating_log_odds(np.array([1.0, -1.0]), np.array([1.0, 1.0])).round(3).tolist()  # Φ(1) = 0.841
        [1.668, -1.668]
    """
    if not (sd > 0.0).all():
        raise ValueError(
            f"the standard deviation of pair {np.flatnonzero(~(sd > 0.0))[0]} is not above 0; leave calibration out"
        )
    ratio = margin / sd.astype(np.float64)
    return log_ndtr(ratio) - log_ndtr(-ratio)
