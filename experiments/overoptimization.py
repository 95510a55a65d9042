"""How gold reward rises and falls when a policy is trained on a reward model, and what ensembles and AdvPO do about it.

    python experiments/overoptimization.py --preset demo
    python experiments/overoptimization.py --preset real --policy FOLDER --prompts FILE.jsonl --sentiment FILE.jsonl

The study: fine-tune a small policy; draw comparisons from it, labelled by the gold reward with noise; train an
ensemble of proxy reward models a seed; push on them with best-of-n and with PPO under six reward rules; score the
stored generations with the gold reward afterwards. All methods, KL coefficients and seeds are lanes of one compiled
program. It leaves `summary.json`, `metrics.jsonl`, `samples.md`, `figures/*.png`, `history.npz` and checkpoints.

On two CPU cores `demo` (8 seeds) takes two and a half minutes: gold of plain PPO ends at -1.23 +/- 0.94 (mean and s.d.
over seeds) after a peak of +0.26, AdvPO's at +0.16 +/- 0.19. `real` (3 seeds, stories260K) takes six minutes; gold does
not fall there. `full` (16 seeds, 3 KL coefficients) is for an accelerator. docs/results.md has all numbers.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.evaluation.study import overview, report
from rlhf_jax.laboratory.findings import curves_of, samples
from rlhf_jax.laboratory.neural_gold import neural_gold
from rlhf_jax.laboratory.options import Options, check_options
from rlhf_jax.laboratory.policies import best_of_n, lane_table, train_policies
from rlhf_jax.laboratory.proxies import compare, prepare, score_members, train_members
from rlhf_jax.laboratory.setting import builtin_setting, gold_of, repeated, sample, text_setting
from rlhf_jax.losses.reward import preference_accuracy
from rlhf_jax.parallel.lanes import use_all_cores
from rlhf_jax.rewards.bradley_terry import check_rewards
from rlhf_jax.training import checkpoints, run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.metrics import MetricsWriter

PRESETS = {
    "demo": Options(),
    "full": Options(
        preset="full",
        seeds=16,
        kl_coefficients=(0.0, 0.03, 0.1),
        updates=120,
        best_of_n=4096,
        held_out=64,
    ),
    "real": Options(
        preset="real",
        seeds=3,
        members=3,
        pairs=1000,
        best_of_n=0,
        longest_prompt=28,
        value_net="shared",
        updates=40,
        learning_rate=5e-5,
        reward_learning_rate=1e-3,
        reward_epochs=2,
        reward_batch=32,
    ),
}


def accuracy(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """Share of pairs (last axis) whose chosen response scores higher; a tie counts one half."""
    return np.asarray(preference_accuracy(jnp.asarray(chosen), jnp.asarray(rejected)).mean(axis=-1))


def main(options: Options) -> dict:
    """Runs the study and returns its summary."""
    began, clock = time.monotonic(), CompileClock()
    check_options(options)
    # Files are read before a folder is made or emptied, so that a wrong one costs nothing.
    setting = text_setting(options) if options.policy else None
    folder = run_folder.create(options.out, "overoptimization", options, options.overwrite)
    (folder.path / "figures").mkdir()
    print(f"writing to {folder.path}")

    def stage(name: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {name}", flush=True)

    stages = ("setting", "gold", "initial", "compare", "members", "best_of_n", "policies")
    keys = dict(zip(stages, jax.random.split(jax.random.key(options.seed), len(stages)), strict=True))
    rngs = np.random.default_rng(options.seed).spawn(options.seeds + 1)

    if setting is None:
        stage("fine-tuning the policy and the reward models' trunks")
        setting = builtin_setting(options, keys["setting"])
    if options.gold == "neural":
        stage("training the neural gold reward")
        gold = neural_gold(options, setting, keys["gold"])
        setting = setting._replace(world=setting.world._replace(gold=gold))
    world = setting.world

    stage("sampling the initial policy and labelling comparisons")
    initial_prompts = repeated(world.prompts, np.arange(1024) % len(world.prompts.tokens))
    initial = sample(setting, initial_prompts, keys["initial"])
    initial_gold = gold_of(world, initial)
    check_rewards(initial_gold, "the gold reward")
    if initial_gold.std() == 0:
        raise ValueError("the gold reward is the same for all samples of the initial policy; give one that differs.")

    def scale(gold: np.ndarray) -> np.ndarray:
        return (gold - initial_gold.mean()) / initial_gold.std()

    *pool_keys, clean_key = jax.random.split(keys["compare"], options.seeds + 1)
    pools = [
        compare(setting, pool_key, options.pairs, options.label_noise, rng)
        for pool_key, rng in zip(pool_keys, rngs[1:], strict=True)
    ]
    pools = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pools)
    clean = compare(setting, clean_key, 1000, 0.0, rngs[0])

    stage(f"training {options.seeds} x {options.members} reward models on {options.pairs:,} comparisons each")
    members = train_members(options, setting, pools, keys["members"])
    proxies = prepare(options, setting, members, pools, initial.sequences)
    chosen, rejected = (
        score_members(options, setting, proxies.ensembles, side) for side in (clean.chosen, clean.rejected)
    )
    checkpoints.save(folder.path / "checkpoints" / "initial_policy", setting.policy)
    checkpoints.save(folder.path / "checkpoints" / "reward_models", proxies.ensembles)

    curves = {}
    if options.best_of_n:
        stage(f"best of {options.best_of_n:,} on {options.held_out} held-out prompts")
        curves = best_of_n(options, setting, proxies, scale, keys["best_of_n"])

    rules, coefficients = len(options.methods), len(options.kl_coefficients)
    stage(f"PPO: {rules} reward rules x {coefficients} KL coefficients x {options.seeds} seeds")
    with MetricsWriter(folder.path / "metrics.jsonl") as metrics:
        history, policies = train_policies(options, setting, proxies, keys["policies"], metrics)
        checkpoints.save(folder.path / "checkpoints" / "policies", policies)

        stage("scoring the stored generations with the gold reward")
        study, gold = curves_of(options, world, scale, history)
        for lane, rewards in zip(lane_table(options), gold.mean(axis=-1), strict=True):
            for done in range(options.report_every, options.updates + 1, options.report_every):
                metrics.write(done, lane | {"objective/gold": rewards[done - options.report_every : done].mean()})
    np.savez_compressed(
        folder.path / "history.npz",
        gold=gold,
        kl=history["metrics"]["objective/kl"],
        **{name: history[name] for name in ("rows", "tokens", "mask", "proxy", "rewards", "spread", "uncertainty")},
    )
    text = samples(options, world, history, gold)
    (folder.path / "samples.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n")
    rows, fall = report(study, curves, options.report_every, folder.path / "figures", options.seed)
    rows = [
        row("reward model: accuracy on clean labels", "", accuracy(chosen, rejected).mean(axis=1)),
        row("ensemble mean: accuracy on clean labels", "", accuracy(chosen.mean(axis=1), rejected.mean(axis=1))),
        *rows,
    ]
    ratio = history["metrics"]["val/first_ratio"]
    gap = history["metrics"]["policy/max_logprob_gap"].max()
    farthest = float(ratio.flat[np.abs(ratio - 1.0).argmax()])
    checks = [
        run_folder.check(
            "fall of plain PPO's gold from its peak, in standard errors",
            fall.held_out_in_standard_errors,
            2.0,
            "at least",
        ),
        run_folder.check("largest |log-prob at rollout − in the first minibatch|", float(gap), 1e-4, "at most"),
        run_folder.check("ratio of a first minibatch that is farthest from 1", farthest, 1.0, 1e-4),
    ]
    result = run_folder.conclude(folder, rows, checks, began, clock.seconds)
    table = overview(study, options.report_every)
    (folder.path / "overview.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n")
    print(f"[{time.monotonic() - began:6.1f} s] tables, samples and figures are in {folder.path}")
    return result


if __name__ == "__main__":
    use_all_cores()
    run(main, PRESETS, __doc__)
