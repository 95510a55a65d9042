"""How gold reward rises and falls when a policy is trained on a reward model, and what ensembles and AdvPO do about it.

    python experiments/overoptimization.py --preset demo                     # built-in world
    python experiments/overoptimization.py --preset real --policy FOLDER --prompts FILE.jsonl --sentiment FILE.jsonl

The study: fine-tune a small policy; draw comparisons from it, labelled by the gold reward with noise; train an ensemble of proxy
reward models a seed; push on them with best-of-n and with PPO under six reward rules; score the stored generations with the gold
reward afterwards. All methods, KL coefficients and seeds are lanes of one compiled program. It writes `summary.json`,
`metrics.jsonl`, `samples.md`, `figures/*.png` and checkpoints.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.compose import ComposedState, compose
from rlhf_jax.algorithms.fit import epoch_orders, fit
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.reward_modeling import reward_modeling
from rlhf_jax.algorithms.sft import sft
from rlhf_jax.data.synthetic.comparisons import comparisons
from rlhf_jax.data.synthetic.vocabulary import VOCABULARY
from rlhf_jax.data.synthetic.writer import demonstrations
from rlhf_jax.data.world import World, builtin_world, take_prompts, text_world
from rlhf_jax.evaluation.statistics import pearson, row
from rlhf_jax.evaluation.study import Runs, Study, report
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy
from rlhf_jax.parallel.lanes import over_lanes, use_all_cores
from rlhf_jax.rewards.bradley_terry import EnsembleParams, check_rewards, ensemble_scorer
from rlhf_jax.rewards.ellipsoid import Geometry, geometry, gram, uncertainty
from rlhf_jax.rewards.ensemble import (
    ensemble_mean,
    member_offset,
    single,
    uncertainty_weighted,
    worst_case,
)
from rlhf_jax.rewards.last_layer import advpo, radius_from, samplewise, statistical_scale
from rlhf_jax.rewards.transforms import select
from rlhf_jax.sampling.best_of_n import best_of_n_curve
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import generate
from rlhf_jax.training import checkpoints, run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.metrics import MetricsWriter
from rlhf_jax.training.progress import ProgressReport
from rlhf_jax.types import Params, PreferenceBatch, Prompts, Rollout, Score, Sequences, Transform

# Each rule's transform, by the name it has on the command line and in the tables.
RULES: dict[str, Transform] = {
    "PPO": single(),
    "mean": ensemble_mean(),
    "WCO": worst_case(),
    "UWO": uncertainty_weighted(),
    "AdvPO": advpo(),
    "sample-wise": samplewise(),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the study.

    Attributes:
        preset: a complete configuration to start from; other options given change it.
        out: folder to write to; None: runs/overoptimization/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a check fails.
        policy: Hugging Face folder of a pretrained policy; None: the built-in world.
        prompts: JSONL file with a column `prompt`, for a pretrained policy.
        sentiment: JSONL file with columns `text` and `label` (1 positive), from which the gold reward of a pretrained policy's
            world is learned.
        gold: of the built-in world, the "rubric" itself, or a "neural" reward model trained on many labels of it.
        seed: first seed; everything random follows from it.
        seeds: number of independent repetitions: comparisons, label noise, reward models and PPO.
        members: reward models in an ensemble.
        methods: reward rules to train with; PPO is the single reward model.
        kl_coefficients: coefficients of the per-token KL penalty in the reward.
        pairs: comparisons that a reward model is trained on.
        label_noise: probability that a label is turned round.
        features: what the reward head reads, see `models.heads.reward_features`.
        uwo_coefficient: weight of the variance in UWO.
        advpo_multiple: the squared radius B of AdvPO and sample-wise as a multiple of its statistical scale.
        advpo_value: B itself; then `advpo_multiple` is not used.
        regularisation: lambda of the last-layer geometry, in squared units of the features.
        updates: PPO updates.
        rollouts: responses an update.
        report_every: updates between two reports, each one call of the compiled program.
        learning_rate: of PPO, policy and value net together.
        epochs: PPO passes over a rollout.
        minibatches: PPO optimiser steps a pass.
        response_length: longest response of a pretrained policy, in tokens.
        best_of_n: answers a held-out prompt for best-of-n (the largest n); 0 leaves it out.
        held_out: held-out prompts.
        policy_layers: layers of the built-in policy.
        width: width of the built-in policy and of its reward models.
        reward_layers: layers of the built-in reward models.
        sft_steps: fine-tuning steps of the built-in policy and reward trunks.
        reward_epochs: passes over the comparisons.
        reward_learning_rate: of the reward models.
        reward_batch: comparisons an update.
    """

    preset: Literal["demo", "full", "real"] = "demo"
    out: Path | None = None
    overwrite: bool = False
    strict: bool = False
    policy: Path | None = None
    prompts: Path | None = None
    sentiment: Path | None = None
    gold: Literal["rubric", "neural"] = "rubric"
    seed: int = 0
    seeds: int = 6
    members: int = 5
    methods: tuple[str, ...] = tuple(RULES)
    kl_coefficients: tuple[float, ...] = (0.0,)
    pairs: int = 1500
    label_noise: float = 0.25
    features: Literal["final_norm", "pre_norm"] = "pre_norm"
    uwo_coefficient: float = 0.5
    advpo_multiple: float = 0.1
    advpo_value: float | None = None
    regularisation: float = 1.0
    updates: int = 120
    rollouts: int = 64
    report_every: int = 10
    learning_rate: float = 3e-4
    epochs: int = 2
    minibatches: int = 2
    response_length: int = 32
    best_of_n: int = 1024
    held_out: int = 32
    policy_layers: int = 2
    width: int = 32
    reward_layers: int = 1
    sft_steps: int = 600
    reward_epochs: int = 4
    reward_learning_rate: float = 2e-3
    reward_batch: int = 64


