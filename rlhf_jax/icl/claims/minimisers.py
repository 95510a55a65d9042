"""Where training converges to, and how fast that approaches c Lambda^-1 as contexts grow.

Predicted: the solver `theory.minimiser` and the coefficients of `theory.expansion`. Measured: prompts that are drawn,
for the solver; the solver at long contexts, for the coefficients, which are derived without it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from rlhf_jax.icl.comparison import Comparison, standard_error, within, within_errors
from rlhf_jax.icl.descent import freeze, frozen_loss, newton
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.precision import in_float64
from rlhf_jax.icl.shift import shifted
from rlhf_jax.icl.tasks.mixtures import bayes_logits, draw_means, draw_statistics
from rlhf_jax.icl.theory.expansion import extrapolated, first_order, isotropic_coefficient
from rlhf_jax.icl.theory.inference import Estimated
from rlhf_jax.icl.theory.minimiser import isotropic_weight, replicates

LENGTHS = (10, 20, 40, 80, 160, 320, 640, 1280)
EXAMPLE = Mixture(3, covariance=((1.0, 0.4, 0.1), (0.4, 0.8, -0.2), (0.1, -0.2, 0.6)))
BATCH = 2**16

# Solutions of the same equations by another program, on 2^20 quasi-random points of its own: w_N at Lambda = I by d and
# N, w_N / c at d = 4 by c and N, and for `EXAMPLE` by N the distance of W* from 2 Lambda^-1 and that of N G from G1.
WEIGHTS = {
    3: dict(zip(LENGTHS, (0.9180, 1.2050, 1.4662, 1.6710, 1.8113, 1.8974, 1.9461, 1.9723), strict=True)),
    5: dict(zip(LENGTHS, (0.8999, 1.1975, 1.4698, 1.6807, 1.8212, 1.9046, 1.9506, 1.9748), strict=True)),
    10: dict(zip(LENGTHS, (0.8002, 1.1033, 1.4007, 1.6414, 1.8024, 1.8963, 1.9470, 1.9733), strict=True)),
}
SHARES = {
    2: {50: 0.773, 200: 0.925, 800: 0.980},
    3: {50: 0.683, 200: 0.884, 800: 0.966},
    5: {50: 0.545, 200: 0.802, 800: 0.937},
    10: {50: 0.362, 200: 0.639, 800: 0.858},
}
DISTANCES = {100: (0.2269, 0.395), 200: (0.1371, 0.268), 400: (0.0783, 0.165), 800: (0.0422, 0.100)}


class Curves(NamedTuple):
    """Rows, and the curves of a figure.

    Attributes:
        comparisons: the rows.
        lengths: N, [n].
        scaled: N g_N for each setting, or |N G - G1| / |G1| for a general covariance, [settings, n].
        errors: their standard errors, [settings, n].
        limits: what the curves tend to, [settings].
    """

    comparisons: list[Comparison]
    lengths: np.ndarray
    scaled: np.ndarray
    errors: np.ndarray
    limits: np.ndarray


def weights_by_length(
    mixtures: Sequence[Mixture] = (Mixture(3), Mixture(5), Mixture(10)),
    lengths: Sequence[int] = LENGTHS,
    prompts: int = 2**20,
    points: int = 2**17,
    seeds: int = 4,
    errors: float = 4.0,
) -> list[Comparison]:
    """w_N of W* = w_N Lambda^-1, from the solver and from prompts (Shen et al. 2024, arXiv 2410.11778).

    Args:
        mixtures: with covariances lambda I, any number of classes.
        lengths: N.
        prompts: drawn for each row, as sufficient statistics.
        points: of the solver, for each seed.
        seeds: of the solver.
        errors: standard errors, of prompts and solver together, that pass; 4 for 24 rows.
    """
    rows = []
    for mixture in mixtures:
        for length in lengths:
            predicted, error = isotropic_weight(mixture, length, seeds, points=points)
            measured = sampled_weight(mixture, length, predicted, prompts)
            rows.append(
                within_errors(
                    f"w_N (d={mixture.dimension}, c={mixture.classes}, N={length})",
                    predicted,
                    measured.mean,
                    math.hypot(error, measured.standard_error),
                    errors,
                )
            )
    return rows


def sampled_weight(mixture: Mixture, length: int, weight: float, prompts: int, seed: int = 0) -> Estimated:
    """The w at which the loss of W = w Lambda^-1 is least on prompts drawn, by one Newton step from a given weight."""
    batches = math.ceil(prompts / BATCH)
    keys = jax.random.split(jax.random.key(seed), batches)
    size = min(prompts, BATCH)
    sums = np.mean([_along_scale(mixture, size, float(length), weight, key) for key in keys], axis=0)
    gradient, square, curvature = sums
    error = math.sqrt((square - gradient**2) / (batches * size)) / curvature
    return Estimated(float(weight - gradient / curvature), float(error))


@in_float64
def _along_scale(
    mixture: Mixture, prompts: int, length: float, weight: float, key: Key[Array, ""]
) -> Float[Array, "3"]:
    return _scale_derivatives(mixture, prompts, jnp.asarray(length), jnp.asarray(weight), key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scale_derivatives(
    mixture: Mixture, prompts: int, length: Float[Array, ""], weight: Float[Array, ""], key: Key[Array, ""]
) -> Float[Array, "3"]:
    """Means of the derivative of the loss along w Lambda^-1, of its square, and of the second derivative."""
    law = shifted(mixture)
    task_key, context_key = jax.random.split(key)
    means = draw_means(task_key, law, prompts)
    drawn = draw_statistics(context_key, law, means, length)
    slope = jnp.einsum("bkd,de,be->bk", drawn.sums, jnp.asarray(mixture.inverse), drawn.query)
    q, p = jax.nn.softmax(weight * slope, axis=1), jax.nn.softmax(bayes_logits(law, means, drawn.query), axis=1)
    first = jnp.sum((q - p) * slope, axis=1)
    second = jnp.sum(q * slope**2, axis=1) - jnp.sum(q * slope, axis=1) ** 2
    return jnp.stack([first.mean(), jnp.mean(first**2), second.mean()])


def first_order_by_length(
    mixtures: Sequence[Mixture] = (Mixture(3), Mixture(5), Mixture(10)),
    lengths: Sequence[int] = LENGTHS,
    far: Sequence[int] = (2560, 5120, 10240),
    points: int = 2**17,
    seeds: int = 4,
    share: float = 0.01,
    stratified: bool = False,
) -> Curves:
    """N g_N = N (w_N / c - 1) approaches g1, which is derived without the solver; slowly, for |g1| is 17 or more.

    Args:
        mixtures: with covariances lambda I. For two classes g1 comes from quadrature, for more from the same points as
            the solver's.
        lengths: N of the curves.
        far: N from which g1 is extrapolated, by a polynomial in 1 / N.
        points: quasi-random draws for each seed.
        seeds: >= 2.
        share: of g1, by which the extrapolated value may differ; at least three standard errors.
        stratified: contexts hold N / c examples of each class.
    """
    rows, curves, errors, limits = [], [], [], []
    for mixture in mixtures:
        scale = mixture.matrix[0, 0] / mixture.classes
        found = [replicates(mixture, length, seeds, stratified, points)[:, 0, 0] * scale for length in (*lengths, *far)]
        scaled = np.array([*lengths, *far])[:, None] * (np.stack(found) - 1)
        reached = extrapolated(far, scaled[len(lengths) :])
        if mixture.classes == 2:
            predicted, difference = isotropic_coefficient(mixture, stratified), reached
        else:
            numbers = range(seeds)
            given = [first_order(mixture, stratified, points, number)[0, 0] for number in numbers]
            given = np.array(given) * mixture.matrix[0, 0]
            predicted, difference = float(given.mean()), reached - given  # of the same points
        error = float(standard_error(difference))
        name = f"g1{', stratified' if stratified else ''} (d={mixture.dimension}, c={mixture.classes})"
        tolerance = max(share * abs(predicted), 3 * error)
        rows.append(Comparison(name, predicted, float(reached.mean()), error, tolerance))
        curves.append(scaled[: len(lengths)].mean(axis=1))
        errors.append(standard_error(scaled[: len(lengths)], axis=1))
        limits.append(predicted)
    return Curves(rows, np.array(lengths), np.stack(curves), np.stack(errors), np.array(limits))


def general_covariance(
    mixture: Mixture = EXAMPLE,
    lengths: Sequence[int] = (100, 200, 400, 800),
    far: Sequence[int] = (2560, 5120, 10240),
    prompts: int = 2**17,
    batches: int = 8,
    points: int = 2**16,
    seeds: int = 16,
    errors: float = 4.0,
    share: float = 0.02,
) -> Curves:
    """W* of any covariance: its distance from c Lambda^-1, its eigenvectors, and G1.

    The distance is measured on prompts drawn, whose loss is minimised over all d^2 entries of W, as the projection of
    W - c Lambda^-1 on its predicted direction (a norm would grow with the noise). What is predicted to be 0 is a random
    combination of the entries of W that are off the diagonal in Lambda's eigenbasis.

    Args:
        mixture: with d > 1.
        lengths: N.
        far: N from which G1 is extrapolated.
        prompts: of each batch, as sufficient statistics.
        batches: >= 2; their spread gives standard errors.
        points: of the solver, for each seed.
        seeds: of the solver.
        errors: standard errors, of prompts and solver together, that pass.
        share: of an entry of G1, by which the extrapolated one may differ; at least three standard errors.
    """
    limit = mixture.classes * mixture.inverse
    values, vectors = mixture.eigen
    mix = np.random.default_rng(0).standard_normal(limit.shape) * (1 - np.eye(mixture.dimension))
    corrections = np.stack([first_order(mixture, points=points, seed=number) for number in range(seeds)])
    rows, curves, spreads = [], [], []
    for length in lengths:
        found = replicates(mixture, length, seeds, points=points)
        weights = found.mean(axis=0)
        way = (weights - limit) / np.linalg.norm(weights - limit)
        sampled = np.stack(
            [newton(frozen_loss, freeze(mixture, length, prompts, number), weights) for number in range(batches)]
        )
        size = np.linalg.norm(limit)
        predicted, measured = (np.sum((one - limit) * way, axis=(1, 2)) / size for one in (found, sampled))
        error = math.hypot(standard_error(predicted), standard_error(measured))
        name = f"|W* - c Lambda^-1| / |c Lambda^-1| (N={length})"
        rows.append(within_errors(name, predicted.mean(), measured.mean(), error, errors))
        across = np.sum((vectors.T @ sampled @ vectors) * mix, axis=(1, 2)) / size
        name = f"W* off the diagonal in Lambda's eigenbasis (N={length})"
        rows.append(within_errors(name, 0.0, across.mean(), float(standard_error(across)), errors))
        gaps = length * (found / mixture.classes - mixture.inverse) - corrections
        apart = np.linalg.norm(gaps, axis=(1, 2)) / np.linalg.norm(corrections.mean(axis=0))
        curves.append(apart.mean())
        spreads.append(standard_error(apart))
    found = [
        length * (replicates(mixture, length, seeds, points=points) / mixture.classes - mixture.inverse)
        for length in far
    ]
    reached = extrapolated(far, np.stack(found))
    for i, value in enumerate(values):
        predicted, measured = (
            np.einsum("i,nij,j->n", vectors[:, i], one, vectors[:, i]) for one in (corrections, reached)
        )
        error = float(standard_error(measured - predicted))  # of the same points
        tolerance = max(share * abs(predicted.mean()), 3 * error)
        name = f"G1 at the eigenvalue {value:.3f} of Lambda"
        rows.append(Comparison(name, float(predicted.mean()), float(measured.mean()), error, tolerance))
    return Curves(rows, np.array(lengths), np.array([curves]), np.array([spreads]), np.zeros(1))


def against_reference_tables(
    weights: Mapping[int, Mapping[int, float]] = WEIGHTS,
    shares: Mapping[int, Mapping[int, float]] = SHARES,
    distances: Mapping[int, tuple[float, float]] = DISTANCES,
    points: int = 2**16,
    seeds: int = 8,
) -> list[Comparison]:
    """The solver beside tables that another program computed from quasi-random points of its own (see `WEIGHTS`).

    Tolerances are 0.001 for w_N, 0.003 for w_N / c, and for the correlated covariance 2 % of the distance of W* from
    2 Lambda^-1 and 0.01 of |N G - G1| / |G1|; the last is a mean over sets of points of which each gives N G and G1.

    Args:
        weights: w_N by d and N: two classes, Lambda = I.
        shares: w_N / c by c and N: d = 4, Lambda = I.
        distances: for `EXAMPLE` by N, |W* - 2 Lambda^-1| / |2 Lambda^-1| and |N G - G1| / |G1|.
        points: of the solver, for each seed, where there are more than two classes; else four times as many.
        seeds: >= 2; their spread gives the standard errors.
    """
    rows = []
    for d, row in weights.items():
        for length, value in row.items():
            found, error = isotropic_weight(Mixture(d), length, seeds, points=4 * points)
            rows.append(Comparison(f"w_N of the table (d={d}, N={length})", value, found, error, 0.001))
    for c, row in shares.items():
        for length, value in row.items():
            found, error = isotropic_weight(Mixture(4, c), length, seeds, points=points if c > 2 else 4 * points)
            name = f"w_N / c of the table (d=4, c={c}, N={length})"
            rows.append(Comparison(name, value, found / c, error / c, 0.003))
    if not distances:
        return rows
    inverse = EXAMPLE.inverse
    corrections = np.stack([first_order(EXAMPLE, points=4 * points, seed=number) for number in range(seeds)])
    size = np.linalg.norm(corrections.mean(axis=0))
    for length, (distance, left) in distances.items():
        found = replicates(EXAMPLE, length, seeds, points=4 * points) / 2 - inverse
        mean = found.mean(axis=0)
        way = mean / np.linalg.norm(mean)
        along = np.sum(found * way, axis=(1, 2)) / np.linalg.norm(inverse)  # its mean is the norm of the mean
        name = f"|W* - 2 Lambda^-1| / |2 Lambda^-1| of the table (N={length})"
        rows.append(within(name, distance, along.mean(), 0.02, float(standard_error(along))))
        apart = np.linalg.norm(length * found - corrections, axis=(1, 2)) / size
        name = f"|N G - G1| / |G1| of the table (N={length})"
        rows.append(Comparison(name, left, float(apart.mean()), float(standard_error(apart)), 0.01))
    return rows
