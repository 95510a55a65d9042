"""Arrays that live in the host's memory, and what a block keeps for the backward pass.

A frozen model that is needed once an update (the reference policy of PPO or DPO) may live in the host's memory: its
leaves then have a sharding of memory kind `pinned_host` (`parallel.sharding` puts them there), and a compiled program
knows it from their types. The trunk fetches such parameters where it uses them, a layer at a time, so the device never
holds more than a layer or two of them.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from rlhf_jax.models.config import Remat
from rlhf_jax.types import Params

HOST = "pinned_host"
BLOCK_INPUT = "block_input"


def on_device(tree: Params) -> Params:
    """The tree with every array that lives in the host's memory copied to the device's; the others as they are.

    Under `jit` the copy is part of the program, and stands where this is called: call it where the arrays are used.

    Args:
        tree: a pytree of arrays or tracers.

    Example:
        >>> import jax.numpy as jnp
        >>> array = jnp.ones(2)
        >>> on_device(array) is array
        True
    """

    host, device = jax.memory.Space.Host, jax.memory.Space.Device
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, device) if jax.typeof(leaf).memory_space == host else leaf, tree
    )


def named_input(x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """The input of a block under the name by which "full_on_host" finds it; to be called inside the block."""
    return checkpoint_name(x, BLOCK_INPUT)


def remat_policy(remat: Remat) -> Callable[..., object] | None:
    """The policy of `jax.checkpoint` of that name, see `ModelConfig.remat`; None keeps a block's inputs only.

    Args:
        remat: any name but "none".
    """
    policies = jax.checkpoint_policies
    return {
        "dots": policies.dots_saveable,
        "projections": policies.dots_with_no_batch_dims_saveable,
        "full": None,
        "projections_on_host": policies.offload_dot_with_no_batch_dims("device", HOST),
        "full_on_host": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device",
            offload_dst=HOST,
        ),
    }[remat]
