"""The tables and figures of a study of uncertain reward models: how sure they are, and what policies gain.

A *kind* of reward model has measures, one number a seed (nan where something is not defined for it); a *policy* is a
kind, an algorithm and a reward rule, with its curves along training. The plain policy of an algorithm, trained on the
score of a single reward model, is what all others are compared with, seed by seed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.figures import GREY, method_colours, panel_grid, save, style
from rlhf_jax.evaluation.frontier import Curves
from rlhf_jax.evaluation.statistics import Estimate, mean_interval

Seeds = Float[np.ndarray, " seeds"]
Policies = Mapping[tuple[str, str, str], Curves]
"""Curves by kind, algorithm and rule."""

PLAIN = ("single", "mean")
"""The kind and the rule of the plain policy."""


def plain_of(policies: Policies, algorithm: str) -> Curves:
    """The plain policy of an algorithm."""
    return policies[PLAIN[0], algorithm, PLAIN[1]]


def known(values: Seeds) -> Estimate | None:
    """Mean and 95 % interval over seeds; None where a seed has no number."""
    return mean_interval(values) if np.isfinite(values).all() else None


def kinds_table(
    labels: Mapping[str, str],
    costs: Mapping[str, Mapping[str, int | float]],
    measures: Mapping[str, Mapping[str, Seeds]],
    names: Mapping[str, str],
) -> str:
    """Costs and measures of every kind, one line each, as Markdown; means over seeds and half widths of 95 % intervals.

    Args:
        labels: what each kind is.
        costs: by kind, numbers by name.
        measures: by kind, [seeds] by the keys of `names`.
        names: the measures to show, and what they are called.
    """
    costly = tuple(next(iter(costs.values())))
    lines = [f"| kind | {' | '.join((*costly, *names.values()))} |", "|---|" + "---:|" * (len(costly) + len(names))]
    for kind, label in labels.items():
        cells = [
            f"{costs[kind][name]:,.3g}" if costs[kind][name] < 1000 else f"{costs[kind][name]:,.0f}" for name in costly
        ]
        cells += [_plus_minus(known(measures[kind][name])) for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def policies_table(labels: Mapping[str, str], policies: Policies, algorithm: str) -> str:
    """Final gold of every policy of an algorithm as Markdown, a line a kind and a column a rule: mean [95 % interval].

    Args:
        labels: what each kind is.
        policies: by kind, algorithm and rule.
        algorithm: whose policies.
    """
    mine = {(kind, rule): curves.gold[:, -1] for (kind, other, rule), curves in policies.items() if other == algorithm}
    rules = list(dict.fromkeys(rule for _, rule in mine))
    lines = [f"| kind | {' | '.join(rules)} |", "|---|" + "---:|" * len(rules)]
    for kind, label in labels.items():
        cells = [_interval(mean_interval(mine[kind, rule])) if (kind, rule) in mine else "" for rule in rules]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kinds_figure(
    labels: Mapping[str, str], measures: Mapping[str, Mapping[str, Seeds]], names: Mapping[str, str], path: str | Path
) -> Path:
    """One panel a measure, one row a kind: seeds as faint dots, the mean with its 95 % interval.

    Args:
        labels: what each kind is; rows from the top.
        measures: by kind, [seeds] by the keys of `names`; nan is left out.
        names: the measures to show, and what they are called.
        path: file to write.

    Returns:
        The path written.
    """
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    with style():
        figure, grid = panel_grid(rows, columns, 2.3 * columns + 2.4, rows * (0.21 * len(labels) + 0.75) + 0.2)
        for place, (panel, (name, title)) in enumerate(zip(grid.flat, names.items(), strict=False)):
            for height, kind in enumerate(labels):
                values = measures[kind][name]
                if np.isfinite(values).any():
                    _dot(panel, height, values[np.isfinite(values)], "#0072B2")
            _rows(panel, labels.values() if place % columns == 0 else None, len(labels))
            panel.set_title(title, fontsize=9)
        for panel in grid.flat[len(names) :]:
            panel.set_visible(False)
        return save(figure, path)


def policies_figure(labels: Mapping[str, str], policies: Policies, path: str | Path, unit: str) -> Path:
    """Final gold of every policy, one panel an algorithm, one row a kind, one colour a rule, with 95 % intervals.

    The dotted line is the plain policy, the grey one the initial policy.

    Args:
        labels: what each kind is; rows from the top.
        policies: by kind, algorithm and rule.
        path: file to write.
        unit: of gold.

    Returns:
        The path written.
    """
    from matplotlib.lines import Line2D

    algorithms, rules = (list(dict.fromkeys(key[place] for key in policies)) for place in (1, 2))
    colours = method_colours(rules)
    with style():
        width, height = 3.4 * len(algorithms) + 2.4, 0.5 * len(labels) + 1.2
        figure, grid = panel_grid(1, len(algorithms), width, height)
        for place, (panel, algorithm) in enumerate(zip(grid.flat, algorithms, strict=True)):
            plain = plain_of(policies, algorithm)
            panel.axvline(plain.gold[:, -1].mean(), color="black", linestyle=":", linewidth=1.0, zorder=1)
            panel.axvline(plain.gold[:, 0].mean(), color=GREY, linewidth=1.0, zorder=1)
            for row, kind in enumerate(labels):
                mine = [rule for rule in rules if (kind, algorithm, rule) in policies]
                for step, rule in enumerate(mine):
                    offset = 0.11 * (step - (len(mine) - 1) / 2)
                    _dot(panel, row + offset, policies[kind, algorithm, rule].gold[:, -1], colours[rule], faint=False)
            _rows(panel, labels.values() if place == 0 else None, len(labels))
            panel.set_title(algorithm)
            panel.set_xlabel(f"final gold ({unit})")
        keys = [Line2D([], [], color=colours[rule], marker="o", markersize=5, label=rule) for rule in rules]
        keys.append(Line2D([], [], color="black", linestyle=":", label="plain policy"))
        keys.append(Line2D([], [], color=GREY, label="initial policy"))
        figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), handlelength=1.6, columnspacing=1.2)
        return save(figure, path)


def _dot(panel: Any, height: int | float, values: np.ndarray, colour: str, faint: bool = True) -> None:
    estimate = mean_interval(values)
    if faint:
        panel.scatter(values, np.full(values.shape, height + 0.25), color=colour, s=5, alpha=0.3, linewidths=0)
    panel.plot([estimate.low, estimate.high], [height, height], color=colour, linewidth=1.6, zorder=3)
    panel.plot([estimate.mean], [height], marker="o", markersize=4.5, color=colour, markeredgecolor="white", zorder=4)


def _rows(panel: Any, names: Any, count: int) -> None:
    panel.set_ylim(count - 0.4, -0.6)
    panel.grid(False, axis="y")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.set_yticks(range(count), list(names) if names is not None else [""] * count, color="black", fontsize=8.5)
    for height in range(count - 1):
        panel.axhline(height + 0.5, color="#E6E6E6", linewidth=0.6, zorder=0)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def _plus_minus(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.mean:.3f} ± {estimate.high - estimate.mean:.3f}"
