"""In-context regression, theory beside experiment: what linear transformers learn, how fast, and where it breaks.

    python experiments/icl_regression.py
    python experiments/icl_regression.py --preset paper --out runs/icl_regression/paper

Every number that theory gives stands beside one that was integrated, sampled or trained: gradient flow of one layer
(Zhang et al. 2023), its risk on longer contexts and under shifts, k layers and GD++ (Ahn et al. 2023), one step of
gradient descent and all matrices of a layer (von Oswald et al. 2023), and finite pools of tasks. Risks by size of the
pool are a figure of `icl_task_diversity.py`.

Two CPU cores: `quick` 58 rows in 54 s, `paper` 82 rows in 36 minutes beside other work; none failed (docs/icl.md).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.evaluation.theory_figure import Panel
from rlhf_jax.icl.checks import at_least, positive
from rlhf_jax.icl.claims import regression, regression_dynamics, regression_layers, regression_step
from rlhf_jax.icl.claims.regression import RiskCurve
from rlhf_jax.icl.claims.regression_layers import DeepLayers
from rlhf_jax.icl.comparison import standard_error
from rlhf_jax.laboratory.theory import Options, Stage, run_stages
from rlhf_jax.parallel.lanes import use_all_cores
from rlhf_jax.training.command_line import run


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of the run.

    Attributes:
        preset: a complete configuration to start from.
        stages: parts to run: flow, logistic, lengths, shift, random_covariances, pools, layers, gd_plus_plus, step,
            blocks; none: all of them.
        out: folder to write to; None: runs/icl_regression/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a comparison fails.
        seeds: runs of everything that is trained, >= 1.
        layers: numbers of layers k of the linear transformers that are trained.
        settings: dimension and context length of the layers that learn a step of gradient descent, d1 N1 d2 N2 ...
        pools: sizes M of the pools of tasks whose minimiser is measured.
        steps: updates of every training but that of GD++.
        gd_steps: updates of GD++, which is slower to arrive.
        gd_starts: descents with which theory looks for the minima of GD++.
        gd_batch: prompts an update of GD++.
        batch: prompts an update of linear transformers of k layers; one layer with all its matrices takes half.
        prompts: drawn for each point of a curve of risks.
        many_prompts: drawn for each least-squares fit; a pool's minimiser is met within 1 % from 400,000 on; >= 400.
        rate: learning rate of the descent along the logistic curve, the time that a step takes; <= 0.1.
        flow_step: step of Euler's rule along the logistic curve, of time; <= 0.1.
        flow_time: time to which gradient flow is integrated for its limit.
    """

    preset: Literal["quick", "paper"] = "quick"
    seeds: int = 2
    layers: tuple[int, ...] = (1, 2)
    settings: tuple[int, ...] = (5, 10)
    pools: tuple[int, ...] = (16,)
    steps: int = 1500
    gd_steps: int = 2000
    gd_batch: int = 1000
    gd_starts: int = 25
    batch: int = 600
    prompts: int = 10_000
    many_prompts: int = 400_000
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
    gd_starts=100,
    batch=2000,
    prompts=40_000,
)
BARS = "bars: ± 2 s.e."


def flow(config: Config) -> Stage:
    """Where gradient flow ends, and what it conserves."""
    return Stage(regression_dynamics.gradient_flow_limit(end=config.flow_time))


