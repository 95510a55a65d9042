"""In-context classification with one layer of attention, theory beside training: where, how fast, how wrong.

    python experiments/icl_classification.py
    python experiments/icl_classification.py --preset paper
    python experiments/icl_classification.py --stages setting --dimension 4 --classes 3 --length 50 --test-length 200

Prompts show N points of a Gaussian mixture with their classes, and a query (Shen et al. 2024, arXiv 2410.11778).

Two CPU cores: `quick` 70 rows in 69 s, `paper` 511 rows in 61 minutes beside other work; none failed. docs/icl.md says
what came out, docs/icl_tables.md has all rows.
"""

import dataclasses
from typing import Literal

import numpy as np

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.icl.checks import at_least, power_of_two
from rlhf_jax.icl.claims import descent, generality, inference, minimisers, sampling, training, transformers
from rlhf_jax.icl.descent import check_learning_rate
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.theory.curvature import condition_number, smoothness
from rlhf_jax.laboratory import classification_panels as panels
from rlhf_jax.laboratory.theory import Options, Stage, run_stages
from rlhf_jax.parallel.lanes import use_all_cores
from rlhf_jax.training.command_line import run


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of the run.

    Attributes:
        preset: a complete configuration to start from.
        stages: parts to run: setting, tasks, solutions, tables, first_order, covariance, speed, curvature, sweep, raw,
            decay, floor, shifts, classes, general, models; none: all of them.
        out: folder to write to; None: runs/icl_classification/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a comparison fails.
        dimension: features d of the stage `setting`.
        classes: its classes c.
        covariance: its covariance Lambda, d x d numbers row by row; none: the identity.
        prior_scale: standard deviation of the entries of its first mean.
        length: examples N in its training contexts.
        test_length: examples M in its test contexts.
        dimensions: values of d of the tables.
        many_classes: values of c of the stage `classes`.
        lengths: context lengths N of the tables and of the sweep.
        far: context lengths from which the first-order correction is extrapolated.
        prompts: sampled for each expectation.
        points: quasi-random points of each set that theory averages over, a power of two.
        seeds: runs of each training, at least 2.
        solver_seeds: sets of points that the minimiser is averaged over, at least 2.
        sweep_steps: updates of the sweep at its first and at its second learning rate.
        sweep_batch: prompts an update of the sweep.
        raw_steps: updates of the training on raw prompts.
        learning_rate: of gradient descent in the stage `speed`, where d = 4 and N = 50; None: 1 / l, l being the
            smoothness of the loss. Above 2 / l it may diverge, and is refused.
        settings: random settings that are held against Monte Carlo.
        model_steps: updates of the models that no theory describes.
        model_lengths: context lengths N that they are trained at.
        model_test_lengths: context lengths M that they are tested at.
        test_prompts: prompts of each of their tests, a multiple of 64.
    """

    preset: Literal["quick", "paper"] = "quick"
    stages: tuple[str, ...] = ("setting", "solutions", "first_order", "speed", "sweep", "decay", "models")
    dimension: int = 3
    classes: int = 2
    covariance: tuple[float, ...] = ()
    prior_scale: float = 1.0
    length: int = 40
    test_length: int = 100
    dimensions: tuple[int, ...] = (3,)
    many_classes: tuple[int, ...] = (2, 3)
    lengths: tuple[int, ...] = (20, 100, 500)
    far: tuple[int, ...] = (2560, 5120, 10240)
    prompts: int = 200_000
    points: int = 2**15
    seeds: int = 3
    solver_seeds: int = 2
    sweep_steps: tuple[int, int] = (400, 200)
    sweep_batch: int = 1024
    raw_steps: int = 600
    learning_rate: float | None = None
    settings: int = 2
    model_steps: int = 200
    model_lengths: tuple[int, ...] = (20,)
    model_test_lengths: tuple[int, ...] = (10, 20, 80)
    test_prompts: int = 256


PAPER = Config(
    preset="paper",
    stages=(),
    dimensions=(3, 5, 10),
    many_classes=(2, 3, 5, 10),
    lengths=(10, 20, 40, 80, 160, 320, 640, 1280),
    prompts=500_000,
    points=2**16,
    seeds=4,
    solver_seeds=4,
    sweep_steps=(1000, 500),
    sweep_batch=4096,
    raw_steps=3000,
    settings=20,
    model_steps=400,
    model_lengths=(10, 40, 100),
    model_test_lengths=(10, 20, 40, 100, 200, 400),
    test_prompts=1024,
)


def mixture_of(config: Config) -> Mixture:
    """The mixture of the stage `setting`.

    Raises:
        ValueError: one of its options is impossible.
    """
    numbers, d = config.covariance, config.dimension
    if numbers and len(numbers) != d * d:
        raise ValueError(f"--covariance has {len(numbers)} numbers: give {d} x {d} = {d * d}, row by row.")
    covariance = np.array(numbers).reshape(d, d) if numbers else None
    return Mixture(d, config.classes, covariance, config.prior_scale)


def setting(config: Config) -> Stage:
    """What theory says of the user's own setting, and raw prompts beside it."""
    mixture, length, test_length = mixture_of(config), config.length, config.test_length
    theory = generality.predictions(mixture, length, test_length, config.points)
    limit = mixture.classes * mixture.inverse
    numbers = {
        "|W* - c Lambda^-1| / |c Lambda^-1|": np.linalg.norm(theory.weights - limit) / np.linalg.norm(limit),
        "tr W* / d": np.trace(theory.weights) / mixture.dimension,
        "cross-entropy of W*": theory.loss.mean,
        "cross-entropy of Bayes": theory.bayes_loss.mean,
        "error of Bayes": theory.bayes_error.mean,
        f"total variation from Bayes at M = {test_length}": theory.total_variation.mean,
        "smoothness l: learning rates up to 2 / l converge": theory.smoothness,
        "condition number l / lambda_min": theory.smoothness / theory.curvature.mean,
    }
    rows = [row(f"theory: {name}", "1", np.array([value])) for name, value in numbers.items()]
    comparisons = generality.against_monte_carlo(mixture, length, test_length, points=config.points, theory=theory)
    return Stage(comparisons, rows=rows)


