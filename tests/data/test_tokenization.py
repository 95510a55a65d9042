import json
import warnings

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from rlhf_jax.data.columns import DEMONSTRATION_FORMATS, PREFERENCE_FORMATS, PROMPT_FORMATS
from rlhf_jax.data.formats import as_chats, format_rows, load_rows
from rlhf_jax.data.rows import locate_rows
from rlhf_jax.data.tokenization import (
    describe_dropped,
    text_ids,
    tokenize_demonstrations,
    tokenize_preferences,
    tokenize_prompts,
)

SPECIAL = ["<unk>", "<s>", "</s>"]
BOS, EOS = 1, 2
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def letters(behind: str = "", merges=(), eos: str | None = "</s>", template: str | None = None, space: bool = False):
    """One token a character but for the merges; `space` puts a space before every text, as sentencepiece does."""
    pieces = [*SPECIAL, "\n", *map(chr, range(32, 127)), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, list(merges)))
    if space:
        tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {behind}".strip(), special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, unk_token="<unk>", chat_template=template
    )


@pytest.fixture(scope="module")
def tokenizer():
    return letters(template=TEMPLATE)


def formatted(*values, **options):
    return format_rows(locate_rows(values, "rows"), "rows", **options)


def halves(tokenizer, item) -> tuple[str, str]:
    """Prompt and completion as text, special tokens included."""
    return tokenizer.decode(item.tokens[~item.loss_mask]), tokenizer.decode(item.tokens[item.loss_mask])


# Texts.


@pytest.mark.parametrize("behind", ["", "</s>"], ids=["bos", "bos_and_eos"])
def test_a_demonstration_is_prompt_completion_and_one_eos(behind):
    tokenizer = letters(behind)
    examples = tokenize_demonstrations(formatted({"prompt": "1+1?", "completion": " 2"}), tokenizer, 20)
    [item] = examples.items
    assert halves(tokenizer, item) == ("<s>1+1?", " 2</s>")
    assert (item.tokens.dtype, item.loss_mask.dtype, item.length) == (np.int32, bool, 8)
    [endless] = tokenize_demonstrations(
        formatted({"prompt": "1+1?", "completion": " 2"}), tokenizer, 20, end=False
    ).items
    assert halves(tokenizer, endless) == ("<s>1+1?", " 2")


@pytest.mark.parametrize("behind", ["", "</s>"], ids=["bos", "bos_and_eos"])
def test_an_end_that_a_text_has_is_not_doubled(behind):
    tokenizer = letters(behind)
    [item] = tokenize_demonstrations(formatted({"prompt": "a", "completion": "b</s>"}), tokenizer, 20).items
    assert halves(tokenizer, item) == ("<s>a", "b</s>")
    assert tokenizer.decode(text_ids(tokenizer, ["a</s>"])[0]) == "<s>a</s>"


def test_a_bos_that_is_eos_too_stays(tokenizer):
    for both in (letters(eos="<s>"), letters(behind="<s>", eos="<s>")):
        assert text_ids(both, ["", "a"]) == [[BOS], text_ids(tokenizer, ["a"])[0]]


def test_a_beginning_that_a_text_has_is_not_doubled(tokenizer):
    assert text_ids(tokenizer, ["<s>ab", "<s>", "ab"]) == text_ids(tokenizer, ["ab", "", "ab"])
    [item] = tokenize_demonstrations(formatted({"prompt": "<s>a", "completion": "b"}), tokenizer, 20).items
    assert halves(tokenizer, item) == ("<s>a", "b</s>")


def test_a_text_is_learned_from_its_second_token_on(tokenizer):
    [item] = tokenize_demonstrations(formatted({"text": "ab"}), tokenizer, 20).items
    assert halves(tokenizer, item) == ("<s>", "ab</s>")
    # Nothing predicts the first token, be it padding of no prompt or no BOS.
    [item] = tokenize_demonstrations(formatted({"prompt": "", "completion": "ab"}), tokenizer, 20).items
    assert halves(tokenizer, item) == ("<s>", "ab</s>")


