"""Responses from a policy, or from a mixture of two, in one compiled loop.

The life of a token: the prompt is run once (prefill); its last state gives the first logits; a token is drawn with the
key of its (sequence, position); only that token is run against the key-value cache; and so on until every row has drawn
a stop token. Of several policies each has its cache, and all go on with the token that was drawn from their mixture.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.attention import Cache, new_cache, write
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import unembed
from rlhf_jax.models.transformer import Hidden, apply_trunk
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
    return _decode(config, (params,), lambda logits: logits, prompts, key, sampling)


def generate_mixture(
    config: ModelConfig,
    params: Params,
    other: Params,
    eta: Float[Array, ""] | float,
    prompts: Prompts,
    key: Array,
    sampling: SamplingConfig,
) -> Rollout:
    """Samples one response a prompt from the geometric mixture of two policies, token by token.

        mixture(a | s) = policy(a | s)^(1 - eta) other(a | s)^eta / Z(s)

    for the token a after the tokens s; Z(s) is found anew for every s, so this is not the mixture of whole responses.
    Both policies are at the temperature of `sampling`; its filters act on their mixture.

    Args:
        config: the shape of both policies.
        params: one policy's tree.
        other: the other's tree.
        eta: the other's weight, from 0 (the samples of `generate` with `params`) to 1 (those with `other`).
        prompts: as in `generate`.
        key: as in `generate`.
        sampling: as in `generate`.

    Returns:
        The rollout. Its `logprob` is the log-probability of each token under the mixture, unfiltered: that of neither
        policy.

    Raises:
        ValueError: as `generate`, or `eta` is a Python number outside [0, 1].

    Source: Munos et al. 2023 (arXiv:2312.00886), the one-step form of their regularised policy.
    """
    check_eta(eta)

    def mix(own: Float[Array, "B V"], others: Float[Array, "B V"]) -> Float[Array, "B V"]:
        weight = jnp.asarray(eta, own.dtype)
        return (1.0 - weight) * own + weight * others  # the logarithms, up to a constant a row

    return _decode(config, (params, other), mix, prompts, key, sampling)


def check_eta(eta: Float[Array, ""] | float) -> None:
    """Refuses a weight of a mixture that is a Python number outside [0, 1].

    Raises:
        ValueError: it is.
    """
    if isinstance(eta, float | int) and not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta!r}; give the second policy a weight from 0 to 1.")


def _decode(
    config: ModelConfig,
    policies: tuple[Params, ...],
    mix: Callable[..., Float[Array, "B V"]],
    prompts: Prompts,
    key: Array,
    sampling: SamplingConfig,
) -> Rollout:
    """The loop: `mix(*logits)` makes of each policy's logits, [B, V], those that a token is drawn from."""
    batch, prompt_length = prompts.tokens.shape
    most = sampling.max_new_tokens
    _check_room(config, prompt_length, sampling)
    keys = sequence_keys(key, prompts.index)
    stops = jnp.array(sampling.stop_tokens, jnp.int32)

    def read(tokens: Int[Array, "B N"], mask: Bool[Array, "B N"], caches: tuple[Cache | None, ...]):
        """What each policy's trunk computes for the tokens."""
        each = zip(policies, caches, strict=True)
        return tuple(apply_trunk(config, params["trunk"], tokens, mask, cache) for params, cache in each)

    blank = dict(
        tokens=jnp.full((batch, most), sampling.pad_token, jnp.int32),
        mask=jnp.zeros((batch, most), bool),
        logprob=jnp.zeros((batch, most), jnp.float32),
        sampling_logprob=jnp.zeros((batch, most), jnp.float32),
    )

    def take(position: Int[Array, ""], hidden: tuple[Hidden, ...], done: Bool[Array, " B"], out: dict):
        """Draws the token at `position` for rows that are not done and writes it down."""
        each = zip(policies, hidden, strict=True)
        logits = mix(*(unembed(config, params, found.final[:, -1]) for params, found in each))
        token, logprob, sampling_logprob = draw(logits, keys, position, sampling)
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
        position, token, done, caches, out = carry
        going = ~done[:, None]
        hidden = read(token[:, None], going, caches)
        each = zip(caches, hidden, strict=True)
        caches = tuple(write(cache, found.keys, found.values, going) for cache, found in each)
        token, done, out = take(position, hidden, done, out)
        return position + 1, token, done, caches, out

    start = jnp.int32(0)
    hidden = read(prompts.tokens, prompts.mask, (None,) * len(policies))
    caches = tuple(new_cache(found.keys, found.values, prompts.mask, prompt_length + most) for found in hidden)
    token, done, out = take(start, hidden, jnp.zeros(batch, bool), blank)
    _, _, done, _, out = jax.lax.while_loop(unfinished, step, (start + 1, token, done, caches, out))
    return Rollout(prompts=prompts, finished=done, **out)


def _check_room(config: ModelConfig, prompt_length: int, sampling: SamplingConfig) -> None:
    """Refuses responses that do not fit behind the prompts, and tokens that the model does not know."""
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
