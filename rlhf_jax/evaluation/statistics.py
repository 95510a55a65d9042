"""Means with intervals, paired differences, bootstraps and correlations: every number that a summary reports.

The unit of replication (seed or prompt) is always the leading axis.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special


@dataclass(frozen=True)
class Estimate:
    """A mean with the interval that its replications give.

    Attributes:
        mean: the mean.
        sd: sample standard deviation of the replications (n − 1 in the denominator); nan for one replication.
        n: how many replications.
        low: lower end of the interval; nan for one replication.
        high: upper end; nan for one replication.
    """

    mean: float
    sd: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class BootstrapInterval:
    """A statistic with its percentile interval.

    Attributes:
        estimate: the statistic of the data themselves, float64 [*shape].
        low: lower end, [*shape].
        high: upper end, [*shape].
        undefined: how many draws gave nan and were left out, int [*shape].
    """

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    undefined: np.ndarray


def mean_interval(values: Float[np.ndarray, " n"], level: float = 0.95) -> Estimate:
    """Mean and Student-t interval of independent replications.

    `mean ± t_{n−1}((1 + level)/2) · sd/√n`.

    Args:
        values: one number a replication, float [n].
        level: coverage of the interval, between 0 and 1.

    Returns:
        The estimate; with n = 1 its sd and interval are nan, as one run says nothing about its own spread.

    Raises:
        ValueError: there are no values, one of them is not finite, or the level is not between 0 and 1.

    Example:
        >>> estimate = mean_interval(np.array([1.0, 2.0, 3.0]))
        >>> estimate.mean, estimate.sd, round(estimate.low, 3), round(estimate.high, 3)
        (2.0, 1.0, -0.484, 4.484)
    """
    if values.size == 0:
        raise ValueError("a mean needs at least one value")
    if not np.isfinite(values).all():
        first = np.flatnonzero(~np.isfinite(values))[0]
        raise ValueError(f"value {first} is not finite; leave failed runs out, and say so")
    if not 0.0 < level < 1.0:
        raise ValueError(f"the level of an interval lies between 0 and 1; it is {level}")
    count = int(values.size)
    mean = float(values.mean(dtype=np.float64))
    if count == 1:
        return Estimate(mean=mean, sd=math.nan, n=1, low=math.nan, high=math.nan)
    sd = float(values.std(ddof=1, dtype=np.float64))
    half = float(special.stdtrit(count - 1, (1.0 + level) / 2.0)) * sd / math.sqrt(count)
    return Estimate(mean=mean, sd=sd, n=count, low=mean - half, high=mean + half)


def paired_difference(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], level: float = 0.95) -> Estimate:
    """Mean of a − b over replications that share a seed (or a prompt), with its t interval.

    Pairing removes what the two have in common: the interval is that of the differences, not of two means.

    Args:
        a: one number a replication, float [n].
        b: the same replications under the other method, float [n].
        level: coverage of the interval.

    Returns:
        The estimate of the difference.

    Raises:
        ValueError: the two have different lengths, or as `mean_interval`.

    Example:
        >>> difference = paired_difference(np.array([11.0, 22.0, 33.0]), np.array([10.0, 20.0, 30.0]))
        >>> difference.mean, difference.sd, difference.n
        (2.0, 1.0, 3)
    """
    if a.shape != b.shape:
        raise ValueError(f"pairs need the same replications on both sides; there are {a.size} and {b.size}")
    return mean_interval(np.subtract(a, b, dtype=np.float64), level)


def bootstrap(
    statistic: Callable[..., Any], *arrays: np.ndarray, n: int, rng: np.random.Generator, level: float = 0.95
) -> BootstrapInterval:
    """Percentile bootstrap over the leading axis, which all arrays share and which is resampled jointly.

    Ends are order statistics of the draws (no interpolation), so that a statistic may be infinite (a peak that is not
    reached).

    Args:
        statistic: `statistic(*arrays)` gives a float or an array [*shape].
        *arrays: data, each [replications, …].
        n: number of draws.
        rng: generator of the draws.
        level: coverage of the interval.

    Returns:
        The statistic and its interval; draws that give nan are left out and counted, and where all do the ends are nan.

    Raises:
        ValueError: no array, leading axes that differ or are empty, n < 1, or a level not between 0 and 1.

    Example:
        >>> data = np.array([1.0, 2.0, 3.0, 4.0])
        >>> result = bootstrap(np.mean, data, n=200, rng=np.random.default_rng(0))
        >>> float(result.estimate), bool(1.0 <= result.low <= 2.5 <= result.high <= 4.0)
        (2.5, True)
    """
    lengths = {array.shape[0] for array in arrays}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"a bootstrap resamples one leading axis that all arrays share; lengths are {sorted(lengths)}")
    if n < 1:
        raise ValueError(f"a bootstrap needs at least one draw; n is {n}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"the level of an interval lies between 0 and 1; it is {level}")
    (count,) = lengths
    picks = rng.integers(count, size=(n, count))
    draws = np.stack([np.asarray(statistic(*(array[pick] for array in arrays)), dtype=np.float64) for pick in picks])
    undefined = np.isnan(draws).sum(axis=0)
    tail = (1.0 - level) / 2.0
    ends = np.full((2, *draws.shape[1:]), np.nan)
    for place in np.ndindex(draws.shape[1:]):
        kept = draws[(slice(None), *place)]
        kept = kept[~np.isnan(kept)]
        if kept.size:
            ends[(slice(None), *place)] = np.quantile(kept, [tail, 1.0 - tail], method="inverted_cdf")
    estimate = np.asarray(statistic(*arrays), dtype=np.float64)
    return BootstrapInterval(
        estimate=estimate, low=np.asarray(ends[0]), high=np.asarray(ends[1]), undefined=np.asarray(undefined)
    )


def bootstrap_rows(
    names: Sequence[str],
    unit: str,
    statistic: Callable[..., Any],
    *arrays: np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    draws: int = 2000,
) -> list[dict[str, Any]]:
    """Rows of `summary.json` for several statistics of the same data, from one set of bootstrap draws.

    Args:
        names: what was measured, one name a number.
        unit: the unit of all of them; "" for a pure number.
        statistic: `statistic(*arrays)` gives as many numbers as there are names.
        *arrays: data, each [rows, …].
        groups: which rows belong together (pairs of one prompt), [rows]: whole groups are drawn. None: single rows.
        draws: number of bootstrap draws.

    Returns:
        `{"name", "unit", "mean", "sd", "n", "ci95"}` of each; `mean` is the statistic of the data, `sd` is None, `n`
        counts what was resampled (groups or rows). A statistic that is not defined is nan.

    Raises:
        ValueError: as `bootstrap`, or `groups` has another length than the arrays.

    Example:
        >>> rows = bootstrap_rows(["low", "high"], "", lambda a: (a.min(), a.max()), np.array([2.0, 2.0]))
        >>> [(row["name"], row["mean"], row["ci95"]) for row in rows]
        [('low', 2.0, [2.0, 2.0]), ('high', 2.0, [2.0, 2.0])]
    """
    data, of = arrays, statistic
    if groups is not None:
        if len(groups) != len(arrays[0]):
            raise ValueError(
                f"every row belongs to one group; there are {len(arrays[0])} rows and {len(groups)} groups"
            )
        code = np.unique(np.asarray(groups), return_inverse=True)[1]
        parts = np.split(np.argsort(code, kind="stable"), np.cumsum(np.bincount(code))[:-1])
        data = (np.fromiter(parts, object, len(parts)),)

        def of(drawn: np.ndarray) -> Any:
            rows = np.concatenate(drawn)
            return statistic(*(array[rows] for array in arrays))

    interval = bootstrap(of, *data, n=draws, rng=np.random.default_rng(0))
    numbers = zip(
        names, *(np.atleast_1d(part) for part in (interval.estimate, interval.low, interval.high)), strict=True
    )
    return [
        {
            "name": name,
            "unit": unit,
            "mean": float(mean),
            "sd": None,
            "n": len(data[0]),
            "ci95": [float(low), float(high)],
        }
        for name, mean, low, high in numbers
    ]


def pearson(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Pearson correlation, `cov(a, b) / (sd(a) sd(b))`.

    Args:
        a: float [n].
        b: float [n].

    Returns:
        The correlation; nan where it is not defined (fewer than two points, or a constant side).

    Example:
        >>> round(pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 7.0])), 4)
        0.9934
    """
    if not _both_vary(a, b):
        return math.nan
    # By hand: scipy also computes a p-value, which takes ten times as long, and a bootstrap does it thousands of times.
    x, y = (np.subtract(side, side.mean(dtype=np.float64), dtype=np.float64) for side in (a, b))
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1.0, 1.0))


def spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Spearman correlation: Pearson correlation of the ranks, ties sharing their mean rank.

    Args:
        a: float [n].
        b: float [n].

    Returns:
        The correlation; nan where it is not defined (fewer than two points, or a constant side).

    Example:
        >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 10.0, 100.0])), 6)
        1.0
    """
    from scipy import stats

    return pearson(stats.rankdata(a), stats.rankdata(b)) if _both_vary(a, b) else math.nan


def row(name: str, unit: str, values: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """One row of `summary.json`: a quantity, its unit, and its mean over replications with a 95% t interval.

    Args:
        name: what was measured.
        unit: its unit; "1" for a pure number.
        values: one number a replication, float [n].

    Returns:
        `{"name", "unit", "mean", "sd", "n", "ci95": [low, high]}`; for one replication sd and both ends are None, which
        JSON can say and nan it cannot.

    Raises:
        ValueError: as `mean_interval`.

    Example:
        >>> row("final gold", "reward", np.array([1.5]))
        {'name': 'final gold', 'unit': 'reward', 'mean': 1.5, 'sd': None, 'n': 1, 'ci95': [None, None]}
    """
    estimate = mean_interval(values)
    sd, low, high = (None if math.isnan(value) else value for value in (estimate.sd, estimate.low, estimate.high))
    return {"name": name, "unit": unit, "mean": estimate.mean, "sd": sd, "n": estimate.n, "ci95": [low, high]}


def _both_vary(a: np.ndarray, b: np.ndarray) -> bool:
    return a.size >= 2 and bool(np.ptp(a) > 0.0) and bool(np.ptp(b) > 0.0)