PRESETS = {
    "demo": Config(),
    "full": Config(
        preset="full", seeds=16, kl_coefficients=(0.0, 0.03, 0.1), updates=300, best_of_n=4096, held_out=64, gold="neural"
    ),
    "real": Config(
        preset="real", seeds=3, updates=60, best_of_n=0, learning_rate=1e-4, reward_learning_rate=3e-4, reward_epochs=2
    ),
}


def check_config(config: Config) -> None:
    """Refuses options that cannot work, before anything is computed."""
    unknown = [method for method in config.methods if method not in RULES]
    if unknown or not config.methods:
        raise ValueError(f"methods are {config.methods}; choose some of {', '.join(RULES)}.")
    if "PPO" not in config.methods:
        raise ValueError("methods must include PPO, which the others are compared with.")
    if config.members < 2 and set(config.methods) & {"UWO", "WCO", "mean"}:
        raise ValueError(f"{config.members} member is no ensemble: give --members 2 or more, or leave out mean, WCO, UWO.")
    if config.seeds < 2:
        raise ValueError(f"{config.seeds} seed gives no error bars; give --seeds 2 or more.")
    if config.advpo_multiple < 0 or (config.advpo_value is not None and config.advpo_value < 0):
        raise ValueError("the squared radius B of AdvPO is negative; give advpo-multiple or advpo-value of at least 0.")
    if any(coefficient < 0 for coefficient in config.kl_coefficients) or not config.kl_coefficients:
        raise ValueError(f"kl-coefficients are {config.kl_coefficients}; give one or more, each at least 0.")
    if not 0 <= config.label_noise < 0.5:
        raise ValueError(f"label-noise is {config.label_noise}; give at least 0 and less than 0.5.")
    if config.updates % config.report_every:
        raise ValueError(f"report-every {config.report_every} does not divide updates {config.updates}; choose a divisor.")
    if config.policy is not None and (config.prompts is None or config.sentiment is None):
        raise ValueError("--policy needs --prompts FILE.jsonl and --sentiment FILE.jsonl as well.")
    if config.policy is None and (config.preset == "real" or config.prompts or config.sentiment):
        raise ValueError("this needs --policy FOLDER, a Hugging Face folder of a pretrained policy.")


# ------------------------------------------------------------------------------------------------ the world and the policy


class Setting(NamedTuple):
    """A world, the policy that starts in it, and the trunks that its reward models start from (members on axis 0)."""

    world: World
    policy_config: ModelConfig
    policy: Params
    reward_config: ModelConfig
    trunks: Params


def tiny_model(config: Config, layers: int, width: int) -> ModelConfig:
    """A Llama shape over the built-in vocabulary."""
    return ModelConfig(
        vocab_size=VOCABULARY.size,
        width=width,
        layers=layers,
        heads=2,
        key_value_heads=2,
        feed_forward_width=3 * width,
        context_length=32,
    )


