"""In-context regression with one layer of linear attention: risks, shifts and pools of tasks, in theory and drawn.

The measured side draws prompts: nothing is trained but by least squares. `regression_dynamics.py` integrates gradient
flow, `regression_layers.py` trains layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.comparison import Comparison, within_errors
from rlhf_jax.icl.theory import gradient_flow, pool
from rlhf_jax.icl.theory.gradient_flow import Length


class RiskCurve(NamedTuple):
    """Test risk along one axis of a test.

    Attributes:
        comparisons: one row a point.
        axis: the points, [points].
        predicted: [points].
        measured: [points].
        errors: standard errors of `measured`, [points].
    """

    comparisons: list[Comparison]
    axis: np.ndarray
    predicted: np.ndarray
    measured: np.ndarray
    errors: np.ndarray


def context_lengths(
    lengths: Sequence[int] = (5, 10, 20, 40, 80, 160, 320, 640),
    training_length: int = 20,
    variances: Sequence[Length] = (0.5, 0.75, 1.0, 1.25, 1.5),
    noise_variance: float = 0.0,
    prompts: int = 40_000,
    seed: int = 0,
) -> RiskCurve:
    """The risk of the layer learnt at N on contexts of M: it falls with M, to a floor that N sets.

    Args:
        lengths: M.
        training_length: N.
        variances: of the features of x, the diagonal of Lambda.
        noise_variance: sigma^2 of the labels.
        prompts: drawn at each M.
        seed: of the prompts.
    """
    covariance, rng = np.diag(variances).astype(np.float64), np.random.default_rng(seed)
    learnt = gradient_flow.minimiser(covariance, training_length, noise_variance=noise_variance)
    predicted, measured, rows = [], [], []
    for length in lengths:
        predicted.append(gradient_flow.risk(learnt, covariance, length, noise_variance=noise_variance))
        measured.append(drawn_risk(learnt, covariance, length, rng, prompts, noise_variance=noise_variance))
        name = f"risk (d={len(covariance)}, N={training_length}, M={length}, noise {noise_variance:g})"
        rows.append(within_errors(name, predicted[-1], *measured[-1], errors=4.0))
    found, errors = np.array(measured).T
    return RiskCurve(rows, np.array(lengths), np.array(predicted), found, errors)


def covariate_shift(
    factors: Sequence[Length] = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0),
    dimension: int = 5,
    training_length: int = 100,
    length: int = 400,
    prompts: int = 20_000,
    seed: int = 0,
) -> RiskCurve:
    """Inputs of another variance break the layer, other tasks and other queries do not: risks over E (w' x_q)^2.

    The curve is over the factor of the variance of the inputs. Two more rows are for one task of ten times the usual
    length, and for queries of four times the variance, whose shares are those without a shift.

    Args:
        factors: of the variance of contexts and queries.
        dimension: d.
        training_length: N.
        length: M.
        prompts: drawn at each factor.
        seed: of the prompts.
    """
    identity, rng = np.eye(dimension), np.random.default_rng(seed)
    learnt = gradient_flow.minimiser(identity, training_length)
    setting = f"d={dimension}, N={training_length}, M={length}"
    predicted, measured, rows = [], [], []
    for factor in factors:
        scale = factor * dimension
        predicted.append(gradient_flow.risk(learnt, factor * identity, length) / scale)
        mean, error = drawn_risk(learnt, factor * identity, length, rng, prompts)
        measured.append((mean / scale, error / scale))
        rows.append(within_errors(f"risk share, variance x {factor:g} ({setting})", predicted[-1], *measured[-1], 4.0))
    usual = gradient_flow.risk(learnt, identity, length) / dimension
    task = np.zeros(dimension)
    task[0] = 10.0 * np.sqrt(dimension)
    mean, error = drawn_risk(learnt, identity, length, rng, prompts, task=task)
    rows.append(
        within_errors(f"risk share, one long task ({setting})", usual, *np.array((mean, error)) / task[0] ** 2, 4.0)
    )
    mean, error = drawn_risk(learnt, identity, length, rng, prompts, query_covariance=4 * identity)
    share = np.array((mean, error)) / (4 * dimension)
    rows.append(within_errors(f"risk share, queries of variance 4 ({setting})", usual, *share, 4.0))
    found, errors = np.array(measured).T
    return RiskCurve(rows, np.array(factors), np.array(predicted), found, errors)


def random_covariances(
    lengths: Sequence[Length] = (20, 200, np.inf), dimension: int = 8, prompts: int = 400_000, seed: int = 0
) -> list[Comparison]:
    """Where every prompt has a covariance of its own, diag of Exp(1), one layer keeps a third of the risk.

    The measured side is the least-squares a over drawn prompts, and its risk.

    Args:
        lengths: N.
        dimension: d.
        prompts: drawn at each N.
        seed: of the prompts.
    """
    rng, rows = np.random.default_rng(seed), []
    for length in lengths:
        variances = rng.exponential(size=(prompts, dimension))
        weights = rng.standard_normal((prompts, dimension))
        read = _read(variances, weights, length, rng)
        by_prompt = (variances * read * weights).sum(axis=1), (variances * read**2).sum(axis=1)
        a = by_prompt[0].sum() / by_prompt[1].sum()
        a_error = np.std(by_prompt[0] - a * by_prompt[1]) * np.sqrt(prompts) / by_prompt[1].sum()
        losses = (variances * (a * read - weights) ** 2).mean(axis=1)
        expected, risk = gradient_flow.random_covariance_minimiser(dimension=dimension, length=length)
        setting = f"d={dimension}, N={length:g}"
        rows.append(within_errors(f"random covariances: a ({setting})", expected, a, a_error, 4.0))
        error = losses.std() / np.sqrt(prompts)
        rows.append(within_errors(f"random covariances: risk / d ({setting})", risk, losses.mean(), error, 4.0))
    return rows


def pool_minimisers(
    sizes: Sequence[int] = (4, 16, 64),
    dimension: int = 8,
    length: int = 16,
    noise_variance: float = 0.25,
    covariances: Sequence[np.ndarray] | None = None,
    prompts: int = 400_000,
    tolerance: float = 0.01,
    seed: int = 0,
) -> list[Comparison]:
    """Least squares over prompts of a finite pool gives A_M: the relative Frobenius distance of the two.

    Args:
        sizes: M.
        dimension: d.
        length: N.
        noise_variance: sigma^2.
        covariances: diagonals of Lambda to try; None: the identity, and one of condition number 4.
        prompts: drawn for each.
        tolerance: of the distance.
        seed: of pools and prompts.

    Raises:
        ValueError: too few prompts for ten fits, which the standard error comes from.
    """
    at_least("number of prompts", prompts, 20 * dimension)
    if covariances is None:
        covariances = (np.ones(dimension), np.linspace(0.5, 2.0, dimension))
    rows = []
    for number, (size, variances) in enumerate((m, v) for m in sizes for v in covariances):
        rng = np.random.default_rng([seed, number])
        tasks = rng.standard_normal((size, dimension))
        expected = pool.minimiser(tasks, length, noise_variance, np.diag(variances))
        parts = []
        for count in _portions(prompts, min(50_000, prompts // 10)):
            weights = tasks[rng.integers(size, size=count)]
            read = _read(np.broadcast_to(variances, weights.shape), weights, length, rng, noise_variance)
            parts.append((read.T @ read, weights.T @ read))
        moment, crossed = (sum(part[i] for part in parts) for i in (0, 1))
        fitted = np.linalg.solve(moment, crossed.T).T
        spread = [np.linalg.norm(np.linalg.solve(m, c.T).T - fitted) for m, c in parts]
        error = np.sqrt(np.mean(np.square(spread)) / len(parts)) / np.linalg.norm(expected)
        apart = np.linalg.norm(fitted - expected) / np.linalg.norm(expected)
        shape = "identity" if np.ptp(variances) == 0 else f"condition {max(variances) / min(variances):.3g}"
        name = f"pool: |A - A_M| / |A_M| (d={dimension}, N={length}, M={size}, {shape})"
        rows.append(Comparison(name, 0.0, float(apart), float(error), tolerance))
    return rows


def drawn_risk(
    weights: np.ndarray,
    covariance: np.ndarray,
    length: int,
    rng: np.random.Generator,
    prompts: int,
    query_covariance: np.ndarray | None = None,
    task: np.ndarray | None = None,
    noise_variance: float = 0.0,
) -> tuple[float, float]:
    """The risk of A over drawn contexts, the query integrated out, and its standard error.

    Args:
        weights: A, [d, d].
        covariance: Lambda of the contexts, [d, d].
        length: M.
        rng: of the contexts.
        prompts: contexts to draw.
        query_covariance: of the query, [d, d]; None: as the contexts.
        task: w, [d], the same in all prompts; None: drawn from N(0, I).
        noise_variance: sigma^2 of the labels.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = np.linalg.cholesky(covariance if query_covariance is None else query_covariance)
    losses = []
    for count in _portions(prompts, max(1, 4_000_000 // (length * len(covariance)))):
        tasks = rng.standard_normal((count, len(covariance))) if task is None else np.tile(task, (count, 1))
        read = _read(np.broadcast_to(values, tasks.shape), tasks @ vectors, length, rng, noise_variance) @ vectors.T
        losses.append((((read @ weights.T - tasks) @ root) ** 2).sum(axis=1))
    found = np.concatenate(losses)
    return float(found.mean()), float(found.std() / np.sqrt(prompts))


def _read(
    variances: np.ndarray, weights: np.ndarray, length: Length, rng: np.random.Generator, noise_variance: float = 0.0
) -> np.ndarray:
    """p = (1/N) sum_i y_i x_i of raw contexts with independent features of these variances, [prompts, d]."""
    if np.isinf(length):
        return variances * weights
    parts = []
    for rows in np.array_split(np.arange(len(weights)), max(1, weights.size * length // 4_000_000)):
        inputs = rng.standard_normal((len(rows), int(length), weights.shape[1])) * np.sqrt(variances[rows, None])
        targets = np.einsum("bnd,bd->bn", inputs, weights[rows])
        if noise_variance:
            targets += np.sqrt(noise_variance) * rng.standard_normal(targets.shape)
        parts.append(np.einsum("bn,bnd->bd", targets, inputs) / length)
    return np.concatenate(parts)


def _portions(total: int, most: int) -> list[int]:
    return [most] * (total // most) + ([total % most] if total % most else [])
