"""Does a benchmark of pairs and lists predict best-of-n? Synthetic reward models with a gold reward, and voting judges.

The claims of RMB (Zhou et al., "RMB: Comprehensively Benchmarking Reward Models in LLM Alignment", arXiv:2410.09893):
reward models rank by their benchmark as the policies rank that are made with them; lists say at least as much as pairs
where reward models differ in their worst errors; votes help where a judge's errors are noise, and only there.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from rlhf_jax.evaluation.statistics import row, spearman
from rlhf_jax.evaluation.verdicts import voting_accuracy
from rlhf_jax.laboratory.gates.gate import Gate
from rlhf_jax.laboratory.gates.report import Stage
from rlhf_jax.sampling.best_of_n import best_of_n_curve

SOURCE = "RMB, 2410.09893"
FEATURES = 8
LOSERS, LISTS_WITH = (2, 3, 4, 5, 6), (2878, 712, 165, 24, 7)
"""Losers a list, and how many lists of the benchmark have so many."""
ANSWERS = 32


class Judges(NamedTuple):
    """M synthetic reward models of answers with features x: r = w . x + noise + spikes, each with errors of its own.

    Attributes:
        weights: what each sees of the features, [M, FEATURES]; 0 where it is blind.
        noise: standard deviation of its error, [M].
        spikes: share of answers that it overrates grossly, [M].
    """

    weights: Float[np.ndarray, "M F"]
    noise: Float[np.ndarray, " M"]
    spikes: Float[np.ndarray, " M"]

    def scores(self, rng: np.random.Generator, answers: Float[np.ndarray, "N F"]) -> Float[np.ndarray, "M N"]:
        """The scores of N answers by every model."""
        shape = (len(self.noise), len(answers))
        error = self.noise[:, None] * rng.standard_normal(shape)
        return self.weights @ answers.T + error + 6.0 * (rng.random(shape) < self.spikes[:, None])


def varied_judges(rng: np.random.Generator, count: int, gold: Float[np.ndarray, " F"]) -> Judges:
    """Reward models of different noise, each blind to some features."""
    blind = rng.random((count, FEATURES)) < rng.uniform(0.0, 0.6, (count, 1))
    return Judges(weights=gold * ~blind, noise=rng.uniform(0.2, 2.0, count), spikes=np.zeros(count))


def spiked_judges(rng: np.random.Generator, count: int, gold: Float[np.ndarray, " F"]) -> Judges:
    """Reward models that differ little on most answers, and much in how many they overrate grossly."""
    weights = np.repeat(gold[None], count, axis=0)
    return Judges(weights=weights, noise=rng.uniform(0.8, 1.2, count), spikes=rng.uniform(0.0, 0.05, count))


class Correlations(NamedTuple):
    """Spearman correlation over reward models of a score of the benchmark with best-of-32 gold."""

    pairwise: float
    best_of_n: float
    both: float


def correlations(rng: np.random.Generator, judges: Judges, gold: Float[np.ndarray, " F"], items: int) -> Correlations:
    """Builds a benchmark of `items` pairs and as many lists, and relates it to the gold of best-of-32.

    Args:
        rng: of everything drawn.
        judges: the reward models.
        gold: weights of the gold reward.
        items: pairs, and lists; a quarter as many prompts for best-of-32.
    """
    losers = rng.choice(LOSERS, items, p=np.array(LISTS_WITH) / sum(LISTS_WITH))
    pairwise = beats_all(rng, judges, gold, np.ones(items, int)).mean(axis=1)
    lists = beats_all(rng, judges, gold, losers).mean(axis=1)
    prompts = max(2, items // 4)
    answers = rng.standard_normal((prompts * ANSWERS, FEATURES))
    value = (answers @ gold).reshape(prompts, ANSWERS)
    scores = judges.scores(rng, answers).reshape(-1, prompts, ANSWERS)
    outcome = np.array([best_of_n_curve(one, value, [ANSWERS]).gold[0] for one in scores])
    return Correlations(*(spearman(score, outcome) for score in (pairwise, lists, (pairwise + lists) / 2)))


def beats_all(
    rng: np.random.Generator, judges: Judges, gold: Float[np.ndarray, " F"], losers: np.ndarray
) -> Bool[np.ndarray, "M items"]:
    """Whether each model scores the best answer of each list above all its losers (strictly).

    Args:
        rng: of the answers.
        judges: the reward models.
        gold: weights of the gold reward, which says which answer is the best.
        losers: how many losers each list has, int [items]; one: a pair.
    """
    longest = losers.max() + 1
    answers = rng.standard_normal((len(losers) * longest, FEATURES))
    there = np.arange(longest) <= losers[:, None]
    value = np.where(there, (answers @ gold).reshape(-1, longest), -np.inf)
    scores = np.where(there, judges.scores(rng, answers).reshape(-1, *there.shape), -np.inf)
    best = value.argmax(axis=1)
    of_best = np.take_along_axis(scores, np.broadcast_to(best[:, None], (*scores.shape[:2], 1)), axis=2)
    other = np.arange(longest) != best[:, None]
    return np.all((of_best > scores) | ~(there & other), axis=2)


def benchmark(seeds: int, models: int = 12, items: int = 1000) -> Stage:
    """Scores of the benchmark beside best-of-32 gold, for reward models that differ throughout or in the tail.

    Args:
        seeds: worlds, each with reward models of its own.
        models: reward models of a world.
        items: pairs of the benchmark, and lists.
    """
    found = {}
    for name, draw in (("varied", varied_judges), ("spiked", spiked_judges)):
        each = []
        for rng in np.random.default_rng(0).spawn(seeds):
            gold = rng.standard_normal(FEATURES)
            gold /= np.linalg.norm(gold)
            each.append(correlations(rng, draw(rng, models, gold), gold, items))
        found[name] = Correlations(*np.array(each).T)
    varied, spiked = found["varied"], found["spiked"]
    least = 0.8
    gates = [
        Gate(f"Spearman of {name} with best-of-32 gold, {models} reward models", SOURCE, values, low=least)
        for name, values in (
            ("pairwise accuracy", varied.pairwise),
            ("best-of-n accuracy", varied.best_of_n),
            ("their mean", varied.both),
        )
    ]
    gates.append(
        Gate(
            "Spearman with best-of-32 gold: best-of-n accuracy less pairwise, models that differ in gross errors",
            SOURCE,
            spiked.best_of_n - spiked.pairwise,
            low=0.0,
        )
    )
    rows = [
        row(f"Spearman of {name} with best-of-32 gold, models that differ in gross errors", "1", values)
        for name, values in (("pairwise accuracy", spiked.pairwise), ("best-of-n accuracy", spiked.best_of_n))
    ]
    return Stage(gates, rows)


def voting(seeds: int, items: int = 1000, few: int = 1, many: int = 15, limit: int = 301) -> Stage:
    """Votes of a judge whose errors are noise, and of one that is wrong by conviction on a part of the items.

    The items are drawn, their verdicts are not: accuracies are exact expectations.

    Args:
        seeds: repetitions.
        items: questions to the judge.
        few: votes of the one side of the comparison.
        many: votes of the other.
        limit: votes at which accuracy should have arrived at the share of items that are more often right than not.
    """
    noisy, wrong, gap = [], [], []
    for rng in np.random.default_rng(1).spawn(seeds):
        symmetric = rng.uniform(0.55, 0.85, items)
        systematic = np.where(rng.random(items) < 0.3, rng.uniform(0.15, 0.45, items), symmetric)
        misled = systematic[systematic < 0.5]
        noisy.append(np.mean(voting_accuracy(symmetric, many) - voting_accuracy(symmetric, few)))
        wrong.append(np.mean(voting_accuracy(misled, many) - voting_accuracy(misled, few)))
        gap.append(abs(np.mean(voting_accuracy(systematic, limit)) - np.mean(systematic > 0.5)))
    gained = f"accuracy gained by {many} votes over {few}"
    return Stage(
        [
            Gate(f"{gained}, errors are noise", SOURCE, np.array(noisy), low=0.0),
            Gate(f"{gained}, items that the judge mostly gets wrong", SOURCE, np.array(wrong), high=0.0),
            Gate(
                f"accuracy of {limit} votes, distance from the share of items mostly right",
                SOURCE,
                np.array(gap),
                high=0.03,
            ),
        ]
    )
