"""LoRA on every attention projection beside full tuning: accuracy of reward models, memory and time of a step.

    python experiments/lora.py

After PE-RLHF (Sidahmed et al. 2024, 2403.10704). *Accuracy*: every seed fine-tunes a trunk on the demonstrations of the
built-in world and trains reward models from it on the same comparisons: as a whole, and by LoRA of every rank at ten
times the learning rate. It is measured on held-out pairs with clean labels, of LoRA after merging. *Memory and time*:
at a larger shape (rank 8) an update of a reward model and a whole step of RL (sampling,
scoring by a reward model, an update of PPO) are compiled both ways, and take turns.

**Bytes of a step** are what the compiler plans: arguments (weights, moments, batch), results that do not take the place
of arguments (the state is donated), and temporaries (gradients, activations, cache). The *memory model* has 4 bytes for
a number that is frozen and 16 for one that is trained (weight, gradient, two moments), and leaves the rest of the full
program as it is. LoRA's frozen base is its reference policy too; full tuning keeps a copy of the policy for that.

**Share trained**: rank R adds 8 R D numbers to a layer of 13 D^2 (feed-forward width 3 D), a share of 0.62 R / D: below
1 % for rank 1 at width 128, and for rank 8 at width 512.

About three minutes on 2 CPU cores. Accuracy of full tuning is 79.7 +/- 3.4 % (mean and
s.d. over 4 seeds, whose trunks differ); LoRA of rank 1, 4, 8, 16 minus that, paired: -1.7 +/- 0.3, -1.5 +/- 1.5,
-1.1 +/- 1.2, -1.2 +/- 0.4 points. So the check of one point fails at rank 1 (at ranks 4 and 8, four seeds do not tell),
while ranks are alike. Bytes, LoRA over full: 0.36 for the reward model (0.41 by the memory model), 0.40 for RL (0.44).
That RL saves less holds there and is no law: with `--remat none` it is 0.61 and 0.60, and the check fails. Three timed
calls are few for the ratio of times: 1.6 [1.4, 1.8] and 1.3 [1.0, 1.6], full over LoRA.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.algorithms.compose import ComposedState, compose
from rlhf_jax.algorithms.fit import epoch_orders, fit
from rlhf_jax.algorithms.optimizer import adam, learning_rate_schedule
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.reward_modeling import preference_scores, reward_modeling
from rlhf_jax.algorithms.sft import sft
from rlhf_jax.data import synthetic
from rlhf_jax.evaluation.figures import GREY, PALETTE, style
from rlhf_jax.evaluation.statistics import mean_interval, row
from rlhf_jax.laboratory.setting import tiny_model
from rlhf_jax.losses.reward import preference_accuracy
from rlhf_jax.models.adapters import AdapterConfig, attach, merge
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.parallel.lanes import over_lanes, use_all_cores
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.ensemble import single
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.metrics import MetricsWriter
from rlhf_jax.types import Params, PreferenceBatch, Prompts, Sequences

DEMONSTRATIONS, PAIRS, LABEL_NOISE, MEMORY_RANK, MIB = 64, 32, 0.1, 8, 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the comparison.

    Attributes:
        preset: a complete configuration to start from.
        out: folder to write to; None: runs/lora/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a check fails.
        seeds: repetitions: trunk, comparisons, reward head, adapter and order.
        width: of the reward models, which have two layers.
        ranks: of the adapters; the checks compare the first with full tuning.
        pretraining_steps: fine-tuning steps of a trunk, of 64 demonstrations.
        pairs: comparisons that a reward model is trained on, once, 32 an update, a tenth of their labels turned round;
            half as many are held out.
        learning_rate: of full tuning; LoRA has ten times as much. Both warm up and decay linearly.
        memory_width: width at which memory and time are measured, a multiple of 64.
        memory_layers: layers there.
        memory_rows: sequences of 64 tokens in a batch there (half as many pairs).
        remat: what a block keeps for the backward pass there, see `ModelConfig`.
        calls: timed calls of each program, after one that is not timed.
    """

    preset: Literal["default"] = "default"
    out: Path | None = None
    overwrite: bool = False
    strict: bool = False
    seeds: int = 4
    width: int = 128
    ranks: tuple[int, ...] = (1, 4, 8, 16)
    pretraining_steps: int = 300
    pairs: int = 4096
    learning_rate: float = 3e-4
    memory_width: int = 512
    memory_layers: int = 8
    memory_rows: int = 16
    remat: Literal["none", "full"] = "full"
    calls: int = 3


