"""Rated completions: columns, tokens, batches, and what is refused."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data.attributes import HELPSTEER2, NO_RATING, Rated, pad_rated, read_ratings, tokenize_rated
from rlhf_jax.data.batches import collate
from rlhf_jax.data.formats import format_rows, load_rows
from rlhf_jax.data.rows import locate_rows
from rlhf_jax.data.tokenization import Demonstration

FOUR = {name: 3 for name in HELPSTEER2[1:]}


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: id for id, word in enumerate(["</s>", "?", "sum", "is", "two", "three"])}
    model = Tokenizer(models.WordLevel(words, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="?")


def rows_of(*values):
    return format_rows(locate_rows(values, "ratings"), "ratings", ("prompt_completion",))


def row(completion: str = " two", **ratings) -> dict:
    return {"prompt": "sum is", "completion": completion, **ratings}


def test_rows_of_helpsteer2_are_rated_completions_behind_their_prompts(tokenizer):
    rows = rows_of(
        row(helpfulness=0.5, **FOUR),
        row(" three" * 7, helpfulness=1, **FOUR),
        row(),
        row(" three", helpfulness=None, **FOUR | {"verbosity": 0}),
    )
    examples = tokenize_rated(rows, tokenizer, longest=8)
    assert [one.sequence.tokens.tolist() for one in examples.items] == [[2, 3, 4, 0], [2, 3, 5, 0]]
    assert examples.items[0].sequence.loss_mask.tolist() == [False, False, True, True]
    assert [one.ratings.tolist() for one in examples.items] == [[0.5, 3, 3, 3, 3], [0, 3, 3, 3, 0]]
    assert [one.known.tolist() for one in examples.items] == [[True] * 5, [False] + [True] * 4]
    assert examples.rows == [0, 3] and examples.dropped == {"over 8 tokens": 1, NO_RATING: 1}
    assert examples.items[0].length == 4


def test_a_file_is_read_with_its_own_names(tmp_path, tokenizer):
    path = tmp_path / "rated.jsonl"
    path.write_text('{"prompt": "sum is", "response": " two", "helpfulness": 4, "tone": 1.5}\n')
    rows = load_rows(path, ("prompt_completion",), {"response": "completion"})
    [item] = tokenize_rated(rows, tokenizer, 8, attributes=("tone", "helpfulness")).items
    assert item.ratings.tolist() == [1.5, 4.0]


def test_a_batch_holds_sequences_ratings_and_which_are_known():
    def item(tokens, ratings):
        ratings = np.array(ratings, np.float32)
        tokens = np.array(tokens, np.int32)
        sequence = Demonstration(tokens, np.arange(len(tokens)) > 0)
        return Rated(sequence, np.nan_to_num(ratings), ~np.isnan(ratings))

    batch = collate(pad_rated, (4, 8), 9)([item([1, 2], [0.5, 2.0]), item([3, 4, 5], [np.nan, 1.0])])
    assert batch.sequences.tokens.tolist() == [[1, 2, 9, 9], [3, 4, 5, 9]]
    assert batch.sequences.mask.sum(axis=1).tolist() == [2, 3]
    assert batch.sequences.loss_mask.sum(axis=1).tolist() == [1, 2]
    assert batch.ratings.tolist() == [[0.5, 2.0], [0.0, 1.0]] and batch.ratings.dtype == np.float32
    assert batch.known.tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (("helpfulnes",), r"ratings has no rating in column 'helpfulnes': name columns of \['helpfulness', 'tone'\]"),
        ((), "name one column or more, each once"),
        (("tone", "tone"), "each once"),
        ("tone", "attributes are 'tone': name one column or more"),
    ],
)
def test_columns_that_do_not_exist_are_refused(tokenizer, attributes, message):
    rows = rows_of(row(helpfulness=1, tone=None), row(tone=2.5))
    with pytest.raises(ValueError, match=message):
        tokenize_rated(rows, tokenizer, 8, attributes)


@pytest.mark.parametrize("value", ["good", True, [3], float("nan"), float("inf")])
def test_a_rating_that_is_no_number_is_refused_by_its_row(value):
    with pytest.raises(ValueError, match=r"ratings, row 2 has .* in column 'tone': write a finite number there"):
        read_ratings(rows_of(row(tone=1), row(tone=value)), ("tone",))


def test_no_rated_row_that_is_short_enough_is_an_error(tokenizer):
    rows = rows_of(row(), row(" three" * 7, tone=1))
    with pytest.raises(ValueError, match="ratings has no rated row of at most 8 tokens left"):
        tokenize_rated(rows, tokenizer, 8, ("tone",))
