"""How far the trained model stays from Bayes on a test prompt of M examples: bounds, constants, laws, plateaus.

The distance is the total variation between the two predictions for a query, averaged over tasks, contexts and queries:

    TV = 1/2 sum_k |softmax(z)_k - softmax(a)_k|,   for two classes |sigmoid(z_1 - z_0) - sigmoid(a_1 - a_0)|.

With J = diag(q) - q q', q = softmax(a), Q_0 = x' Lambda^-1 x, the covariance of the logits of W = c Lambda^-1 is C / M,

    C(x) = c diag(Q_0 + a_k^2) - a a',   for stratified contexts c Q_0 I,

from which the constants below follow by a linearisation of the softmax around a (derived here). Shen, Zhou, Yang, Shen
2024 (arXiv 2410.11778) prove the orders, 1 / N + 1 / sqrt(M).
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, softmax

from rlhf_jax.icl.comparison import standard_error
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.shift import NO_SHIFT, Shift
from rlhf_jax.icl.theory.population import Population, check_model, draw

POINTS = 2**16
SEEDS = tuple(range(4))


class Estimated(NamedTuple):
    """An expectation, and its standard error over independent sets of quasi-random points.

    Attributes:
        mean: the estimate.
        standard_error: of it.
    """

    mean: float
    standard_error: float


class Constants(NamedTuple):
    """What remains of the inference error in the limits of long contexts.

    Attributes:
        total_variation: C_TV; sqrt(M) TV -> C_TV at W = c Lambda^-1, as M -> inf.
        cross_entropy: C_CE; M (cross-entropy - that of Bayes) -> C_CE at W = c Lambda^-1, as M -> inf.
        floor: C_N; N TV -> C_N at W = W*_N and M = inf, as N -> inf; None where no correction G1 was given.
    """

    total_variation: Estimated
    cross_entropy: Estimated
    floor: Estimated | None


def distances(logits: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Total variation between two predictions, [n], from their logits [n, c].

    Example:
        >>> distances(np.array([[0.0, 0.0]]), np.array([[0.0, np.log(3.0)]])).round(3).tolist()
        [0.25]
    """
    return np.abs(softmax(logits, axis=1) - softmax(others, axis=1)).sum(axis=1) / 2


def estimated(values: Iterable[float]) -> Estimated:
    """The mean over independent sets of points, and its standard error.

    Raises:
        ValueError: there is one set alone.

    Example:
        >>> estimated([1.0, 2.0, 3.0]).mean
        2.0
    """
    numbers = np.array(list(values))
    if len(numbers) < 2:
        raise ValueError("there is one set of points: give at least two seeds, for a standard error.")
    return Estimated(float(numbers.mean()), float(standard_error(numbers)))


