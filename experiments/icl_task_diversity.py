"""How many tasks must training show before a model learns regression in context, rather than the tasks themselves?

    python experiments/icl_task_diversity.py
    python experiments/icl_task_diversity.py --preset paper

Three parts, in `comparisons.json`, `comparisons.csv`, `summary.json` and figures:

1. The estimators that a trained model is compared with, beside their expected errors: least squares, averaging and
   ridge after k examples, Bayes over a pool of M tasks, Bayes over noise levels.
2. One layer of linear attention trained on pools of M tasks, beside the minimiser of theory. It loses new tasks while
   M is below d, for the pool's second moment is singular: a matter of rank.
3. A small transformer trained on pools of M tasks: how far it is from Bayes over the pool and from ridge. It is not
   the phenomenon of part 2: it is about what a network can learn by heart.

Part 1, d = 8 and K = 16, error / d over 20 pools (ridge: 0.345 predicted, 0.342 measured):

| M                                    | 1     | 8     | 64    | 512   | 4,096 |
|--------------------------------------|------:|------:|------:|------:|------:|
| Bayes over the pool, tasks of it     | 0.000 | 0.087 | 0.156 | 0.208 | 0.254 |
| Bayes over the pool, new tasks       | 1.95  | 1.26  | 0.875 | 0.648 | 0.517 |

Part 3, in trials of 2,000 to 3,000 steps, d = 2 and K = 8, two seeds: on new tasks, distance / d to Bayes over the pool
and to ridge is 0.10 and 0.50 at M = 4, 0.07 and 0.11 at M = 16, 0.040 and 0.042 at M = 256. So a network of this size
does learn small pools by heart. For larger ones its error falls to near ridge's, but the two Bayes predictors come
closer to each other (0.010 at M = 256) than it comes to either: at this size it cannot be shown which one it computes.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_jax.evaluation.figures import GREY, PALETTE, panel_grid, save, style
from rlhf_jax.evaluation.statistics import mean_interval, row
from rlhf_jax.icl.claims.diversity import LinearPools, TransformerPools, linear_layer_on_pools, transformer_on_pools
from rlhf_jax.icl.claims.estimators import PoolErrors, exact_properties, noise_levels, pool_errors, prefix_errors
from rlhf_jax.icl.comparison import checks, print_comparisons, write_comparisons
from rlhf_jax.icl.mixture import at_least
from rlhf_jax.icl.models.transformer import VectorModel
from rlhf_jax.icl.theory.pool import AverageRisks, average_risks
from rlhf_jax.parallel.lanes import use_all_cores
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.progress import ProgressReport


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the run.

    Attributes:
        preset: a complete configuration to start from: `quick`, or `paper` with all tests at full size.
        seeds: pools a size, each with its own training.
        prompts: prompts that averaging, ridge and noise levels are measured on.
        decompositions: prompts that least squares is measured on.
        share: of the prediction, that errors of estimators may be off by.
        pools: pools a size that Bayes over the pool is averaged over.
        pool_sizes: of these pools.
        linear_sizes: pool sizes of the linear layer; each divides the largest.
        linear_dimension: features of the linear layer's tasks.
        linear_steps: updates of the linear layer.
        sizes: pool sizes of the transformer; each divides the largest.
        dimension: features of the transformer's tasks.
        length: examples in the transformer's prompts.
        layers: of the transformer.
        width: of the transformer, for two heads.
        steps: updates of the transformer.
        out: folder to write to; None: runs/icl_task_diversity/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a check fails.
    """

    preset: Literal["quick", "paper"] = "quick"
    seeds: int = 4
    prompts: int = 2**14
    decompositions: int = 2**10
    share: float = 0.06
    pools: int = 4
    pool_sizes: tuple[int, ...] = (1, 8, 64, 512)
    linear_sizes: tuple[int, ...] = (1, 4, 8, 16, 64)
    linear_dimension: int = 8
    linear_steps: int = 500
    sizes: tuple[int, ...] = (1, 8, 64)
    dimension: int = 2
    length: int = 8
    layers: int = 2
    width: int = 32
    steps: int = 600
    out: Path | None = None
    overwrite: bool = False
    strict: bool = False


PRESETS = {
    "quick": Config(),
    "paper": Config(
        preset="paper",
        prompts=2**17,
        decompositions=2**13,
        share=0.02,
        pools=20,
        pool_sizes=(1, 8, 64, 512, 4096),
        linear_sizes=(1, 2, 4, 8, 16, 32, 64, 256),
        linear_steps=2000,
        sizes=(1, 4, 16, 64, 256, 1024),
        steps=4000,
    ),
}
NOISE_VARIANCE, LINEAR_LENGTH = 0.25, 16


def rows_of(bayes: PoolErrors, linear: LinearPools, transformer: TransformerPools) -> list[dict]:
    """What the summary reports: means over pools, each with its interval."""
    tables = (
        ("estimators", bayes, ("ridge_pool", "bayes_pool", "ridge_fresh", "bayes_fresh", "distance_fresh")),
        ("linear layer", linear, ("pool", "fresh")),
        ("transformer", transformer, transformer._fields[2:]),
    )
    return [
        row(f"{name}, M={size}: {field.replace('_', ' ')}", "squared error / d", getattr(found, field)[place])
        for name, found, fields in tables
        for place, size in enumerate(found.sizes)
        for field in fields
    ]


def trace(panel: Any, sizes: np.ndarray, values: np.ndarray, colour: str, label: str, **line: Any) -> None:
    """Means over pools with their 95 % intervals, by pool size."""
    estimates = [mean_interval(one) for one in values]
    means = [one.mean for one in estimates]
    panel.fill_between(
        sizes, [one.low for one in estimates], [one.high for one in estimates], color=colour, alpha=0.18, linewidth=0
    )
    panel.plot(sizes, means, color=colour, label=label, **({"marker": "o", "markersize": 4} | line))


