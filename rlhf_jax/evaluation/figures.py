"""The figures of the studies, as PNG files: one style, one colour a method, bands of one standard error over seeds.

Matplotlib is imported when a figure is drawn; no display and no global state are needed.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.overoptimization import ScalingFit, predict
from rlhf_jax.evaluation.statistics import mean_interval, paired_difference, pearson

# Okabe and Ito's palette, told apart by colour-blind readers (its yellow is too pale for lines).
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
GREY, PALE = "#6E6E6E", "#C4C4C4"
DISTANCE_LABEL, GOLD_LABEL = "√KL (√nats)", "gold reward"

Curves = Mapping[str, Float[np.ndarray, "seeds steps"]]


def style() -> AbstractContextManager[None]:
    """The one look of every figure: a light grid, no top and right spines, type that survives a two-column page."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "font.family": "sans-serif",
            "font.size": 9.5,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 9.5,
            "axes.edgecolor": "#4D4D4D",
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E6E6E6",
            "grid.linewidth": 0.7,
            "lines.linewidth": 1.8,
            "lines.solid_capstyle": "round",
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "xtick.color": "#4D4D4D",
            "ytick.color": "#4D4D4D",
            "legend.frameon": False,
            "legend.fontsize": 9,
            "savefig.dpi": 200,
            "savefig.bbox": "tight",
        }
    )


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour a method, in the order given: pass methods in the same order to every figure of a study."""
    return {method: PALETTE[i % len(PALETTE)] for i, method in enumerate(methods)}


def overoptimization_figure(
    runs: Mapping[str, Mapping[str, np.ndarray]], fits: Mapping[str, ScalingFit], path: str | Path
) -> Path:
    """Gold (solid) and proxy (dashed) against √KL, one panel a method, with the fitted law dotted.

    The gold curves of the other methods stand in grey behind each panel. Points are seed means by update; updates whose
    mean √KL falls into the same sixtieth of its range are averaged seed by seed, so that a KL that wavers draws one
    line.

    Args:
        runs: by method, "kl" (nats), "gold" and "proxy", float [seeds, steps] each.
        fits: by method, the fit to draw; a method may be absent.
        path: file to write.

    Returns:
        The path written.
    """
    colours = method_colours(tuple(runs))
    curves = {method: _along_distance(run) for method, run in runs.items()}
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    with style():
        figure, grid = panel_grid(rows, columns, width=max(3.0 * columns, 4.4), height=2.4 * rows + 0.6, shared=True)
        for panel, (method, curve) in zip(grid.flat, curves.items(), strict=False):
            for other in curves:
                if other != method:
                    behind = curves[other]
                    panel.plot(behind["distance"], behind["gold"][0], color=PALE, linewidth=0.9, zorder=1)
            colour = colours[method]
            band(panel, curve["distance"], *curve["proxy"], colour=colour, linestyle=(0, (4, 2)), linewidth=1.4)
            band(panel, curve["distance"], *curve["gold"], colour=colour)
            if method in fits:
                d = np.linspace(0.0, float(curve["distance"].max()), 200)
                panel.plot(d, predict(fits[method], d), color="black", linestyle=":", linewidth=1.2, zorder=4)
            panel.set_title(method, color=colour)
        for panel in grid.flat[len(runs) :]:
            panel.set_visible(False)
        for column in range(columns):
            lowest = grid[(len(runs) - 1 - column) // columns, column]
            lowest.set_xlabel(DISTANCE_LABEL)
            lowest.tick_params(labelbottom=True)
        for panel in grid[:, 0]:
            panel.set_ylabel("reward")
        keys = [("gold", GREY, "-"), ("proxy", GREY, (0, (4, 2)))]
        keys += [("fitted law", "black", ":")] if fits else []
        keys += [("gold of the other methods", PALE, "-")] if len(runs) > 1 else []
        _legend(figure, keys)
        return save(figure, path)


def training_figure(gold: Curves, path: str | Path, updates: np.ndarray | None = None, label: str = GOLD_LABEL) -> Path:
    """Gold reward by update, one line a method with its band, labelled at its end.

    Args:
        gold: by method, float [seeds, steps].
        path: file to write.
        updates: the update of each step, [steps]; None: 0, 1, ….
        label: what the vertical axis shows.

    Returns:
        The path written.
    """
    colours = method_colours(tuple(gold))
    with style():
        figure, grid = panel_grid(1, 1, width=5.6, height=3.3)
        panel = grid[0, 0]
        ends = {}
        for method, values in gold.items():
            x = np.arange(values.shape[1]) if updates is None else updates
            mean, error = _mean_error(values)
            band(panel, x, mean, error, colour=colours[method])
            ends[method] = (float(x[-1]), float(mean[-1]))
        label_ends(panel, ends, colours)
        panel.set_xlabel("update")
        panel.set_ylabel(label)
        return save(figure, path)


def best_of_n_figure(curves: Mapping[str, Mapping[str, np.ndarray]], path: str | Path) -> Path:
    """Gold (left) and proxy (right) of best-of-n against its KL in nats, with n along the top.

    Args:
        curves: by method, "n" [J], "kl" [J], "gold" and "proxy" [replications, J] (prompts or seeds, for the band).
        path: file to write.

    Returns:
        The path written.
    """
    colours = method_colours(tuple(curves))
    with style():
        figure, grid = panel_grid(1, 2, width=7.4, height=3.1)
        for panel, quantity in zip(grid.flat, ("gold", "proxy"), strict=True):
            ends = {}
            for method, curve in curves.items():
                mean, error = _mean_error(curve[quantity])
                linestyle = "-" if quantity == "gold" else (0, (4, 2))
                band(panel, curve["kl"], mean, error, colour=colours[method], linestyle=linestyle)
                ends[method] = (float(curve["kl"][-1]), float(mean[-1]))
            panel.set_xlabel("KL of best-of-n (nats)")
            panel.set_ylabel(f"{quantity} reward of the pick")
            longest = max(curves.values(), key=lambda curve: float(curve["kl"][-1]))
            top = panel.secondary_xaxis("top")
            shown = _spread(longest["kl"], 7)
            top.set_xticks(longest["kl"][shown], [f"{int(n):,}" for n in longest["n"][shown]])
            top.set_xlabel("n")
            if quantity == "proxy":
                label_ends(panel, ends, colours)
        return save(figure, path)


def uncertainty_figure(
    uncertainty: Float[np.ndarray, "seeds steps"], gap: Float[np.ndarray, "seeds steps"], path: str | Path
) -> Path:
    """Uncertainty U and the error |proxy − gold| along a run, and one against the other with Pearson's r.

    Args:
        uncertainty: mean U of the samples of each step, float [seeds, steps].
        gap: mean |proxy − gold| of the same samples, float [seeds, steps].
        path: file to write.

    Returns:
        The path written. The r in the title is the mean ± s.d. over seeds of the correlation along each run.
    """
    steps = np.arange(uncertainty.shape[1])
    gap_label = "|proxy − gold|"
    with style():
        figure, grid = panel_grid(1, 2, width=7.4, height=3.1)
        figure.get_layout_engine().set(wspace=0.08)
        left, right = grid.flat
        left.set_title("along the run")
        band(left, steps, *_mean_error(uncertainty), colour=PALETTE[1])
        left.set_xlabel("update")
        left.set_ylabel("uncertainty U", color=PALETTE[1])
        left.tick_params(axis="y", colors=PALETTE[1])
        twin = left.twinx()
        twin.grid(False)
        twin.spines["right"].set_visible(True)
        band(twin, steps, *_mean_error(gap), colour=PALETTE[0], linestyle=(0, (4, 2)))
        twin.set_ylabel(gap_label, color=PALETTE[0])
        twin.tick_params(axis="y", colors=PALETTE[0])
        order = np.random.default_rng(0).permutation(uncertainty.size)  # so that no seed hides the others
        when = np.broadcast_to(steps, uncertainty.shape).ravel()[order]
        dots = right.scatter(
            uncertainty.ravel()[order], gap.ravel()[order], c=when, cmap="cividis", s=9, alpha=0.75, linewidths=0
        )
        bar = figure.colorbar(dots, ax=right, label="update")
        bar.solids.set_alpha(1.0)
        bar.outline.set_visible(False)
        correlations = np.array([pearson(u, g) for u, g in zip(uncertainty, gap, strict=True)])
        spread = f" ± {correlations.std(ddof=1):.2f} s.d." if correlations.size > 1 else ""
        right.set_title(f"Pearson r = {correlations.mean():.2f}{spread}")
        right.set_xlabel("uncertainty U")
        right.set_ylabel(gap_label)
        return save(figure, path)


def final_gold_figure(
    final: Mapping[str, Float[np.ndarray, " seeds"]], path: str | Path, baseline: str = "PPO", label: str = GOLD_LABEL
) -> Path:
    """Final gold by method as a dot with its 95% interval, and its paired difference to a baseline.

    Args:
        final: by method, float [seeds]; the seeds of all methods are the same, in the same order.
        path: file to write.
        baseline: the method that the others are compared with.
        label: what is shown.

    Returns:
        The path written.

    Raises:
        ValueError: the baseline is not among the methods.
    """
    if baseline not in final:
        raise ValueError(f"the baseline {baseline!r} is not among the methods {sorted(final)}")
    colours = method_colours(tuple(final))
    with style():
        figure, grid = panel_grid(1, 2, width=7.4, height=0.36 * len(final) + 1.15)
        left, right = grid.flat
        for place, (method, values) in enumerate(final.items()):
            faint = {"color": colours[method], "s": 11, "alpha": 0.35, "linewidths": 0, "zorder": 2}
            left.scatter(values, np.full(values.shape, place + 0.22), **faint)
            _dot(left, place, mean_interval(values), colours[method])
            if method == baseline:
                right.text(0.0, place, " baseline", color=GREY, va="center", fontsize=8.5)
            else:
                _dot(right, place, paired_difference(values, final[baseline]), colours[method])
                right.scatter(values - final[baseline], np.full(values.shape, place + 0.22), **faint)
        right.axvline(0.0, color="#4D4D4D", linewidth=0.9, zorder=1)
        for panel in (left, right):
            panel.set_ylim(len(final) - 0.4, -0.6)
            panel.grid(False, axis="y")
            panel.tick_params(axis="y", length=0)
            panel.spines["left"].set_visible(False)
        left.set_yticks(range(len(final)), list(final), color="black", fontsize=9.5)
        right.set_yticks(range(len(final)), [""] * len(final))
        left.set_xlabel(f"final {label} (95% interval)")
        right.set_xlabel(f"difference to {baseline}, paired by seed")
        return save(figure, path)


def panel_grid(rows: int, columns: int, width: float, height: float, shared: bool = False) -> tuple[Any, np.ndarray]:
    """A figure on the Agg canvas, outside pyplot's registry, with a [rows, columns] grid of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False)


