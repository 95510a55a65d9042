"""What theory says beside what was measured, in one figure: lines and points of the same colour."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.evaluation.figures import GREY, PALETTE, panel_grid, save, style


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel: predicted lines and measured points, by name.

    Attributes:
        title: what it shows.
        x_label: name and unit of the horizontal axis.
        y_label: name and unit of the vertical axis.
        predicted: by name, (x, y), each [points]; drawn as a line, or as dashes over categories.
        measured: by name, (x, y, half), each [points]; drawn as dots with a bar of ± half. A name that is predicted too
            has the same colour.
        levels: by name, a height at which a dotted line is drawn.
        x_scale: "linear", "log" or "symlog".
        y_scale: the same.
        categories: names of the places 0, 1, … of the horizontal axis, where it has no numbers.
    """

    title: str
    x_label: str
    y_label: str
    predicted: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    measured: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    x_scale: str = "linear"
    y_scale: str = "linear"
    categories: Sequence[str] = ()


MOST_INSIDE = 6
"""Curves whose legend finds room inside a panel; of more, it stands beside it."""


def theory_figure(panels: Sequence[Panel], path: str | Path, columns: int = 3) -> Path:
    """Draws the panels, `columns` a row, and writes the file.

    Args:
        panels: at least one.
        path: file to write.
        columns: most panels side by side.

    Returns:
        The path written.

    Raises:
        ValueError: there are no panels, or a curve whose x and y have different lengths.
    """
    if not panels:
        raise ValueError("a figure needs at least one panel")
    for panel in panels:
        for name, (x, *values) in [*panel.predicted.items(), *panel.measured.items()]:
            if any(len(value) != len(x) for value in values):
                raise ValueError(f"the curve {name!r} of panel {panel.title!r} has x and y of different lengths")
    across = min(columns, len(panels))
    down = -(-len(panels) // across)
    with style():
        figure, grid = panel_grid(down, across, width=3.9 * across, height=3.1 * down + 0.4)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw(axes, panel)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        figure.suptitle("lines: theory · points: measured", fontsize=9, color=GREY, x=0.99, ha="right")
        return save(figure, path)


def _draw(axes: Any, panel: Panel) -> None:
    names = list(dict.fromkeys([*panel.measured, *panel.predicted]))  # measured first: the same colours in all panels
    colours = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(names)}
    axes.set_xscale(panel.x_scale)
    axes.set_yscale(panel.y_scale)
    for name, (x, y) in panel.predicted.items():
        label = None if name in panel.measured else name
        shape = {"linestyle": "", "marker": "_", "markersize": 40} if panel.categories else {"linewidth": 1.4}
        axes.plot(x, y, color=colours[name], zorder=2, label=label, **shape)
    for place, (name, (x, y, half)) in enumerate(panel.measured.items()):
        if panel.categories:  # side by side, so that bars do not hide one another
            x = x + 0.12 * (place - (len(panel.measured) - 1) / 2)
        look = {"fmt": "o", "markersize": 4, "elinewidth": 1.2, "capsize": 0, "markeredgecolor": "white"}
        axes.errorbar(x, y, yerr=half, color=colours[name], label=name, zorder=3, markeredgewidth=0.5, **look)
    for name, height in panel.levels.items():
        axes.axhline(height, color=GREY, linestyle=":", linewidth=1.1, zorder=1)
        axes.annotate(
            name, (1.0, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color=GREY
        )
    ticks = np.unique(np.concatenate([x for x, *_ in panel.measured.values()])) if panel.measured else np.zeros(0)
    if panel.x_scale == "log" and 0 < len(ticks) <= 8:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    if panel.categories:
        axes.set_xticks(range(len(panel.categories)), panel.categories, rotation=30, ha="right")
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.y_scale == "log":
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(_few_minor_labels)
    if len(names) > 1:
        beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(names) > MOST_INSIDE else {}
        axes.legend(fontsize=8, markerscale=0.6 if panel.categories else 1.0, **beside)


def _few_minor_labels(value: float, _: int) -> str:
    """Labels at 2 and 5 times a power of ten alone, as plain numbers."""
    digit = round(value / 10 ** np.floor(np.log10(value)))
    return f"{value:g}" if digit in (2, 5) else ""
