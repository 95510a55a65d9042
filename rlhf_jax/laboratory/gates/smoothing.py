"""Iterative Data Smoothing on the built-in world: validation loss by epoch, and the gold of what is made with it.

The claim (Zhu, Jordan and Jiao, arXiv:2401.16335): trained for several epochs, a reward model overfits from the second
on, and one whose labels are smoothed does not; policies made with the latter have more gold.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.algorithms.fit import epoch_orders, fit
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.reward_modeling import preference_scores, reward_modeling
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.laboratory.comparison import Reward, modelled
from rlhf_jax.laboratory.gates.gate import PRECONDITION, Gate
from rlhf_jax.laboratory.gates.report import Stage
from rlhf_jax.laboratory.gates.world import Ground, score_answers, train_ppo
from rlhf_jax.laboratory.proxies import prepare
from rlhf_jax.losses.reward import bradley_terry, preference_accuracy
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.types import Params, PreferenceBatch

SOURCE = "Iterative Data Smoothing, 2401.16335"


class Epochs(NamedTuple):
    """Reward models of every seed, and how they did after each epoch.

    Attributes:
        params: [seeds, …].
        loss: on held-out comparisons, nats, [seeds, epochs].
        accuracy: the same, [seeds, epochs].
    """

    params: Params
    loss: Float[Array, "seeds epochs"]
    accuracy: Float[Array, "seeds epochs"]


def train_by_epoch(ground: Ground, rate: float | None) -> Epochs:
    """A reward model a seed on the lead trunk, validated after each of `reward_epochs` epochs.

    Args:
        ground: its comparisons.
        rate: of the smoothing; None: plain Bradley-Terry.
    """
    options, config = ground.options, ground.setting.reward_config
    algorithm = reward_modeling(
        config, adam(options.reward_learning_rate), options.features, smoothing_rate=rate, examples=options.pairs
    )

    def train(lane: dict, trunks: Params, validation: PreferenceBatch) -> Epochs:
        init_key, order_key = jax.random.split(lane["key"])
        order = epoch_orders(order_key, options.pairs, options.reward_batch, options.reward_epochs)
        order = order.reshape(options.reward_epochs, -1, options.reward_batch)
        trunk = jax.tree.map(lambda leaf: leaf[0], trunks)

        def epoch(state, rows):
            state, _ = fit(algorithm.update, state, lane["pool"], rows)
            found = preference_scores(config, state.params, validation, options.features)
            return state, (bradley_terry(*found).mean(), preference_accuracy(*found).mean())

        state, (loss, accuracy) = jax.lax.scan(epoch, algorithm.init(init_key, {"trunk": trunk}), order)
        return Epochs(state.params, loss, accuracy)

    lanes = {"key": jax.random.split(ground.key, options.seeds), "pool": ground.pools}
    return jax.device_get(jax.jit(over_lanes(train))(lanes, ground.setting.trunks, ground.validation))


def scores_of(ground: Ground, params: Params) -> Float[np.ndarray, "seeds N"]:
    """Scores of the answers by the reward model of every seed."""
    return score_answers(ground, one_member(params))[:, 0]


def one_member(params: Params) -> Params:
    """Reward models [seeds, …] as ensembles of one, [seeds, 1, …]."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[:, None], params)


def smoothing(ground: Ground, rate: float, policies: bool) -> Stage:
    """Plain Bradley-Terry beside smoothing, on the same comparisons in the same order.

    Args:
        ground: of the built-in world; its options have several epochs.
        rate: of the smoothing, once an epoch.
        policies: whether PPO runs on both.
    """
    both = {"Bradley-Terry": train_by_epoch(ground, None), "smoothing": train_by_epoch(ground, rate)}
    plain, smooth = both.values()
    epochs, answers = ground.options.reward_epochs, ground.options.best_of_n
    picked = {name: ground.picked(scores_of(ground, one.params)) for name, one in both.items()}
    rise = {name: one.loss[:, -1] - one.loss[:, 0] for name, one in both.items()}
    risen = f"validation loss after epoch {epochs} less epoch 1"
    compared = "smoothing less Bradley-Terry"
    gates = [
        Gate("best validation accuracy of an epoch, Bradley-Terry", PRECONDITION, plain.accuracy.max(axis=1), low=0.55),
        Gate(f"{risen}, Bradley-Terry", SOURCE, rise["Bradley-Terry"], low=0.0, unit="nats"),
        Gate(f"{risen}, smoothing", SOURCE, rise["smoothing"], high=0.0, unit="nats"),
        Gate(
            f"validation loss after epoch {epochs}: {compared}",
            SOURCE,
            smooth.loss[:, -1] - plain.loss[:, -1],
            high=0.0,
            unit="nats",
        ),
        Gate(
            f"gold of best-of-{answers}: {compared}",
            SOURCE,
            picked["smoothing"] - picked["Bradley-Terry"],
            low=0.0,
            unit="s.d.",
        ),
    ]
    rows = []
    for name, one in both.items():
        rows += [row(f"validation loss after epoch {e + 1}, {name}", "nats", one.loss[:, e]) for e in range(epochs)]
        rows += [
            row(f"validation accuracy after epoch {e + 1}, {name}", "1", one.accuracy[:, e]) for e in (0, epochs - 1)
        ]
        rows.append(row(f"gold of best-of-{answers}, {name}", "s.d.", picked[name]))
    if policies:
        trained = {name: train_ppo(ground, proxies_of(ground, one.params)) for name, one in both.items()}
        final = {name: one.curves.gold[:, -1] for name, one in trained.items()}
        gates.append(
            Gate(
                f"final gold of PPO: {compared}",
                SOURCE,
                final["smoothing"] - final["Bradley-Terry"],
                low=0.0,
                unit="s.d.",
            )
        )
        for name, one in trained.items():
            rows += [
                row(f"final gold of PPO, {name}", "s.d.", final[name]),
                row(f"final KL of PPO, {name}", "nats", one.curves.kl[:, -1]),
            ]
    return Stage(gates, rows)


def proxies_of(ground: Ground, params: Params) -> Reward:
    """The reward models of all seeds as what PPO is rewarded with."""
    options = dataclasses.replace(ground.options, members=1)
    proxies = prepare(options, ground.setting, one_member(params), ground.pools, ground.answers)
    return modelled(options, ground.setting, proxies, "PPO")
