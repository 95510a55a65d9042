"""Functions that are written for one device's share of their arguments (`jax.shard_map`).

Most of a model is written for whole arrays, and the compiler splits it over the mesh. Where the compiler would gather
too much, a function says itself what travels between devices: attention over long contexts, kernels, experts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from rlhf_jax.models.partitioning import mesh_sizes, partition_spec

Names = tuple[str | None, ...]


def on_shares(
    function: Callable[..., Any], names: Sequence[Names], out: Names, check_vma: bool = True
) -> Callable[..., Any]:
    """`function`, called on every device of the mesh that is set with the device's own share of each argument.

    Args:
        function: takes shares and gives the share of one array; it may use collectives over the axes of the mesh.
        names: for each argument the logical names of its axes, or of those of all its leaves; all of them must divide
            (see `partitioning.divided`).
        out: the logical names of the axes of the result.
        check_vma: whether JAX checks what differs between devices; kernels in Pallas do not say it.

    Returns:
        A function of whole arrays; `function` itself where no mesh is set, or one of a single device.
    """
    sizes = mesh_sizes()
    if math.prod(sizes.values()) == 1:
        return function
    into = tuple(partition_spec(axes, sizes) for axes in names)
    of_result = partition_spec(out, sizes)
    return jax.shard_map(function, in_specs=into, out_specs=of_result, axis_names=set(sizes), check_vma=check_vma)