def moments(
    population: Population, weights: np.ndarray, length: int | float, stratified: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Exact mean [n, c] and covariance [n, c, c] of the logits z given task and query, over contexts of M examples.

    With g = W x, and P_jk the probability that an example is of class j and shown as k,

        E z_k = sum_j P_jk mu_j'g,   M Cov(z_k, z_l) = 1{k = l} sum_j P_jk ((mu_j'g)^2 + g' Lambda g) - E z_k E z_l,

    where for stratified contexts (mu_j'g)^2 and E z_k E z_l are absent. For two classes and z = z_1 - z_0 this is
    E z = (mu_1 - mu_0)'g / 2 and M Var z = g'(Lambda + m m')g, m = (mu_0 + mu_1) / 2. Derived here.

    Args:
        population: draws, with or without a shift.
        weights: W, [d, d].
        length: M >= 1, or `numpy.inf`.
        stratified: contexts hold as many examples of each class as its probability says.

    Raises:
        ValueError: stratified contexts with noise in their labels, which are not treated; or as
            `population.check_model`.
    """
    law = population.law
    weights, length = check_model(law.mixture, weights, length)
    if stratified and law.label_noise > 0:
        raise ValueError("the moments of stratified contexts with label noise are not known here: leave one out.")
    chances = law.probabilities[:, None] * law.confusion
    turned = population.query @ weights.T
    along = np.einsum("ncd,nd->nc", population.means, turned)
    mean = along @ chances
    width = np.einsum("nd,de,ne->n", turned, law.covariance, turned)
    variance = chances.sum(axis=0) * width[:, None]
    covariance = np.zeros((*mean.shape, mean.shape[1]))
    if not stratified:
        variance = variance + along**2 @ chances
        covariance -= mean[:, :, None] * mean[:, None, :]
    covariance += variance[:, :, None] * np.eye(mean.shape[1])
    return mean, covariance / length


def bound(population: Population, weights: np.ndarray, length: int | float, stratified: bool = False) -> np.ndarray:
    """An upper bound on the total variation at each task and query, in the mean over contexts, for every M, [n].

    The total variation is at most a quarter of the range of z - a (for a path from a to z its derivative is
    1/2 sum_k q_k |v_k - v|, v = sum_k q_k v_k, a mean deviation, which is at most a quarter of the range of v). By
    Jensen's inequality, with S the centred covariance of z,

        E TV <= 1/4 { range(E z - a) + sqrt(2 tr S) },

    for two classes 1/4 {|u'(W / 2 - Lambda^-1)x| + sqrt(x'W'(Lambda + m m')W x / M)}, u = mu_1 - mu_0. Derived here.

    Args:
        population: draws, with or without a shift.
        weights: W, [d, d].
        length: M >= 1, or `numpy.inf`.
        stratified: see `moments`.
    """
    mean, covariance = moments(population, weights, length, stratified)
    centred = np.trace(covariance, axis1=1, axis2=2) - covariance.sum(axis=(1, 2)) / mean.shape[1]
    return (np.ptp(mean - population.logits, axis=1) + np.sqrt(2 * centred)) / 4


def total_variation(
    mixture: Mixture,
    weights: np.ndarray,
    length: int | float,
    points: int = POINTS,
    seeds: Sequence[int] = SEEDS,
    shift: Shift = NO_SHIFT,
    stratified: bool = False,
) -> Estimated:
    """Mean total variation between the model with W on contexts of M examples and Bayes, under any shift.

    With `length=numpy.inf` it is the plateau at which longer contexts no longer help. Where W = c Lambda^-1 it is 0
    without a shift. Under one the limit of the logits is c sum_j P_jk mu_j' Lambda^-1 x (`moments`), for two classes
    z = 2 (pi mu_1 - (1 - pi) mu_0)' Lambda^-1 x, while those of Bayes are, with the test's covariance L,
    (mu_1 - mu_0)' L^-1 x + log(pi / (1 - pi)) - (mu_1' L^-1 mu_1 - mu_0' L^-1 mu_0) / 2.

    Args:
        mixture: the family of tasks.
        weights: W, [d, d].
        length: M >= 1, or `numpy.inf`.
        points: quasi-random draws of each set, a power of two.
        seeds: one a set, at least two.
        shift: of the test.
        stratified: contexts hold as many examples of each class as its probability says.

    Returns:
        The mean over all sets, and its standard error.

    Example:
        >>> found = total_variation(Mixture(3), 2 * np.eye(3), length=64, points=2**14)
        >>> round(found.mean, 3)
        0.058
    """
    weights, length = check_model(mixture, weights, length)

    def one(population: Population) -> float:
        return distances(population.model_logits(weights, length, stratified), population.logits).mean()

    return estimated([one(draw(mixture, points, seed, shift)) for seed in seeds])


def constants(
    mixture: Mixture,
    correction: np.ndarray | None = None,
    stratified: bool = False,
    points: int = POINTS,
    seeds: Sequence[int] = SEEDS,
) -> Constants:
    """The constants of the limits of long contexts, for any covariance and number of classes.

        C_TV = 1/2 sqrt(2 / pi) E sum_k sqrt((J C J)_kk),   C_CE = 1/2 E tr(J C),   C_N = 1/2 E sum_k |(J b)_k|,

    with b_k = mu_k' G1 x. For two classes C_TV = 2 sqrt(2 / pi) E[s'(a) sqrt(Q)], C_CE = 2 E[s'(a) Q],
    C_N = E|s'(a) u' G1 x|, with Q = Q_0 + (m' Lambda^-1 x)^2 and s the sigmoid; for Lambda = I, C_N is
    |g1| E[s'(a) |a|]. Derived here.

    Args:
        mixture: the family of tasks.
        correction: G1, the limit of N (W*_N / c - Lambda^-1), [d, d] (`expansion.first_order`); None: no C_N.
        stratified: contexts hold as many examples of each class as its probability says.
        points: quasi-random draws of each set, a power of two.
        seeds: one a set, at least two.
    """
    found = []
    weights = mixture.classes * mixture.inverse
    for seed in seeds:
        population = draw(mixture, points, seed)
        _, covariance = moments(population, weights, 1, stratified)
        _, deviations = _linearised(population, np.zeros_like(population.logits), covariance)
        jacobian = _jacobian(population.logits)
        row = [math.sqrt(2 / math.pi) * deviations.sum(axis=1).mean() / 2]
        row.append(np.einsum("nkl,nlk->n", jacobian, covariance).mean() / 2)
        if correction is not None:
            error = np.einsum("nkd,de,ne->nk", population.means, correction, population.query)
            row.append(np.abs(np.einsum("nkl,nl->nk", jacobian, error)).sum(axis=1).mean() / 2)
        found.append(row)
    estimates = [estimated(list(column)) for column in np.array(found).T]
    return Constants(estimates[0], estimates[1], None if correction is None else estimates[2])


def folded_normal_mean(mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """E|X| of X ~ N(mean, deviation^2): s sqrt(2/pi) exp(-m^2 / 2 s^2) + |m| (1 - 2 Phi(-|m| / s)); |m| for s = 0.

    Example:
        >>> folded_normal_mean(np.array([0.0, -3.0]), np.array([1.0, 0.0])).round(4).tolist()
        [0.7979, 3.0]
    """
    size = np.abs(mean)
    ratio = np.divide(size, deviation, out=np.full(np.shape(size + deviation), np.inf), where=deviation > 0)
    return deviation * math.sqrt(2 / math.pi) * np.exp(-(ratio**2) / 2) + size * (1 - 2 * ndtr(-ratio))


def joint_total_variation(
    mixture: Mixture,
    weights: np.ndarray,
    length: int | float,
    points: int = POINTS,
    seeds: Sequence[int] = SEEDS,
    stratified: bool = False,
) -> Estimated:
    """The joint law of both errors, training on N and testing on M examples, by folded normals.

    The softmax is linearised around Bayes' logits, and the noise of the context taken as Gaussian:

        TV = 1/2 sum_k E|X_k|,   X ~ N(J (E z - a), J Cov(z) J)      with the moments of z at W and M (`moments`).

    With W = c (Lambda^-1 + G1 / N) and Cov(z) at c Lambda^-1 it is TV = s'(a) |N(u'G1 x / N, 4 Q / M)| for two classes.
    Errors are of second order in 1 / N and 1 / M, relative to the first. Derived here.

    Args:
        mixture: the family of tasks.
        weights: W, [d, d], such as W*_N, or c (Lambda^-1 + G1 / N).
        length: M >= 1, or `numpy.inf`.
        points: quasi-random draws of each set, a power of two.
        seeds: one a set, at least two.
        stratified: contexts hold as many examples of each class as its probability says.
    """
    weights, length = check_model(mixture, weights, length)

    def one(population: Population) -> float:
        mean, covariance = moments(population, weights, length, stratified)
        centres, deviations = _linearised(population, mean - population.logits, covariance)
        return folded_normal_mean(centres, deviations).sum(axis=1).mean() / 2

    return estimated([one(draw(mixture, points, seed)) for seed in seeds])


def crossover(limits: Constants, length: int) -> float:
    """The test length (C_TV N / C_N)^2 at which the error of training on N examples equals the noise of the test's.

    A slope of -1/2 of log TV against log M is seen only far below it; above it TV bends into its floor C_N / N.
    """
    if limits.floor is None:
        raise ValueError("the constants hold no floor C_N: give `constants` the correction G1.")
    return (limits.total_variation.mean * length / limits.floor.mean) ** 2


def slope(lengths: np.ndarray, values: np.ndarray) -> float:
    """Least-squares slope of log values against log lengths, -1/2 for TV at W = c Lambda^-1 (else see `crossover`).

    Example:
        >>> round(slope(np.array([4.0, 16.0]), np.array([0.5, 0.25])), 6)
        -0.5
    """
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def _jacobian(logits: np.ndarray) -> np.ndarray:
    """J = diag(q) - q q' of the softmax, [n, c, c]."""
    chances = softmax(logits, axis=1)
    return chances[:, :, None] * (np.eye(logits.shape[1]) - chances[:, None, :])


def _linearised(population: Population, shift: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means J shift and standard deviations sqrt((J C J)_kk) of the predictions, each [n, c]."""
    jacobian = _jacobian(population.logits)
    variance = np.einsum("nkl,nlm,nmk->nk", jacobian, covariance, jacobian, optimize=True)
    return np.einsum("nkl,nl->nk", jacobian, shift), np.sqrt(np.maximum(variance, 0))
