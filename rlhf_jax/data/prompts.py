"""Text in, text out: the prompts of a file as left-padded tokens, and sampled tokens as text again.

A prompt begins as the tokenizer begins a text (a BOS token where its model has one) and never ends in an EOS that the
tokenizer adds, for the policy is to go on from there. A prompt that is too long is an error: cutting it would change
the question.
"""

from pathlib import Path
from typing import Any

from jaxtyping import Array, Bool, Int

from rlhf_jax.data.batches import left_pad
from rlhf_jax.data.rows import read_rows
from rlhf_jax.data.tokenization import padding_id, text_ids
from rlhf_jax.parallel.meetings import gathered
from rlhf_jax.types import Prompts


def batch_prompts(tokenizer: Any, texts: list[str], max_prompt_length: int) -> Prompts:
    """Prompts as tokens, padded on the left to the longest of them.

    Args:
        tokenizer: a `transformers` tokenizer; what it puts before a text (BOS) stays, an EOS it puts behind does not.
        texts: B prompts.
        max_prompt_length: the most tokens a prompt may have, BOS included: context minus response length.

    Returns:
        Prompts [B, P] with P ≤ `max_prompt_length`, padded with `padding_id`.

    Raises:
        ValueError: no text, a text without tokens, or (never cut silently) one over the limit, named by its row.
    """
    if max_prompt_length < 1:
        raise ValueError(f"max_prompt_length is {max_prompt_length}: no prompt fits; ask for a shorter response.")
    ids = text_ids(tokenizer, texts)
    longest = max(map(len, ids), default=0)
    return left_pad(ids, padding_id(tokenizer), min(longest, max_prompt_length))


def read_prompts(path: str | Path, tokenizer: Any, max_prompt_length: int, column: str = "prompt") -> Prompts:
    """The prompts of a file as tokens: `read_rows`, then `batch_prompts`.

    Args:
        path: a JSONL or Parquet file, see `read_rows`.
        tokenizer: a `transformers` tokenizer.
        max_prompt_length: the most tokens a prompt may have: the model's context minus the response length.
        column: the column that holds the prompt, as text.

    Returns:
        Prompts [B, P], one for each row of the file, in its order.

    Raises:
        ValueError: as `read_rows` and `batch_prompts`; the sentence names the file.
    """
    texts = [row[column] for row in read_rows(path, {column: str})]
    try:
        return batch_prompts(tokenizer, texts, max_prompt_length)
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
        B strings, on every process; "" where nothing but special tokens is unmasked.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = len(tokenizer.decode(letter, **options))
    rows = zip(*gathered((tokens, mask)), strict=True)
    return [tokenizer.decode(letter + row[real].tolist(), **options)[start:] for row, real in rows]
