"""How good scores are at telling completions apart: accuracy on pairs, and gold of the completion that is picked."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.statistics import bootstrap_rows, row
from rlhf_jax.training.held_out import bootstrap_row, pair_accuracy

Ragged = Sequence[Float[np.ndarray, " _"]]


def picked(by: Iterable[Float[np.ndarray, " _"]], gold: Ragged) -> Float[np.ndarray, " P"]:
    """Gold of the completion with the largest number, for each prompt; completions that tie share.

    Args:
        by: a number a completion, one array a prompt.
        gold: the gold reward of the same completions.

    Returns:
        float64 [P].

    Example:
        >>> picked([np.array([1.0, 3.0, 3.0])], [np.array([0.0, 0.5, 1.0])]).tolist()
        [0.75]
    """
    return np.array([one[values == values.max()].mean() for values, one in zip(by, gold, strict=True)], np.float64)


def pair_rows(scores: Ragged, lengths: Ragged) -> list[dict[str, Any]]:
    """Rows of the summary about pairs, the chosen completion first: accuracy beside that of the longer one, margin.

    Args:
        scores: of both completions, one array a pair.
        lengths: of the same completions.
    """
    (chosen, rejected), (longer, shorter) = np.transpose(scores), np.transpose(lengths)
    return [
        bootstrap_row("accuracy", "", pair_accuracy, chosen, rejected),
        bootstrap_row("accuracy of the longer completion", "", pair_accuracy, longer, shorter),
        row("margin", "", chosen - rejected),
    ]


def pick_rows(scores: Ragged, lengths: Ragged, gold: Ragged, prompt: Any = None) -> list[dict[str, Any]]:
    """Rows of the summary about best-of-n: gold of the pick by score, at random, by length, and by gold itself.

    Intervals are over prompts; gains are differences within a row.

    Args:
        scores: of the completions, one array a row.
        lengths: of the same completions.
        gold: their gold reward.
        prompt: the prompt of each row, if prompts with several rows are to be resampled.
    """
    best, longest, oracle, random = (picked(by, gold) for by in (scores, lengths, gold, map(np.zeros_like, gold)))
    named = {
        "gold of the pick by score": best,
        "gold of a random pick": random,
        "gold of the longest": longest,
        "gold of the best": oracle,
        "gold gained over a random pick": best - random,
        "gold gained over the longest": best - longest,
    }
    return _mean_rows(named, prompt)


def trivial_pick_rows(lengths: Ragged, gold: Ragged, prompt: Any = None) -> list[dict[str, Any]]:
    """Rows of the summary about best-of-n without a model: a random pick, the longest, the best, and their gains.

    Args:
        lengths: of the completions, one array a row.
        gold: their gold reward.
        prompt: as in `pick_rows`.
    """
    longest, oracle, random = (picked(by, gold) for by in (lengths, gold, map(np.zeros_like, gold)))
    named = {
        "gold of a random pick": random,
        "gold of the longest": longest,
        "gold of the best": oracle,
        "gold gained by the longest over a random pick": longest - random,
        "gold gained by the best over a random pick": oracle - random,
    }
    return _mean_rows(named, prompt)


def _mean_rows(named: Mapping[str, Float[np.ndarray, " n"]], prompt: Any) -> list[dict[str, Any]]:
    """The mean of several numbers a row, from one set of draws."""
    table = np.stack(list(named.values()), axis=1)
    return bootstrap_rows(list(named), "", lambda part: part.mean(axis=0), table, groups=prompt)
