"""How curved the loss of the reduced model is: its Hessian, its smoothness l, and the rate of gradient descent.

With J(q) = diag(q) - q q' and q = softmax(z), the Hessian at W is E[sum_kl J_kl (S_k x')(S_l x')'], a d^2 x d^2 matrix
over the entries of W in row-major order. It is an average of positive semidefinite matrices, so the loss is convex; and
J is bounded, so the loss is smooth:

    J(q) <= (I - 11'/c) / 2  (Boehning 1992)  and  J(1/c) = (I - 11'/c) / c   give   Hessian(W) <= (c / 2) Hessian(0).

Hence l = (c / 2) lambda_max(Hessian(0)) bounds the curvature everywhere. For two classes it is attained at W = 0, and
no smaller l is true; for more classes it is an upper bound, at most c / 2 times too large.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import softmax

from rlhf_jax.icl.checks import check_length
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.theory.population import Population, check_model, draw

BLOCK = 2**12  # draws whose d^2-vectors are held at a time


class Spectrum(NamedTuple):
    """The three eigenvalues of the Hessian at W = w I where Lambda is a multiple of the identity.

    Attributes:
        trace: of the direction I, once.
        symmetric: of symmetric matrices without a trace, d (d + 1) / 2 - 1 times; nan for d = 1.
        antisymmetric: of antisymmetric matrices, d (d - 1) / 2 times; nan for d = 1.
    """

    trace: float
    symmetric: float
    antisymmetric: float


def hessian_at_zero(mixture: Mixture, length: int | float, stratified: bool = False) -> np.ndarray:
    """Hessian of the loss at W = 0, exact for any covariance, number of classes and prior scale.

    Derived here. All entries of J are known at W = 0, and given the task S and x are independent. With
    V = (1/c) sum_k mu_k mu_k', and because the expectation of mu_k mu_l' is 0 for k != l also next to mu_j mu_j',

        Hessian(0) = (c - 1) / c^2  E[{V / c + (Lambda + (1 - 1/c) V) / N} (x) (Lambda + V)],

    without (1 - 1/c) V for stratified contexts. E[V (x) V] takes fourth moments of mu_0 ~ N(0, tau^2 I), of
    r^2 = mu_0' Lambda^-1 mu_0, and of directions v uniform on the sphere in mu_k = Lambda^1/2 r v_k.

    Args:
        mixture: the family of tasks.
        length: N >= 1, or `numpy.inf`.
        stratified: contexts hold N / c examples of each class.

    Returns:
        Float64 [d^2, d^2]; entry (i d + j, k d + l) belongs to W_ij and W_kl.

    Raises:
        ValueError: a length that is no whole number of at least 1, nor infinite.

    Example:
        >>> hessian_at_zero(Mixture(1), length=np.inf)
        array([[0.5]])
    """
    length = check_length("context length", length)
    c, d, scale = mixture.classes, mixture.dimension, mixture.prior_scale
    covariance, inverse, identity = mixture.matrix, mixture.inverse, np.eye(mixture.dimension)
    trace = np.trace(inverse)
    square = scale**2 * trace  # E r^2
    fourth = scale**4 * (trace**2 + 2 * np.trace(inverse @ inverse))  # E r^4
    first, other = scale**2 * identity, square / d * covariance  # E mu_k mu_k', for k = 0 and k >= 1
    mixed = scale**4 * (trace * identity + 2 * inverse)  # E r^2 mu_0 mu_0'
    outers = scale**4 * _pairings(identity)
    outers += (c - 1) / d * (np.kron(mixed, covariance) + np.kron(covariance, mixed))
    outers += (c - 1) * (c - 2) * fourth / d**2 * np.kron(covariance, covariance)
    outers += (c - 1) * fourth / (d * (d + 2)) * _pairings(covariance)
    outers /= c**2  # E V (x) V
    second = (first + (c - 1) * other) / c  # E V
    repeated = 0.0 if stratified else (1 - 1 / c) / length
    total = (1 / c + repeated) * (np.kron(second, covariance) + outers)
    total += (np.kron(covariance, covariance) + np.kron(covariance, second)) / length
    return (c - 1) / c**2 * total


def smoothness(mixture: Mixture, length: int | float, stratified: bool = False) -> float:
    """The smoothness l = (c / 2) lambda_max(Hessian(0)): gradient descent with a step of at most 2 / l cannot diverge.

    For two classes and Lambda = I it is, with tau the prior scale (derived here; tau = 1 is the usual case),

        l = 1/(4d) { (1 + 1/N) (tau^2 d + tau^4 (d + 1)(d + 2) / 2) / 2 + (d + tau^2 d) / N },

    and for Lambda = lambda I it is lambda^2 times that at tau / sqrt(lambda).

    Args:
        mixture: the family of tasks.
        length: N >= 1, or `numpy.inf`.
        stratified: contexts hold N / c examples of each class.

    Raises:
        ValueError: as `hessian_at_zero`.

    Example:
        >>> round(smoothness(Mixture(4), length=50), 4)
        0.6156
    """
    return mixture.classes / 2 * float(np.linalg.eigvalsh(hessian_at_zero(mixture, length, stratified))[-1])


def hessian(
    mixture: Mixture,
    weights: np.ndarray,
    length: int | float,
    stratified: bool = False,
    points: int = 2**16,
    seed: int = 0,
) -> np.ndarray:
    """Hessian of the loss at any W, by a quasi-random expectation.

    Only the projection of S on W x enters the logits. What is left of S is Gaussian given that projection, and its
    second moment is put in exactly (`_context`).

    Args:
        mixture: the family of tasks.
        weights: W, [d, d].
        length: N >= 1, or `numpy.inf`.
        stratified: contexts hold N / c examples of each class.
        points: quasi-random draws, a power of two.
        seed: of the draws.

    Returns:
        Float64 [d^2, d^2], laid out as `hessian_at_zero`.

    Raises:
        ValueError: as `population.check_model`, or a number of points that is no power of two.
    """
    population = _draw(mixture, weights, length, points, seed)
    d = mixture.dimension
    context = _context(population, weights, length, stratified)
    total = np.zeros((d * d, d * d))
    for start in range(0, points, BLOCK):
        rows = slice(start, start + BLOCK)
        query, mass = population.query[rows], context.mass[rows]
        for column in np.moveaxis(context.centred[rows], 1, 0):
            feature = (column[:, :, None] * query[:, None, :]).reshape(-1, d * d)
            total += feature.T @ feature
        total += np.kron(mixture.matrix, (query * mass[:, None]).T @ query)
        along = (context.along[rows][:, :, None] * query[:, None, :]).reshape(-1, d * d)
        total -= (along * mass[:, None]).T @ along
    return total / points


def isotropic_spectrum(
    mixture: Mixture,
    weight: int | float,
    length: int | float,
    stratified: bool = False,
    points: int = 2**16,
    seed: int = 0,
) -> Spectrum:
    """The three distinct eigenvalues of the Hessian at W = w I, where Lambda is a multiple of the identity.

    The Hessian commutes with rotations W -> R W R', so it is A + B (1 + transposition) on matrices without a trace:

        trace A + B (d + 1) = Q / d,   symmetric A + B,   antisymmetric A - B,
        Q = E[sum_kl J_kl S_k'x S_l'x],  P = E[sum_kl J_kl S_k'S_l |x|^2],
        B = (d Q - P) / (d (d - 1)(d + 2)),  A = (P - 2 B d) / d^2   (derived here).

    Args:
        mixture: a family of tasks with Lambda = lambda I.
        weight: w.
        length: N >= 1, or `numpy.inf`.
        stratified: contexts hold N / c examples of each class.
        points: quasi-random draws, a power of two.
        seed: of the draws.

    Raises:
        ValueError: Lambda is no multiple of the identity, or as `hessian`.

    Example:
        >>> spectrum = isotropic_spectrum(Mixture(3), weight=2.0, length=np.inf)
        >>> [round(value, 3) for value in spectrum]
        [0.015, 0.034, 0.047]
    """
    if not mixture.isotropic:
        raise ValueError("the covariance is no multiple of the identity: take the eigenvalues of `hessian` instead.")
    d, weights = mixture.dimension, weight * np.eye(mixture.dimension)
    population = _draw(mixture, weights, length, points, seed)
    context = _context(population, weights, length, stratified)
    query, size = population.query, np.sum(population.query**2, axis=1)
    left = context.mass * (np.trace(mixture.matrix) - np.sum(context.along**2, axis=1))
    left_along = context.mass * (mixture.matrix[0, 0] * size - np.sum(context.along * query, axis=1) ** 2)
    q = np.mean(np.sum(np.einsum("ncd,nd->nc", context.centred, query) ** 2, axis=1) + left_along)
    p = np.mean((np.sum(context.centred**2, axis=(1, 2)) + left) * size)
    if d == 1:
        return Spectrum(float(q), math.nan, math.nan)
    b = (d * q - p) / (d * (d - 1) * (d + 2))
    a = (p - 2 * b * d) / d**2
    return Spectrum(float(q / d), float(a + b), float(a - b))


def rate(learning_rate: int | float, curvature: np.ndarray) -> float:
    """Slope, a step, to which log |W_t - W*|^2 and the log of the loss gap tend in gradient descent.

    W_{t+1} - W* = (1 - eta H)(W_t - W*) near W*, so the slope is 2 log max_i |1 - eta lambda_i|, which for
    eta <= 2 / (lambda_min + lambda_max) is 2 log(1 - eta lambda_min).

    Args:
        learning_rate: eta.
        curvature: the Hessian H at W*, [n, n], or its eigenvalues, [n].

    Example:
        >>> round(rate(0.5, np.array([0.2, 1.0])), 4) == round(2 * math.log(0.9), 4)
        True
    """
    values = np.linalg.eigvalsh(curvature) if np.ndim(curvature) == 2 else np.asarray(curvature)
    with np.errstate(divide="ignore"):
        return float(2 * np.log(np.abs(1 - learning_rate * values).max()))


def condition_number(
    mixture: Mixture, length: int | float, weights: np.ndarray, points: int = 2**16, seed: int = 0
) -> float:
    """l over the least eigenvalue of the Hessian at W*: about the steps after which an error has fallen e-fold.

    Print it before training. It grows fast with the dimension at a fixed prior scale (36 for d = 3, 420 for d = 10 in
    the limit of long contexts), because tasks become so easy that the loss is flat around W*.

    Args:
        mixture: the family of tasks.
        length: N >= 1, or `numpy.inf`.
        weights: W* of this N, [d, d] (`minimiser.minimiser`; c Lambda^-1 for N = inf).
        points: quasi-random draws, a power of two.
        seed: of the draws.
    """
    least = np.linalg.eigvalsh(hessian(mixture, weights, length, points=points, seed=seed))[0]
    return smoothness(mixture, length) / float(least)


class _Context(NamedTuple):
    """The second moment of sum_k sqrt(J) S_k given the draw: centred' centred + mass (Lambda - along along').

    Attributes:
        centred: sqrt(q_k) (s_k - sum_j q_j s_j), with s_k the mean of S_k given its projection on W x, [n, c, d].
        mass: sum_k J_kk n_k / N^2, the variance that is left, [n].
        along: Lambda W x / |Lambda^1/2 W x|, the direction in which nothing is left; 0 where W x = 0, [n, d].
    """

    centred: np.ndarray
    mass: np.ndarray
    along: np.ndarray


def _context(population: Population, weights: np.ndarray, length: int | float, stratified: bool) -> _Context:
    law = population.law
    chances = softmax(population.model_logits(weights, length, stratified), axis=1)
    turned = population.query @ weights.T @ law.covariance
    width = np.sqrt(np.sum(turned * (population.query @ weights.T), axis=1))
    along = np.divide(turned, width[:, None], out=np.zeros_like(turned), where=width[:, None] > 0)
    if np.isinf(length):
        shares = np.eye(law.mixture.classes) * law.probabilities
        sums = np.einsum("jk,njd->nkd", shares, population.means)
        mass = np.zeros(len(turned))
    else:
        shares = population.counts(length, stratified)
        spread = shares.sum(axis=1) / length  # n_k / N^2
        sums = np.einsum("njk,njd->nkd", shares, population.means)
        sums += (np.sqrt(spread) * population.noise)[:, :, None] * along[:, None, :]
        mass = np.sum(chances * (1 - chances) * spread, axis=1)
    mean = np.einsum("nk,nkd->nd", chances, sums)
    return _Context(np.sqrt(chances)[:, :, None] * (sums - mean[:, None]), mass, along)


def _draw(mixture: Mixture, weights: np.ndarray, length: int | float, points: int, seed: int) -> Population:
    check_model(mixture, weights, length)
    return draw(mixture, points, seed)


def _pairings(matrix: np.ndarray) -> np.ndarray:
    """E[g g' (x) g g'] of g ~ N(0, matrix): the three ways to pair four factors (Isserlis)."""
    d = len(matrix)
    straight, crossed = np.einsum("ab,ij->aibj", matrix, matrix), np.einsum("ai,bj->aibj", matrix, matrix)
    return (straight + crossed + np.einsum("aj,ib->aibj", matrix, matrix)).reshape(d * d, d * d)
