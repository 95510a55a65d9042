"""Supervised fine-tuning: maximum likelihood of demonstrated responses."""

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from rlhf_jax.algorithms.optimizer import apply_gradients
from rlhf_jax.losses.logprobs import token_logprob
from rlhf_jax.losses.reduce import mean
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy, unembed
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.types import Algorithm, Demonstrations, Metrics, Params


@chex.dataclass(frozen=True)
class SFTState:
    """Policy parameters, their optimiser's state, and the number of updates (int32)."""

    params: Params
    optimizer_state: optax.OptState
    step: Int[Array, ""]


def negative_log_likelihood(config: ModelConfig, params: Params, batch: Demonstrations) -> Float[Array, ""]:
    """Mean over response tokens of -log pi(token | tokens before it), in nats a token."""
    hidden = apply_trunk(config, params["trunk"], batch.tokens, batch.mask).final
    logprob = token_logprob(unembed(config, params, hidden[:, :-1]), batch.tokens[:, 1:])
    return -mean(logprob, batch.loss_mask[:, 1:], "token_mean")


def sft(config: ModelConfig, optimizer: optax.GradientTransformation) -> Algorithm:
    """Supervised fine-tuning as an offline `Algorithm`.

    `init(key, params={"policy": tree})` or, without params, a fresh policy; `update(state, Demonstrations)` returns
    the metrics `loss/policy` (nats a token) and `grad_norm`.
    """

    def init(key: Array, params: Params | None = None) -> SFTState:
        policy = init_policy(config, key) if params is None else params["policy"]
        return SFTState(params=policy, optimizer_state=optimizer.init(policy), step=jnp.int32(0))

    def update(state: SFTState, batch: Demonstrations) -> tuple[SFTState, Metrics]:
        loss, gradients = jax.value_and_grad(lambda params: negative_log_likelihood(config, params, batch))(
            state.params
        )
        params, optimizer_state, norm = apply_gradients(optimizer, gradients, state.optimizer_state, state.params)
        state = SFTState(params=params, optimizer_state=optimizer_state, step=state.step + 1)
        return state, {"loss/policy": loss, "grad_norm": norm}

    return Algorithm(init=init, rollout=None, update=update)
