"""What one layer of linear attention learns of linear regression, and how: minimiser, risk under shifts, and dynamics.

Prompts are y_i = w' x_i + e_i with x_i ~ N(0, Lambda), w of second moment C (the identity where nothing else is said)
and noise e_i of variance sigma^2. The layer predicts x_q' A p from p = (1/N) sum_i y_i x_i, with A = u U, where u is
the lower right entry of the value matrix and U the upper left block of the key-query matrix. The loss is
(1/2) E(x_q' A p - w' x_q)^2. Source: Zhang, Frei, Bartlett 2023 (arXiv 2306.09927). In their notation

    Gamma = (1 + 1/N) Lambda + (tr Lambda / N) I,   E p p' = Lambda Gamma,   A* = Gamma^-1.
"""

from typing import NamedTuple

import numpy as np
from scipy.integrate import solve_ivp

from rlhf_jax.icl.checks import at_least, check_covariance, check_length, positive

Length = int | float


class Factors(NamedTuple):
    """The two factors of A = u U.

    Attributes:
        values: u, the entry of the value matrix; a float, or [times].
        keys: U, the block of the key-query matrix, [d, d]; or its eigenvalues at each time, [times, d].
    """

    values: float | np.ndarray
    keys: np.ndarray


def context_moment(
    covariance: np.ndarray, length: Length, tasks: np.ndarray | None = None, noise_variance: float = 0.0
) -> np.ndarray:
    """The second moment of what the layer reads of a context, `E p p'` (Isserlis' theorem):

        E p p' = (1 + 1/N) Lambda C Lambda + ((tr(C Lambda) + sigma^2) / N) Lambda.

    Args:
        covariance: Lambda, of the inputs, [d, d].
        length: N, or `numpy.inf`.
        tasks: C, second moment of the weights w, [d, d]; None: the identity.
        noise_variance: sigma^2 of the labels, >= 0.

    Returns:
        Float64 [d, d].

    Raises:
        ValueError: a covariance that is not positive definite, a second moment that is none, or a number out of range.

    Example:
        >>> context_moment(np.eye(2), 4)
        array([[1.75, 0.  ],
               [0.  , 1.75]])
    """
    return _moment(*_checked(covariance, length, tasks, noise_variance))


def minimiser(
    covariance: np.ndarray, length: int, tasks: np.ndarray | None = None, noise_variance: float = 0.0
) -> np.ndarray:
    """The matrix A* that prompts of N examples lead to: `A* = C Lambda (E p p')^-1`, derived here for any C.

    The loss is quadratic in A, and A* E p p' = E w p' = C Lambda. For C = tau^2 I this is
    `(Gamma + sigma^2 / (N tau^2) I)^-1`, without noise Theorem 4.1 of Zhang et al.; for C = Lambda^-1 it is
    `Lambda^-1 / (1 + (d + 1) / N)`, Theorem 1 of Ahn et al. 2023 (arXiv 2306.00297).

    Args:
        covariance: Lambda, [d, d].
        length: N, examples in a context of training.
        tasks: C, [d, d]; None: the identity.
        noise_variance: sigma^2 of the labels.

    Returns:
        A*, float64 [d, d].

    Raises:
        ValueError: as `context_moment`.

    Example:
        >>> minimiser(np.eye(2), 4).round(4)
        array([[0.5714, 0.    ],
               [0.    , 0.5714]])
    """
    at_least("context length N", length, 1)
    setting = _checked(covariance, length, tasks, noise_variance)
    return np.linalg.solve(_moment(*setting), setting.covariance @ setting.tasks).T


