"""Algorithms against each other: gold reward at equal samples and at equal KL, over seeds, on three worlds.

    python experiments/compare.py --preset toy
    python experiments/compare.py --preset world --algorithms ppo grpo kto --rule UWO
    python experiments/compare.py --preset real --policy FOLDER --prompts FILE.jsonl --sentiment FILE.jsonl

Every algorithm draws as many responses an update and in all, and all are measured alike: on responses of their own to
held-out prompts. Offline algorithms get fresh responses of the initial policy, labelled by the same reward. Learning
rates are one number a world (the toy's is the larger of 1e-3 and 3e-3 at which policies do not collapse, on other
seeds; the others are those of the over-optimisation study), twice that for algorithms that take one step an update.
The seeds of an algorithm are lanes of one compiled program. It leaves `tables.md`, `samples.md`, `metrics.jsonl`,
`figures/frontier.png`, `figures/learning.png` and `summary.json`.

KL may rise and then fall again while gold goes on rising: gold at equal KL is taken where a run *first* gets that far,
and the frontier figure shows the whole way.

On the toy all ten on-policy methods reach 90 % of the largest reward (from 39 %) in 5 of 5 seeds within 5,760
responses, PPO and REINFORCE++ the fastest (1,920, median). The six of `world` follow nearly one curve of gold against
KL: after 3,840 responses they differ by how far they went (DPO +0.18 s.d. of gold at 2.7 nats, PPO -1.23 at 14.7). On
`real` (3 seeds, 1,280 responses) gold still rises with KL, PPO and GRPO the farthest, and nothing else is established.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from rlhf_jax.data.synthetic.modular import ModularSums
from rlhf_jax.evaluation.frontier import (
    Curves,
    comparison_rows,
    equal_kl_table,
    equal_samples_table,
    frontier_figure,
    learning_figure,
    reach_table,
    samples_to_reach,
)
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.laboratory.arms import ARMS, FAMILIES, Plan, check_arms
from rlhf_jax.laboratory.comparison import (
    Contest,
    Reward,
    Schedule,
    checked,
    curves_of,
    first_measurement,
    modelled,
    proxies_of,
    run_arm,
)
from rlhf_jax.laboratory.options import Options, check_options
from rlhf_jax.laboratory.setting import (
    Setting,
    builtin_setting,
    gold_of,
    repeated,
    sample,
    sampling_of,
    text_setting,
    tiny_model,
)
from rlhf_jax.laboratory.sums import modular_world, sums_setting
from rlhf_jax.parallel.lanes import use_all_cores
from rlhf_jax.rewards.bradley_terry import check_rewards
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.metrics import MetricsWriter

ON_POLICY = tuple(name for name, arm in ARMS.items() if arm.family in FAMILIES[:2])
LEVEL = 0.9
"""Share of the toy's largest reward, 1, that on-policy methods should reach."""
MOST_LINES = 6
"""Lines of a figure that one panel can hold."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a comparison.

    Attributes:
        preset: a complete configuration to start from; other options given change it.
        out: folder to write to; None: runs/compare/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a check fails.
        world: "toy" (modular sums, rewarded by a step checker), "overoptimization" (the built-in world, rewarded by
            reward models that were learned from noisy comparisons) or "real" (a pretrained policy, likewise).
        algorithms: names of those to compare; a wrong one is answered with the list.
        rule: what becomes of the scores of reward models: the lead member's alone ("single"), or a rule over members or
            with uncertainty; the toy has the checker.
        policy: real: Hugging Face folder of the policy.
        prompts: real: JSONL file with a column `prompt`.
        sentiment: real: JSONL file with columns `text` and `label`, from which the gold reward is learned.
        seed: first seed.
        seeds: repetitions of every algorithm, at least 2.
        responses: drawn an update, by every algorithm; a multiple of samples x minibatches.
        samples: responses to a prompt, where an algorithm compares several.
        updates: of every algorithm.
        report_every: updates between two measurements; divides updates.
        measured: responses to each held-out prompt that a policy is measured on; they do not count as samples.
        held_out: held-out prompts.
        learning_rate: of all algorithms; those that take one step an update have twice as much.
        epochs: passes over a rollout, where an algorithm corrects for steps away from the policy that sampled.
        minibatches: optimiser steps a pass, likewise.
        kl_coefficient: of the KL from the initial policy in reward or loss.
        beta: how strongly losses of preferences hold the policy to the initial one.
        budget: toy: samples within which on-policy methods should reach 90 % of the largest reward; None: all.
        modulus: toy: numbers are 0 … modulus - 1.
        terms: toy: numbers in a sum.
        slips: toy: probability that a demonstrated step is any number.
        width: of the policy (not of a pretrained one) and its reward models.
        sft_steps: fine-tuning steps of the initial policy (not of a pretrained one).
        members: reward models in an ensemble.
        pairs: comparisons that a reward model is trained on; of the toy, training prompts.
    """

    preset: Literal["toy", "world", "real", "tiny"] = "toy"
    out: Path | None = None
    overwrite: bool = False
    strict: bool = False
    world: Literal["toy", "overoptimization", "real"] = "toy"
    algorithms: tuple[str, ...] = ON_POLICY
    rule: Literal["single", "mean", "WCO", "UWO", "AdvPO", "sample-wise"] = "single"
    policy: Path | None = None
    prompts: Path | None = None
    sentiment: Path | None = None
    seed: int = 0
    seeds: int = 5
    responses: int = 64
    samples: int = 8
    updates: int = 120
    report_every: int = 10
    measured: int = 4
    held_out: int = 64
    learning_rate: float = 1e-3
    epochs: int = 2
    minibatches: int = 2
    kl_coefficient: float = 0.0
    beta: float = 0.1
    budget: int | None = None
    modulus: int = 7
    terms: int = 4
    slips: float = 0.4
    width: int = 32
    sft_steps: int = 800
    members: int = 5
    pairs: int = 1500


