"""Interventions on the lengths of tokenised pairs: what is kept, what is added, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.length_balance import (
    augment_pairs,
    balance_lengths,
    cartography,
    completion_lengths,
    difference_bins,
    numbered,
    truncate_confidence,
)
from rlhf_jax.data.tokenization import Demonstration, Preference


def side(prompt: int, length: int, token: int = 5) -> Demonstration:
    """A prompt of two tokens and a completion of one token, repeated."""
    tokens = np.array([1, 100 + prompt] + [token] * length, np.int32)
    return Demonstration(tokens, np.arange(len(tokens)) >= 2)


def pair(difference: int, prompt: int = 0) -> Preference:
    shorter = 1 + prompt % 3
    chosen, rejected = shorter + max(difference, 0), shorter + max(-difference, 0)
    return Preference(side(prompt, chosen), side(prompt, rejected, 6), 0.5, 0.75)


def length_differences(pairs):
    chosen, rejected = completion_lengths(pairs)
    return chosen - rejected


def histogram(pairs):
    """Pairs a bin, by a loop over the definition."""
    counts = {}
    for difference in length_differences(pairs):
        place = 0
        while abs(difference) > 10 * place:
            place += 1
        counts[int(np.sign(difference)) * place] = counts.get(int(np.sign(difference)) * place, 0) + 1
    return counts


# Balance.


def test_differences_count_completions_alone():
    assert length_differences([pair(7), pair(0), pair(-3)]).tolist() == [7, 0, -3]
    assert length_differences([]).shape == (0,)
    longer_prompt = Demonstration(np.array([1, 2, 3, 4, 5], np.int32), np.arange(5) >= 4)
    assert length_differences([Preference(longer_prompt, side(0, 3), 0.0)]).tolist() == [-2]


@given(st.lists(st.integers(-230, 230), max_size=60), st.integers(0, 3))
def test_a_balanced_set_has_a_symmetric_histogram_and_keeps_all_that_it_can(differences, seed):
    pairs = [pair(0), *map(pair, differences)]
    kept = balance_lengths(pairs, seed)
    before, after = (
        histogram([one for one, d in zip(pairs, [0, *differences], strict=True) if abs(d) <= 200]),
        histogram(kept),
    )
    assert all(after[place] == after.get(-place) for place in after)
    for place in before.keys() | after.keys():
        assert after.get(place, 0) == min(before.get(place, 0), before.get(-place, 0))
    found = length_differences(kept)
    assert np.sign(found).sum() == 0  # the longer one is preferred half of the time
    places = [next(place for place, one in enumerate(pairs) if one is item) for item in kept]
    assert places == sorted(set(places))  # a subset, in order


def test_the_draw_depends_on_the_seed_alone():
    pairs = [pair(3, prompt) for prompt in range(20)] + [pair(-4, 1)]
    draws = [[one.chosen.tokens[1] for one in balance_lengths(pairs, seed)] for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) > 1


def test_bins_mirror_each_other_at_every_width():
    differences = np.arange(-35, 36)
    for width in (1, 7, 10):
        bins = difference_bins(differences, width)
        np.testing.assert_array_equal(bins, -bins[::-1])
        assert (np.bincount(bins[bins > 0])[1:-1] == width).all()


def test_pairs_that_nothing_balances_are_refused():
    with pytest.raises(ValueError, match="balancing lengths leaves none of 2 pairs"):
        balance_lengths([pair(5), pair(-15)], 0)


# Augmentation.


def test_copies_reject_the_chosen_completion_of_another_prompt():
    pairs = [
        Preference(side(prompt, 3, 10 + prompt), side(prompt, 4, 50), 0.5, 0.75) for prompt in (0, 1, 2, 2, 3, 4, 5, 5)
    ]
    copies = augment_pairs(pairs, 0.5, 0, longest=64)
    assert len(copies) == 4
    for copy in copies:
        own = copy.chosen.tokens[1] - 100
        assert any(copy.chosen is one.chosen for one in pairs)
        np.testing.assert_array_equal(copy.rejected.tokens[:2], copy.chosen.tokens[:2])  # behind its own prompt
        said = set(copy.rejected.tokens[copy.rejected.loss_mask].tolist())
        assert len(said) == 1 and said <= set(range(10, 16)) - {10 + own}
        assert (copy.margin, copy.label, copy.index) == (0.0, None, None)
    assert len({id(copy.chosen) for copy in copies}) == 4


def test_no_copy_is_cut_and_none_equals_its_chosen_side():
    pairs = [Preference(side(prompt, 3 + 20 * (prompt == 0)), side(prompt, 4, 50), 0.0) for prompt in range(4)]
    # Completions but for the first are alike: they differ by their prompts alone, which a copy shares.
    assert [copy.rejected.length for copy in augment_pairs(pairs, 1.0, 0, longest=64)] in ([5, 25], [25, 5])
    assert [copy.rejected.length for copy in augment_pairs(pairs, 1.0, 0, longest=10)] == [5]
    assert augment_pairs(pairs, 0.0, 0, longest=64) == []


def test_impossible_augmentation_is_refused():
    with pytest.raises(ValueError, match=r"the share of augmented pairs is 1\.5"):
        augment_pairs([pair(1)], 1.5, 0, longest=64)
    with pytest.raises(ValueError, match="all pairs have one prompt"):
        augment_pairs([pair(1), pair(2)], 0.5, 0, longest=64)


def test_pairs_are_numbered_in_their_order():
    assert [one.index for one in numbered([pair(1), pair(2)])] == [0, 1]


# Cartography.


def test_cartography_is_the_mean_and_the_spread_over_epochs():
    probabilities = np.array([[0.9, 0.1, 0.2], [0.9, 0.3, 0.8]])
    found = cartography(probabilities)
    np.testing.assert_allclose(found.confidence, [0.9, 0.2, 0.5])
    np.testing.assert_allclose(found.variability, [0.0, 0.1, 0.3])
    pairs = [pair(1), pair(2), pair(3)]
    assert truncate_confidence(pairs, probabilities, 0.3, 0.8) == pairs[2:]
    assert truncate_confidence(pairs, probabilities, 0.0, 1.0) == pairs


@pytest.mark.parametrize(
    ("probabilities", "limits", "message"),
    [
        (np.array([[1.2]]), (0.0, 1.0), "probabilities lie between 0 and 1"),
        (np.array([[np.nan]]), (0.0, 1.0), "probabilities lie between 0 and 1"),
        (np.zeros((0, 1)), (0.0, 1.0), "there are no epochs"),
        (np.array([[0.5, 0.5]]), (0.0, 1.0), r"the shape \(1, 2\) for 1 pairs"),
        (np.array([[0.5]]), (0.8, 0.3), "confidence is kept from 0.8 to 0.3"),
        (np.array([[0.5]]), (0.6, 0.9), "no pair has a confidence from 0.6 to 0.9"),
    ],
)
def test_what_cannot_be_truncated_is_refused(probabilities, limits, message):
    with pytest.raises(ValueError, match=message):
        truncate_confidence([pair(1)], probabilities, *limits)
