"""A report on reward models that fits one page: one figure, and one HTML file that needs nothing beside it.

The figure has a row of panels for each file of judged rows: accuracy by slice, gold of the best of n where there are
several completions, calibration, and accuracy against the share of pairs that is kept. The HTML file holds it twice,
drawn for light and for dark pages.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.evaluation.figures import label_ends, method_colours, panel_grid, save, style
from rlhf_jax.evaluation.judging import Rows
from rlhf_jax.evaluation.overview import COLUMNS, FileReport, lines_of, number, row_named, uncalibrated
from rlhf_jax.evaluation.sheets import TRIVIAL

# Slices of one panel: the largest ones, for a page has no room for all. The tables have them all.
MOST_SLICES = 10
# Models whose ECE stands in the panel of calibration: more would cover the curves.
MOST_LABELS = 4
# The least pairs that a point of a curve stands for: accuracy of fewer jumps with every pair.
LEAST_PAIRS, LEAST_IN_A_BIN = 20, 10
_LINES = {TRIVIAL: (0, (1, 1.2)), "epistemic": "-", "aleatoric": (0, (4, 2))}
_GREY = "#8A8F98"
# Letters that fit beside each other in the key above the panels.
_LETTERS = 180
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


def report_figure(files: Sequence[FileReport], path: str | Path | io.BytesIO, dark: bool = False) -> None:
    """Draws all files, a row of panels each.

    Args:
        files: what to draw; one or more.
        path: a PNG file, or a buffer for one.
        dark: whether it is for a dark page.
    """
    import matplotlib

    colours = _colours(tuple(files[0].models), dark)
    graded = [_graded(file) for file in files]
    with ExitStack() as stack:
        stack.enter_context(style())
        if dark:
            stack.enter_context(matplotlib.rc_context(_DARK))
        heights = [max(2.9, 0.9 + 0.25 * len(_slice_names(file))) for file in files]
        width = 3.5 * (4 if any(graded) else 3)
        figure, spare = panel_grid(1, 1, width=width, height=sum(heights) + 0.5)
        spare[0, 0].remove()
        grid = figure.add_gridspec(len(files), 4 if any(graded) else 3, height_ratios=heights)
        slices, surest = [], []
        for row, (file, several) in enumerate(zip(files, graded, strict=True)):
            # Where there is nothing to draw of best-of-n, the names of slices have its room.
            panels = [figure.add_subplot(grid[row, : 1 if several else -2])]
            panels += [figure.add_subplot(grid[row, column]) for column in (-2, -1)]
            most = 22 if several or not any(graded) else 48
            _slice_panel(panels[0], file, colours, most)
            _reliability_panel(panels[1], file, colours)
            _coverage_panel(panels[2], file, colours)
            panels[0].set_title(f"{_short(file.name, most)} ({file.read} rows)")
            panels[1].set_title("calibration")
            panels[2].set_title("accuracy of the surest pairs")
            slices.append(panels[0])
            surest.append(panels[2])
            if several:
                beside = figure.add_subplot(grid[row, 1])
                beside.set_title("best of n")
                _best_of_n_panel(beside, file, colours)
        # The same axis for all files, from chance or below to 1: over less of it noise looks like an effect.
        for panel in slices:
            panel.set_xlim(min(one.get_xlim()[0] for one in slices), 1.03)
        for panel in surest:
            panel.set_ylim(min(one.get_ylim()[0] for one in surest), 1.03)
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
    first = next(iter(files[0].models))
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
        _overview(files),
        "<figure><picture><source media='(prefers-color-scheme: dark)' "
        f"srcset='data:image/png;base64,{pictures[1]}'><img alt='Accuracy by slice, best of n, "
        f"calibration, accuracy of the surest pairs' src='data:image/png;base64,{pictures[0]}'></picture></figure>",
        f"<p class=note>{_NOTE} {_text(uncalibrated(files))}</p>",
    ]
    for file in files:
        columns = {model: one.rows for model, one in file.models.items()}
        trivial = _table({"": file.baselines})
        parts.append(f"<details><summary>{_text(file.name)}: baselines</summary>{trivial}</details>")
        parts.append(f"<details><summary>{_text(file.name)}: all measures</summary>{_table(columns)}</details>")
        if file.compared:
            title = f"{_text(file.name)}: less {_text(first)}, on the same pairs"
            parts.append(f"<details><summary>{title}</summary>{_table(file.compared)}</details>")
    for title, rows in others.items():
        parts.append(f"<details><summary>{_text(title)}</summary>{_table({'': rows})}</details>")
    return "\n".join([*parts, "</main></html>\n"])


_NOTE = (
    "Intervals: 95 %, bootstrap over prompts. A tie counts one half. Calibration is that of the probability stated, "
    "each pair in both orders: sigmoid(margin), or, of models that were taught ratings, Φ(margin / s) with s what they "
    "say the data leave open; larger points stand for more pairs. AUROC of errors: that of the best of a model's "
    "uncertainties, which flatters it a little; all of them are in the table of all measures. Wrong sign by an "
    "uncertainty s: Φ(−|margin| / s). In the figure a share of pairs is kept by epistemic (solid) or "
    "aleatoric (dashed) uncertainty, or by the trivial one, −|margin| (dotted); grey dots are chance. Best of n is the "
    "exact expectation over subsets, with the interval of each model at the end of its line. All models are measured "
    "on the rows that all of them read."
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
tr.plain td { color: var(--soft) } tr.file th { padding-top: 1.1rem } tr.file small { font-weight: 400 }
th small { color: var(--soft) }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto }
.note { color: var(--soft); font-size: .9rem } summary { cursor: pointer; font-weight: 600; padding: .3rem 0 }
"""