PRESETS = {
    "toy": Config(),
    "world": Config(
        preset="world",
        world="overoptimization",
        algorithms=("ppo", "rloo", "grpo", "online_dpo", "raft", "dpo", "ipo", "kto", "sft"),
        updates=60,
        report_every=5,
        learning_rate=3e-4,
        sft_steps=700,
    ),
    "real": Config(
        preset="real",
        world="real",
        algorithms=("ppo", "grpo", "online_dpo", "dpo"),
        seeds=3,
        members=3,
        updates=20,
        report_every=5,
        held_out=32,
        learning_rate=5e-5,
        pairs=1000,
    ),
    "tiny": Config(
        preset="tiny",
        algorithms=("ppo", "grpo", "dpo"),
        seeds=2,
        responses=8,
        samples=2,
        updates=2,
        report_every=1,
        measured=1,
        held_out=4,
        epochs=1,
        minibatches=1,
        modulus=3,
        terms=2,
        width=8,
        sft_steps=2,
        members=2,
        pairs=5,
    ),
}


class Stage(NamedTuple):
    """Where a comparison takes place: the setting, what is rewarded there, and the gold reward's unit."""

    setting: Setting
    reward: Reward
    scale: Callable[[np.ndarray], np.ndarray]
    unit: str


def study_options(config: Config) -> Options:
    """The options of the over-optimisation study's world, or of a pretrained policy's."""
    shared = Options(
        policy=config.policy,
        prompts=config.prompts,
        sentiment=config.sentiment,
        seed=config.seed,
        seeds=config.seeds,
        members=config.members,
        methods=("PPO",) if config.rule == "single" else ("PPO", config.rule),
        pairs=config.pairs,
        held_out=config.held_out,
        width=config.width,
        sft_steps=config.sft_steps,
        reward_batch=min(64, config.pairs),
        best_of_n=0,
    )
    if config.world == "overoptimization":
        return shared
    recipe = {"reward_learning_rate": 1e-3, "reward_epochs": 2, "reward_batch": min(32, config.pairs)}
    return dataclasses.replace(shared, preset="real", longest_prompt=28, **recipe)


