"""Text in, text out: rows of a JSONL file, prompts as left-padded tokens, and sampled tokens as text again.

A prompt begins as the tokenizer begins a text (a BOS token where its model has one) and never ends in an EOS that the
tokenizer adds, for the policy is to go on from there. A prompt that is too long is an error: cutting it would change
the question.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from rlhf_jax.types import Prompts

_ANY_COLUMNS: Mapping[str, type] = MappingProxyType({})
_KINDS = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


def read_rows(path: str | Path, columns: Mapping[str, type] = _ANY_COLUMNS) -> list[dict]:
    """The rows of a JSONL file (one JSON object a line, UTF-8; empty lines are passed over).

    Args:
        path: the file.
        columns: columns that every row must have, and the Python type of their values, such as `{"prompt": str}`.

    Returns:
        The rows in the order of the file.

    Raises:
        ValueError: the file is missing or holds no row, or a line (named by its number, from 1) is not a JSON object,
            lacks a column or has a value of another type in it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "prompts.jsonl"
        >>> _ = path.write_text('{"prompt": "Once upon a time"}')
        >>> read_rows(path, {"prompt": str})
        [{'prompt': 'Once upon a time'}]
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of a JSONL file, one JSON object a line.")
    rows = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_row(line, f"{path}, line {number}", columns))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8 JSONL.") from None
    if not rows:
        raise ValueError(f"{path} holds no rows: give a JSONL file with at least one JSON object a line.")
    return rows


def _row(line: str, where: str, columns: Mapping[str, type]) -> dict:
    """One line of a JSONL file as a checked dict; `where` names the line in errors."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON ({error.msg}): write one JSON object a line.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}, not an object: write it as {{...}} with named columns.")
    for column, kind in columns.items():
        if column not in row:
            raise ValueError(f"{where} has no column {column!r}: rename one of {sorted(row)}, or name the right one.")
        if not isinstance(row[column], kind):
            wanted = _KINDS.get(kind, kind.__name__)
            raise ValueError(f"{where} has {row[column]!r:.60} in column {column!r}: write {wanted} there.")
    return row


def left_pad(token_lists: Sequence[Sequence[int]], pad_token: int, length: int | None = None) -> Prompts:
    """Token lists as one batch, each at the right end of its row.

    Args:
        token_lists: B lists of token ids, none empty.
        pad_token: the id that fills the left; it is masked, so any id the model can embed will do.
        length: P; by default the length of the longest list.

    Returns:
        Prompts [B, P]; `index` counts the rows from 0.

    Raises:
        ValueError: no list, an empty list, or one longer than `length`.

    Example:
        >>> prompts = left_pad([[5], [6, 7]], pad_token=0)
        >>> prompts.tokens.tolist(), prompts.mask.tolist()
        ([[0, 5], [6, 7]], [[False, True], [True, True]])
    """
    if not token_lists:
        raise ValueError("there are no prompts to pad: give at least one list of tokens.")
    lengths = [len(tokens) for tokens in token_lists]
    width = max(lengths) if length is None else length
    for row, count in enumerate(lengths):
        if count == 0:
            raise ValueError(f"prompt {row} (counting from 0) has no tokens: give it at least one, or drop it.")
        if count > width:
            raise ValueError(
                f"prompt {row} (counting from 0) has {count} tokens, more than the limit of {width}: "
                "raise the limit, or shorten or drop the prompt."
            )
    tokens = np.full((len(token_lists), width), pad_token, np.int32)
    mask = np.arange(width)[None, :] >= width - np.asarray(lengths)[:, None]
    for row, values in enumerate(token_lists):
        tokens[row, width - len(values) :] = values
    return Prompts(
        tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), index=jnp.arange(len(token_lists), dtype=jnp.int32)
    )


def _prompt_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids as the tokenizer begins a text, without the EOS that some tokenizers put behind it."""
    options = {"truncation": False, "padding": False, "return_attention_mask": False, "verbose": False}
    ids = tokenizer(texts, add_special_tokens=True, **options)["input_ids"]
    plain = tokenizer(texts, add_special_tokens=False, **options)["input_ids"]
    eos = [tokenizer.eos_token_id]
    return [row[:-1] if row[-1:] == eos and bare[-1:] != eos else row for row, bare in zip(ids, plain, strict=True)]


def tokenize_prompts(tokenizer: Any, texts: list[str], max_prompt_length: int) -> Prompts:
    """Prompts as tokens, padded on the left to the longest of them.

    Args:
        tokenizer: a `transformers` tokenizer; what it puts before a text (BOS) stays, an EOS it puts behind does not.
        texts: B prompts.
        max_prompt_length: the most tokens a prompt may have, BOS included: context minus response length.

    Returns:
        Prompts [B, P] with P ≤ `max_prompt_length`. Padding is the tokenizer's pad token, else its EOS, else id 0.

    Raises:
        ValueError: no text, a text without tokens, or (never cut silently) one over the limit, named by its row.
    """
    if max_prompt_length < 1:
        raise ValueError(f"max_prompt_length is {max_prompt_length}: no prompt fits; ask for a shorter response.")
    ids = _prompt_ids(tokenizer, texts) if texts else []
    pad_token = next((id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0)
    longest = max(map(len, ids), default=0)
    return left_pad(ids, pad_token, min(longest, max_prompt_length))


def read_prompts(path: str | Path, tokenizer: Any, max_prompt_length: int, column: str = "prompt") -> Prompts:
    """The prompts of a JSONL file as tokens: `read_rows`, then `tokenize_prompts`.

    Args:
        path: a JSONL file.
        tokenizer: a `transformers` tokenizer.
        max_prompt_length: the most tokens a prompt may have: the model's context minus the response length.
        column: the column that holds the prompt, as text.

    Returns:
        Prompts [B, P], one for each row of the file, in its order.

    Raises:
        ValueError: as `read_rows` and `tokenize_prompts`; the sentence names the file.
    """
    texts = [row[column] for row in read_rows(path, {column: str})]
    try:
        return tokenize_prompts(tokenizer, texts, max_prompt_length)
    except ValueError as error:
        raise ValueError(f"{path}, column {column!r}: {error}") from None


def render(tokenizer: Any, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> list[str]:
    """Responses as the text that follows their prompts, without special tokens.

    Sentencepiece tokenizers drop the space before the first word of whatever they decode, which would glue a response
    to its prompt. So each response is decoded behind a letter, which is then cut off: prompt text + rendered text is
    the text of prompt and response together.

    Args:
        tokenizer: a `transformers` tokenizer.
        tokens: response ids [B, T].
        mask: True on the tokens to decode, bool [B, T].

    Returns:
        B strings; "" where nothing but special tokens is unmasked.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = len(tokenizer.decode(letter, **options))
    rows = zip(np.asarray(tokens), np.asarray(mask), strict=True)
    return [tokenizer.decode(letter + row[real].tolist(), **options)[start:] for row, real in rows]
