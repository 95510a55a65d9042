"""What on-policy algorithms have in common: how responses are drawn and read, and the steps taken on a rollout.

An algorithm adds what makes it one: a credit for each token (advantages), and a loss of the tokens of a minibatch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms.accumulation import accumulated_gradients
from rlhf_jax.algorithms.optimizer import apply_gradients
from rlhf_jax.losses.kl import kl_estimate
from rlhf_jax.losses.policy import ratio_metrics
from rlhf_jax.losses.reduce import mean
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import response_states, token_scores
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.types import Metrics, Params, Rollout


def check_passes(name: str, sampling: SamplingConfig, epochs: int, minibatches: int, accumulate: int) -> None:
    """Refuses options that no on-policy algorithm can work with.

    Args:
        name: of the algorithm, for messages.
        sampling: filters are refused, since they change the support of the behaviour policy.
        epochs: passes over each rollout.
        minibatches: optimiser steps a pass.
        accumulate: microbatches an optimiser step.

    Raises:
        ValueError: an option is out of range.
    """
    if sampling.filtered:
        raise ValueError(
            f"{name} samples from the policy itself: "
            "set temperature > 0, top_k=None, top_p=1 and min_p=0 in its sampling."
        )
    if min(epochs, minibatches, accumulate) < 1:
        raise ValueError(
            f"{name} needs at least 1 epoch, 1 minibatch and 1 microbatch, not {epochs}, {minibatches}, {accumulate}."
        )


def check_minibatches(rows: int, minibatches: int, accumulate: int) -> None:
    """Refuses rollouts that do not split into minibatches and these into microbatches.

    Raises:
        ValueError: the sentence has the arithmetic.

    Example:
        >>> check_minibatches(12, minibatches=2, accumulate=4)
        Traceback (most recent call last):
            ...
        ValueError: 12 responses in 2 minibatches are 6 an optimiser step, which do not split into 4 microbatches; ...
    """
    if rows % minibatches:
        raise ValueError(f"{rows} responses do not split into {minibatches} minibatches; choose a divisor.")
    if rows // minibatches % accumulate:
        raise ValueError(
            f"{rows} responses in {minibatches} minibatches are {rows // minibatches} an optimiser step, which do not "
            f"split into {accumulate} microbatches; choose an --accumulate that divides them."
        )


def rollout_key(key: Array, step: Int[Array, ""]) -> Array:
    """The key that the responses of a rollout are drawn with, after `step` rollouts."""
    return jax.random.fold_in(jax.random.fold_in(key, step), 0)


def order_key(key: Array, step: Int[Array, ""]) -> Array:
    """The key that the rows of a rollout are shuffled with, after `step` rollouts."""
    return jax.random.fold_in(jax.random.fold_in(key, step), 1)


def predicting_states(config: ModelConfig, trunk: Params, taken: Rollout) -> Float[Array, "B T D"]:
    """The hidden states of a trunk that predict the responses."""
    hidden = apply_trunk(config, trunk, taken.sequences.tokens, taken.sequences.mask).final
    return response_states(hidden, taken.tokens.shape[1])


def taken_scores(
    config: ModelConfig, policy: Params, taken: Rollout, temperature: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T D"]]:
    """Log-probability of each token taken and entropy, in nats, and the states that they were computed from."""
    states = predicting_states(config, policy["trunk"], taken)
    logprob, entropies = token_scores(config, policy, states, taken.tokens, temperature)
    return logprob, entropies, states


def rollout_metrics(taken: Rollout, reference_logprob: Float[Array, "B T"]) -> Metrics:
    """What a rollout says of the policy: its KL from the reference and entropy in nats a response, and its lengths."""
    kl = {kind: kl_estimate(taken.logprob, reference_logprob, kind) for kind in ("k1", "k3")}
    return {
        "objective/kl": mean(kl["k1"], taken.mask, "sequence_sum"),
        "objective/kl_k3": mean(kl["k3"], taken.mask, "sequence_sum"),
        "objective/entropy": -mean(taken.logprob, taken.mask, "sequence_sum"),
        "completions/mean_length": taken.mask.sum(axis=-1).astype(jnp.float32).mean(),
        "completions/clipped_ratio": 1.0 - taken.finished.astype(jnp.float32).mean(),
    }


def step_metrics(logprob: Float[Array, "B T"], taken: Rollout, clip_low: float, clip_high: float) -> Metrics:
    """How far the policy of a step has moved from the one that sampled, see `ratio_metrics`."""
    gap = jnp.max(jnp.where(taken.mask, jnp.abs(logprob - taken.logprob), 0.0))
    metrics = ratio_metrics(logprob, taken.logprob, taken.mask, clip_low, clip_high)
    return metrics | {"policy/max_logprob_gap": gap}


def take_steps(
    loss: Callable[[Params, Any, Any], tuple[Array, Any]],
    measure: Callable[[Any, Any], Metrics],
    optimizer: optax.GradientTransformation,
    params: Params,
    optimizer_state: optax.OptState,
    experience: Any,
    key: Array,
    *,
    epochs: int,
    minibatches: int,
    accumulate: int = 1,
    target_kl: float | None = None,
) -> tuple[Params, optax.OptState, Metrics]:
    """epochs x minibatches optimiser steps on one rollout, each epoch in a new order of its rows.

    Args:
        loss: `loss(params, part, minibatch) -> (value, outputs)`, see `accumulated_gradients`.
        measure: `measure(outputs, minibatch) -> metrics`, of the outputs of all rows of a minibatch; `step_metrics`
            are among them.
        optimizer: an optax optimiser of `params`.
        params: what is trained.
        optimizer_state: its state.
        experience: the rollout and what is fixed about it, a tree of arrays whose first axis counts the rows.
        key: of the orders.
        epochs: passes over the rows.
        minibatches: optimiser steps a pass; divides the number of rows, see `check_minibatches`.
        accumulate: microbatches that a minibatch is seen in; divides its rows.
        target_kl: once `policy/approxkl` of a minibatch exceeds this (nats a token), the rest is skipped; None: never.

    Returns:
        Parameters, optimiser state and metrics: means over the steps; `val/first_ratio` and `policy/max_logprob_gap`
        are those of the first step, which sees the policy that sampled: its ratio is 1 up to rounding between decoding
        and training.
    """
    rows = len(jax.tree.leaves(experience)[0])

    def step(carry: tuple[Params, optax.OptState, Bool[Array, ""]], chosen: Int[Array, " rows"]):
        params, optimizer_state, stopped = carry
        minibatch = jax.tree.map(lambda leaf: leaf[chosen], experience)
        gradients, outputs = accumulated_gradients(loss, params, minibatch, accumulate)
        metrics = measure(outputs, minibatch)
        *stepped, applied = apply_gradients(optimizer, gradients, optimizer_state, params)
        if target_kl is not None:
            stopped = stopped | (metrics["policy/approxkl"] > target_kl)
            stepped = jax.tree.map(partial(jnp.where, stopped), [params, optimizer_state], stepped)
        return (*stepped, stopped), metrics | applied | {"policy/stopped": stopped.astype(jnp.float32)}

    keys = jax.random.split(key, epochs)
    orders = jax.vmap(jax.random.permutation, in_axes=(0, None))(keys, rows).reshape(epochs * minibatches, -1)
    (params, optimizer_state, _), steps = jax.lax.scan(step, (params, optimizer_state, jnp.array(False)), orders)
    metrics = {name: values.mean() for name, values in steps.items()}
    metrics["val/first_ratio"] = steps["val/ratio"][0]
    metrics["policy/max_logprob_gap"] = steps["policy/max_logprob_gap"][0]
    return params, optimizer_state, metrics
