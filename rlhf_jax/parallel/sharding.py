"""Where every array of a state lies on a mesh, and ways to put it there.

    where = infer(jax.eval_shape(init, key), mesh, (config,))
    state = jax.jit(init, out_shardings=where)(key)            # `initialised` does both: no device holds it unsharded
    step = jax.jit(step, donate_argnums=0)                     # traced under jax.set_mesh(mesh)

An array is found by its name: whatever ends in the name of a parameter (the parameter itself, a copy of it in a
reference, the moments that Adam keeps of it, the members of an ensemble stacked before it) is split as the logical axes
of that parameter say (`models.partitioning.RULES`). Everything else is small and lies on every device.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.partitioning import RULES, axes_of, partition_spec
from rlhf_jax.models.transformer import logical_axes
from rlhf_jax.parallel.mesh import check_batch
from rlhf_jax.types import Params

OPTIMIZER = "optimizer_state"
SHARED_OPTIMIZER_RULES = RULES | {"width": ("fsdp", "data")}
"""The table for an optimiser whose state is split over the data axis too (ZeRO, 1910.02054)."""

Names = tuple[str, ...]
Axes = tuple[str | None, ...]


def parameter_axes(config: ModelConfig) -> dict[Names, Axes]:
    """The logical axes of every large parameter of a model, its head and its adapters, by the end of its name.

    Vectors (norms, biases, multipliers) are not among them: they lie on every device.
    """
    trunk = jax.tree_util.tree_leaves_with_path(
        logical_axes(config), is_leaf=lambda node: isinstance(node, PartitionSpec)
    )
    axes: dict[Names, Axes] = {("unembedding",): ("width", "vocabulary")}
    for path, spec in trunk:
        names, of = _names(path), tuple(spec)
        if len(of) - ("layers" in of) < 2:
            continue
        axes[names] = of
        if names[-1] == "kernel":  # an adapter stands beside the kernel, or in a tree of its own
            layers, *between, into, out = of
            for place in ((*names[:-1], "adapter"), (names[-2],)):
                axes |= {(*place, leaf): (layers, *between, into, None) for leaf in ("a", "reduce")}
                axes |= {(*place, leaf): (layers, *between, None, out) for leaf in ("b", "expand")}
    return axes


def infer(
    shapes: Any,
    mesh: Mesh,
    configs: Sequence[ModelConfig],
    split_optimizer: bool = False,
    offload: Sequence[str] = (),
) -> Any:
    """The sharding of every leaf of a state.

    Args:
        shapes: the state, or its shapes as from `jax.eval_shape`.
        mesh: from `parallel.mesh.make_mesh`.
        configs: shapes of the models in it (policy, value net, reward models), in any order.
        split_optimizer: split the optimiser's state over the data axis too, which data parallelism alone would repeat
            on every device; costs a gather of the new parameters each update.
        offload: fields of the state whose arrays lie in the memory of the host, such as `reference`; the algorithms
            bring them to the device where they are used.

    Returns:
        A tree like `shapes` of `NamedSharding`s.

    Raises:
        ValueError: the mesh does not divide an array; the sentence names it, with the arithmetic.
    """
    table: dict[Names, Axes] = {}
    for config in configs:
        table |= parameter_axes(config)

    def where(path: tuple, leaf: Any) -> NamedSharding:
        names = _names(path)
        rules = SHARED_OPTIMIZER_RULES if split_optimizer and OPTIMIZER in names else RULES
        spec = _spec(names, leaf.shape, table, mesh.shape, rules)
        kind = "pinned_host" if set(offload) & set(names) else None
        return NamedSharding(mesh, spec, memory_kind=kind)

    return jax.tree_util.tree_map_with_path(where, shapes)


def initialised(
    init: Callable[..., Any],
    mesh: Mesh,
    configs: Sequence[ModelConfig],
    *arguments: Any,
    split_optimizer: bool = False,
    offload: Sequence[str] = (),
) -> Any:
    """`init(*arguments)`, computed where each part of the result is to lie: no device ever holds all of it.

    Args:
        init: makes a state; traced under the mesh.
        mesh: where to.
        configs: see `infer`.
        *arguments: keys, and parameters that were loaded `on` the same mesh; they are donated, so that the state takes
            over their memory.
        split_optimizer: see `infer`.
        offload: see `infer`.

    Raises:
        ValueError: see `infer`.
    """
    shapes = jax.eval_shape(init, *arguments)
    where = infer(shapes, mesh, configs, split_optimizer, offload)
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # a key that is only read, say
        return jax.jit(init, out_shardings=where, donate_argnums=range(len(arguments)))(*arguments)


def on(mesh: Mesh) -> Callable[[ModelConfig, Params], Params]:
    """Where a model that is read from a folder lies: the `placement` of `huggingface.load_policy` and its like."""
    return lambda config, shapes: infer(shapes, mesh, (config,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what lies on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis counts the rows of a batch."""
    return NamedSharding(mesh, partition_spec(("batch",), mesh.shape))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch on the mesh, its rows split over the devices.

    Every process has collated the same whole batch; each hands over the rows of its own devices only.

    Args:
        batch: a pytree of arrays whose first axis counts the rows of the global batch.
        mesh: where to.

    Returns:
        The pytree with global arrays. Leaves without axes lie on every device.

    Raises:
        ValueError: the mesh does not divide the rows.
    """
    rows, whole = batch_sharding(mesh), replicated(mesh)

    def place(leaf: Any) -> jax.Array:
        values = np.asarray(leaf)
        if values.ndim:
            check_batch(len(values), None, mesh.shape)
        where = rows if values.ndim else whole
        return jax.make_array_from_callback(values.shape, where, lambda part: values[part])

    return jax.tree.map(place, batch)


def reshard(tree: Params, mesh: Mesh, configs: Sequence[ModelConfig], dtype: str | None = None) -> Params:
    """Parameters in the layout of another mesh: over the same devices (tensor-parallel decoding of a policy that is
    trained fsdp, say), or over those of another role.

    Args:
        tree: parameters, on any mesh or device.
        mesh: where to.
        configs: see `infer`.
        dtype: cast to it first, so that fewer bytes travel: that of the computation, for rollouts; None: as they are.
    """
    if dtype is not None:
        tree = jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    return jax.device_put(tree, infer(tree, mesh, configs))


def _spec(
    names: Names,
    shape: tuple[int, ...],
    table: Mapping[Names, Axes],
    sizes: Mapping[str, int],
    rules: Mapping[str, tuple[str, ...]],
) -> PartitionSpec:
    axes = _axes(names, len(shape), table)
    spec = partition_spec(axes, sizes, rules)
    for place, name in enumerate(axes):
        over = {axis: sizes[axis] for axis in axes_of(name, sizes, rules)}
        count = math.prod(over.values())
        if shape[place] % count:
            named = " × ".join(f"{axis}={size}" for axis, size in over.items())
            raise ValueError(
                f"the mesh does not divide {'.'.join(names)}: its {name} axis has {shape[place]} entries and is split "
                f"over {named} ({shape[place]} = {count} × {shape[place] // count} + {shape[place] % count}); choose "
                f"divisors of {shape[place]}."
            )
    return spec


def _axes(names: Names, ndim: int, table: Mapping[Names, Axes]) -> Axes:
    """The logical axes of a leaf: those of the parameter whose name its own ends in, behind those stacked before it.

    A moment in 8-bit codes has the axes of its parameter, the scales of its rows all of them but the last.
    """
    if names[-1:] == ("codes",):
        return _axes(names[:-1], ndim, table)
    if names[-1:] == ("scales",):
        return _axes(names[:-1], ndim + 1, table)[:-1]
    for start in range(len(names)):
        axes = table.get(names[start:])
        if axes is not None and len(axes) <= ndim:
            return (None,) * (ndim - len(axes)) + axes
    return (None,) * ndim


def _names(path: tuple) -> Names:
    """The names on the way to a leaf, whatever kind of node they stand in."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
