"""Whether an uncertainty knows where the scores are wrong, where the data are new, and how large the error is.

Uncertainties are standard deviations in units of reward; only their order matters to the rank measures (AUROC,
accuracy–coverage curves, Spearman), their size to the coverage of intervals and to `log_wrong_sign`. The trivial
uncertainty of a pair, −|margin|, needs no uncertain reward model: report every other one beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import log_ndtr, ndtri

from rlhf_jax.evaluation.statistics import bootstrap_rows, pearson, spearman

Numbers = Float[np.ndarray, " n"]
Right = Float[np.ndarray, " n"] | Bool[np.ndarray, " n"]
LEVELS = (0.5, 0.68, 0.9, 0.95)


@dataclass(frozen=True)
class CoverageCurve:
    """Accuracy of what is kept when the least certain pairs are refused; see `accuracy_coverage`.

    Attributes:
        coverage: share of pairs that is kept, 1/n … 1, float64 [n].
        accuracy: accuracy of those that are kept, float64 [n]; 1 − accuracy is the risk.
    """

    coverage: np.ndarray
    accuracy: np.ndarray

    @property
    def area(self) -> float:
        """Mean accuracy over all coverages; 1 − area is the area under the risk–coverage curve."""
        return float(self.accuracy.mean())

    def at(self, share: float | Float[np.ndarray, " G"]) -> np.ndarray:
        """Accuracy when that share of the pairs, in (0, 1], is kept; a pair at the border counts in part."""
        right = np.interp(share, np.append(0.0, self.coverage), np.append(0.0, self.coverage * self.accuracy))
        return np.asarray(right / share)


def auroc(negatives: Float[np.ndarray, " a"], positives: Float[np.ndarray, " b"]) -> float:
    """Probability that a positive has the larger number than a negative, ties counting one half.

    `P(p > q) + P(p = q)/2`, the area under the ROC curve, exact in O(n log n). With the uncertainty of rows from the
    training distribution as negatives and of other rows as positives it measures detection of new data.

    Args:
        negatives: float [a].
        positives: float [b].

    Returns:
        Between 0 and 1; nan where a side is empty.

    Raises:
        ValueError: a number is NaN.

    Example:
        >>> auroc(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
        0.875
    """
    return _weighted_auroc(
        np.concatenate([negatives, positives]), np.repeat([0.0, 1.0], [negatives.size, positives.size])
    )


def error_auroc(right: Right, uncertainty: Numbers) -> float:
    """AUROC of the uncertainty as a detector of wrong judgements: of wrong pairs against right ones.

    Args:
        right: 1 where the pair is ranked rightly, 0 where wrongly, ½ for a tie (which is then half a wrong pair and
            half a right one), [n].
        uncertainty: of the same pairs, float [n].

    Returns:
        Between 0 and 1; nan where all are right or all are wrong.

    Raises:
        ValueError: a number is NaN, or `right` is not between 0 and 1.

    Example:
        >>> error_auroc(np.array([True, True, False]), np.array([0.1, 0.3, 0.3]))
        0.75
    """
    _check(right, uncertainty)
    return _weighted_auroc(uncertainty, 1.0 - right)


def accuracy_coverage(correct: Right, uncertainty: Numbers) -> CoverageCurve:
    """Accuracy of the k most certain pairs, for every k.

    Among pairs of equal uncertainty each is as likely to be kept: the accuracy is the expectation over the order of
    ties, so it depends on no sort. Source: El-Yaniv and Wiener 2010 (risk–coverage); area: Geifman et al. 1805.08206.

    Args:
        correct: 1 where the pair is ranked rightly, 0 where wrongly, ½ for a tie, [n]; n ≥ 1.
        uncertainty: of the same pairs, float [n]; the smallest are kept first.

    Returns:
        The curve; its last accuracy is that of all pairs.

    Raises:
        ValueError: no pairs, a number that is NaN, or `correct` not between 0 and 1.

    Example:
        >>> curve = accuracy_coverage(np.array([1.0, 0.0, 1.0]), np.array([0.1, 0.5, 0.5]))
        >>> curve.accuracy.round(3).tolist()
        [1.0, 0.75, 0.667]
    """
    _check(correct, uncertainty)
    place, count = np.unique(uncertainty, return_inverse=True, return_counts=True)[1:]
    block = np.repeat(np.bincount(place, weights=correct) / count, count)
    kept = np.arange(1, correct.size + 1)
    return CoverageCurve(coverage=kept / correct.size, accuracy=np.cumsum(block) / kept)


def coverage_gain(correct: Right, uncertainty: Numbers) -> float:
    """Area gained by refusing the least certain, as a share of what refusing the wrong ones first would gain.

    `(area − accuracy) / (best area − accuracy)`: 0 for an uninformative uncertainty, 1 for a perfect one, below 0 for
    one that refuses the right ones; nan where all are right or all are wrong.

    Args:
        correct: as in `accuracy_coverage`.
        uncertainty: as in `accuracy_coverage`.

    Example:
        >>> round(coverage_gain(np.array([1.0, 0.0, 1.0]), np.array([0.1, 0.5, 0.5])), 3)
        0.625
    """
    return _gain(correct, accuracy_coverage(correct, uncertainty))


def accepted(uncertainty: Numbers, calibration: Float[np.ndarray, " c"], quantile: float) -> Bool[np.ndarray, " n"]:
    """Which rows to keep when those above a quantile of the uncertainty on a calibration set are refused.

    Args:
        uncertainty: of the rows, float [n].
        calibration: uncertainty of other rows that the threshold is set on, float [c]; c ≥ 1.
        quantile: share of the calibration set that would be kept, between 0 and 1.

    Returns:
        True where the row is kept, bool [n].

    Example:
        >>> accepted(np.array([0.1, 0.7]), np.array([0.1, 0.2, 0.3, 0.9]), 0.75).tolist()
        [True, False]
    """
    return uncertainty <= np.quantile(calibration, quantile, method="inverted_cdf")


def interval_coverage(error: Numbers, sd: Numbers, levels: Sequence[float] = LEVELS) -> Float[np.ndarray, " L"]:
    """Share of errors inside the central Gaussian interval of each level, `|error| ≤ z_{(1 + level)/2} sd`.

    A calibrated uncertainty covers as much as the level says (68 % at one standard deviation).

    Args:
        error: what was predicted less what came true, in units of reward, float [n]; n ≥ 1.
        sd: the standard deviation that was stated, float [n].
        levels: between 0 and 1, [L].

    Returns:
        Coverage at each level, float64 [L].

    Raises:
        ValueError: a level not between 0 and 1, no errors, an error that is NaN or a standard deviation below 0.

    Example:
        >>> interval_coverage(np.array([0.5, -1.5, 3.0]), np.ones(3), (0.68, 0.95)).round(3).tolist()
        [0.333, 0.667]
    """
    wrong = [level for level in levels if not 0.0 < level < 1.0]
    if wrong:
        raise ValueError(f"the level of an interval lies between 0 and 1; it is {wrong[0]}")
    if error.size == 0 or np.isnan(error).any() or not (sd >= 0.0).all():
        raise ValueError("coverage needs at least one error, none of them NaN, and standard deviations of at least 0")
    half = ndtri((1.0 + np.asarray(levels)) / 2.0)[:, None] * sd.astype(np.float64)
    return (np.abs(error) <= half).mean(axis=1)


def pair_uncertainty(chosen: Numbers, rejected: Numbers) -> Numbers:
    """Standard deviation of a margin whose two scores err independently, `√(a² + b²)`.

    What both scores share (the length or topic of one prompt) cancels in a margin, which this does not know; where
    there are members, `margin_spread` does, and of one head with a posterior `margin_deviation`.

    Example:
        >>> pair_uncertainty(np.array([3.0]), np.array([4.0])).tolist()
        [5.0]
    """
    return np.hypot(chosen, rejected, dtype=np.float64)


def margin_spread(chosen: Float[np.ndarray, "M n"], rejected: Float[np.ndarray, "M n"]) -> Numbers:
    """Standard deviation over members of their margins; a constant that a member adds to all its scores cancels.

    Args:
        chosen: members' scores of the chosen responses, float [M, n].
        rejected: of the rejected ones, float [M, n].

    Returns:
        Population standard deviation, float64 [n]; 0 for a single member.

    Example:
        >>> margin_spread(np.array([[1.0], [15.0]]), np.array([[0.0], [10.0]])).tolist()
        [2.0]
    """
    return np.subtract(chosen, rejected, dtype=np.float64).std(axis=0)


def margin_deviation(chosen: Float[np.ndarray, "D n"], rejected: Float[np.ndarray, "D n"]) -> Numbers:
    """Standard deviation of the margins of one head with a posterior, `b ‖L⁻¹(e_chosen − e_rejected)‖`.

    Args:
        chosen: features of the chosen responses in units of their uncertainty, `b L⁻¹ e` of
            `rewards.posterior.whitened`, float [D, n].
        rejected: of the rejected ones, float [D, n].

    Example:
        >>> margin_deviation(np.array([[3.0], [9.0]]), np.array([[0.0], [5.0]])).tolist()
        [5.0]
    """
    return np.linalg.norm(np.subtract(chosen, rejected, dtype=np.float64), axis=0)


def log_wrong_sign(margin: Numbers, sd: Numbers) -> Numbers:
    """Log of the chance that the margin has the wrong sign if its error is Gaussian, `log Φ(−|Δ| / s)`.

    It orders pairs as s / |Δ| does: unlike s alone it knows that a small error turns a small margin. The logarithm
    keeps that order where the chance itself is 0 to rounding. Where Δ and s are both 0 the chance is ½.

    Args:
        margin: reward of one less that of the other response, float [n].
        sd: standard deviation of the margin, float [n].

    Returns:
        float64 [n], at most log ½; −inf where the margin is certain.

    Example:
        >>> np.exp(log_wrong_sign(np.array([2.0, -2.0, 0.0, 1.0]), np.array([2.0, 1.0, 0.0, 0.0]))).round(3).tolist()
        [0.159, 0.023, 0.5, 0.0]
    """
    size = np.abs(margin).astype(np.float64)
    return log_ndtr(-np.divide(size, sd, out=np.where(size > 0.0, np.inf, 0.0), where=sd > 0.0))


def error_rows(right: Right, uncertainty: Numbers, groups: Any = None) -> list[dict[str, Any]]:
    """Rows of the summary on whether the uncertainty finds the errors, with intervals over pairs (or prompts).

    Args:
        right: as in `error_auroc`.
        uncertainty: of the same pairs, float [n].
        groups: the prompt of each pair, if prompts rather than pairs are to be resampled; see `bootstrap_rows`.

    Returns:
        AUROC of errors; area under the accuracy–coverage curve and its share of the best gain; accuracy of the surest
        half, of the least sure half, and their difference.
    """
    names = ["AUROC of errors", "area under accuracy-coverage", "share of the best gain in area"]
    names += ["accuracy of the surest half", "accuracy of the least sure half", "surest less least sure half"]

    def statistic(right: np.ndarray, uncertainty: np.ndarray) -> list[float]:
        curve = accuracy_coverage(right, uncertainty)
        sure = float(curve.at(0.5))
        unsure = 2.0 * float(curve.accuracy[-1]) - sure
        found = _weighted_auroc(uncertainty, 1.0 - right)
        return [found, curve.area, _gain(right, curve), sure, unsure, sure - unsure]

    return bootstrap_rows(names, "", statistic, right, uncertainty, groups=groups)


def shift_rows(
    inside: Float[np.ndarray, " a"], outside: Float[np.ndarray, " b"], groups: Any = None
) -> list[dict[str, Any]]:
    """Rows of the summary on detection of new data: AUROC, and the mean uncertainty on both sides.

    The two sets are resampled as one sample, sizes included.

    Args:
        inside: uncertainty of rows like the training data, float [a].
        outside: uncertainty of rows unlike them, float [b].
        groups: the prompt of each row, those inside first, if prompts are to be resampled, [a + b].
    """
    names = ["AUROC out of distribution", "uncertainty in distribution", "uncertainty out of distribution"]

    def statistic(values: np.ndarray, new: np.ndarray) -> list[float]:
        sides = [float(values[new == side].mean()) if (new == side).any() else np.nan for side in (0.0, 1.0)]
        return [_weighted_auroc(values, new), *sides]

    new = np.repeat([0.0, 1.0], [inside.size, outside.size])
    values = np.concatenate([inside, outside]).astype(np.float64)
    return bootstrap_rows(names, "", statistic, values, new, groups=groups)


def gap_rows(error: Numbers, uncertainty: Numbers, groups: Any = None) -> list[dict[str, Any]]:
    """Rows of the summary on the size of errors: rank and linear correlation of the uncertainty with |error|.

    Args:
        error: proxy less gold, both standardised on the same responses, float [n].
        uncertainty: of the same responses, float [n].
        groups: the prompt of each response, if prompts are to be resampled.
    """
    names = ["Spearman correlation with |error|", "Pearson correlation with |error|"]

    def statistic(gap: np.ndarray, uncertainty: np.ndarray) -> list[float]:
        return [spearman(uncertainty, gap), pearson(uncertainty, gap)]

    return bootstrap_rows(names, "", statistic, np.abs(error), uncertainty, groups=groups)


def coverage_rows(
    error: Numbers, sd: Numbers, levels: Sequence[float] = LEVELS, groups: Any = None
) -> list[dict[str, Any]]:
    """Rows of the summary on the coverage of intervals, one a level; arguments as in `interval_coverage`."""
    names = [f"coverage of the {level:.0%} interval" for level in levels]
    return bootstrap_rows(names, "", lambda e, s: interval_coverage(e, s, levels), error, sd, groups=groups)


def _gain(correct: np.ndarray, curve: CoverageCurve) -> float:
    accuracy = float(curve.accuracy[-1])
    best = accuracy_coverage(correct, -correct.astype(np.float64)).area - accuracy
    return (curve.area - accuracy) / best if best > 1e-12 else float("nan")


def _weighted_auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """AUROC when each row is positive in part and negative for the rest."""
    if np.isnan(values).any():
        raise ValueError(f"number {np.flatnonzero(np.isnan(values))[0]} is NaN; an AUROC needs an order")
    place = np.unique(values, return_inverse=True)[1]
    up, down = (np.bincount(place, weights=weights, minlength=1) for weights in (positive, 1.0 - positive))
    pairs = up.sum() * down.sum()
    return float((up * (np.cumsum(down) - down / 2.0)).sum() / pairs) if pairs > 0.0 else float("nan")


def _check(right: np.ndarray, uncertainty: np.ndarray) -> None:
    if right.size == 0:
        raise ValueError("there are no pairs; accuracy and its curves need at least one")
    if not ((right >= 0) & (right <= 1)).all():
        raise ValueError("whether a pair is ranked rightly is a number between 0 and 1")
    if np.isnan(uncertainty).any():
        raise ValueError(
            f"the uncertainty of pair {np.flatnonzero(np.isnan(uncertainty))[0]} is NaN; score it or drop it"
        )
