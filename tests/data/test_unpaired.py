"""Completions with labels: as tokens, as batches, from pairs and as pairs."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data.formats import format_rows
from rlhf_jax.data.rows import locate_rows
from rlhf_jax.data.tokenization import Demonstration, Preference
from rlhf_jax.data.unpaired import (
    LABELLED_FORMATS,
    Unpaired,
    as_pairs,
    as_unpaired,
    mismatched,
    pad_unpaired,
    tokenize_labelled,
)


def item(prompt: list[int], completion: list[int], good: bool = True) -> Unpaired:
    tokens = np.array([*prompt, *completion], np.int32)
    return Unpaired(Demonstration(tokens, np.arange(len(tokens)) >= len(prompt)), good)


ROWS = [item([1, 2, 3], [4]), item([5], [6, 7, 8, 9], False), item([10, 11], [12, 13])]


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: id for id, word in enumerate(["</s>", "?", "sum", "is", "two", "three"])}
    model = Tokenizer(models.WordLevel(words, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="?")


def tokenized(tokenizer, *rows, longest=8):
    made = format_rows(locate_rows(rows, "rows"), "rows", LABELLED_FORMATS)
    return tokenize_labelled(made, tokenizer, longest)


def test_rows_with_a_label_are_completions_behind_their_prompts(tokenizer):
    examples = tokenized(
        tokenizer,
        {"prompt": "sum is", "completion": " two", "label": True},
        {"prompt": "sum is", "completion": " three three three three three three", "label": True},
        {"prompt": "sum is", "completion": " three", "label": 0},
    )
    assert [one.sequence.tokens.tolist() for one in examples.items] == [[2, 3, 4, 0], [2, 3, 5, 0]]
    assert examples.items[0].sequence.loss_mask.tolist() == [False, False, True, True]
    assert [one.good for one in examples.items] == [True, False] and examples.items[0].length == 4
    assert examples.rows == [0, 2] and examples.dropped == {"over 8 tokens": 1}


def test_pairs_stay_pairs_and_other_rows_are_refused(tokenizer):
    [pair] = tokenized(tokenizer, {"prompt": "sum is", "chosen": " two", "rejected": " three"}).items
    assert isinstance(pair, Preference)
    with pytest.raises(ValueError, match="not chosen \\+ rejected or prompt \\+ completion \\+ label"):
        tokenized(tokenizer, {"prompt": "sum is", "completion": " two"})


def test_pairs_are_taken_apart_and_single_completions_put_side_by_side():
    pairs = [Preference(ROWS[0].sequence, ROWS[1].sequence, 0.0)]
    assert as_unpaired(pairs) == ROWS[:2] and as_unpaired(ROWS) == ROWS
    assert as_pairs(pairs) == pairs
    assert as_pairs(ROWS) == [Preference(ROWS[place].sequence, ROWS[1].sequence, 0.0) for place in (0, 2)]
    with pytest.raises(ValueError, match="2 good and 0 bad rows are held out: raise --held-out, or give --eval-data"):
        as_pairs([ROWS[0], ROWS[2]])


def test_soft_labels_are_refused_where_pairs_are_taken_apart():
    pair = Preference(ROWS[0].sequence, ROWS[1].sequence, 0.0)
    assert len(as_unpaired([pair._replace(label=1.0), pair])) == 4
    with pytest.raises(ValueError, match=r"1 of 3 pairs have a soft label.*leave out the column 'label'"):
        as_unpaired([pair, pair._replace(label=0.9), pair._replace(label=1.0)])


def test_a_batch_has_each_prompt_with_the_completion_of_the_next_row():
    batch = pad_unpaired(ROWS, 5, 99, longest=64)
    assert batch.completions.tokens.tolist() == [[1, 2, 3, 4, 99], [5, 6, 7, 8, 9], [10, 11, 12, 13, 99]]
    assert batch.good.tolist() == [True, False, True]
    found = batch.mismatched
    parts = zip(*map(np.asarray, (found.tokens, found.mask, found.loss_mask)), strict=True)
    marked = [(row[mask].tolist(), row[completion].tolist()) for row, mask, completion in parts]
    assert marked == [([1, 2, 3, 6, 7, 8, 9], [6, 7, 8, 9]), ([5, 12, 13], [12, 13]), ([10, 11, 4], [4])]
    assert batch.mismatched.tokens.shape == (3, 10)


def test_a_prompt_never_meets_a_completion_of_its_own_where_there_are_others():
    """Prompts 1, 1 and 2 with the completions 5, 6 and 7: the first passes over the second."""
    rows = [
        Unpaired(Demonstration(np.array([prompt, completion], np.int32), np.array([False, True])), True)
        for prompt, completion in ((1, 5), (1, 6), (2, 7))
    ]
    assert [one.tokens.tolist() for one in mismatched(rows, longest=2)] == [[1, 7], [1, 7], [2, 5]]
    assert [one.tokens.tolist() for one in mismatched(rows[:2], longest=2)] == [[1, 6], [1, 5]]


def test_mismatched_rows_keep_to_the_context():
    assert pad_unpaired(ROWS, 5, 99, longest=6).mismatched.mask.sum(axis=1).tolist() == [6, 3, 3]
    assert [len(one.tokens) for one in mismatched(ROWS, longest=6)] == [6, 3, 3]
    assert all(one.loss_mask.any() for one in mismatched(ROWS, longest=5))
