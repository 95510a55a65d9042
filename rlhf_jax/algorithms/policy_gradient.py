"""Policy gradients without a value net: GRPO (Shao et al. 2024, 2402.03300) and its relatives.

The life of a batch: `rollout` samples K responses to each prompt, which follow each other. `update` gets one reward a
response (or one a token); a baseline that needs no value net (the other responses of the group, the whole batch, or a
greedy response) turns rewards into advantages. Then epochs x minibatches of steps are taken over the one rollout. What
a step minimises is put together from the pieces that a `Method` names.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from rlhf_jax.algorithms.methods import METHODS, Method
from rlhf_jax.algorithms.on_policy import Pieces, PolicyState, begin_with_policy, on_policy
from rlhf_jax.algorithms.on_policy_options import OnPolicyConfig
from rlhf_jax.algorithms.rollouts import (
    TokenScores,
    rollout_metrics,
    sampler_weights,
    scores_by_token,
    step_metrics,
    taken_scores,
)
from rlhf_jax.algorithms.trained import assemble
from rlhf_jax.losses.advantages import group_advantages, token_rewards
from rlhf_jax.losses.credit import overlong_penalty, spread_groups
from rlhf_jax.losses.kl import KLController, kl_estimate
from rlhf_jax.losses.policy import reinforce_surrogate
from rlhf_jax.losses.reduce import mean
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sampling.generate import generate, repeat_prompts
from rlhf_jax.types import Algorithm, Metrics, Params, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class PolicyGradientConfig(OnPolicyConfig):
    """Options of a policy gradient without a value net, beside those of `OnPolicyConfig`.

    Attributes:
        method: its pieces, see `METHODS`.
        samples: K, responses that are sampled a prompt; 2 or more where they are compared with each other.
        missing_eos_penalty: subtracted from the reward of a response that did not end by itself.
        overlong_buffer: the reward falls by up to 1 over the last so many tokens before the longest response; 0: it
            does not (DAPO's soft punishment).
        oversample: so many times the groups that are trained on are drawn; those with unequal rewards come first
            (DAPO's dynamic sampling, in one round).
        keep_reference: keep the frozen policy and measure the KL from it; False needs no second copy of the policy.

    Raises:
        ValueError: an option is out of range.
    """

    method: Method = METHODS["grpo"]
    samples: int = 8
    missing_eos_penalty: float = 0.0
    overlong_buffer: int = 0
    oversample: int = 1
    keep_reference: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.method, Method):
            raise ValueError(f"method is {self.method!r}: give a Method, such as METHODS['grpo'].")
        least = 2 if self.method.baseline == "group" else 1
        if self.samples < least:
            raise ValueError(
                f"samples is {self.samples}: give {least} or more, for a response is compared with the others of its "
                "group."
                if least == 2
                else f"samples is {self.samples}: give 1 or more."
            )
        longest = self.sampling.max_new_tokens
        if not 0 <= self.overlong_buffer <= longest:
            raise ValueError(f"overlong_buffer is {self.overlong_buffer}: give 0 to {longest}, the longest response.")
        if self.oversample < 1:
            raise ValueError(f"oversample is {self.oversample}: give 1 or more.")
        if self.oversample > 1 and not self.method.drop_equal:
            raise ValueError("oversample is for methods that drop groups of equal rewards: choose dapo, or drop_equal.")
        if self.method.surrogate is reinforce_surrogate and self.epochs * self.minibatches > 1:
            raise ValueError(
                "this method corrects nothing for steps away from the policy that sampled: give epochs=1 and "
                "minibatches=1."
            )

    @property
    def rows(self) -> int:
        """Responses a prompt: the sampled ones and the greedy one."""
        return self.samples + (self.method.baseline == "greedy")


@chex.dataclass(frozen=True)
class GroupExperience:
    """A rollout and what is fixed about it before the first minibatch.

    Attributes:
        rollout: the responses.
        reference_logprob: of the tokens taken under the reference, nats, [B, T]; None where no reference is kept.
        advantages: [B, T].
        mask: the tokens that are trained on, [B, T].
    """

    rollout: Rollout
    reference_logprob: Float[Array, "B T"] | None
    advantages: Float[Array, "B T"]
    mask: Bool[Array, "B T"]


def policy_gradient(
    config: ModelConfig,
    options: PolicyGradientConfig,
    optimizer: optax.GradientTransformation,
    kl: KLController | None = None,
    adapter: AdapterConfig | None = None,
) -> Algorithm:
    """A policy gradient without a value net as an `Algorithm`.

    `init(key, params)` takes `{"policy": tree, "reference"?: tree}` or None for a fresh policy; the reference is the
    policy at the start if not given. `rollout(state, prompts)` gives `options.rows` responses a prompt, in groups;
    `update(state, rollout, rewards)` takes one reward a response or one a token.

    Args:
        config: shape of the policy.
        options: see `PolicyGradientConfig`.
        optimizer: an optax optimiser of what is trained.
        kl: controller of the coefficient of the KL, in units of reward (in the loss: of advantage) a nat; None: no KL.
        adapter: train this adapter on the policy, which stays as it is and is the reference; None: train the policy.

    Raises:
        ValueError: a KL, but no reference is kept to measure it from.
    """
    chosen, rows = options.method, options.rows
    temperature = options.sampling.logprob_temperature
    constant = options.sampling.max_new_tokens if chosen.reduction == "constant" else None
    clips = (chosen.clip_low, chosen.clip_high)
    if not options.keep_reference and (kl is not None or adapter is not None):
        raise ValueError("keep_reference is False, but the KL (or the adapter) needs the reference: keep it.")
    begin_with_reference = begin_with_policy(config, adapter)

    def begin(key: Array, given: Params) -> tuple[Params, Params, Array]:
        trained, reference, state_key = begin_with_reference(key, given)
        return trained, reference if options.keep_reference else None, state_key

    def policy(params: Params, reference: Params) -> Params:
        return assemble(reference, params, adapter)

    def draw(params: Params, reference: Params, prompts: Prompts, key: Array) -> Rollout:
        drawing = policy(params, reference)
        if chosen.baseline != "greedy":
            return generate(config, drawing, prompts, key, options.sampling, rows)
        repeated = repeat_prompts(prompts, rows)
        groups = jax.tree.map(lambda leaf: leaf.reshape(-1, rows, *leaf.shape[1:]), repeated)
        sampled, last = (jax.tree.map(lambda leaf, place=place: leaf[:, place], groups) for place in (slice(-1), -1))
        sampled = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), sampled)
        taken = generate(config, drawing, sampled, key, options.sampling)
        greedy = generate(config, drawing, last, key, dataclasses.replace(options.sampling, top_k=1))

        def join(some: Array, one: Array) -> Array:
            together = [some.reshape(-1, options.samples, *some.shape[1:]), one[:, None]]
            return jnp.concatenate(together, axis=1).reshape(-1, *some.shape[1:])

        own = jnp.arange(len(repeated.index)) % rows < options.samples
        return jax.tree.map(join, taken, greedy).replace(own=own)

    def prepare(
        state: PolicyState, taken: Rollout, rewards: Array, reference_logprob: Float[Array, "B T"] | None
    ) -> tuple[GroupExperience, Metrics]:
        """Advantages, and which tokens are trained on."""
        kl = jnp.zeros_like(taken.logprob)
        if chosen.kl_in == "reward" and reference_logprob is not None:
            kl = kl_estimate(taken.logprob, reference_logprob, chosen.kl_estimate)
        scores = scores_by_token(taken, rewards)
        penalties = jnp.where(taken.finished, 0.0, -options.missing_eos_penalty)
        if options.overlong_buffer:
            lengths = taken.mask.sum(axis=-1).astype(jnp.float32)
            penalties = penalties + overlong_penalty(lengths, options.sampling.max_new_tokens, options.overlong_buffer)
        if chosen.centre_scores:
            total = scores.sum(axis=-1) + penalties
            penalties = penalties + group_advantages(total, rows, divide=False) - total
        by_token = scores + token_rewards(penalties, kl, taken.mask, state.kl_coefficient)
        advantages = chosen.advantages(by_token, taken.mask, rows)

        own = taken.own_rows
        unequal = spread_groups(scores.sum(axis=-1), rows) if rows > 1 else own
        counted = own & taken.finished if chosen.mask_unfinished else own
        counted = counted & unequal if chosen.drop_equal else counted
        experience = GroupExperience(
            rollout=taken,
            reference_logprob=reference_logprob,
            advantages=advantages,
            mask=taken.mask & counted[:, None],
        )
        metrics = rollout_metrics(taken, reference_logprob)
        metrics["objective/scores"] = mean(scores, taken.mask & own[:, None], "sequence_sum")
        metrics["objective/rlhf_reward"] = mean(by_token, taken.mask & own[:, None], "sequence_sum")
        metrics["objective/equal_groups"] = 1.0 - unequal.astype(jnp.float32).mean()
        if options.oversample > 1:
            experience = first_groups(experience, unequal)
        metrics["objective/trained"] = experience.mask.any(axis=-1).astype(jnp.float32).mean()
        return experience, metrics

    def first_groups(experience: GroupExperience, unequal: Bool[Array, " B"]) -> GroupExperience:
        """1 / oversample of the groups: those of unequal rewards, in their order, then others."""
        groups = len(unequal) // rows
        if groups % options.oversample:
            raise ValueError(
                f"{groups} prompts are no multiple of oversample ({options.oversample}): {groups // options.oversample}"
                " groups cannot be chosen of them; give another number of prompts."
            )
        order = jnp.argsort(~unequal[::rows], stable=True)[: groups // options.oversample]
        chosen_rows = (order[:, None] * rows + jnp.arange(rows)[None]).reshape(-1)
        return jax.tree.map(lambda leaf: leaf[chosen_rows], experience)

    def predict(params: Params, reference: Params, part: GroupExperience) -> TokenScores:
        logprob, entropies, _ = taken_scores(config, policy(params, reference), part.rollout, temperature)
        return TokenScores(logprob=logprob, entropies=entropies)

    def terms(found: TokenScores, part: GroupExperience, minibatch: GroupExperience, kl_coefficient: Array) -> Metrics:
        def average(values: Float[Array, "B T"], rule: str, length: int | None = None) -> Float[Array, ""]:
            return mean(values, part.mask, rule, length, minibatch.mask)

        log_ratio = chosen.ratio(found.logprob, part.rollout.logprob, part.rollout.mask)
        losses = chosen.surrogate(found.logprob, log_ratio, part.advantages, *clips)
        if options.old_logprob == "truncated":
            losses = losses * sampler_weights(part.rollout, chosen.ratio, options.importance_cap)
        each = {
            "loss/policy": average(losses, chosen.reduction, constant),
            "policy/entropy": average(found.entropies, "token_mean"),
        }
        if chosen.kl_in == "reward" or part.reference_logprob is None:
            return each | {"loss": each["loss/policy"]}
        divergence = kl_estimate(found.logprob, part.reference_logprob, chosen.kl_estimate)
        each["loss/kl"] = average(divergence, chosen.reduction, constant)
        return each | {"loss": each["loss/policy"] + kl_coefficient * each["loss/kl"]}

    def measure(found: TokenScores, batch: GroupExperience) -> Metrics:
        old = batch.rollout.logprob
        log_ratio = chosen.ratio(found.logprob, old, batch.rollout.mask)
        return step_metrics(found.logprob, old, log_ratio, batch.mask, *clips)

    pieces = Pieces(policy, draw, prepare, predict, terms, measure, ratio=chosen.ratio)
    return on_policy(config, options, optimizer, kl, begin, pieces)