def _overview(files: Sequence[FileReport]) -> str:
    """The lines of all files; the best accuracy of a file is marked."""
    parts = [f"<tr><th>model{''.join(f'<th>{_text(name)}' for name in COLUMNS)}"]
    for file in files:
        about = f"{file.read} of {file.rows} rows, {file.format}"
        parts.append(f"<tr class=file><th colspan=5>{_text(file.name)} <small>{_text(about)}</small>")
        lines = lines_of(file)
        right = [line.cells[0]["mean"] for line in lines if not line.trivial and line.cells[0]]
        for line in lines:
            first = line.cells[0]
            best = not line.trivial and len(right) > 1 and first is not None and first["mean"] == max(right)
            cells = [_cell(cell, " class=best" if best and cell is first else "") for cell in line.cells]
            cells[2] += f"<br><small>{_text(line.by)}</small>" if line.by else ""
            parts.append(f"<tr{' class=plain' if line.trivial else ''}><td>{_text(line.name)}{''.join(cells)}")
    return f"<div class=wide><table>{''.join(parts)}</table></div>"


def _table(columns: Mapping[str, Rows]) -> str:
    """Rows of the summary by name, a column each."""
    names = list(dict.fromkeys(row["name"] for rows in columns.values() for row in rows))
    lines = ["<tr><th>measure" + "".join(f"<th>{_text(name)}" for name in columns)] if len(columns) > 1 else []
    for name in names:
        lines.append(f"<tr><td>{_text(name)}" + "".join(_cell(row_named(rows, name)) for rows in columns.values()))
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _cell(row: Mapping[str, Any] | None, mark: str = "") -> str:
    mean, interval = number(row)
    return f"<td{mark}>{mean}" + (f"<small>{interval}</small>" if interval else "")


def _text(value: Any) -> str:
    return html.escape(str(value))


def _colours(models: Sequence[str], dark: bool) -> dict[str, str]:
    """A colour a model; black lines are white on a dark page."""
    return {name: "#FFFFFF" if dark and one == "#000000" else one for name, one in method_colours(models).items()}


def _graded(file: FileReport) -> bool:
    return any(one.best_of_n is not None for one in file.models.values())


def _slice_names(file: FileReport) -> list[str]:
    """All rows first, then the largest slices of the first division."""
    divisions = next(iter(file.models.values())).slices
    rows = next(iter(divisions.values()), [])
    largest = sorted(rows, key=lambda row: -row["n"])[:MOST_SLICES]
    return ["all", *(row["name"] for row in rows if row in largest)]