def by_size(panel: Any, sizes: np.ndarray, title: str) -> None:
    """What all panels share: pool sizes below, squared error per dimension on the left."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
    panel.set_xlabel("M, tasks in the pool")
    panel.set_ylabel("squared error / d")
    panel.set_title(title)


def draw_estimators(bayes: PoolErrors, path: Path) -> None:
    """Bayes over the pool and ridge, on the pool's tasks and on new ones."""
    with style():
        figure, ((panel,),) = panel_grid(1, 1, width=5.6, height=3.5)
        trace(panel, bayes.sizes, bayes.bayes_fresh, PALETTE[0], "Bayes over the pool, new tasks")
        trace(panel, bayes.sizes, bayes.bayes_pool, PALETTE[1], "Bayes over the pool, its tasks")
        trace(panel, bayes.sizes, bayes.ridge_fresh, GREY, "ridge, new tasks", linestyle="--")
        by_size(panel, bayes.sizes, "the two Bayes predictors (d = 8, K = 16)")
        panel.legend()
        save(figure, path)


def draw_linear(linear: LinearPools, theory: AverageRisks, dimension: int, path: Path) -> None:
    """The linear layer: trained pools as dots, the mean of theory over many pools as lines."""
    with style():
        figure, ((panel,),) = panel_grid(1, 1, width=5.6, height=3.5)
        for colour, name, known, found in (
            (PALETTE[0], "new tasks", theory.fresh, linear.fresh),
            (PALETTE[1], "tasks of the pool", theory.pool, linear.pool),
        ):
            panel.plot(linear.sizes, known / dimension, color=colour, label=f"{name}: theory, 200 pools")
            sizes = np.repeat(linear.sizes, found.shape[1])
            panel.scatter(sizes, found.ravel(), color=colour, s=16, alpha=0.6, linewidths=0, label=f"{name}: trained")
        panel.axvline(dimension, color=GREY, linestyle=":", linewidth=1.2)
        panel.text(dimension, panel.get_ylim()[0], " M = d", color=GREY, va="bottom")
        by_size(panel, linear.sizes, "one layer of linear attention: a matter of rank")
        panel.legend()
        save(figure, path)


def draw_transformer(found: TransformerPools, path: Path) -> None:
    """The transformer: its distance to the two Bayes predictors on new tasks, and its errors."""
    with style():
        figure, grid = panel_grid(1, 2, width=9.6, height=3.6)
        left, right = grid.flat
        trace(left, found.sizes, found.fresh_to_bayes, PALETTE[1], "transformer to Bayes over the pool")
        trace(left, found.sizes, found.fresh_to_ridge, PALETTE[0], "transformer to ridge")
        trace(left, found.sizes, found.bayes_to_ridge, GREY, "Bayes over the pool to ridge", linestyle="--", marker="")
        by_size(left, found.sizes, "distances on new tasks")
        left.set_ylabel("squared difference / d")
        left.set_yscale("log")
        trace(right, found.sizes, found.fresh_error, PALETTE[0], "transformer, new tasks")
        trace(right, found.sizes, found.pool_error, PALETTE[1], "transformer, tasks of the pool")
        trace(right, found.sizes, found.ridge_error, GREY, "ridge, new tasks", linestyle="--", marker="")
        by_size(right, found.sizes, "errors")
        left.legend()
        right.legend()
        save(figure, path)


def main(config: Config) -> dict:
    """Measures the estimators, trains both models on all pools, and returns the summary."""
    began, clock = time.monotonic(), CompileClock()
    at_least("number of seeds", config.seeds, 2)
    model = VectorModel(config.dimension, 1, 2 * config.length - 1, layers=config.layers, width=config.width)
    folder = run_folder.create(config.out, "icl_task_diversity", config, config.overwrite)
    with ProgressReport("task diversity", total=4 + len(config.sizes)) as progress:
        comparisons = prefix_errors(prompts=config.prompts, decompositions=config.decompositions, share=config.share)
        comparisons += exact_properties(pool=max(config.pool_sizes))
        progress.advance()
        noise = noise_levels(prompts=config.prompts // 2)
        progress.advance()
        bayes = pool_errors(config.pool_sizes, pools=config.pools, share=config.share)
        progress.advance()
        linear = linear_layer_on_pools(
            config.linear_sizes,
            config.linear_dimension,
            LINEAR_LENGTH,
            NOISE_VARIANCE,
            config.seeds,
            config.linear_steps,
        )
        theory = average_risks(config.linear_sizes, config.linear_dimension, LINEAR_LENGTH, NOISE_VARIANCE)
        progress.advance()
        transformer = transformer_on_pools(
            config.sizes,
            config.dimension,
            config.length,
            NOISE_VARIANCE,
            config.seeds,
            model,
            config.steps,
            report=lambda name: progress.advance(),
        )
    comparisons += noise.comparisons + bayes.comparisons + linear.comparisons + transformer.comparisons
    write_comparisons(folder.path, comparisons)
    draw_estimators(bayes, folder.path / "figures" / "estimators.png")
    draw_linear(linear, theory, config.linear_dimension, folder.path / "figures" / "linear_layer.png")
    draw_transformer(transformer, folder.path / "figures" / "transformer.png")
    rows = rows_of(bayes, linear, transformer)
    result = run_folder.summary(folder, rows, checks(comparisons), time.monotonic() - began, clock.seconds)
    run_folder.write_summary(folder, result)
    print_comparisons(comparisons, "predicted and measured")
    run_folder.print_summary(result | {"checks": []})
    return result


if __name__ == "__main__":
    use_all_cores()
    run(main, PRESETS, __doc__)
