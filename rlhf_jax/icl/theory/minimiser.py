"""Where training of the reduced model converges to: the matrix W* that minimises the cross-entropy on contexts of N.

In whitened eigen-coordinates, nu_k = R' Lambda^-1/2 mu_k and y = R' Lambda^-1/2 x with Lambda = R diag(lambda) R', the
law of a prompt does not change when any coordinate changes its sign. The loss is strictly convex, so its only minimiser
is unchanged too, and that leaves a diagonal:

    W* = R diag(w_i / lambda_i) R',      z_k = S_k' W x = (n_k / N) sum_i w_i nu_ki y_i + (sqrt(n_k) / N) s(w) e_k,
    s(w)^2 = sum_i w_i^2 y_i^2,          e_k ~ N(0, 1).

So d numbers are to be found (equal eigenvalues share one; Lambda = lambda I leaves one), and the noise of the context
enters through one number a class. Their loss is averaged over quasi-random points and minimised by Newton's method.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp, softmax

from rlhf_jax.icl.checks import at_least, power_of_two
from rlhf_jax.icl.comparison import standard_error
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.theory.population import draw, mirrored

POINTS = 2**16


class Coordinates(NamedTuple):
    """Draws in whitened eigen-coordinates, those of equal eigenvalues added up into g groups, with their contexts.

    Attributes:
        signal: alpha_kg = sum of nu_ki y_i over the i of group g, [n, c, g]; its sum over g is Bayes' logit a_k.
        squares: sum of y_i^2 over the i of group g, [n, g]; its sum over g is x' Lambda^-1 x.
        posterior: softmax(a), [n, c].
        contexts: n_k / N and sqrt(n_k) / N e_k, each [n, c], of one context and of its mirror image.
        groups: group of each coordinate, int [d]; eigenvalues ascend.
    """

    signal: np.ndarray
    squares: np.ndarray
    posterior: np.ndarray
    contexts: list[tuple[np.ndarray, np.ndarray]]
    groups: np.ndarray


def draw_coordinates(mixture: Mixture, length: int, stratified: bool, points: int, seed: int) -> Coordinates:
    """Draws for any number of classes and any Lambda, from the points of `population.draw`."""
    population = draw(mixture, points, seed)
    values, vectors = mixture.eigen
    groups = np.concatenate([[0], np.cumsum(np.diff(values) > 1e-9 * values[-1])])
    members = np.eye(groups[-1] + 1)[groups]
    turn = vectors / np.sqrt(values)
    query = population.query @ turn
    signal = ((population.means @ turn) * query[:, None]) @ members
    contexts = []
    for one in (population, mirrored(population)):
        share = one.counts(length, stratified).sum(axis=1)
        contexts.append((share, np.sqrt(share / length) * one.noise))
    return Coordinates(signal, query**2 @ members, softmax(population.logits, axis=1), contexts, groups)


def draw_invariants(mixture: Mixture, length: int, stratified: bool, points: int, seed: int) -> Coordinates:
    """Draws for two classes, Lambda = lambda I and d >= 2: seven numbers instead of 3 d + 4, so that fewer points do.

    Rotations leave the law alone, so that only lengths and angles matter. With r = |nu_0| and s the cosine of the
    angle between the means, their half-difference u / 2 and their middle m are orthogonal, |u|^2 = 2 r^2 (1 - s) and
    |m|^2 = r^2 (1 + s) / 2. The query is m + u / 2 + noise (the other class is its mirror image), and

        z_1 - z_0 = w (a / 2 + b m'y + |y| e / sqrt(N)),      a = u'y,  b = (n_1 - n_0) / N,  e ~ N(0, 1).
    """
    from scipy import stats

    length, points = at_least("context length", length, 1), power_of_two("number of points", points)
    d = mixture.dimension
    sobol = stats.qmc.Sobol(7, scramble=True, rng=np.random.default_rng(seed))
    uniform = np.clip(sobol.random_base2(points.bit_length() - 1), 1e-15, 1 - 1e-15)
    radius2 = mixture.prior_scale**2 / mixture.matrix[0, 0] * stats.chi2.ppf(uniform[:, 0], d)
    cosine = 2 * stats.beta.ppf(uniform[:, 1], (d - 1) / 2, (d - 1) / 2) - 1
    gap, middle = np.sqrt(2 * radius2 * (1 - cosine)), np.sqrt(radius2 * (1 + cosine) / 2)
    across, along, context = stats.norm.ppf(uniform[:, [2, 3, 4]]).T
    across, along = gap / 2 + across, middle + along
    squares = across**2 + along**2
    if d > 2:
        squares = squares + stats.chi2.ppf(uniform[:, 5], d - 2)
    a, centre = gap * across, middle * along
    signal = np.stack([centre - a / 2, centre + a / 2], axis=1)
    contexts = []
    below = stats.binom.cdf(np.arange(length), length, 0.5)
    for sign, level in ((1, uniform[:, 6]), (-1, 1 - uniform[:, 6])):
        share = np.full(points, 0.5) if stratified else np.searchsorted(below, level) / length
        # Only the difference of the two noises matters, and it has the variance 1 / N whatever the counts are.
        noise = np.stack([np.zeros(points), sign * context / np.sqrt(length)], axis=1)
        contexts.append((np.stack([1 - share, share], axis=1), noise))
    posterior = softmax(signal, axis=1)
    return Coordinates(signal[:, :, None], squares[:, None], posterior, contexts, np.zeros(d, int))


def matrix(mixture: Mixture, diagonal: np.ndarray) -> np.ndarray:
    """R diag(w_i / lambda_i) R', the matrix [d, d] of a diagonal w [d] in whitened eigen-coordinates."""
    values, vectors = mixture.eigen
    return (vectors * (diagonal / values)) @ vectors.T


def minimiser(
    mixture: Mixture, length: int, stratified: bool = False, points: int = POINTS, seed: int = 0
) -> np.ndarray:
    """W*, the global minimiser of the loss on contexts of N examples (Shen et al. 2024, arXiv 2410.11778).

    They show W* = c (Lambda^-1 + G) with G = O(1 / N); here W* itself is computed, for any N, to the accuracy of the
    points (`replicates` estimates it): by default 2^16 of them, whose W* differ from set to set by 1e-4 to 1e-3 of its
    size for two classes and Lambda = lambda I, else by 1e-3 to 5e-3.

    Args:
        mixture: the family of tasks.
        length: examples in a context, N >= 1.
        stratified: contexts hold N / c examples of each class instead of a random number.
        points: quasi-random draws, a power of two; each is used twice, with noise of either sign.
        seed: of the draws.

    Returns:
        W*, float64 [d, d], symmetric.

    Raises:
        ValueError: a length below 1, or a number of points that is no power of two.

    Example:
        >>> weights = minimiser(Mixture(3), length=20, points=2**12)
        >>> bool(np.abs(weights - 1.205 * np.eye(3)).max() < 0.01)
        True
    """
    few = mixture.isotropic and mixture.classes == 2 and mixture.dimension > 1
    given = (draw_invariants if few else draw_coordinates)(mixture, length, stratified, points, seed)
    return matrix(mixture, newton(given, length)[given.groups])


def replicates(
    mixture: Mixture, length: int, seeds: int, stratified: bool = False, points: int = POINTS, seed: int = 0
) -> np.ndarray:
    """W* from independent sets of points, [seeds, d, d]: their mean is the better estimate, their spread its error.

    Raises:
        ValueError: as `minimiser`, or fewer than two seeds.
    """
    seeds = at_least("number of seeds", seeds, 2)
    return np.stack([minimiser(mixture, length, stratified, points, seed + i) for i in range(seeds)])


def isotropic_weight(
    mixture: Mixture,
    length: int,
    seeds: int = 4,
    stratified: bool = False,
    points: int = POINTS,
    seed: int = 0,
) -> tuple[float, float]:
    """The number w_N of W* = w_N Lambda^-1 where Lambda is a multiple of the identity, and its standard error.

    Args:
        mixture: the family of tasks.
        length: N >= 1.
        seeds: independent sets of points, >= 2.
        stratified: see `minimiser`.
        points: of each set.
        seed: the first seed.

    Raises:
        ValueError: Lambda is no multiple of the identity, or as `replicates`.
    """
    if not mixture.isotropic:
        raise ValueError("the covariance is no multiple of the identity, so W* is not one number: call `minimiser`.")
    scale = mixture.matrix[0, 0]
    found = scale * replicates(mixture, length, seeds, stratified, points, seed)[:, 0, 0]
    return float(found.mean()), float(standard_error(found))


def newton(given: Coordinates, length: int) -> np.ndarray:
    """The w [g] at the minimum of the average loss over the draws.

    Raises:
        ValueError: a hundred steps do not reach it.
    """
    count, c = given.posterior.shape
    # Far above the minimum (a large c or prior scale, a small N) the loss is nearly linear, and a full step overshoots.
    weights = np.full(given.squares.shape[1], c / (1 + 10 * c / length))
    if count > 2**12:  # a few of the points lead near it
        weights = newton(_first(given, count // 16), length)
    value, gradient, hessian = derivatives(weights, given)
    for _ in range(100):
        curvatures, directions = np.linalg.eigh(hessian)
        step = -(directions / np.abs(curvatures)) @ (directions.T @ gradient)
        decrease = -float(gradient @ step)
        if decrease < 1e-14:  # the step is below 1e-7 / sqrt(curvature), and its error like its square
            return weights + step
        size = 1.0
        while True:
            there = derivatives(weights + size * step, given)
            if there[0] <= value - 1e-4 * size * decrease + 1e-15:
                break
            size /= 2
        weights = weights + size * step
        value, gradient, hessian = there
    raise ValueError(
        f"no minimiser was found at a context length of {length}: use more points or a smaller prior scale."
    )


def derivatives(weights: np.ndarray, given: Coordinates) -> tuple[float, np.ndarray, np.ndarray]:
    """Value, gradient [g] and Hessian [g, g] of the average loss over the draws at w [g]."""
    width = np.sqrt(given.squares @ weights**2)
    slope = given.squares * weights / width[:, None]  # ds / dw_g
    along = given.signal @ weights
    value, gradient, hessian = 0.0, np.zeros(len(weights)), np.zeros((len(weights),) * 2)
    for share, noise in given.contexts:
        z = share * along + noise * width[:, None]
        normaliser = logsumexp(z, axis=1)
        probability = np.exp(z - normaliser[:, None])
        error = probability - given.posterior
        change = share[:, :, None] * given.signal + noise[:, :, None] * slope[:, None, :]  # dz_k / dw_g
        value += np.mean(normaliser - np.sum(given.posterior * z, axis=1))
        gradient += np.einsum("nk,nkg->g", error, change) / len(z)
        weighted = probability[:, :, None] * change
        mean = weighted.sum(axis=1)
        bend = np.sum(error * noise, axis=1) / width  # times d2s / dw_g dw_h times s
        hessian += np.tensordot(weighted, change, axes=((0, 1), (0, 1))) / len(z) - mean.T @ mean / len(z)
        hessian += np.diag(bend @ given.squares) / len(z) - (slope * bend[:, None]).T @ slope / len(z)
    count = len(given.contexts)
    return value / count, gradient / count, hessian / count


def _first(given: Coordinates, count: int) -> Coordinates:
    """The first draws alone."""
    contexts = [(share[:count], noise[:count]) for share, noise in given.contexts]
    return Coordinates(given.signal[:count], given.squares[:count], given.posterior[:count], contexts, given.groups)
