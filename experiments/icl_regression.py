"""In-context regression, theory beside experiment: what linear transformers learn, how fast, and where it breaks.

    python experiments/icl_regression.py
    python experiments/icl_regression.py --preset paper --out runs/icl_regression/paper

Every number that theory gives stands beside one that was integrated, sampled or trained: gradient flow of one layer
(Zhang et al. 2023), its risk on longer contexts and under shifts, k layers and GD++ (Ahn et al. 2023), one step of
gradient descent (von Oswald et al. 2023), and finite pools of tasks.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_jax.evaluation.figures import GREY, PALETTE, band, panel_grid, save, style
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.icl import comparison
from rlhf_jax.icl.claims import regression, regression_dynamics, regression_layers
from rlhf_jax.icl.mixture import at_least
from rlhf_jax.parallel.lanes import use_all_cores
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.progress import ProgressReport


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the run.

    Attributes:
        preset: a complete configuration to start from.
        out: folder to write to; None: runs/icl_regression/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a comparison fails.
        seeds: runs of everything that is trained, >= 1.
        layers: numbers of layers k of the linear transformers that are trained.
        settings: dimension and context length of the layers that learn a step of gradient descent, d1 N1 d2 N2 ...
        pools: sizes M of the pools of tasks whose minimiser is measured.
        steps: updates of every training but that of GD++.
        gd_steps: updates of GD++, which is slower to arrive.
        batch: prompts an update of linear transformers of k layers; GD++ takes at most 1,000, the others half.
        prompts: drawn for each point of a curve of risks.
        many_prompts: drawn for each least-squares fit; a pool's minimiser is met within 1 % from 400,000 on.
        averaged_pools: pools of tasks that the figure of risks by pool size averages over, >= 2.
        rate: learning rate of the descent along the logistic curve, the time that a step takes.
        flow_step: step of Euler's rule along the logistic curve, of time.
        flow_time: time to which gradient flow is integrated for its limit.
    """

    preset: Literal["quick", "paper"] = "quick"
    out: Path | None = None
    overwrite: bool = False
    strict: bool = False
    seeds: int = 2
    layers: tuple[int, ...] = (1, 2)
    settings: tuple[int, ...] = (5, 10)
    pools: tuple[int, ...] = (16,)
    steps: int = 1500
    gd_steps: int = 2000
    batch: int = 1000
    prompts: int = 10_000
    many_prompts: int = 400_000
    averaged_pools: int = 300
    rate: float = 2e-3
    flow_step: float = 1e-4
    flow_time: float = 400.0


PAPER = Config(
    preset="paper",
    seeds=3,
    layers=(1, 2, 3),
    settings=(10, 10, 5, 10, 10, 25),
    pools=(4, 16, 64),
    steps=3000,
    gd_steps=3000,
    batch=2000,
    prompts=40_000,
)


