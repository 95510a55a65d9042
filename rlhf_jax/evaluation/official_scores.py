"""The numbers that each benchmark of reward models reports of itself, by its own rule, from the scores of a file."""

from collections.abc import Sequence

import numpy as np

from rlhf_jax.evaluation.judging import (
    Rows,
    best_right,
    pair_right,
    reward_bench_2_rows,
    reward_bench_rows,
    rm_bench_rows,
    rmb_rows,
    ties_pairs,
)
from rlhf_jax.evaluation.ppe import Battles, battle_calibration_rows, correctness_rows, human_rows
from rlhf_jax.evaluation.sheets import Scores, Sheet, margins
from rlhf_jax.evaluation.verdicts import majority, three_way, three_way_rows

RMB = ("rmb_pairwise", "rmb_best_of_n")
"""The formats of RMB, pairs first."""


def official_rows(asked: Sheet, answered: Scores) -> Rows:
    """The numbers that a benchmark reports, by its own rule; none for a format without one, or where rows are missing.

    Ties are those of `judging`. The threshold below which PandaLM's and Auto-J's margins are a tie is chosen on
    a random half of the prompts for the other one. RMB's score is over all of its files, see `rmb_score_rows`.
    """
    scores, gold = asked.by_row(answered.mean), asked.by_row(asked.gold)
    of = [row.slices for row in asked.rows]
    margin = margins(asked, answered)
    strict = pair_right(margin, np.zeros_like(margin), "strict")
    if asked.format == "reward_bench":
        return reward_bench_rows(
            strict, *([one[name] for one in of] for name in ("subset", "section")), asked.row_groups
        )
    if asked.format == "reward_bench_2":
        return _reward_bench_2(asked, scores, gold)
    if asked.format == "rm_bench":
        table = np.stack(scores)
        return rm_bench_rows(table[:, :3], table[:, 3:], [one["domain"] for one in of], asked.row_groups)
    if asked.format in RMB:
        return _rmb([asked], [answered], asked.row_groups)
    if asked.format in ("pandalm", "auto_j"):
        return _three_way(asked, np.array([one[0] - one[1] for one in scores]))
    if asked.format == "ppe_human":
        names = [[row.extra.get(side) for side in ("model_a", "model_b")] for row in asked.rows]
        models = np.unique(np.array(names, str), return_inverse=True)[1].reshape(-1, 2)
        if models.max() < 2 or not asked.better.size:
            return []
        domain = [one.get("language", "") for one in of]
        battles = Battles(models, np.array([one[0] for one in gold]), np.stack(scores))
        rows = human_rows(battles, domain, prompt=asked.row_groups)
        rows += battle_calibration_rows(battles, asked.row_groups) if answered.states == "log_odds" else []
        return _named("PPE", rows)
    if asked.format == "ppe_correctness" and len({one.size for one in scores}) == 1:
        domain = [one.get("category", one.get("file", "")) for one in of]
        pairs = [np.array(row.pairs, np.int64).reshape(-1, 2) for row in asked.rows]
        several = domain if len(set(domain)) > 1 else None
        return _named("PPE", correctness_rows(np.stack(scores), np.stack(gold), pairs, several, asked.row_groups))
    return []


def rmb_score_rows(asked: Sequence[Sheet], answered: Sequence[Scores]) -> Rows:
    """RMB's own score, over all of its files together: two goals, by pairs and by best of n, and the mean of the four.

    Source: Zhou et al., "RMB: Comprehensively Benchmarking Reward Models in LLM Alignment", 2410.09893.

    Args:
        asked: sheets, of which those of other formats are left out.
        answered: one model's scores of each.

    Returns:
        The four means over leaf categories, their mean, and that over all rows; none for a single file, whose own rows
        say the same. Where some of the four are not there, the name of the mean says so.
    """
    inside = [i for i, one in enumerate(asked) if one.format in RMB]
    if len(inside) < 2:
        return []
    prompts = [repr(row.prompt) for i in inside for row in asked[i].rows]
    rows = _rmb([asked[i] for i in inside], [answered[i] for i in inside], np.array(prompts))
    name = (
        "RMB score, mean of the four" if len(rows) == 6 else f"RMB, mean of the {len(rows) - 2} of four that are there"
    )
    return [row | {"name": name} if row["name"] == "RMB, mean over groups" else row for row in rows]


def _rmb(asked: Sequence[Sheet], answered: Sequence[Scores], prompt: np.ndarray | None) -> Rows:
    """Rows of RMB; its pairs come first, and `prompt` is in the order of the sheets."""
    sets, place = {name: ([], [], []) for name in RMB}, {name: [] for name in RMB}
    ends = np.cumsum([0, *(len(one.rows) for one in asked)])
    for one, scores, start in zip(asked, answered, ends[:-1], strict=True):
        right = best_right(one.by_row(scores.mean), one.by_row(one.gold), "strict")
        leaf, goal = ([row.slices[name] for row in one.rows] for name in ("category", "subset"))
        for column, values in zip(sets[one.format], (right.tolist(), leaf, goal), strict=True):
            column += values
        place[one.format] += range(start, start + len(one.rows))
    pairs, best = ((np.array(right, np.float64), leaf, goal) for right, leaf, goal in sets.values())
    groups = None if prompt is None else prompt[[i for part in place.values() for i in part]]
    return rmb_rows(*pairs, *best, groups)


def _named(prefix: str, rows: Rows) -> Rows:
    return [row | {"name": f"{prefix}: {row['name']}"} for row in rows]


def _reward_bench_2(asked: Sheet, scores: list, gold: list) -> Rows:
    subset = np.array([row.slices["subset"] for row in asked.rows])
    ids = [str(row.extra.get("id")) for row in asked.rows]
    whole = ties_pairs([name for name, one in zip(ids, subset, strict=True) if one == "Ties"])
    kept = [i for i, one in enumerate(subset) if one != "Ties" or whole]
    if not kept:
        return []
    parts = ([part[i] for i in kept] for part in (scores, gold, subset, ids))
    return reward_bench_2_rows(*parts, None if asked.row_groups is None else asked.row_groups[kept])


def _three_way(asked: Sheet, margin: np.ndarray) -> Rows:
    """The threshold for a tie is that of the best agreement on the other half of the prompts."""
    votes = [row.votes for row in asked.rows]
    if all(votes) and len(set(map(len, votes))) == 1:
        label = majority(np.array(votes))
    else:
        label = np.array(
            [0 if row.gold[0] == row.gold[1] else 1 + int(row.gold[1] > row.gold[0]) for row in asked.rows]
        )
    prompts = int(asked.prompt.max()) + 1
    if prompts < 2 or (label < 0).all():
        return []
    # Rows of one prompt stay together: a threshold is not tried on prompts that it was chosen on.
    half, scaled = (np.random.default_rng(0).permutation(prompts) % 2)[asked.prompt], np.empty_like(margin)
    for side in (0, 1):
        other = half != side
        tried = np.unique(np.append(0.0, np.abs(margin[other])))
        agreement = [(three_way(margin[other], float(one)) == label[other]).mean() for one in tried]
        scaled[half == side] = margin[half == side] / max(float(tried[int(np.argmax(agreement))]), 1e-9)
    return three_way_rows(scaled, label, 1.0, asked.row_groups)
