"""Heads on the trunk, and the parameter trees by role.

Roles are plain dictionaries: a policy is `{"trunk", "unembedding"}` (no `unembedding` where embeddings are tied), a
value net or a reward model is `{"trunk", "head"}`, and a value head on the policy's trunk is just `{"head"}`.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.attention import capped
from rlhf_jax.models.chunked_logprobs import hidden_logprob, positions_at_once
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.memory import on_device
from rlhf_jax.models.partitioning import by_device, gather_width, parts_of
from rlhf_jax.models.transformer import Hidden, apply_trunk, init_trunk
from rlhf_jax.types import Params, Rollout, at_least_float32, wide

FEATURES = ("final_norm", "pre_norm")


def init_policy(config: ModelConfig, key: Array) -> Params:
    """A fresh policy."""
    trunk_key, head_key = jax.random.split(key)
    params = {"trunk": init_trunk(config, trunk_key)}
    if not config.tied_embeddings:
        shape = (config.width, config.vocab_size)
        params["unembedding"] = config.initializer_range * jax.random.normal(head_key, shape, config.param_dtype)
    return params


def init_value_head(config: ModelConfig) -> Params:
    """A value head that predicts 0 everywhere until it is trained: `{"kernel": [D], "bias": []}`."""
    return {"kernel": jnp.zeros(config.width, config.param_dtype), "bias": jnp.zeros((), config.param_dtype)}


def init_reward_head(config: ModelConfig, key: Array) -> Params:
    """A reward head with a normal kernel of variance 1 / (D + 1) (Stiennon et al. 2020, 2009.01325) and bias 0."""
    kernel = jax.random.normal(key, (config.width,), config.param_dtype) * (config.width + 1) ** -0.5
    return {"kernel": kernel, "bias": jnp.zeros((), config.param_dtype)}


def init_reward_model(config: ModelConfig, key: Array, trunk: Params | None = None) -> Params:
    """A reward model with a fresh head, on a given trunk (of an SFT policy, say) or a fresh one."""
    trunk_key, head_key = jax.random.split(key)
    return {
        "trunk": init_trunk(config, trunk_key) if trunk is None else trunk,
        "head": init_reward_head(config, head_key),
    }


def unembed(config: ModelConfig, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Token logits of hidden states (after the last norm), accumulated and returned in at least float32.

    Where the model caps its logits (Gemma 2), they are c tanh(logits / c). For the log-probabilities of given tokens,
    `token_scores` does without them.
    """
    kernel, vocabulary_axis = unembedding_kernel(config, params, hidden.dtype)
    kernel = kernel if vocabulary_axis == 1 else kernel.T
    logits = jnp.matmul(hidden, kernel, preferred_element_type=wide(hidden))
    return capped(logits, config.logit_softcap)


def token_scores(
    config: ModelConfig,
    params: Params,
    states: Float[Array, "B N D"],
    targets: Int[Array, "B N"],
    temperature: Float[Array, ""] | float | int = 1.0,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """Log-probability of given tokens under a policy, and its entropy, from the hidden states that predict them.

    Logits of all positions never exist at once, see `hidden_logprob`. On a mesh each device walks the positions that it
    has; a split vocabulary costs three sums a position, and the parameters are gathered once, before the walk.

    Args:
        config: the policy's shape.
        params: its parameters.
        states: hidden states after the last norm, [B, N, D]; those at position t predict the token at t + 1.
        targets: those tokens, int32 [B, N].
        temperature: tau > 0.

    Returns:
        Log-probabilities and entropies in nats, [B, N] each, float32 or better.

    Raises:
        ValueError: the temperature is a Python number that is not positive.
    """
    kernel, vocabulary_axis = unembedding_kernel(config, params, states.dtype)
    vocabulary = config.vocab_size // parts_of("vocabulary", config.vocab_size)
    score = partial(
        hidden_logprob,
        temperature=temperature,
        softcap=config.logit_softcap,
        vocabulary_axis=vocabulary_axis,
        block=positions_at_once(states.shape[0] // parts_of("batch", states.shape[0]), vocabulary),
    )
    return by_device(lambda states, targets, kernel: score(states, kernel, targets), (states, targets), (kernel,))


def unembedding_kernel(config: ModelConfig, params: Params, dtype: jnp.dtype) -> tuple[Array, int]:
    """The kernel of the logits in this dtype, its width gathered on a mesh, and the axis that counts tokens."""
    if config.tied_embeddings:
        kernel = on_device(params["trunk"]["embed"]["embedding"]).astype(dtype)
        return gather_width(kernel, "vocabulary", "width"), 0
    return gather_width(on_device(params["unembedding"]).astype(dtype), "width", "vocabulary"), 1


def apply_head(head: Params, features: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """The scalar features . kernel + bias, in at least float32 at the highest precision."""
    dtype = wide(features)
    out = jnp.einsum("...d,d->...", features.astype(dtype), head["kernel"].astype(dtype), precision="highest")
    return out + head["bias"].astype(dtype)


def response_states(hidden: Float[Array, "B S D"], response_length: int) -> Float[Array, "B T D"]:
    """The hidden states that predict the last T tokens: those one position earlier."""
    return hidden[:, -response_length - 1 : -1]


def response_logits(config: ModelConfig, params: Params, rollout: Rollout) -> Float[Array, "B T V"]:
    """Logits of a policy for each response token of a rollout."""
    hidden = apply_trunk(config, params["trunk"], rollout.sequences.tokens, rollout.sequences.mask).final
    return unembed(config, params, response_states(hidden, rollout.tokens.shape[1]))


def last_token(states: Float[Array, "B S D"], mask: Bool[Array, "B S"]) -> Float[Array, "B D"]:
    """The state at the last real token of each row; at position 0 where a row has none.

    Example:
        >>> states = jnp.arange(3.0)[None, :, None]
        >>> last_token(states, jnp.array([[True, True, False]])).tolist()
        [[1.0]]
    """
    last = jnp.where(mask, jnp.arange(mask.shape[1])[None], 0).max(axis=-1)
    return jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]


def reward_features(
    config: ModelConfig,
    trunk: Params,
    tokens: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    kind: Literal["final_norm", "pre_norm"] = "final_norm",
) -> Float[Array, "B D"]:
    """The vector that a reward head multiplies: the state at the last real token, in at least float32.

    `final_norm` is the usual choice (that of `…ForSequenceClassification`); `pre_norm` reads the residual stream, whose
    length still tells how far a text is from the training data, which RMSNorm removes.
    """
    hidden: Hidden = apply_trunk(config, trunk, tokens, mask)
    if kind not in FEATURES:
        raise ValueError(f"features are {kind!r}; choose one of {', '.join(FEATURES)}.")
    features = last_token(hidden.final if kind == "final_norm" else hidden.residual, mask)
    return at_least_float32(features)
