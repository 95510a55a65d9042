"""Numbers on held-out rows: a model applied to all of them in batches of few shapes, and rows of the summary."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.evaluation.statistics import bootstrap
from rlhf_jax.parallel.meetings import gathered
from rlhf_jax.sampling.batches import rows_at_once

DRAWS = 2000


def over_rows(
    score: Callable[[Any], Any], items: Sequence[Any], collate: Callable[[Sequence[Any]], Any], batch_size: int
) -> Any:
    """Applies `score` to all items, a batch at a time, without a batch of an odd size.

    Args:
        score: `score(batch)`: a pytree of arrays whose first axis counts the rows; jitted by the caller.
        items: N ≥ 1 tokenised rows with a `length`.
        collate: makes a batch of items.
        batch_size: rows a batch, see `sampling.batches.rows_at_once`.

    Returns:
        The pytree with numpy arrays whose first axis counts the items, in their order.
    """
    order = sorted(range(len(items)), key=lambda place: -items[place].length)
    batch_size, parts = rows_at_once(batch_size, len(order)), []
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        filled = places + places[-1:] * (batch_size - len(places))
        parts.append(score(collate([items[place] for place in filled])))
    back = np.argsort(order)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[back], *gathered(parts))


def bootstrap_row(name: str, unit: str, statistic: Callable[..., Any], *arrays: np.ndarray) -> dict[str, Any]:
    """A row of `summary.json`: a statistic of held-out rows, with its 95 % percentile interval over resampled rows.

    Args:
        name: what was measured.
        unit: its unit; "" for a pure number.
        statistic: `statistic(*arrays)` gives a number.
        *arrays: data, each [rows, …].

    Returns:
        `{"name", "unit", "mean", "sd", "n", "ci95"}`; `mean` is the statistic, `sd` is None, `n` counts the rows.

    Example:
        >>> bootstrap_row("accuracy", "", np.mean, np.array([1.0, 1.0, 1.0]))
        {'name': 'accuracy', 'unit': '', 'mean': 1.0, 'sd': None, 'n': 3, 'ci95': [1.0, 1.0]}
    """
    interval = bootstrap(statistic, *arrays, n=DRAWS, rng=np.random.default_rng(0))
    ends = [float(interval.low), float(interval.high)]
    return {"name": name, "unit": unit, "mean": float(interval.estimate), "sd": None, "n": len(arrays[0]), "ci95": ends}


def pair_accuracy(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """Share of pairs whose chosen side has the larger number; a tie counts one half.

    Example:
        >>> pair_accuracy(np.array([1.0, 2.0, 0.0, 3.0]), np.array([0.0, 2.0, 1.0, 0.0]))
        0.625
    """
    return float((1.0 + np.sign(chosen - rejected)).mean() / 2.0)
