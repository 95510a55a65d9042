"""Proximal policy optimisation for language models (Schulman et al. 2017, 1707.06347; Ouyang et al. 2022, 2203.02155).

The life of a batch: `rollout` samples one response a prompt and keeps the log-probability of every token taken.
`update` gets one reward a response, subtracts a per-token KL penalty, runs generalised advantage estimation on the
value net's predictions, and takes epochs x minibatches of clipped steps over the one rollout, all in one compiled
program. Old log-probabilities, reference log-probabilities, values and advantages are computed once, before the first
step.
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
    predicting_states,
    rollout_key,
    rollout_metrics,
    step_metrics,
    take_steps,
    taken_scores,
)
from rlhf_jax.algorithms.trained import assemble, reference_policy, trainable, without_shared_arrays
from rlhf_jax.losses.advantages import gae, token_rewards, whiten
from rlhf_jax.losses.kl import KLController, fixed_kl, kl_estimate
from rlhf_jax.losses.policy import clipped_surrogate
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.value import clipped_value_loss, value_metrics
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import apply_head, init_policy, init_value_head
from rlhf_jax.models.transformer import init_trunk
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import Algorithm, Metrics, Params, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Options of PPO.

    Attributes:
        sampling: how responses are drawn; filters are refused, since they change the support of the behaviour policy.
        epochs: passes over each rollout.
        minibatches: optimiser steps a pass; divides the number of responses.
        accumulate: microbatches that an optimiser step sees one after the other, to need less memory.
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
        value_clip: values may move this far from the old ones before their loss stops falling.
        value_coefficient: weight of the value loss.
        entropy_coefficient: weight of the mean token entropy (nats) that is maximised.
        discount: gamma of the token-level return.
        gae_lambda: lambda of generalised advantage estimation.
        whiten_advantages: standardise advantages over all response tokens of the rollout.
        missing_eos_penalty: subtracted from the reward of a response that never ended in a stop token.
        target_kl: once the approximate KL of a minibatch to the old policy exceeds this (nats a token), the rest of the
            update is skipped; None never stops.
        reduction: how the policy and value losses are averaged, a name of `losses.reduce`.
        value_net: "separate" has a trunk of its own; "shared" is a head on the policy's trunk.

    Raises:
        ValueError: an option is out of range.
    """

    sampling: SamplingConfig
    epochs: int = 2
    minibatches: int = 2
    accumulate: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.0
    discount: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: bool = True
    missing_eos_penalty: float = 0.0
    target_kl: float | None = None
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    value_net: Literal["separate", "shared"] = "separate"

    def __post_init__(self):
        check_passes("PPO", self.sampling, self.epochs, self.minibatches, self.accumulate)
        if self.value_net not in ("separate", "shared"):
            raise ValueError(f"PPOConfig.value_net is {self.value_net!r}; choose separate or shared.")