def test_a_preference_has_one_prompt_and_its_margin(tokenizer):
    rows = formatted({"prompt": "q", "chosen": "yes", "rejected": "n", "margin": 2})
    [item] = tokenize_preferences(rows, tokenizer, 20).items
    assert halves(tokenizer, item.chosen) == ("<s>q", "yes</s>")
    assert halves(tokenizer, item.rejected) == ("<s>q", "n</s>")
    assert (item.margin, item.length) == (2.0, 6)
    [plain] = tokenize_preferences(formatted({"prompt": "q", "chosen": "y", "rejected": "n"}), tokenizer, 20).items
    assert (plain.margin, plain.label, plain.index) == (0.0, None, None)


def test_a_preference_keeps_the_probability_of_its_label(tokenizer):
    rows = formatted({"prompt": "q", "chosen": "yes", "rejected": "n", "label": 0.5})
    assert tokenize_preferences(rows, tokenizer, 20).items[0].label == 0.5


def test_a_prompt_has_no_eos_and_knows_its_row():
    tokenizer = letters(behind="</s>")
    rows = formatted({"prompt": "ab"}, {"prompt": "abcd"}, {"prompt": "c"})
    examples = tokenize_prompts(rows, tokenizer, 3)
    assert [tokenizer.decode(item.tokens) for item in examples.items] == ["<s>ab", "<s>c"]
    assert ([item.index for item in examples.items], examples.rows) == ([0, 2], [0, 2])
    assert dict(examples.dropped) == {"over 3 tokens": 1}


# The prompt's tokens stay.


def test_a_completion_that_would_change_the_prompts_tokens_is_tokenised_apart_with_one_warning():
    tokenizer = letters(merges=[("a", "b")])
    rows = formatted(*[{"prompt": "xa", "completion": text} for text in ("c", "bc", "bab")])
    with pytest.warns(UserWarning, match=r"2 of 3 rows \(rows, row 2 is the first\): the tokens of the") as record:
        examples = tokenize_demonstrations(rows, tokenizer, 20)
    assert len(record) == 1
    [prompt] = tokenize_prompts(formatted({"prompt": "xa"}), tokenizer, 20).items
    for item, completion in zip(examples.items, ("c", "bc", "bab"), strict=True):
        np.testing.assert_array_equal(item.tokens[~item.loss_mask], prompt.tokens)
        assert halves(tokenizer, item) == ("<s>xa", completion + "</s>")


def test_no_space_comes_between_prompt_and_completion_of_a_tokenizer_that_puts_one_before_texts():
    tokenizer = letters(merges=[("a", "b")], space=True)
    with pytest.warns(UserWarning, match="1 of 1 rows"):
        [item] = tokenize_demonstrations(formatted({"prompt": "xa", "completion": "bc"}), tokenizer, 20).items
    assert halves(tokenizer, item) == ("<s> xa", "bc</s>")


def test_a_pair_warns_once_though_both_completions_change_the_prompt():
    tokenizer = letters(merges=[("a", "b")])
    with pytest.warns(UserWarning, match="1 of 1 rows") as record:
        tokenize_preferences(formatted({"prompt": "a", "chosen": "b", "rejected": "bc"}), tokenizer, 20)
    assert len(record) == 1


# Chats.


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_every_assistant_turn_of_a_chat_is_learned(tokenizer):
    rows = formatted({"messages": [user("hi"), assistant("ho"), user("and"), assistant("so")]})
    [item] = tokenize_demonstrations(rows, tokenizer, 99).items
    assert halves(tokenizer, item) == ("<s>u:hi</s>\na:\nu:and</s>\na:", "ho</s>so</s>")


def test_of_a_prompt_and_a_completion_only_the_completion_is_learned(tokenizer):
    prompt = [user("hi"), assistant("ho"), user("and")]
    expected = "<s>u:hi</s>\na:ho</s>\nu:and</s>\na:"
    [item] = tokenize_demonstrations(formatted({"prompt": prompt, "completion": "so"}), tokenizer, 99).items
    assert halves(tokenizer, item) == (expected, "so</s>")
    row = {"chosen": [*prompt, assistant("so")], "rejected": [*prompt, assistant("no")]}
    [pair] = tokenize_preferences(formatted(row), tokenizer, 99).items
    assert [halves(tokenizer, item) for item in pair[:2]] == [(expected, "so</s>"), (expected, "no</s>")]
    for rows in (formatted(row), formatted({"prompt": prompt}), formatted({"messages": row["chosen"]})):
        [item] = tokenize_prompts(rows, tokenizer, 99).items
        assert tokenizer.decode(item.tokens) == expected


