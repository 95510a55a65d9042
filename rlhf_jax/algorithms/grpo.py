"""Group relative policy optimisation (Shao et al. 2024, 2402.03300): several responses a prompt instead of a value net.

The life of a batch: `rollout` samples K responses to each prompt, which follow each other. `update` gets one reward a
response; how much better it is than the rest of its group is the advantage of all its tokens. Then epochs x minibatches
of clipped steps are taken over the one rollout; the KL from a frozen reference is a term of the loss.

Reductions, clipping and division by the spread of a group are options, which also give Dr. GRPO (Liu et al. 2025,
2503.20783: `divide=False`, `reduction="constant"`, no KL).
"""

import dataclasses
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms.accumulation import by_parts
from rlhf_jax.algorithms.on_policy import (
    check_minibatches,
    check_passes,
    order_key,
    rollout_key,
    rollout_metrics,
    step_metrics,
    take_steps,
    taken_scores,
)
from rlhf_jax.algorithms.trained import assemble, reference_policy, trainable, without_shared_arrays
from rlhf_jax.losses.advantages import group_advantages
from rlhf_jax.losses.kl import KLController, fixed_kl, kl_estimate
from rlhf_jax.losses.policy import clipped_surrogate
from rlhf_jax.losses.reduce import mean
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import Algorithm, Metrics, Params, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Options of GRPO.

    Attributes:
        sampling: how responses are drawn; filters are refused, since they change the support of the behaviour policy.
        samples: K, responses a prompt, at least 2.
        epochs: passes over each rollout.
        minibatches: optimiser steps a pass; divides the number of responses.
        accumulate: microbatches that an optimiser step sees one after the other, to need less memory.
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
        divide: divide advantages by the spread of their group; False: they stay differences of rewards.
        reduction: how the losses of tokens are averaged, a name of `losses.reduce`; the `constant` is the longest
            response that is sampled.

    Raises:
        ValueError: an option is out of range.
    """

    sampling: SamplingConfig
    samples: int = 8
    epochs: int = 1
    minibatches: int = 1
    accumulate: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    divide: bool = True
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "sequence_mean"

    def __post_init__(self):
        check_passes("GRPO", self.sampling, self.epochs, self.minibatches, self.accumulate)
        if self.samples < 2:
            raise ValueError(f"GRPO compares the responses to a prompt: give 2 samples or more, not {self.samples}.")


@chex.dataclass(frozen=True)
class GRPOState:
    """Everything GRPO carries from one update to the next.

    Attributes:
        params: the policy, or the adapter that is trained on the reference.
        reference: the frozen policy that the KL is measured from, and the base of an adapter.
        optimizer_state: the optimiser's state.
        kl_coefficient: the KL controller's state, float32 scalar; replace it to batch over coefficients.
        key: a typed key, never used twice: the number of rollouts is folded in.
        step: number of rollouts so far, int32.
    """

    params: Params
    reference: Params
    optimizer_state: optax.OptState
    kl_coefficient: Float[Array, ""]
    key: Array
    step: Int[Array, ""]


@chex.dataclass(frozen=True)
class GroupExperience:
    """A rollout and what is fixed about it before the first minibatch.

    Attributes:
        rollout: the responses.
        reference_logprob: of the tokens taken under the reference, nats, [B, T].
        advantages: one a response, [B].
    """

    rollout: Rollout
    reference_logprob: Float[Array, "B T"]
    advantages: Float[Array, " B"]


@chex.dataclass(frozen=True)
class TokenScores:
    """What the policy says of the tokens taken: log-probabilities and entropies, nats, [B, T]."""

    logprob: Float[Array, "B T"]
    entropies: Float[Array, "B T"]


def repeat_prompts(prompts: Prompts, samples: int) -> Prompts:
    """Every prompt `samples` times, one after the other, each with an index of its own, so that their samples differ.

    Example:
        >>> prompts = Prompts(tokens=jnp.ones((2, 1), int), mask=jnp.ones((2, 1), bool), index=jnp.array([0, 5]))
        >>> repeat_prompts(prompts, 3).index.tolist()
        [0, 1, 2, 15, 16, 17]
    """
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), prompts)
    sample = jnp.tile(jnp.arange(samples, dtype=repeated.index.dtype), len(prompts.index))
    return repeated.replace(index=repeated.index * samples + sample)


def grpo(
    config: ModelConfig,
    options: GRPOConfig,
    optimizer: optax.GradientTransformation,
    kl: KLController | None = None,
    adapter: AdapterConfig | None = None,
) -> Algorithm:
    """GRPO as an `Algorithm`.

    `init(key, params)` takes `{"policy": tree, "reference"?: tree}` or None for a fresh policy; the reference is the
    policy at the start if not given. `rollout(state, prompts)` gives K responses a prompt, [B K] rows in groups, and
    `update(state, rollout, rewards)` takes one reward a response, [B K].

    Args:
        config: shape of the policy.
        options: see `GRPOConfig`.
        optimizer: an optax optimiser of what is trained.
        kl: controller of the coefficient of the KL in the loss, in units of advantage a nat; None: no KL.
        adapter: train this adapter on the policy, which stays as it is and is the reference; None: train the policy.
    """
    kl = fixed_kl(0.0) if kl is None else kl
    temperature = options.sampling.logprob_temperature
    constant = options.sampling.max_new_tokens if options.reduction == "constant" else None

    def init(key: Array, params: Params | None = None) -> GRPOState:
        given = params or {}
        policy_key, state_key = jax.random.split(key)
        policy = given["policy"] if "policy" in given else init_policy(config, policy_key)
        trained = trainable(policy, adapter, policy_key)
        state = GRPOState(
            params=trained,
            reference=reference_policy(given, policy, adapter),
            optimizer_state=optimizer.init(trained),
            kl_coefficient=kl.init(),
            key=state_key,
            step=jnp.int32(0),
        )
        return without_shared_arrays(state)

    def rollout(state: GRPOState, prompts: Prompts) -> tuple[GRPOState, Rollout]:
        policy = assemble(state.reference, state.params, adapter)
        groups = repeat_prompts(prompts, options.samples)
        taken = generate(config, policy, groups, rollout_key(state.key, state.step), options.sampling)
        return state.replace(step=state.step + 1), taken

    def terms(found: TokenScores, batch: GroupExperience, whole: Bool[Array, "N T"]) -> Metrics:
        """The terms of the loss; `whole` is the mask of the minibatch that the rows are a part of."""
        taken = batch.rollout
        advantages = jnp.broadcast_to(batch.advantages[:, None], found.logprob.shape)
        surrogate = clipped_surrogate(found.logprob, taken.logprob, advantages, options.clip_low, options.clip_high)
        divergence = kl_estimate(found.logprob, batch.reference_logprob, "k3")
        return {
            "loss/policy": mean(surrogate, taken.mask, options.reduction, constant, whole),
            "loss/kl": mean(divergence, taken.mask, options.reduction, constant, whole),
            "policy/entropy": mean(found.entropies, taken.mask, whole=whole),
        }

    def measure(found: TokenScores, batch: GroupExperience) -> Metrics:
        metrics = terms(found, batch, batch.rollout.mask)
        return metrics | step_metrics(found.logprob, batch.rollout, options.clip_low, options.clip_high)

    def update(state: GRPOState, taken: Rollout, rewards: Float[Array, " B"]) -> tuple[GRPOState, Metrics]:
        rows = len(taken.tokens)
        check_minibatches(rows, options.minibatches, options.accumulate)
        advantages = group_advantages(rewards, options.samples, options.divide)

        def read(taken: Rollout) -> Float[Array, "B T"]:
            return taken_scores(config, state.reference, taken, temperature)[0]

        def loss(params: Params, part: GroupExperience, minibatch: GroupExperience):
            policy = assemble(state.reference, params, adapter)
            logprob, entropies, _ = taken_scores(config, policy, part.rollout, temperature)
            found = TokenScores(logprob=logprob, entropies=entropies)
            each = terms(found, part, minibatch.rollout.mask)
            return each["loss/policy"] + state.kl_coefficient * each["loss/kl"], found

        parts = 1 if options.accumulate == 1 else options.minibatches * options.accumulate
        reference_logprob = by_parts(read, taken, parts)
        params, optimizer_state, steps = take_steps(
            loss,
            measure,
            optimizer,
            state.params,
            state.optimizer_state,
            GroupExperience(rollout=taken, reference_logprob=reference_logprob, advantages=advantages),
            order_key(state.key, state.step),
            epochs=options.epochs,
            minibatches=options.minibatches,
            accumulate=options.accumulate,
        )
        groups = rewards.reshape(-1, options.samples)
        metrics = rollout_metrics(taken, reference_logprob) | steps
        metrics["objective/scores"] = rewards.astype(jnp.float32).mean()
        metrics["objective/equal_groups"] = (groups == groups[:, :1]).all(axis=1).astype(jnp.float32).mean()
        metrics["kl_coefficient"] = state.kl_coefficient
        coefficient = kl.update(state.kl_coefficient, metrics["objective/kl"], rows)
        return state.replace(params=params, optimizer_state=optimizer_state, kl_coefficient=coefficient), metrics

    return Algorithm(init=init, rollout=rollout, update=update)
