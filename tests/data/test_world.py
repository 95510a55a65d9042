import json

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data.synthetic.vocabulary import VOCABULARY
from rlhf_jax.data.world import builtin_world, take_prompts, text_world

WORDS = ["<s>", "</s>", "a", "one", "two", "three", "four"]


def tokenizer_of(eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos)


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ["one two", "three", "one two three four one", "four", "two three four"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def length_gold(texts):
    return np.array([float(len(text.split())) for text in texts])


def world_of(prompt_file, **options):
    given = {"response_length": 4, "context_length": 16, "held_out": 1} | options
    return text_world(prompt_file, tokenizer_of(), length_gold, **given)


def test_the_builtin_world_splits_its_prompts():
    world = builtin_world(6, 3, seed=0)
    assert world.prompts.tokens.shape[0] == 6
    assert world.held_out.tokens.shape[0] == 3
    assert [*world.prompts.index, *world.held_out.index] == list(range(9))
    assert bool(world.prompts.mask.all())
    assert world.stop_tokens == (VOCABULARY.eos_id,)


def test_no_held_out_prompt_is_trained_on_and_none_is_held_out_twice():
    world = builtin_world(2000, 40, seed=3)
    trained, held_out = ({tuple(row) for row in part.tokens.tolist()} for part in (world.prompts, world.held_out))
    assert len(held_out) == 40
    assert not trained & held_out
    assert len(trained) > 300
    with pytest.raises(ValueError, match="384 prompts"):
        builtin_world(10, 384, seed=0)


def test_the_builtin_world_follows_from_its_seed():
    first, again, other = (builtin_world(20, 2, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.prompts.tokens, again.prompts.tokens)
    assert (first.prompts.tokens != other.prompts.tokens).any()


def test_the_builtin_world_reads_its_responses_as_words():
    world = builtin_world(2, 1, seed=0)
    prompts = np.asarray(world.prompts.tokens)
    responses = prompts[:, :3]
    mask = np.array([[True, True, False], [False, False, False]])
    read = world.read(prompts, np.ones(prompts.shape, bool), responses, mask)
    assert read[0] == (VOCABULARY.decode(prompts[0]), VOCABULARY.decode(prompts[0, :2]))
    assert read[1][1] == VOCABULARY.decode(prompts[1, :0])
    assert world.gold(prompts, responses, mask).shape == (2,)


def test_taking_prompts_keeps_their_indices():
    world = builtin_world(5, 1, seed=0)
    taken = take_prompts(world.prompts, np.array([3, 1]))
    assert taken.index.tolist() == [3, 1]
    np.testing.assert_array_equal(taken.tokens, world.prompts.tokens[jnp.array([3, 1])])


def test_a_text_world_holds_out_the_last_rows_and_scores_texts(prompt_file):
    world = world_of(prompt_file, held_out=2)
    assert world.name == "prompts"
    assert world.prompts.tokens.shape == (3, 5)
    assert world.held_out.index.tolist() == [3, 4]
    assert set(world.stop_tokens) == {0, 1}
    responses = np.array([[3, 4, 1, 0], [5, 1, 1, 1], [1, 1, 1, 1]])
    mask = np.array([[True, True, True, False], [True, True, False, False], [True, False, False, False]])
    prompts = np.asarray(world.prompts.tokens)
    np.testing.assert_array_equal(world.gold(prompts, responses, mask), [2.0, 1.0, 0.0])
    texts = world.read(prompts, np.asarray(world.prompts.mask), responses, mask)
    assert [(prompt.strip(), response.strip()) for prompt, response in texts] == [
        ("one two", "one two"),
        ("three", "three"),
        ("one two three four one", ""),
    ]


def test_long_prompts_are_dropped_and_counted_when_asked(prompt_file, capsys):
    world = world_of(prompt_file, longest_prompt=2)
    assert world.prompts.tokens.shape == (2, 2)
    assert world.held_out.tokens.shape == (1, 2)
    assert [*world.prompts.index, *world.held_out.index] == [0, 1, 3]
    assert world.prompts.mask.tolist() == [[True, True], [False, True]]
    assert "2 of 5 prompts have over 2 tokens and are dropped" in capsys.readouterr().out


def test_prompts_that_do_not_fit_the_context_are_dropped_too_when_asked(prompt_file, capsys):
    world = world_of(prompt_file, longest_prompt=5, context_length=8)
    assert world.prompts.tokens.shape == (3, 4)
    assert "1 of 5 prompts have over 4 tokens and are dropped" in capsys.readouterr().out


def test_a_prompt_longer_than_the_context_is_an_error_that_names_its_row(prompt_file):
    with pytest.raises(ValueError, match=r"prompt 2 .* has 5 tokens, more than the limit of 4"):
        world_of(prompt_file, context_length=8)


def test_an_empty_prompt_file_is_an_error(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no rows"):
        world_of(path)


def test_holding_out_everything_is_an_error(prompt_file):
    with pytest.raises(ValueError, match="has 5 prompts, which leaves none to train on after 5 are held out"):
        world_of(prompt_file, held_out=5)


def test_a_tokenizer_without_eos_is_an_error(prompt_file):
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        text_world(prompt_file, tokenizer_of(eos=None), length_gold, 4, 16, 1)
