"""Gaussian attribute heads (URM) and ensembles of them (URME) on ratings of the built-in world.

Answers of the initial policy are rated for five attributes: terms of the gold rubric, as they are, or with noise that
is larger where a long answer was asked for. Reward models are trained on prompts of some topics, and tested on others
of the same topics and on topics whose answers they never saw rated.

The claims are those of Lou et al., "Uncertainty-aware Reward Model: Teaching Reward Models to Know What is Unknown",
arXiv:2410.00847: the predicted deviation is the error's, disagreement tells new prompts from known ones and wrong
judgements from right ones, and to pick among answers that the models agree on costs nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms.attribute_modeling import attribute_modeling, gate_modeling, gaussian_params
from rlhf_jax.algorithms.fit import epoch_orders, fit
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.data.synthetic.rubric import gold_reward, read_prompts, rubric_terms
from rlhf_jax.data.synthetic.vocabulary import VOCABULARY
from rlhf_jax.evaluation.judging import pair_right
from rlhf_jax.evaluation.statistics import row, spearman
from rlhf_jax.evaluation.uncertainty import accepted, auroc, margin_spread
from rlhf_jax.laboratory.gates.gate import PRECONDITION, Gate
from rlhf_jax.laboratory.gates.report import Stage
from rlhf_jax.laboratory.gates.world import setting_of
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.setting import Setting, repeated, sample
from rlhf_jax.losses.attributes import rating_statistics
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.rewards.gaussian import GaussianParams, score_attributes
from rlhf_jax.types import AttributeBatch, Params, PreferenceBatch, Prompts, Sequences

SOURCE = "URM, 2410.00847"
NEW_TOPICS = (3, 7)
"""Topics that no reward model is trained on."""
GOOD, BAD = ("fluent_relevance", "agreement"), ("off_topic", "repetition", "excess_enthusiasm")
"""Terms of the rubric that are rated; of the bad ones, 1 less the term."""
QUIET, LOUD = 0.05, 0.4
"""Standard deviation of the noise of ratings where a brief answer was asked for, and a long one."""
KEPT = 0.5
"""Share of the answers that best-of-n keeps: those that the models disagree on least."""


class Rated(NamedTuple):
    """Answers of the initial policy.

    Attributes:
        sequences: prompt and response, [N, S].
        ratings: terms of the rubric, 1 for the best, float64 [N, K].
        gold: gold reward, float64 [N].
        long: whether a long answer was asked for, bool [N].
    """

    sequences: Sequences
    ratings: Float[np.ndarray, "N K"]
    gold: Float[np.ndarray, " N"]
    long: Bool[np.ndarray, " N"]


def prompts_of(topics: tuple[int, ...], count: int, rng: np.random.Generator) -> Prompts:
    """Prompts about some topics, drawn with replacement."""
    words = VOCABULARY
    rows = np.stack(
        [
            rng.choice(words.nouns[list(topics)].ravel(), count),
            rng.choice(words.adjectives.ravel(), count),
            rng.choice([words.brief_id, words.long_id], count),
            np.full(count, words.separator_id),
        ],
        axis=1,
    )
    tokens = jnp.asarray(rows, jnp.int32)
    return Prompts(tokens=tokens, mask=jnp.ones(tokens.shape, bool), index=jnp.arange(count, dtype=jnp.int32))


def rate(setting: Setting, prompts: Prompts, answers: int, key: Array) -> Rated:
    """Answers of the initial policy to each prompt with their ratings; those to one prompt stand together."""
    taken = sample(setting, repeated(prompts, np.repeat(np.arange(len(prompts.tokens)), answers)), key)
    given = [np.asarray(part) for part in (taken.prompts.tokens, taken.tokens, taken.mask)]
    terms = rubric_terms(*given)
    ratings = np.stack([*(terms[name] for name in GOOD), *(1.0 - terms[name] for name in BAD)], axis=1)
    return Rated(taken.sequences, ratings, gold_reward(*given), read_prompts(given[0])[2] == 2)


class Read(NamedTuple):
    """What the members of a seed say of N answers.

    Attributes:
        mean: of each attribute, [members, N, K].
        deviation: the predicted standard deviation, [members, N, K].
        reward: the weighted mean, [members, N].
    """

    mean: Float[np.ndarray, "*seeds M N K"]
    deviation: Float[np.ndarray, "*seeds M N K"]
    reward: Float[np.ndarray, "*seeds M N"]


def train(
    options: Options, setting: Setting, ratings: Float[np.ndarray, "seeds N K"], rated: Rated, key: Array
) -> GaussianParams:
    """Reward models of every seed and member, [seeds, members, …]: heads on the ratings, then gates on comparisons.

    The comparisons are of answers that stand together, the one with more gold chosen, without label noise.

    Args:
        options: sizes, learning rate and epochs.
        setting: shape and trunks.
        ratings: of every seed, which is what is trained on.
        rated: the answers, two to a prompt.
        key: of heads, gates and orders.
    """
    config, features, count = setting.reward_config, options.features, ratings.shape[2]
    optimizer = adam(options.reward_learning_rate)
    heads = attribute_modeling(config, optimizer, count, features=features)
    gates = gate_modeling(config, optimizer, features=features)
    better = rated.gold[::2] >= rated.gold[1::2]
    place = np.arange(0, len(rated.gold), 2)

    def side(rows: Int[np.ndarray, " P"]) -> Sequences:
        return Sequences(tokens=rated.sequences.tokens[rows], mask=rated.sequences.mask[rows])

    pairs = PreferenceBatch(
        chosen=side(place + ~better), rejected=side(place + better), margin=jnp.zeros(len(place), jnp.float32)
    )

    def one(lane: dict, trunks: Params, ratings: Array, sequences: Sequences, pairs: PreferenceBatch) -> GaussianParams:
        keys = jax.random.split(lane["key"], 4)
        mine = ratings[lane["seed"]]
        known = jnp.ones(mine.shape, bool)
        data = AttributeBatch(sequences=sequences, ratings=mine, known=known)
        centre, scale = rating_statistics(mine, known)
        trunk = jax.tree.map(lambda leaf: leaf[lane["member"]], trunks)
        state = heads.init(keys[0], {"trunk": trunk, "mean": centre, "scale": scale})
        state, _ = fit(heads.update, state, data, epoch_orders(keys[1], *_sizes(options, len(mine))))
        gate = gates.init(keys[2], state.params | {"mean": centre, "scale": scale})
        gate, _ = fit(gates.update, gate, pairs, epoch_orders(keys[3], *_sizes(options, len(pairs.margin))))
        return gaussian_params(gate)

    seeds, members = options.seeds, options.members
    lanes = {
        "seed": jnp.repeat(jnp.arange(seeds), members),
        "member": jnp.tile(jnp.arange(members), seeds),
        "key": jax.random.split(key, seeds * members),
    }
    given = (jnp.asarray(ratings, jnp.float32), rated.sequences, pairs)
    params = jax.jit(over_lanes(one))(lanes, setting.trunks, *given)
    return jax.tree.map(lambda leaf: leaf.reshape(seeds, members, *leaf.shape[1:]), params)


def _sizes(options: Options, rows: int) -> tuple[int, int, int]:
    return rows, min(options.reward_batch, rows), options.reward_epochs


def read(options: Options, setting: Setting, params: GaussianParams, sequences: Sequences) -> Read:
    """What the members of every seed say of the answers."""

    def one(params: GaussianParams, sequences: Sequences) -> Read:
        def member(params: GaussianParams) -> Read:
            found = score_attributes(
                setting.reward_config, params, sequences.tokens, sequences.mask, features=options.features
            )
            return Read(found.mean, found.deviation, found.reward)

        return jax.lax.map(member, params)

    found = jax.jit(over_lanes(one))(params, sequences)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found)


def sharpness(found: Read, ratings: Float[np.ndarray, "seeds N K"]) -> tuple[np.ndarray, np.ndarray]:
    """Of the lead member: Spearman of sigma with the error, and coverage at one sigma; averaged over attributes."""
    error, deviation = np.abs(ratings - found.mean[:, 0]), found.deviation[:, 0]
    kinds = range(ratings.shape[2])
    rank = [[spearman(s[:, k], e[:, k]) for k in kinds] for s, e in zip(deviation, error, strict=True)]
    return np.nanmean(rank, axis=1), (error <= deviation).mean(axis=(1, 2))


def ratings_gates(options: Options, answers: int = 16) -> Stage:
    """The four gates of URM and URME.

    Args:
        options: sizes; `pairs` answers are rated, and `held_out` prompts of each kind are kept for the tests.
        answers: to each of those, an even number.
    """
    setting = setting_of(options)
    keys = jax.random.split(jax.random.key(options.seed + 3), 5)
    rng = np.random.default_rng(options.seed + 3)
    known = tuple(topic for topic in range(len(VOCABULARY.nouns)) if topic not in NEW_TOPICS)
    learned = rate(setting, prompts_of(known, options.pairs // 2, rng), 2, keys[0])
    near = rate(setting, prompts_of(known, options.held_out, rng), answers, keys[1])
    far = rate(setting, prompts_of(NEW_TOPICS, options.held_out, rng), answers, keys[2])

    def noisy(rated: Rated) -> np.ndarray:
        deviation = np.where(rated.long, LOUD, QUIET)[:, None]
        return rated.ratings + deviation * rng.standard_normal((options.seeds, *rated.ratings.shape))

    def plain(rated: Rated) -> np.ndarray:
        return np.repeat(rated.ratings[None], options.seeds, axis=0)

    gates, rows = [], []
    for name, rating, key in (("noisy ratings", noisy, keys[3]), ("the rubric's ratings", plain, keys[4])):
        params = train(options, setting, rating(learned), learned, key)
        inside = read(options, setting, params, near.sequences)
        rank, coverage = sharpness(inside, rating(near))
        gates += [
            Gate(f"Spearman of sigma with the error, {name}", SOURCE, rank, low=0.2),
            Gate(f"share of errors within one sigma, {name}", SOURCE, coverage, low=0.60, high=0.76),
        ]
    # The rest is about what the models do not know, for which ratings without noise are enough.
    outside = read(options, setting, params, far.sequences)
    apart = [one.reward.std(axis=1) for one in (inside, outside)]
    new = np.array([auroc(a, b) for a, b in zip(*apart, strict=True)])
    reward, gold = inside.reward, near.gold
    shape = (options.held_out, answers)
    accuracy, halves, picks = [], [], []
    for members, unsure in zip(reward, apart[0], strict=True):
        spread = margin_spread(members[:, ::2], members[:, 1::2])
        sign = np.sign(gold[::2] - gold[1::2])
        right = pair_right(sign * members.mean(axis=0)[::2], sign * members.mean(axis=0)[1::2])
        right, spread = right[sign != 0], spread[sign != 0]
        accuracy.append(right.mean())
        low = spread <= np.median(spread)
        halves.append(right[low].mean() - right[~low].mean())
        mean = members.mean(axis=0)
        sure = accepted(unsure, unsure, KEPT).reshape(shape)
        every = mean.reshape(shape)
        # A prompt all of whose answers are rejected keeps them all.
        some = np.where(sure | ~sure.any(axis=1, keepdims=True), every, -np.inf)
        worth = gold.reshape(shape)
        picks.append(np.mean([one[a.argmax()] - one[b.argmax()] for one, a, b in zip(worth, some, every, strict=True)]))
    gates += [
        Gate("accuracy of the members' mean on pairs", PRECONDITION, np.array(accuracy), low=0.6),
        Gate("AUROC of disagreement: prompts of new topics against known ones", SOURCE, new, low=0.6),
        Gate("pair accuracy: the half that members agree on less the other", SOURCE, np.array(halves), low=0.0),
        Gate(
            f"gold of best-of-{answers}: the half that members agree on most less all",
            SOURCE,
            np.array(picks) / gold.std(),
            low=0.0,
            unit="s.d.",
        ),
    ]
    rows += [
        row("disagreement on prompts of known topics", "rating", apart[0].mean(axis=1)),
        row("disagreement on prompts of new topics", "rating", apart[1].mean(axis=1)),
    ]
    return Stage(gates, rows)
