"""Gates of reward models: claims of papers as numbers over seeds with thresholds, and whether they hold here.

    python experiments/reward_model_gates.py
    python experiments/reward_model_gates.py --preset full --out runs/reward_model_gates/full
    python experiments/reward_model_gates.py --stages rmb votes --seeds 20

A gate passes when its mean over seeds lies where the claim wants it; "within noise" says that a threshold lies within
the 95 % interval. Gates that fail are reported, not mended. Where a precondition fails, reward models or policies have
not learned enough for the other gates of its stage to say anything: give more --pairs or --sft-steps.

The run folder has `tables.md`, `gates.json` (every seed) and `figures/STAGE.png`.

Synthetic reward models, in NumPy: `ppe` and `broken_domain` (which metric predicts best-of-n), `rmb` (benchmark and
best-of-n), `votes` (votes of a judge), `rare_arm` (smoothing in a bandit). On the built-in world, with trained reward
models: `smoothing` (Iterative Data Smoothing), `ratings` (Gaussian attribute heads), `ensembles` (linear heads, LoRA),
`lengths` (what PPO gains by length).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

from rlhf_jax.laboratory.gates import cheap_ensembles, lengths, ppe, rare_arm, ratings, rmb, smoothing, world
from rlhf_jax.laboratory.gates.report import Stage, run_gates
from rlhf_jax.laboratory.options import Options
from rlhf_jax.parallel.lanes import use_all_cores
from rlhf_jax.training.command_line import run
from rlhf_jax.training.options import RunOptions


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    """Options of the run.

    Attributes:
        preset: a complete configuration to start from; other options given change it.
        out: folder to write to; None: runs/reward_model_gates/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a gate fails.
        stages: parts to run: ppe, broken_domain, rmb, votes, rare_arm, smoothing, ratings, ensembles, lengths; none:
            all of them.
        seed: first seed of the built-in world; everything random there follows from it.
        seeds: repetitions of what is trained, at least 2.
        draws: repetitions of what is not trained, at least 2.
        items: pairs, lists and questions of synthetic benchmarks.
        battles: synthetic human preferences.
        bandit_steps: steps of descent in the bandit, a multiple of 10.
        pairs: comparisons (and rated answers) that a reward model is trained on.
        label_noise: probability that a label is turned round.
        epochs: passes over them.
        smoothing_rate: how far labels move to the model's probabilities, once an epoch.
        members: reward models in an ensemble, at least 2.
        answers: to each held-out prompt, which best-of-n picks from.
        held_out: held-out prompts.
        sft_steps: fine-tuning steps of the initial policy and the trunks.
        width: of policy and reward models.
        updates: of PPO, a multiple of 5.
        policies: whether PPO runs on plain and smoothed reward models; the stage lengths does in any case.
    """

    preset: Literal["quick", "full", "tiny"] = "quick"
    stages: tuple[str, ...] = ()
    seed: int = 0
    seeds: int = 5
    draws: int = 10
    items: int = 500
    battles: int = 2000
    bandit_steps: int = 10_000
    pairs: int = 1024
    label_noise: float = 0.25
    epochs: int = 6
    smoothing_rate: float = 0.7
    members: int = 3
    answers: int = 64
    held_out: int = 24
    sft_steps: int = 600
    width: int = 32
    updates: int = 20
    policies: bool = False


PRESETS = {
    "quick": Config(),
    "full": Config(
        "full",
        seeds=8,
        draws=20,
        items=1000,
        battles=4000,
        bandit_steps=20_000,
        pairs=8192,
        epochs=8,
        answers=256,
        held_out=32,
        sft_steps=700,
        updates=60,
        policies=True,
    ),
    "tiny": Config(
        "tiny",
        seeds=2,
        draws=2,
        items=20,
        battles=400,
        bandit_steps=10,
        pairs=16,
        epochs=2,
        members=2,
        answers=4,
        held_out=4,
        sft_steps=1,
        width=8,
        updates=5,
    ),
}


def options_of(config: Config) -> Options:
    """Sizes of the built-in world and of what is trained in it."""
    return Options(
        seed=config.seed,
        seeds=config.seeds,
        members=config.members,
        pairs=config.pairs,
        label_noise=config.label_noise,
        reward_epochs=config.epochs,
        reward_batch=min(64, config.pairs // 2),
        best_of_n=config.answers,
        held_out=config.held_out,
        sft_steps=config.sft_steps,
        width=config.width,
        methods=("PPO",),
        updates=config.updates,
        report_every=5,
        rollouts=min(64, 4 * config.pairs),
    )


STAGES: dict[str, Callable[[Config], Stage]] = {
    "ppe": lambda config: ppe.predictors(config.draws, battles=config.battles),
    "broken_domain": lambda config: ppe.broken_domain(config.draws, battles=config.battles),
    "rmb": lambda config: rmb.benchmark(config.draws, items=config.items),
    "votes": lambda config: rmb.voting(config.draws, items=config.items),
    "rare_arm": lambda config: rare_arm.rare_arm(config.draws, steps=config.bandit_steps),
    "smoothing": lambda config: smoothing.smoothing(
        world.make_ground(options_of(config)), config.smoothing_rate, config.policies
    ),
    "ratings": lambda config: ratings.ratings_gates(options_of(config)),
    "ensembles": lambda config: cheap_ensembles.cheap_ensembles(world.make_ground(options_of(config))),
    "lengths": lambda config: lengths.length_gates(options_of(config)),
}


def check_config(config: Config) -> None:
    """Refuses options that cannot be.

    Raises:
        ValueError: naming the option.
    """
    least = {"seeds": 2, "draws": 2, "members": 2, "epochs": 2, "answers": 2, "held_out": 2, "items": 2, "pairs": 4}
    least |= {"battles": 2, "updates": 5, "bandit_steps": 10, "sft_steps": 1, "width": 2}
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            word = name.replace("_", "-")
            raise ValueError(f"--{word} is {getattr(config, name)}: give {smallest} or more.")
    for name, divisor in {"updates": 5, "bandit_steps": 10, "width": 2, "pairs": 2}.items():
        if getattr(config, name) % divisor:
            word = name.replace("_", "-")
            raise ValueError(f"--{word} is {getattr(config, name)}: give a multiple of {divisor}.")
    if not 0 <= config.smoothing_rate <= 1:
        raise ValueError(f"--smoothing-rate is {config.smoothing_rate}: give 0 to 1.")
    if not 0 <= config.label_noise < 0.5:
        raise ValueError(f"--label-noise is {config.label_noise}: give at least 0 and less than 0.5.")


def main(config: Config) -> dict:
    """Runs the stages and returns the summary."""
    check_config(config)
    return run_gates("reward_model_gates", config, STAGES)


if __name__ == "__main__":
    use_all_cores()
    run(main, PRESETS, __doc__)
