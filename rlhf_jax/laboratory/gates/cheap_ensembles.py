"""Ensembles for the price of one reward model, on the built-in world: do members disagree, and does it pay?

The claims (Zhang et al., "Improving Reinforcement Learning from Human Feedback with Efficient Reward Model Ensemble",
arXiv:2401.16635): best-of-n by an ensemble of LoRA adapters has at least the gold of one by linear heads, and that at
least the gold of one reward model; members agree most where they share a trunk, less where each has an adapter, and
least where each has a trunk.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.algorithms.ensemble_modeling import (
    linear_ensemble_modeling,
    linear_ensemble_params,
    lora_ensemble_modeling,
    lora_ensemble_params,
)
from rlhf_jax.algorithms.fit import epoch_orders, fit
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.evaluation.statistics import pearson, row
from rlhf_jax.laboratory.gates.gate import PRECONDITION, Gate
from rlhf_jax.laboratory.gates.report import Stage
from rlhf_jax.laboratory.gates.world import Ground, score_answers
from rlhf_jax.laboratory.proxies import train_members
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.rewards.linear_ensemble import linear_ensemble_scorer
from rlhf_jax.rewards.lora_ensemble import lora_ensemble_scorer
from rlhf_jax.types import Params

SOURCE = "Efficient ensembles, 2401.16635"
ADAPTER = AdapterConfig(kind="lora", rank=4, targets=("query", "key", "value", "output", "gate", "up", "down"))
LORA_PACE = 3.0
"""Learning rate of the adapters, as a multiple of that of whole reward models."""


def cheap_members(ground: Ground) -> dict[str, Float[np.ndarray, "seeds members N"]]:
    """Scores of the answers by the members of both cheap ensembles of every seed.

    Both see every comparison `reward_epochs` times. Linear heads and their trunk are trained on all of them; for the
    adapters, trunk and heads are trained on the first half, and adapters and heads on the second.
    """
    options, config = ground.options, ground.setting.reward_config
    rate, members, features = options.reward_learning_rate, options.members, options.features
    linear = linear_ensemble_modeling(config, adam(rate), members, features)
    lora = lora_ensemble_modeling(config, adam(LORA_PACE * rate), ADAPTER, members, features)
    half = options.pairs // 2

    def train(lane: dict, trunks: Params, answers: Any) -> dict[str, Array]:
        keys = jax.random.split(lane["key"], 5)
        trunk = jax.tree.map(lambda leaf: leaf[0], trunks)
        first = jax.tree.map(lambda leaf: leaf[:half], lane["pool"])
        second = jax.tree.map(lambda leaf: leaf[half:], lane["pool"])

        def order(key: Array, pairs: int) -> Array:
            return epoch_orders(key, pairs, min(options.reward_batch, pairs), options.reward_epochs)

        whole = linear.init(keys[0], {"trunk": trunk})
        whole, _ = fit(linear.update, whole, lane["pool"], order(keys[1], options.pairs))
        base, _ = fit(linear.update, linear.init(keys[0], {"trunk": trunk}), first, order(keys[2], half))
        start = lora.init(keys[3], base.params)
        adapted, _ = fit(lora.update, start, second, order(keys[4], options.pairs - half))

        def score(scorer: Any, params: Any) -> Array:
            found = jax.lax.map(lambda one: scorer(params, one.tokens, one.mask).members, answers)
            return found.transpose(1, 0, 2).reshape(members, -1)

        return {
            "linear": score(linear_ensemble_scorer(config, features), linear_ensemble_params(whole)),
            "LoRA": score(lora_ensemble_scorer(config, ADAPTER, features), lora_ensemble_params(adapted)),
        }

    lanes = {"key": jax.random.split(ground.key, options.seeds), "pool": ground.pools}
    prompts = len(ground.gold)
    by_prompt = jax.tree.map(lambda leaf: leaf.reshape(prompts, -1, leaf.shape[1]), ground.answers)
    return jax.device_get(jax.jit(over_lanes(train))(lanes, ground.setting.trunks, by_prompt))


def whole_members(ground: Ground) -> Float[np.ndarray, "seeds members N"]:
    """Scores of the answers by independent reward models of every seed, each from a trunk of its own."""
    options = ground.options
    key = jax.random.fold_in(ground.key, 1)
    params = train_members(options, ground.setting, ground.pools, key)
    return score_answers(ground, params)


def agreement(members: Float[np.ndarray, "seeds members N"], prompts: int) -> Float[np.ndarray, " seeds"]:
    """Mean Pearson correlation of two members over the answers to one prompt, averaged over prompts and pairs.

    Args:
        members: scores.
        prompts: number of prompts; their answers stand together.
    """
    by_prompt = np.asarray(members, np.float64).reshape(*members.shape[:2], prompts, -1)
    pairs = [(a, b) for a in range(members.shape[1]) for b in range(a)]
    return np.array(
        [np.nanmean([pearson(one[a, p], one[b, p]) for a, b in pairs for p in range(prompts)]) for one in by_prompt]
    )


def cheap_ensembles(ground: Ground) -> Stage:
    """Gold of best-of-n by the mean of each ensemble and by one reward model, and how far members agree."""
    members = cheap_members(ground) | {"independent": whole_members(ground)}
    prompts, answers = len(ground.gold), ground.options.best_of_n
    gold = {name: ground.picked(scores.mean(axis=1)) for name, scores in members.items()}
    gold["single"] = ground.picked(members["independent"][:, 0])
    agree = {name: agreement(scores, prompts) for name, scores in members.items()}
    gates = [Gate(f"gold of best-of-{answers}, single", PRECONDITION, gold["single"], low=0.1, unit="s.d.")]
    gates += [
        Gate(f"gold of best-of-{answers}: {a} less {b}", SOURCE, gold[a] - gold[b], low=0.0, unit="s.d.")
        for a, b in (("LoRA", "linear"), ("linear", "single"), ("LoRA", "single"), ("independent", "single"))
    ]
    gates += [
        Gate(f"correlation of members: {a} less {b}", SOURCE, agree[a] - agree[b], low=0.0)
        for a, b in (("linear", "LoRA"), ("LoRA", "independent"))
    ]
    rows = [
        row(f"gold of best-of-{answers}, {name}", "s.d.", values) for name, values in gold.items() if name != "single"
    ]
    rows += [row(f"correlation of members, {name}", "1", values) for name, values in agree.items()]
    return Stage(gates, rows)
