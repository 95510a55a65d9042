"""Judged rows: prompts, completions and which of them are better, from a file or folder of any known benchmark.

The format is told from the columns, see `rlhf_jax.data.judged_formats`; besides those of the benchmarks there are two
plain ones, `preference` (`chosen`, `rejected`, perhaps `prompt`) and `choices` (`prompt`, `completions` and `gold`, a
number for each). Columns that nobody asks for stay with the row.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.candidates import Candidates, candidates
from rlhf_jax.data.columns import is_text
from rlhf_jax.data.formats import Rows, format_rows
from rlhf_jax.data.judged_formats import FORMATS, Answers
from rlhf_jax.data.rows import LocatedRow, read_located_rows

PLAIN: Mapping[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "choices": ("prompt", "completions", "gold"),
}
"""The columns of the plain formats."""
JUDGED: tuple[str, ...] = (*FORMATS, *PLAIN)
"""The names of all formats of judged rows."""

# Columns that divide the rows of a plain file, where they hold text.
_SLICES = ("section", "subset", "category", "domain", "scenario", "style", "source", "dataset", "language")
_ENDINGS = ("json", "jsonl", "parquet")


class JudgedRow(NamedTuple):
    """A prompt with completions of which some are better.

    Attributes:
        place: where it stands, such as "llmbar.jsonl, line 3".
        prompt: text or a chat.
        completions: two or more, texts or chats of one message, in the order of the file.
        gold: one number a completion, larger for a better one, equal for a tie.
        pairs: what to compare, (better, worse): places in `completions`; none where all are tied.
        slices: the parts of the benchmark it belongs to, by the name of the division, such as {"subset": "Natural"}.
        votes: what each annotator said, 0 for a tie, else the number of the better completion from 1; () elsewhere.
        extra: all other columns of the file.
    """

    place: str
    prompt: str | list[dict]
    completions: list
    gold: tuple[float, ...]
    pairs: tuple[tuple[int, int], ...]
    slices: dict[str, str]
    votes: tuple[int, ...]
    extra: dict[str, Any]


class Judged(NamedTuple):
    """Judged rows of one format.

    Attributes:
        source: the file or folder they are from, for messages.
        format: a name of `JUDGED`.
        chat: whether prompts and completions are chats; else text.
        rows: the rows.
        dropped: how many rows of the files are left out, by reason.
    """

    source: str
    format: str
    chat: bool
    rows: list[JudgedRow]
    dropped: Counter[str]


def load_judged(path: str | Path, format: str | None = None, most: int | None = None, seed: int = 0) -> Judged:
    """The judged rows of a file, or of all files below a folder.

    Args:
        path: a JSON, JSONL or Parquet file (see `read_located_rows`); or a folder, whose files have one format.
        format: a name of `JUDGED` that the rows are read as; None: told from the columns.
        most: most rows to keep, drawn at random; None: all.
        seed: of the draw.

    Returns:
        `Judged`; where a folder has several files, rows have the slice "file" too.

    Raises:
        ValueError: nothing can be read there, the rows are of no known format or of several, or a row has another
            form than its format's.

    Example:
        >>> import json, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "judge.json"
        >>> row = {"input": "1+1?", "output_1": "3", "output_2": "2", "label": 2, "subset": "sums", "note": "easy"}
        >>> _ = path.write_text(json.dumps(row))
        >>> judged = load_judged(path)
        >>> judged.format, judged.rows[0].gold, judged.rows[0].pairs, judged.rows[0].slices, judged.rows[0].extra
        ('llmbar', (0.0, 1.0), ((1, 0),), {'subset': 'sums'}, {'note': 'easy'})
    """
    path = Path(path)
    if format is not None and format not in JUDGED:
        raise ValueError(f"there is no format {format!r} of judged rows: give one of {', '.join(JUDGED)}.")
    if most is not None and most < 1:
        raise ValueError(f"most is {most}: keep at least 1 row.")
    files = _files(path)
    read = [_read_file(file, format) for file in files]
    for file, one in zip(files, read, strict=True):
        if (one.format, one.chat) != (read[0].format, read[0].chat):
            raise ValueError(
                f"{path} holds rows of the format {read[0].format} ({files[0].name}) and of {one.format} "
                f"({file.name}): give files and folders of one format each."
            )
    rows = [row for one in read for row in one.rows]
    if len(files) > 1:
        named = [str(file.relative_to(path)) for file, one in zip(files, read, strict=True) for _ in one.rows]
        rows = [row._replace(slices=row.slices | {"file": name}) for row, name in zip(rows, named, strict=True)]
    dropped = sum((one.dropped for one in read), Counter())
    if most is not None and most < len(rows):
        kept = np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False))
        dropped["not drawn"] = len(rows) - most
        rows = [rows[place] for place in kept]
    return Judged(str(path), read[0].format, read[0].chat, rows, dropped)


def as_candidates(judged: Judged) -> Candidates:
    """The completions of judged rows, each in a row of its own, ready to be tokenised behind its prompt."""
    values = [{"prompt": row.prompt, "completions": row.completions} for row in judged.rows]
    places = [row.place for row in judged.rows]
    return candidates(Rows(judged.source, "prompt", judged.chat, values, places, Counter()))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    below = sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in below if file.name.removesuffix(".gz").rpartition(".")[2] in _ENDINGS]
    if not files:
        raise ValueError(f"the folder {path} holds no JSON, JSONL or Parquet file: give a folder of judged rows.")
    return files


def _read_file(path: Path, format: str | None) -> Judged:
    rows = read_located_rows(path)
    formats = [format or _told(row) for row in rows]
    for row, name in zip(rows, formats, strict=True):
        if name != formats[0]:
            raise ValueError(
                f"{row.place} has the format {name}, but {rows[0].place} has {formats[0]}: "
                "give the rows of a file the same columns."
            )
    if formats[0] in PLAIN:
        return _plain(rows, str(path), formats[0])
    made = [_row(row, formats[0]) for row in rows]
    kept = [row for row in made if isinstance(row, JudgedRow)]
    dropped = Counter(row for row in made if isinstance(row, str))
    return _judged(str(path), formats[0], not is_text(kept[0].prompt) if kept else False, kept, dropped)


def _judged(source: str, format: str, chat: bool, rows: list[JudgedRow], dropped: Counter[str]) -> Judged:
    if not rows:
        raise ValueError(
            f"{source} has no row left that can be judged ({dict(dropped)}): give rows of two completions."
        )
    return Judged(source, format, chat, rows, dropped)


def _told(row: LocatedRow) -> str:
    """The name of a row's format."""
    fields = row.values
    for name, known in FORMATS.items():
        if fields.keys() >= set(known.columns) and known.fits(fields):
            return name
    for name, columns in PLAIN.items():
        if fields.keys() >= set(columns):
            return name
    known = {name: one.columns for name, one in FORMATS.items()} | dict(PLAIN)
    wanted = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in known.items())
    raise ValueError(
        f"{row.place} has the columns {sorted(fields)}, which are those of no known format: give rows of one of these: "
        f"{wanted}."
    )