def tasks(config: Config) -> Stage:
    """Sufficient statistics have the law of raw prompts."""
    return Stage(sampling.sampling(count=config.prompts // 2))


def solutions(config: Config) -> Stage:
    """w_N of W* = w_N I: from the solver, and from prompts."""
    mixtures = [Mixture(d) for d in config.dimensions]
    sizes = {"prompts": 2 * config.prompts, "points": 2 * config.points, "seeds": config.solver_seeds}
    return Stage(minimisers.weights_by_length(mixtures, config.lengths, **sizes))


def tables(config: Config) -> Stage:
    """The solver beside tables that another program computed."""
    return Stage(minimisers.against_reference_tables(points=config.points, seeds=2 * config.solver_seeds))


def first_order(config: Config) -> Stage:
    """N g_N, w_N = 2 (1 + g_N), approaches the g1 of theory."""
    mixtures = [Mixture(d) for d in config.dimensions]
    found = minimisers.first_order_by_length(
        mixtures, config.lengths, config.far, 2 * config.points, config.solver_seeds
    )
    names = [f"d = {mixture.dimension}" for mixture in mixtures]
    return Stage(found.comparisons, [panels.first_order(found, names)])


def covariance(config: Config) -> Stage:
    """W* of a covariance that is not the identity, and its first-order correction."""
    found = minimisers.general_covariance(prompts=config.prompts // 4, points=config.points, far=config.far)
    return Stage(found.comparisons, [panels.covariance(found)])


def speed(config: Config) -> Stage:
    """The linear rate of gradient descent on a frozen population."""
    found = descent.rates(prompts=config.prompts // 2, learning_rate=config.learning_rate)
    return Stage(found.comparisons, [panels.rate(found, "gradient descent, queries drawn")])


def curvature(config: Config) -> Stage:
    """The rate with the query integrated out and for correlated features; spectrum at W*, smoothness at 0."""
    found = descent.rates(prompts=config.prompts // 8, integrated=True)
    rows = [*found.comparisons, *descent.anisotropic_rate(prompts=config.prompts // 8)]
    rows += descent.spectrum(prompts=config.prompts // 2)
    rows += descent.smoothness_at_zero(prompts=10 * config.prompts)
    return Stage(rows, [panels.rate(found, "gradient descent, queries integrated out")])


def sweep(config: Config) -> Stage:
    """All context lengths and seeds trained in one program: each ends at the W* of its own N."""
    found = training.sweep_reaches_minimisers(
        lengths=config.lengths, seeds=config.seeds, steps=config.sweep_steps, batch=config.sweep_batch
    )
    rows = []
    for length, weight in zip(found.lengths, found.targets, strict=True):
        condition = condition_number(training.STANDARD, int(length), weight)
        rows.append(row(f"condition number l / lambda_min (d=3, N={length})", "1", np.array([condition])))
    return Stage(found.comparisons, [panels.sweep(found)], rows)


def raw(config: Config) -> Stage:
    """Raw prompts with drawn labels, float32, as one trains a model of which no theory is known."""
    return Stage(training.raw_prompts_reach_minimisers(seeds=config.seeds, steps=config.raw_steps))


def decay(config: Config) -> Stage:
    """Distance to Bayes against M: its decay at W = 2I, and the floor that training on N examples leaves."""
    noise = inference.noise_decay(config.dimensions, prompts=config.prompts, points=4 * config.points)
    bent = inference.grid(prompts=config.prompts // 2, points=config.points)
    return Stage([*noise.comparisons, *bent.comparisons], panels.decay(noise, bent))


def floor(config: Config) -> Stage:
    """C_N: what a training context of N examples leaves when the test context grows without end."""
    return Stage(inference.floors(config.dimensions, prompts=config.prompts, points=config.points))


def shifts(config: Config) -> Stage:
    """Shifts of the test leave plateaus, which are predicted; another prior of the means does not."""
    found = inference.plateaus(prompts=config.prompts // 2, points=config.points)
    harmless = inference.prior_is_harmless(prompts=config.prompts)
    return Stage([*found.comparisons, *harmless], [panels.plateaus(found)])


def classes(config: Config) -> Stage:
    """More than two classes: w_N, g1 and C_TV, d = 4."""
    mixtures = [Mixture(4, c) for c in config.many_classes]
    sizes = {"points": config.points // 2, "seeds": config.solver_seeds}
    rows = minimisers.weights_by_length(mixtures, (50, 200, 800), prompts=config.prompts, **sizes)
    rows += minimisers.first_order_by_length(mixtures, (), config.far, **sizes).comparisons
    return Stage([*rows, *inference.class_constants(config.many_classes, prompts=config.prompts)])


def general(config: Config) -> Stage:
    """Random settings: everything that theory says of them, beside raw prompts."""
    rows = []
    for number in range(config.settings):
        mixture, length, test_length = generality.random_setting(number)
        rows += generality.against_monte_carlo(mixture, length, test_length, seed=number, points=config.points)
    return Stage(rows)


def models(config: Config) -> Stage:
    """Softmax and ReLU attention and a three-layer transformer: how far from Bayes, beside the linear prediction."""
    found = transformers.compare_models(
        lengths=config.model_lengths,
        test_lengths=config.model_test_lengths,
        seeds=config.seeds,
        steps=config.model_steps,
        prompts=config.test_prompts,
    )
    rows, figure = panels.models(found)
    return Stage(found.comparisons, figure, rows)


STAGES = {
    stage.__name__: stage
    for stage in (
        *(setting, tasks, solutions, tables, first_order, covariance, speed, curvature),
        *(sweep, raw, decay, floor, shifts, classes, general, models),
    )
}


def check_options(config: Config) -> None:
    """Refuses what is impossible before anything is computed.

    Raises:
        ValueError: one sentence that names the option and the remedy.
    """
    mixture_of(config)
    counts = {"dimensions": 1, "many_classes": 2, "lengths": 1, "far": 1, "sweep_steps": 1}
    counts |= {"model_lengths": 1, "model_test_lengths": 1, "length": 1, "test_length": 1, "settings": 1}
    counts |= {"seeds": 2, "solver_seeds": 2, "prompts": 16, "sweep_batch": 1, "raw_steps": 2, "model_steps": 2}
    for name, least in counts.items():
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            at_least(f"option --{name.replace('_', '-')}", value, least)
        if values == ():
            raise ValueError(f"the option --{name.replace('_', '-')} has no values: give at least one.")
    power_of_two("option --points", config.points)
    if config.learning_rate is not None:
        check_learning_rate(config.learning_rate, smoothness(Mixture(4), 50))
    if at_least("option --test-prompts", config.test_prompts, 64) % 64:
        raise ValueError(f"the option --test-prompts is {config.test_prompts}: give a multiple of 64.")


def main(config: Config) -> dict:
    """Runs the stages and returns the summary."""
    check_options(config)
    return run_stages("icl_classification", config, STAGES)


if __name__ == "__main__":
    use_all_cores()
    run(main, {"quick": Config(), "paper": PAPER}, __doc__)
