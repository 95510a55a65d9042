"""The ellipsoid against a slow loop, and which response each prompt is compared with."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data.batches import collate, pad_demonstrations
from rlhf_jax.data.tokenization import Demonstration, Preference, Prompt
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.members import Member
from rlhf_jax.training.adversarial import (
    AdversarialOptions,
    check_adversarial,
    ellipsoid,
    reference_answers,
    reference_table,
)
from rlhf_jax.training.prompting import PromptRow
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


def test_the_ellipsoid_is_that_of_a_loop_over_chosen_and_rejected(source, tiny_config):
    pairs = [
        Preference(demonstration(1, 2, 3), demonstration(1, 4), 0.0),
        Preference(demonstration(5, 6), demonstration(5, 7, 8, 9), 0.0),
        Preference(demonstration(2, 2, 2), demonstration(2, 3, 3), 0.0),
    ]
    member = Member(tiny_config, init_reward_model(tiny_config, jax.random.key(0)))
    scorer = jax.jit(reward_scorer(tiny_config))

    def features(one):
        tokens = np.zeros((1, 8), np.int32)
        tokens[0, : one.length] = one.tokens
        return np.asarray(scorer(member.params, jnp.asarray(tokens), jnp.arange(8)[None] < one.length).features[0])

    head = np.asarray(member.params["head"]["kernel"], np.float64)
    matrix, fisher = 0.5 * np.eye(8), 0.5 * np.eye(8)
    for pair in pairs:
        chosen, rejected = features(pair.chosen).astype(np.float64), features(pair.rejected).astype(np.float64)
        matrix += np.outer(chosen, chosen) + np.outer(rejected, rejected)
        share = 1 / (1 + np.exp(-(chosen - rejected) @ head))
        fisher += share * (1 - share) * np.outer(chosen - rejected, chosen - rejected)
    shape, radius = ellipsoid(member, source, pairs, 2, 0.5, multiple=2.0)
    np.testing.assert_allclose(shape.cholesky @ shape.cholesky.T, matrix, rtol=1e-4, atol=1e-4)
    assert float(radius) ** 2 == pytest.approx(2.0 * np.trace(np.linalg.solve(fisher, matrix)), rel=1e-4)
    assert float(ellipsoid(member, source, pairs, 2, 0.5, value=9.0, multiple=2.0)[1]) == 3.0


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


@pytest.mark.parametrize(
    ("change", "rewards", "sentence"),
    [
        ({"preferences": None}, ("a",), "--rule advpo needs --preferences FILE"),
        ({}, ("a", "b"), "--rule advpo is for one reward model, and --reward names 2"),
        ({"regularisation": 0.0}, ("a",), "--regularisation is 0.0: give more than 0"),
        ({"advpo_value": -1.0}, ("a",), "--advpo-value is -1.0: give 0 or more"),
        ({"advpo_ema": 1.0}, ("a",), "ema is 1.0; give a decay between 0 and 1"),
    ],
)
def test_what_advpo_cannot_work_with_is_named(change, rewards, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_adversarial(dataclasses.replace(AdversarialOptions(preferences=Path("pairs")), **change), rewards)
