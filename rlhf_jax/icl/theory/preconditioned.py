"""What linear transformers of k layers learn of linear regression: preconditioned gradient descent with the best steps.

Ahn, Cheng, Daneshmand, Sra 2023 (arXiv 2306.00297). Inputs are x ~ N(0, Sigma), weights w ~ N(0, Sigma^-1), and n
examples are shown; the loss is E(prediction - w' x_q)^2, without a 1/2. With A_l = -a_l Sigma^-1 (their stationary
point), and S = (1/n) sum_i x_i x_i' of the whitened inputs, k layers leave the error P_k(S) w, a polynomial:

    sparse layers:  P_k(s) = prod_l (1 - a_l s),
    GD++:           P_{l+1} = P_l (1 - a_l s_l),  f_{l+1} = f_l (1 - a_l b_l s_l),  s_l = s f_l^2,  P_0 = f_0 = 1,

and the loss is E tr P_k(S)^2 = d E P_k(s)^2, s being an eigenvalue of S drawn at random. Derived here: every such
expectation is a Gauss quadrature whose nodes come from the exact moments of a Wishart matrix; and the best steps of
sparse layers are 1 over the nodes of the quadrature for s weighted by s, since the best polynomial with P(0) = 1 is
orthogonal to s times every polynomial of lower degree.
"""

import functools
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh_tridiagonal
from scipy.optimize import brentq, minimize

from rlhf_jax.icl.checks import at_least


class Quadrature(NamedTuple):
    """Points and weights with which `weights @ f(nodes)` is the mean of f, exactly for polynomials of low degree.

    Attributes:
        nodes: float64 [points], ascending.
        weights: float64 [points]; they sum to the mass of the measure.
    """

    nodes: np.ndarray
    weights: np.ndarray


class Minimum(NamedTuple):
    """A stationary point that a descent of the GD++ loss ends in.

    Attributes:
        loss: E(prediction - w' x_q)^2 there.
        steps: a_l, [k].
        products: a_l b_l of all layers but the last, whose b has no effect, [k - 1].
        share: of the descents that ended there.
    """

    loss: float
    steps: np.ndarray
    products: np.ndarray
    share: float


def wishart_moments(dimension: int, length: int, count: int) -> np.ndarray:
    """The moments `m_j = E tr(S^j) / d` for j = 0 .. count, S = X X' / n with X Gaussian of shape [d, n].

    Exact for every j. In the basis of Jack polynomials of parameter 2 (zonal polynomials) both the trace of a power and
    the Wishart expectation are products over the boxes (row i, column j) of a partition, c = 2 (j - 1) - (i - 1):

        E tr (X X')^k = 2 k sum_{partitions of k} prod_{boxes but (1,1)} c  prod_boxes (d + c)(n + c) / (h h'),

    with hooks h = 2 (arm + 1) + leg and h' = 2 arm + leg + 1 (Stanley 1989, Theorems 5.4, 5.8 and Proposition 3.4;
    Hanlon, Stanley, Stembridge 1992). A partition with a box in row 3, column 2 contributes nothing.

    Args:
        dimension: d.
        length: n.
        count: the highest moment.

    Returns:
        Float64 [count + 1], m_0 = 1 first.

    Raises:
        ValueError: d or n below 1, or a negative count.

    Example:
        >>> wishart_moments(5, 20, 2)  # m_2 = 1 + (d + 1) / n
        array([1. , 1. , 1.3])
    """
    return np.array([float(moment) for moment in _exact_moments(dimension, length, count)])


def spectrum(dimension: int, length: int, points: int) -> Quadrature:
    """The law of an eigenvalue of S, drawn at random, as a Gauss quadrature: exact up to degree 2 points - 1.

    Args:
        dimension: d.
        length: n.
        points: nodes, >= 1.

    Raises:
        ValueError: a count below 1.
    """
    at_least("number of points", points, 1)
    return _gauss(tuple(_exact_moments(dimension, length, 2 * points - 1)))


def loss_of_steps(steps: np.ndarray, dimension: int, length: int) -> float:
    """The loss of sparse layers with the steps a_l: `d E prod_l (1 - a_l s)^2`.

    Args:
        steps: a_l, [k]; their order does not matter.
        dimension: d.
        length: n.

    Example:
        >>> round(loss_of_steps(np.array([20 / 26]), 5, 20), 5)
        1.15385
    """
    nodes, weights = spectrum(dimension, length, len(steps) + 1)
    return float(dimension * weights @ np.prod(1 - np.multiply.outer(nodes, steps), axis=1) ** 2)


