"""Direct preference optimisation (Rafailov et al. 2023, 2305.18290): a policy from preferences, without a reward model.

The life of a batch: chosen and rejected sequences go through the policy as one batch of twice the size, and through the
frozen reference likewise; the log-probabilities of each completion's tokens are summed; the loss is Bradley-Terry on
the rewards that the policy stands for, beta log(pi / ref).
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms.accumulation import accumulated_gradients
from rlhf_jax.algorithms.likelihood import next_token_logprob
from rlhf_jax.algorithms.optimizer import apply_gradients
from rlhf_jax.algorithms.trained import assemble, reference_policy, trainable, without_shared_arrays
from rlhf_jax.losses.preference import dpo_loss, implicit_reward
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.reward import preference_accuracy
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy
from rlhf_jax.types import Algorithm, Metrics, Params, PreferenceBatch


@chex.dataclass(frozen=True)
class DPOState:
    """Everything DPO carries from one update to the next.

    Attributes:
        params: the policy, or the adapter that is trained on the reference.
        reference: the frozen policy.
        optimizer_state: the optimiser's state.
        step: number of updates so far, int32.
    """

    params: Params
    reference: Params
    optimizer_state: optax.OptState
    step: Int[Array, ""]


@chex.dataclass(frozen=True)
class CompletionLogprobs:
    """log pi(completion | prompt) of both sides of B pairs, under the policy and its reference, in nats, [B]."""

    chosen: Float[Array, " B"]
    rejected: Float[Array, " B"]
    reference_chosen: Float[Array, " B"]
    reference_rejected: Float[Array, " B"]


@partial(jax.jit, static_argnames="config")
def preference_logprobs(
    config: ModelConfig, policy: Params, batch: PreferenceBatch
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """log pi(completion | prompt) of the chosen and of the rejected sequences, in nats, [B] each.

    Args:
        config: the policy's shape.
        policy: its parameters.
        batch: B pairs with `loss_mask`; the tokens that it marks are summed.

    Raises:
        ValueError: a side has no `loss_mask`.
    """
    if batch.chosen.loss_mask is None or batch.rejected.loss_mask is None:
        raise ValueError("The pairs do not say where completions begin; give chosen and rejected a loss_mask.")
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), batch.chosen, batch.rejected)
    by_token = next_token_logprob(config, policy, both.tokens, both.mask)
    logprob = jnp.where(both.loss_mask[:, 1:], by_token, 0.0).sum(axis=-1)
    return logprob[: len(batch.margin)], logprob[len(batch.margin) :]


def counted(batch: PreferenceBatch) -> Bool[Array, " B"]:
    """Which pairs count: those with completion tokens on both sides; a row that only fills the batch has none."""
    return batch.chosen.loss_mask.any(axis=-1) & batch.rejected.loss_mask.any(axis=-1)


@partial(jax.jit, static_argnames="config")
def implicit_rewards(
    config: ModelConfig, policy: Params, reference: Params, batch: PreferenceBatch, beta: Float[Array, ""] | float
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """beta log(pi / ref) of the chosen and of the rejected completions, [B] each: for evaluation on held-out pairs."""
    chosen, rejected = preference_logprobs(config, policy, batch)
    reference_chosen, reference_rejected = preference_logprobs(config, reference, batch)
    return implicit_reward(chosen, reference_chosen, beta), implicit_reward(rejected, reference_rejected, beta)


def dpo(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    adapter: AdapterConfig | None = None,
    accumulate: int = 1,
) -> Algorithm:
    """DPO as an offline `Algorithm`.

    A pair of which a side has no completion tokens (a row that only fills the batch) has weight 0. Margins of the batch
    are not used.

    Args:
        config: shape of the policy.
        optimizer: an optax optimiser of what is trained.
        beta: how strongly the policy is held to its reference, reward units a nat.
        label_smoothing: the share of labels that are taken to be wrong, in [0, 1/2).
        adapter: train this adapter on the policy, which stays as it is and is the reference; None: train the policy.
        accumulate: microbatches that an update sees one after the other, to need less memory.

    Returns:
        `init(key, params={"policy": tree, "reference"?: tree})` (the reference is the policy at the start if not given)
        and `update(state, PreferenceBatch)` with the metrics `loss/policy`,
        `rewards/{chosen,rejected,accuracies,margins}`, `logps/{chosen,rejected}`, `grad_norm` and `lr`.

    Raises:
        ValueError: `beta` is not positive, or `label_smoothing` outside [0, 1/2).
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta!r}; it must be positive")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing!r}; it must be at least 0 and below 1/2")

    def init(key: Array, params: Params | None = None) -> DPOState:
        given = params or {}
        policy = given["policy"] if "policy" in given else init_policy(config, key)
        trained = trainable(policy, adapter, key)
        state = DPOState(
            params=trained,
            reference=reference_policy(given, policy, adapter),
            optimizer_state=optimizer.init(trained),
            step=jnp.int32(0),
        )
        return without_shared_arrays(state)

    def terms(found: CompletionLogprobs, batch: PreferenceBatch, whole: PreferenceBatch) -> Metrics:
        """Loss and metrics of some rows: their parts of those of the `whole` batch."""

        def average(values: Float[Array, " B"]) -> Float[Array, ""]:
            return mean(values[:, None], counted(batch)[:, None], whole=counted(whole)[:, None])

        each = (found.chosen, found.rejected, found.reference_chosen, found.reference_rejected)
        chosen_reward = implicit_reward(found.chosen, found.reference_chosen, beta)
        rejected_reward = implicit_reward(found.rejected, found.reference_rejected, beta)
        return {
            "loss/policy": average(dpo_loss(*each, beta, label_smoothing)),
            "rewards/chosen": average(chosen_reward),
            "rewards/rejected": average(rejected_reward),
            "rewards/accuracies": average(preference_accuracy(chosen_reward, rejected_reward)),
            "rewards/margins": average(chosen_reward - rejected_reward),
            "logps/chosen": average(found.chosen),
            "logps/rejected": average(found.rejected),
        }

    def update(state: DPOState, batch: PreferenceBatch) -> tuple[DPOState, Metrics]:
        def loss(params: Params, part: PreferenceBatch, whole: PreferenceBatch):
            chosen, rejected = preference_logprobs(config, assemble(state.reference, params, adapter), part)
            reference_chosen, reference_rejected = preference_logprobs(config, state.reference, part)
            found = CompletionLogprobs(
                chosen=chosen,
                rejected=rejected,
                reference_chosen=reference_chosen,
                reference_rejected=reference_rejected,
            )
            return terms(found, part, whole)["loss/policy"], found

        gradients, found = accumulated_gradients(loss, state.params, batch, accumulate)
        metrics = terms(found, batch, batch)
        params, optimizer_state, step_metrics = apply_gradients(
            optimizer, gradients, state.optimizer_state, state.params
        )
        state = state.replace(params=params, optimizer_state=optimizer_state, step=state.step + 1)
        return state, metrics | step_metrics

    return Algorithm(init=init, rollout=None, update=update)