def attention_lora(rank: int) -> AdapterConfig:
    """LoRA on every attention projection; the scale 4 / sqrt(rank) lets one learning rate serve all ranks (rsLoRA)."""
    targets = ("query", "key", "value", "output")
    return AdapterConfig(kind="lora", targets=targets, rank=rank, alpha=4.0, rank_stabilised=True)


def size(tree: Any) -> int:
    """How many floating-point numbers a tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating))


def decaying_adam(peak: float, steps: int) -> optax.GradientTransformation:
    """Adam with a warm-up over a tenth of the steps and a linear decay."""
    return adam(learning_rate_schedule(peak, steps, steps // 10, "linear"))


def written_pairs(rng: np.random.Generator, count: int, noise: float) -> PreferenceBatch:
    """Pairs of answers of the built-in writers to one prompt each, the one with more gold chosen but for the noise."""
    prompts = synthetic.sample_prompts(rng, count)
    answers = [synthetic.write_responses(rng, prompts)[:2] for _ in range(2)]
    gold = [synthetic.gold_reward(prompts, *answer) for answer in answers]
    second = synthetic.comparisons(rng, *gold, noise).preferred.astype(bool)[:, None]

    def side(is_second: np.ndarray) -> Sequences:
        tokens, mask = (np.where(is_second, b, a) for a, b in zip(*answers, strict=True))
        whole = np.concatenate([prompts, tokens], axis=1), np.concatenate([np.ones(prompts.shape, bool), mask], axis=1)
        return Sequences(tokens=jnp.asarray(whole[0]), mask=jnp.asarray(whole[1]))

    return PreferenceBatch(chosen=side(second), rejected=side(~second), margin=jnp.zeros(count))


def make_lanes(config: Config, model: ModelConfig) -> dict[str, Any]:
    """What each seed trains from: a trunk fine-tuned on demonstrations, its pairs, and a key; [seeds, …]."""
    steps, keys = config.pretraining_steps, jax.random.split(jax.random.key(0), (2, config.seeds))
    data = synthetic.demonstrations(np.random.default_rng(0), 80 * DEMONSTRATIONS)
    algorithm = sft(model, decaying_adam(1e-3, steps))

    def pretrain(key: jax.Array, data: Any) -> Params:
        init_key, order_key = jax.random.split(key)
        order = epoch_orders(order_key, len(data.tokens), DEMONSTRATIONS, -(-steps // 80))[:steps]
        return fit(algorithm.update, algorithm.init(init_key), data, order)[0].params["trunk"]

    rngs = np.random.default_rng(1).spawn(config.seeds)
    pairs = [written_pairs(rng, config.pairs, LABEL_NOISE) for rng in rngs]
    held_out = [written_pairs(rng, config.pairs // 2, 0.0) for rng in rngs]
    pairs, held_out = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *every) for every in (pairs, held_out))
    trunks = jax.jit(over_lanes(pretrain))(keys[0], data)
    return {"key": keys[1], "trunk": trunks, "pairs": pairs, "held_out": held_out}


def reward_models(config: Config, model: ModelConfig, rank: int, lanes: dict) -> dict[str, Any]:
    """Trains a reward model a lane, by LoRA or (rank 0) as a whole, and measures it on the lane's held-out pairs.

    Returns:
        "accuracy" [seeds] in %; "gap" [seeds], the largest |score after merging - score beside the adapter|; "share"
        [seeds], of the numbers that are trained, in %; "metrics" of every update, [seeds, steps].
    """
    adapter, peak = (attention_lora(rank), 10 * config.learning_rate) if rank else (None, config.learning_rate)
    optimizer = decaying_adam(peak, config.pairs // PAIRS)
    algorithm = reward_modeling(model, optimizer, adapter=adapter)

    def train(lane: dict) -> dict[str, Any]:
        init_key, order_key = jax.random.split(lane["key"])
        order = epoch_orders(order_key, config.pairs, PAIRS, 1)
        state = algorithm.init(init_key, {"trunk": lane["trunk"]})
        state, metrics = fit(algorithm.update, state, lane["pairs"], order)
        models = [state.params]
        if adapter is not None:
            parts, head = (state.base, state.params["trunk"], adapter), {"head": state.params["head"]}
            models = [merge(*parts) | head, attach(*parts) | head]
        scores = [jnp.stack(preference_scores(model, params, lane["held_out"])) for params in models]
        accuracy, gap = preference_accuracy(*scores[0]).mean(), jnp.abs(scores[0] - scores[-1]).max()
        share = jnp.float32(100 * size(state.params) / size(models[0]))
        return {"accuracy": 100 * accuracy, "gap": gap, "share": share, "metrics": metrics}

    return jax.device_get(jax.jit(over_lanes(train))(lanes))


class Step(NamedTuple):
    """A compiled step, its start and inputs, how many numbers it trains and holds, and how many of them are moments."""

    program: Any
    init: Callable
    inputs: tuple
    trained: int
    held: int
    moments: int
    bytes: int


def compiled_steps(config: Config, adapter: AdapterConfig | None) -> dict[str, Step]:
    """The two steps at the shape at which memory is measured; nothing runs."""
    rows, half, heads, key = config.memory_rows, 32, config.memory_width // 64, jax.random.key(0)
    shape = dict(heads=heads, key_value_heads=heads, context_length=2 * half, remat=config.remat)
    model = dataclasses.replace(tiny_model(config.memory_layers, config.memory_width), **shape)
    modeling = reward_modeling(model, adam(1e-4), adapter=adapter)
    sampling = SamplingConfig(max_new_tokens=half, stop_tokens=())  # every response has the full length
    options = PPOConfig(sampling=sampling, epochs=1, minibatches=1, value_net="shared")
    policy = ppo(model, options, adam(1e-4), adapter=adapter)
    composed = compose(policy, reward_scorer(model), single())

    def whole_step(state: Any, prompts: Prompts, scored_by: Params) -> tuple[Any, dict]:
        state, output = composed(ComposedState(algorithm=state, transform=()), prompts, scored_by)
        return state.algorithm, output.metrics

    tokens, mask = jnp.ones((rows, 2 * half), jnp.int32), jnp.ones((rows, 2 * half), bool)
    prompts = Prompts(tokens=tokens[:, :half], mask=mask[:, :half], index=jnp.arange(rows, dtype=jnp.int32))
    side = Sequences(tokens=tokens[::2], mask=mask[::2])
    shapes = jax.eval_shape(partial(init_reward_model, model), key)
    scored_by = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    pairs = PreferenceBatch(chosen=side, rejected=side, margin=jnp.zeros(len(side.tokens)))
    steps = {}
    for name, init, step, inputs in (
        ("reward model step", modeling.init, modeling.update, (pairs,)),
        ("RL step", policy.init, whole_step, (prompts, scored_by)),
    ):
        state = jax.eval_shape(init, key)
        program = jax.jit(step, donate_argnums=0).lower(state, *inputs).compile()
        plan = program.memory_analysis()
        new = plan.output_size_in_bytes - plan.alias_size_in_bytes
        numbers = (size(state.params), size((state, inputs)), size(state.optimizer_state))
        steps[name] = Step(program, init, inputs, *numbers, plan.argument_size_in_bytes + new + plan.temp_size_in_bytes)
    return steps


def modelled_bytes(full: Step, lora: Step) -> int:
    """Bytes of the step by LoRA, as the memory model has them, from those of the full one."""
    return full.bytes + 4 * (lora.held + lora.trained - full.held - full.trained)


def take_turns(steps: tuple[Step, ...], calls: int) -> np.ndarray:
    """Seconds of each call of each program, [programs, calls], after one that is not timed."""
    states = [jax.jit(step.init)(jax.random.key(0)) for step in steps]
    seconds = np.zeros((len(steps), calls + 1))
    for call in range(calls + 1):
        for place, step in enumerate(steps):
            began = time.perf_counter()
            states[place], _ = jax.block_until_ready(step.program(states[place], *step.inputs))
            seconds[place, call] = time.perf_counter() - began
    return seconds[:, 1:]


def draw(accuracy: dict[int, np.ndarray], steps: dict[str, tuple[Step, Step]], path: Path) -> None:
    """Accuracy against rank with the band of full tuning, and the bytes of each step both ways."""
    from matplotlib.figure import Figure

    ranks, full = [rank for rank in accuracy if rank], mean_interval(accuracy[0])
    differences = {rank: values - accuracy[0] for rank, values in accuracy.items()}
    with style():
        figure = Figure(figsize=(10.6, 3.4), layout="constrained")
        *panels, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
        for panel, values, (low, middle, high), title in (
            (panels[0], accuracy, (full.low, full.mean, full.high), "accuracy of LoRA, %\n(grey: full tuning)"),
            (panels[1], differences, (-1.0, 0.0, 1.0), "minus full tuning, paired\n(grey: 1 point)"),
        ):
            estimates = [mean_interval(values[rank]) for rank in ranks]
            errors = [estimate.high - estimate.mean for estimate in estimates]
            panel.axhspan(low, high, color=GREY, alpha=0.2, linewidth=0)
            panel.axhline(middle, color=GREY)
            panel.errorbar(ranks, [estimate.mean for estimate in estimates], errors, color=PALETTE[0], marker="o")
            panel.set_xscale("log", base=2)
            panel.set_xticks(ranks, [str(rank) for rank in ranks])
            panel.set(xlabel="rank (bars: 95 % intervals)", title=title)
        each = [step for both in steps.values() for step in both]
        parts = np.array([(4 * (s.held - s.moments), 4 * s.moments, s.bytes - 4 * s.held) for s in each])
        labels = ("weights", "moments of Adam", "gradients and activations")
        for place, (label, colour) in enumerate(zip(labels, PALETTE[1:4], strict=True)):
            start = parts[:, :place].sum(axis=1) / MIB
            right.barh(range(len(each)), parts[:, place] / MIB, left=start, color=colour, label=label)
        modelled = [modelled_bytes(*both) / MIB for both in steps.values()]
        right.plot(modelled, range(1, len(each), 2), "k|", markersize=16)
        right.set_yticks(range(len(each)), [f"{name}, {way}" for name in steps for way in ("full", "LoRA")])
        right.invert_yaxis()
        right.set(xlabel="MiB", title="bytes of a step\n(ticks: memory model)")
        figure.legend(loc="outside lower right", ncols=3)
        figure.savefig(path)


def main(config: Config) -> dict:
    """Trains, compiles and times both ways, and returns the summary."""
    began, clock, one = time.monotonic(), CompileClock(), partial(np.full, 1)
    if not config.ranks or min(*config.ranks, config.calls) < 1 or config.seeds < 2:
        raise ValueError("lora needs ranks of 1 or more, 2 seeds or more, and 1 timed call or more.")
    if config.pairs < 2 * PAIRS or config.memory_width % 64:
        raise ValueError(f"lora needs {2 * PAIRS} pairs or more, and a memory-width that is a multiple of 64.")
    folder = run_folder.create(config.out, "lora", config, config.overwrite)
    (folder.path / "figures").mkdir()
    model, check = tiny_model(2, config.width), run_folder.check
    lanes, accuracy, shares, gaps, rows = make_lanes(config, model), {}, {}, [], []
    with MetricsWriter(folder.path / "metrics.jsonl") as metrics:
        for rank in (0, *config.ranks):
            method = f"LoRA of rank {rank}" if rank else "full tuning"
            found = reward_models(config, model, rank, lanes)
            accuracy[rank], shares[rank] = found["accuracy"], float(found["share"][0])
            gaps.append(float(found["gap"].max()))
            rows += [row(f"{method}: accuracy", "%", accuracy[rank])]
            if rank:
                rows += [row(f"{method}: accuracy minus full tuning, paired", "points", accuracy[rank] - accuracy[0])]
                rows += [row(f"{method}: share trained", "%", one(shares[rank]))]
            print(f"[{time.monotonic() - began:6.1f} s] {method}: accuracy {accuracy[rank].mean():.2f} %", flush=True)
            for seed, step in np.ndindex(found["metrics"]["lr"].shape):
                line = {name: values[seed, step] for name, values in found["metrics"].items()}
                metrics.write(step + 1, {"method": method, "seed": seed} | line)

    full, lora = (compiled_steps(config, adapter) for adapter in (None, attention_lora(MEMORY_RANK)))
    steps, saved = {name: (full[name], lora[name]) for name in full}, {}
    for name, both in steps.items():
        saved[name] = both[1].bytes / both[0].bytes
        for way, step in zip(("full", "LoRA"), both, strict=True):
            rows += [row(f"{name}: bytes, {way}", "MiB", one(step.bytes / MIB))]
            rows += [row(f"{name}: bytes of its moments, {way}", "MiB", one(4 * step.moments / MIB))]
        rows += [row(f"{name}: bytes, LoRA over full", "1", one(saved[name]))]
        rows += [row(f"{name}: the same by the memory model", "1", one(modelled_bytes(*both) / both[0].bytes))]
        seconds = take_turns(both, config.calls)
        rows += [row(f"{name}: time, {way}", "s", each) for way, each in zip(("full", "LoRA"), seconds, strict=True)]
        rows += [row(f"{name}: time, full over LoRA", "1", seconds[0] / seconds[1])]
    rank, update = config.ranks[0], lora["reward model step"]
    means = np.array([accuracy[rank].mean() for rank in config.ranks])
    share = 100 * update.trained / (update.held - update.moments)
    more = saved["RL step"] - saved["reward model step"]
    checks = [
        check(f"accuracy, rank {rank} minus full tuning, points", float(means[0] - accuracy[0].mean()), 0.0, 1.0),
        check("accuracy of a rank, farthest from their mean, points", float(abs(means - means.mean()).max()), 0.0, 1.0),
        check(f"share trained at rank {rank}, width {config.width}, %", shares[rank], 1.0, "at most"),
        check(f"share trained at rank {MEMORY_RANK}, width {config.memory_width}, %", share, 1.0, "at most"),
        check("reward model step: bytes, LoRA over full", saved["reward model step"], 0.7, "at most"),
        check("bytes, LoRA over full: RL step minus reward model step", more, 0.0, "at least"),
        check("optimiser state of LoRA, beyond 2 x its numbers", float(update.moments - 2 * update.trained), 0.0, 2.0),
        check("largest |score merged - score beside the adapter|", max(gaps), 1e-4, "at most"),
    ]
    draw(accuracy, steps, folder.path / "figures" / "lora.png")
    return run_folder.conclude(folder, rows, checks, began, clock.seconds)


if __name__ == "__main__":
    use_all_cores()
    run(main, {"default": Config()}, __doc__)