def _slice_panel(panel: Any, file: FileReport, colours: Mapping[str, str], most: int) -> None:
    names, count = _slice_names(file), len(colours)
    for turn, (model, one) in enumerate(file.models.items()):
        found = {row["name"]: row for row in next(iter(one.slices.values()), [])}
        found["all"] = row_named(one.rows, "accuracy")
        offset = (turn - (count - 1) / 2) * min(0.7 / count, 0.22)
        for place, name in enumerate(names):
            row = found.get(name)
            if row is not None:
                panel.plot(row["ci95"], [place + offset] * 2, color=colours[model], linewidth=1.6, zorder=3)
                panel.plot([row["mean"]], [place + offset], "o", markersize=4.5, color=colours[model], zorder=4)
    longer = row_named(file.baselines, "accuracy of the longer completion")
    if longer is not None:
        panel.axvline(longer["mean"], color=_GREY, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    panel.axvline(0.5, color=_GREY, linewidth=1.0, linestyle=":", zorder=1)
    panel.set_yticks(range(len(names)), [_short(name, most) for name in names])
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("accuracy (dashed: longer one, dotted: chance)")


def _reliability_panel(panel: Any, file: FileReport, colours: Mapping[str, str]) -> None:
    """Points as large as the share of pairs that they stand for; bins of few pairs are left out."""
    panel.plot([0.5, 1.0], [0.5, 1.0], color=_GREY, linewidth=1.0, linestyle=":", zorder=1)
    lowest, handles = 0.45, []
    for model, one in file.models.items():
        if one.reliability is not None:
            bins = one.reliability
            drawn = (bins.probability >= 0.5) & (bins.count >= LEAST_IN_A_BIN)  # the other half is its mirror image
            x, y, size = bins.probability[drawn], bins.accuracy[drawn], bins.count[drawn]
            label = "ECE {} {}".format(*number(row_named(one.rows, "ECE")))
            panel.plot(x, y, linewidth=1.2, color=colours[model], zorder=3)
            panel.scatter(x, y, s=6 + 90 * size / size.sum(), color=colours[model], linewidths=0, zorder=4)
            handles.append((colours[model], label))
            lowest = min([lowest, *(y - 0.05)])
    labels = handles if len(handles) <= MOST_LABELS else []  # the table has those of all models
    top = 1.03 + (1.03 - lowest) * 0.1 * len(labels) / (1.0 - 0.1 * len(labels))
    panel.set_ylim(lowest, top)
    panel.set_yticks(np.arange(np.ceil(10 * lowest) / 10, 1.01, 0.1 if lowest > 0.3 else 0.2))
    panel.set_xlim(0.48, 1.02)
    panel.set_xlabel("probability stated")
    panel.set_ylabel("share that is right")
    for place, (colour, label) in enumerate(labels):  # above 1, where no curve is
        at = (0.02, 0.995 - 0.09 * place)
        panel.annotate(label, at, xycoords="axes fraction", color=colour, fontsize=8.5, va="top")
    panel.set_visible(bool(handles))


def _coverage_panel(panel: Any, file: FileReport, colours: Mapping[str, str]) -> None:
    """From the share on that has enough pairs to say something."""
    for model, one in file.models.items():
        for name, curve in one.coverage.items():
            if name in _LINES:
                shares = np.linspace(min(1.0, max(0.1, LEAST_PAIRS / curve.coverage.size)), 1.0, 91)
                panel.plot(
                    shares, curve.at(shares), color=colours[model], linestyle=_LINES[name], linewidth=1.4, zorder=3
                )
    panel.axhline(0.5, color=_GREY, linewidth=1.0, linestyle=":", zorder=1)
    panel.set_xlabel("share of pairs kept")
    panel.set_ylabel("their accuracy")
    panel.set_visible(any(one.coverage for one in file.models.values()))


def _best_of_n_panel(panel: Any, file: FileReport, colours: Mapping[str, str]) -> None:
    """Each line has its interval at its end, beside those of the others: bands would lie on each other."""
    from matplotlib.ticker import MaxNLocator

    for turn, (model, one) in enumerate(file.models.items()):
        if one.best_of_n is not None:
            n, mean, low, high = one.best_of_n.T
            last = float(n[-1])
            at = last + (turn + 1) * min(0.02, 0.1 / len(colours)) * (last - 1.0)
            panel.plot(n, mean, color=colours[model], zorder=3)
            panel.plot([at] * 2, [low[-1], high[-1]], color=colours[model], linewidth=1.6, zorder=3)
            panel.plot([at], mean[-1:], "o", markersize=3.5, color=colours[model], zorder=4)
    ends = {}
    for name, line in (("best", "-."), ("longest", (0, (4, 2)))):
        row = row_named(file.baselines, f"gold gained by the {name} over a random pick")
        if row is not None:
            panel.axhline(row["mean"], color=_GREY, linewidth=1.2, linestyle=line, zorder=1)
            ends[name] = (last, row["mean"])
    panel.axhline(0.0, color=_GREY, linewidth=1.0, linestyle=":", zorder=1)
    ends["random"] = (last, 0.0)
    label_ends(panel, ends, dict.fromkeys(ends, _GREY))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("n")
    panel.set_ylabel("gold over a random pick")


def _keys(figure: Any, colours: Mapping[str, str], files: Sequence[FileReport]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker="o", markersize=4.5, label=name) for name, colour in colours.items()]
    kinds = [name for name in _LINES if any(name in one.coverage for file in files for one in file.models.values())]
    if len(kinds) > 1:
        handles += [Line2D([], [], color=_GREY, linestyle=_LINES[name], label=f"kept by {name}") for name in kinds]
    widest = max(len(handle.get_label()) for handle in handles) + 6
    columns = min(len(handles), max(2, _LETTERS // widest))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=2.2)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else "…" + name[-(most - 1) :]
