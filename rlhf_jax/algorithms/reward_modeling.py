"""Bradley-Terry reward modelling; an ensemble is `jax.vmap` over the state."""

from functools import partial
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms.accumulation import accumulated_gradients
from rlhf_jax.algorithms.optimizer import apply_gradients
from rlhf_jax.algorithms.trained import assemble, trainable
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.reward import bradley_terry, preference_accuracy
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import apply_head, init_reward_model, reward_features
from rlhf_jax.types import Algorithm, Metrics, Params, PreferenceBatch

Scores = tuple[Float[Array, " B"], Float[Array, " B"]]


@chex.dataclass(frozen=True)
class RewardModelState:
    """Everything reward modelling carries from one update to the next.

    Attributes:
        params: `{"trunk": tree, "head": tree}`; the trunk's tree is its adapter where one is trained.
        base: `{"trunk": tree}`, frozen, under the adapter; None without one.
        optimizer_state: the optimiser's state.
        step: number of updates so far, int32.
    """

    params: Params
    base: Params | None
    optimizer_state: optax.OptState
    step: Int[Array, ""]


@partial(jax.jit, static_argnames=("config", "features"))
def preference_scores(
    config: ModelConfig,
    params: Params,
    batch: PreferenceBatch,
    features: Literal["final_norm", "pre_norm"] = "final_norm",
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Rewards of the chosen and of the rejected sequences, float32 [B] each: both go through the model at once.

    Args:
        config: shape of the reward model's trunk.
        params: `{"trunk", "head"}`.
        batch: B pairs.
        features: what the reward head reads, see `models.heads.reward_features`.
    """
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), batch.chosen, batch.rejected)
    vectors = reward_features(config, params["trunk"], both.tokens, both.mask, features)
    scores = apply_head(params["head"], vectors)
    return scores[: len(batch.margin)], scores[len(batch.margin) :]


def counted(batch: PreferenceBatch) -> Bool[Array, " B"]:
    """Which pairs count: those with tokens on both sides; a row that only fills the batch has none."""
    return batch.chosen.mask.any(axis=-1) & batch.rejected.mask.any(axis=-1)


def reward_modeling(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    features: Literal["final_norm", "pre_norm"] = "final_norm",
    label_smoothing: float = 0.0,
    centring: float = 0.0,
    adapter: AdapterConfig | None = None,
    accumulate: int = 1,
) -> Algorithm:
    """Bradley-Terry training as an offline `Algorithm`.

    A pair of which a side has no tokens (a row that only fills the batch) has weight 0.

    Args:
        config: shape of the reward model's trunk.
        optimizer: an optax optimiser of what is trained.
        features: what the reward head reads, see `models.heads.reward_features`.
        label_smoothing: probability that a label is taken to be flipped.
        centring: weight of (chosen + rejected reward)^2, which fixes the free constant of each prompt.
        adapter: train this adapter on the trunk, which stays as it is, and the head; None: train trunk and head.
        accumulate: microbatches that an update sees one after the other, to need less memory.

    Returns:
        `init(key, params={"trunk": tree, "head"?: tree})` (without a head a fresh one, without params a fresh trunk
        too) and `update(state, PreferenceBatch)` with the metrics `loss/reward`,
        `rewards/{chosen,rejected,accuracies,margins}`, `grad_norm` and `lr`.
    """

    def init(key: Array, params: Params | None = None) -> RewardModelState:
        given = params or {}
        fresh = init_reward_model(config, key, given.get("trunk"))
        base = {"trunk": fresh["trunk"]}
        trunk = fresh["trunk"] if adapter is None else trainable(base, adapter, key)
        trained = {"trunk": trunk, "head": given.get("head", fresh["head"])}
        return RewardModelState(
            params=trained,
            base=None if adapter is None else base,
            optimizer_state=optimizer.init(trained),
            step=jnp.int32(0),
        )

    def terms(found: Scores, batch: PreferenceBatch, whole: PreferenceBatch) -> Metrics:
        """Loss and metrics of some rows: their parts of those of the `whole` batch."""

        def average(values: Float[Array, " B"]) -> Float[Array, ""]:
            return mean(values[:, None], counted(batch)[:, None], whole=counted(whole)[:, None])

        chosen, rejected = found
        return {
            "loss/reward": average(bradley_terry(chosen, rejected, batch.margin, label_smoothing, centring)),
            "rewards/chosen": average(chosen),
            "rewards/rejected": average(rejected),
            "rewards/accuracies": average(preference_accuracy(chosen, rejected)),
            "rewards/margins": average(chosen - rejected),
        }

    def update(state: RewardModelState, batch: PreferenceBatch) -> tuple[RewardModelState, Metrics]:
        def loss(params: Params, part: PreferenceBatch, whole: PreferenceBatch) -> tuple[Float[Array, ""], Scores]:
            model = params
            if adapter is not None:
                model = assemble(state.base, params["trunk"], adapter) | {"head": params["head"]}
            found = preference_scores(config, model, part, features)
            return terms(found, part, whole)["loss/reward"], found

        gradients, found = accumulated_gradients(loss, state.params, batch, accumulate)
        metrics = terms(found, batch, batch)
        params, optimizer_state, step_metrics = apply_gradients(
            optimizer, gradients, state.optimizer_state, state.params
        )
        state = state.replace(params=params, optimizer_state=optimizer_state, step=state.step + 1)
        return state, metrics | step_metrics

    return Algorithm(init=init, rollout=None, update=update)
