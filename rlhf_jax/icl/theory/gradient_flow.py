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

from rlhf_jax.icl.checks import at_least, check_covariance

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
        ValueError: a covariance that is not positive definite, a length below 1, a second moment that is not
            symmetric with the shape of the covariance, or a negative noise.

    Example:
        >>> context_moment(np.eye(2), 4)
        array([[1.75, 0.  ],
               [0.  , 1.75]])
    """
    covariance, tasks, share = _checked(covariance, length, tasks, noise_variance)
    turned = covariance @ tasks
    return (1 + share) * turned @ covariance + share * (np.trace(turned) + noise_variance) * covariance


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
    covariance, second, _ = _checked(covariance, length, tasks, noise_variance)
    moment = context_moment(covariance, length, tasks, noise_variance)
    return np.linalg.solve(moment, covariance @ second).T


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
        ValueError: as `minimiser`.
    """
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
        ValueError: as `context_moment`.

    Example:
        >>> round(risk(minimiser(np.eye(2), 4), np.eye(2), 4), 4)  # d (d + 1) / (N + d + 1)
        0.8571
    """
    moment = context_moment(covariance, length, tasks, noise_variance)
    covariance, tasks, _ = _checked(covariance, length, tasks, noise_variance)
    query = covariance if query_covariance is None else check_covariance(query_covariance, len(covariance))
    crossed = weights @ covariance @ tasks
    return float(np.trace(query @ (weights @ moment @ weights.T - crossed - crossed.T + tasks)))


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
        ValueError: a start that is not positive, or a count below 1.
    """
    end = _isotropic_end(start, dimension, length, noise_variance)
    return end / (1 + (end / start - 1) * np.exp(-2 * np.sqrt(dimension) * np.asarray(times, np.float64)))


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
        ValueError: variances or starts of other lengths, or not positive variances.
    """
    variances, keys = np.asarray(variances, np.float64), np.asarray(start.keys, np.float64)
    if variances.shape != keys.shape or variances.ndim != 1 or not (variances > 0).all():
        raise ValueError(f"the variances {variances.tolist()} must be above 0, one for each eigenvalue of the start.")
    at_least("context length N", length, 1)
    gammas = (1 + 1 / length) * variances + (variances.sum() + noise_variance) / length

    def slope(_: float, state: np.ndarray) -> np.ndarray:
        u, keys = state[0], state[1:]
        pull = -(variances**2) * (gammas * u * keys - 1)
        return np.concatenate([[keys @ pull], u * pull])

    times = np.asarray(times, np.float64)
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
    if not (first > 0 and second >= first**2 and third * first >= second**2):
        raise ValueError(f"no positive variable has the moments {moments}: give E lambda, E lambda^2, E lambda^3.")
    at_least("dimension d", dimension, 1)
    share = _share(length)
    a = second / ((1 + share) * third + share * (third + (dimension - 1) * first * second))
    return float(a), float(first - a * second)


def _isotropic_end(start: float, dimension: int, length: int, noise_variance: float) -> float:
    at_least("dimension d", dimension, 1)
    at_least("context length N", length, 1)
    if not start > 0:
        raise ValueError(f"the start a(0) is {start}: give a number above 0; at 0 the flow stands still.")
    return length / (length + dimension + 1 + noise_variance)


def _share(length: Length) -> float:
    """1 / N, 0 for a context without end."""
    if np.isinf(length):
        return 0.0
    at_least("context length", length, 1)
    return 1.0 / length


def _checked(
    covariance: np.ndarray, length: Length, tasks: np.ndarray | None, noise_variance: float
) -> tuple[np.ndarray, np.ndarray, float]:
    covariance = check_covariance(covariance, len(covariance))
    second = np.eye(len(covariance)) if tasks is None else np.asarray(tasks, np.float64)
    if second.shape != covariance.shape or np.abs(second - second.T).max() > 1e-9 * np.abs(second).max():
        raise ValueError(
            f"the second moment of the weights has the shape {second.shape}: give a symmetric matrix of the shape "
            f"{covariance.shape} of the covariance."
        )
    if not (np.isfinite(noise_variance) and noise_variance >= 0):
        raise ValueError(f"the noise variance is {noise_variance}: give a number of at least 0.")
    return covariance, second, _share(length)