def test_texts_are_read_as_chats_when_asked(tokenizer):
    rows = as_chats(formatted({"prompt": "1+1?\n", "completion": " 2"}))
    [item] = tokenize_demonstrations(rows, tokenizer, 99).items
    assert halves(tokenizer, item) == ("<s>u:1+1?</s>\na:", "2</s>")


def test_turns_that_cannot_be_learned_drop_their_row(tokenizer):
    rows = formatted(
        {"messages": [user("hi"), assistant("ho")]},
        {"messages": [user("hi")]},
        {"messages": [user("hi"), assistant(" ")]},
        {"messages": [assistant("ho")]},
    )
    examples = tokenize_demonstrations(rows, tokenizer, 99)
    assert examples.rows == [0]
    reasons = ("no message of the assistant", "empty completion", "no token to learn from")
    assert dict(examples.dropped) == dict.fromkeys(reasons, 1)


def test_a_template_that_rewrites_turns_warns_once(tokenizer):
    thinking = letters(template=TEMPLATE.replace("{{ 'a:' }}", "{{ 'a:~' }}"))
    rows = formatted(*[{"messages": [user("hi"), assistant("ho")]}] * 3)
    with pytest.warns(UserWarning, match="3 of 3 rows .*marks the turns of the assistant") as record:
        tokenize_demonstrations(rows, thinking, 99)
    assert len(record) == 1


# Dropped rows.


def test_rows_are_dropped_and_counted_by_reason(tokenizer):
    pair = {"prompt": "q", "chosen": "y", "rejected": "n"}
    rows = formatted(
        pair,
        pair | {"chosen": "yes!"},
        pair | {"rejected": "nope"},
        pair | {"rejected": " "},
        pair | {"chosen": "n"},
        pair | {"chosen": "Y"},
    )
    examples = tokenize_preferences(rows, tokenizer, longest=4)
    assert dict(examples.dropped) == {"chosen equals rejected": 1, "over 4 tokens": 2, "empty completion": 1}
    assert examples.rows == [0, 4]
    assert [rows.values[row]["chosen"] for row in examples.rows] == ["y", "Y"]
    assert describe_dropped(examples) == (
        "2 of 6 rows kept; dropped: 2 over 4 tokens, 1 chosen equals rejected, 1 empty completion"
    )
    assert dict(rows.dropped) == {"chosen equals rejected": 1}


def test_a_row_at_the_limit_is_kept(tokenizer):
    rows = formatted({"prompt": "q", "completion": "abc"})
    assert tokenize_demonstrations(rows, tokenizer, 6).items[0].length == 6
    with pytest.raises(ValueError, match=r"rows has no row left \(dropped: 1 over 5 tokens\): allow more tokens"):
        tokenize_demonstrations(rows, tokenizer, 5)


def test_pairs_with_the_same_tokens_and_empty_prompts_are_dropped():
    vocabulary = {"<unk>": 0, "a": 1, "</s>": 2}
    unknowing = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    unknowing.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unknowing, eos_token="</s>", unk_token="<unk>")
    pairs = [{"prompt": "a", "chosen": chosen, "rejected": "c"} for chosen in ("a", "b")]
    assert dict(tokenize_preferences(formatted(*pairs), tokenizer, 9).dropped) == {"chosen equals rejected": 1}
    prompts = tokenize_prompts(formatted({"prompt": "a"}, {"prompt": ""}), tokenizer, 9)
    assert dict(prompts.dropped) == {"empty prompt": 1}


# Bad input.


def test_rows_of_another_format_and_limits_below_one_are_refused(tokenizer):
    with pytest.raises(ValueError, match="rows has rows of format 'prompt', not prompt_completion or messages or text"):
        tokenize_demonstrations(formatted({"prompt": "a"}), tokenizer, 9)
    with pytest.raises(ValueError, match="format 'text', not preference: rename its columns"):
        tokenize_preferences(formatted({"text": "a"}), tokenizer, 9)
    with pytest.raises(ValueError, match="longest is 0"):
        tokenize_prompts(formatted({"prompt": "a"}), tokenizer, 0)


