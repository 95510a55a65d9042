"""One program for many lanes (seeds, coefficients, ensemble members); the one place that chooses how they are batched.

A lane is one independent run: a slice along axis 0 of every leaf of the lanes' pytree. On an accelerator lanes are
vmapped. On a CPU they are mapped one after another (`jax.lax.map`), which keeps matrices in cache and lets each lane's
loops stop when *it* is done. With several devices the lanes are split over them by `shard_map`, without communication.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

RULES = ("auto", "vmap", "map")


def use_all_cores() -> None:
    """Makes every CPU core a device, so that `over_lanes` keeps all of them busy; call it before JAX is used.

    Small matrix products do not spread over cores by themselves: two lanes on two devices take half the time. It
    changes nothing on other backends, or once JAX has started.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ:  # the user has chosen
        return
    try:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    except (AttributeError, RuntimeError):  # no such call on this system, or JAX has started
        return


def choose_rule(rule: str = "auto") -> str:
    """ "vmap" or "map": the given rule, or for "auto" the one that was measured faster on this backend.

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"the lane rule is {rule!r}; choose one of {', '.join(RULES)}.")
    if rule == "auto":
        return "map" if jax.default_backend() == "cpu" else "vmap"
    return rule


def over_lanes(
    function: Callable[..., Any],
    rule: Literal["auto", "vmap", "map"] = "auto",
    devices: Sequence[jax.Device] | None = None,
) -> Callable[..., Any]:
    """Lifts `function(lane, *shared)` to lanes stacked on axis 0: `lifted(lanes, *shared)`.

    Lanes that do not divide evenly over the devices are filled up with copies of the last, whose results are dropped;
    only then do devices exchange any.

    Args:
        function: one run; `shared` arguments are the same for all lanes.
        rule: "vmap", "map" (one lane at a time on each device) or "auto".
        devices: devices to split the lanes over; None: all local ones (on a CPU, for "vmap", the first).

    Returns:
        A function whose outputs have the lanes on axis 0; jit it.

    Example:
        >>> double = over_lanes(lambda lane, offset: 2 * lane + offset)
        >>> double(jnp.arange(3), jnp.int32(1)).tolist()
        [1, 3, 5]
    """
    how = choose_rule(rule)
    if devices is None:
        devices = jax.local_devices()
        if how == "vmap" and jax.default_backend() == "cpu":
            devices = devices[:1]  # split over several, they can wait for ever in jaxlib 0.10's thread pool
    devices = list(devices)

    def batched(lanes: Any, *shared: Any) -> Any:
        if how == "vmap":
            return jax.vmap(lambda lane: function(lane, *shared))(lanes)
        return jax.lax.map(lambda lane: function(lane, *shared), lanes)

    if len(devices) == 1:
        return batched

    mesh = jax.make_mesh((len(devices),), ("lane",), axis_types=(AxisType.Auto,), devices=devices)

    def lifted(lanes: Any, *shared: Any) -> Any:
        count = jax.tree.leaves(lanes)[0].shape[0]
        surplus = -count % len(devices)
        filled = jax.tree.map(lambda leaf: jnp.concatenate([leaf, *[leaf[-1:]] * surplus]), lanes)
        specs = (PartitionSpec("lane"), *[PartitionSpec()] * len(shared))
        sharded = jax.shard_map(batched, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("lane"), check_vma=False)
        return jax.tree.map(lambda leaf: leaf[:count], sharded(filled, *shared))

    return lifted
