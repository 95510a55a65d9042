"""How gold reward rises and falls with optimisation: scaling laws, their fits, and what the fits predict.

The distance is `d = √KL(π ‖ π_0)` in √nats, and gold reward is recentred so that it is 0 at d = 0. Fits are linear in
(α, β).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import xlogy

from rlhf_jax.evaluation.statistics import BootstrapInterval, bootstrap


@dataclass(frozen=True)
class ScalingFit:
    """A fitted scaling law and what follows from it.

    Where β ≤ 0 gold never turns: peak and zero crossing are inf. Where β > 0 and α ≤ 0, best-of-n peaks at d = 0 with
    gold 0.

    Attributes:
        form: "best_of_n" for `R = d(α − β d)`, "rl" for `R = d(α − β log d)`.
        alpha: α, reward per √nat.
        beta: β; reward per nat (best_of_n) or per √nat (rl).
        covariance: of (α, β), float64 [2, 2]; nan for two points of unknown error. Points of one run are correlated,
            which this does not know: report `bootstrap_fit`.
        peak_distance: d*, α/(2β) or exp(α/β − 1).
        peak_gold: R*, α²/(4β) or β d*.
        zero_crossing: where gold is back at 0, α/β or exp(α/β).
        r_squared: 1 − residual/total (weighted) sum of squares, total about the mean; nan when gold is constant.
        points: how many points were fitted.
    """

    form: str
    alpha: float
    beta: float
    covariance: np.ndarray
    peak_distance: float
    peak_gold: float
    zero_crossing: float
    r_squared: float
    points: int


@dataclass(frozen=True)
class ExtrapolationError:
    """Root-mean-square error on the far points of fits to the near ones.

    Attributes:
        own: error of the form asked for, in units of gold reward.
        swapped: error of the other form.
        near: number of points fitted.
        far: number of points predicted.
    """

    own: float
    swapped: float
    near: int
    far: int


def fit_best_of_n(
    distance: Float[np.ndarray, "*points"],
    gold: Float[np.ndarray, "*points"],
    standard_error: Float[np.ndarray, "*points"] | None = None,
    minimum_distance: float = 0.0,
) -> ScalingFit:
    """Fits `R(d) = d (α − β d)`, the law of best-of-n, by weighted least squares with no intercept.

    Args:
        distance: d in √nats, any shape.
        gold: recentred gold reward, same shape.
        standard_error: of gold, same shape; weights are its inverse squares. None: equal weights, error from the
            residuals.
        minimum_distance: points nearer than this are left out.

    Returns:
        The fit.

    Raises:
        ValueError: a number is not finite, a distance is negative, a standard error is not positive, or fewer than two
            distinct positive distances remain.

    Source: Gao et al. 2210.10760, equation 1.

    Example:
        >>> d = np.array([0.5, 1.0, 2.0, 3.0])
        >>> fit = fit_best_of_n(d, d * (1.0 - 0.2 * d))
        >>> round(fit.alpha, 6), round(fit.beta, 6), round(fit.peak_distance, 6), round(fit.peak_gold, 6)
        (1.0, 0.2, 2.5, 1.25)
    """
    return _fit("best_of_n", distance, gold, standard_error, minimum_distance)


def fit_rl(
    distance: Float[np.ndarray, "*points"],
    gold: Float[np.ndarray, "*points"],
    standard_error: Float[np.ndarray, "*points"] | None = None,
    minimum_distance: float = 0.25,
) -> ScalingFit:
    """Fits `R(d) = d (α − β log d)`, the law of policy optimisation, by weighted least squares with no intercept.

    Args:
        distance: d in √nats, any shape (points of several seeds are pooled).
        gold: recentred gold reward, same shape.
        standard_error: of gold, same shape; None: equal weights.
        minimum_distance: points nearer than this are left out: the law's slope is infinite at 0 and cannot hold there.

    Returns:
        The fit.

    Raises:
        ValueError: as `fit_best_of_n`.

    Source: Gao et al. 2210.10760, equation 2.

    Example:
        >>> d = np.array([1.0, 2.0, 4.0, 8.0])
        >>> fit = fit_rl(d, d * (1.0 - 0.5 * np.log(d)))
        >>> round(fit.alpha, 6), round(fit.beta, 6), round(fit.peak_distance / np.e, 6)
        (1.0, 0.5, 1.0)
    """
    return _fit("rl", distance, gold, standard_error, minimum_distance)


def predict(fit: ScalingFit, distance: Float[np.ndarray, "*points"]) -> Float[np.ndarray, "*points"]:
    """Gold reward that a fit predicts at d, `d (α − β d)` or `d (α − β log d)`; 0 at d = 0."""
    alpha, beta = _basis(fit.form, distance)
    return fit.alpha * alpha + fit.beta * beta


def predict_rounds(
    fit: ScalingFit, distance: Float[np.ndarray, "*points"], rounds: int
) -> Float[np.ndarray, "*points"]:
    """Gold reward after k rounds of d/k each, with a reward model trained afresh between rounds.

    `R_k(d) = k R(d/k)`, which for the RL law is `d (α − β log d + β log k)`.

    Args:
        fit: the fit of one round.
        distance: total distance in √nats, any shape.
        rounds: k, at least 1.

    Returns:
        Gold reward, same shape.

    Raises:
        ValueError: rounds < 1.

    Source: Gao et al. 2210.10760, section 4.3.
    """
    if rounds < 1:
        raise ValueError(f"the number of rounds is at least 1; it is {rounds}")
    return rounds * predict(fit, distance / rounds)


def regressional_goodhart(
    proxy: Float[np.ndarray, "*points"],
    gold_mean: float,
    noise_mean: float,
    gold_variance: float,
    noise_variance: float,
) -> Float[np.ndarray, "*points"]:
    """Expected gold reward X behind a proxy score s = X + Z, for independent normal X and Z.

    `E[X | X + Z = s] = E X + (s − E X − E Z) Var X / (Var X + Var Z)`: pushing the proxy by 1 moves gold by less than
    1.

    Raises:
        ValueError: a variance is negative, or both are 0.

    Source: Gao et al. 2210.10760, appendix A.
    """
    if gold_variance < 0.0 or noise_variance < 0.0 or gold_variance + noise_variance == 0.0:
        raise ValueError(f"variances are at least 0 and not both 0; they are {gold_variance} and {noise_variance}")
    return gold_mean + (proxy - gold_mean - noise_mean) * (gold_variance / (gold_variance + noise_variance))


def bootstrap_fit(
    fit: Callable[[np.ndarray, np.ndarray], ScalingFit],
    distance: Float[np.ndarray, "replications J"],
    gold: Float[np.ndarray, "replications J"],
    n: int,
    rng: np.random.Generator,
    level: float = 0.95,
) -> dict[str, BootstrapInterval]:
    """Percentile intervals of α, β and d* over prompts or seeds, each resampled with its whole curve.

    Args:
        fit: `fit_best_of_n`, `fit_rl`, or either with options bound.
        distance: d of each replication, float [replications, J] (for best-of-n, the same row repeated).
        gold: recentred gold reward, float [replications, J].
        n: number of draws.
        rng: generator of the draws.
        level: coverage.

    Returns:
        Intervals by name: "alpha", "beta", "peak_distance" (its upper end is inf where draws with β ≤ 0 reach into the
        tail).
    """

    def statistic(d: np.ndarray, r: np.ndarray) -> np.ndarray:
        fitted = fit(d, r)
        return np.array([fitted.alpha, fitted.beta, fitted.peak_distance])

    result = bootstrap(statistic, distance, gold, n=n, rng=rng, level=level)
    parts = (result.estimate, result.low, result.high, result.undefined)
    names = ("alpha", "beta", "peak_distance")
    return {name: BootstrapInterval(*(np.asarray(part[i]) for part in parts)) for i, name in enumerate(names)}


def extrapolation_error(
    fit: Callable[[np.ndarray, np.ndarray], ScalingFit],
    distance: Float[np.ndarray, "*points"],
    gold: Float[np.ndarray, "*points"],
    cutoff: float,
) -> ExtrapolationError:
    """Fits a law to d ≤ cutoff, predicts d > cutoff, and does the same with the other law.

    Args:
        fit: `fit_best_of_n` (swapped for `fit_rl`), `fit_rl` (swapped for `fit_best_of_n`), or either with options
            bound.
        distance: d in √nats, any shape.
        gold: recentred gold reward, same shape.
        cutoff: where the fit stops seeing, in √nats.

    Returns:
        Both errors. The swapped law sees the same points and is fitted with equal weights.

    Raises:
        ValueError: no point lies beyond the cutoff, or too few before it.
    """
    near, far = distance <= cutoff, distance > cutoff
    if not far.any():
        raise ValueError(f"no point lies beyond the cutoff of {cutoff} √nats: nothing to predict")
    own = fit(distance[near], gold[near])
    swapped_form = {"best_of_n": "rl", "rl": "best_of_n"}[own.form]
    seen = np.sort(distance[near])[-own.points]  # the nearest point that the fit kept
    swapped = _fit(swapped_form, distance[near], gold[near], None, float(seen))
    own_error, swapped_error = (
        float(np.sqrt(np.mean(np.square(predict(law, distance[far]) - gold[far])))) for law in (own, swapped)
    )
    return ExtrapolationError(own=own_error, swapped=swapped_error, near=own.points, far=int(far.sum()))


def _basis(form: str, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The functions of d that α and β multiply."""
    return distance, -np.square(distance) if form == "best_of_n" else -xlogy(distance, distance)


