"""Accuracy of scores on benchmarks of judged completions, by the rule of each benchmark, with intervals.

Every benchmark comes down to one number a prompt (was the better completion ranked rightly) and a rule of averaging:

* RewardBench (2403.13787): pairs, strict; sections weigh examples, mathematics as much as all code together.
* RewardBench 2 (2506.01937): one good completion among four; the subset Ties has a score of its own.
* RM-Bench (2410.16184): three styles of the good against three of the bad completion; easy, normal and hard.
* RMB (2410.09893): pairs and best-of-n, strict; leaf categories weigh the same, then goals and sets do.
* LLMBar, JudgeBench, PPE's pairs: pairs by slice.

`verdicts` has the labels with ties of PandaLM and Auto-J. Intervals resample prompts. Scores must be float32 or wider:
bfloat16 makes ties, and a strict rule counts them wrong.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.picks import Ragged, picked
from rlhf_jax.evaluation.statistics import bootstrap_rows

Ties = Literal["share", "strict"]
Rows = list[dict[str, Any]]
Labels = Sequence[str] | np.ndarray


def pair_right(
    chosen: Float[np.ndarray, "*n"], rejected: Float[np.ndarray, "*n"], ties: Ties = "share"
) -> Float[np.ndarray, "*n"]:
    """1 where the chosen completion has the larger score, 0 where the smaller.

    Args:
        chosen: scores, float [*n].
        rejected: scores of the other completions, float [*n].
        ties: what an exactly equal score counts: ½ ("share") or 0 ("strict").

    Returns:
        float64 [*n].

    Raises:
        ValueError: a score is not finite.

    Example:
        >>> pair_right(np.array([1.0, 2.0]), np.array([0.0, 2.0])).tolist()
        [1.0, 0.5]
    """
    bad = ~(np.isfinite(chosen) & np.isfinite(rejected))
    if bad.any():
        raise ValueError(f"a score of pair {np.argwhere(bad)[0].tolist()} is not finite; score it or drop it")
    return (chosen > rejected) + (0.5 if ties == "share" else 0.0) * (chosen == rejected)


def best_right(scores: Ragged, gold: Ragged, ties: Ties = "share") -> Float[np.ndarray, " P"]:
    """Whether the completion of the largest score is a best one: it must beat every other.

    Args:
        scores: of the completions, one array a prompt.
        gold: larger for a better completion; those of the largest are the best.
        ties: among equal largest scores, the share of best ones ("share") or 0 unless all are best ("strict").

    Returns:
        float64 [P]. Strict, it is at most `pair_right` of any pair of a best and another completion, and equal to it
        where there are two completions.

    Raises:
        ValueError: a score is not finite, or no completion of a prompt is worse than another.

    Example:
        >>> scores, gold = [np.array([1.0, 3.0, 3.0])], [np.array([0.0, 1.0, 0.0])]
        >>> best_right(scores, gold).tolist(), best_right(scores, gold, "strict").tolist()
        ([0.5], [0.0])
    """
    for place, (one, other) in enumerate(zip(scores, gold, strict=True)):
        if not np.isfinite(one).all():
            raise ValueError(f"a score of prompt {place} is not finite; score it or drop it")
        if not other.min(initial=np.inf) < other.max(initial=-np.inf):
            raise ValueError(f"prompt {place} has no completion that is worse than another; drop it")
    share = picked(scores, [(one == one.max()).astype(np.float64) for one in gold])
    return share if ties == "share" else (share == 1.0).astype(np.float64)


def chance(gold: Ragged) -> Float[np.ndarray, " P"]:
    """What `best_right` of random scores is on average: the share of best completions of each prompt.

    Example:
        >>> chance([np.array([0.0, 0.0, 1.0, 0.0]), np.array([1.0, 0.0])]).tolist()
        [0.25, 0.5]
    """
    return picked([np.zeros(one.size) for one in gold], [(one == one.max()).astype(np.float64) for one in gold])


def slice_rows(right: Float[np.ndarray, " n"], slices: Labels, prompt: Any = None, name: str = "accuracy") -> Rows:
    """Rows of the summary with the accuracy of each slice (subset, category), in the order of their names.

    Args:
        right: a number a row from `pair_right` or `best_right`, [n].
        slices: the slice of each row, [n].
        prompt: the prompt of each row, if prompts with several rows are to be resampled.
        name: what is measured.
    """
    slices, rows = np.asarray(slices), []
    for one in np.unique(slices):
        inside = slices == one
        groups = None if prompt is None else np.asarray(prompt)[inside]
        rows += bootstrap_rows([f"{name}: {one}"], "", np.mean, right[inside], groups=groups)
    return rows


def nested_rows(
    values: Float[np.ndarray, " n"], leaf: Labels, group: Labels, name: str = "accuracy", prompt: Any = None
) -> Rows:
    """Rows of the summary with means over rows, then over the leaves of a group, then over groups.

    Args:
        values: a number a prompt, [n].
        leaf: its leaf category, [n]; leaves of the same name in two groups are two leaves.
        group: the group that the leaf is in, [n].
        name: what is measured.
        prompt: the prompt of each value, if prompts with several are to be resampled.

    Returns:
        One row a group, their mean, and the plain mean over all rows. A draw without a leaf averages those it has.
    """
    pairs, place = np.unique(np.stack([np.asarray(group), np.asarray(leaf)]).astype(str), axis=1, return_inverse=True)
    names, parent = np.unique(pairs[0], return_inverse=True)

    def statistic(values: np.ndarray, place: np.ndarray) -> np.ndarray:
        by_group = _means(_means(values, place, parent.size), parent, names.size)
        return np.concatenate([by_group, [np.nanmean(by_group), values.mean()]])

    labels = [*(f"{name}: {one}" for one in names), f"{name}, mean over groups", f"{name}, mean over all"]
    return bootstrap_rows(labels, "", statistic, values, place, groups=prompt)


def reward_bench_rows(right: Float[np.ndarray, " n"], subset: Labels, section: Labels, prompt: Any = None) -> Rows:
    """Rows of RewardBench: its sections, the mean of those that are there, and every subset.

    A section is the mean over its examples, which weighs subsets by their size; in Reasoning the subset math-prm weighs
    as much as all code subsets together. The score is the mean of the four sections (the prior sets are left out).
    Sizes are those of the rows given, not the constants of the benchmark's script.

    Args:
        right: `pair_right(…, "strict")`, [n].
        subset: subset of each pair, [n].
        section: its section, [n].
        prompt: the prompt of each pair, if prompts with several are to be resampled.
    """
    subset, (names, place) = np.asarray(subset), np.unique(np.asarray(section), return_inverse=True)
    mathematics = subset == "math-prm"
    code = np.isin(place, place[mathematics]) & ~mathematics
    weight = np.where(mathematics & code.any(), code.sum() / max(mathematics.sum(), 1), 1.0)

    def statistic(right: np.ndarray, weight: np.ndarray, place: np.ndarray) -> np.ndarray:
        by_section = _means(right, place, names.size, weight)
        return np.append(by_section, np.nanmean(by_section))

    labels = [*(f"RewardBench {one}" for one in names), f"RewardBench, mean of {names.size} sections"]
    rows = bootstrap_rows(labels, "", statistic, right, weight, place, groups=prompt)
    return rows + slice_rows(right, subset, prompt)


def reward_bench_2_rows(scores: Ragged, gold: Ragged, subset: Labels, ids: Labels, prompt: Any = None) -> Rows:
    """Rows of RewardBench 2: accuracy of each subset by `best_right` (ties share), `ties_scores`, and their mean.

    Args:
        scores: of the completions, one array a prompt.
        gold: 1 for a good completion, 0 for a bad one.
        subset: subset of each prompt, [P].
        ids: of each prompt; in the subset Ties "ref:NAME" (one good answer) and "tied:NAME" (several).
        prompt: the prompt of each row, if prompts with several are to be resampled; a pair of Ties goes with the one
            of its reference.
    """
    subset, values, names, groups = np.asarray(subset), [], [], []
    of = np.arange(len(subset)) if prompt is None else np.asarray(prompt)
    for one in np.unique(subset):
        inside = np.flatnonzero(subset == one)
        part = [scores[i] for i in inside], [gold[i] for i in inside]
        if one == "Ties":
            here = [str(ids[i]) for i in inside]
            values.append(ties_scores(*part, here))
            inside = [inside[here.index(f"ref:{name}")] for name in ties_pairs(here)]
        else:
            values.append(best_right(*part))
        groups.append(of[inside])
        names.append(f"RewardBench 2 {one}")
    place = np.repeat(np.arange(len(values)), [len(value) for value in values])

    def statistic(values: np.ndarray, place: np.ndarray) -> np.ndarray:
        by_subset = _means(values, place, len(names))
        return np.append(by_subset, np.nanmean(by_subset))

    labels = [*names, f"RewardBench 2, mean of {len(names)} subsets"]
    whole = None if prompt is None else np.concatenate(groups)
    return bootstrap_rows(labels, "", statistic, np.concatenate(values), place, groups=whole)


def ties_pairs(ids: Labels) -> list[str]:
    """The names, in order, of which both the reference prompt and the tied prompt are there.

    Example:
        >>> ties_pairs(["tied:b", "ref:b", "ref:a"])
        ['b']
    """
    kinds = [{str(one).removeprefix(kind) for one in ids if str(one).startswith(kind)} for kind in ("ref:", "tied:")]
    return sorted(kinds[0] & kinds[1])


def ties_scores(scores: Ragged, gold: Ragged, ids: Labels) -> Float[np.ndarray, " pairs"]:
    """What each pair of prompts adds to the score of RewardBench 2's subset Ties, whose mean is that score.

    A pair is a reference prompt with one good answer, and a tied prompt with several that should score alike. With g =
    worst good − best bad score and s = best − worst good score of the tied prompt: 0.3 [g_tied > 0] + 0.3 [g_ref > 0]
    + 0.2 [g_tied > s] + 0.2 [g > s] + 0.01 tanh(g/s − 1), where g = min(g_tied, g_ref); the last term is 0 for 0/0.
    Source: the released scoring of RewardBench 2.

    Args:
        scores: of the completions, one array a prompt.
        gold: 1 for a good completion, 0 for a bad one.
        ids: "ref:NAME" or "tied:NAME" of each prompt.

    Returns:
        float64, one number a pair of prompts, ordered by name; prompts without their counterpart are left out.

    Raises:
        ValueError: an identifier of another form, or no reference prompt has its tied prompt.

    Example:
        >>> scores, gold = [np.array([2.0, 0.0]), np.array([3.0, 2.5, 0.0])], [np.array([1, 0]), np.array([1, 1, 0])]
        >>> ties_scores(scores, [one.astype(float) for one in gold], ["ref:a", "tied:a"]).round(4).tolist()
        [1.01]
    """
    gaps: dict[str, dict[str, tuple[float, float]]] = {"ref": {}, "tied": {}}
    for values, good, name in zip(scores, gold, ids, strict=True):
        kind, _, rest = str(name).partition(":")
        if kind not in gaps or not rest:
            raise ValueError(f"a prompt of the subset Ties is named ref:NAME or tied:NAME; one is {str(name)!r}")
        best = values[good > 0].astype(np.float64)
        gaps[kind][rest] = float(best.min() - values[good <= 0].max()), float(best.max() - best.min())
    both = ties_pairs(ids)
    if not both:
        raise ValueError("no reference prompt of the subset Ties stands beside its tied prompt; give the whole subset")
    reference = np.array([gaps["ref"][name][0] for name in both])
    tied, spread = np.array([gaps["tied"][name] for name in both]).T
    gap = np.minimum(reference, tied)
    with np.errstate(divide="ignore", invalid="ignore"):
        bonus = np.nan_to_num(np.tanh(gap / spread - 1.0))
    return 0.3 * (tied > 0) + 0.3 * (reference > 0) + 0.2 * (tied > spread) + 0.2 * (gap > spread) + 0.01 * bonus


def rm_bench_matrix(
    chosen: Float[np.ndarray, "n styles"], rejected: Float[np.ndarray, "n styles"]
) -> Float[np.ndarray, "n styles styles"]:
    """RM-Bench: whether the good completion of style i beats the bad one of style j, strictly, float64 [n, i, j].

    Args:
        chosen: scores of the good completion from the plainest style to the most elaborate, float [n, styles].
        rejected: of the bad one, likewise.
    """
    return pair_right(*np.broadcast_arrays(chosen[:, :, None], rejected[:, None, :]), "strict")


def rm_bench_rows(
    chosen: Float[np.ndarray, "n styles"], rejected: Float[np.ndarray, "n styles"], domain: Labels, prompt: Any = None
) -> Rows:
    """Rows of RM-Bench: easy, normal, hard and their mean for each domain, and over domains.

    Hard is where the bad completion has the more elaborate style (above the diagonal of `rm_bench_matrix`), easy where
    the good one has, normal the diagonal. Domains "safety-refuse" and "safety-response" are two halves of "safety".

    Args:
        chosen, rejected: as in `rm_bench_matrix`.
        domain: of each prompt, [n].
        prompt: the prompt of each row, if prompts with several are to be resampled.
    """
    matrix, size = rm_bench_matrix(chosen, rejected), chosen.shape[1]
    above, below = np.triu_indices(size, 1), np.tril_indices(size, -1)
    easy, normal, hard = (matrix[:, i, j].mean(axis=1) for i, j in (below, (np.arange(size),) * 2, above))
    group = [str(name).partition("-")[0] for name in domain]
    parts = {"easy": easy, "normal": normal, "hard": hard, "average": (easy + normal + hard) / 3.0}
    named = {f"RM-Bench {name}": part for name, part in parts.items()}
    return [row for name, part in named.items() for row in nested_rows(part, domain, group, name, prompt)]


def rmb_rows(
    pairs: Float[np.ndarray, " n"],
    pair_leaf: Labels,
    pair_goal: Labels,
    best: Float[np.ndarray, " m"],
    best_leaf: Labels,
    best_goal: Labels,
    prompt: Any = None,
) -> Rows:
    """Rows of RMB: mean over leaf categories for each goal and set, the mean of these four, and over all prompts.

    Args:
        pairs: `pair_right(…, "strict")` of the pairwise set, [n]; may be empty.
        pair_leaf, pair_goal: leaf category and goal (helpfulness, harmlessness) of each pair, [n].
        best: `best_right(…, "strict")` of the best-of-n set, [m]; may be empty.
        best_leaf, best_goal: of each list, [m].
        prompt: the prompt of each pair and then of each list, if prompts with several are to be resampled, [n + m].
    """
    group = [f"{goal}, pairs" for goal in pair_goal] + [f"{goal}, best of n" for goal in best_goal]
    return nested_rows(np.concatenate([pairs, best]), [*pair_leaf, *best_leaf], group, "RMB", prompt)


def _means(values: np.ndarray, place: np.ndarray, size: int, weight: np.ndarray | None = None) -> np.ndarray:
    """Mean of the values at each place, float64 [size]; nan where there are none. NaN values are left out."""
    weight = np.where(np.isnan(values), 0.0, 1.0 if weight is None else weight)
    total = np.bincount(place, weights=weight * np.nan_to_num(values), minlength=size)
    with np.errstate(invalid="ignore"):
        return total / np.bincount(place, weights=weight, minlength=size)
