"""Completions with ratings of several attributes, as tokens and as batches.

A row is a `prompt`, a `completion` and one column a rating; a rating that is missing or null is not known. HelpSteer2
itself is read by `formats.load_rows(path, ("prompt_completion",), {"response": "completion"})`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from rlhf_jax.data.batches import pad_demonstrations
from rlhf_jax.data.columns import is_number
from rlhf_jax.data.formats import Rows
from rlhf_jax.data.tokenization import Demonstration, Examples, tokenize_demonstrations
from rlhf_jax.types import AttributeBatch, Sequences

HELPSTEER2 = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""The columns of ratings, 0 to 4, of HelpSteer2 (Wang et al. 2024, arXiv:2406.08673)."""

NO_RATING = "no rating"


class Rated(NamedTuple):
    """A prompt with a completion, and its ratings.

    Attributes:
        sequence: the tokens.
        ratings: float32 [K]; 0 where a rating is not known.
        known: which ratings there are, bool [K].
    """

    sequence: Demonstration
    ratings: Float[np.ndarray, " K"]
    known: Bool[np.ndarray, " K"]

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return self.sequence.length


def tokenize_rated(
    rows: Rows,
    tokenizer: object,
    longest: int,
    attributes: Sequence[str] = HELPSTEER2,
    end: bool = True,
    vocab_size: int | None = None,
) -> Examples:
    """Rated completions behind their prompts as tokens.

    Args:
        rows: rows of the format `prompt_completion`.
        tokenizer: see `tokenize_demonstrations`.
        longest: the most tokens that a prompt and a completion may have; longer ones are dropped, never cut.
        attributes: the columns of the ratings, K of them; they may be missing or null in some rows.
        end: see `tokenize_demonstrations`.
        vocab_size: see `tokenize_demonstrations`.

    Returns:
        `Examples` of `Rated`; rows without any rating are dropped and counted.

    Raises:
        ValueError: no attributes or one twice, a column that no row has, a rating that is not a number, no row that is
            rated, or what `tokenize_demonstrations` raises.

    Warns:
        UserWarning: see `tokenize_demonstrations`.
    """
    ratings, known = read_ratings(rows, attributes)
    examples = tokenize_demonstrations(rows, tokenizer, longest, end, vocab_size)
    rated = [place for place, row in enumerate(examples.rows) if known[row].any()]
    if not rated:
        raise ValueError(f"{rows.source} has no rated row of at most {longest} tokens left: allow more tokens.")
    kept = [examples.rows[place] for place in rated]
    items = [Rated(examples.items[place], ratings[row], known[row]) for place, row in zip(rated, kept, strict=True)]
    dropped = examples.dropped.copy()
    if len(rated) < len(examples.rows):
        dropped[NO_RATING] += len(examples.rows) - len(rated)
    return Examples(items, kept, dropped)


def read_ratings(rows: Rows, attributes: Sequence[str]) -> tuple[Float[np.ndarray, "N K"], Bool[np.ndarray, "N K"]]:
    """The ratings of rows, 0 where one is not known, and which are known.

    Args:
        rows: N rows of any format.
        attributes: K columns.

    Raises:
        ValueError: see `tokenize_rated`.

    Example:
        >>> from rlhf_jax.data.formats import format_rows
        >>> from rlhf_jax.data.rows import locate_rows
        >>> values = [{"prompt": "1+1?", "completion": " 2", "right": 4}, {"prompt": "2+2?", "completion": "?"}]
        >>> ratings, known = read_ratings(format_rows(locate_rows(values, "sums"), "sums"), ["right"])
        >>> ratings.tolist(), known.tolist()
        ([[4.0], [0.0]], [[True], [False]])
    """
    if isinstance(attributes, str) or not len(attributes) or len(set(attributes)) < len(attributes):
        raise ValueError(f"attributes are {attributes!r}: name one column or more, each once.")
    for name in attributes:
        if all(row.get(name) is None for row in rows.values):
            columns = dict.fromkeys(column for row in rows.values for column in row)
            numbers = [column for column in columns if any(is_number(row.get(column)) for row in rows.values)]
            raise ValueError(f"{rows.source} has no rating in column {name!r}: name columns of {sorted(numbers)}.")
    known = np.array([[row.get(name) is not None for name in attributes] for row in rows.values])
    ratings = np.zeros(known.shape, np.float32)
    for row, column in zip(*np.nonzero(known), strict=True):
        value = rows.values[row][attributes[column]]
        if not is_number(value):
            raise ValueError(
                f"{rows.places[row]} has {value!r:.60} in column {attributes[column]!r}: write a finite number there, "
                "or null where there is no rating."
            )
        ratings[row, column] = value
    return ratings, known


def pad_rated(items: Sequence[Rated], length: int, pad: int) -> AttributeBatch:
    """Rated completions as one batch, padded on the right; for `batches.collate`.

    Args:
        items: B completions.
        length: S.
        pad: see `batches.pad_demonstrations`.

    Returns:
        `AttributeBatch` [B, S], [B, K].

    Raises:
        ValueError: see `batches.pad_demonstrations`.
    """
    padded = pad_demonstrations([item.sequence for item in items], length, pad)
    return AttributeBatch(
        sequences=Sequences(tokens=padded.tokens, mask=padded.mask, loss_mask=padded.loss_mask),
        ratings=jnp.asarray(np.stack([item.ratings for item in items])),
        known=jnp.asarray(np.stack([item.known for item in items])),
    )
