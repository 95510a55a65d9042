"""The numbers that each benchmark of reward models reports of itself, by its own rule, from the scores of a file."""

import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.judging import (
    Rows,
    best_right,
    pair_right,
    reward_bench_2_rows,
    reward_bench_rows,
    rm_bench_rows,
    rmb_rows,
)
from rlhf_jax.evaluation.ppe import Battles, correctness_rows, human_rows
from rlhf_jax.evaluation.sheets import Sheet
from rlhf_jax.evaluation.verdicts import majority, three_way, three_way_rows


def official_rows(asked: Sheet, mean: Float[np.ndarray, " N"]) -> Rows:
    """The numbers that a benchmark reports, by its own rule; none for a format without one, or where rows are missing.

    Ties are those of `judging`. The threshold below which PandaLM's and Auto-J's margins are a tie is chosen on
    a random half of the prompts for the other one. Of RewardBench 2 and PPE, intervals are over rows.
    """
    scores, gold = asked.by_row(mean), asked.by_row(asked.gold)
    of = [row.slices for row in asked.rows]
    strict = pair_right(mean[asked.better], mean[asked.worse], "strict")
    if asked.format == "reward_bench":
        return reward_bench_rows(
            strict, *([one[name] for one in of] for name in ("subset", "section")), asked.row_groups
        )
    if asked.format == "reward_bench_2":
        return _reward_bench_2(asked, scores, gold)
    if asked.format == "rm_bench":
        table = np.stack(scores)
        return rm_bench_rows(table[:, :3], table[:, 3:], [one["domain"] for one in of], asked.row_groups)
    if asked.format.startswith("rmb"):
        leaf, goal = ([one[name] for one in of] for name in ("category", "subset"))
        pairs, none = (strict, leaf, goal), (np.zeros(0), [], [])
        best = (best_right(scores, gold, "strict"), leaf, goal)
        both = (pairs, none) if asked.format == "rmb_pairwise" else (none, best)
        return rmb_rows(*both[0], *both[1], asked.row_groups)
    if asked.format in ("pandalm", "auto_j"):
        return _three_way(asked, np.array([one[0] - one[1] for one in scores]))
    if asked.format == "ppe_human":
        names = [[row.extra.get(side) for side in ("model_a", "model_b")] for row in asked.rows]
        models = np.unique(np.array(names, str), return_inverse=True)[1].reshape(-1, 2)
        if models.max() < 2 or not asked.better.size:
            return []
        domain = [one.get("language", "") for one in of]
        return _named("PPE", human_rows(Battles(models, np.array([one[0] for one in gold]), np.stack(scores)), domain))
    if asked.format == "ppe_correctness" and len({one.size for one in scores}) == 1:
        domain = [one.get("category", one.get("file", "")) for one in of]
        pairs = [np.array(row.pairs, np.int64).reshape(-1, 2) for row in asked.rows]
        several = domain if len(set(domain)) > 1 else None
        return _named("PPE", correctness_rows(np.stack(scores), np.stack(gold), pairs, several))
    return []


def _named(prefix: str, rows: Rows) -> Rows:
    return [row | {"name": f"{prefix}: {row['name']}"} for row in rows]


def _reward_bench_2(asked: Sheet, scores: list, gold: list) -> Rows:
    subset = np.array([row.slices["subset"] for row in asked.rows])
    ids = [str(row.extra.get("id")) for row in asked.rows]
    tied = {
        name.partition(":")[2]
        for name, one in zip(ids, subset, strict=True)
        if one == "Ties" and name.startswith("tied:")
    }
    whole = any(name.removeprefix("ref:") in tied for name in ids if name.startswith("ref:"))
    kept = [i for i, one in enumerate(subset) if one != "Ties" or whole]
    if not kept:
        return []
    parts = ([part[i] for i in kept] for part in (scores, gold, subset, ids))
    return reward_bench_2_rows(*parts)


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
