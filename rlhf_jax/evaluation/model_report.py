"""A report on reward models that fits one page: one figure, and one HTML file that needs nothing beside it.

The figure has a row of panels for each file of judged rows: accuracy by slice, calibration, accuracy against the share
of pairs that is kept, and gold of the best of n where completions are graded. The HTML file holds it twice, drawn for
light and for dark pages.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.evaluation.figures import method_colours, panel_grid, save, style
from rlhf_jax.evaluation.judging import Rows
from rlhf_jax.evaluation.model_measures import Measured
from rlhf_jax.evaluation.sheets import TRIVIAL

# Slices of one panel: the largest ones, for a page has no room for all. The tables have them all.
MOST_SLICES = 10
_LINES = {TRIVIAL: (0, (1, 1.2)), "epistemic": "-", "aleatoric": (0, (4, 2))}
_TITLES = ("calibration", "accuracy of the surest pairs", "gold of the best of n")
_DARK = {
    "figure.facecolor": "#16181D",
    "savefig.facecolor": "#16181D",
    "axes.facecolor": "#16181D",
    "axes.edgecolor": "#9AA0AA",
    "axes.labelcolor": "#E4E6EA",
    "text.color": "#E4E6EA",
    "xtick.color": "#B9BEC7",
    "ytick.color": "#B9BEC7",
    "grid.color": "#2D3139",
}


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


def report_figure(files: Sequence[FileReport], path: str | Path | io.BytesIO, dark: bool = False) -> None:
    """Draws all files, a row of panels each.

    Args:
        files: what to draw; one or more.
        path: a PNG file, or a buffer for one.
        dark: whether it is for a dark page.
    """
    import matplotlib

    colours = _colours(tuple(files[0].models), dark)
    graded = any(one.best_of_n is not None for file in files for one in file.models.values())
    columns = 4 if graded else 3
    with ExitStack() as stack:
        stack.enter_context(style())
        if dark:
            stack.enter_context(matplotlib.rc_context(_DARK))
        heights = [max(2.7, 0.9 + 0.23 * len(_slice_names(file))) for file in files]
        figure, grid = panel_grid(len(files), columns, width=3.35 * columns, height=sum(heights) + 0.5)
        grid[0, 0].get_gridspec().set_height_ratios(heights)
        for file, panels in zip(files, grid, strict=True):
            _slice_panel(panels[0], file, colours)
            _reliability_panel(panels[1], file, colours)
            _coverage_panel(panels[2], file, colours)
            if graded:
                _best_of_n_panel(panels[3], file, colours)
            for panel, title in zip(panels, (file.name, *_TITLES), strict=False):
                panel.set_title(_short(title, 34))
        _keys(figure, colours, files)
        if isinstance(path, io.BytesIO):
            figure.savefig(path, format="png")
        else:
            save(figure, path)


def report_html(files: Sequence[FileReport], others: Mapping[str, Rows], about: Mapping[str, str]) -> str:
    """The report as one HTML document, figures included.

    Args:
        files: what was measured; one or more.
        others: further tables by their titles, rows of the summary each.
        about: what to say of the run: commit, device and such.

    Returns:
        The document; it loads nothing.
    """
    models = list(files[0].models)
    pictures = []
    for dark in (False, True):
        buffer = io.BytesIO()
        report_figure(files, buffer, dark)
        pictures.append(base64.b64encode(buffer.getvalue()).decode())
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1"><title>Reward models</title>',
        f"<style>{_CSS}</style><main><h1>Reward models</h1>",
        "<dl>" + "".join(f"<dt>{_text(name)}<dd>{_text(value)}" for name, value in about.items()) + "</dl>",
        _overview(files, models),
        "<figure><picture><source media='(prefers-color-scheme: dark)' "
        f"srcset='data:image/png;base64,{pictures[1]}'><img alt='Accuracy by slice, calibration, accuracy of the "
        f"surest pairs, gold of the best of n' src='data:image/png;base64,{pictures[0]}'></picture></figure>",
        f"<p class=note>{_NOTE}</p>",
    ]
    for file in files:
        columns = {model: one.rows for model, one in file.models.items()}
        parts.append(f"<details><summary>{_text(file.name)}: all measures</summary>{_table(columns)}</details>")
        if file.compared:
            title = f"{_text(file.name)}: less {_text(models[0])}, on the same pairs"
            parts.append(f"<details><summary>{title}</summary>{_table(file.compared)}</details>")
    for title, rows in others.items():
        parts.append(f"<details><summary>{_text(title)}</summary>{_table({'': rows})}</details>")
    return "\n".join([*parts, "</main></html>\n"])


_NOTE = (
    "Intervals: 95 %, bootstrap over prompts. A tie counts one half. Calibration is that of sigmoid(margin), each pair "
    "in both orders. A share of pairs is kept by the uncertainty named: solid, epistemic; dashed, aleatoric; dotted, "
    "the trivial one, −|margin|. Best of n is the exact expectation over subsets. All models are measured on the rows "
    "that all of them read."
)
_CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b616b; --line: #d9dce1; --page: #fff; --best: #eef6f1 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --soft: #a2a8b3; --line: #343943; --page: #16181d; --best: #1c2f27 }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1180px; margin: auto; padding: 2rem 1.5rem 4rem }
h1 { font-size: 1.6rem; margin: 0 0 .5rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1.5rem; color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 1.5rem }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600 } th:first-child, td:first-child { text-align: left }
td small { color: var(--soft); margin-left: .4em } td.best { background: var(--best); font-weight: 600 }
td.best small { font-weight: 400 }
tr.plain td { color: var(--soft) }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto }
.note { color: var(--soft); font-size: .9rem } summary { cursor: pointer; font-weight: 600; padding: .3rem 0 }
"""


