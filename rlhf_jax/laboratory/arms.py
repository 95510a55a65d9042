"""The algorithms that a comparison sets against each other, by name, each with its customary options.

An algorithm that learns from data someone else collected gets them from the initial policy, as many responses an update
as the others draw: see `on_initial_samples`.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.algorithms.imitation import IMITATION, ImitationConfig, imitation
from rlhf_jax.algorithms.kto import kto
from rlhf_jax.algorithms.methods import METHODS
from rlhf_jax.algorithms.on_policy import rollout_key
from rlhf_jax.algorithms.online_preference import ONLINE, online, online_preference
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig, policy_gradient
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.preference import preference
from rlhf_jax.algorithms.sft import sft
from rlhf_jax.losses.kl import KLController, fixed_kl
from rlhf_jax.losses.policy import reinforce_surrogate
from rlhf_jax.losses.preference_choices import PREFERENCE_LOSSES, preference_loss
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import (
    Algorithm,
    Demonstrations,
    Metrics,
    Params,
    PreferenceBatch,
    Prompts,
    Rollout,
    Sequences,
    UnpairedBatch,
)

FAMILIES = ("PPO and REINFORCE", "GRPO and kin", "online preferences", "imitation", "offline")

ONE_STEP = 2.0
"""The pace of algorithms that take one optimiser step an update, where others take epochs x minibatches (by default 4):
the square root of that, as is usual for Adam. Beyond that no algorithm's learning rate is tuned on its own."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all algorithms of a comparison share.

    Attributes:
        model: shape of the policy.
        value: shape of PPO's value net.
        sampling: how responses are drawn.
        responses: drawn an update, by every algorithm.
        samples: K, responses a prompt where a prompt has several; algorithms that compare two have two.
        learning_rate: multiplied by the `Arm.pace` of each algorithm.
        epochs: passes over a rollout, where an algorithm corrects for steps away from the policy that sampled.
        minibatches: optimiser steps a pass, likewise.
        kl_coefficient: of the KL from the initial policy, where an algorithm takes one in reward or loss.
        beta: how strongly preference losses hold the policy to the initial one.

    Raises:
        ValueError: an option is out of range, or responses do not split into prompts and minibatches.
    """

    model: ModelConfig
    value: ModelConfig
    sampling: SamplingConfig
    responses: int = 64
    samples: int = 8
    learning_rate: float = 1e-3
    epochs: int = 2
    minibatches: int = 2
    kl_coefficient: float = 0.0
    beta: float = 0.1

    def __post_init__(self):
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}: give 2 or more, for responses to a prompt are compared.")
        if min(self.epochs, self.minibatches, self.responses) < 1:
            raise ValueError("give at least 1 epoch, 1 minibatch and 1 response.")
        if self.responses % (self.samples * self.minibatches):
            raise ValueError(
                f"{self.responses} responses are no multiple of {self.samples} samples x {self.minibatches} "
                "minibatches; choose one, so that every algorithm can split them."
            )
        if self.kl_coefficient < 0 or self.learning_rate <= 0 or self.beta <= 0:
            raise ValueError(
                f"kl-coefficient is {self.kl_coefficient}, learning-rate {self.learning_rate} and beta {self.beta}; "
                "give at least 0, and more than 0 for the other two."
            )

    @property
    def kl(self) -> KLController | None:
        """Controller of the KL; None without one."""
        return fixed_kl(self.kl_coefficient) if self.kl_coefficient else None


class Arm(NamedTuple):
    """An algorithm of a comparison.

    Attributes:
        family: one of `FAMILIES`.
        build: `build(plan, learning rate) -> Algorithm`, with a rollout.
        rows: `rows(plan)`, how many responses to a prompt its rollout has.
        policy: `policy(state)`, the parameters of the policy in its state.
        pace: its learning rate, as a multiple of the plan's.
        own_samples: whether it learns from responses of the policy that it trains, so that the ratio of the two is 1 at
            first.
    """

    family: str
    build: Callable[[Plan, float], Algorithm]
    rows: Callable[[Plan], int]
    policy: Callable[[Any], Params] = operator.attrgetter("params")
    pace: float = 1.0
    own_samples: bool = True


def build(name: str, plan: Plan) -> Algorithm:
    """The algorithm of an arm."""
    return ARMS[name].build(plan, plan.learning_rate * ARMS[name].pace)


def check_arms(names: tuple[str, ...], plan: Plan) -> None:
    """Refuses arms that do not exist or do not fit the plan, before anything is computed.

    Raises:
        ValueError: with the list of those that there are, with the arithmetic, or as the algorithm has it.
    """
    unknown = [name for name in names if name not in ARMS]
    if unknown or not names:
        what = f"there is no algorithm {unknown[0]!r}" if unknown else "no algorithm was named"
        raise ValueError(f"{what}; choose some of {', '.join(ARMS)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"algorithms are {', '.join(names)}: name each once.")
    for name in names:
        rows = ARMS[name].rows(plan)
        if plan.responses % rows:
            raise ValueError(
                f"{name} draws {rows} responses a prompt, which do not divide the {plan.responses} of an update; "
                "choose other samples or responses."
            )
        build(name, plan)


@chex.dataclass(frozen=True)
class CollectingState:
    """The state of `on_initial_samples`.

    Attributes:
        learner: the offline algorithm's state.
        source: the initial policy, which responses are drawn from.
        key: a typed key, never used twice.
        step: number of rollouts so far, int32.
    """

    learner: Any
    source: Params
    key: Array
    step: Int[Array, ""]


def on_initial_samples(
    plan: Plan, learner: Algorithm, samples: int, batch_of: Callable[[Rollout, Float[Array, " B"]], Any]
) -> Algorithm:
    """An offline algorithm with a rollout: fresh responses of the *initial* policy, labelled by the reward.

    Over a run that is one pass over a data set of all those responses, which is not stored.

    Args:
        plan: shape of the policy, and how it is sampled.
        learner: the offline algorithm.
        samples: responses to a prompt.
        batch_of: `batch_of(rollout, rewards)`, the batch that the learner is updated on.
    """

    def init(key: Array, params: Params) -> CollectingState:
        learner_key, own_key = jax.random.split(key)
        state = learner.init(learner_key, params)
        return CollectingState(learner=state, source=params["policy"], key=own_key, step=jnp.int32(0))

    def rollout(state: CollectingState, prompts: Prompts) -> tuple[CollectingState, Rollout]:
        key = rollout_key(state.key, state.step)
        taken = generate(plan.model, state.source, prompts, key, plan.sampling, samples)
        return state.replace(step=state.step + 1), taken

    def update(state: CollectingState, taken: Rollout, rewards: Float[Array, " B"]) -> tuple[CollectingState, Metrics]:
        learned, metrics = learner.update(state.learner, batch_of(taken, rewards))
        return state.replace(learner=learned), metrics

    return Algorithm(init=init, rollout=rollout, update=update)


def labelled_pairs(taken: Rollout, rewards: Float[Array, " B"]) -> PreferenceBatch:
    """Pairs of the responses 2 i and 2 i + 1, of which the one with more reward is chosen.

    Of a pair with equal rewards no token is marked as completion, so that it weighs nothing.
    """
    first, second = rewards[0::2], rewards[1::2]
    completion = jnp.concatenate([jnp.zeros_like(taken.prompts.mask), taken.mask], axis=1)
    completion = completion & jnp.repeat(first != second, 2)[:, None]
    rows = Sequences(tokens=taken.sequences.tokens, mask=taken.sequences.mask, loss_mask=completion)
    even = 2 * jnp.arange(len(first))
    chosen = even + (second > first).astype(jnp.int32)
    rejected = 2 * even + 1 - chosen

    def pick(index: Int[Array, " N"]) -> Sequences:
        return jax.tree.map(lambda leaf: leaf[index], rows)

    return PreferenceBatch(chosen=pick(chosen), rejected=pick(rejected), margin=jnp.zeros(len(first)))


def better_ones(taken: Rollout, rewards: Float[Array, " B"]) -> Demonstrations:
    """The chosen responses of `labelled_pairs`, to imitate."""
    chosen = labelled_pairs(taken, rewards).chosen
    return Demonstrations(tokens=chosen.tokens, mask=chosen.mask, loss_mask=chosen.loss_mask)


def marked_ones(taken: Rollout, rewards: Float[Array, " B"]) -> UnpairedBatch:
    """The pairs of `labelled_pairs` taken apart: all chosen responses, marked good, before all rejected ones.

    In that order the next row answers another prompt, as mismatched rows should.
    """
    pairs, prompt_length = labelled_pairs(taken, rewards), taken.prompts.tokens.shape[1]
    rows = jax.tree.map(lambda *sides: jnp.concatenate(sides), pairs.chosen, pairs.rejected)

    def mismatch(leaf: Array) -> Array:
        return jnp.concatenate([leaf[:, :prompt_length], jnp.roll(leaf[:, prompt_length:], -1, axis=0)], axis=1)

    good = jnp.arange(len(rows.tokens)) < len(pairs.margin)
    return UnpairedBatch(completions=rows, mismatched=jax.tree.map(mismatch, rows), good=good)


def _samples(plan: Plan) -> int:
    return plan.samples


def _pairs(plan: Plan) -> int:
    return 2


def _ppo(plan: Plan, rate: float) -> Algorithm:
    options = PPOConfig(sampling=plan.sampling, epochs=plan.epochs, minibatches=plan.minibatches)
    return ppo(plan.model, options, adam(rate), plan.kl, plan.value)


def _policy_gradient(name: str, family: str) -> Arm:
    method = METHODS[name]
    greedy = int(method.baseline == "greedy")
    once = method.surrogate is reinforce_surrogate

    def make(plan: Plan, rate: float) -> Algorithm:
        options = PolicyGradientConfig(
            sampling=plan.sampling,
            method=method,
            samples=1 if method.baseline == "batch" else plan.samples - greedy,
            epochs=1 if once else plan.epochs,
            minibatches=1 if once else plan.minibatches,
        )
        return policy_gradient(plan.model, options, adam(rate), plan.kl)

    rows = (lambda plan: 1) if method.baseline == "batch" else _samples
    return Arm(family, make, rows, pace=ONE_STEP if once else 1.0)


def _online(name: str) -> Arm:
    once = ONLINE[name].get("loss") == "nash_md"

    def make(plan: Plan, rate: float) -> Algorithm:
        passes = {} if once else {"epochs": plan.epochs, "minibatches": plan.minibatches}
        options = online(name, plan.sampling, beta=plan.beta, **passes)
        return online_preference(plan.model, options, adam(rate))

    return Arm(FAMILIES[2], make, _pairs, pace=ONE_STEP if once else 1.0)


def _imitation(name: str) -> Arm:
    method = IMITATION[name]

    def make(plan: Plan, rate: float) -> Algorithm:
        options = ImitationConfig(
            sampling=plan.sampling,
            method=method,
            samples=plan.samples,
            epochs=plan.epochs,
            minibatches=plan.minibatches,
        )
        return imitation(plan.model, options, adam(rate), fixed_kl(0.23) if method.prior_kl else None)

    return Arm(FAMILIES[3], make, _samples, own_samples=method.proposal == "policy")


def _offline(learner: Callable[[Plan, float], Algorithm], batch_of: Callable[..., Any]) -> Arm:
    def make(plan: Plan, rate: float) -> Algorithm:
        return on_initial_samples(plan, learner(plan, rate), 2, batch_of)

    policy = operator.attrgetter("learner.params")
    return Arm(FAMILIES[4], make, _pairs, policy, pace=ONE_STEP, own_samples=False)


def _preference(name: str) -> Arm:
    def learner(plan: Plan, rate: float) -> Algorithm:
        held = preference_loss(name).reference
        loss = preference_loss(name, beta=plan.beta) if held else preference_loss(name)
        return preference(plan.model, loss, adam(rate))

    return _offline(learner, labelled_pairs)


ARMS = {
    "ppo": Arm(FAMILIES[0], _ppo, lambda plan: 1, policy=lambda state: state.params["policy"]),
    **{name: _policy_gradient(name, FAMILIES[0]) for name in ("rloo", "reinforce++", "reinforce++_baseline", "remax")},
    **{name: _policy_gradient(name, FAMILIES[1]) for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo")},
    **{name: _online(name) for name in ONLINE},
    **{name: _imitation(name) for name in IMITATION},
    "sft": _offline(lambda plan, rate: sft(plan.model, adam(rate)), better_ones),
    **{name: _preference(name) for name in PREFERENCE_LOSSES},
    "kto": _offline(lambda plan, rate: kto(plan.model, adam(rate), plan.beta), marked_ones),
}
"""Every algorithm by name; `sft` imitates the better one of each pair of responses."""
