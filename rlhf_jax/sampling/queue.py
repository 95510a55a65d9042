"""Responses of unequal lengths, a few at a time: whoever has ended makes room for the next in the queue.

Drawn all at once, a batch takes as many steps as its longest response, and most rows wait. Here S slots draw from a
queue of B responses in one compiled loop: the prompts are read beforehand, and a slot that is free gets the cache and
the last state of the next response's prompt. Steps are about the sum of all lengths over S, whatever the longest.

All slots write their tokens into one column of their caches, which is used again after T steps: by then whoever was
there has ended. What a slot may look at is in the mask, and where it stands in the positions, as in any cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlhf_jax.models.attention import Cache, empty_cache, write
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sampling.decoding import Mix, blank_output, draw, ends, last_states, logits_of, read
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.types import Params

WAITING = 16
"""Free slots are filled when one in so many is free: the caches of some prompts are copied at once."""


@dataclasses.dataclass(frozen=True)
class InTurns:
    """A loop for `SamplingConfig.decode`: so many responses at a time, a new one in the place of each that has ended.

    Attributes:
        slots: responses that are drawn at a time.

    Raises:
        ValueError: there is no slot.
    """

    slots: int

    def __post_init__(self):
        if self.slots < 1:
            raise ValueError(f"InTurns.slots is {self.slots}; it must be at least 1.")

    def __call__(
        self,
        config: ModelConfig,
        policies: tuple[Params, ...],
        mix: Mix,
        states: tuple[Array, ...],
        prompts: tuple[Cache, ...],
        keys: Array,
        sampling: SamplingConfig,
    ) -> tuple[Bool[Array, " B"], dict[str, Array]]:
        """Draws B responses, `slots` at a time; more slots than there are responses are not used.

        Args:
            config: shape of the policies.
            policies: each policy's tree.
            mix: what is drawn from, of their logits.
            states: each policy's last state of every prompt, [P, D]; responses to a prompt follow each other.
            prompts: each policy's cache of the prompts.
            keys: one a response, [B].
            sampling: how tokens are drawn.

        Returns:
            Which responses ended by themselves, bool [B], and the fields of a `Rollout`.
        """
        rows, most = len(keys), sampling.max_new_tokens
        slots = min(self.slots, rows)
        samples, at_once = rows // len(states[0]), max(1, slots // WAITING)
        empty = rows  # a row that is none: writes to it are dropped

        def step(carry):
            row, position, following, states, begun, caches, finished, out = carry
            drawn = draw(logits_of(config, policies, states, mix), keys[jnp.minimum(row, rows - 1)], position, sampling)
            fields = dict(zip(("tokens", "logprob", "sampling_logprob"), drawn, strict=True)) | {"mask": row < empty}
            out = {name: out[name].at[row, position].set(fields[name], mode="drop") for name in out}
            stopped = ends(drawn[0], sampling)
            finished = finished.at[row].set(stopped, mode="drop")
            row = jnp.where(stopped | (position == most - 1), empty, row)
            going = (row < empty)[:, None]
            hidden = read(config, policies, drawn[0][:, None], going, tuple(zip(begun, caches, strict=True)))
            each = zip(caches, hidden, begun, strict=True)
            caches = tuple(write(cache, found.keys, found.values, going, before) for cache, found, before in each)
            carry = (row, position + 1, following, last_states(hidden), begun, caches, finished, out)
            free = (row == empty).sum()
            wanted = (following < rows) & (free >= at_once)
            return jax.lax.cond(wanted, fill, lambda carry: carry, carry)

        def fill(carry):
            """Gives the first free slots the next rows of the queue."""
            row, position, following, states_now, begun, caches, finished, out = carry
            chosen = jnp.argsort(row != empty, stable=True)[:at_once].astype(jnp.int32)
            new = following + jnp.arange(at_once, dtype=jnp.int32)
            place = jnp.where(new < rows, chosen, slots)  # a place that is none is dropped
            prompt = jnp.minimum(new, rows - 1) // samples

            def put(old: Array, given: Array, axis: int = 0) -> Array:
                where = (slice(None),) * axis
                return old.at[(*where, place)].set(given[(*where, prompt)], mode="drop")

            states_now = tuple(put(now, first) for now, first in zip(states_now, states, strict=True))
            begun = tuple(_replaced(old, given, put) for old, given in zip(begun, prompts, strict=True))
            caches = tuple(one.replace(mask=one.mask.at[place].set(False, mode="drop")) for one in caches)
            row = row.at[place].set(new, mode="drop")
            following = following + (new < rows).sum(dtype=jnp.int32)
            return row, position.at[place].set(0, mode="drop"), following, states_now, begun, caches, finished, out

        first = jnp.arange(slots, dtype=jnp.int32)
        carry = (
            first,
            jnp.zeros(slots, jnp.int32),
            jnp.int32(slots),
            tuple(state[first // samples] for state in states),
            tuple(_rows_of(prompt, first // samples) for prompt in prompts),
            tuple(empty_cache(prompt, slots, most) for prompt in prompts),
            jnp.zeros(rows, bool),
            blank_output(rows, sampling),
        )
        *_, finished, out = jax.lax.while_loop(lambda carry: (carry[0] < empty).any(), step, carry)
        return finished, out


def _rows_of(cache: Cache, rows: Int[Array, " R"]) -> Cache:
    """Some rows of a cache."""
    keys, values = (jax.tree.map(lambda leaf: leaf[:, rows], part) for part in (cache.keys, cache.values))
    return cache.replace(keys=keys, values=values, mask=cache.mask[rows], positions=cache.positions[rows])


def _replaced(old: Cache, given: Cache, put) -> Cache:
    """A cache with some rows from another."""
    keys, values = (
        jax.tree.map(lambda now, new: put(now, new, 1), *pair)
        for pair in ((old.keys, given.keys), (old.values, given.values))
    )
    return old.replace(
        keys=keys,
        values=values,
        mask=put(old.mask, given.mask),
        positions=put(old.positions, given.positions),
    )
