"""Responses to any number of prompts: batches of a few shapes, so that a handful of programs serves a whole file."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.partitioning import axes_of, mesh_sizes
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import Params, Prompts, Rollout

_generate = partial(jax.jit, static_argnums=(0, 4))(generate)


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Which prompts are drawn for together: those of like length, the longest first.

    What needs most memory comes first, and rows that share a batch waste little padding.

    Args:
        lengths: tokens of each prompt.
        batch_size: rows a batch.

    Returns:
        Places in `lengths`, all of them once; the last list may be shorter.

    Example:
        >>> plan_batches([3, 9, 4, 3], batch_size=3)
        [[1, 2, 0], [3]]
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def rows_at_once(batch_size: int, rows: int) -> int:
    """Rows of a batch where there may not be enough to fill one: no more than needed, and divided by the mesh.

    Args:
        batch_size: rows of a full batch, which the mesh that is set divides.
        rows: how many rows there are in all.

    Example:
        >>> rows_at_once(8, 100), rows_at_once(8, 3)
        (8, 3)
    """
    sizes = mesh_sizes()
    devices = math.prod(sizes[axis] for axis in axes_of("batch", sizes))
    return min(batch_size, max(-(-rows // devices), 1) * devices)


def generate_batches(
    config: ModelConfig,
    params: Params,
    items: Sequence[Any],
    collate: Callable[[Sequence[Any]], Prompts],
    batch_size: int,
    key: Array,
    sampling: SamplingConfig,
    done: Collection[int] = (),
) -> Iterator[tuple[list[int], Rollout]]:
    """Draws one response an item, a batch at a time.

    A response depends on its prompt, the index of its prompt and the key, as in `generate`. Batches are the same
    whatever is `done`, so that the rest of a run that was cut short is equal, to the bit, to that of a whole one.

    Args:
        config: the policy's shape.
        params: the policy tree; adapters may be attached.
        items: N prompts with a `length`, in tokens.
        collate: makes `Prompts` of items, padded to one of a few lengths; each length is compiled once.
        batch_size: rows a batch, see `rows_at_once`; one that is not full is filled up with its last item.
        key: a typed key.
        sampling: length, stop tokens, temperature and filters; how many are drawn at a time, and in what storage.
        done: places of `items` that are not needed; a batch of nothing else is left out.

    Yields:
        The places of a batch's rows in `items` (the last one again where a batch was filled up), and their rollout.

    Raises:
        ValueError: see `generate`.
    """
    batch_size, done = rows_at_once(batch_size, len(items)), set(done)
    for places in plan_batches([item.length for item in items], batch_size):
        if done.issuperset(places):
            continue
        places = places + places[-1:] * (batch_size - len(places))
        yield places, _generate(config, params, collate([items[place] for place in places]), key, sampling)
