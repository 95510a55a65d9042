"""Meshes: how many devices work along each axis, on one host, several hosts or several slices.

    mesh = make_mesh(parse_mesh("data=2,fsdp=4"))
    with jax.set_mesh(mesh): ...

| axis       | what is split over it                                                                    |
|------------|------------------------------------------------------------------------------------------|
| `data`     | rows of a batch; every device has all parameters                                         |
| `fsdp`     | rows of a batch, and parameters, which are gathered layer by layer where they are used   |
| `tensor`   | heads, the feed-forward width and the vocabulary                                         |
| `sequence` | tokens of a row                                                                          |
| `expert`   | rows of a batch, and the experts of a mixture                                            |
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.partitioning import MESH_AXES, axes_of


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; see the module.

    Raises:
        ValueError: a number below 1.

    Example:
        >>> MeshShape(data=2, fsdp=4).devices
        8
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if size < 1:
                raise ValueError(f"the mesh axis {name} is {size}: give 1 or more.")

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis, by its name."""
        return {name: getattr(self, name) for name in MESH_AXES}

    @property
    def devices(self) -> int:
        """How many devices there are in all."""
        return math.prod(self.sizes.values())

    def __str__(self) -> str:
        named = [f"{name}={size}" for name, size in self.sizes.items() if size > 1]
        return ",".join(named) or "data=1"


def parse_mesh(words: str) -> MeshShape:
    """A mesh shape from words such as `data=2,fsdp=4`; axes that are not named are 1.

    Raises:
        ValueError: an unknown or repeated axis, or a size that is no number.

    Example:
        >>> parse_mesh("fsdp=4,tensor=2")
        MeshShape(data=1, fsdp=4, tensor=2, sequence=1, expert=1)
    """
    sizes: dict[str, int] = {}
    for word in words.split(","):
        name, _, size = word.strip().partition("=")
        if name not in MESH_AXES or name in sizes or not size.strip().isdigit():
            raise ValueError(
                f"the mesh {words!r} is not understood at {word.strip()!r}: write NAME=NUMBER,NAME=NUMBER with each "
                f"name once, of {', '.join(MESH_AXES)}."
            )
        sizes[name] = int(size)
    return MeshShape(**sizes)


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None, between: MeshShape | None = None) -> Mesh:
    """A mesh over the devices, neighbours in the network side by side.

    Args:
        shape: devices along each axis; with `between`, within one slice (or one host of a GPU cluster).
        devices: which; None: all. A role that has devices of its own (a reward model beside the policy) gets a mesh
            over those alone.
        between: how often each axis is repeated over slices (or hosts), which talk over the slow data-center
            network: the mesh has shape * between devices along an axis. None: there is one slice.

    Returns:
        A mesh with all five axes, which the compiler splits along (`AxisType.Auto`).

    Raises:
        ValueError: the shape has another number of devices than there are.

    Example:
        >>> make_mesh(MeshShape(), jax.devices()[:1]).shape["data"]
        1
    """
    devices = list(jax.devices() if devices is None else devices)
    between = between or MeshShape()
    needed = shape.devices * between.devices
    if needed != len(devices):
        repeated = f" times {between} between slices" if between.devices > 1 else ""
        raise ValueError(
            f"a mesh of {shape}{repeated} has {_product(shape, between)} = {needed} devices, but there are "
            f"{len(devices)}: choose sizes whose product is {len(devices)}."
        )
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    inner = tuple(shape.sizes.values())
    from jax.experimental import mesh_utils

    if between.devices == 1:
        # An axis of the mesh may be a part of an axis of a TPU's torus: the links are the same.
        grid = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=kinds)
    # GPUs and CPUs have no slices: there a process (a host) is what the fast network ends at.
    slices = {getattr(device, "slice_index", None) for device in devices}
    by_process = None in slices or len(slices) == 1
    try:
        grid = mesh_utils.create_hybrid_device_mesh(
            inner,
            tuple(between.sizes.values()),
            devices,
            process_is_granule=by_process,
            allow_split_physical_axes=True,
        )
    except ValueError as error:
        what = "processes" if by_process else "slices"
        raise ValueError(
            f"a mesh of {shape} within and {between} between {what} does not fit these devices ({error}): "
            f"between must multiply to the number of {what}."
        ) from None
    return Mesh(np.asarray(grid), MESH_AXES, axis_types=kinds)


def check_model(config: ModelConfig, sizes: Mapping[str, int]) -> None:
    """Refuses a mesh that does not divide the model.

    Args:
        config: the model's shape.
        sizes: devices along each axis, as in `mesh.shape`.

    Raises:
        ValueError: with the arithmetic.

    Example:
        >>> tiny = ModelConfig(vocab_size=10, width=4, layers=1, heads=2, key_value_heads=2, feed_forward_width=8,
        ...                    context_length=8)
        >>> check_model(tiny, {"tensor": 4})
        Traceback (most recent call last):
            ...
        ValueError: the mesh axis tensor=4 does not divide the 2 key and value heads (2 = 4 × 0 + 2): ...
    """
    split = [
        ("heads", config.key_value_heads, "key and value heads"),
        ("heads", config.heads, "query heads"),
        ("feed_forward", config.feed_forward_width, "feed-forward channels"),
        ("vocabulary", config.vocab_size, "tokens of the vocabulary"),
        ("width", config.width, "channels of the residual stream"),
    ]
    if config.experts is not None:
        split.append(("expert", config.experts.count, "experts"))
    for name, size, what in split:
        _check_divides(name, size, what, sizes)


def check_batch(rows: int | None, tokens: int | None, sizes: Mapping[str, int], what: str = "rows of a batch") -> None:
    """Refuses a batch that does not divide over the mesh.

    Args:
        rows: rows of a (micro)batch, over all devices; None: not known yet.
        tokens: tokens of a row, padding included; None: not known yet.
        sizes: devices along each axis, as in `mesh.shape`.
        what: what the rows are, for the message.

    Raises:
        ValueError: with the arithmetic.

    Example:
        >>> check_batch(6, None, {"data": 4})
        Traceback (most recent call last):
            ...
        ValueError: the mesh axis data=4 does not divide the 6 rows of a batch (6 = 4 × 1 + 2): ...
    """
    if rows is not None:
        _check_divides("batch", rows, what, sizes)
    if tokens is not None:
        _check_divides("tokens", tokens, "tokens of a row", sizes)


def _check_divides(name: str, size: int, what: str, sizes: Mapping[str, int]) -> None:
    axes = axes_of(name, sizes)
    over = math.prod(sizes[axis] for axis in axes)
    if size % over:
        named = " × ".join(f"{axis}={sizes[axis]}" for axis in axes)
        beginning = f"the mesh axis {named} does" if len(axes) == 1 else f"the mesh axes {named} do"
        raise ValueError(
            f"{beginning} not divide the {size} {what} ({size} = {over} × {size // over} + {size % over}): "
            f"choose divisors of {size}."
        )


def _product(shape: MeshShape, between: MeshShape) -> str:
    factors = [size for part in (shape, between) for size in part.sizes.values() if size > 1]
    return " × ".join(map(str, factors)) or "1"
