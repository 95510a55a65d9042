"""Rows as token ids: demonstrations, preferences and prompts of any length, and a count of the rows that are dropped.

A policy is given the tokens of a prompt and goes on from there, so a completion is tokenised behind its prompt with
the prompt's own tokens unchanged. Rows that are too long are dropped: cut, they would end where no answer ends.
"""

import warnings
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from rlhf_jax.data.chats import Tokenized, chat_prompt, chat_tokens, check_chat_template
from rlhf_jax.data.columns import DEMONSTRATION_FORMATS, PREFERENCE_FORMATS, PROMPT_FORMATS
from rlhf_jax.data.formats import Rows, describe_counts


class Demonstration(NamedTuple):
    """A sequence, and what of it is to be imitated (or, of a preference, judged).

    Attributes:
        tokens: token ids, int32 [S].
        loss_mask: True on the tokens of the completion, its EOS included, bool [S]; never on the first token of all,
            which nothing predicts.
    """

    tokens: Int[np.ndarray, " S"]
    loss_mask: Bool[np.ndarray, " S"]

    @property
    def length(self) -> int:
        """S."""
        return len(self.tokens)


class Preference(NamedTuple):
    """Two sequences with the same prompt, the first preferred.

    Attributes:
        chosen: the preferred one.
        rejected: the other one.
        margin: by how much it is preferred, or 0.
        label: probability that it is the better one indeed; None where the rows do not say, which is 1.
        index: which pair of those trained on it is, for labels that are kept by pair; None where nobody asks.
    """

    chosen: Demonstration
    rejected: Demonstration
    margin: float
    label: float | None = None
    index: int | None = None

    @property
    def length(self) -> int:
        """Tokens of the longer sequence."""
        return max(self.chosen.length, self.rejected.length)


class Prompt(NamedTuple):
    """What a policy is given: token ids, int32 [P], and the index of the row, which seeds its samples."""

    tokens: Int[np.ndarray, " P"]
    index: int

    @property
    def length(self) -> int:
        """P."""
        return len(self.tokens)


class Examples(NamedTuple):
    """Tokenised rows.

    Attributes:
        items: `Demonstration`, `Preference` or `Prompt`, one a row that is kept.
        rows: which row of `Rows.values` each item is.
        dropped: how many rows of the file are left out, by reason, those that reading dropped included.
    """

    items: list[Any]
    rows: list[int]
    dropped: Counter[str]


def describe_dropped(examples: Examples) -> str:
    """One line to print: how many rows are kept, and how many are dropped for which reason.

    Example:
        >>> describe_dropped(Examples(items=[1, 2], rows=[0, 3], dropped=Counter({"over 512 tokens": 2})))
        '2 of 4 rows kept; dropped: 2 over 512 tokens'
    """
    kept = len(examples.items)
    return f"{kept} of {kept + examples.dropped.total()} rows kept; {describe_counts(examples.dropped)}"


def tokenize_demonstrations(
    rows: Rows, tokenizer: Any, longest: int, end: bool = True, vocab_size: int | None = None
) -> Examples:
    """Rows to imitate as tokens: completions behind their prompts, the assistant's turns of chats, or whole texts.

    Args:
        rows: rows of a format in `DEMONSTRATION_FORMATS`.
        tokenizer: a `transformers` tokenizer. What it puts before a text (BOS) stays.
        longest: the most tokens a row may have; longer ones are dropped, never cut.
        end: whether an EOS token is put behind texts. Chats end as their template ends them.
        vocab_size: of the model, which must know every token.

    Returns:
        `Examples` of `Demonstration`.

    Raises:
        ValueError: another format, chats without a chat template, no EOS token to put, a token that the model does
            not know, or no row left.

    Warns:
        UserWarning: once, where the tokens of a prompt are not the first of prompt and completion tokenised together.
    """
    _check(rows, tokenizer, longest, DEMONSTRATION_FORMATS, end)
    column = "completion" if rows.format == "prompt_completion" else rows.format
    completions = [row[column] for row in rows.values]
    if column == "completion":
        tokenized = _behind_prompts(rows, tokenizer, column, end)
    elif column == "messages":
        placed = zip(completions, rows.places, strict=True)
        tokenized = [chat_tokens(tokenizer, messages, 0, place) for messages, place in placed]
    else:
        tokenized = _texts(tokenizer, [""] * len(completions), completions, end)
    _warn_out_of_step(rows, [one.in_step for one in tokenized])
    items = [_demonstration(*both) for both in zip(tokenized, completions, strict=True)]
    return _collect(rows, items, longest, vocab_size)


