"""How a host loop compiles a step: the new state takes the place of the old one, on every device."""

from collections.abc import Callable
from typing import Any

import jax


def in_place(step: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Compiles `step(state, *rest) -> (state, other)`; the state is donated and stays where it lies.

    Without it the compiler chooses where on a mesh the new state lies: the second step would be compiled anew for what
    the first one chose.

    Args:
        step: a pure function whose state keeps its structure and shapes.

    Returns:
        The compiled step. All states that it is called with must lie as the first one does.

    Example:
        >>> import jax.numpy as jnp
        >>> count = in_place(lambda state, by: (state + by, 2 * state))
        >>> [int(number) for number in count(jnp.int32(1), 3)]
        [4, 2]
    """
    compiled = None

    def run(state: Any, *rest: Any) -> tuple[Any, Any]:
        nonlocal compiled
        if compiled is None:
            spread = any(len(leaf.sharding.device_set) > 1 for leaf in jax.tree.leaves(state))
            where = jax.tree.map(lambda leaf: leaf.sharding, state) if spread else None
            compiled = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
        return compiled(state, *rest)

    return run
