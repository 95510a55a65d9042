"""Algorithms compared: gold reward at equal samples and at equal KL, and the frontier of the two.

An algorithm that has moved far may have gained more by that alone. So a comparison is made twice: after equally many
samples, and where all have the same KL from the initial policy.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rlhf_jax.evaluation.figures import DISTANCE_LABEL, PALE, PALETTE, band, label_ends, panel_grid, save, style
from rlhf_jax.evaluation.statistics import mean_interval, row
from rlhf_jax.evaluation.trajectories import at_matched_kl


class Curves(NamedTuple):
    """An algorithm along its training, measured R times in every seed.

    Attributes:
        samples: responses drawn so far, int [R], from 0 on.
        kl: KL(policy || initial policy), nats a response, float64 [seeds, R]; 0 at first.
        gold: gold reward, [seeds, R].
        proxy: the score that is trained on, [seeds, R].
    """

    samples: Int[np.ndarray, " R"]
    kl: Float[np.ndarray, "seeds R"]
    gold: Float[np.ndarray, "seeds R"]
    proxy: Float[np.ndarray, "seeds R"]


Arms = Mapping[str, Curves]


def common_distances(arms: Arms, count: int = 3) -> Float[np.ndarray, " G"]:
    """Distances √KL that every seed of every algorithm reaches: `count` equal parts of the way to the farthest one.

    There are none where a seed of an algorithm has not moved at all.

    Example:
        >>> near, far = (np.array([[0.0, end]]) for end in (4.0, 9.0))
        >>> common_distances({"a": Curves(np.arange(2), near, near, near), "b": Curves(np.arange(2), far, far, far)})
        array([0.66666667, 1.33333333, 2.        ])
    """
    reached = min(float(np.sqrt(np.maximum(curves.kl, 0.0)).max(axis=1).min()) for curves in arms.values())
    return np.linspace(0.0, reached, count + 1)[1:] if reached > 0.0 else np.zeros(0)


def samples_to_reach(curves: Curves, level: float) -> Float[np.ndarray, " seeds"]:
    """Responses drawn before gold is first measured at `level` or above, by seed; inf where it never is.

    Example:
        >>> gold = np.array([[0.2, 0.9, 0.8], [0.2, 0.5, 0.6]])
        >>> samples_to_reach(Curves(np.array([0, 64, 128]), gold, gold, gold), 0.9).tolist()
        [64.0, inf]
    """
    there = curves.gold >= level
    return np.where(there.any(axis=1), curves.samples[there.argmax(axis=1)].astype(np.float64), math.inf)


def comparison_rows(arms: Arms, unit: str) -> list[dict[str, Any]]:
    """Rows for `summary.json`: gold, proxy and KL after all samples, and gold at the `common_distances`.

    Args:
        arms: by algorithm.
        unit: of the gold reward.
    """
    grid = common_distances(arms)
    rows = []
    for name, curves in arms.items():
        for what, values, its in (
            ("gold", curves.gold, unit),
            ("proxy", curves.proxy, unit),
            ("KL", curves.kl, "nat"),
        ):
            rows.append(row(f"{name}: final {what}", its, values[:, -1]))
        for at, values in zip(grid, at_matched_kl(curves.kl, curves.gold, grid).T, strict=True):
            rows.append(row(f"{name}: gold at KL = {at**2:.3g} nats", unit, values))
    return rows


def equal_samples_table(arms: Arms) -> str:
    """Gold, proxy and KL of every algorithm after all samples, as a Markdown table with 95 % intervals over seeds."""
    samples = {int(curves.samples[-1]) for curves in arms.values()}
    if len(samples) > 1:
        raise ValueError(f"algorithms have drawn {sorted(samples)} samples; compare runs of equal length.")
    lines = [
        f"| algorithm, after {samples.pop():,} samples | gold | proxy | KL (nats) |",
        "|---|---:|---:|---:|",
    ]
    for name, curves in arms.items():
        cells = (_interval(values[:, -1]) for values in (curves.gold, curves.proxy, curves.kl))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def equal_kl_table(arms: Arms) -> str:
    """Gold of every algorithm where it first has the KL of a column, as a Markdown table with 95 % intervals."""
    grid = common_distances(arms)
    if not grid.size:
        return "Gold at equal KL: an algorithm has not moved, so there is no KL that all of them reach."
    lines = [
        f"| gold at a KL of | {' | '.join(f'{at**2:.3g} nats' for at in grid)} |",
        f"|---|{'---:|' * len(grid)}",
    ]
    for name, curves in arms.items():
        matched = at_matched_kl(curves.kl, curves.gold, grid)
        cells = (_interval(column) for column in matched.T)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reach_table(arms: Arms, level: float) -> str:
    """Samples that seeds of every algorithm took to reach a level of gold, as a Markdown table."""
    lines = ["| algorithm | seeds that reach it | median samples | slowest seed |", "|---|---:|---:|---:|"]
    for name, curves in arms.items():
        each = samples_to_reach(curves, level)
        ends = (f"{value:,.0f}" if math.isfinite(value) else "–" for value in (np.median(each), each.max()))
        lines.append(f"| {name} | {np.isfinite(each).sum()} of {len(each)} | {' | '.join(ends)} |")
    return "\n".join(lines)


def frontier_figure(arms: Arms, families: Mapping[str, Sequence[str]], path: str | Path, label: str) -> Path:
    """Gold against √KL along training, one panel a family, with the other families in grey and 95 % intervals of gold.

    A point is one measurement, the means over seeds of both; a line joins them in the order of training (a policy may
    gain at the same KL, or lose), and a dot marks the last.

    Args:
        arms: by algorithm.
        families: the algorithms of each panel.
        path: file to write.
        label: what the gold reward is called.

    Returns:
        The path written.
    """
    lines = {
        name: (np.sqrt(np.maximum(curves.kl, 0.0)).mean(axis=0), *_mean_half(curves.gold))
        for name, curves in arms.items()
    }

    def draw(panel: Any, x: np.ndarray, mean: np.ndarray, half: np.ndarray, colour: str) -> None:
        line = {"color": colour, "marker": ".", "markersize": 4, "linewidth": 1.4}
        panel.errorbar(x, mean, yerr=half, ecolor=(colour, 0.5), elinewidth=0.7, **line)

    return _panels(lines, draw, families, path, DISTANCE_LABEL, label)


def learning_figure(
    arms: Arms, families: Mapping[str, Sequence[str]], path: str | Path, label: str, level: float | None = None
) -> Path:
    """Gold against samples, one panel a family, with the other families in grey and 95 % intervals over seeds.

    Args:
        arms: by algorithm.
        families: the algorithms of each panel.
        path: file to write.
        label: what the gold reward is called.
        level: height of a line to reach; None: no such line.

    Returns:
        The path written.
    """
    lines = {name: (curves.samples, *_mean_half(curves.gold)) for name, curves in arms.items()}
    return _panels(lines, band, families, path, "responses drawn", label, level)


def _panels(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    draw: Callable[..., None],
    families: Mapping[str, Sequence[str]],
    path: str | Path,
    across: str,
    up: str,
    level: float | None = None,
) -> Path:
    """Small multiples of lines (x, mean, half width), each named beside its end."""
    columns = min(2, len(families))
    rows = -(-len(families) // columns)
    width, height = (6.2, 3.6) if len(families) == 1 else (4.6 * columns, 2.7 * rows + 0.2)
    with style():
        figure, grid = panel_grid(rows, columns, width, height, shared=True)
        colours = {
            name: PALETTE[place % len(PALETTE)] for names in families.values() for place, name in enumerate(names)
        }
        for panel, (family, names) in zip(grid.flat, families.items(), strict=False):
            for name in set(lines) - set(names):
                panel.plot(*lines[name][:2], color=PALE, linewidth=0.8, zorder=1)
            for name in names:
                x, mean, half = lines[name]
                draw(panel, x, mean, half, colour=colours[name])
                panel.plot(x[-1], mean[-1], marker="o", markersize=4.5, color=colours[name], zorder=5)
            if level is not None:
                panel.axhline(level, color="black", linestyle=":", linewidth=1.0, zorder=1)
            panel.set_title(family)
        for panel, names in zip(grid.flat, families.values(), strict=False):  # once the common height is known
            ends = {name: (float(lines[name][0][-1]), float(lines[name][1][-1])) for name in names}
            label_ends(panel, ends, colours)
        for panel in grid.flat[len(families) :]:
            panel.set_visible(False)
        for column in range(columns):
            lowest = grid[(len(families) - 1 - column) // columns, column]
            lowest.set_xlabel(across)
            lowest.tick_params(labelbottom=True)
        for panel in grid[:, 0]:
            panel.set_ylabel(up)
        return save(figure, path)


def _mean_half(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds and half the width of its 95 % interval (0 for one seed)."""
    estimates = [mean_interval(column) for column in values.T]
    half = [0.0 if each.n == 1 else each.mean - each.low for each in estimates]
    return np.array([each.mean for each in estimates]), np.array(half)


def _interval(values: np.ndarray) -> str:
    estimate = mean_interval(values)
    if math.isnan(estimate.low):
        return f"{estimate.mean:.2f}"
    return f"{estimate.mean:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
