"""The columns of each format, and what their values may be: text, chats, numbers, labels.

A format is a set of columns; their values are text or chats, which are lists of messages `{"role": …, "content": …}`.

| format | columns |
|---|---|
| `preference` | `chosen`, `rejected`, perhaps `margin`, `label`; without `prompt`, it is what both have in common |
| `stepwise` | `prompt`, `completions` (steps), `labels` (one a step) |
| `unpaired` | `prompt`, `completion`, `label` (good or not) |
| `prompt_completion` | `prompt`, `completion` |
| `messages` | `messages`, a chat of any number of turns |
| `prompt` | `prompt` |
| `text` | `text`, for language modelling |

The `label` of a preference is the probability, from 1/2 to 1, that the chosen completion is the better one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

# Where a row fits several formats, the first is meant; a caller narrows the choice to those it can use.
_REQUIRED = {
    "preference": ("chosen", "rejected"),
    "stepwise": ("prompt", "completions", "labels"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "prompt": ("prompt",),
    "text": ("text",),
}
_OPTIONAL = {"preference": ("prompt", "margin", "label")}

FORMATS = tuple(_REQUIRED)
DEMONSTRATION_FORMATS = ("prompt_completion", "messages", "text")
PREFERENCE_FORMATS = ("preference",)
PROMPT_FORMATS = tuple(name for name in FORMATS if name != "text")

# Columns of what is said: their values are text or chats.
CONTENT = ("prompt", "completion", "chosen", "rejected")

_LARGEST = float(np.finfo(np.float32).max)


class Shape(NamedTuple):
    """The format of a row and the kind ("text", "chat", …) of each of its columns; rows of one file agree in both."""

    format: str
    kinds: dict[str, str]

    def __str__(self):
        return f"{self.format!r} with " + ", ".join(f"{column} ({kind})" for column, kind in self.kinds.items())


def is_text(value: Any) -> bool:
    """Whether a value is text."""
    return isinstance(value, str)


def is_texts(value: Any) -> bool:
    """Whether a value is a list of one text or more."""
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def is_number(value: Any) -> bool:
    """Whether a value is a number that float32 can hold (true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and is_text(value.get("role")) and is_text(value.get("content"))


def _is_label(value: Any) -> bool:
    return isinstance(value, int) and value in (0, 1)


def _is_preference_probability(value: Any) -> bool:
    return is_number(value) and 0.5 <= value <= 1


def _is_labels(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_label, value))


# Name of a kind: the test that a value is of it, and how an error asks for it.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "text": (is_text, "text"),
    "chat": (_is_chat, "a chat (a list of messages, each with a role and a content that is text)"),
    "texts": (is_texts, "a list of texts"),
    "number": (is_number, "a finite number"),
    "label": (_is_label, "true or false"),
    "probability": (
        _is_preference_probability,
        "a number from 0.5 to 1, the probability that 'chosen' is the better one (below 0.5, swap the two)",
    ),
    "labels": (_is_labels, "a list of true and false, one for each of the completions"),
}
_COLUMN_KINDS = dict.fromkeys(CONTENT, ("text", "chat")) | {
    "messages": ("chat",),
    "text": ("text",),
    "completions": ("texts",),
    "labels": ("labels",),
    "label": ("label",),
    "margin": ("number",),
}
# Where a column means another thing in one format than in the others.
_KINDS_OF_FORMAT = {"preference": {"label": ("probability",)}}


def shape_of(row: dict, formats: Sequence[str], place: str) -> Shape:
    """The first of `formats` that a row fits, and the kinds of its values; null is as good as no column.

    Raises:
        ValueError: a column is missing, or has a value of a kind that it cannot have; the sentence names `place`.

    Example:
        >>> print(shape_of({"prompt": "Hi", "source": "web"}, FORMATS, "line 1"))
        'prompt' with prompt (text)
    """
    present = {column for column, value in row.items() if value is not None}
    name = next((name for name in formats if present.issuperset(_REQUIRED[name])), None)
    if name is None:
        wanted = " or ".join(" + ".join(_REQUIRED[name]) for name in formats)
        raise ValueError(f"{place} has the columns {sorted(present)}, not {wanted}: rename or add columns.")
    columns = (*_REQUIRED[name], *(column for column in _OPTIONAL.get(name, ()) if column in present))
    allowed = _COLUMN_KINDS | _KINDS_OF_FORMAT.get(name, {})
    kinds = {column: _kind(column, row[column], allowed[column], place) for column in columns}
    if name == "preference" and kinds["chosen"] != kinds["rejected"]:
        raise ValueError(f"{place} has {kinds['chosen']} chosen and {kinds['rejected']} rejected: write both alike.")
    if name == "stepwise" and len(row["completions"]) != len(row["labels"]):
        steps, labels = len(row["completions"]), len(row["labels"])
        raise ValueError(f"{place} has {steps} completions and {labels} labels: give one label for each step.")
    return Shape(name, kinds)


def _kind(column: str, value: Any, allowed: tuple[str, ...], place: str) -> str:
    for kind in allowed:
        if _KINDS[kind][0](value):
            return kind
    wanted = " or ".join(_KINDS[kind][1] for kind in allowed)
    raise ValueError(f"{place} has {value!r:.60} in column {column!r}: write {wanted} there.")
