"""What scripts that draw completions read: prompts beside the rows they come from, and how responses are drawn."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data.batches import bucket_lengths, collate, pad_prompts
from rlhf_jax.data.formats import Rows
from rlhf_jax.data.prompts import render
from rlhf_jax.data.tokenization import Examples, Prompt, tokenize_prompts
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.stop_tokens import folder_stop_tokens
from rlhf_jax.training.devices import placing
from rlhf_jax.training.sources import Source
from rlhf_jax.types import Prompts, Rollout

PROMPTED_FORMATS = ("prompt", "messages")
"""Rows with a `prompt` (and any other columns), or a chat, whose last answer is put aside."""


class PromptRow(NamedTuple):
    """A tokenised prompt, and the row it comes from with its `prompt` as text or chat."""

    prompt: Prompt
    row: dict

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.prompt.length


class PromptBatch(NamedTuple):
    """Prompts as a batch, and their rows."""

    prompts: Prompts
    rows: list[dict]


def prompt_rows(response_length: int) -> Callable[..., Examples]:
    """A function for `sources.read_split` that makes `PromptRow`s with room for a response of so many tokens."""

    def tokenize(rows: Rows, tokenizer: Any, longest: int, vocab_size: int | None = None) -> Examples:
        if longest <= response_length:
            raise ValueError(
                f"responses of {response_length} tokens leave no room for a prompt in {longest}: "
                "lower --response-length, or raise --longest."
            )
        examples = tokenize_prompts(rows, tokenizer, longest - response_length, vocab_size)
        items = [
            PromptRow(prompt, _with_prompt(rows.values[row]))
            for prompt, row in zip(examples.items, examples.rows, strict=True)
        ]
        return examples._replace(items=items)

    return tokenize


def _with_prompt(row: dict) -> dict:
    if row.get("prompt") is not None:
        return row
    answered = row["messages"][-1]["role"] == "assistant"
    return row | {"prompt": row["messages"][:-1] if answered else row["messages"]}


def collate_prompts(source: Source, items: Sequence[PromptRow], response_length: int, buckets: int):
    """A function that makes a `PromptBatch` of `PromptRow`s, padded to one of a few lengths chosen for all `items`."""
    room = source.config.context_length - response_length
    lengths = sorted({min(length, room) for length in bucket_lengths([item.length for item in items], buckets)})
    pad = placing(collate(pad_prompts, lengths, source.pad))
    return lambda chosen: PromptBatch(pad([item.prompt for item in chosen]), [item.row for item in chosen])


def sampling_of(source: Source, response_length: int, **options: float | int | None) -> SamplingConfig:
    """How responses are drawn from a model: its stop tokens, and `options` of `SamplingConfig`."""
    stops = folder_stop_tokens(source.tokenizer, source.folder)
    return SamplingConfig(max_new_tokens=response_length, stop_tokens=stops, pad_token=source.pad, **options)


def completions_of(source: Source, rows: Sequence[dict], rollout: Rollout) -> list[str | list[dict]]:
    """The responses of a rollout: texts where the prompts are texts, messages of the assistant behind chats."""
    texts = render(source.tokenizer, rollout.tokens, rollout.mask)
    return [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts, strict=True)
    ]
