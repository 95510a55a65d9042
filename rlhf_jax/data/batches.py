"""Tokenised rows of any length as batches of a few shapes, so that nothing is compiled again after the first pass."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rlhf_jax.data.tokenization import Demonstration, Preference, Prompt
from rlhf_jax.types import Demonstrations, PreferenceBatch, Prompts, Sequences


def bucket_lengths(lengths: Sequence[int] | np.ndarray, buckets: int, multiple: int = 8) -> tuple[int, ...]:
    """The lengths to pad to that waste least, if each sequence is padded to the smallest that holds it.

    With u_1 < … < u_m the lengths rounded up to a multiple, n_i their numbers, and w(j, k) the fewest tokens that the
    sequences up to u_j take in k buckets: w(j, k) = min over i < j of w(i, k - 1) + u_j·(n_{i+1} + … + n_j).

    Args:
        lengths: of the sequences, in tokens.
        buckets: the most lengths to choose.
        multiple: the lengths are multiples of this.

    Returns:
        Increasing lengths, the last of which holds the longest sequence.

    Raises:
        ValueError: no sequences, or `buckets` or `multiple` below 1.

    Example:
        >>> bucket_lengths([3, 5, 7, 30, 31, 100], buckets=3)
        (8, 32, 104)
    """
    if not len(lengths):
        raise ValueError("there are no sequences to choose lengths for: give at least one.")
    if buckets < 1 or multiple < 1:
        raise ValueError(f"buckets is {buckets} and multiple is {multiple}: both must be at least 1.")
    rounded, numbers = np.unique(-(-np.maximum(lengths, 1) // multiple) * multiple, return_counts=True)
    ends, below = np.append(0, rounded), np.append(0, np.cumsum(numbers))
    # tokens[i, j]: what the sequences longer than u_i take in a bucket of length u_j, for i < j; u_0 is below all.
    tokens = np.where(ends[:, None] < ends, ends * (below - below[:, None]), np.inf)
    least, choices = np.append(0.0, np.full(len(rounded), np.inf)), []
    for _ in range(min(buckets, len(rounded))):
        totals = least[:, None] + tokens
        choices.append(totals.argmin(axis=0))
        least = np.append(0.0, totals.min(axis=0)[1:])
    chosen, end = [], len(rounded)
    for choice in reversed(choices):
        chosen += [int(ends[end])] if end else []
        end = choice[end] if end else 0
    return tuple(reversed(chosen))


def bucket_for(length: int, buckets: Sequence[int]) -> int:
    """The smallest of the increasing `buckets` that holds `length` tokens.

    Raises:
        ValueError: none does.

    Example:
        >>> bucket_for(9, (8, 32, 104))
        32
    """
    for bucket in buckets:
        if bucket >= length:
            return bucket
    raise ValueError(f"a sequence has {length} tokens, more than the longest bucket, {max(buckets)}: add a longer one.")


def collate(pad_items: Callable[..., Any], buckets: Sequence[int], pad: int) -> Callable[[Sequence[Any]], Any]:
    """A function that makes a batch of items, as long as the bucket that holds the longest of them.

    Args:
        pad_items: `pad_demonstrations`, `pad_preferences` or `pad_prompts`.
        buckets: increasing lengths, see `bucket_lengths`.
        pad: id of the padding, which is masked.
    """
    return lambda items: pad_items(items, bucket_for(max(item.length for item in items), buckets), pad)


def pad_demonstrations(items: Sequence[Demonstration], length: int, pad: int) -> Demonstrations:
    """Demonstrations as one batch, padded on the right.

    Args:
        items: B demonstrations.
        length: S.
        pad: the id that fills the right; it is masked, so any id that the model can embed will do.

    Returns:
        `Demonstrations` [B, S].

    Raises:
        ValueError: no items, or one longer than `length`.
    """
    return Demonstrations(**_padded(items, length, pad))


def pad_preferences(items: Sequence[Preference], length: int, pad: int, examples: int | None = None) -> PreferenceBatch:
    """Preferences as one batch, both sequences padded on the right to `length`, with their loss masks.

    Args:
        items: B preferences.
        length: S.
        pad: see `pad_demonstrations`.
        examples: N, the number of pairs of the data, for what is kept by pair: indices are below it.

    Returns:
        `PreferenceBatch` [B, S]. It has labels if one of the pairs has one (1 for those that have none), and indices
        if all pairs have one.

    Raises:
        ValueError: an index is not one of N pairs, which a table of labels on the device would not notice; or see
            `pad_demonstrations`.
    """
    labels, index = [item.label for item in items], [item.index for item in items]
    beyond = [place for place in index if examples is not None and place is not None and not 0 <= place < examples]
    if beyond:
        raise ValueError(
            f"a pair has the index {beyond[0]}, and there are {examples} pairs: number all that are trained on from 0, "
            "see `length_balance.numbered`."
        )
    certain = all(label is None for label in labels)
    labels = [1.0 if label is None else label for label in labels]
    return PreferenceBatch(
        chosen=Sequences(**_padded([item.chosen for item in items], length, pad)),
        rejected=Sequences(**_padded([item.rejected for item in items], length, pad)),
        margin=jnp.asarray([item.margin for item in items], jnp.float32),
        label=None if certain else jnp.asarray(labels, jnp.float32),
        index=None if None in index else jnp.asarray(index, jnp.int32),
    )


def pad_prompts(items: Sequence[Prompt], length: int, pad: int) -> Prompts:
    """Prompts as one batch, padded on the left, with the index of each.

    Args:
        items: B prompts.
        length: P.
        pad: see `pad_demonstrations`.

    Returns:
        `Prompts` [B, P].

    Raises:
        ValueError: see `pad_demonstrations`.
    """
    prompts = left_pad([item.tokens for item in items], pad, length)
    return prompts.replace(index=jnp.asarray([item.index for item in items], jnp.int32))


def left_pad(token_lists: Sequence[Sequence[int] | np.ndarray], pad_token: int, length: int | None = None) -> Prompts:
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
    lengths = _checked_lengths(token_lists, length, "prompt")
    width = max(lengths) if length is None else length
    mask = np.arange(width)[None, :] >= width - np.asarray(lengths)[:, None]
    tokens = np.full(mask.shape, pad_token, np.int32)
    tokens[mask] = np.concatenate(token_lists)
    return Prompts(
        tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), index=jnp.arange(len(token_lists), dtype=jnp.int32)
    )


def _padded(items: Sequence[Demonstration], length: int, pad: int) -> dict[str, Array]:
    """Tokens, mask and loss mask [B, S] of sequences, each at the left end of its row."""
    lengths = _checked_lengths([item.tokens for item in items], length, "sequence")
    mask = np.arange(length)[None, :] < np.asarray(lengths)[:, None]
    tokens, loss_mask = np.full(mask.shape, pad, np.int32), np.zeros(mask.shape, bool)
    tokens[mask] = np.concatenate([item.tokens for item in items])
    loss_mask[mask] = np.concatenate([item.loss_mask for item in items])
    return {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask), "loss_mask": jnp.asarray(loss_mask)}


def _checked_lengths(token_lists: Sequence[Sequence[int] | np.ndarray], limit: int | None, noun: str) -> list[int]:
    """The lengths of lists of tokens, none of which is empty or over the limit."""
    lengths = [len(tokens) for tokens in token_lists]
    if not lengths:
        raise ValueError(f"there are no {noun}s to pad: give at least one list of tokens.")
    for row, count in enumerate(lengths):
        if count == 0:
            raise ValueError(f"{noun} {row} (counting from 0) has no tokens: give it at least one, or drop it.")
        if limit is not None and count > limit:
            raise ValueError(
                f"{noun} {row} (counting from 0) has {count} tokens, more than the limit of {limit}: "
                "raise the limit, or shorten or drop it."
            )
    return lengths