def tokenize_preferences(
    rows: Rows, tokenizer: Any, longest: int, end: bool = True, vocab_size: int | None = None
) -> Examples:
    """Pairs of completions behind their prompt as tokens, the first preferred.

    Args:
        rows: rows of the format `preference`.
        tokenizer: see `tokenize_demonstrations`.
        longest: the most tokens that the prompt and either completion may have; longer ones are dropped, never cut.
        end: see `tokenize_demonstrations`.
        vocab_size: see `tokenize_demonstrations`.

    Returns:
        `Examples` of `Preference`.

    Raises:
        ValueError: see `tokenize_demonstrations`.

    Warns:
        UserWarning: see `tokenize_demonstrations`.
    """
    _check(rows, tokenizer, longest, PREFERENCE_FORMATS, end)
    chosen, rejected = (_behind_prompts(rows, tokenizer, column, end) for column in ("chosen", "rejected"))
    _warn_out_of_step(rows, [good.in_step and bad.in_step for good, bad in zip(chosen, rejected, strict=True)])
    items = [_preference(*both) for both in zip(chosen, rejected, rows.values, strict=True)]
    return _collect(rows, items, longest, vocab_size)


def tokenize_prompts(rows: Rows, tokenizer: Any, longest: int, vocab_size: int | None = None) -> Examples:
    """Prompts as tokens, ready to be answered: a chat ends in the header of the assistant's answer.

    Args:
        rows: rows of a format in `PROMPT_FORMATS`; of `messages`, what comes before a last turn of the assistant.
        tokenizer: see `tokenize_demonstrations`; an EOS that it puts behind a text does not stay.
        longest: the most tokens a prompt may have: the model's context minus the response length.
        vocab_size: see `tokenize_demonstrations`.

    Returns:
        `Examples` of `Prompt`.

    Raises:
        ValueError: see `tokenize_demonstrations`.
    """
    _check(rows, tokenizer, longest, PROMPT_FORMATS, False)
    if rows.chat:
        chats = [_unanswered(row["messages"]) if rows.format == "messages" else row["prompt"] for row in rows.values]
        ids = [
            chat_prompt(tokenizer, chat, place) if chat else [] for chat, place in zip(chats, rows.places, strict=True)
        ]
    else:
        ids = text_ids(tokenizer, [row["prompt"] for row in rows.values])
    items = [Prompt(np.asarray(one, np.int32), row) if one else "empty prompt" for row, one in enumerate(ids)]
    return _collect(rows, items, longest, vocab_size)


def padding_id(tokenizer: Any) -> int:
    """The id that fills batches: the pad token, else the EOS token, else 0; it is always masked, so any will do.

    Example:
        >>> from types import SimpleNamespace
        >>> padding_id(SimpleNamespace(pad_token_id=None, eos_token_id=2))
        2
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((id for id in known if id is not None), 0)


def text_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids as the tokenizer begins a text, without the EOS that some put behind it, and with no BOS but one.

    Texts that a chat template wrote begin with BOS already, which a tokenizer that puts one before texts would double.
    """
    # What is put around one letter is put around every text; of the text itself, an EOS at its end stays.
    letter, plain = (_ids(tokenizer, ["a"], special)[0] for special in (True, False))
    ids, first, eos = _ids(tokenizer, texts, True), letter[:1], [tokenizer.eos_token_id]
    if letter[-1:] == eos and plain[-1:] != eos:
        ids = [row[:-1] for row in ids]
    if first != plain[:1]:
        ids = [row[1:] if row[1:2] == first else row for row in ids]
    return ids