def limit(
    covariance: np.ndarray,
    length: int,
    tasks: np.ndarray | None = None,
    noise_variance: float = 0.0,
    conserved: float = 0.0,
) -> Factors:
    """Where gradient flow ends: `U* = A* / u*`, `u*^2 = (k + sqrt(k^2 + 4 |A*|_F^2)) / 2`.

    `k = u^2 - |U|_F^2` is conserved by the flow. From the balanced start of Zhang et al. it is 0, and this is their
    Theorem 4.1: `u* = tr(Gamma^-2)^(1/4)`, `U* = tr(Gamma^-2)^(-1/4) Gamma^-1`.

    Args:
        covariance: Lambda, [d, d].
        length: N.
        tasks: C, [d, d]; None: the identity.
        noise_variance: sigma^2.
        conserved: k of the start; u is taken to start above 0.

    Returns:
        u* and U*, [d, d].

    Raises:
        ValueError: as `minimiser`, or a conserved number that is not finite.
    """
    if not np.isfinite(conserved):
        raise ValueError(f"the conserved difference u^2 - |U|^2 is {conserved}: give a finite number.")
    best = minimiser(covariance, length, tasks, noise_variance)
    squared = (conserved + np.sqrt(conserved**2 + 4 * np.sum(best**2))) / 2
    values = float(np.sqrt(squared))
    return Factors(values, best / values)


def risk(
    weights: np.ndarray,
    covariance: np.ndarray,
    length: Length,
    query_covariance: np.ndarray | None = None,
    tasks: np.ndarray | None = None,
    noise_variance: float = 0.0,
) -> float:
    """The squared error of a layer on any test: `R = E(x_q' A p - w' x_q)^2`, derived here for any C and both Lambdas:

        R = tr(Lambda_q [A E(p p') A' - A Lambda C - C Lambda A' + C]).

    With A = Gamma^-1 of contexts of N examples and C = I it is the test risk of Zhang et al. (section 4.2) on contexts
    of M, `tr(Lambda (I - A Lambda)^2) + (tr(A^2 Lambda^3) + tr(Lambda) tr(A^2 Lambda^2)) / M`. Their shifts are
    arguments: of the task another `tasks` (`w w'` for one task), of the query `query_covariance`, of the covariates
    `covariance`, all of them other than those that `weights` were learnt from.

    Args:
        weights: A, [d, d].
        covariance: Lambda of the test's contexts, [d, d].
        length: M, examples in a context of the test, or `numpy.inf`.
        query_covariance: Lambda_q, of the query, [d, d]; None: as the context.
        tasks: C, [d, d]; None: the identity.
        noise_variance: sigma^2 of the labels in the context; the target is free of noise.

    Returns:
        The mean squared error (without the 1/2 of the training loss).

    Raises:
        ValueError: as `context_moment`, or weights of another shape or not finite.

    Example:
        >>> round(risk(minimiser(np.eye(2), 4), np.eye(2), 4), 4)  # d (d + 1) / (N + d + 1)
        0.8571
    """
    setting = _checked(covariance, length, tasks, noise_variance)
    shape = setting.covariance.shape
    query = setting.covariance if query_covariance is None else check_covariance(query_covariance, shape[0])
    weights = np.asarray(weights, np.float64)
    if weights.shape != shape or not np.isfinite(weights).all():
        raise ValueError(f"the weights A have the shape {weights.shape}: give finite ones of the shape {shape}.")
    crossed = weights @ setting.covariance @ setting.tasks
    return float(np.trace(query @ (weights @ _moment(*setting) @ weights.T - crossed - crossed.T + setting.tasks)))


def least_loss(covariance: np.ndarray, length: int, noise_variance: float = 0.0) -> float:
    """The loss of A*, `(1/2) (tr Lambda - tr(A* Lambda^2))`, for C = I.

    Args:
        covariance: Lambda, [d, d].
        length: N.
        noise_variance: sigma^2.

    Raises:
        ValueError: as `minimiser`.

    Example:
        >>> round(2 * least_loss(np.eye(5), 20), 5)
        1.15385
    """
    best = minimiser(covariance, length, None, noise_variance)
    covariance = np.asarray(covariance, np.float64)
    return float(np.trace(covariance) - np.trace(best @ covariance @ covariance)) / 2