def best_steps(dimension: int, length: int, layers: int) -> np.ndarray:
    """The steps a_l of the best k sparse layers, ascending: 1 over the k Gauss nodes of the eigenvalue weighted by s.

    The same numbers: with m the moments, M = [m_{i+j}], b = [m_1 .. m_k], the values 1 / a_l are the roots of
    1 - sum_j (M^-1 b)_j s^j. For one layer a = n / (n + d + 1), Theorem 1 of Ahn et al.

    Args:
        dimension: d.
        length: n.
        layers: k.

    Returns:
        Float64 [k].

    Raises:
        ValueError: a count below 1.

    Example:
        >>> best_steps(5, 20, 2).round(4)
        array([0.5154, 1.2496])
    """
    at_least("number of layers k", layers, 1)
    return np.sort(1.0 / _gauss(tuple(_exact_moments(dimension, length, 2 * layers)[1:])).nodes)


def best_loss(dimension: int, length: int, layers: int) -> float:
    """The loss of the best k sparse layers, `L_k = d (1 - b' M^-1 b)` in the notation of `best_steps`.

    Args:
        dimension: d.
        length: n.
        layers: k.

    Raises:
        ValueError: a count below 1.

    Example:
        >>> [round(best_loss(5, 20, k), 4) for k in (1, 2, 3)]
        [1.1538, 0.3612, 0.1336]
    """
    return loss_of_steps(best_steps(dimension, length, layers), dimension, length)


def shared_step(dimension: int, length: int, layers: int) -> tuple[float, float]:
    """The best k layers with one step for all, plain gradient descent: the step a, and its loss `d E (1 - a s)^2k`.

    The loss is convex in a; the step is the zero of its slope.

    Args:
        dimension: d.
        length: n.
        layers: k.

    Returns:
        The step and the loss.

    Raises:
        ValueError: a count below 1.

    Example:
        >>> [round(number, 4) for number in shared_step(5, 20, 2)]
        [0.7425, 0.499]
    """
    at_least("number of layers k", layers, 1)
    nodes, weights = spectrum(dimension, length, layers + 1)
    above = 2.0 / nodes[0]  # (1 - a s) is at most -1 at every node
    step = brentq(lambda a: -weights @ (nodes * (1 - a * nodes) ** (2 * layers - 1)), 0.0, above, xtol=1e-14)
    return float(step), float(dimension * weights @ (1 - step * nodes) ** (2 * layers))


def gd_plus_plus_loss(steps: np.ndarray, products: np.ndarray, dimension: int, length: int) -> float:
    """The loss of GD++ layers, whose inputs are transformed too, `d E P_k(s)^2` by the recursion above.

    Args:
        steps: a_l, [k].
        products: a_l b_l of the layers but the last, [k - 1].
        dimension: d.
        length: n.

    Raises:
        ValueError: there is not one product a layer but the last.

    Example:
        >>> round(gd_plus_plus_loss(np.array([0.769, 2.644]), np.array([0.272]), 5, 20), 4)
        0.0865
    """
    if len(products) != len(steps) - 1:
        raise ValueError(f"there are {len(products)} products for {len(steps)} steps: give one a layer but the last.")
    nodes, weights = spectrum(dimension, length, _points(len(steps)))
    return float(dimension * weights @ _residual(np.asarray(steps), np.asarray(products), nodes) ** 2)