def test_a_tokenizer_without_eos_or_chat_template_is_refused(tokenizer):
    rows = formatted({"text": "ab"})
    with pytest.raises(ValueError, match="the tokenizer has no EOS token to end texts with"):
        tokenize_demonstrations(rows, letters(eos=None), 9)
    assert tokenize_demonstrations(rows, letters(eos=None), 9, end=False).items[0].length == 3
    with pytest.raises(ValueError, match="rows holds chats, but the tokenizer has no chat template"):
        tokenize_prompts(formatted({"prompt": [user("a")]}), letters(), 9)


def test_a_token_that_the_model_does_not_know_is_named(tokenizer):
    rows = formatted({"prompt": "a", "chosen": "b", "rejected": "~"}, {"prompt": "a", "chosen": "!", "rejected": "b"})
    highest = text_ids(tokenizer, ["~"])[0][-1]
    assert len(tokenize_preferences(rows, tokenizer, 9, vocab_size=highest + 1).items) == 2
    with pytest.raises(ValueError, match=f"rows, row 1 has the token {highest}, but the model knows {highest} tokens"):
        tokenize_preferences(rows, tokenizer, 9, vocab_size=highest)
    with pytest.raises(ValueError, match="give the tokenizer that belongs to the model"):
        tokenize_prompts(formatted({"prompt": "~"}), tokenizer, 9, vocab_size=50)


# Real tokenizers and rows.


@pytest.fixture(scope="module")
def stories(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "weights" / "stories260K_hf")


@pytest.fixture(scope="module")
def gpt2(shared_data):
    return GPT2TokenizerFast.from_pretrained(shared_data / "tokenizers" / "gpt2")


def first(rows, count):
    return rows._replace(values=rows.values[:count], places=rows.places[:count])


def test_hh_prompts_keep_their_tokens_under_both_tokenizers(shared_data, stories, gpt2):
    rows = first(load_rows(shared_data / "preference" / "hh_helpful_base.jsonl", PREFERENCE_FORMATS), 100)
    for tokenizer, longest in ((stories, 512), (gpt2, 1024)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pairs = tokenize_preferences(rows, tokenizer, longest, vocab_size=len(tokenizer))
        prompts = text_ids(tokenizer, [rows.values[row]["prompt"] for row in pairs.rows])
        assert len(pairs.items) + pairs.dropped.total() == 100
        for item, row, prompt in zip(pairs.items, pairs.rows, prompts, strict=True):
            for sequence, name in ((item.chosen, "chosen"), (item.rejected, "rejected")):
                assert sequence.tokens[~sequence.loss_mask].tolist() == prompt
                text = rows.values[row]["prompt"] + rows.values[row][name]
                assert sequence.tokens.tolist() == [*text_ids(tokenizer, [text])[0], tokenizer.eos_token_id]


def test_instructions_sums_and_comparisons_are_counted(shared_data, stories):
    folder = shared_data / "preference"
    rows = load_rows(folder / "webgpt_comparisons.jsonl", PREFERENCE_FORMATS, convert="webgpt_comparisons")
    assert dict(tokenize_preferences(rows, stories, 512).dropped) == {"tie": 166, "over 512 tokens": 295}
    rows = load_rows(folder / "instruction_pref_synthetic.jsonl", PREFERENCE_FORMATS, convert="instructions")
    assert describe_dropped(tokenize_preferences(rows, stories, 512)) == (
        "792 of 796 rows kept; dropped: 4 chosen equals rejected"
    )
    columns = {"question": "prompt", "answer": "completion"}
    rows = load_rows(shared_data / "reasoning" / "gsm8k_test.jsonl", DEMONSTRATION_FORMATS, columns)
    examples = tokenize_demonstrations(rows, stories, 512)
    assert len(examples.items) + examples.dropped["over 512 tokens"] == 650


def test_stories_have_the_ids_of_the_reference(shared_data, stories):
    reference = json.loads((shared_data / "weights" / "stories260K" / "reference.json").read_text(encoding="utf-8"))
    rows = formatted(*[{"prompt": one["prompt"]} for one in reference["generations"]], formats=PROMPT_FORMATS)
    items = tokenize_prompts(rows, stories, 512, vocab_size=512).items
    assert [item.tokens.tolist() for item in items] == [one["prompt_ids"] for one in reference["generations"]]