def _fit(
    form: str, distance: np.ndarray, gold: np.ndarray, standard_error: np.ndarray | None, minimum_distance: float
) -> ScalingFit:
    errors = np.ones_like(gold) if standard_error is None else standard_error
    d, r, e = (np.ravel(array).astype(np.float64) for array in (distance, gold, errors))
    if not all(np.isfinite(array).all() for array in (d, r, e)):
        raise ValueError("distances, gold rewards and standard errors must be finite; leave such points out first")
    if (d < 0.0).any():
        raise ValueError("a distance √KL is at least 0; pass the root of the KL, not an estimate that may be negative")
    if (e <= 0.0).any():
        raise ValueError("standard errors must be positive: a point without error would have all the weight")
    kept = (d > 0.0) & (d >= minimum_distance)
    if np.unique(d[kept]).size < 2:
        raise ValueError(
            f"two parameters need points at two different distances above 0 and of at least {minimum_distance} √nats; "
            f"there are {np.unique(d[kept]).size}"
        )
    d, r, e = d[kept], r[kept], e[kept]
    design = np.stack(_basis(form, d), axis=1) / e[:, None]
    (alpha, beta), *_ = np.linalg.lstsq(design, r / e, rcond=None)
    residual = float(np.sum(np.square((r / e) - design @ np.array([alpha, beta]))))
    total = float(np.sum(np.square((r - np.average(r, weights=1.0 / np.square(e))) / e)))
    triangle = np.linalg.qr(design, mode="r")
    half = np.linalg.solve(triangle, np.eye(2))
    if standard_error is not None:
        scale = 1.0
    else:
        scale = residual / (d.size - 2) if d.size > 2 else math.nan
    peak_distance, peak_gold, zero_crossing = _turning_points(form, float(alpha), float(beta))
    return ScalingFit(
        form=form,
        alpha=float(alpha),
        beta=float(beta),
        covariance=scale * (half @ half.T),
        peak_distance=peak_distance,
        peak_gold=peak_gold,
        zero_crossing=zero_crossing,
        r_squared=1.0 - residual / total if total > 0.0 else math.nan,
        points=int(d.size),
    )


def _turning_points(form: str, alpha: float, beta: float) -> tuple[float, float, float]:
    """Peak distance, peak gold and zero crossing of a law."""
    if beta <= 0.0:
        return math.inf, math.inf, math.inf
    if form == "best_of_n":
        rise = max(alpha, 0.0)
        return rise / (2.0 * beta), rise**2 / (4.0 * beta), rise / beta
    with np.errstate(over="ignore"):
        peak_distance, zero_crossing = float(np.exp(alpha / beta - 1.0)), float(np.exp(alpha / beta))
    return peak_distance, beta * peak_distance, zero_crossing
