"""Inputs that training did not show: how far does what a model learnt to do in context reach?

A change takes the drawn inputs of prompts and gives others, before `regression.draw_prompt` evaluates the function on
them; it therefore works for every kind of function. Most are tests of Garg et al. 2022 (arXiv 2208.01066).

    draw_regression(key, setting, count, length, change=repeated_query)
    draw_regression(key, setting, count, length, change=scale_inputs(3.0))

All have the same arguments, and so have the functions that `scale_inputs` and `keep_coordinates` return:

    key: random key.
    inputs: x_i of the context, [B, N, d].
    query: [B, d].

They give inputs and query of the same shapes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rlhf_jax.icl.tasks.regression import Change


def scale_inputs(scale: float) -> Change:
    """A change that multiplies all inputs, those of the context and the query, by a number."""

    def change(
        key: Key[Array, ""], inputs: Float[Array, "B N d"], query: Float[Array, "B d"]
    ) -> tuple[Float[Array, "B N d"], Float[Array, "B d"]]:
        return scale * inputs, scale * query

    return change


def keep_coordinates(active: int | Int[Array, ""]) -> Change:
    """A change that sets all but the first `active` coordinates to zero; the number may be traced.

    The curriculum of Garg et al. begins with few coordinates and adds others.
    """

    def change(
        key: Key[Array, ""], inputs: Float[Array, "B N d"], query: Float[Array, "B d"]
    ) -> tuple[Float[Array, "B N d"], Float[Array, "B d"]]:
        kept = (jnp.arange(query.shape[-1]) < active).astype(query.dtype)
        return inputs * kept[None, None, :], query * kept[None, :]

    return change


def same_quadrant(
    key: Key[Array, ""], inputs: Float[Array, "B N d"], query: Float[Array, "B d"]
) -> tuple[Float[Array, "B N d"], Float[Array, "B d"]]:
    """Moves the context into one random quadrant a prompt, and leaves the query."""
    signs = jax.random.rademacher(key, (query.shape[0], 1, query.shape[1]), query.dtype)
    return jnp.abs(inputs) * signs, query


def opposite_quadrant(
    key: Key[Array, ""], inputs: Float[Array, "B N d"], query: Float[Array, "B d"]
) -> tuple[Float[Array, "B N d"], Float[Array, "B d"]]:
    """Moves the context into one random quadrant a prompt, and the query into the opposite one."""
    signs = jax.random.rademacher(key, (query.shape[0], 1, query.shape[1]), query.dtype)
    return jnp.abs(inputs) * signs, -jnp.abs(query) * signs[:, 0]


def orthogonal_query(
    key: Key[Array, ""], inputs: Float[Array, "B N d"], query: Float[Array, "B d"]
) -> tuple[Float[Array, "B N d"], Float[Array, "B d"]]:
    """Turns the query so that it is orthogonal to all inputs of the context, and keeps its length.

    Nothing in the context then tells of the value at the query: the best prediction of a linear function is 0.

    Raises:
        ValueError: the context has as many examples as there are dimensions, or more.
    """
    _, length, d = inputs.shape
    if length >= d:
        raise ValueError(f"{length} examples leave no direction of {d} orthogonal to them: give at most {d - 1}.")
    basis, _ = jnp.linalg.qr(jnp.swapaxes(inputs, 1, 2))
    rest = query
    for _ in range(2):  # the second time removes what rounding left of the first
        along = jnp.einsum("bdn,bd->bn", basis, rest, precision="highest")
        rest = rest - jnp.einsum("bdn,bn->bd", basis, along, precision="highest")
    lengths = jnp.linalg.norm(query, axis=1, keepdims=True)
    return inputs, rest * lengths / jnp.linalg.norm(rest, axis=1, keepdims=True)


def repeated_query(
    key: Key[Array, ""], inputs: Float[Array, "B N d"], query: Float[Array, "B d"]
) -> tuple[Float[Array, "B N d"], Float[Array, "B d"]]:
    """Asks for an example of the context, chosen at random."""
    chosen = jax.random.randint(key, (inputs.shape[0], 1, 1), 0, inputs.shape[1])
    return inputs, jnp.take_along_axis(inputs, chosen, axis=1)[:, 0]


def interpolated_query(
    key: Key[Array, ""], inputs: Float[Array, "B N d"], query: Float[Array, "B d"]
) -> tuple[Float[Array, "B N d"], Float[Array, "B d"]]:
    """Asks for a point on the segment between two examples of the context, all three chosen uniformly at random."""
    choice_key, place_key = jax.random.split(key)
    chosen = jax.random.randint(choice_key, (inputs.shape[0], 2, 1), 0, inputs.shape[1])
    share = jax.random.uniform(place_key, query.shape[:1], query.dtype)[:, None]
    ends = jnp.take_along_axis(inputs, chosen, axis=1)
    return inputs, share * ends[:, 0] + (1 - share) * ends[:, 1]