def _overview(files: Sequence[FileReport], models: Sequence[str]) -> str:
    """Accuracy of each model on each file beside the baselines; the best of a file is marked."""
    header = "".join(f"<th>{_text(file.name)}<br><small>{file.read} of {file.rows} rows</small>" for file in files)
    lines = [f"<tr><th>accuracy{header}"]
    found = {model: [_row(file.models[model].rows, "accuracy") for file in files] for model in models}
    best = [max((row["mean"] for row in column if row), default=None) for column in zip(*found.values(), strict=True)]
    for model, rows in found.items():
        cells = (
            _cell(row, " class=best" if row and len(models) > 1 and row["mean"] == top else "")
            for row, top in zip(rows, best, strict=True)
        )
        lines.append(f"<tr><td>{_text(model)}{''.join(cells)}")
    plain = {"longer completion": "accuracy of the longer completion"}
    for name, wanted in plain.items():
        lines.append(f"<tr class=plain><td>{name}" + "".join(_cell(_row(file.baselines, wanted), "") for file in files))
    lines.append("<tr class=plain><td>random" + "<td>0.500" * len(files))
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _table(columns: Mapping[str, Rows]) -> str:
    """Rows of the summary by name, a column each."""
    names = list(dict.fromkeys(row["name"] for rows in columns.values() for row in rows))
    lines = ["<tr><th>measure" + "".join(f"<th>{_text(name)}" for name in columns)] if len(columns) > 1 else []
    for name in names:
        lines.append(f"<tr><td>{_text(name)}" + "".join(_cell(_row(rows, name), "") for rows in columns.values()))
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _row(rows: Rows, name: str) -> dict[str, Any] | None:
    return next((row for row in rows if row["name"] == name), None)


def _cell(row: Mapping[str, Any] | None, mark: str) -> str:
    if row is None or row["mean"] is None or not np.isfinite(row["mean"]):
        return "<td>–"
    low, high = row["ci95"]
    known = low is not None and np.isfinite(low) and np.isfinite(high)
    interval = f"<small>[{low:.3f}, {high:.3f}]</small>" if known else ""
    return f"<td{mark}>{row['mean']:.3f}{interval}"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _colours(models: Sequence[str], dark: bool) -> dict[str, str]:
    """A colour a model; black lines are white on a dark page."""
    return {name: "#FFFFFF" if dark and one == "#000000" else one for name, one in method_colours(models).items()}


def _slice_names(file: FileReport) -> list[str]:
    """All rows first, then the largest slices of the first division."""
    divisions = next(iter(file.models.values())).slices
    rows = next(iter(divisions.values()), [])
    largest = sorted(rows, key=lambda row: -row["n"])[:MOST_SLICES]
    return ["all", *(row["name"] for row in rows if row in largest)]