def _row(row: LocatedRow, name: str) -> JudgedRow | str:
    """A row of a benchmark, or the reason to drop it."""
    known, (place, fields) = FORMATS[name], row
    try:
        answers = known.read(fields, place)
        if not np.isfinite(answers.gold).all():
            raise ValueError("the gold of a completion is not a finite number")
    except KeyError as error:
        raise ValueError(f"{place} has no column {error}, which rows of the format {name} have: add it.") from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"{place} ").rstrip(".")
        raise ValueError(f"{place} is no row of the format {name} ({reason}): use the file as published.") from None
    slices = {column: str(fields[column]) for column in known.slices if fields.get(column) is not None}
    extra = {
        column: value
        for column, value in fields.items()
        if column not in slices and not re.fullmatch(known.content, column)
    }
    return _complete(place, answers._replace(slices={**answers.slices, **slices}), extra)


def _complete(place: str, answers: Answers, extra: dict[str, Any]) -> JudgedRow | str:
    gold = answers.gold
    if len(answers.completions) < 2:
        return "fewer than two completions"
    if len(answers.completions) == 2 and answers.completions[0] == answers.completions[1]:
        return "two equal completions"
    pairs = answers.pairs
    if pairs is None:
        places = range(len(gold))
        pairs = tuple((one, other) for one in places for other in places if gold[one] > gold[other])
    return JudgedRow(
        place, answers.prompt, answers.completions, gold, pairs, dict(answers.slices), answers.votes, extra
    )


def _plain(rows: Sequence[LocatedRow], source: str, format: str) -> Judged:
    """Rows of the columns that the rest of the package uses, text or chats."""
    read = format_rows(rows, source, ("preference",) if format == "preference" else ("prompt",))
    several = candidates(read)
    flat, made = [row["completion"] for row in several.flat.values], []
    for row, place, count in zip(read.values, read.places, several.counts, strict=True):
        completions, flat = flat[:count], flat[count:]
        gold = (1.0, 0.0) if format == "preference" else tuple(map(float, row["gold"]))
        slices = {name: row[name] for name in _SLICES if is_text(row.get(name))}
        used = ("prompt", "chosen", "rejected", "completions", "gold", *slices)
        extra = {column: value for column, value in row.items() if column not in used}
        made.append(_complete(place, Answers(row["prompt"], completions, gold, slices), extra))
    kept = [row for row in made if isinstance(row, JudgedRow)]
    dropped = read.dropped + Counter(row for row in made if isinstance(row, str))
    return _judged(source, format, read.chat, kept, dropped)
