"""How much of a score is length: of its accuracy, of its correlations, of a reward gained, of a win rate.

Source: Singhal et al., "A Long Way to Go: Investigating Length Correlations in RLHF", 2310.03716.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rlhf_jax.evaluation.picks import Ragged
from rlhf_jax.evaluation.statistics import bootstrap_rows, pearson, spearman

Numbers = Float[np.ndarray, " n"]
Lengths = Float[np.ndarray, " n"] | Int[np.ndarray, " n"]
Rows = list[dict[str, Any]]


class LengthGain(NamedTuple):
    """A gain in reward, in all and at equal length; see `stratified_gain`.

    Attributes:
        total: mean reward after less before.
        within: the same at equal length.
        share: within / total, the share that length does not explain; nan where there is no gain or loss.
        covered: share of the outputs whose bin has outputs of both policies.
    """

    total: float
    within: float
    share: float
    covered: float


class Outputs(NamedTuple):
    """Rewards and lengths of a policy's responses.

    Attributes:
        rewards: float [n].
        lengths: in tokens, [n].
    """

    rewards: Numbers
    lengths: Lengths


def longer_is_chosen(chosen: Lengths, rejected: Lengths) -> float:
    """Share of pairs whose chosen response is the longer one; pairs of equal length are not.

    Example:
        >>> longer_is_chosen(np.array([5, 2, 3]), np.array([4, 4, 3])).__round__(3)
        0.333
    """
    return float((chosen > rejected).mean())


def within_prompt_correlation(rewards: Ragged, lengths: Ragged) -> Float[np.ndarray, " P"]:
    """Pearson correlation of reward and length over the responses to one prompt, for each prompt.

    What prompts differ in (a long answer is called for, an easy topic) does not enter, unlike in the correlation over
    all responses.

    Args:
        rewards: one array a prompt.
        lengths: of the same responses, as floats.

    Returns:
        float64 [P]; nan where all rewards or all lengths of the prompt are equal. Average with `np.nanmean`.

    Example:
        >>> rewards = [np.array([0.0, 1.0]), np.array([9.0, 8.0]), np.array([1.0, 1.0])]
        >>> lengths = [np.array([3.0, 5.0]), np.array([7.0, 9.0]), np.array([1.0, 2.0])]
        >>> within_prompt_correlation(rewards, lengths).round(6).tolist()
        [1.0, -1.0, nan]
    """
    pairs = zip(rewards, lengths, strict=True)
    return np.array([pearson(one.astype(np.float64), other.astype(np.float64)) for one, other in pairs], np.float64)


def stratified_gain(before: Outputs, after: Outputs, width: int = 20) -> LengthGain:
    """Reward gained by training, in all and among responses of equal length.

    `within = Σ_b n_b (mean_b after − mean_b before) / Σ_b n_b` over bins b of `width` tokens, n_b all outputs in b.
    Bins that only one policy reaches are left out of both sums, and `covered` says how much that leaves.

    Args:
        before: of the initial policy.
        after: of the trained policy, scored by the same reward.
        width: tokens a bin.

    Returns:
        The gains; `within` and `share` are nan where no bin has both.

    Raises:
        ValueError: a policy without outputs, or a width below 1.

    Example:
        >>> before = Outputs(np.array([0.0, 2.0]), np.array([5, 25]))
        >>> after = Outputs(np.array([2.0, 3.0]), np.array([25, 26]))
        >>> stratified_gain(before, after)
        LengthGain(total=1.5, within=0.5, share=0.3333333333333333, covered=0.75)
    """
    if before.rewards.size == 0 or after.rewards.size == 0 or width < 1:
        raise ValueError("a gain at equal length needs outputs of both policies, and bins at least one token wide")
    bins = np.unique(np.concatenate([before.lengths, after.lengths]) // width, return_inverse=True)[1]
    places = bins[: before.lengths.size], bins[before.lengths.size :]
    size = int(bins.max()) + 1
    counts = [np.bincount(place, minlength=size) for place in places]
    sums = [
        np.bincount(place, weights=side.rewards, minlength=size)
        for place, side in zip(places, (before, after), strict=True)
    ]
    both = (counts[0] > 0) & (counts[1] > 0)
    number = (counts[0] + counts[1])[both]
    total = float(after.rewards.mean(dtype=np.float64) - before.rewards.mean(dtype=np.float64))
    gains = sums[1][both] / counts[1][both] - sums[0][both] / counts[0][both]
    within = float(number @ gains / number.sum()) if both.any() else float("nan")
    share = within / total if total != 0.0 else float("nan")
    return LengthGain(total=total, within=within, share=share, covered=float(number.sum() / bins.size))


def stratified_gain_rows(before: Outputs, after: Outputs, width: int = 20) -> Rows:
    """Rows of the summary on `stratified_gain`, with intervals over responses of both policies together.

    Args:
        before: as in `stratified_gain`.
        after: as in `stratified_gain`.
        width: as in `stratified_gain`.
    """
    names = ["reward gained", "reward gained at equal length", "share of the gain at equal length"]
    names += ["share of outputs in bins that both reach"]

    def statistic(rewards: np.ndarray, lengths: np.ndarray, trained: np.ndarray) -> Any:
        if trained.all() or not trained.any():
            return np.full(4, np.nan)
        return stratified_gain(*(Outputs(rewards[side], lengths[side]) for side in (~trained, trained)), width)

    stratified_gain(before, after, width)
    trained = np.repeat([False, True], [before.rewards.size, after.rewards.size])
    columns = (np.concatenate(pair) for pair in zip(before, after, strict=True))
    return bootstrap_rows(names, "", statistic, *columns, trained)


def length_controlled_wins(
    wins: Numbers, lengths: Lengths, other_lengths: Lengths, tolerance: int | float
) -> Float[np.ndarray, " kept"]:
    """Wins among pairs of nearly equal length, `|difference| < tolerance`; their mean is the controlled win rate.

    Args:
        wins: 1 where the policy's response wins, 0 where it loses, ½ for a tie, float [n].
        lengths: of its responses, [n].
        other_lengths: of those it is compared with, [n].
        tolerance: in tokens, above 0.

    Returns:
        float [kept].

    Raises:
        ValueError: no pair is that close.

    Example:
        >>> length_controlled_wins(np.array([1.0, 0.0]), np.array([50, 20]), np.array([20, 22]), 10).tolist()
        [0.0]
    """
    kept = np.abs(lengths.astype(np.float64) - other_lengths) < tolerance
    if not kept.any():
        raise ValueError(f"no pair has lengths that differ by less than {tolerance} tokens; raise the tolerance")
    return wins[kept]


def pair_length_rows(margin: Numbers, chosen: Lengths, rejected: Lengths, groups: Any = None) -> Rows:
    """Rows of the summary on pairs: does the longer response win, by the labels and by the scores.

    Args:
        margin: score of the chosen less that of the rejected response, float [n].
        chosen: lengths of the chosen responses, [n].
        rejected: lengths of the rejected ones, [n].
        groups: the prompt of each pair, if prompts are to be resampled.

    Returns:
        Share of pairs whose chosen response is longer; accuracy of always taking the longer (equal lengths half); how
        often the scores prefer the longer response where lengths differ; accuracy where the chosen one is longer, and
        where it is shorter; Pearson and Spearman correlation of the margin with the difference of lengths, each pair in
        both orders (so that which one was chosen does not enter).
    """
    names = ["share of pairs whose chosen is longer", "accuracy of the longer response"]
    names += ["share of pairs whose longer response scores higher", "accuracy where the chosen is longer"]
    names += ["accuracy where the chosen is shorter", "Pearson correlation of margin and length difference"]
    names += ["Spearman correlation of margin and length difference"]

    def statistic(margin: np.ndarray, difference: np.ndarray) -> list[float]:
        right, longer, shorter = (1.0 + np.sign(margin)) / 2.0, difference > 0, difference < 0
        both = np.concatenate([margin, -margin]), np.concatenate([difference, -difference])
        prefers = np.where(longer, right, 1.0 - right)[longer | shorter]
        parts = [_mean(prefers), _mean(right[longer]), _mean(right[shorter])]
        return [
            float(longer.mean()),
            float((1.0 + np.sign(difference)).mean() / 2.0),
            *parts,
            pearson(*both),
            spearman(*both),
        ]

    difference = chosen.astype(np.float64) - rejected
    return bootstrap_rows(names, "", statistic, margin.astype(np.float64), difference, groups=groups)


def response_length_rows(rewards: Ragged, lengths: Ragged, prompt: Any = None) -> Rows:
    """Rows of the summary on several responses a prompt: correlation of reward and length, within and over prompts.

    Args:
        rewards: one array a row.
        lengths: of the same responses, as floats.
        prompt: the prompt of each row, if prompts with several rows are to be resampled; None: each has its own.

    Returns:
        Mean Pearson correlation within a prompt, Pearson and Spearman correlation over all responses; prompts are
        resampled, whole.
    """
    place = np.arange(len(rewards)) if prompt is None else np.asarray(prompt)
    within = within_prompt_correlation(rewards, lengths)
    known, rows = ~np.isnan(within), []
    if known.any():
        name = "Pearson correlation of reward and length within a prompt"
        groups = None if prompt is None else place[known]
        rows = bootstrap_rows([name], "", np.mean, within[known], groups=groups)
    names = ["Pearson correlation of reward and length", "Spearman correlation of reward and length"]
    flat = (np.concatenate(list(part)).astype(np.float64) for part in (rewards, lengths))
    whole = np.repeat(place, [one.size for one in rewards])
    return rows + bootstrap_rows(names, "", lambda r, n: (pearson(r, n), spearman(r, n)), *flat, groups=whole)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
