"""The twelve metrics of PPE (Preference Proxy Evaluations): how well a reward model stands in for people and for truth.

Human preference set, battles of two models: 1 pairwise accuracy; of the rankings of models that the scores and the
people imply: 2 row-wise Pearson, 3 Spearman, 4 Kendall, 5 separability, 6 confidence agreement, 7 Brier score.
Correctness set, K completions a prompt that are right or wrong: 8 accuracy on conflict pairs, 9 ROC-AUC, and of the
best-of-k curve S(k): 10 largest, 11 end score S(K), 12 squared loss to the oracle's curve.

All twelve read only which score of a prompt is larger, so they stay under increasing transforms; whether margins are
calibrated is for `pair_brier` and `calibration.reliability` to say. Metrics 2–7 need ten models or more.

Source: Frick et al., "How to Evaluate Reward Models for RLHF", 2410.14872; 5–7 as defined for Arena-Hard, 2406.11939.
The average over rows in 2, over prompts in 9 and the mean square in 12 are this package's reading of the paper.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit

from rlhf_jax.evaluation.calibration import reliability
from rlhf_jax.evaluation.judging import Labels, Rows, pair_right
from rlhf_jax.evaluation.statistics import bootstrap_rows, pearson, spearman
from rlhf_jax.evaluation.uncertainty import auroc
from rlhf_jax.sampling.best_of_n import best_of_n_curve

PRIOR = 0.01


class Battles(NamedTuple):
    """Comparisons of two models' answers to one prompt.

    Attributes:
        models: index of the first and the second model, int [N, 2].
        first: 1 where people prefer the first answer, 0 the second, ½ neither, float [N].
        scores: of the first and the second answer, float [N, 2].
    """

    models: Int[np.ndarray, "N 2"]
    first: Float[np.ndarray, " N"]
    scores: Float[np.ndarray, "N 2"]


def win_rates(models: Int[np.ndarray, "N 2"], first: Float[np.ndarray, " N"], size: int) -> Float[np.ndarray, "A A"]:
    """How often model a wins against model b, a tie half; nan where they never meet, and on the diagonal.

    Args:
        models: int [N, 2].
        first: 1 where the first wins, 0 the second, ½ neither, float [N].
        size: number of models A.
    """
    wins = _wins(models, first, size)
    with np.errstate(invalid="ignore"):
        return np.where(np.eye(size, dtype=bool), np.nan, wins / (wins + wins.T))


def ratings(wins: Float[np.ndarray, "*draws A A"], prior: float = PRIOR) -> Float[np.ndarray, "*draws A"]:
    """Bradley-Terry ratings of models by penalised maximum likelihood, with mean 0.

    Maximises `Σ_ab wins_ab log sigmoid(R_a − R_b) − prior/2 Σ_a R_a²` by Newton's method; the prior makes the optimum
    finite where a model wins always, and unique where models never meet.

    Args:
        wins: wins of a over b (half of each tie), float [*draws, A, A]; leading axes are fitted side by side.
        prior: weight of the quadratic penalty, above 0.

    Returns:
        float64 [*draws, A].

    Raises:
        ValueError: the prior is not above 0, or Newton's method does not converge.

    Example:
        >>> wins = np.array([[0.0, 300.0], [100.0, 0.0]])
        >>> (lambda r: round(float(r[0] - r[1]), 3))(ratings(wins, 1e-9))  # log 3
        1.099
    """
    if not prior > 0.0:
        raise ValueError(f"the prior of the ratings must be above 0; it is {prior}")
    games = wins + np.swapaxes(wins, -1, -2)
    rating = np.zeros(wins.shape[:-1])
    for _ in range(100):
        chance = expit(rating[..., :, None] - rating[..., None, :])
        gradient = (wins - games * chance).sum(axis=-1) - prior * rating
        weight = games * chance * (1.0 - chance)
        hessian = -weight + (weight.sum(axis=-1) + prior)[..., :, None] * np.eye(wins.shape[-1])
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        rating += step * np.minimum(1.0, 1.0 / np.maximum(np.abs(step).max(axis=-1, keepdims=True), 1e-300))
        if np.abs(step).max(initial=0.0) < 1e-9:
            return rating
    raise ValueError("the ratings did not converge in 100 steps; raise the prior")


def human_rows(battles: Battles, domain: Labels | None = None, draws: int = 200, prompt: Any = None) -> Rows:
    """Rows of metrics 1–7 on the human preference set.

    Intervals of metric 1 resample battles (prompts), those of metrics 2–7 models. (A correlation of rankings that are
    refitted on resampled battles is biased downwards by the noise that resampling adds.)

    Args:
        battles: the comparisons.
        domain: domain of each battle (language, category), for accuracy by domain, its mean and its least; or None.
        draws: bootstrap draws of the ratings, for metrics 5–7.
        prompt: the prompt of each battle, if prompts with several are to be resampled.

    Raises:
        ValueError: no battle has a winner, fewer than three models, or as `pair_right`.
    """
    models, people, scores = battles
    size, decided = int(models.max()) + 1, people != 0.5
    if not decided.any() or size < 3:
        raise ValueError("human preferences need battles with a winner between at least three models")
    chosen, rejected = _ordered(scores, people)[decided].T
    right, groups = pair_right(chosen, rejected), None if prompt is None else np.asarray(prompt)[decided]
    machine = pair_right(scores[:, 0], scores[:, 1])
    rows = bootstrap_rows(["1 pairwise accuracy"], "", np.mean, right, groups=groups)
    if domain is not None:
        rows += domain_rows("1 pairwise accuracy", right, np.asarray(domain)[decided], groups)

    first = machine, people
    a, b = ratings(np.stack([_wins(models, side, size) for side in first]))
    rows_alike = row_correlations(*(win_rates(models, side, size) for side in first))
    tables, (order, truth) = confidence(models, people, machine, draws), (np.sign(r[:, None] - r) for r in (a, b))

    # Kendall's τ_b is the cosine of the two tables of signs, over ordered pairs of models.
    def over_models(chosen: np.ndarray) -> list[float]:
        pick, known = np.ix_(chosen, chosen), ~np.isnan(rows_alike[chosen])
        apart = chosen[:, None] != chosen[None, :]
        pairs = [float(table[pick][apart].mean()) if apart.any() else np.nan for table in tables]
        scale = (order[pick] ** 2).sum() * (truth[pick] ** 2).sum()
        ranks = [spearman(a[chosen], b[chosen]), (order * truth)[pick].sum() / np.sqrt(scale) if scale else np.nan]
        return [float(rows_alike[chosen][known].mean()) if known.any() else np.nan, *ranks, *pairs]

    names = ["2 row-wise Pearson correlation", "3 Spearman correlation of rankings"]
    names += [
        "4 Kendall correlation of rankings",
        "5 separability",
        "6 confidence agreement",
        "7 Brier score of rankings",
    ]
    return rows + bootstrap_rows(names, "", over_models, np.arange(size))


def battle_calibration_rows(battles: Battles, prompt: Any = None) -> Rows:
    """Rows of the Brier score and the ECE of sigmoid(margin) on the battles; for scores whose margins are log-odds.

    Args:
        battles: the comparisons; the ECE is over those with a winner.
        prompt: as in `human_rows`.

    Raises:
        ValueError: no battle has a winner, or a score is not finite.
    """
    _, people, scores = battles
    decided = people != 0.5
    chosen, rejected = _ordered(scores, people)[decided].T
    margin = np.subtract(chosen, rejected, dtype=np.float64)
    groups = None if prompt is None else np.asarray(prompt)
    rows = bootstrap_rows(["pair-level Brier score"], "", np.mean, pair_brier(scores, people), groups=groups)
    inside = None if groups is None else groups[decided]
    return rows + bootstrap_rows(
        ["pair-level ECE"], "", lambda part: reliability(part).expected_error, margin, groups=inside
    )


def confidence(
    models: Int[np.ndarray, "N 2"], people: Float[np.ndarray, " N"], machine: Float[np.ndarray, " N"], draws: int = 200
) -> Float[np.ndarray, "3 A A"]:
    """Metrics 5–7 of each pair of models, from bootstraps over battles.

    Separated: the 95 % intervals of the two ratings do not overlap, by the scores. Confidence agreement: 1 where scores
    and people both separate the two and agree, −1 where they disagree, 0 else. Brier score: `(P(a above b) − truth)²`,
    where P is the share of bootstrap ratings by the scores (ties half) and truth is 1 where people rate a above b.

    Args:
        models: int [N, 2].
        people: who wins by the people, float [N].
        machine: who wins by the scores, float [N].
        draws: number of bootstrap draws.

    Returns:
        The three symmetric tables, float64 [3, A, A]; means over pairs of models are the metrics.
    """
    rng, size = np.random.default_rng(0), int(models.max()) + 1
    sides = []
    for first in (machine, people):
        picks = rng.integers(len(models), size=(draws, len(models)))
        drawn = ratings(np.stack([_wins(models[pick], first[pick], size) for pick in picks]))
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        above = (low[:, None] > high[None, :]).astype(np.float64)
        sides.append((drawn, above - above.T))
    (drawn, ours), (_, theirs) = sides
    truth = ratings(_wins(models, people, size))
    known = pair_right(*np.broadcast_arrays(truth[:, None], truth[None, :]))
    share = pair_right(*np.broadcast_arrays(drawn[:, :, None], drawn[:, None, :])).mean(axis=0)
    return np.stack([np.abs(ours), ours * theirs, (share - known) ** 2])


def row_correlations(a: Float[np.ndarray, "A A"], b: Float[np.ndarray, "A A"]) -> Float[np.ndarray, " A"]:
    """Pearson correlation of each model's win rates against the others, in two tables.

    Rates that either table lacks (nan) are left out; a correlation that is not defined is nan. Metric 2 is the mean of
    the others.
    """
    known = ~(np.isnan(a) | np.isnan(b))
    return np.array([pearson(one[k], other[k]) for one, other, k in zip(a, b, known, strict=True)], np.float64)


def pair_brier(scores: Float[np.ndarray, "N 2"], first: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Squared error of sigmoid(margin) as the probability that the first answer is preferred; not scale-free.

    Example:
        >>> pair_brier(np.array([[1.0, 1.0]]), np.array([1.0])).tolist()
        [0.25]
    """
    return (expit(scores[:, 0].astype(np.float64) - scores[:, 1]) - first) ** 2