@chex.dataclass(frozen=True)
class PPOState:
    """Everything PPO carries from one update to the next.

    Attributes:
        params: `{"policy": tree, "value": tree}`; the policy's tree is its adapter where one is trained.
        reference: the frozen policy that the KL penalty is measured from, and the base of an adapter.
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
class Experience:
    """A rollout and what is fixed about it before the first minibatch; float32 [B, T]."""

    rollout: Rollout
    values: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]


@chex.dataclass(frozen=True)
class Predictions:
    """What policy and value net say of the tokens taken: log-probabilities and entropies in nats, values; [B, T]."""

    logprob: Float[Array, "B T"]
    entropies: Float[Array, "B T"]
    values: Float[Array, "B T"]


def ppo(
    config: ModelConfig,
    options: PPOConfig,
    optimizer: optax.GradientTransformation,
    kl: KLController | None = None,
    value_config: ModelConfig | None = None,
    adapter: AdapterConfig | None = None,
) -> Algorithm:
    """PPO as an `Algorithm`.

    `init(key, params)` takes `{"policy": tree, "value": tree}`; without a policy it is fresh, without a value net the
    value trunk is fresh and its head zero. The reference is the policy at the start, or `params["reference"]`.

    Args:
        config: shape of the policy.
        options: see `PPOConfig`.
        optimizer: an optax optimiser for policy and value net together.
        kl: controller of the KL penalty's coefficient; None: no penalty.
        value_config: shape of a separate value net; None: that of the policy.
        adapter: train this adapter on the policy, which stays as it is and is the reference; None: train the policy. A
            separate value net is trained as a whole, a shared one reads the adapted trunk.
    """
    kl = fixed_kl(0.0) if kl is None else kl
    value_config = config if value_config is None else value_config
    temperature = options.sampling.logprob_temperature

    def init(key: Array, params: Params | None = None) -> PPOState:
        given = params or {}
        policy_key, value_key, state_key = jax.random.split(key, 3)
        policy = given["policy"] if "policy" in given else init_policy(config, policy_key)
        value = given.get("value")
        if value is None:
            value = {"head": init_value_head(value_config)}
            if options.value_net == "separate":
                value["trunk"] = init_trunk(value_config, value_key)
        trained = {"policy": trainable(policy, adapter, policy_key), "value": value}
        state = PPOState(
            params=trained,
            reference=reference_policy(given, policy, adapter),
            optimizer_state=optimizer.init(trained),
            kl_coefficient=kl.init(),
            key=state_key,
            step=jnp.int32(0),
        )
        return without_shared_arrays(state)

    def rollout(state: PPOState, prompts: Prompts) -> tuple[PPOState, Rollout]:
        policy = assemble(state.reference, state.params["policy"], adapter)
        taken = generate(config, policy, prompts, rollout_key(state.key, state.step), options.sampling)
        return state.replace(step=state.step + 1), taken

    def forward(params: Params, reference: Params, taken: Rollout) -> Predictions:
        policy, value = assemble(reference, params["policy"], adapter), params["value"]
        logprob, entropies, states = taken_scores(config, policy, taken, temperature)
        if options.value_net == "separate":
            states = predicting_states(value_config, value["trunk"], taken)
        return Predictions(logprob=logprob, entropies=entropies, values=apply_head(value["head"], states))

    def terms(found: Predictions, batch: Experience, whole: Bool[Array, "N T"]) -> Metrics:
        """The terms of the loss; `whole` is the mask of the minibatch that the rows are a part of."""
        surrogate = clipped_surrogate(
            found.logprob, batch.rollout.logprob, batch.advantages, options.clip_low, options.clip_high
        )
        value_error = clipped_value_loss(found.values, batch.values, batch.returns, options.value_clip)
        mask = batch.rollout.mask
        return {
            "loss/policy": mean(surrogate, mask, options.reduction, whole=whole),
            "loss/value": mean(value_error, mask, options.reduction, whole=whole),
            "policy/entropy": mean(found.entropies, mask, whole=whole),
        }

    def measure(found: Predictions, batch: Experience) -> Metrics:
        taken = batch.rollout
        metrics = terms(found, batch, taken.mask)
        metrics |= step_metrics(found.logprob, taken, options.clip_low, options.clip_high)
        return metrics | value_metrics(found.values, batch.values, batch.returns, taken.mask, options.value_clip)

    def experience(state: PPOState, taken: Rollout, rewards: Array) -> tuple[Experience, Metrics]:
        """Advantages and returns of a rollout, from scores, the KL to the reference and the value net's predictions."""

        def read(taken: Rollout) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
            reference_logprob, *_ = taken_scores(config, state.reference, taken, temperature)
            return reference_logprob, forward(state.params, state.reference, taken).values

        parts = 1 if options.accumulate == 1 else options.minibatches * options.accumulate
        reference_logprob, values = by_parts(read, taken, parts)
        per_token_kl = kl_estimate(taken.logprob, reference_logprob, "k1")
        scores = token_rewards(rewards, jnp.zeros_like(values), taken.mask, 0.0)
        unfinished = jnp.where(taken.finished, 0.0, -options.missing_eos_penalty)
        rewards_by_token = scores + token_rewards(unfinished, per_token_kl, taken.mask, state.kl_coefficient)
        advantages, returns = gae(rewards_by_token, values, taken.mask, options.discount, options.gae_lambda)
        if options.whiten_advantages:
            advantages = whiten(advantages, taken.mask)
        metrics = rollout_metrics(taken, reference_logprob) | {
            "objective/scores": mean(scores, taken.mask, "sequence_sum"),
            "objective/rlhf_reward": mean(rewards_by_token, taken.mask, "sequence_sum"),
        }
        return Experience(rollout=taken, values=values, advantages=advantages, returns=returns), metrics

    def update(state: PPOState, taken: Rollout, rewards: Array) -> tuple[PPOState, Metrics]:
        check_minibatches(len(taken.tokens), options.minibatches, options.accumulate)

        def loss(params: Params, part: Experience, minibatch: Experience) -> tuple[Float[Array, ""], Predictions]:
            found = forward(params, state.reference, part.rollout)
            each = terms(found, part, minibatch.rollout.mask)
            total = each["loss/policy"] + options.value_coefficient * each["loss/value"]
            return total - options.entropy_coefficient * each["policy/entropy"], found

        whole, metrics = experience(state, taken, rewards)
        params, optimizer_state, steps = take_steps(
            loss,
            measure,
            optimizer,
            state.params,
            state.optimizer_state,
            whole,
            order_key(state.key, state.step),
            epochs=options.epochs,
            minibatches=options.minibatches,
            accumulate=options.accumulate,
            target_kl=options.target_kl,
        )
        metrics |= steps | {"kl_coefficient": state.kl_coefficient}
        coefficient = kl.update(state.kl_coefficient, metrics["objective/kl"], len(taken.tokens))
        return state.replace(params=params, optimizer_state=optimizer_state, kl_coefficient=coefficient), metrics

    return Algorithm(init=init, rollout=rollout, update=update)
