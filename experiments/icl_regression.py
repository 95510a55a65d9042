"""In-context regression, theory beside experiment: what linear transformers learn, how fast, and where it breaks.

    python experiments/icl_regression.py
    python experiments/icl_regression.py --preset paper --out runs/icl_regression/paper

Every number that theory gives stands beside one that was integrated, sampled or trained: gradient flow of one layer
(Zhang et al. 2023), its risk on longer contexts and under shifts, k layers and GD++ (Ahn et al. 2023), one step of
gradient descent (von Oswald et al. 2023), and finite pools of tasks.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.evaluation.theory_figure import Panel
from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.claims import regression, regression_dynamics, regression_layers
from rlhf_jax.icl.claims.regression import RiskCurve
from rlhf_jax.icl.claims.regression_layers import DeepLayers
from rlhf_jax.laboratory.theory import Options, Stage, run_stages
from rlhf_jax.parallel.lanes import use_all_cores
from rlhf_jax.training.command_line import run


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of the run.

    Attributes:
        preset: a complete configuration to start from.
        stages: parts to run: flow, logistic, lengths, shift, random_covariances, pools, layers, gd_plus_plus, step;
            none: all of them.
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


def flow(config: Config) -> Stage:
    """Where gradient flow ends, and what it conserves."""
    return Stage(regression_dynamics.gradient_flow_limit(end=config.flow_time))


def logistic(config: Config) -> Stage:
    """The training curve that drops at once: a logistic function of time."""
    found = regression_dynamics.logistic_curve(
        step=config.flow_step, rate=config.rate, seeds=config.seeds, batch=config.batch // 2
    )
    few = slice(None, None, max(1, len(found.times) // 40))
    some = slice(None, None, max(1, len(found.trained_times) // 40))
    losses = np.asarray(found.losses)[:, some]
    spread = losses.std(axis=0, ddof=min(1, len(losses) - 1))
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
            y_label="loss",
            predicted={"descent": (found.trained_times, found.predicted_losses)},
            measured={"descent": (found.trained_times[some], losses.mean(axis=0), spread)},
        ),
    ]
    return Stage(found.comparisons, panels)


def risk_panel(found: RiskCurve, title: str, x_label: str, y_label: str) -> Panel:
    """Risk along an axis, with bars of two standard errors."""
    measured = {"drawn prompts": (found.axis, found.measured, 2 * np.asarray(found.errors))}
    predicted = {"drawn prompts": (found.axis, found.predicted)}
    return Panel(title, x_label, y_label, predicted, measured, x_scale="log", y_scale="log")


def lengths(config: Config) -> Stage:
    """Risk on contexts of M examples, after training on N."""
    found = regression.context_lengths(prompts=config.prompts)
    return Stage(found.comparisons, [risk_panel(found, "longer contexts at the test", "test context M", "risk")])


def shift(config: Config) -> Stage:
    """Risk where the variance of the inputs has changed."""
    found = regression.covariate_shift(prompts=config.prompts)
    panel = risk_panel(found, "covariate shift", "factor of the variance", "risk / E (w'x)^2")
    return Stage(found.comparisons, [panel])


def random_covariances(config: Config) -> Stage:
    """A covariance of its own in every prompt: the risk never goes to 0."""
    return Stage(regression.random_covariances(prompts=config.many_prompts // 4))


def pools(config: Config) -> Stage:
    """Finite pools of tasks: the minimiser, and risks by the size of the pool."""
    sizes = (1, 2, 4, 8, 16, 32, 64, 256)
    risks = regression.pool_sizes(sizes, pools=config.averaged_pools)
    curves = {"new tasks": risks.fresh, "tasks of the pool": risks.pool}
    panel = Panel(
        title="theory, averaged over pools (d = 8)",
        x_label="tasks in the pool, M",
        y_label="squared error / d",
        predicted={name: (np.array(sizes), one) for name, one in curves.items()},
        x_scale="log",
    )
    return Stage(regression.pool_minimisers(config.pools, prompts=config.many_prompts), [panel])


def layers(config: Config) -> Stage:
    """k layers of linear attention: losses and steps, beside the best ones and the best shared one."""
    found = regression_layers.sparse_layers(config.layers, batch=config.batch, seeds=config.seeds, steps=config.steps)
    panels = layer_panels(found, "layers")
    panels[0].predicted["one step for all layers"] = (np.array(found.layers), found.shared)
    return Stage(found.comparisons, panels, loss_rows(found, "linear layers"))


def gd_plus_plus(config: Config) -> Stage:
    """Two layers of GD++: which of its minima training ends in."""
    found = regression_layers.gd_plus_plus(seeds=config.seeds, steps=config.gd_steps, batch=min(config.batch, 1000))
    return Stage(found.comparisons, layer_panels(found, "GD++")[1:], loss_rows(found, "GD++"))


def loss_rows(found: DeepLayers, name: str) -> list[dict]:
    """Losses of what was trained, over seeds."""
    return [
        row(f"loss of {name}, k = {k}, trained", "squared error", losses)
        for k, losses in zip(found.layers, found.trained, strict=True)
    ]


def layer_panels(found: DeepLayers, name: str) -> list[Panel]:
    """Losses by number of layers, and training curves with the loss that they tend to."""
    k, trained = np.array(found.layers), np.asarray(found.trained)
    least = {"trained": (k, found.predicted)}
    spread = trained.std(axis=1, ddof=min(1, trained.shape[1] - 1))
    scales = {"y_scale": "log"}
    by_number = Panel(name, "layers k", "E (error)^2", least, {"trained": (k, trained.mean(axis=1), spread)}, **scales)
    window = max(1, found.curves.shape[2] // 50)
    predicted, measured = {}, {}
    for number, curves, end in zip(k, found.curves, found.predicted, strict=True):
        count = curves.shape[1] // window
        smooth = curves[:, : count * window].reshape(len(curves), count, window).mean(axis=2)
        places = window * (np.arange(count) + 0.5)
        measured[f"k = {number}"] = (places, smooth.mean(axis=0), smooth.std(axis=0))
        predicted[f"k = {number}"] = (places, np.full(count, end))
    return [by_number, Panel(f"{name}: training", "update", "loss", predicted, measured, **scales)]


def step(config: Config) -> Stage:
    """One layer with all matrices free learns one step of gradient descent, at the best rate."""
    pairs = tuple(zip(config.settings[::2], config.settings[1::2], strict=True))
    return Stage(
        regression_layers.constructed_step(pairs, batch=config.batch // 2, seeds=config.seeds, steps=config.steps)
    )


STAGES: dict[str, Callable[[Config], Stage]] = {
    stage.__name__: stage
    for stage in (flow, logistic, lengths, shift, random_covariances, pools, layers, gd_plus_plus, step)
}


def main(config: Config) -> dict:
    """Runs the stages and returns the summary."""
    for name in ("seeds", "steps", "gd_steps", "prompts", "many_prompts"):
        at_least(f"option {name}", getattr(config, name), 1)
    for name in ("batch", "averaged_pools"):
        at_least(f"option {name}", getattr(config, name), 2)
    if not config.settings or len(config.settings) % 2:
        raise ValueError(f"the settings {config.settings} must be pairs: give d1 N1 d2 N2 ...")
    if not config.layers or not config.pools:
        raise ValueError("there are no layers or no pools: give at least one number of each.")
    return run_stages("icl_regression", config, STAGES)


if __name__ == "__main__":
    use_all_cores()
    run(main, {"quick": Config(), "paper": PAPER}, __doc__)