def best_of_k(scores: Float[np.ndarray, "Q K"], gold: Float[np.ndarray, "Q K"]) -> Float[np.ndarray, "Q K"]:
    """Expected gold of the best by score out of a random k of K completions, for k = 1 … K.

    Scores that tie share the mean of their gold, so that the curve is the exact expectation over the order of ties; it
    ends at the mean gold of the completions of the largest score.

    Args:
        scores: float [Q, K].
        gold: of the same completions (1 right, 0 wrong), float [Q, K].

    Returns:
        S(k) of each prompt, float64 [Q, K]; S(1) is the mean gold.

    Source: the estimator of `sampling.best_of_n`.

    Example:
        >>> best_of_k(np.array([[0.0, 2.0, 2.0]]), np.array([[0.0, 1.0, 0.0]])).round(4).tolist()
        [[0.3333, 0.5, 0.5]]
    """
    shared = np.empty(gold.shape)
    for place, (one, other) in enumerate(zip(scores, gold, strict=True)):
        block, count = np.unique(one, return_inverse=True, return_counts=True)[1:]
        shared[place] = (np.bincount(block, weights=other) / count)[block]
    return best_of_n_curve(scores, shared, range(1, scores.shape[1] + 1)).gold_by_prompt.T


def correctness_rows(
    scores: Float[np.ndarray, "Q K"],
    correct: Float[np.ndarray, "Q K"],
    pairs: Sequence[Int[np.ndarray, "_ 2"]],
    domain: Labels | None = None,
    prompt: Any = None,
) -> Rows:
    """Rows of metrics 8–12 on the correctness set, with intervals over prompts.

    Args:
        scores: of K completions a prompt, float [Q, K].
        correct: 1 where the completion is right, 0 where not, float [Q, K].
        pairs: conflict pairs of each prompt, int [pairs, 2]: one right and one wrong completion in either order.
        domain: of each prompt; with it, every metric by domain, its mean and its worst over domains. Or None.
        prompt: the prompt of each of the Q rows, if some are of one prompt (the set has four models' completions of
            each) and prompts are to be resampled, [Q].

    Raises:
        ValueError: no prompts, a pair whose two completions are equally right, or a score that is not finite.
    """
    if not len(scores):
        raise ValueError("the correctness set has no prompts")
    ranked = [_conflicts(*parts, place) for place, parts in enumerate(zip(scores, correct, pairs, strict=True))]
    won, count = np.array([(float(one.sum()), float(one.size)) for one in ranked]).T
    area = np.array([auroc(s[c == 0.0], s[c > 0.0]) for s, c in zip(scores, correct, strict=True)])
    curve, oracle = best_of_k(scores, correct), best_of_k(correct, correct)
    names = ["8 accuracy on conflict pairs", "9 ROC-AUC", "10 largest best-of-k score", "11 end score", "12 loss"]

    def statistic(won: np.ndarray, count: np.ndarray, area: np.ndarray, curve: np.ndarray, oracle: np.ndarray) -> Any:
        if not won.size:
            return np.full(5, np.nan)
        mean, gap = curve.mean(axis=0), (oracle - curve).mean(axis=0)
        accuracy = won.sum() / count.sum() if count.sum() else np.nan
        known = ~np.isnan(area)
        return np.array(
            [accuracy, area[known].mean() if known.any() else np.nan, mean.max(), mean[-1], (gap**2).mean()]
        )

    data = won, count, area, curve, oracle
    rows = bootstrap_rows(names, "", statistic, *data, groups=prompt)
    if domain is None:
        return rows
    labels, place = np.unique(np.asarray(domain), return_inverse=True)

    def by_domain(place: np.ndarray, *data: np.ndarray) -> np.ndarray:
        table = np.stack([statistic(*(part[place == one] for part in data)) for one in range(labels.size)])
        least = np.append(np.nanmin(table[:, :4], axis=0), np.nanmax(table[:, 4]))
        return np.stack([*table, np.nanmean(table, axis=0), least]).ravel()

    places = [*labels, "mean over domains", "worst domain"]
    full = [f"{name}: {one}" for one in places for name in names]
    return rows + bootstrap_rows(full, "", by_domain, place, *data, groups=prompt)


