"""Bradley-Terry reward modelling; an ensemble is `jax.vmap` over the state."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from rlhf_jax.algorithms.optimizer import apply_gradients
from rlhf_jax.losses.reward import bradley_terry, preference_accuracy
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import apply_head, init_reward_model, reward_features
from rlhf_jax.types import Algorithm, Metrics, Params, PreferenceBatch


@chex.dataclass(frozen=True)
class RewardModelState:
    """Reward-model parameters, their optimiser's state, and the number of updates (int32)."""

    params: Params
    optimizer_state: optax.OptState
    step: Int[Array, ""]


def reward_modeling(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    features: Literal["final_norm", "pre_norm"] = "final_norm",
    label_smoothing: float = 0.0,
    centring: float = 0.0,
) -> Algorithm:
    """Bradley-Terry training as an offline `Algorithm`.

    Args:
        config: shape of the reward model's trunk.
        optimizer: an optax optimiser.
        features: what the reward head reads, see `models.heads.reward_features`.
        label_smoothing: probability that a label is taken to be flipped.
        centring: weight of (chosen + rejected reward)^2, which fixes the free constant of each prompt.

    Returns:
        `init(key, params={"trunk": tree})` (a fresh head on the given trunk; without params a fresh trunk too) and
        `update(state, PreferenceBatch)` with the metrics `loss/reward`, `rewards/{chosen,rejected,accuracies,margins}`
        and `grad_norm`.
    """

    def init(key: Array, params: Params | None = None) -> RewardModelState:
        model = init_reward_model(config, key, None if params is None else params["trunk"])
        return RewardModelState(params=model, optimizer_state=optimizer.init(model), step=jnp.int32(0))

    def loss(params: Params, batch: PreferenceBatch):
        pairs = len(batch.margin)
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), batch.chosen, batch.rejected)
        vectors = reward_features(config, params["trunk"], both.tokens, both.mask, features)
        scores = apply_head(params["head"], vectors)
        chosen, rejected = scores[:pairs], scores[pairs:]
        return bradley_terry(chosen, rejected, batch.margin, label_smoothing, centring).mean(), (chosen, rejected)

    def update(state: RewardModelState, batch: PreferenceBatch) -> tuple[RewardModelState, Metrics]:
        (value, (chosen, rejected)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        params, optimizer_state, norm = apply_gradients(optimizer, gradients, state.optimizer_state, state.params)
        metrics = {
            "loss/reward": value,
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": preference_accuracy(chosen, rejected).mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "grad_norm": norm,
        }
        return RewardModelState(params=params, optimizer_state=optimizer_state, step=state.step + 1), metrics

    return Algorithm(init=init, rollout=None, update=update)
