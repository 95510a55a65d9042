"""Training on fresh samples, one scan over the steps: the one loop of every trained model here."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rlhf_jax.icl.checks import at_least
from rlhf_jax.types import Params


class Fit(NamedTuple):
    """What training gave.

    Attributes:
        params: after the last step.
        averaged: their mean over the last half of the steps, which has less noise than `params`.
        losses: of each step, before its update, [steps].
    """

    params: Params
    averaged: Params
    losses: Float[Array, " steps"]


def fit(
    loss: Callable[[Params, Array], Float[Array, ""]],
    params: Params,
    optimizer: optax.GradientTransformation,
    steps: int,
    key: Array,
) -> Fit:
    """Minimises an expectation over fresh samples; jit the caller, and map it over seeds with `parallel.lanes`.

    Args:
        loss: `loss(params, key)` draws a batch with the key and gives its mean loss.
        params: where training starts.
        optimizer: of optax.
        steps: number of updates, at least 1.
        key: step i draws with `fold_in(key, i)`.

    Returns:
        The parameters and losses.

    Raises:
        ValueError: steps below 1.
    """
    at_least("number of steps", steps, 1)
    half = steps // 2

    def step(carry: tuple, number: Array) -> tuple[tuple, Array]:
        params, state, total = carry
        value, gradient = jax.value_and_grad(loss)(params, jax.random.fold_in(key, number))
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        counts = (number >= half).astype(jnp.float32)
        total = jax.tree.map(lambda sum_, one: sum_ + counts.astype(one.dtype) * one, total, params)
        return (params, state, total), value

    start = (params, optimizer.init(params), jax.tree.map(jnp.zeros_like, params))
    (params, _, total), losses = jax.lax.scan(step, start, jnp.arange(steps))
    averaged = jax.tree.map(lambda sum_: sum_ / jnp.asarray(steps - half, sum_.dtype), total)
    return Fit(params=params, averaged=averaged, losses=losses)
