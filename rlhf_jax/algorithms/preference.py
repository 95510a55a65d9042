"""A policy from pairs of completions, without a reward model: DPO and the losses beside it.

The life of a batch: chosen and rejected sequences go through the policy as one batch of twice the size, and through the
frozen reference likewise, if the loss has one; the log-probabilities of each completion's tokens are summed; the loss
sees these sums and the numbers of tokens.
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
from rlhf_jax.algorithms.trained import assemble, check_roles, reference_policy, trainable, without_shared_arrays
from rlhf_jax.losses.preference import CompletionLogprobs
from rlhf_jax.losses.preference_choices import PreferenceLoss
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.reference_free import average_logprob
from rlhf_jax.losses.reward import preference_accuracy
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy
from rlhf_jax.types import Algorithm, Metrics, Params, PreferenceBatch, Sequences


@chex.dataclass(frozen=True)
class PreferenceState:
    """Everything that learning from preferences carries from one update to the next.

    Attributes:
        params: the policy, or the adapter that is trained on the reference.
        reference: the frozen policy; None where the loss needs none and there is no adapter on it.
        optimizer_state: the optimiser's state.
        step: number of updates so far, int32.
    """

    params: Params
    reference: Params | None
    optimizer_state: optax.OptState
    step: Int[Array, ""]


def initial_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    adapter: AdapterConfig | None,
    needs_reference: bool,
    key: Array,
    params: Params | None,
) -> PreferenceState:
    """The first state of `preference` and `kto`.

    Raises:
        ValueError: a reference is given that the loss does not need, or beside an adapter.
    """
    given = params or {}
    check_roles(given, ("policy", "reference"))
    if "reference" in given and not needs_reference:
        raise ValueError("The loss needs no reference policy; leave out params['reference'].")
    policy = given["policy"] if "policy" in given else init_policy(config, key)
    trained = trainable(policy, adapter, key)
    kept = needs_reference or adapter is not None
    state = PreferenceState(
        params=trained,
        reference=reference_policy(given, policy, adapter) if kept else None,
        optimizer_state=optimizer.init(trained),
        step=jnp.int32(0),
    )
    return without_shared_arrays(state)


@partial(jax.jit, static_argnames="config")
def completion_logprob(config: ModelConfig, policy: Params, sequences: Sequences) -> Float[Array, " B"]:
    """log pi(completion | prompt) of whole sequences: the tokens of each completion summed, [B], nats.

    Args:
        config: the policy's shape.
        policy: its parameters.
        sequences: B sequences with `loss_mask`; the tokens that it marks are summed.

    Raises:
        ValueError: there is no `loss_mask`.
    """
    if sequences.loss_mask is None:
        raise ValueError("The sequences do not say where completions begin; give them a loss_mask.")
    by_token = next_token_logprob(config, policy, sequences.tokens, sequences.mask)
    return jnp.where(sequences.loss_mask[:, 1:], by_token, 0.0).sum(axis=-1)


def completion_logprobs(
    config: ModelConfig, policy: Params, reference: Params | None, batch: PreferenceBatch
) -> CompletionLogprobs:
    """What a loss may know of a batch of pairs.

    Args:
        config: shape of both policies.
        policy: parameters of the policy.
        reference: parameters of the reference; None: it is not run.
        batch: B pairs with `loss_mask`.

    Raises:
        ValueError: a side has no `loss_mask`.
    """
    if batch.chosen.loss_mask is None or batch.rejected.loss_mask is None:
        raise ValueError("The pairs do not say where completions begin; give chosen and rejected a loss_mask.")
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), batch.chosen, batch.rejected)
    pairs = len(batch.margin)
    logprob, length = completion_logprob(config, policy, both), both.loss_mask.sum(axis=-1)
    found = CompletionLogprobs(
        chosen=logprob[:pairs],
        rejected=logprob[pairs:],
        chosen_length=length[:pairs],
        rejected_length=length[pairs:],
    )
    if reference is None:
        return found
    frozen = completion_logprob(config, reference, both)
    return found.replace(reference_chosen=frozen[:pairs], reference_rejected=frozen[pairs:])


def counted(batch: PreferenceBatch) -> Bool[Array, " B"]:
    """Which pairs count: those with completion tokens on both sides; a row that only fills the batch has none."""
    return batch.chosen.loss_mask.any(axis=-1) & batch.rejected.loss_mask.any(axis=-1)


def preference(
    config: ModelConfig,
    loss: PreferenceLoss,
    optimizer: optax.GradientTransformation,
    adapter: AdapterConfig | None = None,
    accumulate: int = 1,
) -> Algorithm:
    """Learning from pairs as an offline `Algorithm`.

    A pair of which a side has no completion tokens (a row that only fills the batch) has weight 0. Margins of the batch
    are not used.

    Args:
        config: shape of the policy.
        loss: what is minimised, such as `preference_loss("dpo", beta=0.1)`.
        optimizer: an optax optimiser of what is trained.
        adapter: train this adapter on the policy, which stays as it is and is the reference; None: train the policy.
        accumulate: microbatches that an update sees one after the other, to need less memory.

    Returns:
        `init(key, params={"policy": tree, "reference"?: tree})` (the reference is the policy at the start if not given)
        and `update(state, PreferenceBatch)` with the metrics `loss/policy` (what is minimised), `loss/nll` where the
        loss has a likelihood, `rewards/{chosen,rejected,accuracies,margins}`, `logps/{chosen,rejected}`, the measures
        of the loss, `grad_norm` and `lr`.
    """

    def init(key: Array, params: Params | None = None) -> PreferenceState:
        return initial_state(config, optimizer, adapter, loss.reference, key, params)

    def terms(found: CompletionLogprobs, batch: PreferenceBatch, whole: PreferenceBatch) -> Metrics:
        """Loss and metrics of some rows: their parts of those of the `whole` batch."""

        def average(values: Float[Array, " B"]) -> Float[Array, ""]:
            return mean(values[:, None], counted(batch)[:, None], whole=counted(whole)[:, None])

        chosen, rejected = loss.rewards(found)
        metrics = {
            "loss/policy": average(loss.pairs(found)),
            "rewards/chosen": average(chosen),
            "rewards/rejected": average(rejected),
            "rewards/accuracies": average(preference_accuracy(chosen, rejected)),
            "rewards/margins": average(chosen - rejected),
            "logps/chosen": average(found.chosen),
            "logps/rejected": average(found.rejected),
        } | {name: average(measure(found)) for name, measure in loss.measures.items()}
        if loss.likelihood is not None:
            metrics["loss/nll"] = -chosen_likelihood(found, batch, whole)
            metrics["loss/policy"] += loss.likelihood * metrics["loss/nll"]
        return metrics

    def chosen_likelihood(
        found: CompletionLogprobs, batch: PreferenceBatch, whole: PreferenceBatch
    ) -> Float[Array, ""]:
        """Mean log-probability a token of the chosen completions, nats."""

        def weights(batch: PreferenceBatch) -> Float[Array, "B 1"]:
            length = batch.chosen.loss_mask.sum(axis=-1) if loss.likelihood_rule == "token_mean" else 1
            return jnp.where(counted(batch), length, 0).astype(jnp.float32)[:, None]

        values = average_logprob(found.chosen, found.chosen_length)
        return mean(values[:, None], weights(batch), whole=weights(whole))

    def update(state: PreferenceState, batch: PreferenceBatch) -> tuple[PreferenceState, Metrics]:
        if batch.label is not None:
            raise ValueError(
                "these losses take the chosen side as the better one, and the pairs have soft labels: leave out the "
                "column 'label', which is for reward models."
            )
        reference = state.reference if loss.reference else None

        def objective(params: Params, part: PreferenceBatch, whole: PreferenceBatch):
            found = completion_logprobs(config, assemble(state.reference, params, adapter), reference, part)
            return terms(found, part, whole)["loss/policy"], found

        gradients, found = accumulated_gradients(objective, state.params, batch, accumulate)
        params, optimizer_state, step_metrics = apply_gradients(
            optimizer, gradients, state.optimizer_state, state.params
        )
        after = state.replace(params=params, optimizer_state=optimizer_state, step=state.step + 1)
        return after, terms(found, batch, batch) | step_metrics

    return Algorithm(init=init, rollout=None, update=update)