def claims_of(config: Config) -> dict[str, Callable[[], Any]]:
    """The claims by name, in the order in which they are made."""
    trained = {"seeds": config.seeds, "steps": config.steps}
    pairs = tuple(zip(config.settings[::2], config.settings[1::2], strict=True))
    return {
        "flow": lambda: regression_dynamics.gradient_flow_limit(end=config.flow_time),
        "logistic": lambda: regression_dynamics.logistic_curve(
            step=config.flow_step, rate=config.rate, seeds=config.seeds, batch=config.batch // 2
        ),
        "lengths": lambda: regression.context_lengths(prompts=config.prompts),
        "shift": lambda: regression.covariate_shift(prompts=config.prompts),
        "random covariances": lambda: regression.random_covariances(prompts=config.many_prompts // 4),
        "pools": lambda: regression.pool_minimisers(config.pools, prompts=config.many_prompts),
        "layers": lambda: regression_layers.sparse_layers(config.layers, batch=config.batch, **trained),
        "GD++": lambda: regression_layers.gd_plus_plus(
            seeds=config.seeds, steps=config.gd_steps, batch=min(config.batch, 1000)
        ),
        "step": lambda: regression_layers.constructed_step(pairs, batch=config.batch // 2, **trained),
    }


def rows_of(found: Mapping[str, Any]) -> list[dict]:
    """Losses of what was trained, over seeds."""
    layers, turning = found["layers"], found["GD++"]
    rows = [
        row(f"loss of linear layers, k = {k}, trained", "squared error", losses)
        for k, losses in zip(layers.layers, layers.trained, strict=True)
    ]
    return [*rows, row(f"loss of GD++, k = {turning.layers[0]}, trained", "squared error", turning.trained[0])]


def draw_curves(found: Mapping[str, Any], folder: Path) -> None:
    """The logistic training curve, risk against M, and risk under a shift of the inputs' variance."""
    curve = found["logistic"]
    with style():
        figure, grid = panel_grid(1, 2, width=8.0, height=3.2)
        left, right = grid.flat
        left.plot(curve.times, curve.integrated, color=PALETTE[1], linewidth=4, alpha=0.35, label="integrated matrices")
        left.plot(curve.times, curve.predicted, color="black", linewidth=1.0, label="logistic function")
        left.set_ylabel("a, of A = a I")
        for number, losses in enumerate(curve.losses):
            label = "descent on prompts, by seed" if number == 0 else None
            right.plot(curve.trained_times, losses, color=PALETTE[0], linewidth=0.8, alpha=0.6, label=label)
        right.plot(curve.trained_times, curve.predicted_losses, color="black", linewidth=1.0, label="theory")
        right.set_ylabel("loss")
        for panel in grid.flat:
            panel.set_xlabel("time (learning rate × steps)")
            panel.legend()
        save(figure, folder / "logistic.png")

    for name, label in (("lengths", "examples in the context of the test, M"), ("shift", "factor of the variance")):
        risks = found[name]
        with style():
            figure, grid = panel_grid(1, 1, width=4.6, height=3.2)
            panel = grid[0, 0]
            panel.plot(risks.axis, risks.predicted, color="black", linewidth=1.0, label="theory")
            dots = {"color": PALETTE[0], "marker": "o", "markersize": 4.5, "linestyle": "", "label": "drawn prompts"}
            panel.errorbar(risks.axis, risks.measured, 2 * risks.errors, **dots)
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xticks(risks.axis, [f"{value:g}" for value in risks.axis])
            if name == "lengths":
                panel.set_yticks((0.3, 0.5, 1.0, 2.0, 4.0), ("0.3", "0.5", "1", "2", "4"))
            panel.minorticks_off()
            panel.set_xlabel(label)
            panel.set_ylabel("squared error" if name == "lengths" else "squared error / E (w′x)²")
            panel.legend()
            save(figure, folder / f"{name}.png")


def draw_layers(found: Mapping[str, Any], folder: Path) -> None:
    """Losses by number of layers, with their training curves."""
    layers, turning = found["layers"], found["GD++"]
    with style():
        figure, grid = panel_grid(1, 2, width=8.0, height=3.2)
        left, right = grid.flat
        left.plot(layers.layers, layers.shared, color=GREY, marker="s", markersize=4, label="one step for all layers")
        left.plot(layers.layers, layers.predicted, color="black", linewidth=1.0, label="best steps, theory")
        dots = {"marker": "o", "markersize": 4.5, "linestyle": "", "zorder": 4}
        left.plot(layers.layers, layers.trained, color=PALETTE[0], **dots)
        left.plot([], [], color=PALETTE[0], label="trained, by seed", **dots)
        left.plot(
            np.tile(turning.layers, turning.trained.size), turning.trained[0], color=PALETTE[2], label="GD++", **dots
        )
        left.set_xticks(layers.layers)
        left.set_xlabel("layers k")
        left.set_ylabel("E (error)²")
        window = max(1, layers.curves.shape[2] // 50)
        kinds = [
            (f"{k} layers" if k > 1 else "1 layer", c, p)
            for k, c, p in zip(layers.layers, layers.curves, layers.predicted, strict=True)
        ]
        kinds.append((f"{turning.layers[0]} layers of GD++", turning.curves[0], turning.predicted[0]))
        for (name, curves, predicted), colour in zip(kinds, PALETTE, strict=False):
            count = curves.shape[1] // window
            smooth = curves[:, : count * window].reshape(len(curves), count, window).mean(axis=2)
            error = smooth.std(axis=0) / np.sqrt(len(smooth))
            band(right, window * (np.arange(count) + 0.5), smooth.mean(axis=0), error, colour, label=name)
            right.axhline(predicted, color=colour, linestyle=":", linewidth=1.2)
        right.set_xlabel("update")
        right.set_ylabel("training loss (dotted: least)")
        for panel in grid.flat:
            panel.set_yscale("log")
            panel.legend()
        save(figure, folder / "layers.png")


def draw_pools(averaged_pools: int, path: Path) -> None:
    """Risks by the size of the pool of tasks: theory, averaged over pools."""
    sizes = np.array((1, 2, 4, 8, 16, 32, 64, 256))
    risks = regression.pool_sizes(tuple(sizes.tolist()), pools=averaged_pools)
    with style():
        figure, grid = panel_grid(1, 1, width=4.6, height=3.2)
        panel = grid[0, 0]
        band(panel, sizes, risks.fresh, risks.fresh_error, PALETTE[0], marker="o", markersize=4, label="new tasks")
        band(
            panel, sizes, risks.pool, risks.pool_error, PALETTE[1], marker="o", markersize=4, label="tasks of the pool"
        )
        panel.axvline(8, color=GREY, linestyle=":", linewidth=1.2)
        panel.text(8.4, float(risks.fresh[0]), "M = d", color=GREY, va="top")
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.set_xlabel("tasks in the pool, M")
        panel.set_ylabel("squared error / d, theory")
        panel.legend()
        save(figure, path)


def main(config: Config) -> dict:
    """Makes every claim, draws the figures, and returns the summary."""
    began, clock = time.monotonic(), CompileClock()
    for name in ("seeds", "steps", "gd_steps", "prompts", "many_prompts"):
        at_least(f"option {name}", getattr(config, name), 1)
    for name in ("batch", "averaged_pools"):
        at_least(f"option {name}", getattr(config, name), 2)
    if not config.settings or len(config.settings) % 2:
        raise ValueError(f"the settings {config.settings} must be pairs: give d1 N1 d2 N2 ...")
    if not config.layers or not config.pools:
        raise ValueError("there are no layers or no pools: give at least one number of each.")
    folder = run_folder.create(config.out, "icl_regression", config, config.overwrite)
    found, comparisons = {}, []
    claims = claims_of(config)
    with ProgressReport("claims", total=len(claims)) as progress:
        for name, claim in claims.items():
            found[name] = claim()
            made = found[name] if isinstance(found[name], list) else found[name].comparisons
            comparisons += made
            progress.advance({"passed": sum(one.passed for one in comparisons), "of": len(comparisons)})
    comparison.print_comparisons(comparisons, "in-context regression: theory beside experiment")
    comparison.write_comparisons(folder.path, comparisons)
    draw_curves(found, folder.path / "figures")
    draw_layers(found, folder.path / "figures")
    draw_pools(config.averaged_pools, folder.path / "figures" / "pools.png")
    checks, total = comparison.checks(comparisons), time.monotonic() - began
    result = run_folder.summary(folder, rows_of(found), checks, total, clock.seconds)
    run_folder.write_summary(folder, result)
    run_folder.print_summary(result | {"checks": []})
    return result


if __name__ == "__main__":
    use_all_cores()
    run(main, {"quick": Config(), "paper": PAPER}, __doc__)
