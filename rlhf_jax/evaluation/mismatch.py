"""Objective mismatch: do better reward models make better policies, and do higher rewards mean better answers?

Three links of RLHF, each a set of correlations over checkpoints: reward model to policy training, reward model to
evaluation, policy training to evaluation. None of them is sure to be high: validation loss of a reward model says
little about the policy trained on it (Coste et al. 2310.02743), and the proxy reward rises on after gold has fallen.

Source: Lambert and Calandra, "The Alignment Ceiling", 2311.00168 (a position paper; the diagnostics are made here).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.calibration import reliability
from rlhf_jax.evaluation.judging import Labels
from rlhf_jax.evaluation.statistics import bootstrap_rows, pearson, spearman

Column = Float[np.ndarray, " _"] | Float[np.ndarray, "_ _"]
Columns = Mapping[str, Column]
Numbers = Float[np.ndarray, " n"]
Rows = list[dict[str, Any]]


def mismatch_report(reward_model: Columns, training: Columns, evaluation: Columns, draws: int = 2000) -> Rows:
    """Correlations between what is measured of reward models, of policy training, and of the trained policies.

    Spearman and Pearson correlation of each column of one link with each of the next, with bootstrap intervals. Rank
    correlations stay under increasing transforms of a column, Pearson under affine ones, and the whole report under the
    order of rows, intervals included (rows are put into an order of their own before they are drawn).

    Args:
        reward_model: columns such as accuracy, ECE or validation loss of the reward model of each run.
        training: such as final proxy reward, or KL.
        evaluation: such as gold, win rate, accuracy on another task.
            Each column is float [runs], or [runs, checkpoints] where a run left several: whole runs are resampled, as
            checkpoints of one run are not independent. A table may be empty. nan marks what was not measured; a
            correlation leaves those out.
        draws: bootstrap draws.

    Returns:
        Rows "Spearman, A ~ B" and "Pearson, A ~ B" by link; the mean is nan where a correlation is not defined.

    Raises:
        ValueError: columns of different shapes, fewer than three runs, a number that is infinite, or no two tables with
            a column.
    """
    tables = {"reward model": reward_model, "training": training, "evaluation": evaluation}
    columns = [column for table in tables.values() for column in table.values()]
    if len({column.shape for column in columns}) > 1:
        shapes = {f"{kind} {name}": table[name].shape for kind, table in tables.items() for name in table}
        raise ValueError(f"every column has one number a run (and checkpoint); the shapes are {shapes}")
    if sum(bool(table) for table in tables.values()) < 2:
        raise ValueError("a correlation needs columns in two of the tables (reward model, training, evaluation)")
    if len(columns[0]) < 3 or any(np.isinf(column).any() for column in columns):
        raise ValueError(f"correlations need three runs of finite numbers or more; there are {len(columns[0])} runs")
    keys = np.stack([column.reshape(len(column), -1)[:, ::-1] for column in columns], axis=2)
    order = np.lexsort(keys.reshape(len(keys), -1).T)
    links = (("reward model", "training"), ("reward model", "evaluation"), ("training", "evaluation"))
    pairs = [
        (f"{one} {a}", tables[one][a], f"{other} {b}", tables[other][b])
        for one, other in links
        for a in tables[one]
        for b in tables[other]
    ]
    names = [f"{kind}, {one} ~ {other}" for one, _, other, _ in pairs for kind in ("Spearman", "Pearson")]

    def statistic(runs: np.ndarray) -> list[float]:
        return [number for _, a, _, b in pairs for number in _correlations(a[runs].ravel(), b[runs].ravel())]

    return bootstrap_rows(names, "", statistic, order, draws=draws)


def first_divergence(
    proxy: Float[np.ndarray, " steps"], gold: Float[np.ndarray, " steps"], margin: int | float = 0.0
) -> int | None:
    """The first checkpoint where proxy reward and gold part: gold has fallen from its peak, and proxy has risen since.

    `gold_t < gold_p − margin` and `proxy_t > proxy_p`, where p is the peak of gold before t.

    Args:
        proxy: along training, float [steps].
        gold: at the same checkpoints, float [steps].
        margin: a fall that noise may make; twice the standard error of gold, say.

    Returns:
        Its index, or None where there is none.

    Example:
        >>> first_divergence(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.9, 0.2]), 0.5)
        3
    """
    peak = 0
    for step in range(len(gold)):
        if gold[step] > gold[peak]:
            peak = step
        elif gold[step] < gold[peak] - margin and proxy[step] > proxy[peak]:
            return step
    return None


def by_divergence_rows(
    kl: Numbers,
    margin: Numbers,
    edges: Float[np.ndarray, " bins_and_one"],
    spread: Numbers | None = None,
    groups: Any = None,
) -> Rows:
    """Rows on pairs of a policy's own responses: accuracy and calibration of the scores by KL from the initial policy.

    Args:
        kl: KL of the policy that made each pair, in nats, float [n].
        margin: score of the response that gold prefers less that of the other, float [n].
        edges: bounds of the bins of KL, ascending, float [bins + 1]; pairs outside are left out. A bin has its lower
            bound, the last one both.
        spread: disagreement of reward models on each pair (`uncertainty.margin_spread`), float [n]; or None.
        groups: the prompt of each pair, if prompts are to be resampled.

    Returns:
        For each bin with pairs: accuracy (a tie half), expected calibration error, and mean disagreement.
    """
    place, rows = np.where(kl == edges[-1], edges.size - 1, np.digitize(kl, edges)), []
    for one in range(1, edges.size):
        inside = place == one
        if not inside.any():
            continue
        names = ["accuracy", "ECE"] + (["disagreement"] if spread is not None else [])
        names = [f"{name}, KL {edges[one - 1]:g} to {edges[one]:g}" for name in names]

        def statistic(margin: np.ndarray, *spread: np.ndarray) -> list[float]:
            accuracy = float((1.0 + np.sign(margin)).mean() / 2.0)
            return [accuracy, reliability(margin).expected_error, *(float(part.mean()) for part in spread)]

        data = [part[inside] for part in (margin, spread) if part is not None]
        part = None if groups is None else np.asarray(groups)[inside]
        rows += bootstrap_rows(names, "", statistic, *data, groups=part)
    return rows


def category_rows(rewards: Numbers, category: Labels) -> Rows:
    """Rows with mean and standard deviation of the reward in each category, which show where its scale is uneven.

    Args:
        rewards: of responses, float [n].
        category: of each prompt, [n].
    """
    names, place = np.unique(np.asarray(category), return_inverse=True)
    rows: Rows = []
    for one, name in enumerate(names):
        titles = [f"mean reward: {name}", f"s.d. of the reward: {name}"]
        rows += bootstrap_rows(
            titles, "reward", lambda r: (r.mean(), r.std()), rewards[place == one].astype(np.float64)
        )
    return rows


def _correlations(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    known = ~(np.isnan(a) | np.isnan(b))
    return spearman(a[known], b[known]), pearson(a[known], b[known])