def save(figure: Any, path: str | Path) -> Path:
    """Writes a figure, making its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return Path(path)


def _mean_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the leading axis and its standard error (0 for one replication)."""
    count = values.shape[0]
    spread = values.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.zeros(values.shape[1:])
    return values.mean(axis=0), spread


def _along_distance(run: Mapping[str, np.ndarray], bins: int = 60) -> dict[str, Any]:
    """Seed-mean √KL, and mean and standard error of gold and proxy, over bins of equal width in that √KL."""
    distance = np.sqrt(np.maximum(run["kl"], 0.0)).mean(axis=0)
    edges = np.linspace(distance.min(), distance.max(), bins + 1)[1:-1]
    place = np.digitize(distance, edges)
    members = [np.flatnonzero(place == b) for b in np.unique(place)]
    binned = {
        name: _mean_error(np.stack([run[name][:, steps].mean(axis=1) for steps in members], axis=1))
        for name in ("gold", "proxy")
    }
    return {"distance": np.array([distance[steps].mean() for steps in members]), **binned}


def band(panel: Any, x: np.ndarray, mean: np.ndarray, error: np.ndarray, colour: str, **line: Any) -> None:
    """A line with a band of mean ± error."""
    panel.fill_between(x, mean - error, mean + error, color=colour, alpha=0.18, linewidth=0, zorder=2)
    panel.plot(x, mean, color=colour, zorder=3, **line)


