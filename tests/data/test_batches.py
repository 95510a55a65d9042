import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.batches import (
    bucket_for,
    bucket_lengths,
    collate,
    left_pad,
    pad_demonstrations,
    pad_preferences,
    pad_prompts,
)
from rlhf_jax.data.tokenization import Demonstration, Preference, Prompt

PAD = 9


def demonstration(tokens: list[int], completion: int) -> Demonstration:
    """A sequence that ends in `completion` tokens of completion."""
    ids = np.asarray(tokens, np.int32)
    return Demonstration(ids, np.arange(len(ids)) >= len(ids) - completion)


# Lengths.


def waste(lengths, buckets) -> int:
    return sum(min(bucket for bucket in buckets if bucket >= length) for length in lengths)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    buckets=st.integers(1, 4),
    multiple=st.sampled_from([1, 4, 8]),
)
def test_no_other_choice_of_lengths_wastes_less(lengths, buckets, multiple):
    chosen = bucket_lengths(lengths, buckets, multiple)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) <= buckets
    assert chosen[-1] - multiple < max(lengths) <= chosen[-1]
    assert all(length % multiple == 0 for length in chosen)
    options = sorted({-(-length // multiple) * multiple for length in lengths})
    choices = itertools.chain.from_iterable(itertools.combinations(options, n) for n in range(1, buckets + 1))
    assert waste(lengths, chosen) == min(waste(lengths, choice) for choice in choices if choice[-1] == options[-1])


def test_an_array_of_lengths_will_do_and_the_arguments_are_checked():
    assert bucket_lengths(np.array([1, 2, 3]), buckets=8, multiple=1) == (1, 2, 3)
    assert bucket_lengths([5, 5], buckets=3) == (8,)
    with pytest.raises(ValueError, match="no sequences to choose lengths for"):
        bucket_lengths([], buckets=2)
    for options in ({"buckets": 0}, {"buckets": 1, "multiple": 0}):
        with pytest.raises(ValueError, match="both must be at least 1"):
            bucket_lengths([1], **options)


def test_a_sequence_goes_to_the_smallest_bucket_that_holds_it():
    assert [bucket_for(length, (4, 8)) for length in (1, 4, 5, 8)] == [4, 4, 8, 8]
    with pytest.raises(ValueError, match="a sequence has 9 tokens, more than the longest bucket, 8"):
        bucket_for(9, (4, 8))


# Padding.


def test_demonstrations_stand_at_the_left_end_of_their_rows():
    batch = pad_demonstrations([demonstration([1, 2, 3], 2), demonstration([4, 5], 1)], 4, PAD)
    np.testing.assert_array_equal(batch.tokens, [[1, 2, 3, PAD], [4, 5, PAD, PAD]])
    np.testing.assert_array_equal(batch.mask, [[1, 1, 1, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 1, 1, 0], [0, 1, 0, 0]])
    assert (batch.tokens.dtype, batch.mask.dtype, batch.loss_mask.dtype) == (jnp.int32, jnp.bool_, jnp.bool_)


def test_preferences_have_both_sequences_of_one_length():
    items = [
        Preference(demonstration([1, 2, 3], 2), demonstration([1, 4], 1), 1.5),
        Preference(demonstration([5, 6], 1), demonstration([5, 7, 8, 8], 3), 0.0),
    ]
    batch = pad_preferences(items, 4, PAD)
    np.testing.assert_array_equal(batch.chosen.tokens, [[1, 2, 3, PAD], [5, 6, PAD, PAD]])
    np.testing.assert_array_equal(batch.rejected.tokens, [[1, 4, PAD, PAD], [5, 7, 8, 8]])
    np.testing.assert_array_equal(batch.rejected.mask, [[1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(batch.rejected.loss_mask, [[0, 1, 0, 0], [0, 1, 1, 1]])
    np.testing.assert_array_equal(batch.margin, [1.5, 0.0])
    assert batch.margin.dtype == jnp.float32


def test_preferences_have_labels_if_one_has_and_indices_if_all_have():
    pair = Preference(demonstration([1, 2], 1), demonstration([1, 3], 1), 0.0)
    plain = pad_preferences([pair, pair], 2, PAD)
    assert plain.label is None and plain.index is None
    some = pad_preferences([pair._replace(label=0.75, index=4), pair._replace(index=2)], 2, PAD)
    np.testing.assert_array_equal(some.label, np.array([0.75, 1.0], np.float32))
    np.testing.assert_array_equal(some.index, [4, 2])
    assert (some.label.dtype, some.index.dtype) == (jnp.float32, jnp.int32)
    assert pad_preferences([pair._replace(index=4), pair], 2, PAD).index is None


@pytest.mark.parametrize("index", [5, -1])
def test_an_index_that_is_none_of_the_pairs_is_refused(index):
    pair = Preference(demonstration([1, 2], 1), demonstration([3, 4], 1), 0.0)
    assert pad_preferences([pair, pair._replace(index=4)], 2, PAD, examples=5).index is None
    with pytest.raises(ValueError, match=f"a pair has the index {index}, and there are 5 pairs: number all .* from 0"):
        pad_preferences([pair._replace(index=4), pair._replace(index=index)], 2, PAD, examples=5)


def test_prompts_stand_at_the_right_end_and_keep_their_index():
    batch = pad_prompts([Prompt(np.array([1, 2], np.int32), 7), Prompt(np.array([3], np.int32), 4)], 3, PAD)
    np.testing.assert_array_equal(batch.tokens, [[PAD, 1, 2], [PAD, PAD, 3]])
    np.testing.assert_array_equal(batch.mask, [[0, 1, 1], [0, 0, 1]])
    np.testing.assert_array_equal(batch.index, [7, 4])
    np.testing.assert_array_equal(left_pad([[1, 2], [3]], PAD, 3).tokens, batch.tokens)


def test_a_token_that_equals_the_padding_stays_real():
    batch = pad_demonstrations([demonstration([1, PAD], 1)], 3, PAD)
    np.testing.assert_array_equal(batch.mask, [[1, 1, 0]])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 1, 0]])


def test_a_batch_is_as_long_as_the_bucket_of_its_longest_item():
    make = collate(pad_demonstrations, (2, 4), PAD)
    short, long = demonstration([1, 2], 1), demonstration([1, 2, 3], 1)
    assert [make(items).tokens.shape for items in ([short, short], [short, long])] == [(2, 2), (2, 4)]
    pair = Preference(short, long, 0.0)
    assert collate(pad_preferences, (2, 4), PAD)([pair]).chosen.tokens.shape == (1, 4)
    assert collate(pad_prompts, (2, 4), PAD)([Prompt(np.array([1], np.int32), 0)]).tokens.shape == (1, 2)


def test_nothing_to_pad_and_sequences_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no sequences to pad"):
        pad_demonstrations([], 4, PAD)
    with pytest.raises(ValueError, match="no prompts to pad"):
        pad_prompts([], 4, PAD)
    with pytest.raises(ValueError, match=r"sequence 1 \(counting from 0\) has 3 tokens, more than the limit of 2"):
        pad_demonstrations([demonstration([1, 2], 1), demonstration([1, 2, 3], 1)], 2, PAD)
    with pytest.raises(ValueError, match="has 3 tokens, more than the limit of 2"):
        pad_preferences([Preference(demonstration([1], 0), demonstration([1, 2, 3], 1), 0.0)], 2, PAD)