def plan_of(config: Config, setting: Setting | None = None) -> Plan:
    """What the algorithms share; before there is a setting, with a model of no matter which shape, to be checked."""
    if setting is None:
        task = ModularSums(config.modulus, config.terms)
        model = tiny_model(1, 8)
        value, sampling = model, sampling_of(modular_world(task, 1, 1, config.seed))
    else:
        model, value, sampling = setting.policy_config, setting.reward_config, setting.sampling
    return Plan(
        model=model,
        value=value,
        sampling=sampling,
        responses=config.responses,
        samples=config.samples,
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        minibatches=config.minibatches,
        kl_coefficient=config.kl_coefficient,
        beta=config.beta,
    )


def check_config(config: Config) -> None:
    """Refuses options that cannot work, before anything is computed."""
    for name in ("updates", "report_every", "measured", "held_out", "pairs", "sft_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name.replace('_', '-')} is {getattr(config, name)}; give at least 1.")
    if config.seeds < 2:
        raise ValueError(f"{config.seeds} seed gives no error bars; give --seeds 2 or more.")
    if config.updates % config.report_every:
        raise ValueError(f"report-every {config.report_every} does not divide updates {config.updates}.")
    if config.world == "toy" and config.rule != "single":
        raise ValueError(f"the toy is rewarded by a checker, of which there is one: leave out --rule {config.rule}.")
    if (config.world == "real") != (config.policy is not None):
        raise ValueError("--world real goes with --policy FOLDER, --prompts FILE.jsonl and --sentiment FILE.jsonl.")
    if config.world != "toy":
        check_options(study_options(config))
    check_arms(config.algorithms, plan_of(config))


def the_stage(config: Config, setting: Setting | None, key: jax.Array) -> Stage:
    """The world, the initial policy and the reward of every seed; a real world's `setting` has been read before."""
    setting_key, initial_key, proxies_key = jax.random.split(key, 3)
    if config.world == "toy":
        task = ModularSums(config.modulus, config.terms)
        world = modular_world(task, config.pairs, config.held_out, config.seed)
        setting = sums_setting(task, world, config.width, config.slips, config.sft_steps, config.seed + 1, setting_key)
        return Stage(setting, checked(task, config.seeds), lambda gold: gold, "reward")
    options = study_options(config)
    setting = builtin_setting(options, setting_key) if setting is None else setting
    world = setting.world
    initial = sample(setting, repeated(world.prompts, np.arange(1024) % len(world.prompts.tokens)), initial_key)
    gold = gold_of(world, initial)
    check_rewards(gold, "the gold reward")
    if gold.std() == 0:
        raise ValueError("the gold reward is the same for all samples of the initial policy; give one that differs.")
    proxies = proxies_of(options, setting, initial.sequences, proxies_key)
    rule = "PPO" if config.rule == "single" else config.rule  # the study's name for the lead reward model alone
    return Stage(
        setting, modelled(options, setting, proxies, rule), lambda raw: (raw - gold.mean()) / gold.std(), "s.d."
    )


def texts(name: str, setting: Setting, history: dict[str, np.ndarray], measured: int) -> str:
    """What the first seed of an algorithm wrote at the end, to six held-out prompts, as a Markdown list."""
    held_out, few = setting.world.held_out, slice(0, 6)
    rows = (history["tokens"][0, -1, ::measured][few], history["mask"][0, -1, ::measured][few])
    read = setting.world.read(np.asarray(held_out.tokens)[few], np.asarray(held_out.mask)[few], *rows)
    lines = [f"- {' '.join(prompt.split())} → {' '.join(response.split())}" for prompt, response in read]
    return "\n".join([f"## {name}", "", *lines])


def panels(names: tuple[str, ...]) -> dict[str, list[str]]:
    """Which algorithms share a panel of a figure: all, if they are few, or those of a family."""
    if len(names) <= MOST_LINES:
        return {"": list(names)}
    by_family = {family: [name for name in names if ARMS[name].family == family] for family in FAMILIES}
    return {family: members for family, members in by_family.items() if members}


