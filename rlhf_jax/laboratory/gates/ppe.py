"""Which metric of a reward model predicts the policy that is made with it? The metrics of PPE on synthetic models.

An answer has a quality, a style that people like too, a length that means nothing, and now and then a trick that ruins
it. Its gold reward is what people feel; whether it is correct depends on its quality alone. Reward models see all that
with different noise, biases and weaknesses by domain, and the outcome is the gold of best-of-16 by their scores.

Source: Frick et al., "How to Evaluate Reward Models for RLHF", arXiv:2410.14872, where pairwise accuracy on human
preferences predicts best, and better where its least values over categories are taken.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit

from rlhf_jax.evaluation.judging import pair_right
from rlhf_jax.evaluation.ppe import best_of_k, confidence, pair_brier, ratings, row_correlations, win_rates
from rlhf_jax.evaluation.statistics import row, spearman
from rlhf_jax.evaluation.uncertainty import auroc
from rlhf_jax.laboratory.gates.gate import Gate
from rlhf_jax.laboratory.gates.report import Stage
from rlhf_jax.sampling.best_of_n import best_of_n_curve

SOURCE = "PPE, 2410.14872"
DOMAINS = 5
GENERATORS = 20
"""Models whose answers people compare."""
SAMPLES, PICKED_FROM = 32, 16
"""Answers to a prompt of the correctness set, and of the prompts on which policies are measured."""
TRICK_RATE, TRICK_COST, TRICK_APPEAL = 0.05, 3.0, 6.0
"""How often an answer has a trick, what it costs in gold, and what a reward model that falls for it pays."""
CERTAINTY = 2.0
"""Logit of a human preference a unit of gold."""
HUMAN = ("pairwise accuracy", "least accuracy of a domain")


class Answers(NamedTuple):
    """Answers, all fields float64 or bool of one shape [N].

    Attributes:
        quality: what makes them correct.
        style: what people like besides.
        length: what nobody should care for.
        trick: whether they have one.
        gold: what people feel.
        domain: 0 … DOMAINS - 1.
    """

    quality: Float[np.ndarray, " N"]
    style: Float[np.ndarray, " N"]
    length: Float[np.ndarray, " N"]
    trick: Bool[np.ndarray, " N"]
    gold: Float[np.ndarray, " N"]
    domain: Int[np.ndarray, " N"]


class Scorers(NamedTuple):
    """M synthetic reward models, every field [M].

    Attributes:
        quality: weight of the quality.
        style: weight of the style.
        length: weight of the length, a bias.
        noise: standard deviation of the error everywhere.
        weak: the domain in which it errs more.
        weakness: standard deviation of the error that is added there.
        broken: the domain in which it falls for tricks; -1: none.
        scale: what its scores are multiplied by.
    """

    quality: np.ndarray
    style: np.ndarray
    length: np.ndarray
    noise: np.ndarray
    weak: np.ndarray
    weakness: np.ndarray
    broken: np.ndarray
    scale: np.ndarray


def draw_answers(
    rng: np.random.Generator, domain: Int[np.ndarray, " N"], ability: Float[np.ndarray, " N"] | float = 0.0
) -> Answers:
    """Answers in the given domains, whose quality is better by `ability`."""
    quality, style, length = rng.standard_normal((3, len(domain)))
    quality, trick = quality + ability, rng.random(len(domain)) < TRICK_RATE
    return Answers(quality, style, length, trick, (quality + style) / np.sqrt(2) - TRICK_COST * trick, domain)


def draw_scorers(rng: np.random.Generator, count: int) -> Scorers:
    """Reward models of varied noise, bias and weakness; one in four has a domain in which it falls for tricks."""
    return Scorers(
        quality=rng.uniform(0.3, 1.0, count),
        style=rng.uniform(0.3, 1.0, count),
        length=rng.uniform(0.0, 0.6, count),
        noise=rng.uniform(0.3, 1.5, count),
        weak=rng.integers(DOMAINS, size=count),
        weakness=rng.uniform(0.0, 2.0, count),
        broken=np.where(rng.random(count) < 0.25, rng.integers(DOMAINS, size=count), -1),
        scale=np.exp(0.5 * rng.standard_normal(count)),
    )


def scores(rng: np.random.Generator, scorers: Scorers, answers: Answers) -> Float[np.ndarray, "M N"]:
    """What every reward model says of every answer."""
    weight = {name: value[:, None] for name, value in scorers._asdict().items()}
    seen = weight["quality"] * answers.quality + weight["style"] * answers.style + weight["length"] * answers.length
    fooled = answers.domain == weight["broken"]
    tricks = np.where(fooled, TRICK_APPEAL, -TRICK_COST * (weight["quality"] + weight["style"]) / 2) * answers.trick
    first, second = rng.standard_normal((2, *seen.shape))
    error = weight["noise"] * first + weight["weakness"] * (answers.domain == weight["weak"]) * second
    return weight["scale"] * (seen + tricks + error)


def human_metrics(rng: np.random.Generator, scorers: Scorers, battles: int, draws: int = 40) -> dict[str, np.ndarray]:
    """Metrics on human preferences between answers of two of 20 models, by name: [M], larger is better."""
    from scipy import stats

    models = np.array([rng.choice(GENERATORS, 2, replace=False) for _ in range(battles)])
    ability, domain = 0.4 * rng.standard_normal(GENERATORS), rng.integers(DOMAINS, size=battles)
    one, other = (draw_answers(rng, domain, ability[models[:, side]]) for side in (0, 1))
    people = (rng.random(battles) < expit(CERTAINTY * (one.gold - other.gold))).astype(np.float64)
    found = []
    for first, second in zip(scores(rng, scorers, one), scores(rng, scorers, other), strict=True):
        machine = pair_right(first, second)
        right = np.where(people == 1.0, machine, 1.0 - machine)
        by_domain = [right[domain == place].mean() for place in range(DOMAINS)]
        tables = [win_rates(models, winner, GENERATORS) for winner in (machine, people)]
        rated = ratings(np.stack([_wins(models, winner) for winner in (machine, people)]))
        separate, agree, brier = confidence(models, people, machine, draws).mean(axis=(1, 2))
        found.append(
            {
                HUMAN[0]: right.mean(),
                HUMAN[1]: min(by_domain),
                "row-wise Pearson": np.nanmean(row_correlations(*tables)),
                "Spearman of rankings": spearman(*rated),
                "Kendall of rankings": float(stats.kendalltau(*rated).statistic),
                "separability": separate,
                "confidence agreement": agree,
                "Brier score of rankings": -brier,
                "pair-level Brier score": -pair_brier(np.stack([first, second], axis=1), people).mean(),
            }
        )
    return {name: np.array([one[name] for one in found]) for name in found[0]}


def _wins(models: Int[np.ndarray, "N 2"], first: Float[np.ndarray, " N"]) -> Float[np.ndarray, "A A"]:
    wins = np.zeros((GENERATORS, GENERATORS))
    np.add.at(wins, (models[:, 0], models[:, 1]), first)
    np.add.at(wins, (models[:, 1], models[:, 0]), 1.0 - first)
    return wins


def correctness_metrics(rng: np.random.Generator, scorers: Scorers, prompts: int) -> dict[str, np.ndarray]:
    """Metrics on answers that are right or wrong, by name: [M], larger is better."""
    hardness = np.repeat(0.7 * rng.standard_normal(prompts), SAMPLES)
    answers = draw_answers(rng, np.repeat(rng.integers(DOMAINS, size=prompts), SAMPLES))
    correct = (answers.quality > hardness).reshape(prompts, SAMPLES).astype(np.float64)
    share = correct.mean(axis=1)
    kept = (share >= 0.1) & (share <= 0.9)
    correct, oracle = correct[kept], best_of_k(correct[kept], correct[kept])
    found = []
    for one in scores(rng, scorers, answers).reshape(-1, prompts, SAMPLES)[:, kept]:
        right = [
            pair_right(s[c == 1.0][: (c == 0.0).sum()], s[c == 0.0][: (c == 1.0).sum()])
            for s, c in zip(one, correct, strict=True)
        ]
        curve = best_of_k(one, correct)
        found.append(
            {
                "accuracy on conflict pairs": np.concatenate(right).mean(),
                "ROC-AUC": np.mean([auroc(s[c == 0.0], s[c == 1.0]) for s, c in zip(one, correct, strict=True)]),
                "largest best-of-k score": curve.mean(axis=0).max(),
                "end score": curve.mean(axis=0)[-1],
                "loss": -((oracle - curve).mean(axis=0) ** 2).mean(),
            }
        )
    return {name: np.array([one[name] for one in found]) for name in found[0]}


def outcomes(rng: np.random.Generator, scorers: Scorers, prompts: int) -> Float[np.ndarray, " M"]:
    """Expected gold of best-of-16 by every reward model, on fresh prompts."""
    answers = draw_answers(rng, np.repeat(rng.integers(DOMAINS, size=prompts), PICKED_FROM))
    gold = answers.gold.reshape(prompts, PICKED_FROM)
    each = scores(rng, scorers, answers).reshape(-1, prompts, PICKED_FROM)
    return np.array([best_of_n_curve(one, gold, [PICKED_FROM]).gold[0] for one in each])


def predictors(seeds: int, models: int = 9, battles: int = 4000, prompts: int = 400) -> Stage:
    """Spearman correlation over reward models of every metric with best-of-16 gold.

    Args:
        seeds: worlds, each with reward models of its own.
        models: reward models of a world.
        battles: human preferences.
        prompts: of the correctness set, and to measure policies on.
    """
    each = []
    for rng in np.random.default_rng(2).spawn(seeds):
        scorers = draw_scorers(rng, models)
        metrics = human_metrics(rng, scorers, battles) | correctness_metrics(rng, scorers, prompts)
        outcome = outcomes(rng, scorers, prompts)
        # A metric that is the same for all models predicts nothing.
        each.append({name: np.nan_to_num(spearman(values, outcome)) for name, values in metrics.items()})
    found = {name: np.array([one[name] for one in each]) for name in each[0]}
    best = max(HUMAN, key=lambda name: found[name].mean())
    rival = max((name for name in found if name not in HUMAN), key=lambda name: found[name].mean())
    gates = [
        Gate(
            f"Spearman with best-of-{PICKED_FROM} gold: {best} less {rival} (the best other metric)",
            SOURCE,
            found[best] - found[rival],
            low=0.0,
        )
    ]
    rows = [
        row(f"Spearman of {name} with best-of-{PICKED_FROM} gold, {models} reward models", "1", values)
        for name, values in sorted(found.items(), key=lambda item: -item[1].mean())
    ]
    return Stage(gates, rows)


def broken_domain(seeds: int, battles: int = 4000, prompts: int = 1000) -> Stage:
    """A precise reward model that falls for tricks in one domain, beside one with more noise that never does.

    Args:
        seeds: repetitions.
        battles: human preferences.
        prompts: to measure policies on.
    """
    same, noise = np.ones(2), np.array([1.0, 0.6])
    none = np.zeros(2)
    scorers = Scorers(same, same, none, noise, none.astype(int), none, np.array([-1, 0]), same)
    accuracy, least, outcome = [], [], []
    for rng in np.random.default_rng(3).spawn(seeds):
        metrics = human_metrics(rng, scorers, battles, draws=2)
        accuracy.append(metrics[HUMAN[0]])
        least.append(metrics[HUMAN[1]])
        outcome.append(outcomes(rng, scorers, prompts))
    accuracy, least, outcome = (np.diff(np.array(one), axis=1)[:, 0] for one in (accuracy, least, outcome))
    compared = "one broken domain less one with more noise"
    return Stage(
        [
            Gate(f"pairwise accuracy: {compared}", SOURCE, accuracy, low=0.0),
            Gate(f"least accuracy of a domain: {compared}", SOURCE, least, high=0.0),
            Gate(f"best-of-{PICKED_FROM} gold: {compared}", SOURCE, outcome, high=0.0),
        ]
    )
