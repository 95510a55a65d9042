"""Kinds of uncertain reward models at equal labels: do they know where they err, and what do policies make of it?

    python experiments/uncertainty.py --preset quick
    python experiments/uncertainty.py --preset full
    python experiments/uncertainty.py --preset full --label-noise 0
    python experiments/uncertainty.py --preset full --kinds single seeds LoRA posterior --rules mean WCO AdvPO
    python experiments/uncertainty.py --preset real --policy FOLDER --prompts FILE.jsonl --sentiment FILE.jsonl

Every kind is trained, in every seed, on the labels of one careless annotator: as many for all, with the compute stated.
(URM, URME and the quantiles see ratings of single responses, a label each; the others comparisons.) First the single
reward model is optimised plainly, and what that policy writes is stored; then every kind is asked about the same stored
responses (accuracy, calibration, whether its uncertainty rises with |proxy - gold| and tells new responses), and
policies are trained on every kind under every reward rule that it can serve. Scores, coefficients of rules and gold are
in standard deviations under the initial policy. All rules and seeds of a kind and an algorithm are lanes of one
compiled program.

What the papers claim is judged as gates: a gate passes when its mean over seeds lies where the claim wants it; "within
noise" says that a threshold lies within the 95 % interval. Some claims are for noisy labels and for clean ones: run
`full` with `--label-noise 0` too.

docs/reward_models.md has what came out, and how long it took on two CPU cores.

It leaves `tables.md` (the tables of docs/reward_models.md, gates included), `gates.json` (every seed), `metrics.jsonl`,
`figures/kinds.png`, `figures/policies.png` and `summary.json`.
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from rlhf_jax.evaluation.frontier import Curves
from rlhf_jax.laboratory.arms import Plan, check_arms
from rlhf_jax.laboratory.comparison import Schedule, curves_of, first_measurement, run_arm
from rlhf_jax.laboratory.gates.gate import gate_checks, gate_rows
from rlhf_jax.laboratory.gates.report import print_gates
from rlhf_jax.laboratory.options import Options, check_options
from rlhf_jax.laboratory.setting import Setting, builtin_setting, text_setting, tiny_model
from rlhf_jax.laboratory.uncertain_picks import disagreement, picked
from rlhf_jax.laboratory.uncertainty_gates import Found, gates, rows_of
from rlhf_jax.laboratory.uncertainty_panel import begun, measure, panel_of, score_panel
from rlhf_jax.laboratory.uncertainty_report import write_report
from rlhf_jax.laboratory.uncertainty_study import (
    KINDS,
    RULES,
    Coefficients,
    Prepared,
    begin,
    contest_of,
    flops,
    parameters_trained,
    prepare,
    reward_of,
    served,
)
from rlhf_jax.parallel.lanes import use_all_cores
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.metrics import MetricsWriter
from rlhf_jax.training.options import RunOptions


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    """Options of the study.

    Attributes:
        preset: a complete configuration to start from; other options given change it.
        out: folder to write to; None: runs/uncertainty/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a gate fails.
        policy: Hugging Face folder of a pretrained policy; None: the built-in world.
        prompts: JSONL file with a column `prompt`, for a pretrained policy.
        sentiment: JSONL file with columns `text` and `label`, from which a pretrained policy's gold is learned.
        kinds: of reward models, "single" first; a wrong one is answered with the list.
        rules: what rewards are made of scores, "mean" (the score itself) first; a kind gets those that it can serve.
        algorithms: that train policies; the first one writes what all kinds are asked about.
        seed: first seed.
        seeds: repetitions, each with labels of its own; at least 2.
        members: reward models in an ensemble.
        pairs: labels a seed.
        label_noise: probability that a label is turned round.
        uwo_coefficient: weight of the variance in UWO.
        lcb_coefficient: weight of the standard deviation in LCB.
        advpo_multiple: the squared radius of AdvPO and sample-wise, as a multiple of its statistical scale.
        regularisation: lambda of the last-layer geometries, in squared units of the features.
        responses: drawn an update.
        samples: responses to a prompt, where an algorithm compares several.
        updates: of every policy.
        report_every: updates between two measurements; divides updates.
        measured: responses to each held-out prompt that a policy is measured on; even.
        held_out: held-out prompts.
        learning_rate: of the policies.
        kl_coefficient: of the KL from the initial policy in the reward.
        test_pairs: fresh comparisons that kinds are tested on.
        answers: responses to each held-out prompt for best-of-n.
        best_of: largest n of best-of-n, at most `answers`; at least 2.
        width: of the built-in policy and reward models.
        sft_steps: fine-tuning steps of the built-in policy and reward trunks.
    """

    preset: Literal["quick", "full", "real", "tiny"] = "quick"
    policy: Path | None = None
    prompts: Path | None = None
    sentiment: Path | None = None
    kinds: tuple[str, ...] = ("single", "seeds", "linear", "posterior")
    rules: tuple[str, ...] = ("mean", "WCO", "UWO", "AdvPO")
    algorithms: tuple[str, ...] = ("ppo",)
    seed: int = 0
    seeds: int = 3
    members: int = 5
    pairs: int = 1500
    label_noise: float = 0.25
    uwo_coefficient: float = 0.5
    lcb_coefficient: float = 1.0
    advpo_multiple: float = 1.0
    regularisation: float = 1.0
    responses: int = 64
    samples: int = 8
    updates: int = 40
    report_every: int = 5
    measured: int = 4
    held_out: int = 32
    learning_rate: float = 3e-4
    kl_coefficient: float = 0.0
    test_pairs: int = 512
    answers: int = 256
    best_of: int = 128
    width: int = 32
    sft_steps: int = 700


PRESETS = {
    "quick": Config(),
    "full": Config(
        preset="full",
        kinds=tuple(KINDS),
        rules=tuple(RULES),
        algorithms=("ppo", "grpo"),
        seeds=5,
        updates=60,
        answers=1024,
        best_of=512,
    ),
    "real": Config(
        preset="real",
        kinds=tuple(name for name, kind in KINDS.items() if not kind.rated and not kind.starts),
        rules=tuple(RULES),
        algorithms=("ppo", "grpo"),
        seeds=3,
        members=3,
        pairs=1000,
        updates=20,
        learning_rate=5e-5,
        answers=64,
        best_of=64,
    ),
    "tiny": Config(
        preset="tiny",
        kinds=("single", "posterior"),
        rules=("mean", "UWO"),
        algorithms=("grpo",),
        seeds=2,
        members=2,
        pairs=16,
        responses=8,
        samples=2,
        updates=2,
        report_every=1,
        measured=2,
        held_out=4,
        test_pairs=8,
        answers=4,
        best_of=4,
        width=8,
        sft_steps=2,
    ),
}


def study_options(config: Config) -> Options:
    """The options of the over-optimisation study's world, or of a pretrained policy's."""
    of_study, of_run = ({field.name for field in dataclasses.fields(kind)} for kind in (Options, RunOptions))
    same = {name: value for name, value in vars(config).items() if name in of_study - of_run}
    shared = Options(**same, methods=("PPO",), reward_batch=min(64, config.pairs), best_of_n=0)
    if config.policy is None:
        return dataclasses.replace(shared, preset="real") if config.preset == "real" else shared
    recipe = {"reward_learning_rate": 1e-3, "reward_epochs": 2, "reward_batch": min(32, config.pairs)}
    return dataclasses.replace(shared, preset="real", longest_prompt=28, **recipe)


def plan_of(config: Config, setting: Setting | None = None) -> Plan:
    """What the algorithms share; before there is a setting, with a model of no matter which shape, to be checked."""
    model = tiny_model(1, 8)
    return Plan(
        model=model if setting is None else setting.policy_config,
        value=model if setting is None else setting.reward_config,
        sampling=SamplingConfig(max_new_tokens=1, stop_tokens=(0,), pad_token=0)
        if setting is None
        else setting.sampling,
        responses=config.responses,
        samples=config.samples,
        learning_rate=config.learning_rate,
        kl_coefficient=config.kl_coefficient,
    )


def check_config(config: Config) -> None:
    """Refuses options that cannot work, before anything is computed."""
    for what, given, known, first in (("kind", config.kinds, KINDS, "single"), ("rule", config.rules, RULES, "mean")):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"there is no {what} {unknown[0]!r}; choose some of {', '.join(known)}.")
        if len(set(given)) < len(given) or given[:1] != (first,):
            raise ValueError(f"{what}s are {', '.join(given)}: begin with {first}, and name each once.")
    for name, least in {"measured": 2, "test_pairs": 1, "best_of": 2}.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name.replace('_', '-')} is {getattr(config, name)}; give at least {least}.")
    if config.measured % 2:
        raise ValueError(f"measured is {config.measured}; give an even number, as responses are compared in pairs.")
    if config.best_of > config.answers:
        raise ValueError(f"best-of is {config.best_of}, of {config.answers} answers; give at most as many.")
    if config.members < 2:
        raise ValueError(f"members is {config.members}: one member never disagrees; give 2 or more.")
    if min(config.uwo_coefficient, config.lcb_coefficient) < 0:
        raise ValueError("the coefficient of UWO or LCB is negative; give at least 0.")
    for name in config.kinds if config.policy is not None else ():
        if KINDS[name].rated or KINDS[name].starts:
            what = "ratings" if KINDS[name].rated else "several pretrained trunks"
            raise ValueError(f"{name} needs {what}, which only the built-in world has; leave it out of kinds.")
    check_options(study_options(config))
    check_arms(config.algorithms, plan_of(config))


def write_curves(metrics: MetricsWriter, config: Config, names: tuple[str, str, str], curves: Curves) -> None:
    """One line a seed and measurement."""
    what = dict(zip(("kind", "algorithm", "rule"), names, strict=True))
    for seed in range(config.seeds):
        for place in range(len(curves.samples)):
            line = what | {"seed": seed, "rewards/proxy": curves.proxy[seed, place]}
            line |= {f"objective/{name}": getattr(curves, name)[seed, place] for name in ("kl", "gold")}
            metrics.write(place * config.report_every, line)


def main(config: Config) -> dict:
    """Runs the study and returns its summary."""
    began, clock = time.monotonic(), CompileClock()
    check_config(config)
    options = study_options(config)
    # Files are read before a folder is made or emptied, so that a wrong one costs nothing.
    setting = text_setting(options) if config.policy else None
    folder = run_folder.create(config.out, "uncertainty", config, config.overwrite)
    print(f"writing to {folder.path}")

    def stage(name: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {name}", flush=True)

    setting_key, labels_key, train_key, panel_key, arms_key = jax.random.split(jax.random.key(config.seed), 5)
    if setting is None:
        stage("fine-tuning the policy and the reward models' trunks")
        setting = builtin_setting(options, setting_key)
    stage(f"sampling the initial policy; {config.pairs:,} labels for each of {config.seeds} seeds")
    study = begin(options, setting, any(KINDS[name].rated for name in config.kinds), labels_key)
    plan, weights = plan_of(config, setting), Coefficients(config.uwo_coefficient, config.lcb_coefficient)
    schedule = Schedule(config.seeds, config.updates, config.report_every, config.measured)
    labels = {name: KINDS[name].label for name in config.kinds}

    panel, first = None, {}
    costs, found = {}, Found({}, {}, {}, {}, config.best_of, config.label_noise > 0)
    gaps = [0.0]  # with what a study of offline algorithms alone has
    judged = config.algorithms[0]

    def ask(name: str, prepared: Prepared) -> dict[str, np.ndarray]:
        """A kind's scores of the panel, after all that is measured on them."""
        scores = score_panel(options, setting, KINDS[name], prepared, panel.sequences)
        found.kinds[name] = measure(panel, scores, np.asarray(prepared.spread), KINDS[name].compared)
        found.picked[name] = picked(panel, scores, weights)
        return scores

    with MetricsWriter(folder.path / "metrics.jsonl") as metrics:
        for name, kind in ((name, KINDS[name]) for name in config.kinds):
            params = kind.train(options, setting, study.labels, train_key)
            prepared, offered = prepare(options, setting, kind, params, study.labels.comparisons, study.initial)
            costs[name] = {
                "parameters trained": parameters_trained(kind, params),
                "training": kind.passes(options),
                "scoring": flops(options, setting, kind, prepared.params),
            }
            rules = served(config.rules, offered)
            reward = reward_of(kind.scorer(options, setting), rules, prepared, weights)
            contest = contest_of(plan, setting, reward, schedule, arms_key, len(rules))
            if panel is None:
                start = first_measurement(contest)
            else:
                start = begun(first, panel, ask(name, prepared)["mean"], len(rules))
            for algorithm in config.algorithms:
                history = run_arm(algorithm, contest, start)
                gaps.append(float(np.max(history.get("logprob_gap", 0.0))))
                every = curves_of(history, contest, study.scale)
                for place, rule in enumerate(rules):
                    lanes = slice(place * config.seeds, (place + 1) * config.seeds)
                    curves = every._replace(**{what: getattr(every, what)[lanes] for what in ("kl", "gold", "proxy")})
                    found.policies[name, algorithm, rule] = curves
                    write_curves(metrics, config, (name, algorithm, rule), curves)
                if panel is None:
                    first = {what: values[: config.seeds] for what, values in start.items()}
                    along_plain = {what: history[what][: config.seeds] for what in ("tokens", "mask")}
                    panel = panel_of(study, along_plain, config.test_pairs, config.answers, config.best_of, panel_key)
                    ask(name, prepared)
                if algorithm == judged and "members" in offered:
                    parted = disagreement(options, setting, kind, prepared, history, rules)
                    found.disagreement.update({(name, rule): values for rule, values in parted.items()})
            final = {rule: found.final(name, judged, rule).mean() for rule in rules}
            best = max(final, key=final.get)
            stage(f"{name}: {', '.join(rules)}; gold of {judged} at best {final[best]:+.2f} ({best})")

    alone = costs["single"]["scoring"]
    costs = {name: cost | {"scoring": cost["scoring"] / alone} for name, cost in costs.items()}
    claims = gates(found, judged)
    write_report(folder.path, labels, costs, found, claims)
    gap = run_folder.check("largest |log-prob at rollout − in the first minibatch|", max(gaps), 1e-4, "at most")
    rows, checks = [*gate_rows(claims), *rows_of(found)], [*gate_checks(claims), gap]
    result = run_folder.summary(folder, rows, checks, time.monotonic() - began, clock.seconds)
    run_folder.write_summary(folder, result)
    run_folder.print_summary(result | {"rows": result["rows"][len(claims) :], "checks": result["checks"][-1:]})
    print_gates(claims, "uncertainty")
    stage(f"tables and figures are in {folder.path}")
    return result


if __name__ == "__main__":
    use_all_cores()
    run(main, PRESETS, __doc__)
