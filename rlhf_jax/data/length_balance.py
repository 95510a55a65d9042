"""Tokenised pairs from which a reward model learns less about length: balanced, augmented, or with extremes left out.

Where the longer completion is the chosen one more often than not, a reward model can be right by counting tokens. The
functions here take pairs and return pairs; none of them works everywhere, so measure before and after.

Source: Singhal et al. 2023, "A Long Way to Go: Investigating Length Correlations in RLHF" (arXiv:2310.03716).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rlhf_jax.data.tokenization import Preference
from rlhf_jax.data.unpaired import Unpaired, mismatched

BIN, LIMIT = 10, 200
"""Tokens a bin of the histogram, and the largest difference in it."""


def completion_lengths(pairs: Sequence[Preference]) -> Int[np.ndarray, "2 N"]:
    """Tokens of the chosen and of the rejected completions, prompts not counted, [2, N]."""
    lengths = [[pair.chosen.loss_mask.sum(), pair.rejected.loss_mask.sum()] for pair in pairs]
    return np.asarray(lengths, np.int64).reshape(-1, 2).T


def difference_bins(differences: Int[np.ndarray, " N"], width: int = BIN) -> Int[np.ndarray, " N"]:
    """The bin of each difference: 0 for 0, k for those from (k - 1) width + 1 to k width, and -k for their negatives.

    Example:
        >>> difference_bins(np.array([0, 1, 10, 11, -10, -11])).tolist()
        [0, 1, 1, 2, -1, -2]
    """
    return np.sign(differences) * -(-np.abs(differences) // width)


def balance_lengths(pairs: Sequence[Preference], seed: int, width: int = BIN, limit: int = LIMIT) -> list[Preference]:
    """As many pairs whose chosen completion is longer as pairs whose rejected one is, bin by bin of the difference.

    Of each two bins that mirror each other, the larger is drawn from, so that both have the smaller one's number. Pairs
    of equal length stay; those in a bin without a mirrored one, or that differ by more than the limit, go.

    Args:
        pairs: N pairs.
        seed: of the draw.
        width: tokens a bin.
        limit: largest difference that is kept, in tokens.

    Returns:
        The pairs that are kept, in their order: of them exactly half have a longer chosen completion, equal lengths
        counting one half.

    Raises:
        ValueError: none is left.
    """
    generator = np.random.default_rng(seed)
    chosen, rejected = completion_lengths(pairs)
    differences = chosen - rejected
    bins = np.where(np.abs(differences) <= limit, difference_bins(differences, width), limit + 1)
    kept = [np.flatnonzero(bins == 0)]
    for bin in range(1, -(-limit // width) + 1):
        sides = [np.flatnonzero(bins == sign * bin) for sign in (1, -1)]
        count = min(map(len, sides))
        kept += [generator.choice(side, count, replace=False) for side in sides]
    places = np.sort(np.concatenate(kept))
    if not len(places):
        raise ValueError(
            f"balancing lengths leaves none of {len(pairs)} pairs: no two differ by as many tokens, up to {limit}, in "
            "opposite directions; leave it out, or give more pairs."
        )
    return [pairs[place] for place in places]


def augment_pairs(pairs: Sequence[Preference], share: float | int, seed: int, longest: int) -> list[Preference]:
    """Pairs in which any answer to the prompt, short or long, beats an answer to something else (R-DA).

    Of a share of the pairs, drawn at random, there is a copy whose rejected completion is the chosen completion of a
    random pair with another prompt. The copies have no margin and a certain label.

    Args:
        pairs: N pairs.
        share: copies a pair, from 0 to 1; the paper has 0.25.
        seed: of the draw.
        longest: most tokens of a sequence; a pair whose copy would be longer has none, and another one is drawn.

    Returns:
        The copies alone, at most round(share N); they are fewer where too few fit.

    Raises:
        ValueError: the share is out of its range, or there is only one prompt.
    """
    check_share(share)
    count = round(share * len(pairs))
    if not count:
        return []
    order = np.random.default_rng(seed).permutation(len(pairs))
    chosen = [pairs[place].chosen for place in order]
    prompts = {item.tokens[: int(item.loss_mask.argmax())].tobytes() for item in chosen}
    if len(prompts) < 2:
        raise ValueError(
            "all pairs have one prompt, so that there is no answer to something else: leave augmenting out."
        )
    # The next one of another prompt, in a random order, is a random one. Twice the longest has room for all: no cuts.
    others = mismatched([Unpaired(item, True) for item in chosen], max(item.length for item in chosen) * 2)
    copies = [
        Preference(own, other, margin=0.0)
        for own, other in zip(chosen, others, strict=True)
        if other.length <= longest and not np.array_equal(own.tokens, other.tokens)
    ]
    return copies[:count]


def check_share(share: float | int) -> None:
    """Refuses a share of augmented pairs that is not between 0 and 1.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of augmented pairs is {share}: give 0 to 1.")


def numbered(pairs: Sequence[Preference]) -> list[Preference]:
    """The pairs with the index of each, counted from 0: after all pairs that are trained on are there."""
    return [pair._replace(index=place) for place, pair in enumerate(pairs)]


class Cartography(NamedTuple):
    """How a model in training saw each pair.

    Attributes:
        confidence: mean over epochs of the probability that it gave to the label, [N].
        variability: standard deviation of it over epochs, [N].
    """

    confidence: Float[np.ndarray, " N"]
    variability: Float[np.ndarray, " N"]


def cartography(probabilities: Float[np.ndarray, "E N"]) -> Cartography:
    """Mean and standard deviation over epochs of the probability of each label, sigma(chosen - rejected reward).

    Args:
        probabilities: at the end of each of E epochs, of N pairs, [E, N].

    Raises:
        ValueError: a probability is not between 0 and 1, or there is no epoch.

    Source: Swayamdipta et al. 2020, "Dataset Cartography" (arXiv:2009.10795).

    Example:
        >>> cartography(np.array([[0.5, 0.9], [1.0, 0.9]])).confidence.tolist()
        [0.75, 0.9]
    """
    if not len(probabilities):
        raise ValueError("there are no epochs: record the probability of every pair at the end of at least one.")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities lie between 0 and 1: give sigma(chosen reward - rejected reward).")
    return Cartography(probabilities.mean(axis=0), probabilities.std(axis=0))


def truncate_confidence(
    pairs: Sequence[Preference], probabilities: Float[np.ndarray, "E N"], lowest: float | int, highest: float | int
) -> list[Preference]:
    """The pairs whose mean probability over epochs is not extreme.

    Args:
        pairs: N pairs.
        probabilities: see `cartography`, [E, N].
        lowest: least confidence that is kept; pairs below it are hardly ever learned.
        highest: largest one; pairs above it are learned at once.

    Raises:
        ValueError: there is another number of pairs than of probabilities, the limits are not in order, or no pair is
            left.
    """
    if probabilities.shape[1:] != (len(pairs),):
        raise ValueError(f"probabilities have the shape {probabilities.shape} for {len(pairs)} pairs: give [E, N].")
    if not 0 <= lowest < highest <= 1:
        raise ValueError(f"confidence is kept from {lowest} to {highest}: give increasing numbers from 0 to 1.")
    confidence = cartography(probabilities).confidence
    kept = [pair for pair, sure in zip(pairs, confidence, strict=True) if lowest <= sure <= highest]
    if not kept:
        raise ValueError(f"no pair has a confidence from {lowest} to {highest}: widen the limits.")
    return kept
