"""Linear attention trained on a finite pool of regression tasks: the case of task diversity that can be solved.

Raventos, Paul, Chen, Ganguli 2023 (arXiv 2306.15063) train transformers on a pool of M weights w_1 .. w_M ~ N(0, I) and
ask when they generalise to new ones. For one layer of linear attention the answer is exact: training sees the pool only
through its second moment C = (1/M) sum_i w_i w_i', and what it loses on new tasks it regains near M = d, where C
attains full rank. (The threshold of deep transformers, which can memorise the pool, is orders of magnitude larger and
is another phenomenon.) The minimiser is `gradient_flow.minimiser`, the risks are `gradient_flow.risk`, for this C.
"""

from typing import NamedTuple

import numpy as np

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.theory import gradient_flow


class PoolRisks(NamedTuple):
    """Squared errors to the noiseless target, of a layer trained on a pool.

    Attributes:
        pool: on new prompts of the pool's tasks; in distribution.
        fresh: on new tasks w ~ N(0, I); out of distribution.
    """

    pool: float
    fresh: float


class AverageRisks(NamedTuple):
    """Risks by pool size, averaged over drawn pools, each float64 [sizes].

    Attributes:
        pool: in distribution.
        pool_error: its standard error.
        fresh: out of distribution.
        fresh_error: its standard error.
    """

    pool: np.ndarray
    pool_error: np.ndarray
    fresh: np.ndarray
    fresh_error: np.ndarray


def second_moment(pool: np.ndarray) -> np.ndarray:
    """C = (1/M) sum_i w_i w_i' of a pool [M, d], float64 [d, d].

    Raises:
        ValueError: a pool that is no matrix with at least one task, or has entries that are not finite.

    Example:
        >>> second_moment(np.array([[1.0, 0.0], [0.0, 2.0]]))
        array([[0.5, 0. ],
               [0. , 2. ]])
    """
    pool = np.asarray(pool, np.float64)
    if pool.ndim != 2 or not pool.size:
        raise ValueError(f"the pool has the shape {pool.shape}: give at least one task, [tasks, d].")
    if not np.isfinite(pool).all():
        raise ValueError("the pool has entries that are not finite: give finite ones.")
    return pool.T @ pool / len(pool)


def minimiser(
    pool: np.ndarray, length: int, noise_variance: float = 0.0, covariance: np.ndarray | None = None
) -> np.ndarray:
    """The matrix that training on the pool leads to, derived here:

        A_M = C [(1 + 1/N) Lambda C + ((tr(C Lambda) + sigma^2) / N) I]^-1.

    Args:
        pool: w_1 .. w_M, [M, d].
        length: N, examples in a context.
        noise_variance: sigma^2 of the labels.
        covariance: Lambda of the inputs, [d, d]; None: the identity.

    Returns:
        A_M, float64 [d, d].

    Raises:
        ValueError: as `second_moment` and `gradient_flow.minimiser`.

    Example:
        >>> minimiser(np.array([[1.0, 0.0]]), length=2)
        array([[0.5, 0. ],
               [0. , 0. ]])
    """
    tasks = second_moment(pool)
    return gradient_flow.minimiser(_or_identity(covariance, len(tasks)), length, tasks, noise_variance)


def risks(
    pool: np.ndarray, length: int, noise_variance: float = 0.0, covariance: np.ndarray | None = None
) -> PoolRisks:
    """The risks of `minimiser` on contexts of N examples. For Lambda = I they are

        pool:  tr C - tr(A_M C),      fresh:  d - 2 tr A_M + |A_M|_F^2 (1 + (d + 1 + sigma^2) / N).

    Args:
        pool: [M, d].
        length: N.
        noise_variance: sigma^2.
        covariance: Lambda, [d, d]; None: the identity.

    Raises:
        ValueError: as `minimiser`.
    """
    tasks = second_moment(pool)
    covariance = _or_identity(covariance, len(tasks))
    learnt = minimiser(pool, length, noise_variance, covariance)
    known = gradient_flow.risk(learnt, covariance, length, tasks=tasks, noise_variance=noise_variance)
    return PoolRisks(known, gradient_flow.risk(learnt, covariance, length, noise_variance=noise_variance))


def average_risks(
    sizes: tuple[int, ...],
    dimension: int,
    length: int,
    noise_variance: float = 0.0,
    pools: int = 200,
    seed: int = 0,
) -> AverageRisks:
    """The risks by pool size for Lambda = I, averaged over pools of tasks drawn from N(0, I).

    The smaller pools are the beginnings of the largest, so that neighbouring sizes share their luck.

    Args:
        sizes: M.
        dimension: d.
        length: N.
        noise_variance: sigma^2.
        pools: pools to average over, >= 2.
        seed: of the pools.

    Raises:
        ValueError: a count out of its range.
    """
    at_least("number of pool sizes", len(sizes), 1)
    for size in sizes:
        at_least("pool size M", size, 1)
    at_least("number of pools", pools, 2)
    at_least("dimension d", dimension, 1)
    rng = np.random.default_rng(seed)
    drawn = (rng.standard_normal((max(sizes), dimension)) for _ in range(pools))
    found = np.array([[risks(pool[:size], length, noise_variance) for size in sizes] for pool in drawn])
    means, errors = found.mean(axis=0), found.std(axis=0, ddof=1) / np.sqrt(pools)
    return AverageRisks(means[:, 0], errors[:, 0], means[:, 1], errors[:, 1])


def _or_identity(covariance: np.ndarray | None, dimension: int) -> np.ndarray:
    return np.eye(dimension) if covariance is None else covariance