def logistic(times: np.ndarray, start: float, dimension: int, length: int, noise_variance: float = 0.0) -> np.ndarray:
    """The entry a(t) of A = a I during gradient flow, for Lambda = C = I and a balanced start (u^2 = |U|_F^2).

        a(t) = a_end / (1 + (a_end / a(0) - 1) exp(-2 sqrt(d) t)),   a_end = N / (N + d + 1 + sigma^2).

    Derived here: with U = v I balance says u^2 = d v^2, so that a = u v obeys
    a' = (d v^2 + u^2) (1 - a / a_end) = 2 sqrt(d) a (1 - a / a_end): a plateau, and one sudden drop of the loss.

    Args:
        times: t, [times]; a step of gradient descent with rate eta lasts eta.
        start: a(0), above 0.
        dimension: d.
        length: N.
        noise_variance: sigma^2.

    Returns:
        a(t), float64 [times].

    Raises:
        ValueError: a number out of its range, or times that are none or not finite.
    """
    end = _isotropic_end(start, dimension, length, noise_variance)
    return end / (1 + (end / start - 1) * np.exp(-2 * np.sqrt(dimension) * _times(times)))


def half_time(start: float, dimension: int, length: int, noise_variance: float = 0.0) -> float:
    """When `logistic` reaches half of its end, `log(a_end / a(0) - 1) / (2 sqrt(d))`: the time of the drop.

    Raises:
        ValueError: as `logistic`, or a start that is not below half of the end.

    Example:
        >>> round(half_time(0.001, dimension=8, length=30), 4)
        1.1745
    """
    end = _isotropic_end(start, dimension, length, noise_variance)
    if not start < end / 2:
        raise ValueError(f"the start {start} is not below half of the end, {end / 2:.6g}: give a smaller one.")
    return float(np.log(end / start - 1) / (2 * np.sqrt(dimension)))


def aligned_flow(
    times: np.ndarray, start: Factors, variances: np.ndarray, length: int, noise_variance: float = 0.0
) -> Factors:
    """Gradient flow where U(0) and Lambda share eigenvectors: d + 1 equations, solved to ten digits, for C = I.

        U_i' = -u lambda_i^2 (Gamma_i u U_i - 1),   u' = -sum_i U_i lambda_i^2 (Gamma_i u U_i - 1),
        Gamma_i = (1 + 1/N) lambda_i + (sum_j lambda_j + sigma^2) / N.

    Args:
        times: t, ascending from 0, [times].
        start: u(0), and the eigenvalues of U(0), [d].
        variances: lambda_i, the eigenvalues of Lambda, [d].
        length: N.
        noise_variance: sigma^2.

    Returns:
        u, [times], and the eigenvalues of U, [times, d].

    Raises:
        ValueError: starts of other lengths than variances, a number out of its range, times that do not ascend.
    """
    variances, keys = np.asarray(variances, np.float64), np.asarray(start.keys, np.float64)
    if variances.shape != keys.shape or variances.ndim != 1 or not variances.size or not (variances > 0).all():
        raise ValueError(f"the variances {variances.tolist()} must be above 0, one for each eigenvalue of the start.")
    if not np.isfinite([start.values, *keys, *variances]).all():
        raise ValueError(f"the start {start} or the variances {variances.tolist()} is not finite: give finite ones.")
    at_least("context length N", length, 1)
    positive("noise variance", noise_variance, or_zero=True)
    times = _times(times)
    if times[0] < 0 or (np.diff(times) < 0).any():
        raise ValueError("the times do not ascend from 0: sort them, none below 0.")
    gammas = (1 + 1 / length) * variances + (variances.sum() + noise_variance) / length

    def slope(_: float, state: np.ndarray) -> np.ndarray:
        u, keys = state[0], state[1:]
        pull = -(variances**2) * (gammas * u * keys - 1)
        return np.concatenate([[keys @ pull], u * pull])

    state = np.concatenate([[start.values], keys])
    solved = solve_ivp(slope, (0.0, times[-1]), state, "DOP853", times, rtol=1e-10, atol=1e-12)
    return Factors(solved.y[0], solved.y[1:].T)


