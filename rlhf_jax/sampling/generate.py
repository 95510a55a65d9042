"""Responses from a policy in one compiled loop.

The life of a token: the prompt is run once (prefill), for all responses to it; its last state gives the first logits; a
token is drawn with the key of its (sequence, position); only that token is run against the key-value caches, that of
the prompt and that of the response; and so on until every row has drawn a stop token. Of several policies each has its
caches, and all go on with the token that was drawn from their mixture.

Here all rows draw the same position at the same time, and the cache of responses grows as they do, so that nobody reads
room that no response has reached. `queue` draws a few responses at a time, for those of very unequal lengths; `mixture`
from two policies.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlhf_jax.models.attention import Cache, empty_cache, with_room, write
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.partitioning import parts_of
from rlhf_jax.models.quantised import stored_weights
from rlhf_jax.sampling.decoding import (
    Mix,
    blank_output,
    check_room,
    draw,
    ends,
    last_states,
    logits_of,
    prefill,
    read,
    sequence_keys,
)
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.types import Params, Prompts, Rollout

FIRST_ROOM = 64
"""Tokens that the cache of responses has room for at first; it doubles when they are drawn."""


def rooms(most: int) -> list[int]:
    """Tokens that the cache of responses has room for, at first and each time that it has grown.

    Example:
        >>> rooms(200)  # the last token is drawn and not run
        [64, 128, 199]
    """
    found: list[int] = []
    while sum(found[-1:]) < most - 1:
        found.append(min(most - 1, 2 * sum(found[-1:]) or FIRST_ROOM))
    return found


def repeat_prompts(prompts: Prompts, samples: int) -> Prompts:
    """Every prompt `samples` times, one after the other, each with an index of its own, so that their samples differ.

    Example:
        >>> prompts = Prompts(tokens=jnp.ones((2, 1), int), mask=jnp.ones((2, 1), bool), index=jnp.array([0, 5]))
        >>> repeat_prompts(prompts, 3).index.tolist()
        [0, 1, 2, 15, 16, 17]
    """
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), prompts)
    sample = jnp.tile(jnp.arange(samples, dtype=repeated.index.dtype), len(prompts.index))
    return repeated.replace(index=repeated.index * samples + sample)


def generate(
    config: ModelConfig, params: Params, prompts: Prompts, key: Array, sampling: SamplingConfig, samples: int = 1
) -> Rollout:
    """Samples responses, one or several a prompt.

    A response depends on its prompt, its `prompts.index`, its number and the key, not on the other rows, the amount of
    padding, how many are drawn at a time or the number of devices (to the rounding of the matrix products).

    Args:
        config: the policy's shape.
        params: the policy tree.
        prompts: left-padded prompts.
        key: a typed key; use another for each call.
        sampling: length, stop tokens, temperature and filters; how many are drawn at a time, and in what storage.
        samples: K, responses a prompt, which follow each other. Each prompt is read once.

    Returns:
        The rollout of all responses, of `repeat_prompts(prompts, samples)`, padded to T = `sampling.max_new_tokens`.

    Raises:
        ValueError: prompt and response together exceed the model's context, or a stop or pad token is not in the
            vocabulary.
    """
    return draw_all(config, (params,), lambda logits: logits, prompts, key, sampling, samples)


def draw_all(
    config: ModelConfig,
    policies: tuple[Params, ...],
    mix: Mix,
    prompts: Prompts,
    key: Array,
    sampling: SamplingConfig,
    samples: int = 1,
) -> Rollout:
    """All responses of one policy, or of several whose logits are mixed; arguments as of `generate`."""
    check_room(config, prompts.tokens.shape[1], sampling)
    policies = tuple(stored_weights(params, sampling.weights) for params in policies)
    repeated = prompts if samples == 1 else repeat_prompts(prompts, samples)
    rows = len(repeated.index)
    if parts_of("batch", len(prompts.index)) < parts_of("batch", rows):
        prompts = repeated  # on a mesh that divides the responses but not the prompts
    states, caches = prefill(config, policies, prompts, sampling)
    keys = sequence_keys(key, repeated.index)
    decode = sampling.decode or draw_together
    finished, out = decode(config, policies, mix, states, caches, keys, sampling)
    return Rollout(prompts=repeated, finished=finished, **out)


def draw_together(
    config: ModelConfig,
    policies: tuple[Params, ...],
    mix: Mix,
    states: tuple[Array, ...],
    prompts: tuple[Cache, ...],
    keys: Array,
    sampling: SamplingConfig,
) -> tuple[Bool[Array, " B"], dict[str, Array]]:
    """The loop over positions, for all rows at once: which responses ended, and the fields of a `Rollout`."""
    rows = len(keys)

    def take(position: Int[Array, ""], states: tuple[Array, ...], done: Bool[Array, " B"], out: dict):
        """Draws the token at `position` for rows that are not done and writes it down."""
        token, logprob, sampling_logprob = draw(logits_of(config, policies, states, mix), keys, position, sampling)
        token = jnp.where(done, sampling.pad_token, token)
        new = dict(
            tokens=token,
            mask=~done,
            logprob=jnp.where(done, 0.0, logprob),
            sampling_logprob=jnp.where(done, 0.0, sampling_logprob),
        )
        out = {name: out[name].at[:, position].set(new[name].astype(out[name].dtype)) for name in out}
        return token, done | ends(token, sampling), out

    def step(carry):
        position, token, done, caches, out = carry
        going = ~done[:, None]
        hidden = read(config, policies, token[:, None], going, tuple(zip(prompts, caches, strict=True)))
        each = zip(caches, hidden, prompts, strict=True)
        caches = tuple(write(cache, found.keys, found.values, going, before) for cache, found, before in each)
        token, done, out = take(position, last_states(hidden), done, out)
        return position + 1, token, done, caches, out

    repeated = tuple(jnp.repeat(state, rows // len(state), axis=0) for state in states)
    token, done, out = take(jnp.int32(0), repeated, jnp.zeros(rows, bool), blank_output(rows, sampling))
    caches = tuple(empty_cache(prompt, rows, 0) for prompt in prompts)
    carry = (jnp.int32(1), token, done, caches, out)
    for room in rooms(sampling.max_new_tokens):
        position, token, done, caches, out = carry
        carry = (position, token, done, tuple(with_room(cache, room) for cache in caches), out)
        carry = jax.lax.while_loop(lambda carry, room=room: (carry[0] <= room) & ~carry[2].all(), step, carry)
    return carry[2], carry[4]
