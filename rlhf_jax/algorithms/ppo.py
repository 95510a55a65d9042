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
from jaxtyping import Array, Float

from rlhf_jax.algorithms.on_policy import Pieces, PolicyState, check_kl, in_parts, on_policy
from rlhf_jax.algorithms.on_policy_options import OnPolicyConfig
from rlhf_jax.algorithms.rollouts import (
    predicting_states,
    rollout_metrics,
    sampler_weights,
    scores_by_token,
    step_metrics,
    taken_scores,
)
from rlhf_jax.algorithms.trained import assemble, check_roles, reference_policy, trainable
from rlhf_jax.losses.advantages import gae, token_rewards, whiten
from rlhf_jax.losses.kl import KLController, kl_estimate
from rlhf_jax.losses.policy import check_clips, clipped_surrogate, token_log_ratio
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.value import clipped_value_loss, value_metrics
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import apply_head, init_policy, init_value_head
from rlhf_jax.models.transformer import init_trunk
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import Algorithm, Metrics, Params, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class PPOConfig(OnPolicyConfig):
    """Options of PPO, beside those of `OnPolicyConfig`.

    Attributes:
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
        dual_clip: c > 1: where the advantage is negative, the loss of a token is at most c times its size; None: no
            bound.
        kl_in: the KL from the reference is subtracted from the "reward" of each token, or is a term of the "loss".
        kl_estimate: how it is estimated there, see `losses.kl`; k1 has no gradient and is refused in the loss.
        value_clip: values may move this far from the old ones before their loss stops falling.
        value_coefficient: weight of the value loss.
        entropy_coefficient: weight of the mean token entropy (nats) that is maximised.
        discount: gamma of the token-level return.
        gae_lambda: lambda of generalised advantage estimation.
        whiten_advantages: standardise advantages over all response tokens of the rollout.
        missing_eos_penalty: subtracted from the reward of a response that never ended in a stop token.
        reduction: how the policy and value losses are averaged, a name of `losses.reduce`.
        value_net: "separate" has a trunk of its own; "shared" is a head on the policy's trunk.

    Raises:
        ValueError: an option is out of range.
    """

    epochs: int = 2
    minibatches: int = 2
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimate: Literal["k1", "k2", "k3"] = "k1"
    value_clip: float = 0.2
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.0
    discount: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: bool = True
    missing_eos_penalty: float = 0.0
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    value_net: Literal["separate", "shared"] = "separate"

    def __post_init__(self):
        super().__post_init__()
        check_kl(self.kl_in, self.kl_estimate)
        check_clips(self.clip_low, self.clip_high, self.dual_clip)
        for name, most in (("discount", 1.0), ("gae_lambda", 1.0), ("value_clip", float("inf"))):
            if not 0 <= vars(self)[name] <= most:
                raise ValueError(f"PPOConfig.{name} is {vars(self)[name]}; give 0 to {most}.")
        if self.reduction not in ("token_mean", "sequence_mean", "sequence_sum"):
            raise ValueError(
                f"PPOConfig.reduction is {self.reduction!r}; choose token_mean, sequence_mean or sequence_sum."
            )
        if self.value_net not in ("separate", "shared"):
            raise ValueError(f"PPOConfig.value_net is {self.value_net!r}; choose separate or shared.")


