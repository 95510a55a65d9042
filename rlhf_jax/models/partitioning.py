"""The one table from logical axes to mesh axes, and what it means for an array.

A mesh has the axes `data`, `fsdp`, `tensor`, `sequence` and `expert`. Modules name the axes of their parameters and
activations; this table says over which mesh axes each is split. Another layout (tensor-parallel decoding, say) is
another *shape* of the mesh over the same devices, never another table.

Code that runs on a mesh is traced under `jax.set_mesh(mesh)`. Without a mesh nothing here does anything, so the same
functions run on one device, under `vmap` and inside `shard_map`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from einops import rearrange
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Shaped

MESH_AXES = ("data", "fsdp", "tensor", "sequence", "expert")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "tokens": ("sequence",),
    # parameters
    "width": ("fsdp",),
    # both
    "vocabulary": ("tensor",),
    "heads": ("tensor",),
    "feed_forward": ("tensor",),
    "expert": ("expert",),
    # the stack of layers is walked by a scan: each device has its part of every layer
    "layers": (),
}
"""Which mesh axes a logical axis is split over. The residual stream is split by rows and tokens, never by width: only
parameters are, and they are gathered, layer by layer, where they are used."""


def axes_of(name: str | None, sizes: Mapping[str, int], rules: Mapping[str, tuple[str, ...]] = RULES) -> tuple:
    """The mesh axes, of those with more than one device, that a logical axis is split over.

    Args:
        name: a key of the table; None for an axis that is never split.
        sizes: number of devices along each axis of the mesh, as in `mesh.shape`.
        rules: the table.
    """
    return tuple(axis for axis in rules[name] if sizes.get(axis, 1) > 1) if name is not None else ()


def partition_spec(
    names: Sequence[str | None], sizes: Mapping[str, int], rules: Mapping[str, tuple[str, ...]] = RULES
) -> PartitionSpec:
    """How an array whose axes have these logical names is split over a mesh of this shape.

    Args:
        names: one logical name an axis of the array, None for one that is never split.
        sizes: number of devices along each axis of the mesh, as in `mesh.shape`.
        rules: the table.

    Example:
        >>> tuple(partition_spec(("layers", "width", "heads"), {"fsdp": 4, "tensor": 2}))
        (None, 'fsdp', 'tensor')
        >>> tuple(partition_spec(("batch", "tokens", None), {"data": 2, "fsdp": 4, "tensor": 1}))
        (('data', 'fsdp'), None, None)
    """
    axes = [axes_of(name, sizes, rules) for name in names]
    return PartitionSpec(*[part[0] if len(part) == 1 else part or None for part in axes])


def mesh_sizes() -> dict[str, int]:
    """Devices along each axis of the mesh that is set, as far as the compiler splits along it; empty without a mesh.

    Inside `shard_map` the axes that it splits by hand are not among them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }


def platform() -> str:
    """What kind of devices a program is for: those of the mesh that is set, or else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def divided(names: Sequence[str | None], shape: Sequence[int]) -> tuple[str | None, ...]:
    """The names of the axes that the mesh that is set divides, and None for those that it does not.

    Example:
        >>> divided(("batch", "tokens"), (3, 5))  # no mesh is set
        ('batch', 'tokens')
    """
    sizes = mesh_sizes()
    over = [math.prod(sizes[axis] for axis in axes_of(name, sizes)) for name in names]
    return tuple(None if size % count else name for name, size, count in zip(names, shape, over, strict=True))


def parts_of(name: str, size: int) -> int:
    """Among how many devices the mesh that is set splits a logical axis of this size; 1 where it does not divide it.

    Example:
        >>> parts_of("batch", 8)  # no mesh is set
        1
    """
    sizes = mesh_sizes()
    return math.prod(sizes[axis] for name in divided((name,), (size,)) for axis in axes_of(name, sizes))


def constrain(x: Shaped[Array, "*shape"], *names: str | None) -> Shaped[Array, "*shape"]:
    """Says how an activation is split over the mesh that is set; `x` itself where there is none.

    An axis whose size its mesh axes do not divide stays whole (one token a row while decoding, say); what must divide
    is checked beforehand, see `parallel.mesh.check_batch`.

    Args:
        x: the activation.
        *names: one logical name an axis, None for one that is not split.
    """
    sizes = mesh_sizes()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(divided(names, x.shape), sizes))


def gather_width(parameter: Shaped[Array, "*shape"], *names: str | None) -> Shaped[Array, "*shape"]:
    """A parameter for use: on a mesh its width is put together, and its gradient is split again where it arises.

    Without the second half the sum of the gradient over the devices would be kept whole on each of them. It is a rule
    for reverse mode: on a mesh with `fsdp`, forward mode (`jax.jvp`) raises a TypeError.

    Args:
        parameter: the kernel or table, split as `names` say.
        *names: one logical name an axis.
    """
    if mesh_sizes().get("fsdp", 1) == 1:
        return parameter

    @jax.custom_vjp
    def gathered(parameter: Array) -> Array:
        return constrain(parameter, *(None if name == "width" else name for name in names))

    gathered.defvjp(lambda parameter: (gathered(parameter), None), lambda _, gradient: (constrain(gradient, *names),))
    return gathered(parameter)


def by_device(function: Callable[..., Any], arrays: Sequence[Array], whole: Sequence[Array]) -> Any:
    """`function(*arrays, *whole)` of positions that do not depend on one another: each device walks those that it has.

    On a mesh the arrays get an axis for the devices, so that each sums the gradient of `whole` over its own positions;
    the sums are added up at the end.

    Args:
        function: takes and returns arrays [B, N, ...].
        arrays: [B, N, ...] each.
        whole: what every position needs all of, such as a kernel.
    """
    rows, positions = parts_of("batch", arrays[0].shape[0]), parts_of("tokens", arrays[0].shape[1])
    if rows * positions == 1:
        return function(*arrays, *whole)

    def split(array: Array) -> Array:
        parts = rearrange(array, "(i b) (j n) ... -> i j b n ...", i=rows, j=positions)
        return constrain(parts, "batch", "tokens", *(None,) * array.ndim)

    axes = (0,) * len(arrays) + (None,) * len(whole)
    found = jax.vmap(jax.vmap(function, axes), axes)(*map(split, arrays), *whole)
    return jax.tree.map(lambda part: rearrange(part, "i j b n ... -> (i b) (j n) ..."), found)
