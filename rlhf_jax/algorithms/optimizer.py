"""One way to make an optax optimiser and to apply it."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.models.compressed_moments import Moments, scale_by_adam
from rlhf_jax.types import Metrics, Params


def learning_rate_schedule(
    peak: float, steps: int, warmup: int = 0, shape: Literal["constant", "linear", "cosine"] = "constant"
) -> optax.Schedule:
    """A linear warm-up to the peak, then a constant rate or a decay that would reach 0 after the last update.

    Args:
        peak: the largest learning rate.
        steps: number of optimiser updates in all, warm-up included (PPO makes epochs x minibatches a rollout).
        warmup: update k = 1 … warmup has the rate peak k / warmup; 0: none.
        shape: what follows the warm-up.

    Returns:
        A function from the number of updates made before to the rate of the next one.

    Raises:
        ValueError: an unknown shape, a peak that is not positive, or a warm-up that is not shorter than the run.

    Example:
        >>> rate = learning_rate_schedule(0.1, steps=6, warmup=2, shape="linear")
        >>> [round(float(rate(count)), 4) for count in range(6)]
        [0.05, 0.1, 0.1, 0.075, 0.05, 0.025]
    """
    if peak <= 0:
        raise ValueError(f"the learning rate is {peak!r}; it must be positive.")
    if not 0 <= warmup < steps:
        raise ValueError(f"a warm-up of {warmup} updates does not fit a run of {steps}; give 0 to {steps - 1}.")
    rest = steps - warmup
    if shape == "constant":
        after = optax.constant_schedule(peak)
    elif shape == "linear":
        after = optax.linear_schedule(peak, 0.0, rest)
    elif shape == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    else:
        raise ValueError(f"unknown learning-rate schedule {shape!r}: choose constant, linear or cosine.")
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1), after], [warmup])


def adam(
    learning_rate: float | optax.Schedule,
    max_grad_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    moments: Moments = "float32",
) -> optax.GradientTransformation:
    """AdamW after clipping of the global gradient norm; its state holds the learning rate of the last update.

    Args:
        learning_rate: a number or an optax schedule of the update count, such as `learning_rate_schedule`.
        max_grad_norm: gradients with a larger global norm are scaled down to it; None never clips.
        weight_decay: decoupled decay per unit of learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        moments: how the two moments are stored: "float32" (8 bytes a parameter, whatever the parameter's dtype),
            "bfloat16" (4) or "int8" (2, in codes), see `compressed_moments`.
    """
    clip = optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm)

    def optimizer(learning_rate):
        decay, scale = optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
        return optax.chain(clip, scale_by_adam(b1, b2, moments), decay, scale)

    def rate(count):
        with jax.numpy_dtype_promotion("standard"):  # optax schedules mix the count's integers with floats
            return learning_rate(count)

    return optax.inject_hyperparams(optimizer, hyperparam_dtype=jnp.float32)(
        learning_rate=rate if callable(learning_rate) else learning_rate
    )


def apply_gradients(
    optimizer: optax.GradientTransformation, gradients: Params, optimizer_state: optax.OptState, params: Params
) -> tuple[Params, optax.OptState, Metrics]:
    """One optimiser step.

    Returns:
        New parameters, new optimiser state, and the metrics `grad_norm` (the global norm of the gradients before any
        clipping) and, where the optimiser's state holds it as that of `adam` does, `lr` (the rate of this step).
    """
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its step counter's integers with floats
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        params = optax.apply_updates(params, updates)
    metrics = {"grad_norm": optax.tree.norm(gradients)}
    rate = optax.tree_utils.tree_get(
        optimizer_state, "learning_rate", filtering=lambda path, value: isinstance(value, jax.Array)
    )
    return params, optimizer_state, metrics if rate is None else metrics | {"lr": rate}
