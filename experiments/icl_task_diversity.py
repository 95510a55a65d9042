"""How many tasks must training show before a model learns regression in context, rather than the tasks themselves?

    python experiments/icl_task_diversity.py
    python experiments/icl_task_diversity.py --preset paper

Four parts, in `comparisons.json`, `comparisons.csv`, `summary.json` and figures:

1. The estimators that a trained model is compared with, beside their expected errors: least squares, averaging and
   ridge after k examples, Bayes over a pool of M tasks, Bayes over noise levels.
2. One layer of linear attention trained on pools of M tasks, beside the minimiser of theory. It loses new tasks while
   M is below d, for the pool's second moment is singular: a matter of rank.
3. What the same estimators, nearest neighbours and the Lasso reach on sparse functions, on trees, and on linear ones
   whose inputs were changed (Garg et al. 2022): measured, nothing is predicted.
4. A small transformer trained on pools of M tasks: how far it is from Bayes over the pool and from ridge. It is not
   the phenomenon of part 2: it is about what a network can learn by heart.

Part 1, d = 8 and K = 16, error / d over 20 pools (ridge: 0.345 predicted, 0.345 measured):

| M                                    | 1     | 8     | 64    | 512   | 4,096 |
|--------------------------------------|------:|------:|------:|------:|------:|
| Bayes over the pool, tasks of it     | 0.000 | 0.093 | 0.153 | 0.208 | 0.255 |
| Bayes over the pool, new tasks       | 1.83  | 1.25  | 0.881 | 0.654 | 0.523 |

Two CPU cores: `quick` 64 rows in 38 s, `paper` 83 rows in 7 minutes beside other work; none failed (docs/icl.md).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from rlhf_jax.evaluation.statistics import mean_interval, row
from rlhf_jax.evaluation.theory_figure import Panel
from rlhf_jax.icl.checks import at_least, positive
from rlhf_jax.icl.claims.bayes import noise_levels, pool_errors
from rlhf_jax.icl.claims.diversity import check_sizes, linear_layer_on_pools, transformer_on_pools
from rlhf_jax.icl.claims.estimators import baselines as measured_baselines
from rlhf_jax.icl.claims.estimators import exact_properties, prefix_errors
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
        stages: parts to run: prefixes, noise, pools, baselines, linear_layer, transformer; none: all of them.
        out: folder to write to; None: runs/icl_task_diversity/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a comparison fails.
        seeds: pools a size, each with its own training.
        prompts: prompts that averaging, ridge and, half as many, noise levels are measured on.
        decompositions: prompts that least squares and, half as many a task, the baselines are measured on.
        estimator_dimension: features of the tasks of prefixes, noise and baselines.
        lengths: examples k after which estimators are measured.
        share: of the prediction, that errors of estimators may be off by.
        pools: pools a size that Bayes over the pool is averaged over.
        pool_prompts: prompts of each of these pools.
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
        transformer_prompts: prompts that each trained transformer is measured on.
    """

    preset: Literal["quick", "paper"] = "quick"
    seeds: int = 2
    prompts: int = 2**14
    decompositions: int = 2**10
    estimator_dimension: int = 20
    lengths: tuple[int, ...] = (5, 10, 15, 30, 40)
    share: float = 0.06
    pools: int = 4
    pool_prompts: int = 512
    pool_sizes: tuple[int, ...] = (1, 8, 64, 512)
    linear_sizes: tuple[int, ...] = (1, 4, 8, 16, 64)
    linear_dimension: int = 8
    linear_steps: int = 500
    sizes: tuple[int, ...] = (1, 16)
    dimension: int = 2
    length: int = 8
    layers: int = 2
    width: int = 32
    steps: int = 400
    transformer_prompts: int = 1024


PRESETS = {
    "quick": Config(),
    "paper": Config(
        preset="paper",
        seeds=4,
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
LEAST = {
    "seeds": 2,
    "prompts": 16,  # half of them are shared by four noise levels
    "decompositions": 4,
    "estimator_dimension": 3,
    "pools": 2,
    "pool_prompts": 2,
    "linear_dimension": 1,
    "linear_steps": 1,
    "dimension": 1,
    "length": 1,
    "layers": 1,
    "width": 1,
    "steps": 2,
    "transformer_prompts": 2,
}
"""The least value of each whole number among the options."""


def prefixes(config: Config) -> Stage:
    """Least squares, averaging and ridge after k examples."""
    drawn = dict(prompts=config.prompts, decompositions=config.decompositions, share=config.share)
    rows = prefix_errors(config.estimator_dimension, config.lengths, **drawn)
    return Stage([*rows, *exact_properties(pool=max(config.pool_sizes))])


def noise(config: Config) -> Stage:
    """Bayes over several noise levels, beside one ridge that knows and one that does not."""
    d = config.estimator_dimension
    found = noise_levels(dimension=d, length=d, prompts=config.prompts // 2)
    fields = {"oracle": "oracle", "mixture": "Bayes over levels", "selected": "largest evidence"}
    rows = [row(f"noise levels: {name}", "squared error", getattr(found, field)) for field, name in fields.items()]
    return Stage(found.comparisons, rows=rows)


def pools(config: Config) -> Stage:
    """Bayes over a pool of M tasks, and ridge, on the pool's tasks and on new ones."""
    found = pool_errors(config.pool_sizes, pools=config.pools, prompts=config.pool_prompts, share=config.share)
    fields = ("ridge_pool", "bayes_pool", "ridge_fresh", "bayes_fresh", "distance_fresh")
    names = {
        "bayes_fresh": "Bayes over the pool, new tasks",
        "bayes_pool": "Bayes over the pool, its tasks",
        "ridge_fresh": "ridge, new tasks",
    }
    panel = by_size("the two Bayes predictors (d = 8, K = 16)", found, names)
    return Stage(found.comparisons, [panel], rows_of("estimators", found, fields))


def baselines(config: Config) -> Stage:
    """Least squares, ridge, averaging, the Lasso and nearest neighbours where no theory says what they reach."""
    found = measured_baselines(config.estimator_dimension, config.lengths, prompts=config.decompositions // 2)
    rows = [
        row(f"{task}, k={k}: {estimator}", "squared error / that of 0", found.errors[place, which, column])
        for place, task in enumerate(found.tasks)
        for which, estimator in enumerate(found.estimators)
        for column, k in enumerate(found.lengths)
        if np.isfinite(found.errors[place, which, column]).all()
    ]
    return Stage([], rows=rows)


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
    found = transformer_on_pools(
        *shape, NOISE_VARIANCE, config.seeds, model_of(config), config.steps, prompts=config.transformer_prompts
    )
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
    stage.__name__: stage for stage in (prefixes, noise, pools, baselines, linear_layer, transformer)
}


def check(config: Config) -> None:
    """Refuses what is impossible before anything is computed.

    Raises:
        ValueError: naming the option.
    """
    for name, least in LEAST.items():
        at_least(f"option {name}", getattr(config, name), least)
    positive("option share", config.share)
    for name in ("lengths", "pool_sizes"):
        if not getattr(config, name):
            raise ValueError(f"the option {name} is empty: give at least one number.")
        for number in getattr(config, name):
            at_least(f"option {name}", number, 1)
    for name in ("linear_sizes", "sizes"):
        check_sizes(f"option {name}", getattr(config, name))
    model_of(config)


def main(config: Config) -> dict:
    """Runs the stages and returns the summary."""
    check(config)
    return run_stages("icl_task_diversity", config, STAGES)


if __name__ == "__main__":
    use_all_cores()
    run(main, PRESETS, __doc__)
