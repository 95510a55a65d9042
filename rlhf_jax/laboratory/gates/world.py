"""What the gates on the built-in world share: its comparisons, its answers to pick from, and PPO on any scorer.

Seeds share the world and its initial policy; comparisons, label noise, reward models and PPO are a seed's own.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.frontier import Curves
from rlhf_jax.laboratory.arms import Plan
from rlhf_jax.laboratory.comparison import Contest, Reward, Schedule, curves_of, first_measurement, run_arm
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.proxies import compare, score_members
from rlhf_jax.laboratory.setting import Setting, builtin_setting, gold_of, repeated, sample
from rlhf_jax.rewards.bradley_terry import EnsembleParams
from rlhf_jax.sampling.best_of_n import best_of_n_curve
from rlhf_jax.types import Params, PreferenceBatch, Sequences

VALIDATION = 512
"""Held-out comparisons, with the same label noise as those for training."""


@dataclasses.dataclass(frozen=True)
class Ground:
    """The built-in world with all that gates measure on.

    Attributes:
        options: sizes.
        setting: world, initial policy and trunks.
        pools: noisy comparisons of every seed with the index of each pair, [seeds, pairs, …].
        validation: others on held-out prompts, [VALIDATION, …].
        answers: of the initial policy to held-out prompts, `options.best_of_n` to each, [prompts · answers, S].
        lengths: tokens of each answer, stop token included, float64 [prompts, answers].
        gold: gold reward of each answer, mean 0 and standard deviation 1 over all, float64 [prompts, answers].
        centre: mean gold reward of the answers.
        spread: its standard deviation.
        key: for what is trained.
    """

    options: Options
    setting: Setting
    pools: PreferenceBatch
    validation: PreferenceBatch
    answers: Sequences
    lengths: Float[np.ndarray, "P N"]
    gold: Float[np.ndarray, "P N"]
    centre: float
    spread: float
    key: jax.Array

    def scale(self, gold: np.ndarray) -> np.ndarray:
        """Gold rewards in units of the initial policy's answers."""
        return (gold - self.centre) / self.spread

    def picked(self, scores: Float[np.ndarray, "seeds N"]) -> Float[np.ndarray, " seeds"]:
        """Mean gold of the best of all answers to each prompt, by every seed's scores; 0 is a random answer."""
        count = self.options.best_of_n
        each = (one.reshape(self.gold.shape) for one in np.asarray(scores, np.float64))
        return np.array([best_of_n_curve(one, self.gold, [count]).gold[0] for one in each])


class Answered(NamedTuple):
    """Answers of the initial policy with their gold reward in units of the world."""

    sequences: Sequences
    lengths: np.ndarray
    gold: np.ndarray


@functools.lru_cache(maxsize=2)
def setting_of(options: Options) -> Setting:
    """The built-in setting; kept, as several gates share it."""
    return builtin_setting(options, jax.random.key(options.seed))


def answer(setting: Setting, answers: int, key: jax.Array) -> Answered:
    """Answers of the initial policy to every held-out prompt, `answers` each."""
    prompts = setting.world.held_out
    taken = sample(setting, repeated(prompts, np.repeat(np.arange(len(prompts.tokens)), answers)), key)
    shape = (len(prompts.tokens), answers)
    lengths = np.asarray(taken.mask.sum(axis=1), np.float64)
    return Answered(taken.sequences, lengths.reshape(shape), gold_of(setting.world, taken).reshape(shape))


def make_ground(options: Options, setting: Setting | None = None) -> Ground:
    """Comparisons, answers and their gold.

    Args:
        options: sizes; `best_of_n` is the number of answers to a prompt.
        setting: another than the built-in one (with another gold reward, say).
    """
    setting = setting_of(options) if setting is None else setting
    pairs_key, validation_key, answers_key, key = jax.random.split(jax.random.key(options.seed + 1), 4)
    *rngs, last = np.random.default_rng(options.seed).spawn(options.seeds + 1)
    keys = jax.random.split(pairs_key, options.seeds)
    pools = [
        compare(setting, own, options.pairs, options.label_noise, rng) for own, rng in zip(keys, rngs, strict=True)
    ]
    index = jnp.arange(options.pairs, dtype=jnp.int32)
    pools = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[pool.replace(index=index) for pool in pools])
    held_out = setting._replace(world=setting.world._replace(prompts=setting.world.held_out))
    found = answer(setting, options.best_of_n, answers_key)
    centre, spread = float(found.gold.mean()), float(found.gold.std())
    return Ground(
        options=options,
        setting=setting,
        pools=pools,
        validation=compare(held_out, validation_key, VALIDATION, options.label_noise, last),
        answers=found.sequences,
        lengths=found.lengths,
        gold=(found.gold - centre) / spread,
        centre=centre,
        spread=spread,
        key=key,
    )


def score_answers(ground: Ground, members: Params) -> Float[np.ndarray, "seeds M N"]:
    """Scores of the answers by the reward models of every seed.

    Args:
        ground: whose answers.
        members: trees `{"trunk", "head"}`, [seeds, M, …].
    """
    count = members["head"]["bias"].shape[1]
    ensembles = jax.vmap(lambda one: EnsembleParams(members=one, offset=jnp.zeros(count)))(members)
    return score_members(ground.options, ground.setting, ensembles, ground.answers)


class Trained(NamedTuple):
    """PPO's policies on held-out prompts, by report, the initial one first: [seeds, reports + 1]."""

    curves: Curves
    lengths: Float[np.ndarray, "seeds reports"]


def train_ppo(ground: Ground, reward: Reward, kl_coefficient: float = 0.0) -> Trained:
    """PPO of every seed on a reward; gold in units of `Ground.scale`.

    Args:
        ground: whose options say how long; `held_out` prompts are measured with 4 responses each.
        reward: of all seeds.
        kl_coefficient: of the KL from the initial policy in the reward.
    """
    options, setting = ground.options, ground.setting
    plan = Plan(
        model=setting.policy_config,
        value=setting.reward_config,
        sampling=setting.sampling,
        responses=options.rollouts,
        learning_rate=options.learning_rate,
        samples=2,
        kl_coefficient=kl_coefficient,
        epochs=options.epochs,
        minibatches=options.minibatches,
    )
    schedule = Schedule(options.seeds, options.updates, options.report_every, measured=4)
    contest = Contest(plan=plan, setting=setting, reward=reward, schedule=schedule, key=ground.key)
    history = run_arm("ppo", contest, first_measurement(contest))
    lengths = history["mask"].sum(axis=-1).mean(axis=-1)
    return Trained(curves_of(history, contest, ground.scale), lengths.astype(np.float64))
