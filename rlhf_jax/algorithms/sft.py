"""Supervised fine-tuning: maximum likelihood of demonstrated responses."""

import chex
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from rlhf_jax.algorithms.accumulation import accumulated_gradients
from rlhf_jax.algorithms.likelihood import next_token_logprob
from rlhf_jax.algorithms.optimizer import apply_gradients
from rlhf_jax.algorithms.trained import assemble, trainable
from rlhf_jax.losses.reduce import mean
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy
from rlhf_jax.types import Algorithm, Demonstrations, Metrics, Params


@chex.dataclass(frozen=True)
class SFTState:
    """Everything supervised fine-tuning carries from one update to the next.

    Attributes:
        params: the policy, or the adapter that is trained on it.
        base: the frozen policy under the adapter; None without one.
        optimizer_state: the optimiser's state.
        step: number of updates so far, int32.
    """

    params: Params
    base: Params | None
    optimizer_state: optax.OptState
    step: Int[Array, ""]


def negative_log_likelihood(
    config: ModelConfig, policy: Params, batch: Demonstrations, whole: Demonstrations | None = None
) -> tuple[Float[Array, ""], Float[Array, "B N"]]:
    """Mean over response tokens of -log pi(token | tokens before it), in nats a token; 0 where there are none.

    Args:
        config: the policy's shape.
        policy: its parameters.
        batch: demonstrations.
        whole: the batch that they are a part of, to whose mean they give their part; None: they are all of it.

    Returns:
        The mean, or part of it, and the log-probability of every token but the first of each row.
    """
    logprob = next_token_logprob(config, policy, batch.tokens, batch.mask, batch.segments)
    counted = None if whole is None else whole.loss_mask[:, 1:]
    return mean(-logprob, batch.loss_mask[:, 1:], whole=counted), logprob


def sft(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    adapter: AdapterConfig | None = None,
    accumulate: int = 1,
) -> Algorithm:
    """Supervised fine-tuning as an offline `Algorithm`.

    `init(key, params={"policy": tree})` or, without params, a fresh policy; `update(state, Demonstrations)` returns
    the metrics `loss/policy` (nats a token), `grad_norm` and `lr`.

    Args:
        config: shape of the policy.
        optimizer: an optax optimiser of what is trained.
        adapter: train this adapter on the policy, which stays as it is; None: train the policy.
        accumulate: microbatches that an update sees one after the other, to need less memory.
    """

    def init(key: Array, params: Params | None = None) -> SFTState:
        policy = init_policy(config, key) if params is None else params["policy"]
        trained = trainable(policy, adapter, key)
        return SFTState(
            params=trained,
            base=None if adapter is None else policy,
            optimizer_state=optimizer.init(trained),
            step=jnp.int32(0),
        )

    def update(state: SFTState, batch: Demonstrations) -> tuple[SFTState, Metrics]:
        def loss(params: Params, part: Demonstrations, whole: Demonstrations):
            return negative_log_likelihood(config, assemble(state.base, params, adapter), part, whole)

        gradients, logprob = accumulated_gradients(loss, state.params, batch, accumulate)
        value = mean(-logprob, batch.loss_mask[:, 1:])
        params, optimizer_state, metrics = apply_gradients(optimizer, gradients, state.optimizer_state, state.params)
        state = state.replace(params=params, optimizer_state=optimizer_state, step=state.step + 1)
        return state, {"loss/policy": value} | metrics

    return Algorithm(init=init, rollout=None, update=update)