def _dot(panel: Any, place: int, estimate: Any, colour: str) -> None:
    panel.plot([estimate.low, estimate.high], [place, place], color=colour, linewidth=2.0, zorder=3)
    panel.plot([estimate.mean], [place], marker="o", markersize=6.5, color=colour, markeredgecolor="white", zorder=4)


def _spread(x: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most `most` points of an ascending axis, about evenly spaced, both ends among them."""
    targets = np.linspace(x[0], x[-1], most)
    return np.unique(np.abs(x[None, :] - targets[:, None]).argmin(axis=1))


def label_ends(panel: Any, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Names beside the ends of lines, moved apart vertically where they would touch, with a hair line to their line."""
    low, high = panel.get_ylim()
    gap = 0.062 * (high - low)
    order = sorted(ends, key=lambda name: ends[name][1])
    heights = [ends[name][1] for name in order]
    for _ in range(200):
        for i in range(len(heights) - 1):
            overlap = gap - (heights[i + 1] - heights[i])
            if overlap > 0.0:
                heights[i] -= overlap / 2.0
                heights[i + 1] += overlap / 2.0
    for name, height in zip(order, heights, strict=True):
        panel.annotate(
            name,
            xy=ends[name],
            xytext=(1.05, (height - low) / (high - low)),
            textcoords="axes fraction",
            color=colours[name],
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": colours[name], "lw": 0.6, "shrinkB": 2, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def _legend(figure: Any, keys: Sequence[tuple[str, str, Any]]) -> None:
    """A legend outside the data, above the panels; each key is a label, a colour and a line style."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linestyle=line, label=label) for label, colour, line in keys]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(keys), handlelength=2.4)