def gd_plus_plus_minima(dimension: int, length: int, layers: int, starts: int = 100, seed: int = 0) -> list[Minimum]:
    """The minima of the GD++ loss that descents (BFGS) from random starts end in, the lowest first.

    The first is the lowest that was found, which is no proof that there is none below it. For d = 5, n = 20, k = 2
    there are three, and 25 starts find them as 100 do.

    Args:
        dimension: d.
        length: n.
        layers: k, >= 2.
        starts: descents; they start with a_l uniform in [0, 3] and a_l b_l uniform in [0, 1].
        seed: of the starts.

    Returns:
        Minima whose losses differ by more than a thousandth, those that a descent converged to.

    Raises:
        ValueError: a count out of its range, or no descent that converged.
    """
    at_least("number of layers k of GD++", layers, 2)
    at_least("number of starts", starts, 1)
    nodes, weights = spectrum(dimension, length, _points(layers))

    def loss(point: np.ndarray) -> float:
        return float(dimension * weights @ _residual(point[:layers], point[layers:], nodes) ** 2)

    rng = np.random.default_rng(seed)
    found: list[tuple[float, np.ndarray]] = []
    for _ in range(starts):
        start = np.concatenate([rng.uniform(0, 3, layers), rng.uniform(0, 1, layers - 1)])
        with np.errstate(over="ignore", invalid="ignore"):
            ended = minimize(loss, start, method="BFGS", options={"gtol": 1e-7, "maxiter": 2000})
        if np.isfinite(ended.fun) and np.abs(ended.jac).max() < 1e-4:
            found.append((float(ended.fun), ended.x))
    if not found:
        raise ValueError(f"none of {starts} descents of the GD++ loss converged: give more starts, or fewer layers.")
    minima: list[Minimum] = []
    for value, point in sorted(found, key=lambda pair: pair[0]):
        if minima and value <= minima[-1].loss * 1.001:
            minima[-1] = minima[-1]._replace(share=minima[-1].share + 1 / starts)
        else:
            minima.append(Minimum(value, point[:layers], point[layers:], 1 / starts))
    return minima


def _residual(steps: np.ndarray, products: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """P_k at the nodes."""
    error, scale = np.ones_like(nodes), np.ones_like(nodes)
    for step, product in zip(steps, [*products, 0.0], strict=True):
        seen = nodes * scale**2
        error, scale = error * (1 - step * seen), scale * (1 - product * seen)
    return error


def _points(layers: int) -> int:
    """Nodes that make P_k^2 of GD++ exact: s_l has the degree 3^l, P_k their sum, and f_l half of s_l - 1."""
    return (3**layers - 1) // 2 + 1


@functools.lru_cache(maxsize=64)
def _exact_moments(dimension: int, length: int, count: int) -> list[Fraction]:
    at_least("dimension d", dimension, 1)
    at_least("number of examples n", length, 1)
    at_least("highest moment", count, 0)
    scaled = [
        Fraction(2 * k) * sum((_term(rows, dimension, length) for rows in _partitions(k)), Fraction(0))
        for k in range(1, count + 1)
    ]
    return [Fraction(1), *(moment / (dimension * length**k) for k, moment in enumerate(scaled, start=1))]


def _partitions(total: int) -> list[tuple[int, ...]]:
    """The partitions of a number whose third row and those below have at most one box."""
    return [
        (first, second, *[1] * (total - first - second)) if second else (first,)
        for first in range(1, total + 1)
        for second in range(0, min(first, total - first) + 1)
        if second or first == total
    ]


def _term(rows: tuple[int, ...], dimension: int, length: int) -> Fraction:
    above = below = 1
    for i, row in enumerate(rows):
        for j in range(row):
            content = 2 * j - i
            arm, leg = row - j - 1, sum(other > j for other in rows[i + 1 :])
            above *= (content if i or j else 1) * (dimension + content) * (length + content)
            below *= (2 * (arm + 1) + leg) * (2 * arm + leg + 1)
    return Fraction(above, below)


@functools.lru_cache(maxsize=64)
def _gauss(moments: tuple[Fraction, ...]) -> Quadrature:
    """Chebyshev's algorithm in exact fractions, then the eigenvalues of the Jacobi matrix (Golub and Welsch 1969)."""
    points = len(moments) // 2
    diagonal, off = [moments[1] / moments[0]], []
    before, now = [Fraction(0)] * len(moments), list(moments)
    for k in range(1, points):
        last = off[-1] if off else Fraction(0)
        later = [Fraction(0)] * len(moments)
        for j in range(k, 2 * points - k):
            later[j] = now[j + 1] - diagonal[-1] * now[j] - last * before[j]
        off.append(later[k] / now[k - 1])
        diagonal.append(later[k + 1] / later[k] - now[k] / now[k - 1])
        before, now = now, later
    nodes, vectors = eigh_tridiagonal([float(one) for one in diagonal], [float(one) ** 0.5 for one in off])
    found = Quadrature(nodes, float(moments[0]) * vectors[0] ** 2)
    for shared in found:  # by all callers, from the cache
        shared.setflags(write=False)
    return found
