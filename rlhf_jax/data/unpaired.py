"""Single completions that are marked good or bad, as tokens and as batches; pairs taken apart and put together.

A batch also holds each prompt with the completion of another row: an estimate of how far a policy has moved needs
completions that were not written for their prompt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.batches import pad_demonstrations
from rlhf_jax.data.formats import Rows
from rlhf_jax.data.tokenization import (
    Demonstration,
    Examples,
    Preference,
    tokenize_demonstrations,
    tokenize_preferences,
)
from rlhf_jax.types import Sequences, UnpairedBatch

LABELLED_FORMATS = ("preference", "unpaired")
"""Rows with `chosen` and `rejected`, or with `completion` and `label`."""


class Unpaired(NamedTuple):
    """A prompt with a completion, and whether that is a good one."""

    sequence: Demonstration
    good: bool

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return self.sequence.length


def tokenize_labelled(
    rows: Rows, tokenizer: Any, longest: int, end: bool = True, vocab_size: int | None = None
) -> Examples:
    """Completions with a label, or pairs, behind their prompts as tokens.

    Args:
        rows: rows of a format in `LABELLED_FORMATS`.
        tokenizer: see `tokenize_demonstrations`.
        longest: the most tokens that a prompt and a completion may have; longer ones are dropped, never cut.
        end: see `tokenize_demonstrations`.
        vocab_size: see `tokenize_demonstrations`.

    Returns:
        `Examples` of `Unpaired`, or of `Preference`.

    Raises:
        ValueError: another format, or what `tokenize_demonstrations` raises.

    Warns:
        UserWarning: see `tokenize_demonstrations`.
    """
    if rows.format != "unpaired":
        return tokenize_preferences(rows, tokenizer, longest, end, vocab_size)
    completions = rows._replace(format="prompt_completion")
    examples = tokenize_demonstrations(completions, tokenizer, longest, end, vocab_size)
    labels = [bool(rows.values[row]["label"]) for row in examples.rows]
    return examples._replace(items=[Unpaired(*both) for both in zip(examples.items, labels, strict=True)])


def as_unpaired(items: Sequence[Unpaired | Preference]) -> list[Unpaired]:
    """Single completions as they are, and both of each pair: the chosen one is a good one, the other a bad one.

    Raises:
        ValueError: a pair has a soft label, which two completions apart cannot have.

    Example:
        >>> item = Demonstration(np.array([5, 6], np.int32), np.array([False, True]))
        >>> [one.good for one in as_unpaired([Preference(item, item, 0.0), Unpaired(item, True)])]
        [True, False, True]
    """

    def parts(item: Unpaired | Preference) -> list[Unpaired]:
        return [item] if isinstance(item, Unpaired) else [Unpaired(item.chosen, True), Unpaired(item.rejected, False)]

    soft = sum(isinstance(item, Preference) and item.label not in (None, 1.0) for item in items)
    if soft:
        raise ValueError(
            f"{soft} of {len(items)} pairs have a soft label, and taken apart a completion is good or bad: leave out "
            "the column 'label', which is for reward models."
        )
    return [part for item in items for part in parts(item)]


def as_pairs(items: Sequence[Unpaired] | Sequence[Preference]) -> list[Preference]:
    """Pairs as they are; of single completions each good one beside a bad one of another prompt.

    So one can count how often a policy prefers what is good. The two kinds are taken in their order; the rarer one
    begins anew where it ends.

    Raises:
        ValueError: all single completions are good, or none is.

    Example:
        >>> item = Demonstration(np.array([5, 6], np.int32), np.array([False, True]))
        >>> len(as_pairs([Unpaired(item, True), Unpaired(item, False), Unpaired(item, True)]))
        2
    """
    if all(isinstance(item, Preference) for item in items):
        return list(items)
    good, bad = ([item.sequence for item in items if item.good is kind] for kind in (True, False))
    if not good or not bad:
        raise ValueError(
            f"{len(good)} good and {len(bad)} bad rows are held out: raise --held-out, or give --eval-data with both."
        )
    pairs = range(max(len(good), len(bad)))
    return [Preference(good[place % len(good)], bad[place % len(bad)], margin=0.0) for place in pairs]


def mismatched(items: Sequence[Unpaired], longest: int) -> list[Demonstration]:
    """The prompt of each item with the completion of the next one of another prompt; after the last comes the first.

    Where all have one prompt, it is the next one's. A completion begins where its loss mask does. It is cut where it
    would go beyond `longest` tokens: it is measured and not learned.

    Example:
        >>> first, second = (
        ...     Unpaired(Demonstration(np.array(ids, np.int32), np.array([False, True, True])), True)
        ...     for ids in ([1, 2, 3], [4, 5, 6])
        ... )
        >>> [item.tokens.tolist() for item in mismatched([first, second], longest=3)]
        [[1, 5, 6], [4, 2, 3]]
    """
    prompts = [item.sequence.tokens[: int(item.sequence.loss_mask.argmax())].tolist() for item in items]

    def partner(place: int) -> Unpaired:
        following = [(place + step) % len(items) for step in range(1, len(items))]
        return items[next((other for other in following if prompts[other] != prompts[place]), (place + 1) % len(items))]

    return [_joined(item.sequence, partner(place).sequence, longest) for place, item in enumerate(items)]


def _joined(prompt: Demonstration, completion: Demonstration, longest: int) -> Demonstration:
    end, begin = (int(item.loss_mask.argmax()) for item in (prompt, completion))
    tokens = np.concatenate([prompt.tokens[:end], completion.tokens[begin:]])
    loss_mask = np.concatenate([np.zeros(end, bool), completion.loss_mask[begin:]])
    return Demonstration(tokens[:longest], loss_mask[:longest])


def pad_unpaired(items: Sequence[Unpaired], length: int, pad: int, longest: int) -> UnpairedBatch:
    """Completions with their labels as one batch, padded on the right, and the mismatched ones beside them.

    Args:
        items: B completions.
        length: S; mismatched sequences are padded to R = min(2 S, longest), which holds any prompt with any completion
            of the batch.
        pad: see `pad_demonstrations`.
        longest: most tokens of a sequence.

    Returns:
        `UnpairedBatch` [B, S], [B, R].

    Raises:
        ValueError: see `pad_demonstrations`.
    """
    room = min(2 * length, longest)
    return UnpairedBatch(
        completions=_sequences([item.sequence for item in items], length, pad),
        mismatched=_sequences(mismatched(items, room), room, pad),
        good=jnp.asarray([item.good for item in items]),
    )


def _sequences(items: Sequence[Demonstration], length: int, pad: int) -> Sequences:
    padded = pad_demonstrations(items, length, pad)
    return Sequences(tokens=padded.tokens, mask=padded.mask, loss_mask=padded.loss_mask)
