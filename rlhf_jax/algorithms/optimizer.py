"""One way to make an optax optimiser and to apply it."""

import jax
import optax
from jaxtyping import Array, Float

from rlhf_jax.types import Params


def adam(
    learning_rate: float | optax.Schedule,
    max_grad_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """AdamW after clipping of the global gradient norm.

    Args:
        learning_rate: a number or an optax schedule of the update count.
        max_grad_norm: gradients with a larger global norm are scaled down to it; None never clips.
        weight_decay: decoupled decay per unit of learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
    """
    transformation = optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)
    if max_grad_norm is None:
        return transformation
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), transformation)


def apply_gradients(
    optimizer: optax.GradientTransformation, gradients: Params, optimizer_state: optax.OptState, params: Params
) -> tuple[Params, optax.OptState, Float[Array, ""]]:
    """One optimiser step.

    Returns:
        New parameters, new optimiser state, and the global norm of the gradients before any clipping.
    """
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its step counter's integers with floats
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, optax.tree.norm(gradients)