def farthest(ratios: Sequence[float]) -> float:
    """The ratio that is farthest from 1."""
    return float(max(ratios, key=lambda ratio: abs(ratio - 1.0)))


def main(config: Config) -> dict:
    """Runs the comparison and returns its summary."""
    began, clock = time.monotonic(), CompileClock()
    check_config(config)
    # Files are read before a folder is made or emptied, so that a wrong one costs nothing.
    setting = text_setting(study_options(config)) if config.world == "real" else None
    folder = run_folder.create(config.out, "compare", config, config.overwrite)
    print(f"writing to {folder.path}")

    def stage(name: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {name}", flush=True)

    stage(f"the {config.world} world, its initial policy and rewards")
    stage_key, arms_key = jax.random.split(jax.random.key(config.seed))
    here = the_stage(config, setting, stage_key)
    contest = Contest(
        plan=plan_of(config, here.setting),
        setting=here.setting,
        reward=here.reward,
        schedule=Schedule(config.seeds, config.updates, config.report_every, config.measured),
        key=arms_key,
    )
    first = first_measurement(contest)

    arms: dict[str, Curves] = {}
    written, gaps, ratios = [], [0.0], [1.0]  # with what a comparison of offline algorithms alone has
    with MetricsWriter(folder.path / "metrics.jsonl") as metrics:
        for name in config.algorithms:
            history = run_arm(name, contest, first)
            arms[name] = curves = curves_of(history, contest, here.scale)
            for seed in range(config.seeds):
                for place, count in enumerate(curves.samples):
                    line = {"algorithm": name, "seed": seed, "samples": int(count)}
                    line |= {f"objective/{what}": getattr(curves, what)[seed, place] for what in ("kl", "gold")}
                    metrics.write(place * config.report_every, line | {"rewards/proxy": curves.proxy[seed, place]})
            written.append(texts(name, here.setting, history, config.measured))
            if "logprob_gap" in history:
                gaps.append(float(history["logprob_gap"].max()))
                ratios.append(farthest(history["first_ratio"].ravel()))
            stage(f"{name}: gold {curves.gold[:, -1].mean():.3f} at {curves.kl[:, -1].mean():.2f} nats")

    families = panels(tuple(arms))
    label, level = f"gold ({here.unit})", LEVEL if config.world == "toy" else None
    frontier_figure(arms, families, folder.path / "figures" / "frontier.png", label)
    learning_figure(arms, families, folder.path / "figures" / "learning.png", label, level)
    checks = [
        run_folder.check("largest |log-prob at rollout − in the first minibatch|", max(gaps), 1e-4, "at most"),
        run_folder.check("ratio of a first minibatch that is farthest from 1", farthest(ratios), 1.0, 1e-4),
    ]
    tables = [equal_samples_table(arms), equal_kl_table(arms)]
    rows = comparison_rows(arms, here.unit)
    if level is not None:
        budget = config.updates * config.responses if config.budget is None else config.budget
        tables.append(reach_table(arms, level))
        for name, curves in arms.items():
            needed = samples_to_reach(curves, level)
            if np.isfinite(needed).all():
                rows.append(row(f"{name}: samples to {level:.0%} of the maximum", "responses", needed))
            if name in ON_POLICY:
                what = f"{name}: seeds that reach {level:.0%} of the maximum within {budget:,} samples"
                checks.append(run_folder.check(what, float((needed <= budget).sum()), float(config.seeds), "at least"))
    result = run_folder.conclude(folder, rows, checks, began, clock.seconds)
    for file, parts in (("tables.md", tables), ("samples.md", written)):
        (folder.path / file).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n" + "\n\n".join(tables) + "\n")
    stage(f"tables, texts and figures are in {folder.path}")
    return result


if __name__ == "__main__":
    use_all_cores()
    run(main, PRESETS, __doc__)
