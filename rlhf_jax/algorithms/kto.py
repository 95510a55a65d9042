"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, 2402.01306): a policy from completions marked good or bad.

The life of a batch: the completions go through policy and reference; so do, first and without gradient, the mismatched
sequences, each prompt with another row's completion, whose mean log-ratio is the point that gains and losses are
counted from. It is one number of the whole batch, however many microbatches see the rest.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from rlhf_jax.algorithms.accumulation import accumulated_gradients, by_parts
from rlhf_jax.algorithms.optimizer import apply_gradients
from rlhf_jax.algorithms.preference import PreferenceState, completion_logprob, initial_state
from rlhf_jax.algorithms.trained import assemble
from rlhf_jax.losses.preference import check_positive, implicit_reward
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.unpaired import kto_loss, kto_reference_point
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.types import Algorithm, Metrics, Params, Sequences, UnpairedBatch


def counted(sequences: Sequences) -> Bool[Array, " B"]:
    """Which rows count: those with completion tokens; a row that only fills the batch has none."""
    return sequences.loss_mask.any(axis=-1)


def reference_point(
    config: ModelConfig, policy: Params, reference: Params, mismatched: Sequences, parts: int = 1
) -> Float[Array, ""]:
    """z0 of a batch, see `losses.unpaired.kto_reference_point`.

    Args:
        config: shape of both policies.
        policy: parameters of the policy.
        reference: parameters of the reference.
        mismatched: prompts with the completions of other rows, [B, S].
        parts: microbatches in which they are read, one after the other.

    Raises:
        ValueError: one row alone, or rows that do not split into so many parts.
    """

    def read(part: Sequences) -> tuple[Array, Array]:
        return completion_logprob(config, policy, part), completion_logprob(config, reference, part)

    return kto_reference_point(*by_parts(read, mismatched, parts), counted(mismatched))


def kto(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    beta: float = 0.1,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
    adapter: AdapterConfig | None = None,
    accumulate: int = 1,
) -> Algorithm:
    """KTO as an offline `Algorithm`.

    Args:
        config: shape of the policy.
        optimizer: an optax optimiser of what is trained.
        beta: how strongly the policy is held to its reference, 1 / nat.
        good_weight: weight of good completions.
        bad_weight: weight of bad ones; see `kto/weight_ratio` for a good choice of the two.
        adapter: train this adapter on the policy, which stays as it is and is the reference; None: train the policy.
        accumulate: microbatches that an update sees one after the other, to need less memory.

    Returns:
        `init(key, params={"policy": tree, "reference"?: tree})` (the reference is the policy at the start if not given)
        and `update(state, UnpairedBatch)` with the metrics `loss/policy`, `rewards/{chosen,rejected,margins}` (of good
        and of bad completions; the difference of the two means), `logps/{chosen,rejected}`, `kto/reference_point` (z0,
        nats), `kto/weight_ratio` (the good rows' weight in the batch by that of the bad ones, which should be from 1 to
        4/3; infinite where none is bad), `grad_norm` and `lr`.

    Raises:
        ValueError: `beta` or a weight is not positive; or, of `update`, a batch of one row.
    """
    for name, value in (("beta", beta), ("good_weight", good_weight), ("bad_weight", bad_weight)):
        check_positive(name, value)

    def init(key: Array, params: Params | None = None) -> PreferenceState:
        return initial_state(config, optimizer, adapter, True, key, params)

    def metrics_of(found: dict[str, Array], batch: UnpairedBatch) -> Metrics:
        """What is logged of a whole batch."""
        rows = counted(batch.completions)
        sides = {"chosen": rows & batch.good, "rejected": rows & ~batch.good}
        rewards = implicit_reward(found["logprob"], found["reference_logprob"], beta)
        by_side = {
            f"{name}/{side}": mean(values[:, None], mask[:, None])
            for name, values in (("rewards", rewards), ("logps", found["logprob"]))
            for side, mask in sides.items()
        }
        share = mean(batch.good.astype(jnp.float32)[:, None], rows[:, None])
        return by_side | {
            "rewards/margins": by_side["rewards/chosen"] - by_side["rewards/rejected"],
            "kto/weight_ratio": good_weight * share / (bad_weight * (1.0 - share)),
        }

    def update(state: PreferenceState, batch: UnpairedBatch) -> tuple[PreferenceState, Metrics]:
        policy = assemble(state.reference, state.params, adapter)
        point = reference_point(config, policy, state.reference, batch.mismatched, accumulate)

        def total(found: dict[str, Array], part: UnpairedBatch, whole: UnpairedBatch) -> Array:
            each = kto_loss(
                found["logprob"], found["reference_logprob"], part.good, point, beta, good_weight, bad_weight
            )
            rows, of_all = counted(part.completions), counted(whole.completions)
            return mean(each[:, None], rows[:, None], whole=of_all[:, None])

        def objective(params: Params, part: UnpairedBatch, whole: UnpairedBatch):
            policy = assemble(state.reference, params, adapter)
            found = {
                "logprob": completion_logprob(config, policy, part.completions),
                "reference_logprob": completion_logprob(config, state.reference, part.completions),
            }
            return total(found, part, whole), found

        gradients, found = accumulated_gradients(objective, state.params, batch, accumulate)
        params, optimizer_state, step_metrics = apply_gradients(
            optimizer, gradients, state.optimizer_state, state.params
        )
        metrics = {"loss/policy": total(found, batch, batch)} | metrics_of(found, batch)
        after = state.replace(params=params, optimizer_state=optimizer_state, step=state.step + 1)
        return after, metrics | {"kto/reference_point": point} | step_metrics

    return Algorithm(init=init, rollout=None, update=update)
