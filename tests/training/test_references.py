"""Which response each prompt is compared with."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data.batches import collate, pad_demonstrations
from rlhf_jax.data.tokenization import Demonstration, Prompt
from rlhf_jax.training.prompting import PromptRow
from rlhf_jax.training.references import copies, reference_answers, reference_table
from rlhf_jax.training.sources import Source
from rlhf_jax.types import Score, Sequences


@pytest.fixture(scope="module")
def source(tiny_config):
    """A model of the letters a to n, with an EOS token 15."""
    letters = {letter: place for place, letter in enumerate("abcdefghijklmn ")} | {"</s>": 15}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [])), eos_token="</s>")
    return Source(Path("nowhere"), {}, tiny_config, tokenizer, pad=0, longest=8)


def demonstration(*tokens, prompt=1):
    return Demonstration(np.array(tokens, np.int32), np.arange(len(tokens)) >= prompt)


def prompt_row(index, text, **columns):
    return PromptRow(Prompt(np.arange(1, 1 + len(text), dtype=np.int32), index), {"prompt": text} | columns)


def test_an_answer_of_a_row_is_its_completion_or_chosen_or_last_turn_and_is_cut(source):
    items = [
        prompt_row(4, "ab", completion="c", chosen="d"),
        prompt_row(0, "a", chosen="bcdef", rejected="g"),
        prompt_row(2, "a", completion=None),
        prompt_row(3, "a", completion=" "),
    ]
    found = reference_answers(source, items, Path("rows.jsonl"), 3)
    tokens = {place: one.tokens.tolist() for place, one in found.items()}
    assert tokens == {0: [0, 1, 2, 15], 1: [0, 1, 2, 3]}  # an empty answer is none
    assert found[1].loss_mask.tolist() == [False, True, True, True]
    assert reference_answers(source, items[2:3], Path("rows.jsonl"), 3) == {}
    with pytest.raises(ValueError, match=r"rows.jsonl, prompt 5 .counting from 0. has 3 in column 'completion'"):
        reference_answers(source, [prompt_row(5, "a", completion=3)], Path("rows.jsonl"), 3)


def test_the_last_turn_of_a_chat_is_its_answer(source):
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    chats = source._replace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=source.tokenizer.backend_tokenizer))
    chats.tokenizer.eos_token, chats.tokenizer.chat_template = "</s>", template
    asked, said = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}
    row = PromptRow(Prompt(np.array([0, 1], np.int32), 0), {"messages": [asked, said], "prompt": [asked]})
    (found,) = reference_answers(chats, [row], Path("chats.jsonl"), 3).values()
    assert found.tokens.tolist() == [0, 1, 2, 15]


def test_a_table_has_the_answer_of_a_row_or_one_that_is_drawn_where_its_index_says(source):
    items = [prompt_row(index, "a") for index in (3, 0, 5)]
    answers = {0: demonstration(1, 9, prompt=1), 2: demonstration(1, 7, 7, prompt=1)}

    def score(tokens, mask):
        last = jnp.where(mask, tokens, 0).max(axis=1).astype(jnp.float32)
        return Score(mean=last, features=jnp.stack([last, -last], axis=1), members=last[None])

    def draw(missing):
        assert [item.prompt.index for item in missing] == [0]
        tokens = jnp.full((2, 3), 4, jnp.int32)  # the last item fills up the batch
        yield [0, 0], SimpleNamespace(sequences=Sequences(tokens=tokens, mask=jnp.ones((2, 3), bool)))

    table = reference_table(items, answers, collate(pad_demonstrations, [4], 0), draw, score, 2)
    assert table.mean.tolist() == [4, 0, 0, 9, 0, 7] and table.members is None
    np.testing.assert_array_equal(table.features, jnp.stack([table.mean, -table.mean], axis=1))
    with pytest.raises(ValueError, match="the reward model, of reference responses, returned nan for row 0"):
        reference_table(
            items[1:2],
            {},
            None,
            draw,
            lambda tokens, mask: jax.tree.map(lambda leaf: leaf * jnp.nan, score(tokens, mask)),
            2,
        )


def test_several_copies_of_a_prompt_have_rows_of_their_own_that_follow_each_other(source):
    items = copies([prompt_row(index, "a") for index in (1, 0)], 2)
    drawn = jnp.array([7, 8, 5, 6], jnp.int32)[:, None]

    def score(tokens, mask):
        return Score(mean=tokens[:, 0].astype(jnp.float32))

    def draw(missing):
        assert [item.prompt.index for item in missing] == [2, 3, 0, 1]
        yield [0, 1, 2, 3], SimpleNamespace(sequences=Sequences(tokens=drawn, mask=jnp.ones((4, 1), bool)))

    assert reference_table(items, {}, None, draw, score, 4).mean.tolist() == [5, 6, 7, 8]