def domain_rows(name: str, values: Float[np.ndarray, " n"], domain: Labels, prompt: Any = None) -> Rows:
    """Rows with the mean by domain, the mean over domains, and the least and the lower quartile of domains.

    The low quantiles predict what a policy trained on the scores is worth better than the mean does (the paper).

    Args:
        name: what is measured.
        values: larger is better, float [n].
        domain: of each value, [n].
        prompt: the prompt of each value, if prompts with several are to be resampled.
    """
    labels, place = np.unique(np.asarray(domain), return_inverse=True)

    def statistic(values: np.ndarray, place: np.ndarray) -> np.ndarray:
        count = np.bincount(place, minlength=labels.size)
        means = np.bincount(place, weights=values, minlength=labels.size)[count > 0] / count[count > 0]
        full = np.full(labels.size, np.nan)
        full[count > 0] = means
        return np.concatenate([full, [means.mean(), means.min(), np.quantile(means, 0.25)]])

    names = [*labels, "mean over domains", "least domain", "lower quartile of domains"]
    return bootstrap_rows([f"{name}: {one}" for one in names], "", statistic, values, place, groups=prompt)


def _wins(models: np.ndarray, first: np.ndarray, size: int) -> np.ndarray:
    """Wins of a over b, half for a tie, float64 [A, A]."""
    places = np.concatenate([models @ (size, 1), models @ (1, size)])
    return np.bincount(places, weights=np.concatenate([first, 1.0 - first]), minlength=size**2).reshape(size, size)


def _ordered(scores: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Scores with that of the preferred answer in front."""
    return np.where((first > 0.5)[:, None], scores, scores[:, ::-1])


def _conflicts(scores: np.ndarray, correct: np.ndarray, pairs: np.ndarray, prompt: int) -> np.ndarray:
    order = correct[pairs]
    if (order[:, 0] == order[:, 1]).any():
        raise ValueError(f"a conflict pair of prompt {prompt} does not have one right and one wrong completion")
    return pair_right(*_ordered(scores[pairs], order[:, 0]).T)
