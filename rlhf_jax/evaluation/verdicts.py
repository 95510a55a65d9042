"""Verdicts with ties: scores against the labels of PandaLM (2306.05087) and Auto-J (2310.05470), and votes of a judge.

A label is 1 or 2, the better completion, or 0 for a tie; a margin of scores needs a threshold below which it is one.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from rlhf_jax.evaluation.judging import Rows, pair_right
from rlhf_jax.evaluation.statistics import bootstrap_rows


def three_way(margin: Float[np.ndarray, " n"], threshold: float) -> Int[np.ndarray, " n"]:
    """Verdict of a margin (first less second score): 1 or 2, or 0 for a tie where |margin| ≤ threshold.

    Example:
        >>> three_way(np.array([2.0, -0.1, -3.0]), 0.5).tolist()
        [1, 0, 2]
    """
    if not threshold >= 0.0:
        raise ValueError(f"the threshold of a tie is at least 0; it is {threshold}")
    return np.where(np.abs(margin) <= threshold, 0, np.where(margin > 0.0, 1, 2))


def majority(votes: Int[np.ndarray, "n annotators"]) -> Int[np.ndarray, " n"]:
    """The label that more than half of the annotators give, or −1 where there is none: the row is left out then.

    Example:
        >>> majority(np.array([[1, 1, 2], [0, 1, 2]])).tolist()
        [1, -1]
    """
    count = (votes[:, :, None] == votes[:, None, :]).sum(axis=2)
    most = np.take_along_axis(votes, count.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(2 * count.max(axis=1) > votes.shape[1], most, -1)


def three_way_rows(
    margin: Float[np.ndarray, " n"], label: Int[np.ndarray, " n"], threshold: float, prompt: Any = None
) -> Rows:
    """Rows on labels with ties (PandaLM, Auto-J): agreement, macro F1 over labels that occur, accuracy without ties.

    Args:
        margin: score of the first less that of the second completion, float [n].
        label: 0 tie, 1 first, 2 second, −1 no majority (left out), [n].
        threshold: from other data; chosen on these labels it flatters.
        prompt: the prompt of each label, if prompts with several are to be resampled.
    """
    known = label >= 0
    groups = None if prompt is None else np.asarray(prompt)[known]
    margin, label = margin[known], label[known]
    right = pair_right(np.where(label == 2, -margin, margin), np.zeros_like(margin))

    def statistic(verdict: np.ndarray, label: np.ndarray, right: np.ndarray) -> list[float]:
        hits, given, true = (np.bincount(part, minlength=3) for part in (label[verdict == label], verdict, label))
        f1 = 2.0 * hits[true > 0] / (given + true)[true > 0]
        decided = right[label > 0]
        return [float((verdict == label).mean()), float(f1.mean()), float(decided.mean()) if decided.size else np.nan]

    names = ["agreement on three verdicts", "macro F1 of three verdicts", "accuracy where the label is no tie"]
    return bootstrap_rows(names, "", statistic, three_way(margin, threshold), label, right, groups=groups)


def voting_accuracy(probability: Float[np.ndarray, " n"], votes: int) -> Float[np.ndarray, " n"]:
    """Probability that most of a judge's independent verdicts are right; no majority counts as wrong.

    `P(Binomial(votes, p_i) > votes/2)`: it rises with the votes where p_i > ½ and falls where p_i < ½.

    Args:
        probability: of a right verdict, by prompt, float [n].
        votes: verdicts a prompt; at least 1.

    Example:
        >>> voting_accuracy(np.array([0.8, 0.4]), 3).round(3).tolist()
        [0.896, 0.352]
    """
    if votes < 1:
        raise ValueError(f"a majority needs at least one vote; there are {votes}")
    return special.bdtrc(votes // 2, votes, probability)
