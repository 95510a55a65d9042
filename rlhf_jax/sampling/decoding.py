"""What all ways of drawing responses share: prompts are read, logits are made, and a token is drawn from them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.attention import Cache, new_cache
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import unembed
from rlhf_jax.models.transformer import Hidden, apply_trunk
from rlhf_jax.sampling.filters import SamplingConfig, filter_logits
from rlhf_jax.types import Params, Prompts

Mix = Callable[..., Float[Array, "B V"]]
"""Makes of each policy's logits [B, V] those that a token is drawn from."""
States = tuple[Float[Array, "B D"], ...]
"""What each policy's trunk says of the next token."""


FEW = 1024
"""So many tokens or fewer each have noise of their own when one is drawn."""
MEMBERS = 128
"""Of more, so many make a group: a divisor of the size of most vocabularies."""


def sequence_keys(key: Array, index: Int[Array, " B"]) -> Array:
    """One key a sequence: `key` with the sequence's index in the data folded in."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def draw(
    logits: Float[Array, "B V"], keys: Array, position: Int[Array, "*B"], sampling: SamplingConfig
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """One token a row, with its log-probability under the policy and under the sampling distribution.

    What is random about it comes from the row's key with the position folded in.

    Args:
        logits: raw logits of the policy, float32.
        keys: one key a row.
        position: index of the token in its response: one of all rows, or one a row.
        sampling: temperature and filters.

    Returns:
        Token ids int32 [B]; log-probabilities under the temperature-scaled unfiltered policy, float32 [B]; and under
        the distribution that was sampled from, float32 [B].
    """
    filtered = filter_logits(logits, sampling)
    token_keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(position, keys.shape))
    token, sampling_logprob = choose(token_keys, filtered)
    policy_logprob = logprob_of(token, logits / sampling.logprob_temperature) if sampling.filtered else sampling_logprob
    return token, policy_logprob, sampling_logprob


def choose(keys: Array, logits: Float[Array, "B V"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """One of V a row, drawn from softmax(logits), and its log-probability.

    Of few it is the largest sum of a logit and Gumbel noise (Maddison et al. 2014, 1411.0030). Noise costs more than
    all else about a draw, so that of many first a group is drawn by what its weights add up to, then a member of it:

        p(v) = p(group) p(v | group)

    Args:
        keys: one a row.
        logits: -inf at what is not to be drawn; at least one a row is not. Where they are NaN, so is the
            log-probability, and the last of V is drawn.
    """
    choices = logits.shape[-1]
    if choices <= FEW:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (choices,), logits.dtype))(keys)
        chosen = first_largest(logits + noise)
        return chosen, logprob_of(chosen, logits)
    filled = jnp.pad(logits, ((0, 0), (0, -choices % MEMBERS)), constant_values=-jnp.inf)
    groups = rearrange(filled, "b (m n) -> b m n", m=MEMBERS)  # a device that has part of V has part of every group
    of_groups, of_members = jax.vmap(jax.random.split, out_axes=1)(keys)
    group, group_logprob = choose(of_groups, jax.nn.logsumexp(groups, axis=1))
    members = jnp.take_along_axis(groups, group[:, None, None], axis=2)[:, :, 0]
    member, member_logprob = choose(of_members, members)
    return jnp.minimum(member * groups.shape[2] + group, choices - 1), group_logprob + member_logprob


def logprob_of(chosen: Int[Array, " B"], logits: Float[Array, "B V"]) -> Float[Array, " B"]:
    """Log-probability under softmax(logits) of the one that each row has chosen."""
    return jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)


def first_largest(scores: Float[Array, "B V"]) -> Int[Array, " B"]:
    """`jnp.argmax(scores, axis=-1)` of scores that are numbers, several times as fast on a CPU: two plain reductions.

    Example:
        >>> first_largest(jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, -jnp.inf]])).tolist()
        [1, 0]
    """
    places = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None]
    largest = jnp.where(scores == scores.max(axis=-1, keepdims=True), places, places[:, -1:])
    return largest.min(axis=-1)


def read(
    config: ModelConfig,
    policies: tuple[Params, ...],
    tokens: Int[Array, "B N"],
    mask: Bool[Array, "B N"],
    caches: tuple[tuple[Cache, ...], ...],
) -> tuple[Hidden, ...]:
    """What each policy's trunk computes for the tokens, after those of its caches."""
    each = zip(policies, caches, strict=True)
    return tuple(apply_trunk(config, params["trunk"], tokens, mask, before or None) for params, before in each)


def prefill(
    config: ModelConfig, policies: tuple[Params, ...], prompts: Prompts, sampling: SamplingConfig
) -> tuple[States, tuple[Cache, ...]]:
    """Each policy's last state of every prompt, and its cache of the prompts."""
    hidden = read(config, policies, prompts.tokens, prompts.mask, ((),) * len(policies))
    width = prompts.tokens.shape[1]
    caches = [new_cache(one.keys, one.values, prompts.mask, width, sampling.cache) for one in hidden]
    return last_states(hidden), tuple(caches)


def last_states(hidden: tuple[Hidden, ...]) -> States:
    """The states that predict the token after the last one."""
    return tuple(one.final[:, -1] for one in hidden)


def logits_of(config: ModelConfig, policies: tuple[Params, ...], states: States, mix: Mix) -> Float[Array, "B V"]:
    """What the next token is drawn from."""
    return mix(*(unembed(config, params, state) for params, state in zip(policies, states, strict=True)))


def ends(tokens: Int[Array, " B"], sampling: SamplingConfig) -> Bool[Array, " B"]:
    """Whether tokens end their responses."""
    return (tokens[:, None] == jnp.array(sampling.stop_tokens, jnp.int32)[None]).any(axis=-1)


def blank_output(rows: int, sampling: SamplingConfig) -> dict[str, Array]:
    """Fields of a `Rollout` before anything is drawn."""
    shape = (rows, sampling.max_new_tokens)
    tokens, zero = jnp.full(shape, sampling.pad_token, jnp.int32), jnp.zeros(shape, jnp.float32)
    return dict(tokens=tokens, mask=jnp.zeros(shape, bool), logprob=zero, sampling_logprob=zero)


def check_room(config: ModelConfig, prompt_length: int, sampling: SamplingConfig) -> None:
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
