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
from collections.abc import Callable
from typing import Literal

import numpy as np

from rlhf_jax.evaluation.statistics import mean_interval, row
from rlhf_jax.evaluation.theory_figure import Panel
from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.claims.diversity import linear_layer_on_pools, transformer_on_pools
from rlhf_jax.icl.claims.estimators import exact_properties, noise_levels, pool_errors, prefix_errors
from rlhf_jax.icl.models.transformer import VectorModel
from rlhf_jax.icl.theory.pool import average_risks
from rlhf_jax.laboratory.theory import Options, Stage, run_stages
from rlhf_jax.parallel.lanes import use_all_cores
from rlhf_jax.training.command_line import run


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of the run.

    Attributes:
        preset: a complete configuration to start from: `quick`, or `paper` with all tests at full size.
        stages: parts to run: prefixes, noise, pools, linear_layer, transformer; none: all of them.
        out: folder to write to; None: runs/icl_task_diversity/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a comparison fails.
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


def prefixes(config: Config) -> Stage:
    """Least squares, averaging and ridge after k examples."""
    rows = prefix_errors(prompts=config.prompts, decompositions=config.decompositions, share=config.share)
    return Stage([*rows, *exact_properties(pool=max(config.pool_sizes))])


def noise(config: Config) -> Stage:
    """Bayes over several noise levels, beside one ridge that knows and one that does not."""
    return Stage(noise_levels(prompts=config.prompts // 2).comparisons)


def pools(config: Config) -> Stage:
    """Bayes over a pool of M tasks, and ridge, on the pool's tasks and on new ones."""
    found = pool_errors(config.pool_sizes, pools=config.pools, share=config.share)
    fields = ("ridge_pool", "bayes_pool", "ridge_fresh", "bayes_fresh", "distance_fresh")
    names = {
        "bayes_fresh": "Bayes over the pool, new tasks",
        "bayes_pool": "Bayes over the pool, its tasks",
        "ridge_fresh": "ridge, new tasks",
    }
    panel = by_size("the two Bayes predictors (d = 8, K = 16)", found, names)
    return Stage(found.comparisons, [panel], rows_of("estimators", found, fields))


def linear_layer(config: Config) -> Stage:
    """One layer of linear attention trained on pools of M tasks, where theory is exact."""
    sizes, d = config.linear_sizes, config.linear_dimension
    found = linear_layer_on_pools(sizes, d, LINEAR_LENGTH, NOISE_VARIANCE, config.seeds, config.linear_steps)
    theory = average_risks(sizes, d, LINEAR_LENGTH, NOISE_VARIANCE)
    predicted = {"fresh": theory.fresh / d, "pool": theory.pool / d}
    names = {"fresh": "new tasks", "pool": "tasks of the pool"}
    panel = by_size(f"one linear layer: a matter of rank, M = d = {d}", found, names, predicted)
    return Stage(found.comparisons, [panel], rows_of("linear layer", found, ("pool", "fresh")))


def transformer(config: Config) -> Stage:
    """A small transformer trained on pools of M tasks: between Bayes over the pool and ridge."""
    shape = (config.sizes, config.dimension, config.length)
    found = transformer_on_pools(*shape, NOISE_VARIANCE, config.seeds, model_of(config), config.steps)
    distances = {
        "fresh_to_bayes": "transformer to Bayes over the pool",
        "fresh_to_ridge": "transformer to ridge",
        "bayes_to_ridge": "Bayes over the pool to ridge",
    }
    errors = {
        "fresh_error": "transformer, new tasks",
        "pool_error": "transformer, tasks of the pool",
        "ridge_error": "ridge, new tasks",
    }
    panels = [by_size("distances on new tasks", found, distances, log=True), by_size("errors", found, errors)]
    return Stage(found.comparisons, panels, rows_of("transformer", found, found._fields[2:]))


def model_of(config: Config) -> VectorModel:
    """The transformer, which reads x and y of K examples one after the other."""
    return VectorModel(config.dimension, 1, 2 * config.length - 1, layers=config.layers, width=config.width)


def by_size(title: str, found, names: dict[str, str], predicted: dict | None = None, log: bool = False) -> Panel:
    """Fields of what was found by pool size, with 95 % intervals over pools; lines where something is predicted."""
    sizes, measured = np.array(found.sizes), {}
    for field, name in names.items():
        estimates = [mean_interval(one) for one in getattr(found, field)]
        means = np.array([one.mean for one in estimates])
        measured[name] = (sizes, means, np.array([one.high for one in estimates]) - means)
    lines = {names[field]: (sizes, values) for field, values in (predicted or {}).items()}
    scale = "log" if log else "linear"
    return Panel(title, "M, tasks in the pool", "squared error / d", lines, measured, x_scale="log", y_scale=scale)


def rows_of(name: str, found, fields: tuple[str, ...]) -> list[dict]:
    """What the summary reports: means over pools, each with its interval."""
    return [
        row(f"{name}, M={size}: {field.replace('_', ' ')}", "squared error / d", getattr(found, field)[place])
        for place, size in enumerate(found.sizes)
        for field in fields
    ]


STAGES: dict[str, Callable[[Config], Stage]] = {
    stage.__name__: stage for stage in (prefixes, noise, pools, linear_layer, transformer)
}


def main(config: Config) -> dict:
    """Runs the stages and returns the summary."""
    at_least("number of seeds", config.seeds, 2)
    model_of(config)  # refuses what is impossible before anything is computed
    return run_stages("icl_task_diversity", config, STAGES)


if __name__ == "__main__":
    use_all_cores()
    run(main, PRESETS, __doc__)