@chex.dataclass(frozen=True)
class Experience:
    """A rollout and what is fixed about it before the first minibatch; float32 [B, T]."""

    rollout: Rollout
    reference_logprob: Float[Array, "B T"]
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
    value_config = config if value_config is None else value_config
    temperature = options.sampling.logprob_temperature

    def begin(key: Array, given: Params) -> tuple[Params, Params, Array]:
        check_roles(given, ("policy", "value", "reference"))
        policy_key, value_key, state_key = jax.random.split(key, 3)
        policy = given["policy"] if "policy" in given else init_policy(config, policy_key)
        value = given.get("value")
        if value is None:
            value = {"head": init_value_head(value_config)}
            if options.value_net == "separate":
                value["trunk"] = init_trunk(value_config, value_key)
        trained = {"policy": trainable(policy, adapter, policy_key), "value": value}
        return trained, reference_policy(given, policy, adapter), state_key

    def policy(params: Params, reference: Params) -> Params:
        return assemble(reference, params["policy"], adapter)

    def draw(params: Params, reference: Params, prompts: Prompts, key: Array) -> Rollout:
        return generate(config, policy(params, reference), prompts, key, options.sampling)

    def forward(params: Params, reference: Params, taken: Rollout) -> Predictions:
        value = params["value"]
        logprob, entropies, states = taken_scores(config, policy(params, reference), taken, temperature)
        if options.value_net == "separate":
            states = predicting_states(value_config, value["trunk"], taken)
        return Predictions(logprob=logprob, entropies=entropies, values=apply_head(value["head"], states))

    def prepare(
        state: PolicyState, taken: Rollout, rewards: Array, reference_logprob: Float[Array, "B T"]
    ) -> tuple[Experience, Metrics]:
        """Advantages and returns, from scores, the KL to the reference and the value net's predictions."""
        values = in_parts(lambda taken: forward(state.params, state.reference, taken).values, taken, options)
        per_token_kl = kl_estimate(taken.logprob, reference_logprob, options.kl_estimate)
        penalty = state.kl_coefficient if options.kl_in == "reward" else 0.0
        scores = scores_by_token(taken, rewards)
        unfinished = jnp.where(taken.finished, 0.0, -options.missing_eos_penalty)
        rewards_by_token = scores + token_rewards(unfinished, per_token_kl, taken.mask, penalty)
        advantages, returns = gae(rewards_by_token, values, taken.mask, options.discount, options.gae_lambda)
        if options.whiten_advantages:
            advantages = whiten(advantages, taken.mask)
        metrics = rollout_metrics(taken, reference_logprob) | {
            "objective/scores": mean(scores, taken.mask, "sequence_sum"),
            "objective/rlhf_reward": mean(rewards_by_token, taken.mask, "sequence_sum"),
        }
        experience = Experience(
            rollout=taken,
            reference_logprob=reference_logprob,
            values=values,
            advantages=advantages,
            returns=returns,
        )
        return experience, metrics

    def predict(params: Params, reference: Params, part: Experience) -> Predictions:
        return forward(params, reference, part.rollout)

    def terms(found: Predictions, part: Experience, minibatch: Experience, kl_coefficient: Array) -> Metrics:
        mask, whole = part.rollout.mask, minibatch.rollout.mask

        def average(values: Float[Array, "B T"], rule: str = options.reduction) -> Float[Array, ""]:
            return mean(values, mask, rule, whole=whole)

        log_ratio = token_log_ratio(found.logprob, part.rollout.logprob, mask)
        clips = (options.clip_low, options.clip_high, options.dual_clip)
        losses = clipped_surrogate(found.logprob, log_ratio, part.advantages, *clips)
        if options.old_logprob == "truncated":
            losses = losses * sampler_weights(part.rollout, token_log_ratio, options.importance_cap)
        policy_loss = average(losses)
        value_loss = average(clipped_value_loss(found.values, part.values, part.returns, options.value_clip))
        entropy = average(found.entropies, "token_mean")
        loss = policy_loss + options.value_coefficient * value_loss - options.entropy_coefficient * entropy
        each = {"loss/policy": policy_loss, "loss/value": value_loss, "policy/entropy": entropy}
        if options.kl_in == "loss":
            each["loss/kl"] = average(kl_estimate(found.logprob, part.reference_logprob, options.kl_estimate))
            loss = loss + kl_coefficient * each["loss/kl"]
        return each | {"loss": loss}

    def measure(found: Predictions, batch: Experience) -> Metrics:
        taken = batch.rollout
        log_ratio = token_log_ratio(found.logprob, taken.logprob, taken.mask)
        clips = (options.clip_low, options.clip_high)
        steps = step_metrics(found.logprob, taken.logprob, log_ratio, taken.mask, *clips)
        return steps | value_metrics(found.values, batch.values, batch.returns, taken.mask, options.value_clip)

    pieces = Pieces(policy, draw, prepare, predict, terms, measure, ratio=token_log_ratio)
    return on_policy(config, options, optimizer, kl, begin, pieces)
