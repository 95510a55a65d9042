"""Responses that a reward is compared with: the answers that rows bring along, or draws from the initial policy."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rlhf_jax.data.formats import format_rows
from rlhf_jax.data.rows import LocatedRow
from rlhf_jax.data.tokenization import Demonstration, tokenize_demonstrations
from rlhf_jax.parallel.meetings import gathered
from rlhf_jax.rewards.bradley_terry import check_rewards
from rlhf_jax.training.held_out import over_rows
from rlhf_jax.training.prompting import PromptRow
from rlhf_jax.training.sources import Source
from rlhf_jax.types import Demonstrations, Rollout, Score, Sequences

Draw = Callable[[Sequence[PromptRow]], Iterable[tuple[list[int], Rollout]]]


def reference_answers(
    source: Source, items: Sequence[PromptRow], path: Path, response_length: int
) -> dict[int, Demonstration]:
    """The answers that rows bring along as sequences: `completion`, `chosen`, or the last turn of `messages`.

    An answer of more than `response_length` tokens is cut there, as those of the policy are.

    Args:
        source: the policy.
        items: prompts and their rows.
        path: where the rows are from, for messages.
        response_length: most tokens of an answer.

    Returns:
        Sequences by the place of their item; items without an answer, or with an empty one, are left out.

    Raises:
        ValueError: answers of different kinds, or of a kind that is no completion.
    """
    found = {place: answer for place, item in enumerate(items) if (answer := _answer(item.row)) is not None}
    if not found:
        return {}
    located = [
        LocatedRow(
            f"{path}, prompt {items[place].prompt.index} (counting from 0)",
            {"prompt": items[place].row["prompt"], "completion": answer},
        )
        for place, answer in found.items()
    ]
    rows = format_rows(located, str(path), ("prompt_completion",))
    # Too long ones are cut below, not dropped.
    examples = tokenize_demonstrations(rows, source.tokenizer, sys.maxsize, vocab_size=source.config.vocab_size)
    places = list(found)
    return {
        places[row]: _cut(answer, response_length, source.longest)
        for row, answer in zip(examples.rows, examples.items, strict=True)
    }


def reference_table(
    items: Sequence[PromptRow],
    answers: Mapping[int, Demonstration],
    collate: Callable[[Sequence[Demonstration]], Any] | None,
    draw: Draw,
    score: Callable[[Array, Array], Score],
    batch_size: int,
) -> Score:
    """The reward model's Score of a reference response to every prompt.

    Args:
        items: N prompts.
        answers: from `reference_answers`.
        collate: makes a batch of answers; None where there are none.
        draw: `draw(items)` gives responses of the initial policy and the places of their items, a batch at a time; it
            is asked for the items without an answer.
        score: `score(tokens, mask)`.
        batch_size: answers a batch.

    Returns:
        `mean` [R] and `features` [R, D], in which row i belongs to the prompt of index i; R is the largest index and
        one more, and rows that no prompt has are 0.

    Raises:
        ValueError: a score is not finite.
    """
    index = np.array([item.prompt.index for item in items])
    missing = [place for place in range(len(items)) if place not in answers]

    def by_row(sequences: Sequences | Demonstrations) -> Score:
        return score(sequences.tokens, sequences.mask).replace(members=None)  # whose first axis counts no rows

    parts = []
    if answers:
        found = over_rows(by_row, list(answers.values()), collate, batch_size)
        parts.append((index[list(answers)], found))
    for places, taken in draw([items[place] for place in missing]) if missing else ():
        parts.append((index[[missing[place] for place in places]], gathered(by_row(taken.sequences))))
    table = None
    for rows, found in parts:
        check_rewards(found.mean, "the reward model, of reference responses,")
        if table is None:
            table = jax.tree.map(lambda leaf: np.zeros((index.max() + 1, *leaf.shape[1:]), leaf.dtype), found)
        for whole, leaf in zip(jax.tree.leaves(table), jax.tree.leaves(found), strict=True):
            whole[rows] = leaf
    print(f"reference responses: {len(answers)} from the rows, {len(missing)} drawn from the policy", flush=True)
    return jax.tree.map(jnp.asarray, table)


def copies(items: Sequence[PromptRow], count: int) -> list[PromptRow]:
    """Every prompt `count` times, one after the other; those of index i have i * count and the indices that follow.

    Example:
        >>> from rlhf_jax.data.tokenization import Prompt
        >>> items = [PromptRow(Prompt(np.arange(3), index), {}) for index in (4, 0)]
        >>> [item.prompt.index for item in copies(items, 2)]
        [8, 9, 0, 1]
    """
    return [
        item._replace(prompt=item.prompt._replace(index=item.prompt.index * count + copy))
        for item in items
        for copy in range(count)
    ]


def _cut(answer: Demonstration, response_length: int, longest: int) -> Demonstration:
    end = min(int(np.argmax(answer.loss_mask)) + response_length, longest)
    return Demonstration(answer.tokens[:end], answer.loss_mask[:end])


def _answer(row: Mapping[str, Any]) -> Any:
    columns = [row[name] for name in ("completion", "chosen") if row.get(name) is not None]
    messages = row.get("messages") or []
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    return next(iter(columns), messages[-1:] if answered else None)