def _slice_panel(panel: Any, file: FileReport, colours: Mapping[str, str]) -> None:
    names, count = _slice_names(file), len(colours)
    for number, (model, one) in enumerate(file.models.items()):
        found = {row["name"]: row for row in next(iter(one.slices.values()), [])}
        found["all"] = _row(one.rows, "accuracy")
        offset = (number - (count - 1) / 2) * min(0.7 / count, 0.22)
        for place, name in enumerate(names):
            row = found.get(name)
            if row is not None:
                panel.plot(row["ci95"], [place + offset] * 2, color=colours[model], linewidth=1.6, zorder=3)
                panel.plot([row["mean"]], [place + offset], "o", markersize=4.5, color=colours[model], zorder=4)
    longer = _row(file.baselines, "accuracy of the longer completion")
    if longer is not None:
        panel.axvline(longer["mean"], color="#8A8F98", linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
    panel.axvline(0.5, color="#8A8F98", linewidth=0.8, linestyle=":", zorder=1)
    panel.set_yticks(range(len(names)), [_short(name) for name in names])
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.set_xlabel("accuracy (dashed: the longer completion)")


def _reliability_panel(panel: Any, file: FileReport, colours: Mapping[str, str]) -> None:
    panel.plot([0.5, 1.0], [0.5, 1.0], color="#8A8F98", linewidth=0.9, linestyle=":", zorder=1)
    for model, one in file.models.items():
        if one.reliability is not None:
            sure = one.reliability.probability >= 0.5  # the other half is its mirror image
            x, y = one.reliability.probability[sure], one.reliability.accuracy[sure]
            ece = one.reliability.expected_error
            panel.plot(x, y, "o-", markersize=4, linewidth=1.4, color=colours[model], label=f"ECE {ece:.3f}", zorder=3)
    panel.set_xlabel("probability given, sigmoid(|margin|)")
    panel.set_ylabel("share that is right")
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="best", fontsize=8, handlelength=1.4)


def _coverage_panel(panel: Any, file: FileReport, colours: Mapping[str, str]) -> None:
    shares = np.linspace(0.1, 1.0, 91)
    for model, one in file.models.items():
        for name, curve in one.coverage.items():
            panel.plot(
                shares, curve.at(shares), color=colours[model], linestyle=_LINES.get(name, "-"), linewidth=1.5, zorder=3
            )
    panel.set_xlabel("share of pairs kept")
    panel.set_ylabel("their accuracy")


def _best_of_n_panel(panel: Any, file: FileReport, colours: Mapping[str, str]) -> None:
    drawn = {model: one.best_of_n for model, one in file.models.items() if one.best_of_n is not None}
    panel.set_visible(bool(drawn))
    for model, table in drawn.items():
        n, mean, low, high = table.T
        panel.fill_between(n, low, high, color=colours[model], alpha=0.15, linewidth=0, zorder=2)
        panel.plot(n, mean, color=colours[model], zorder=3)
    for name, line in (("gold of the best", "-."), ("gold of the longest", (0, (4, 2)))):
        row = _row(next(iter(file.models.values())).rows, name)
        if drawn and row is not None:
            panel.axhline(row["mean"], color="#8A8F98", linewidth=1.0, linestyle=line, zorder=1)
            label = name.removeprefix("gold of ")
            panel.annotate(label, (n[-1], row["mean"]), color="#8A8F98", fontsize=8, ha="right", va="bottom")
    panel.set_xlabel("n")
    panel.set_ylabel("gold")


def _keys(figure: Any, colours: Mapping[str, str], files: Sequence[FileReport]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker="o", markersize=4.5, label=name) for name, colour in colours.items()]
    kinds = dict.fromkeys(name for file in files for one in file.models.values() for name in one.coverage)
    if len(kinds) > 1:
        handles += [
            Line2D([], [], color="#8A8F98", linestyle=_LINES.get(name, "-"), label=f"kept by {name}") for name in kinds
        ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6), handlelength=2.2)


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else "…" + name[-(most - 1) :]
