"""What is measured of reward models on files of judged rows, in short: a line a model and file, and trivial baselines.

A line has accuracy, ECE, the AUROC of errors of the best uncertainty, and the gold that best-of-n gains. Everything
else stands in the rows that the line is taken from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.evaluation.judging import Rows
from rlhf_jax.evaluation.model_measures import Measured
from rlhf_jax.evaluation.statistics import row

COLUMNS = ("accuracy", "ECE", "AUROC of errors", "best of n over random")
"""The numbers of a line."""
_RANDOM = "gold gained over a random pick"


@dataclass(frozen=True)
class FileReport:
    """What is said of one file.

    Attributes:
        name: of the file.
        format: of its rows.
        rows: how many rows it has.
        read: how many of them all models read.
        models: by model, what was measured; the same models in the same order for every file.
        baselines: rows that need no model.
        compared: by model, rows of its difference from the first one.
    """

    name: str
    format: str
    rows: int
    read: int
    models: Mapping[str, Measured]
    baselines: Rows
    compared: Mapping[str, Rows]


class Line(NamedTuple):
    """A line of the overview.

    Attributes:
        name: of a model, or of a baseline.
        trivial: whether it is a baseline.
        cells: a row of the summary for each of `COLUMNS`, or None.
        by: the uncertainty of the AUROC, the one with the largest; "" where there is none.
    """

    name: str
    trivial: bool
    cells: tuple[Mapping[str, Any] | None, ...]
    by: str = ""


def row_named(rows: Rows, name: str) -> Mapping[str, Any] | None:
    """The row of that name; None where there is none, or its number is not defined."""
    found = next((row for row in rows if row["name"] == name), None)
    return None if found is None or found["mean"] is None or not np.isfinite(found["mean"]) else found


def lines_of(file: FileReport) -> list[Line]:
    """The lines of one file: its models, and then the baselines.

    The baselines are the longer (of several, the longest) completion, the one that stands first, chance, and of
    several the best one there is.
    """
    lines = []
    for model, one in file.models.items():
        detectors = {name: row_named(one.rows, f"{name}: AUROC of errors") for name in one.coverage}
        detectors = {name: row for name, row in detectors.items() if row is not None}
        by = max(detectors, key=lambda name: detectors[name]["mean"], default="")
        gained = row_named(one.rows, _RANDOM)
        accuracy, error = (row_named(one.rows, name) for name in ("accuracy", "ECE"))
        lines.append(Line(model, False, (accuracy, error, detectors.get(by), gained), by))
    trivial = {
        "longer completion": ("accuracy of the longer completion", "gold gained by the longest over a random pick"),
        "first position": ("accuracy of the first position", ""),
        "chance": ("accuracy of chance", ""),
        "best there is": ("", "gold gained by the best over a random pick"),
    }
    for name, (right, gained) in trivial.items():
        cells = row_named(file.baselines, right), None, None, row_named(file.baselines, gained)
        if any(cells):
            lines.append(Line(name, True, cells))
    return lines


def table_of(reports: Sequence[FileReport], others: dict[str, Rows]) -> Rows:
    """All rows of the summary, named by file and model."""
    rows = []
    for report in reports:
        parts = {"": [row("rows that all models read", "", np.array([report.read / report.rows])), *report.baselines]}
        parts |= {f", {model}": one.rows for model, one in report.models.items()}
        first = next(iter(report.models))
        parts |= {f", {model} less {first}": several for model, several in report.compared.items()}
        rows += [
            one | {"name": f"{report.name}{of}: {one['name']}"} for of, several in parts.items() for one in several
        ]
    return rows + [one for several in others.values() for one in several]


def uncalibrated(files: Sequence[FileReport]) -> str:
    """A sentence on the models that state no probability, of whose calibration nothing is said; "" for none."""
    several = [pair for file in files for pair in file.models.items()]
    silent = dict.fromkeys(model for model, one in several if one.coverage and one.reliability is None)
    return f"Without calibration, as no probability is stated: {', '.join(silent)}." if silent else ""


def number(row: Mapping[str, Any] | None) -> tuple[str, str]:
    """A number and its interval as text; a dash, and nothing, for a number that is not there.

    Example:
        >>> number({"mean": 0.5, "ci95": [0.25, 0.75]}), number(None)
        (('0.500', '[0.250, 0.750]'), ('–', ''))
    """
    if row is None:
        return "–", ""
    low, high = row["ci95"]
    known = low is not None and np.isfinite(low) and np.isfinite(high)
    return f"{row['mean']:.3f}", f"[{low:.3f}, {high:.3f}]" if known else ""


def print_overview(files: Sequence[FileReport], also: Sequence[Mapping[str, Any]] = ()) -> None:
    """Prints the lines of all files as one table.

    Args:
        files: what was measured.
        also: rows of the summary that are of no single file, one line each below the table.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # a file or a pipe is as wide as the table
        console = Console(width=180)
    table = Table("file", "model", title="with 95 % intervals over prompts", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("by")
    for file in files:
        for place, line in enumerate(lines_of(file)):
            named = f"{file.name} ({file.read} rows)" if place == 0 else ""
            cells = [" ".join(number(cell)).strip() for cell in line.cells]
            style = "dim" if line.trivial else ""
            table.add_row(*(Text(part, style=style) for part in (named, line.name, *cells, line.by)))
        table.add_section()
    console.print(table)
    about = [" ".join([f"{row['name']}:", *number(row)]) for row in also]
    for line in filter(None, [*about, uncalibrated(files)]):
        console.print(Text(line))