def _ids(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    options = {"truncation": False, "padding": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=special, **options)["input_ids"] if texts else []


def _check(rows: Rows, tokenizer: Any, longest: int, formats: tuple[str, ...], end: bool) -> None:
    if rows.format not in formats:
        wanted = " or ".join(formats)
        raise ValueError(f"{rows.source} has rows of format {rows.format!r}, not {wanted}: rename its columns.")
    if longest < 1:
        raise ValueError(f"longest is {longest}: give the most tokens a row may have, at least 1.")
    if rows.chat:
        check_chat_template(tokenizer, rows.source)
    elif end and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token to end texts with: give it one, or leave texts without end.")


# Completions behind their prompts.


def _behind_prompts(rows: Rows, tokenizer: Any, column: str, end: bool) -> list[Tokenized]:
    prompts, completions = ([row[name] for row in rows.values] for name in ("prompt", column))
    if not rows.chat:
        return _texts(tokenizer, prompts, completions, end)
    placed = zip(prompts, completions, rows.places, strict=True)
    return [chat_tokens(tokenizer, prompt + answer, len(prompt), place) for prompt, answer, place in placed]


def _texts(tokenizer: Any, prompts: list[str], completions: list[str], end: bool) -> list[Tokenized]:
    heads = text_ids(tokenizer, prompts)
    wholes = text_ids(tokenizer, [prompt + text for prompt, text in zip(prompts, completions, strict=True)])
    return [_text(tokenizer, *texts, end) for texts in zip(heads, wholes, completions, strict=True)]


def _text(tokenizer: Any, head: list[int], whole: list[int], completion: str, end: bool) -> Tokenized:
    in_step = whole[: len(head)] == head
    tokens = whole if in_step else head + _continuation(tokenizer, completion)
    eos = tokenizer.eos_token_id
    ended = tokens if not end or tokens[len(head) :][-1:] == [eos] else [*tokens, eos]
    return Tokenized(np.asarray(ended, np.int32), np.arange(len(ended)) >= len(head), in_step)


def _continuation(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text inside another one: without the space that sentencepiece puts before a text that stands alone."""
    anchor, anchored, alone = _ids(tokenizer, ["\n", "\n" + text, text], False)
    return anchored[len(anchor) :] if anchor and anchored[: len(anchor)] == anchor else alone


def _warn_out_of_step(rows: Rows, in_step: list[bool]) -> None:
    places = [place for place, fine in zip(rows.places, in_step, strict=True) if not fine]
    if not places:
        return
    meaning = (
        "training sees other tokens before a completion than sampling will; use a template that marks the turns of the "
        "assistant with {% generation %} and writes each alike whether or not the chat goes on"
        if rows.chat
        else "the two are tokenised apart; let completions begin with the white space that separates them from prompts"
    )
    warnings.warn(
        f"{len(places)} of {len(rows.places)} rows ({places[0]} is the first): the tokens of the prompt are not the "
        f"first ones of prompt and completion together, so {meaning}.",
        stacklevel=3,
    )


# Items.


def _demonstration(tokenized: Tokenized, completion: str | list[dict]) -> Demonstration | str:
    """An item, or the reason to drop it."""
    chat = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    said = [message["content"] for message in chat if message["role"] == "assistant"]
    if not any(content.strip() for content in said):
        return "empty completion" if said else "no message of the assistant"
    loss_mask = tokenized.completion & (np.arange(len(tokenized.tokens)) > 0)
    return Demonstration(tokenized.tokens, loss_mask) if loss_mask.any() else "no token to learn from"


def _preference(chosen: Tokenized, rejected: Tokenized, row: dict) -> Preference | str:
    """An item, or the reason to drop it."""
    items = [_demonstration(chosen, row["chosen"]), _demonstration(rejected, row["rejected"])]
    reason = next((item for item in items if isinstance(item, str)), None)
    if reason is None and np.array_equal(chosen.tokens, rejected.tokens):
        reason = "chosen equals rejected"
    label = row.get("label")
    margin, label = float(row.get("margin") or 0.0), None if label is None else float(label)
    return reason or Preference(*items, margin=margin, label=label)


def _unanswered(messages: list[dict]) -> list[dict]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _collect(rows: Rows, items: list[Any], longest: int, vocab_size: int | None) -> Examples:
    """The items that are no reasons to drop a row and not too long."""
    reasons = [_reason(item, longest) for item in items]
    dropped = rows.dropped + Counter(reason for reason in reasons if reason)
    kept = [row for row, reason in enumerate(reasons) if not reason]
    if not kept:
        raise ValueError(f"{rows.source} has no row left ({describe_counts(dropped)}): allow more tokens, or mend it.")
    if vocab_size is not None:
        for row in kept:
            _check_vocabulary(items[row], vocab_size, rows.places[row])
    return Examples([items[row] for row in kept], kept, dropped)


def _reason(item: Any, longest: int) -> str | None:
    if isinstance(item, str):
        return item
    return f"over {longest} tokens" if item.length > longest else None


def _check_vocabulary(item: Any, vocab_size: int, place: str) -> None:
    parts = (item.chosen, item.rejected) if isinstance(item, Preference) else (item,)
    highest = max(int(part.tokens.max()) for part in parts)
    if highest >= vocab_size:
        raise ValueError(
            f"{place} has the token {highest}, but the model knows {vocab_size} tokens (from 0): "
            "give the tokenizer that belongs to the model."
        )
