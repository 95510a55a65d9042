"""Errors of classical estimators after k examples of linear regression with Gaussian inputs.

The task is y = w'x + noise with w ~ N(0, prior_variance I), x ~ N(0, I), and noise of variance `noise_variance`. The
error is that of the noiseless target, E (x'w_k - x'w)^2 = E |w_k - w|^2, w_k from k examples. Garg et al. 2022 (arXiv
2208.01066) report it divided by d.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

from rlhf_jax.icl.checks import at_least, positive

NODES = (256, 384, 576, 864, 1296)  # of the integration, tried one after the other


def least_squares_error(
    dimension: int, lengths: Sequence[int] | np.ndarray, noise_variance: float = 0.0, prior_variance: float = 1.0
) -> np.ndarray:
    """The error of least squares of minimum norm.

        prior_variance (d - k)_+ + noise_variance * { k / (d - k - 1) for k < d - 1,  d / (k - d - 1) for k > d + 1 },

    infinite with noise for k = d - 1, d and d + 1. The first term is what of w lies outside the span of the inputs, the
    second E tr (X X')^-1 or E tr (X'X)^-1 of a Wishart matrix.

    Args:
        dimension: d.
        lengths: k, examples seen, each >= 0.
        noise_variance: >= 0.
        prior_variance: of each entry of w.

    Returns:
        Float64, one a length.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> least_squares_error(20, [0, 5, 20, 40]).tolist()
        [20.0, 15.0, 0.0, 0.0]
        >>> least_squares_error(4, [2, 3, 5, 7], noise_variance=0.5).tolist()
        [3.0, inf, inf, 1.0]
    """
    k = _lengths(dimension, lengths, noise_variance, prior_variance)
    outside = prior_variance * np.maximum(dimension - k, 0.0)
    if noise_variance == 0:
        return outside
    gap = np.abs(k - dimension) - 1
    noise = np.where(gap > 0, np.minimum(k, dimension) / np.where(gap > 0, gap, 1.0), np.inf)
    return outside + noise_variance * np.where(k == 0, 0.0, noise)


def averaging_error(
    dimension: int, lengths: Sequence[int] | np.ndarray, noise_variance: float = 0.0, prior_variance: float = 1.0
) -> np.ndarray:
    """The error of averaging, w_k = (1/k) sum y x: `d (prior_variance (d + 1) + noise_variance) / k`.

    From E S^2 = (1 + (d + 1)/k) I for the sample covariance S of k examples: E |S w - w|^2 is
    prior_variance d (d + 1) / k. With k = 0 the prediction is 0 and the error prior_variance d.

    Args:
        dimension: d.
        lengths: k, each >= 0.
        noise_variance: >= 0.
        prior_variance: of each entry of w.

    Returns:
        Float64, one a length.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> averaging_error(20, [0, 40]).tolist()
        [20.0, 10.5]
    """
    k = _lengths(dimension, lengths, noise_variance, prior_variance)
    seen = dimension * (prior_variance * (dimension + 1) + noise_variance) / np.maximum(k, 1.0)
    return np.where(k == 0, dimension * prior_variance, seen)


def ridge_error(
    dimension: int,
    lengths: Sequence[int] | np.ndarray,
    noise_variance: float,
    prior_variance: float = 1.0,
    penalty: float | None = None,
) -> np.ndarray:
    """The error of ridge regression with any penalty.

        prior_variance penalty^2 E tr (G + penalty I)^-2 + noise_variance E tr G (G + penalty I)^-2,    G = X'X,

    which for the best penalty, noise_variance / prior_variance, is noise_variance E tr (G + penalty I)^-1. The
    expectations are exact (`wishart_trace`).

    Args:
        dimension: d.
        lengths: k, each >= 0.
        noise_variance: >= 0; > 0 where no penalty is given.
        prior_variance: of each entry of w.
        penalty: > 0; None: the best one.

    Returns:
        Float64, one a length.

    Raises:
        ValueError: a number out of its range, or a penalty that is too small for the integration of `wishart_trace`
            (where k is about d).

    Example:
        >>> ridge_error(8, [0, 16], noise_variance=0.25).round(4).tolist()
        [8.0, 0.2631]
    """
    k = _lengths(dimension, lengths, noise_variance, prior_variance)
    penalty = positive("penalty of ridge", noise_variance / prior_variance if penalty is None else penalty)

    def error(eigenvalue: np.ndarray) -> np.ndarray:
        return (prior_variance * penalty**2 + noise_variance * eigenvalue) / (eigenvalue + penalty) ** 2

    distinct = {length: wishart_trace(error, dimension, int(length)) for length in np.unique(k)}
    return np.array([distinct[length] for length in k])


def wishart_trace(function: Callable[[np.ndarray], np.ndarray], dimension: int, length: int) -> float:
    """E tr f(X'X) for X of k rows N(0, I_d), without sampling.

    With m = min(d, k) and a = |k - d|, the eigenvalues x_1 .. x_m that are not 0 have the density proportional to
    prod_{i<j} |x_i - x_j| prod_i w(x_i), w(x) = x^{(a-1)/2} e^{-x/2}. De Bruijn's identity (1955) makes E prod_i g(x_i)
    a ratio of Pfaffians for any g:

        E prod_i g(x_i) = Pf A[g] / Pf A[1],    A_jl = integral of sign(y - x) p_j(x) p_l(y) w(x) w(y) g(x) g(y) dx dy,

    p_j any polynomials of degrees 0 .. m-1 (here Laguerre's, which keep A well conditioned); for odd m it is bordered
    by the integrals of p_j w g. With g = 1 + t f, the derivative at t = 0 is E sum_i f(x_i) = tr(A^-1 dA/dt) / 2. The
    integrals are taken in s = sqrt(x), where everything is smooth, by Chebyshev's polynomials, of more and more nodes
    until two results agree to eight digits; the d - m eigenvalues that are 0 add (d - m) f(0).

    Args:
        function: f, smooth on [0, inf), of an array; f(0) is used where k < d.
        dimension: d >= 1.
        length: k >= 0.

    Returns:
        The expectation.

    Raises:
        ValueError: d < 1 or k < 0; or results that are not finite, or do not agree with 1,296 nodes either: f is
            too steep near 0, or d and k are too large (several hundreds).

    Example:
        >>> round(wishart_trace(lambda x: 1 / x, dimension=3, length=10), 8)  # d / (k - d - 1)
        0.5
    """
    at_least("dimension d", dimension, 1)
    at_least("number of examples k", length, 0)
    m, a = min(dimension, length), abs(length - dimension)
    null = float(function(np.zeros(1))[0]) * (dimension - m) if dimension > m else 0.0
    if m == 0:
        return null
    before = np.nan
    for nodes in NODES:
        found, size = _positive_part(function, m, a, nodes)
        if abs(found - before) <= 1e-8 * size:
            return null + found
        before = found
        if not np.isfinite(found):
            break
    raise ValueError(
        f"the expectation for d = {dimension} and k = {length} did not converge ({found:.6g} with {nodes} nodes): "
        "give a function that is less steep near 0, such as a larger penalty, or smaller d and k."
    )


def _positive_part(
    function: Callable[[np.ndarray], np.ndarray], count: int, gap: int, nodes: int
) -> tuple[float, float]:
    """What the `count` eigenvalues that are not 0 add, and the size of the numbers that it is a sum of."""
    eigenvalues, basis, inverse = _ensemble(count, gap, nodes)
    _, _, whole = _integration(nodes)
    with np.errstate(over="ignore", invalid="ignore"):
        weighted = basis * function(eigenvalues)
        change = _pairing(weighted, basis) + _pairing(basis, weighted)
        if count % 2:
            change = _bordered(change, weighted @ whole)
        terms = (inverse * change.T).sum(axis=1)
    return float(terms.sum()) / 2, float(np.abs(terms).sum()) / 2


@functools.lru_cache(maxsize=16)
def _ensemble(count: int, gap: int, nodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x at the nodes, [nodes]; p_j w dx there, [count, nodes]; and the inverse of A[1]."""
    low, high = max(0.0, np.sqrt(gap + count) - np.sqrt(count) - 9), np.sqrt(gap + count) + np.sqrt(count) + 9
    places, _, whole = _integration(nodes)
    s = low + (high - low) * (1 + places) / 2
    j = np.arange(count)[:, None]
    scale = special.gammaln(j + 1) - special.gammaln(j + gap + 1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        envelope = np.exp((scale - s**2) / 2 + (gap * np.log(s) if gap else 0.0))
        basis = (high - low) * envelope * special.eval_genlaguerre(j, gap, s**2)
        matrix = _pairing(basis, basis)
    if count % 2:
        matrix = _bordered(matrix, basis @ whole)
    inverse = np.linalg.inv(matrix) if np.isfinite(matrix).all() else np.full_like(matrix, np.nan)
    return _read_only(s**2, basis, inverse)


def _pairing(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Integral of sign(y - x) left_j(x) right_l(y), of values at the nodes."""
    _, cumulative, whole = _integration(left.shape[1])
    return ((2 * left @ cumulative.T - (left @ whole)[:, None]) * whole) @ right.T


@functools.lru_cache(maxsize=8)
def _integration(nodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chebyshev's nodes on [-1, 1], and what turns values there into integrals from -1: to each node, and to 1."""
    places = np.cos(np.pi * (np.arange(nodes) + 0.5) / nodes)
    weights = np.where(np.arange(nodes) == 0, 1.0, 2.0) / nodes
    coefficients = np.polynomial.chebyshev.chebvander(places, nodes - 1).T * weights[:, None]
    integrals = np.polynomial.chebyshev.chebint(np.eye(nodes), lbnd=-1) @ coefficients
    cumulative = np.polynomial.chebyshev.chebvander(places, nodes) @ integrals
    return _read_only(places, cumulative, integrals.sum(axis=0))


def _read_only(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    for array in arrays:  # all callers share them
        array.setflags(write=False)
    return arrays


def _bordered(matrix: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """[[A, b], [-b', 0]]."""
    return np.block([[matrix, edge[:, None]], [-edge[None], np.zeros((1, 1))]])


def _lengths(
    dimension: int, lengths: Sequence[int] | np.ndarray, noise_variance: float, prior_variance: float
) -> np.ndarray:
    """The lengths as float64, after a check of all numbers."""
    at_least("dimension d", dimension, 1)
    k = np.asarray(lengths, np.float64)
    if k.ndim != 1 or not np.isfinite(k).all() or (k < 0).any() or (k != np.round(k)).any():
        raise ValueError(f"the numbers of examples are {k.tolist()}: give a list of whole numbers of at least 0.")
    positive("noise variance", noise_variance, or_zero=True)
    positive("prior variance", prior_variance)
    return k