def fine_tune(model: ModelConfig, keys: jax.Array, steps: int, seed: int) -> Params:
    """Policies trained on the built-in demonstrations, one a key, keys and parameters on axis 0."""
    batch = 128
    data = demonstrations(np.random.default_rng(seed), 40 * batch)
    algorithm = sft(model, adam(3e-3))

    def train(key: jax.Array, data: Any) -> Params:
        init_key, order_key = jax.random.split(key)
        order = epoch_orders(order_key, len(data.tokens), batch, -(-steps // 40))[:steps]
        return fit(algorithm.update, algorithm.init(init_key), data, order)[0].params

    return jax.jit(over_lanes(train))(keys, data)


def builtin_setting(config: Config, key: jax.Array) -> Setting:
    """The built-in world, a policy fine-tuned on its writers, and reward trunks fine-tuned likewise."""
    world = builtin_world(config.pairs, config.held_out, config.seed)
    policy_config = tiny_model(config, config.policy_layers, config.width)
    reward_config = tiny_model(config, config.reward_layers, config.width)
    policy_key, trunk_key = jax.random.split(key)
    policy = fine_tune(policy_config, policy_key[None], config.sft_steps, config.seed + 1)
    trunks = fine_tune(reward_config, jax.random.split(trunk_key, config.members), config.sft_steps, config.seed + 2)
    return Setting(world, policy_config, jax.tree.map(lambda leaf: leaf[0], policy), reward_config, trunks["trunk"])


def text_setting(config: Config) -> Setting:
    """A pretrained policy, prompts from a file, sentiment as gold; reward models start from the policy's trunk."""
    from rlhf_jax.data.sentiment import train_sentiment
    from rlhf_jax.models.huggingface import load_policy, load_tokenizer

    policy_config, policy = load_policy(config.policy)
    gold = train_sentiment(config.sentiment, config.seed)
    print(f"sentiment gold: accuracy {gold.accuracy:.3f} on {gold.held_out} held-out texts")
    world = text_world(
        config.prompts,
        load_tokenizer(config.policy),
        gold,
        config.response_length,
        policy_config.context_length,
        config.held_out,
    )
    trunks = jax.tree.map(lambda leaf: jnp.stack([leaf] * config.members), policy["trunk"])
    return Setting(world, policy_config, policy, policy_config, trunks)


# ------------------------------------------------------------------------------------------------------- samples and gold


def numpy_rows(prompts: Prompts, rollout: Rollout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompt tokens, response tokens and response mask on the host, as gold takes them."""
    return np.asarray(prompts.tokens), np.asarray(rollout.tokens), np.asarray(rollout.mask)


def sample(setting: Setting, sampling: SamplingConfig, prompts: Prompts, key: jax.Array, chunk: int = 2048) -> Rollout:
    """One response of the initial policy to every prompt, a chunk of prompts at a time."""
    surplus = -len(prompts.tokens) % chunk if len(prompts.tokens) > chunk else 0
    filled = take_prompts(prompts, np.arange(len(prompts.tokens) + surplus) % len(prompts.tokens))
    parts = [
        _generate(setting.policy_config, setting.policy, take_prompts(filled, slice(start, start + chunk)), key, sampling)
        for start in range(0, len(filled.tokens), chunk)
    ]
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    return jax.tree.map(lambda leaf: leaf[: len(prompts.tokens)], whole)


_generate = jax.jit(generate, static_argnames=("config", "sampling"))


def repeated(prompts: Prompts, rows: np.ndarray) -> Prompts:
    """Prompts `rows` with a fresh index each, so that repetitions of a prompt are sampled independently."""
    taken = take_prompts(prompts, rows)
    return taken.replace(index=jnp.arange(len(rows), dtype=jnp.int32))


def neural_gold(config: Config, setting: Setting, sampling: SamplingConfig, key: jax.Array):
    """A gold reward that is itself a model: larger than the proxies, trained on many noise-free labels of the rubric."""
    pair_count, model = 16 * config.pairs, tiny_model(config, 2, 2 * config.width)
    keys = jax.random.split(key, 3)
    data = compare(setting.world, setting, sampling, keys[0], pair_count, noise=0.0, seed=config.seed + 3).batch
    trunk = fine_tune(model, keys[1][None], config.sft_steps, config.seed + 4)["trunk"]
    algorithm = reward_modeling(model, adam(1e-3))
    state = algorithm.init(keys[2], {"trunk": jax.tree.map(lambda leaf: leaf[0], trunk)})
    order = epoch_orders(keys[2], pair_count, 128, 4)
    state, _ = jax.jit(functools.partial(fit, algorithm.update))(state, data, order)
    scorer = jax.jit(ensemble_scorer(model))
    stacked = EnsembleParams(members=jax.tree.map(lambda leaf: leaf[None], state.params), offset=jnp.zeros(1))

    def gold(prompts: np.ndarray, responses: np.ndarray, mask: np.ndarray, chunk: int = 4096) -> np.ndarray:
        tokens = np.concatenate([prompts, responses], axis=1)
        whole = np.concatenate([np.ones(prompts.shape, bool), mask], axis=1)
        surplus = -len(tokens) % chunk
        tokens, whole = (np.concatenate([a, np.repeat(a[-1:], surplus, axis=0)]) for a in (tokens, whole))
        parts = [
            scorer(stacked, jnp.asarray(tokens[start : start + chunk]), jnp.asarray(whole[start : start + chunk])).mean
            for start in range(0, len(tokens), chunk)
        ]
        return np.concatenate([np.asarray(part, np.float64) for part in parts])[: len(prompts)]

    return gold


# ----------------------------------------------------------------------------------------------------------- reward models


class Compared(NamedTuple):
    """Labelled pairs of the initial policy: the batch, gold of both responses [2, N], and the prompt of each pair [N]."""

    batch: PreferenceBatch
    gold: np.ndarray
    rows: np.ndarray


def compare(
    world: World, setting: Setting, sampling: SamplingConfig, key: jax.Array, count: int, noise: float, seed: int
) -> Compared:
    """Two responses to each of `count` prompts (cycling through the world's), the better one chosen, with label noise."""
    rows = np.arange(count) % len(world.prompts.tokens)
    prompts = repeated(world.prompts, np.concatenate([rows, rows]))
    rollout = sample(setting, sampling, prompts, key)
    gold = world.gold(*numpy_rows(prompts, rollout)).reshape(2, count)
    check_rewards(gold.reshape(-1), "the gold reward")
    second = comparisons(np.random.default_rng(seed), gold[0], gold[1], noise).preferred
    each = np.arange(count)
    chosen, rejected = second * count + each, (1 - second) * count + each
    sequences = rollout.sequences
    pick = lambda index: Sequences(tokens=sequences.tokens[index], mask=sequences.mask[index])  # noqa: E731
    batch = PreferenceBatch(chosen=pick(chosen), rejected=pick(rejected), margin=jnp.zeros(count))
    return Compared(batch, np.stack([gold.reshape(-1)[chosen], gold.reshape(-1)[rejected]]), rows)


class Proxies(NamedTuple):
    """The reward models of every seed (seeds on axis 0), with all that the reward rules need of them.

    Attributes:
        ensembles: member parameters [seeds, members, …] and offsets [seeds, members].
        geometry: last-layer geometry of the lead member.
        radius: b of AdvPO and sample-wise, [seeds].
        mean_uncertainty: mean U on samples of the initial policy, [seeds].
        scale: mean and standard deviation of the lead member's score on them, [seeds, 2].
        reference: lead member's Score of the chosen response to every prompt, [seeds, prompts, …].
    """

    ensembles: EnsembleParams
    geometry: Geometry
    radius: jax.Array
    mean_uncertainty: jax.Array
    scale: jax.Array
    reference: Score


def train_proxies(config: Config, setting: Setting, pools: PreferenceBatch, key: jax.Array) -> Params:
    """Reward models of all seeds and members [seeds, members, …]: each its own trunk, head and data order."""
    algorithm = reward_modeling(setting.reward_config, adam(config.reward_learning_rate), config.features)

    def train(lane: dict, trunks: Params, pools: PreferenceBatch) -> Params:
        trunk = jax.tree.map(lambda leaf: leaf[lane["member"]], trunks)
        data = jax.tree.map(lambda leaf: leaf[lane["seed"]], pools)
        init_key, order_key = jax.random.split(lane["key"])
        order = epoch_orders(order_key, config.pairs, config.reward_batch, config.reward_epochs)
        return fit(algorithm.update, algorithm.init(init_key, {"trunk": trunk}), data, order)[0].params

    seeds, members = config.seeds, config.members
    lanes = {
        "seed": jnp.repeat(jnp.arange(seeds), members),
        "member": jnp.tile(jnp.arange(members), seeds),
        "key": jax.random.split(key, seeds * members),
    }
    params = jax.jit(over_lanes(train))(lanes, setting.trunks, pools)
    return jax.tree.map(lambda leaf: leaf.reshape(seeds, members, *leaf.shape[1:]), params)


def prepare_proxies(
    config: Config, setting: Setting, members: Params, pools: PreferenceBatch, initial: Sequences
) -> Proxies:
    """Offsets, geometries, radii and reference scores of all seeds, from training responses and initial samples."""
    scorer = ensemble_scorer(setting.reward_config, config.features, lead=0)
    prompts = len(setting.world.prompts.tokens)

    def prepare(lane: tuple, initial: Sequences) -> Proxies:
        members, pool = lane
        raw = EnsembleParams(members=members, offset=jnp.zeros(config.members))
        before = scorer(raw, initial.tokens, initial.mask)
        params = EnsembleParams(members=members, offset=member_offset(before.members))
        chosen = scorer(params, pool.chosen.tokens, pool.chosen.mask)
        rejected = scorer(params, pool.rejected.tokens, pool.rejected.mask)
        total = gram(jnp.concatenate([chosen.features, rejected.features]))
        shape = geometry(total, config.regularisation)
        if config.advpo_value is not None:
            radius = radius_from(value=config.advpo_value)
        else:
            head = members["head"]["kernel"][0]
            unit = statistical_scale(
                total, chosen.features, rejected.features, head, config.regularisation, config.regularisation
            )
            radius = radius_from(multiple=config.advpo_multiple, scale=unit)
        return Proxies(
            ensembles=params,
            geometry=shape,
            radius=radius,
            mean_uncertainty=uncertainty(shape, before.features, radius).mean(),
            scale=jnp.stack([before.mean.mean() - params.offset[0], before.mean.std()]),
            reference=Score(mean=chosen.mean[:prompts], features=chosen.features[:prompts]),
        )

    return jax.jit(over_lanes(prepare))((members, pools), initial)


def score_all(config: Config, setting: Setting, ensembles: EnsembleParams, sequences: Sequences) -> np.ndarray:
    """Centred member scores of many sequences by every seed's ensemble, [seeds, members, N]."""
    scorer = ensemble_scorer(setting.reward_config, config.features)
    chunk = 2048
    chunks = jax.tree.map(
        lambda leaf: jnp.pad(leaf, ((0, -len(leaf) % chunk), (0, 0))).reshape(-1, chunk, leaf.shape[1]), sequences
    )

    def score(ensemble: EnsembleParams, chunks: Sequences) -> jax.Array:
        return jax.lax.map(lambda part: scorer(ensemble, part.tokens, part.mask).members, chunks)

    members = np.asarray(jax.jit(over_lanes(score))(ensembles, chunks))  # [seeds, chunks, members, chunk]
    flat = np.moveaxis(members, 1, 2).reshape(config.seeds, config.members, -1)
    return flat[:, :, : len(sequences.tokens)]


# -------------------------------------------------------------------------------------------------------- pushing on them


def best_of_n(config: Config, setting: Setting, sampling: SamplingConfig, proxies: Proxies, scale: Any, key: jax.Array):
    """Best-of-n curves of every ensemble rule: name -> {"n", "kl", "gold" [seeds, J], "proxy" [seeds, J]}."""
    prompts, answers = setting.world.held_out, config.best_of_n
    rows = np.repeat(np.arange(len(prompts.tokens)), answers)
    many = repeated(prompts, rows)
    rollout = sample(setting, sampling, many, key)
    gold = scale(setting.world.gold(*numpy_rows(many, rollout))).reshape(-1, answers)
    members = score_all(config, setting, proxies.ensembles, rollout.sequences)
    sizes = sorted({int(n) for n in np.geomspace(1, answers, 21).round()})
    curves = {}
    for name in ("PPO", "mean", "WCO", "UWO"):
        state = RULES[name].init(config.uwo_coefficient) if name == "UWO" else RULES[name].init()
        if name not in config.methods:
            continue
        each = [
            best_of_n_curve(
                np.asarray(
                    RULES[name].apply(Score(mean=jnp.asarray(seed[0]), members=jnp.asarray(seed)), None, state)[0]
                ).reshape(-1, answers),
                gold,
                sizes,
            )
            for seed in members
        ]
        curves["single" if name == "PPO" else name] = {
            "n": np.array(sizes),
            "kl": each[0].kl,
            "gold": np.stack([curve.gold for curve in each]),
            "proxy": np.stack([curve.proxy for curve in each]),
        }
    return curves


def lane_table(config: Config) -> list[dict[str, Any]]:
    """Every run of the study: method, KL coefficient and seed."""
    return [
        {"method": method, "kl_coefficient": coefficient, "seed": seed}
        for method in config.methods
        for coefficient in config.kl_coefficients
        for seed in range(config.seeds)
    ]


def train_policies(
    config: Config, setting: Setting, sampling: SamplingConfig, proxies: Proxies, key: jax.Array, metrics: MetricsWriter
) -> tuple[dict[str, np.ndarray], Params, float]:
    """PPO on every lane at once, `report_every` updates a call.

    Returns:
        The history by name [lanes, updates, …], the trained policies [lanes, …], and the seconds of compilation.
    """
    table = lane_table(config)
    algorithm = ppo(
        setting.policy_config,
        PPOConfig(sampling=sampling, epochs=config.epochs, minibatches=config.minibatches),
        adam(config.learning_rate),
    )
    names = list(RULES)
    transform = select(list(RULES.values()))
    step = compose(algorithm, ensemble_scorer(setting.reward_config, config.features, lead=0), transform)
    prompts, batch = setting.world.prompts, config.rollouts

    def start(lane: dict, policy: Params, proxies: Proxies) -> ComposedState:
        own = jax.tree.map(lambda leaf: leaf[lane["seed"]], proxies)
        state = algorithm.init(jax.random.fold_in(key, lane["seed"]), {"policy": policy})
        states = ((), (), (), RULES["UWO"].init(config.uwo_coefficient), RULES["AdvPO"].init(own.geometry, own.radius))
        states = (*states, RULES["sample-wise"].init(own.geometry, own.radius, own.mean_uncertainty))
        rule = select(list(RULES.values())).init(lane["method"], states)
        return ComposedState(algorithm=state.replace(kl_coefficient=lane["kl_coefficient"]), transform=rule)

    def advance(carry: tuple[dict, ComposedState], prompts: Prompts, proxies: Proxies):
        """`report_every` updates of one lane."""
        lane, state = carry
        own = jax.tree.map(lambda leaf: leaf[lane["seed"]], proxies)

        def update(state: ComposedState, _: None):
            # Prompts depend on seed and update alone: methods are compared on the same ones.
            count = state.algorithm.step
            prompt_key = jax.random.fold_in(jax.random.fold_in(key, 1_000_000 + lane["seed"]), count)
            rows = jax.random.randint(prompt_key, (batch,), 0, len(prompts.tokens))
            taken = Prompts(
                tokens=prompts.tokens[rows], mask=prompts.mask[rows], index=count * batch + jnp.arange(batch)
            )
            reference = jax.tree.map(lambda leaf: leaf[rows], own.reference)
            state, out = step(state, taken, own.ensembles, reference)
            kept = {
                "rows": rows,
                "tokens": out.rollout.tokens,
                "mask": out.rollout.mask,
                "proxy": (out.score.mean - own.scale[0]) / own.scale[1],
                "spread": out.score.members.std(axis=0) / own.scale[1],
                "uncertainty": uncertainty(own.geometry, out.score.features, own.radius) / own.scale[1],
                "metrics": out.metrics,
            }
            return state, kept

        return jax.lax.scan(update, state, None, length=config.report_every)

    lanes = {
        "method": jnp.array([names.index(lane["method"]) for lane in table]),
        "kl_coefficient": jnp.array([lane["kl_coefficient"] for lane in table], jnp.float32),
        "seed": jnp.array([lane["seed"] for lane in table]),
    }
    began = time.monotonic()
    states = jax.jit(over_lanes(start))(lanes, setting.policy, proxies)
    program = jax.jit(over_lanes(advance), donate_argnums=0).lower((lanes, states), prompts, proxies).compile()
    compile_seconds = time.monotonic() - began
    history = []
    with ProgressReport(f"PPO on {len(table)} lanes", config.updates) as progress:
        for call in range(config.updates // config.report_every):
            states, kept = program((lanes, states), prompts, proxies)
            kept = jax.device_get(kept)
            history.append(kept)
            for place, lane in enumerate(table):
                means = {name: values[place].mean() for name, values in kept["metrics"].items()}
                metrics.write((call + 1) * config.report_every, lane | means)
            check_rewards(kept["proxy"].reshape(len(table), -1), "a proxy reward model")
            plain = {name: values[: config.seeds].mean() for name, values in kept["metrics"].items()}
            progress.advance(
                {"KL of PPO": plain["objective/kl"], "its proxy": plain["rewards/proxy"]}, config.report_every
            )
    whole = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *history)
    return whole, states.algorithm.params["policy"], compile_seconds


# ---------------------------------------------------------------------------------------------------------------- analysis


def curves_of(config: Config, world: World, scale: Any, history: dict[str, np.ndarray]) -> tuple[Study, np.ndarray]:
    """Runs by rule and KL coefficient, and the gold of every stored response [lanes, updates, B]."""
    prompts = np.asarray(world.prompts.tokens)[history["rows"]]
    shape = history["rows"].shape
    flat = lambda array: array.reshape(-1, array.shape[-1])  # noqa: E731
    gold = scale(world.gold(flat(prompts), flat(history["tokens"]), flat(history["mask"]))).reshape(shape)
    gap = np.abs(history["proxy"] - gold)
    study = {}
    for place, lane in enumerate(lane_table(config)[:: config.seeds]):
        rows = slice(place * config.seeds, (place + 1) * config.seeds)
        mean = lambda array, rows=rows: np.asarray(array[rows], np.float64).mean(axis=-1)  # noqa: E731
        pairs = zip(history["uncertainty"][rows], gap[rows], strict=True)
        study[lane["method"], lane["kl_coefficient"]] = Runs(
            kl=np.asarray(history["metrics"]["objective/kl"][rows], np.float64),
            gold=mean(gold),
            proxy=mean(history["proxy"]),
            uncertainty=mean(history["uncertainty"]),
            spread=mean(history["spread"]),
            gap=mean(gap),
            length=mean(history["mask"].sum(axis=-1)),
            sample_correlation=np.array([pearson(u.reshape(-1).astype(float), g.reshape(-1)) for u, g in pairs]),
        )
    return study, gold


def write_samples(config: Config, world: World, history: dict, gold: np.ndarray, path: Path, count: int = 8) -> str:
    """`samples.md`: what plain PPO wrote at first, its best samples, and its hackiest at the end; returns the text."""
    updates = config.updates
    seeds = slice(0, config.seeds)  # the first lanes are plain PPO at the first KL coefficient
    last = np.s_[seeds, updates - max(1, updates // 10) :]

    def table(title: str, chosen: list[tuple[int, int, int]]) -> str:
        lines = [f"## {title}", "", "| gold | proxy | prompt | response |", "|---:|---:|---|---|"]
        place = tuple(np.array(chosen).T)
        rows = history["rows"][place]
        texts = world.read(
            np.asarray(world.prompts.tokens)[rows],
            np.asarray(world.prompts.mask)[rows],
            history["tokens"][place],
            history["mask"][place],
        )
        for where, (prompt, response) in zip(chosen, texts, strict=True):
            cells = (prompt.strip(), response.strip())
            prompt, response = (" ".join(cell.split()).replace("|", "/") for cell in cells)
            lines.append(f"| {gold[where]:+.2f} | {history['proxy'][where]:+.2f} | {prompt} | {response} |")
        return "\n".join(lines)

    def top(value: np.ndarray, area: Any) -> list[tuple[int, int, int]]:
        """The places of the largest values in an area of the history, no text twice."""
        places = np.stack(np.meshgrid(*(np.arange(size) for size in value.shape), indexing="ij"), -1)[area].reshape(-1, 3)
        seen, chosen = set(), []
        for each in places[np.argsort(-value[area].reshape(-1), kind="stable")]:
            text = history["tokens"][tuple(each)].tobytes()
            if text not in seen:
                chosen.append(tuple(int(part) for part in each))
                seen.add(text)
            if len(chosen) == count:
                break
        return chosen

    first = [(0, 0, response) for response in range(min(count, config.rollouts))]
    text = "\n\n".join(
        [
            "# Samples of plain PPO (gold and proxy in standard deviations of the initial policy's)",
            table("Before training", first),
            table("Best by gold, at any time", top(gold, np.s_[seeds, :])),
            table("Hackiest at the end: largest proxy minus gold", top(history["proxy"] - gold, last)),
        ]
    )
    path.write_text(text + "\n", encoding="utf-8")
    return text


def main(config: Config) -> dict:
    """Runs the study and returns its summary."""
    began = time.monotonic()
    check_config(config)
    key = jax.random.key(config.seed)
    keys = dict(zip(("world", "compare", "proxies", "initial", "best", "ppo", "gold"), jax.random.split(key, 7), strict=True))
    if config.policy is None:
        setting_of = functools.partial(builtin_setting, config, keys["world"])
    else:
        setting_of = functools.partial(text_setting, config)
        setting_of = functools.partial(lambda setting: setting, setting_of())  # bad files fail before a folder is made
    folder = run_folder.create(config.out, "overoptimization", config, config.overwrite)
    figures = folder.path / "figures"
    figures.mkdir()
    print(f"writing to {folder.path}")

    def stage(name: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {name}", flush=True)

    stage("fine-tuning the policy and the reward trunks" if config.policy is None else "loading the policy")
    setting = setting_of()
    world = setting.world
    sampling = SamplingConfig(
        max_new_tokens=world.response_length, stop_tokens=world.stop_tokens, pad_token=world.pad_token
    )
    if config.gold == "neural":
        stage("training the neural gold reward")
        world = world._replace(gold=neural_gold(config, setting, sampling, keys["gold"]))
        setting = setting._replace(world=world)

    stage("sampling and labelling comparisons")
    initial_prompts = repeated(world.prompts, np.arange(1024) % len(world.prompts.tokens))
    initial = sample(setting, sampling, initial_prompts, keys["initial"])
    initial_gold = world.gold(*numpy_rows(initial_prompts, initial))
    check_rewards(initial_gold, "the gold reward")
    middle, spread = initial_gold.mean(), initial_gold.std()
    if spread == 0:
        raise ValueError("the gold reward is the same for all samples of the initial policy; nothing can be learned from it.")
    scale = lambda gold: (gold - middle) / spread  # noqa: E731
    compare_keys = jax.random.split(keys["compare"], config.seeds + 1)
    pools = [
        compare(world, setting, sampling, compare_keys[seed], config.pairs, config.label_noise, config.seed + 10 + seed)
        for seed in range(config.seeds)
    ]
    pool = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[each.batch for each in pools])
    clean = compare(world, setting, sampling, compare_keys[-1], 1000, 0.0, config.seed + 9)

    stage(f"training {config.seeds} x {config.members} reward models on {config.pairs} comparisons each")
    members = train_proxies(config, setting, pool, keys["proxies"])
    proxies = prepare_proxies(config, setting, members, pool, initial.sequences)
    sides = [score_all(config, setting, proxies.ensembles, side) for side in (clean.batch.chosen, clean.batch.rejected)]
    right = lambda chosen, rejected: ((chosen > rejected) + 0.5 * (chosen == rejected)).mean(axis=-1)  # noqa: E731
    accuracy, ensemble_accuracy = right(*sides), right(*(side.mean(axis=1) for side in sides))
    checkpoints.save(folder.path / "checkpoints" / "initial_policy", setting.policy)
    checkpoints.save(folder.path / "checkpoints" / "reward_models", proxies.ensembles)

    curves: dict = {}
    if config.best_of_n:
        stage(f"best of {config.best_of_n:,} on {config.held_out} held-out prompts")
        curves = best_of_n(config, setting, sampling, proxies, scale, keys["best"])

    stage(f"PPO: {len(config.methods)} reward rules x {len(config.kl_coefficients)} KL coefficients x {config.seeds} seeds")
    with MetricsWriter(folder.path / "metrics.jsonl") as metrics:
        history, policies, compile_seconds = train_policies(config, setting, sampling, proxies, keys["ppo"], metrics)
    checkpoints.save(folder.path / "checkpoints" / "policies", policies)

    stage("scoring the stored generations with the gold reward")
    study, gold = curves_of(config, world, scale, history)
    np.savez_compressed(folder.path / "history.npz", gold=gold, proxy=history["proxy"], kl=history["metrics"]["objective/kl"])
    print(write_samples(config, world, history, gold, folder.path / "samples.md"))
    rows, fall = report(study, curves, config.report_every, figures, config.seed)
    rows = [
        row("reward model: accuracy on clean labels", "", accuracy.mean(axis=1)),
        row("ensemble: accuracy on clean labels", "", ensemble_accuracy),
        row("initial policy: mean length", "tokens", np.asarray(initial.mask.sum(axis=-1), np.float64)),
        *rows,
    ]
    gap = float(history["metrics"]["policy/max_logprob_gap"].max())
    ratio = history["metrics"]["val/first_ratio"]
    checks = [
        run_folder.check("plain PPO's gold falls from its peak, in standard errors", fall.held_out_in_standard_errors, 2.0, "at least"),
        run_folder.check("largest |log-prob at rollout - in the first minibatch|", gap, 1e-4, "at most"),
        run_folder.check("first-minibatch ratio farthest from 1", float(ratio.flat[np.abs(ratio - 1).argmax()]), 1.0, 1e-4),
    ]
    result = run_folder.summary(folder, rows, checks, time.monotonic() - began, compile_seconds)
    run_folder.write_summary(folder, result)
    run_folder.print_summary(result)
    print(f"figures: {', '.join(sorted(path.name for path in figures.glob('*.png')))} in {figures}")
    return result


if __name__ == "__main__":
    use_all_cores()
    run(main, PRESETS, __doc__)
