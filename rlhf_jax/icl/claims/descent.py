"""Claims on gradient descent: its linear rate, the spectrum of the Hessian at W*, and the smoothness of the loss."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.claims.minimisers import EXAMPLE
from rlhf_jax.icl.comparison import Comparison, standard_error, within
from rlhf_jax.icl.descent import (
    Contexts,
    Frozen,
    Path,
    check_learning_rate,
    freeze,
    freeze_contexts,
    frozen_loss,
    gradient_descent,
    hessian,
    integrated_loss,
    newton,
    smoothness,
)
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.theory import curvature
from rlhf_jax.icl.theory.minimiser import isotropic_weight, minimiser


class Rates(NamedTuple):
    """Rows, and the curves of log-gap against step.

    Attributes:
        comparisons: the rows.
        steps: 0 .. steps, [steps + 1].
        squared_distance: |W_t - W*|^2 from each start, [starts, steps + 1].
        loss_gap: L(W_t) - L(W*) from each start, [starts, steps + 1].
        starts: names of the starts.
        slope: predicted slope of the logarithm of either, a step.
    """

    comparisons: list[Comparison]
    steps: np.ndarray
    squared_distance: np.ndarray
    loss_gap: np.ndarray
    starts: tuple[str, ...]
    slope: float


def rates(
    dimension: int = 4,
    length: int = 50,
    prompts: int = 200_000,
    steps: int = 400,
    integrated: bool = False,
    blocks: int = 10,
    seed: int = 0,
    learning_rate: float | None = None,
) -> Rates:
    """Gradient descent on a frozen population has the slope 2 log(1 - eta lambda_min), whatever its start.

    The slope is predicted twice: by the Hessian of this population (within 0.5 %: only the tail of faster modes is
    left), and with no data at all, by the l and the lambda_min of theory (2 %: lambda_min of drawn prompts differs, and
    this row has a standard error, from the minimisers of blocks of prompts). Given the prompts nothing else is random.

    Args:
        dimension: d; Lambda = I, two classes.
        length: N.
        prompts: of the frozen population.
        steps: the slope is read off the last quarter of them, straightness from the second quarter.
        integrated: with query and label integrated out, in place of drawn queries with Bayes' posterior.
        blocks: of prompts, >= 2.
        seed: of the population, and of the random start.
        learning_rate: eta; None: 1 / l.

    Raises:
        ValueError: a learning rate above 2 / l (see `descent.check_learning_rate`), before anything is drawn.
    """
    mixture = Mixture(dimension)
    ceiling = curvature.smoothness(mixture, length)
    learning_rate = 1 / ceiling if learning_rate is None else learning_rate
    check_learning_rate(learning_rate, ceiling)
    loss, data = frozen_loss, freeze(mixture, length, prompts, seed)
    if integrated:
        loss, data = integrated_loss, freeze_contexts(mixture, length, prompts, seed)
    bound, shape = smoothness(data), (dimension, dimension)
    weight, _ = isotropic_weight(mixture, length, seeds=2)
    least = newton(loss, data, weight * np.eye(dimension))
    exact = curvature.rate(learning_rate, hessian(loss, least, data))
    ideal = curvature.rate(learning_rate, np.array(curvature.isotropic_spectrum(mixture, weight, length)))
    begin = {"W0 = 0": np.zeros(shape), "random W0": np.random.default_rng(seed).normal(size=shape)}
    paths = {
        name: gradient_descent(loss, data, start, least, learning_rate, steps, bound) for name, start in begin.items()
    }
    parts = _blocks(data, blocks)
    slopes = [curvature.rate(learning_rate, hessian(loss, newton(loss, part, least), part)) for part in parts]
    error = float(standard_error(np.array(slopes)))
    comparisons = []
    for name, path in paths.items():
        comparisons += _rows(path, f"d={dimension}, N={length}, {name}", exact, ideal, error)
    return Rates(
        comparisons=comparisons,
        steps=np.arange(steps + 1),
        squared_distance=np.stack([path.squared_distance for path in paths.values()]),
        loss_gap=np.stack([path.loss_gap for path in paths.values()]),
        starts=tuple(paths),
        slope=exact,
    )


def spectrum(
    dimension: int = 4, length: int = 50, prompts: int = 200_000, blocks: int = 10, points: int = 2**18, seed: int = 0
) -> list[Comparison]:
    """The Hessian at W* has three eigenvalues, once, d(d+1)/2 - 1 times and d(d-1)/2 times.

    Predicted by `curvature.isotropic_spectrum` at w_N I; measured on drawn prompts, once at the same matrix as means
    over the three spaces of directions (with standard errors over blocks), once at the minimiser of all prompts
    together, as the number of eigenvalues that are closest to each prediction.

    Args:
        dimension: d; Lambda = I, two classes.
        length: N.
        prompts: drawn.
        blocks: that they are divided into, for standard errors.
        points: quasi-random draws of the prediction.
        seed: of the draws.
    """
    mixture, d = Mixture(dimension), dimension
    weight, _ = isotropic_weight(mixture, length)
    predicted = np.array(curvature.isotropic_spectrum(mixture, weight, length, points=points))
    data = freeze(mixture, length, prompts, seed)
    parts = _blocks(data, blocks)
    found = np.array([_modes(hessian(frozen_loss, weight * np.eye(d), part)) for part in parts])
    errors = standard_error(found)
    own = hessian(frozen_loss, newton(frozen_loss, data, weight * np.eye(d)), data)
    nearest = np.abs(np.log(np.linalg.eigvalsh(own))[:, None] - np.log(predicted)).argmin(axis=1)
    rows = []
    for i, (name, times) in enumerate(
        (("trace", 1.0), ("symmetric", d * (d + 1) / 2 - 1), ("antisymmetric", d * (d - 1) / 2))
    ):
        label = f"{name} eigenvalue (d={d}, N={length})"
        rows.append(within(label, predicted[i], found[:, i].mean(), share=0.02, standard_error=errors[i]))
        rows.append(Comparison(f"eigenvalues nearest to the {label}", times, float(np.sum(nearest == i))))
    return rows


def smoothness_at_zero(
    settings: Sequence[tuple[Mixture, int]] = (
        (Mixture(4), 50),
        (Mixture(3, covariance=EXAMPLE.covariance, prior_scale=0.7), 20),
        (Mixture(3, classes=3, covariance=EXAMPLE.covariance), 100),
    ),
    prompts: int = 4_000_000,
    block: int = 200_000,
    seed: int = 0,
) -> list[Comparison]:
    """The largest eigenvalue of the Hessian at 0 in closed form, against drawn prompts: within 0.5 %.

    Measured is the mean curvature along the predicted eigenvector, var_k(S_k' V x) a prompt, which unlike the largest
    eigenvalue of a sample has no upward bias.

    Args:
        settings: mixtures with context lengths.
        prompts: drawn in each setting; at 4 million the standard error is about 0.12 %.
        block: drawn at a time.
        seed: of the draws.
    """
    rows = []
    for mixture, length in settings:
        values, vectors = np.linalg.eigh(curvature.hessian_at_zero(mixture, length))
        direction = vectors[:, -1].reshape(mixture.dimension, mixture.dimension)
        curvatures = []
        for number in range(max(1, prompts // block)):
            data = freeze(mixture, length, min(block, prompts), seed + number)
            z = np.einsum("nkd,nd->nk", data.differences, data.query @ direction.T)
            curvatures.append(np.pad(z, ((0, 0), (1, 0))).var(axis=1))
        drawn = np.concatenate(curvatures)
        name = (
            f"lambda_max at W=0 (d={mixture.dimension}, c={mixture.classes}, N={length}, scale {mixture.prior_scale:g})"
        )
        error = float(standard_error(drawn))
        rows.append(within(name, values[-1], drawn.mean(), share=0.005, standard_error=error))
    return rows


def anisotropic_rate(length: int = 100, prompts: int = 50_000, steps: int = 2000, seed: int = 0) -> list[Comparison]:
    """The rate for a correlated covariance, where the condition number is larger: slope within 0.5 %.

    Both slopes are of the same prompts, given which nothing is random: there is no standard error.

    Args:
        length: N.
        prompts: of the frozen population.
        steps: the slope is read off the last quarter.
        seed: of the draws.
    """
    mixture = EXAMPLE
    data = freeze(mixture, length, prompts, seed)
    bound = smoothness(data)
    least = newton(frozen_loss, data, minimiser(mixture, length))
    path = gradient_descent(frozen_loss, data, np.zeros((3, 3)), least, 1 / bound, steps, bound)
    predicted = curvature.rate(1 / bound, hessian(frozen_loss, least, data))
    measured, _ = _line(np.log(path.squared_distance[3 * steps // 4 :]))
    return [within(f"slope of log |W - W*|^2 (correlated Lambda, N={length})", predicted, measured, share=0.005)]


def _blocks(data: Frozen | Contexts, count: int) -> list[Frozen | Contexts]:
    """The prompts in blocks of one size; a remainder is left out."""
    size = len(data[0]) // at_least("number of blocks", count, 2)
    slices = [slice(number * size, (number + 1) * size) for number in range(count)]
    names = [name for name in data._fields if name != "covariance"]  # which all prompts share
    return [data._replace(**{name: getattr(data, name)[rows] for name in names}) for rows in slices]


def _rows(path: Path, name: str, exact: float, ideal: float, error: float) -> list[Comparison]:
    steps = len(path.loss_gap) - 1
    last, second = slice(3 * steps // 4, steps + 1), slice(steps // 4, steps // 2 + 1)
    distance, _ = _line(np.log(path.squared_distance[last]))
    gap, _ = _line(np.log(path.loss_gap[last]))
    _, straight = _line(np.log(path.squared_distance[second]))
    return [
        within(f"slope of log |W - W*|^2 ({name})", exact, distance, share=0.005),
        within(f"slope of log loss gap ({name})", exact, gap, share=0.005),
        within(f"slope without data ({name})", ideal, distance, share=0.02, standard_error=error),
        Comparison(f"R^2 of the line, second quarter ({name})", 1.0, straight, tolerance=1e-4),
        Comparison(f"steps that raise the loss ({name})", 0.0, float(np.sum(np.diff(path.loss_gap) >= 0))),
    ]


def _line(values: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line through equally spaced values, and R^2."""
    steps = np.arange(len(values))
    slope, intercept = np.polyfit(steps, values, 1)
    return float(slope), float(1 - np.var(values - slope * steps - intercept) / np.var(values))


def _modes(curvature_matrix: np.ndarray) -> np.ndarray:
    """Mean curvature along I, along symmetric matrices without a trace, and along antisymmetric ones, [3]."""
    d = math.isqrt(len(curvature_matrix))
    total = np.trace(curvature_matrix)
    trace = np.eye(d).reshape(-1) @ curvature_matrix @ np.eye(d).reshape(-1) / d
    crossed = np.einsum("aiia->", curvature_matrix.reshape((d,) * 4))  # sum over entries of W with those of W'
    both, against = (total + crossed) / 2, (total - crossed) / 2
    return np.array([trace, (both - trace) / (d * (d + 1) / 2 - 1), against / (d * (d - 1) / 2)])
