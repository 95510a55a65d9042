"""The product of an experiment on theory: rows of what was predicted beside what was measured."""

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.training.json_files import plain, write_json


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A predicted number beside a measured one.

    Attributes:
        quantity: what it is, with its setting, such as `w_N (d=3, N=20)`.
        predicted: what theory says.
        measured: what training or sampling gave.
        standard_error: of the measured number (and of a prediction that was itself sampled); nan where nothing is
            random.
        tolerance: the largest |measured - predicted| that passes, in the unit of both.

    Example:
        >>> Comparison("w_N (d=3, N=20)", 1.205, 1.2061, standard_error=0.0009, tolerance=0.002).passed
        True
    """

    quantity: str
    predicted: float
    measured: float
    standard_error: float = math.nan
    tolerance: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether |measured - predicted| <= tolerance; never with a NaN."""
        return bool(abs(self.measured - self.predicted) <= self.tolerance)

    def record(self) -> dict[str, Any]:
        """The row as it is written: with the field `pass`."""
        numbers = {field.name: float(getattr(self, field.name)) for field in dataclasses.fields(self)[1:]}
        return {"quantity": self.quantity, **numbers, "pass": self.passed}


def within(
    quantity: str, predicted: float, measured: float, share: float, standard_error: float = math.nan
) -> Comparison:
    """A comparison whose tolerance is a share of the prediction, such as 0.02.

    Example:
        >>> within("C_TV", 0.4883, 0.4878, share=0.01).tolerance
        0.004883
    """
    return Comparison(quantity, float(predicted), float(measured), float(standard_error), share * abs(float(predicted)))


def within_errors(quantity: str, predicted: float, measured: float, standard_error: float, errors: float) -> Comparison:
    """A comparison whose tolerance is a number of standard errors.

    Example:
        >>> within_errors("loss", 0.36, 0.365, standard_error=0.002, errors=3.0).passed
        True
    """
    return Comparison(
        quantity, float(predicted), float(measured), float(standard_error), errors * float(standard_error)
    )


def standard_error(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Standard error of the mean along an axis, sd / sqrt(n); nan for one value.

    Example:
        >>> standard_error(np.array([1.0, 2.0, 3.0])).round(4).item()
        0.5774
    """
    count = values.shape[axis]
    if count < 2:
        return np.full(np.delete(values.shape, axis), math.nan)
    return np.asarray(values.std(axis=axis, ddof=1) / math.sqrt(count))


def write_comparisons(folder: Path, comparisons: Sequence[Comparison]) -> None:
    """Writes `comparisons.json` and `comparisons.csv`, one record a row; a NaN is null, or an empty field."""
    records = [comparison.record() for comparison in comparisons]
    write_json(folder / "comparisons.json", plain(records, "comparisons"))
    with open(folder / "comparisons.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]) if records else ["quantity"])
        writer.writeheader()
        writer.writerows({name: "" if value != value else value for name, value in row.items()} for row in records)


def checks(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The comparisons as the checks of a `summary.json`."""
    return [
        {
            "name": comparison.quantity,
            "value": comparison.measured,
            "expected": comparison.predicted,
            "tolerance": comparison.tolerance,
            "pass": comparison.passed,
        }
        for comparison in comparisons
    ]


def markdown(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a Markdown table.

    Example:
        >>> print(markdown([Comparison("slope", -0.069, -0.0691, tolerance=0.001)]))
        | quantity | predicted | measured | s.e. | tolerance | |
        |---|---:|---:|---:|---:|---|
        | slope | -0.069 | -0.0691 | – | 0.001 | pass |
    """
    lines = ["| quantity | predicted | measured | s.e. | tolerance | |", "|---|---:|---:|---:|---:|---|"]
    for one in comparisons:
        cells = [number(value) for value in (one.predicted, one.measured, one.standard_error, one.tolerance)]
        name = one.quantity.replace("|", r"\|")  # or it would end the cell
        lines.append(f"| {name} | {' | '.join(cells)} | {'pass' if one.passed else 'FAIL'} |")
    return "\n".join(lines)


def print_comparisons(comparisons: Sequence[Comparison], title: str) -> None:
    """Prints the comparisons as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # a file or a pipe is as wide as the table
        console = Console(width=140)
    table = Table("quantity", title=Text(title), title_justify="left")
    for header in ("predicted", "measured", "s.e.", "tolerance"):
        table.add_column(header, justify="right")
    table.add_column("")
    for one in comparisons:
        cells = [number(value) for value in (one.predicted, one.measured, one.standard_error, one.tolerance)]
        verdict = Text("pass", style="green") if one.passed else Text("FAIL", style="bold red")
        table.add_row(*map(Text, [one.quantity, *cells]), verdict)
    console.print(table)


def number(value: float) -> str:
    """Five digits, or a dash for a NaN.

    Example:
        >>> number(1.23456789), number(float("nan"))
        ('1.2346', '–')
    """
    return "–" if math.isnan(value) else f"{value:.5g}"