def logistic(config: Config) -> Stage:
    """The training curve that drops at once: a logistic function of time."""
    found = regression_dynamics.logistic_curve(
        step=config.flow_step, rate=config.rate, seeds=config.seeds, batch=config.batch
    )
    few = slice(None, None, max(1, len(found.times) // 40))
    some = slice(None, None, max(1, len(found.trained_times) // 40))
    losses = np.asarray(found.losses)[:, some]
    time = "time (learning rate x steps)"
    panels = [
        Panel(
            title="gradient flow is a logistic function",
            x_label=time,
            y_label="a, of A = a I",
            predicted={"matrices integrated": (found.times, found.predicted)},
            measured={"matrices integrated": (found.times[few], found.integrated[few], 0 * found.times[few])},
        ),
        Panel(
            title="its loss, on fresh prompts",
            x_label=time,
            y_label=f"loss ({BARS})",
            predicted={"descent": (found.trained_times, found.predicted_losses)},
            measured={"descent": (found.trained_times[some], losses.mean(axis=0), bars(losses))},
        ),
    ]
    return Stage(found.comparisons, panels)


def risk_panel(found: dict[str, RiskCurve], title: str, x_label: str, y_label: str) -> Panel:
    """Risks along an axis, by name."""
    measured = {name: (one.axis, one.measured, 2 * np.asarray(one.errors)) for name, one in found.items()}
    predicted = {name: (one.axis, one.predicted) for name, one in found.items()}
    return Panel(title, x_label, f"{y_label} ({BARS})", predicted, measured, x_scale="log", y_scale="log")


def lengths(config: Config) -> Stage:
    """Risk on contexts of M examples, after training on N, without and with noise of the labels."""
    found = {
        f"noise {noise:g}": regression.context_lengths(noise_variance=noise, prompts=config.prompts)
        for noise in (0.0, 0.25)
    }
    panel = risk_panel(found, "longer contexts at the test", "test context M", "risk")
    return Stage([row for one in found.values() for row in one.comparisons], [panel])


def shift(config: Config) -> Stage:
    """Risk where the variance of the inputs has changed."""
    found = regression.covariate_shift(prompts=config.prompts)
    panel = risk_panel({"drawn prompts": found}, "covariate shift", "factor of the variance", "risk / E (w'x)^2")
    return Stage(found.comparisons, [panel])


def random_covariances(config: Config) -> Stage:
    """A covariance of its own in every prompt: the risk never goes to 0."""
    return Stage(regression.random_covariances(prompts=config.many_prompts // 4))


def pools(config: Config) -> Stage:
    """Finite pools of tasks: the minimiser that least squares over their prompts finds."""
    return Stage(regression.pool_minimisers(config.pools, prompts=config.many_prompts))


def layers(config: Config) -> Stage:
    """k layers of linear attention: losses and steps, beside the best ones and the best shared one."""
    found = regression_layers.sparse_layers(config.layers, batch=config.batch, seeds=config.seeds, steps=config.steps)
    places = np.arange(len(found.layers))
    trained = np.asarray(found.trained)
    by_number = Panel(
        title="linear layers",
        x_label="layers k",
        y_label=f"E (error)^2 ({BARS})",
        predicted={"trained": (places, found.predicted), "one step for all layers": (places, found.shared)},
        measured={"trained": (places, trained.mean(axis=1), bars(trained.T))},
        y_scale="log",
        categories=[str(k) for k in found.layers],
    )
    return Stage(found.comparisons, [by_number, training_panel(found, "layers")], loss_rows(found, "linear layers"))


def gd_plus_plus(config: Config) -> Stage:
    """Two layers of GD++: which of its minima training ends in."""
    found = regression_layers.gd_plus_plus(
        seeds=config.seeds, steps=config.gd_steps, batch=config.gd_batch, starts=config.gd_starts
    )
    return Stage(found.comparisons, [training_panel(found, "GD++")], loss_rows(found, "GD++"))


def loss_rows(found: DeepLayers, name: str) -> list[dict]:
    """Losses of what was trained, over seeds."""
    return [
        row(f"loss of {name}, k = {k}, trained", "squared error", losses)
        for k, losses in zip(found.layers, found.trained, strict=True)
    ]


def training_panel(found: DeepLayers, name: str) -> Panel:
    """Training curves with the loss that they tend to, or the minima of which they end in one."""
    window = max(1, found.curves.shape[2] // 50)
    predicted, measured = {}, {}
    for number, curves, end in zip(found.layers, found.curves, found.predicted, strict=True):
        count = curves.shape[1] // window
        smooth = curves[:, : count * window].reshape(len(curves), count, window).mean(axis=2)
        places = window * (np.arange(count) + 0.5)
        measured[f"k = {number}"] = (places, smooth.mean(axis=0), bars(smooth))
        if not found.minima.size:
            predicted[f"k = {number}"] = (places, np.full(count, end))
    levels = {f"minimum {place + 1}": float(loss) for place, loss in enumerate(found.minima)}
    return Panel(f"{name}: training", "update", f"loss ({BARS})", predicted, measured, levels, y_scale="log")


def bars(values: np.ndarray) -> np.ndarray:
    """Two standard errors over seeds on axis 0; none for one seed."""
    return 2 * np.nan_to_num(standard_error(values))


def step(config: Config) -> Stage:
    """One layer with all matrices free learns one step of gradient descent, at the best rate."""
    pairs = tuple(zip(config.settings[::2], config.settings[1::2], strict=True))
    return Stage(
        regression_step.constructed_step(pairs, batch=config.batch // 2, seeds=config.seeds, steps=config.steps)
    )


def blocks(config: Config) -> Stage:
    """One layer with all matrices free on Gaussian inputs: the block that theory gives, and those that are 0."""
    return Stage(regression_step.learnt_blocks(batch=config.batch // 2, seeds=config.seeds, steps=config.steps))


STAGES: dict[str, Callable[[Config], Stage]] = {
    stage.__name__: stage
    for stage in (flow, logistic, lengths, shift, random_covariances, pools, layers, gd_plus_plus, step, blocks)
}


def main(config: Config) -> dict:
    """Runs the stages and returns the summary."""
    least = {
        "seeds": 1,
        "steps": 1,
        "gd_steps": 1,
        "gd_starts": 1,
        "prompts": 2,
        "many_prompts": 400,
        "batch": 2,
        "gd_batch": 1,
    }
    for name, smallest in least.items():
        at_least(f"option {name}", getattr(config, name), smallest)
    for name in ("layers", "pools", "settings"):
        numbers = getattr(config, name)
        if not numbers:
            raise ValueError(f"the option {name} is empty: give at least one number.")
        for number in numbers:
            at_least(f"option {name}, one of whose numbers", number, 1)
    if len(config.settings) % 2:
        raise ValueError(f"the settings {config.settings} must be pairs: give d1 N1 d2 N2 ...")
    for name in ("rate", "flow_step", "flow_time"):
        positive(f"option {name}", getattr(config, name))
    for name in ("rate", "flow_step"):
        if getattr(config, name) > 0.1:
            raise ValueError(f"the option {name} is {getattr(config, name)}: give at most 0.1, to follow the flow.")
    return run_stages("icl_regression", config, STAGES)


if __name__ == "__main__":
    use_all_cores()
    run(main, {"quick": Config(), "paper": PAPER}, __doc__)