def random_covariance_minimiser(
    moments: tuple[float, float, float] = (1.0, 2.0, 6.0), dimension: int = 1, length: Length = np.inf
) -> tuple[float, float]:
    """The best A = a I where every prompt has its own covariance, diag(lambda_1 .. lambda_d), and its risk.

        a = m2 / ((1 + 1/N) m3 + (m3 + (d - 1) m1 m2) / N),   risk / d = m1 - a m2,   m_j = E lambda^j.

    Derived here; the limit N -> infinity is section 4.3 of Zhang et al.: the risk m1 - m2^2 / m3 does not vanish
    however long the context, as one matrix cannot invert every covariance. For lambda ~ Exp(1) it is 1/3.

    Args:
        moments: m1, m2, m3 of a variance; those of Exp(1) where none are given.
        dimension: d; it has no part in the limit.
        length: N, or `numpy.inf`.

    Returns:
        a, and the risk divided by d.

    Raises:
        ValueError: moments of no positive variable, or a count below 1.

    Example:
        >>> [round(number, 4) for number in random_covariance_minimiser()]
        [0.3333, 0.3333]
    """
    first, second, third = moments
    if not (np.isfinite(moments).all() and first > 0 and second >= first**2 and third * first >= second**2):
        raise ValueError(f"no positive variable has the moments {moments}: give E lambda, E lambda^2, E lambda^3.")
    at_least("dimension d", dimension, 1)
    share = 1.0 / check_length("context length", length)
    a = second / ((1 + share) * third + share * (third + (dimension - 1) * first * second))
    return float(a), float(first - a * second)


class _Setting(NamedTuple):
    """Lambda, C, 1 / N and sigma^2 after a check."""

    covariance: np.ndarray
    tasks: np.ndarray
    share: float
    noise_variance: float


def _moment(covariance: np.ndarray, tasks: np.ndarray, share: float, noise_variance: float) -> np.ndarray:
    turned = covariance @ tasks
    return (1 + share) * turned @ covariance + share * (np.trace(turned) + noise_variance) * covariance


def _isotropic_end(start: float, dimension: int, length: int, noise_variance: float) -> float:
    at_least("dimension d", dimension, 1)
    at_least("context length N", length, 1)
    positive("noise variance", noise_variance, or_zero=True)
    positive("start a(0)", start)
    return length / (length + dimension + 1 + noise_variance)


def _times(times: np.ndarray) -> np.ndarray:
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or not times.size or not np.isfinite(times).all():
        raise ValueError(f"the times have the shape {times.shape}: give a list of at least one finite number.")
    return times


def _checked(covariance: np.ndarray, length: Length, tasks: np.ndarray | None, noise_variance: float) -> _Setting:
    share = 1.0 / check_length("context length", length)
    covariance = check_covariance(covariance, np.shape(covariance)[0] if np.ndim(covariance) else 1)
    positive("noise variance", noise_variance, or_zero=True)
    if tasks is None:
        return _Setting(covariance, np.eye(len(covariance)), share, noise_variance)
    second = np.asarray(tasks, np.float64)
    sound = second.shape == covariance.shape and np.isfinite(second).all() and second.any()
    least = -1e-9 * np.abs(second).max(initial=0.0)  # rounding
    if not sound or np.abs(second - second.T).max() > -least or np.linalg.eigvalsh(second)[0] < least:
        raise ValueError(
            f"the second moment of the weights, of shape {second.shape}, is no E w w': give a finite symmetric matrix "
            f"of shape {covariance.shape} with eigenvalues of at least 0, not all 0."
        )
    return _Setting(covariance, second, share, noise_variance)
