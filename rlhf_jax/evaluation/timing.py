"""Programs timed in turns on one machine, and how many times as long one takes as another."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.statistics import mean_interval

Prepared = Callable[[], Callable[[], Any]]
"""Makes what a call needs (its state, which the call consumes), and returns the call; only the call is timed."""


def seconds_of(*prepared: Prepared, repeats: int) -> Float[np.ndarray, "calls repeats"]:
    """Seconds of each call; the calls take turns, so that all meet the same load.

    Args:
        *prepared: the calls; a first one, which compiles, is the caller's to make.
        repeats: timed calls of each.

    Returns:
        float64 [calls, repeats].
    """
    found = np.empty((len(prepared), repeats))
    for number in range(repeats):
        for place, prepare in enumerate(prepared):
            call = prepare()
            began = time.perf_counter()
            jax.block_until_ready(call())
            found[place, number] = time.perf_counter() - began
    return found


def ratio(name: str, slower: Float[np.ndarray, " n"], faster: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """A row of `summary.json`: how many times as long, the geometric mean over repeats.

    Args:
        name: what is compared.
        slower: seconds of the one, a repeat each.
        faster: seconds of the other, in the same turns.

    Returns:
        A row as `statistics.row` gives; its interval is that of the mean logarithm, its `sd` that of the logarithms.

    Example:
        >>> ratio("a over b", np.array([4.0, 18.0]), np.array([1.0, 2.0]))["mean"].__round__(6)
        6.0
    """
    logs = np.log(slower / faster)
    found = mean_interval(logs)
    ends = [float(np.exp(found.low)), float(np.exp(found.high))]
    return {
        "name": name,
        "unit": "times",
        "mean": float(np.exp(found.mean)),
        "sd": found.sd,
        "n": found.n,
        "ci95": ends,
    }
