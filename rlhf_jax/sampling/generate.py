"""Responses from a policy, in one compiled loop.

The life of a token: the prompt is run once (prefill); its last state gives the first logits; a token is drawn with the
key of its (sequence, position); only that token is run against the key-value cache; and so on until every row has drawn
a stop token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.attention import new_cache, write
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import unembed
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.sampling.filters import SamplingConfig, filter_logits
from rlhf_jax.types import Params, Prompts, Rollout


def sequence_keys(key: Array, index: Int[Array, " B"]) -> Array:
    """One key a sequence: `key` with the sequence's index in the data folded in."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def draw(
    logits: Float[Array, "B V"], keys: Array, position: Int[Array, ""], sampling: SamplingConfig
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """One token a row, with its log-probability under the policy and under the sampling distribution.

    The token is the argmax of filtered logits plus Gumbel noise from the row's key with the position folded in.

    Args:
        logits: raw logits of the policy, float32.
        keys: one key a row.
        position: index of the token in the response.
        sampling: temperature and filters.

    Returns:
        Token ids int32 [B]; log-probabilities under the temperature-scaled unfiltered policy, float32 [B]; and under
        the distribution that was sampled from, float32 [B].
    """
    filtered = filter_logits(logits, sampling)
    token_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, position)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], logits.dtype))(token_keys)
    token = jnp.argmax(filtered + noise, axis=-1).astype(jnp.int32)

    def logprob(of: Float[Array, "B V"]) -> Float[Array, " B"]:
        return jnp.take_along_axis(jax.nn.log_softmax(of, axis=-1), token[:, None], axis=-1)[:, 0]

    policy_logprob = logprob(logits / sampling.logprob_temperature)
    return token, policy_logprob, logprob(filtered) if sampling.filtered else policy_logprob


def generate(config: ModelConfig, params: Params, prompts: Prompts, key: Array, sampling: SamplingConfig) -> Rollout:
    """Samples one response a prompt.

    A response depends on its prompt, its `prompts.index` and the key, not on the other rows, the amount of padding or
    the number of devices (to the rounding of the matrix products).

    Args:
        config: the policy's shape.
        params: the policy tree.
        prompts: left-padded prompts.
        key: a typed key; use another for each call.
        sampling: length, stop tokens, temperature and filters.

    Returns:
        The rollout, responses padded to T = `sampling.max_new_tokens`.

    Raises:
        ValueError: prompt and response together exceed the model's context, or a stop or pad token is not in the
            vocabulary.
    """
    batch, prompt_length = prompts.tokens.shape
    most = sampling.max_new_tokens
    if prompt_length + most > config.context_length:
        raise ValueError(
            f"prompts of {prompt_length} tokens and responses of {most} exceed the model's context of "
            f"{config.context_length}; shorten one of them."
        )
    for token in (*sampling.stop_tokens, sampling.pad_token):
        if not 0 <= token < config.vocab_size:
            raise ValueError(
                f"the stop or pad token {token} is not in the vocabulary of {config.vocab_size}; choose another."
            )
    keys = sequence_keys(key, prompts.index)
    stops = jnp.array(sampling.stop_tokens, jnp.int32)

    hidden = apply_trunk(config, params["trunk"], prompts.tokens, prompts.mask)
    cache = new_cache(hidden.keys, hidden.values, prompts.mask, prompt_length + most)
    blank = dict(
        tokens=jnp.full((batch, most), sampling.pad_token, jnp.int32),
        mask=jnp.zeros((batch, most), bool),
        logprob=jnp.zeros((batch, most), jnp.float32),
        sampling_logprob=jnp.zeros((batch, most), jnp.float32),
    )

    def take(position: Int[Array, ""], state: Float[Array, "B D"], done: Bool[Array, " B"], out: dict):
        """Draws the token at `position` for rows that are not done and writes it down."""
        token, logprob, sampling_logprob = draw(unembed(config, params, state), keys, position, sampling)
        token = jnp.where(done, sampling.pad_token, token)
        new = dict(
            tokens=token,
            mask=~done,
            logprob=jnp.where(done, 0.0, logprob),
            sampling_logprob=jnp.where(done, 0.0, sampling_logprob),
        )
        out = {name: out[name].at[:, position].set(new[name].astype(out[name].dtype)) for name in out}
        return token, done | (token[:, None] == stops[None]).any(axis=-1), out

    def unfinished(carry) -> Bool[Array, ""]:
        position, _, done, _, _ = carry
        return (position < most) & ~done.all()

    def step(carry):
        position, token, done, cache, out = carry
        hidden = apply_trunk(config, params["trunk"], token[:, None], ~done[:, None], cache)
        cache = write(cache, hidden.keys, hidden.values, ~done[:, None])
        token, done, out = take(position, hidden.final[:, 0], done, out)
        return position + 1, token, done, cache, out

    start = jnp.int32(0)
    token, done, out = take(start, hidden.final[:, -1], jnp.zeros(batch, bool), blank)
    _, _, done, _, out = jax.lax.while_loop(unfinished, step, (start + 1, token, done, cache, out))
    return Rollout(prompts=prompts, finished=done, **out)
