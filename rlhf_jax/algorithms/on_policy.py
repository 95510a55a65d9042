"""What on-policy algorithms have in common: a state, and the one way from prompts to an update.

The life of a batch: responses are drawn (`draw`), the reference reads them (and the policy, if its log-probabilities
are not to be those of the draws), what is fixed about them (advantages, returns, weights) is worked out once
(`prepare`), and then epochs x minibatches steps are taken: the policy reads its rows again (`predict`) and the terms of
the loss are reduced over them (`terms`). An algorithm is a choice of these pieces; `ppo`, `policy_gradient`,
`imitation` and `online_preference` each make one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms.accumulation import accumulated_gradients, by_parts
from rlhf_jax.algorithms.on_policy_options import OnPolicyConfig
from rlhf_jax.algorithms.optimizer import apply_gradients
from rlhf_jax.algorithms.rollouts import at_length, sampler_weights, taken_scores
from rlhf_jax.algorithms.trained import check_roles, reference_policy, trainable, without_shared_arrays
from rlhf_jax.losses.kl import KLController, fixed_kl
from rlhf_jax.losses.reduce import mean
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy
from rlhf_jax.types import Algorithm, Metrics, Params, Prompts, Rollout


@chex.dataclass(frozen=True)
class PolicyState:
    """Everything an on-policy algorithm carries from one update to the next.

    Attributes:
        params: what is trained: the policy, or the adapter that is trained on the reference; of PPO
            `{"policy": tree, "value": tree}`.
        reference: the frozen policy that the KL is measured from, and the base of an adapter; None where none is kept.
        optimizer_state: the optimiser's state.
        kl_coefficient: the KL controller's state, float32 scalar; replace it to batch over coefficients.
        key: a typed key, never used twice: the number of rollouts is folded in.
        step: number of rollouts so far, int32.
    """

    params: Params
    reference: Params
    optimizer_state: optax.OptState
    kl_coefficient: Float[Array, ""]
    key: Array
    step: Int[Array, ""]


class Pieces(NamedTuple):
    """What makes an on-policy algorithm the one that it is.

    Attributes:
        policy: `policy(params, reference) -> Params`: the policy in the parameters that are trained.
        draw: `draw(params, reference, prompts, key) -> Rollout`; several responses to a prompt follow each other.
        prepare: `prepare(state, rollout, rewards, reference_logprob) -> (experience, metrics)`, once an update, before
            the first step. `reference_logprob` [B, T] is None where no reference is kept. The experience is a tree of
            arrays whose first axis is what is shuffled and split: responses, or groups of them.
        predict: `predict(params, reference, experience) -> found`: what is read off the parameters being trained, a
            tree of arrays with that first axis.
        terms: `terms(found, part, minibatch, kl_coefficient) -> dict` of scalars, the part's shares of those of the
            minibatch (see `whole` of `losses.reduce.mean`): `loss` is minimised, the others are logged.
        measure: `measure(found, minibatch) -> metrics` besides, `step_metrics` among them.
        ratio: the log-ratio of tokens or responses that the weights of `old_logprob="truncated"` are made of, see
            `sampler_weights`; None: the loss is no policy gradient, and has no such weights.
    """

    policy: Callable[[Params, Params], Params]
    draw: Callable[[Params, Params, Prompts, Array], Rollout]
    prepare: Callable[[PolicyState, Rollout, Array, Any], tuple[Any, Metrics]]
    predict: Callable[[Params, Params, Any], Any]
    terms: Callable[[Any, Any, Any, Array], Metrics]
    measure: Callable[[Any, Any], Metrics]
    ratio: Callable[[Array, Array, Array], Array] | None = None


def on_policy(
    config: ModelConfig,
    options: OnPolicyConfig,
    optimizer: optax.GradientTransformation,
    kl: KLController | None,
    begin: Callable[[Array, Params], tuple[Params, Params, Array]],
    pieces: Pieces,
) -> Algorithm:
    """An on-policy `Algorithm` from its pieces.

    Args:
        config: shape of the policy.
        options: of the passes over a rollout.
        optimizer: an optax optimiser of what is trained.
        kl: controller of the coefficient of the KL; None: 0.
        begin: `begin(key, given) -> (trained parameters, reference, key of the state)`, see `begin_with_policy`.
        pieces: see `Pieces`.

    Raises:
        ValueError: weights for tokens of an algorithm that is no policy gradient.
    """
    kl = fixed_kl(0.0) if kl is None else kl
    truncated = options.old_logprob == "truncated"
    if truncated and pieces.ratio is None:
        raise ValueError(
            "old_logprob 'truncated' weighs the tokens of a policy gradient, which this is not: choose recomputed."
        )

    def init(key: Array, params: Params | None = None) -> PolicyState:
        trained, reference, state_key = begin(key, params or {})
        state = PolicyState(
            params=trained,
            reference=reference,
            optimizer_state=optimizer.init(trained),
            kl_coefficient=kl.init(),
            key=state_key,
            step=jnp.int32(0),
        )
        return without_shared_arrays(state)

    def rollout(state: PolicyState, prompts: Prompts) -> tuple[PolicyState, Rollout]:
        taken = pieces.draw(state.params, state.reference, prompts, rollout_key(state.key, state.step))
        return state.replace(step=state.step + 1), taken

    def read_reference(state: PolicyState, taken: Rollout) -> Float[Array, "B T"] | None:
        return None if state.reference is None else read_policy(state.reference, taken)

    def read_policy(policy: Params, taken: Rollout) -> Float[Array, "B T"]:
        def read(taken: Rollout) -> Float[Array, "B T"]:
            return taken_scores(config, policy, taken, options.sampling.logprob_temperature)[0]

        return in_parts(read, taken, options)

    def with_old_logprob(state: PolicyState, taken: Rollout) -> tuple[Rollout, Metrics]:
        """The rollout with the old policy's log-probabilities in place of the sampler's, and how far these are off."""
        if options.old_logprob == "rollout":
            return taken, {}
        own = taken.mask & taken.own_rows[:, None]
        old = read_policy(pieces.policy(state.params, state.reference), taken)
        taken = taken.replace(logprob=jnp.where(own, old, taken.logprob))
        gap = jnp.abs(taken.logprob - taken.sampling_logprob)
        metrics = {"policy/max_logprob_gap": jnp.max(jnp.where(own, gap, 0.0))}
        if truncated:
            weights = sampler_weights(taken, pieces.ratio, options.importance_cap)
            metrics["policy/importance_weight"] = mean(weights, own)
            metrics["policy/max_importance_weight"] = jnp.max(jnp.where(own, weights, 0.0))
        return taken, metrics

    def update(state: PolicyState, taken: Rollout, rewards: Array) -> tuple[PolicyState, Metrics]:
        if rewards.shape not in (taken.mask.shape[:1], taken.mask.shape):
            raise ValueError(
                f"rewards have the shape {rewards.shape}: give one a response, {taken.mask.shape[:1]}, or one a token, "
                f"{taken.mask.shape}."
            )
        buckets = options.length_buckets
        params, optimizer_state, metrics = at_length(partial(learn, state), taken, rewards, buckets)
        coefficient = state.kl_coefficient
        if "objective/kl" in metrics:
            coefficient = kl.update(coefficient, metrics["objective/kl"], len(taken.tokens))
        return state.replace(params=params, optimizer_state=optimizer_state, kl_coefficient=coefficient), metrics

    def learn(state: PolicyState, taken: Rollout, rewards: Array) -> tuple[Params, optax.OptState, Metrics]:
        taken, gaps = with_old_logprob(state, taken)
        experience, metrics = pieces.prepare(state, taken, rewards, read_reference(state, taken))

        def loss(params: Params, part: Any, minibatch: Any) -> tuple[Float[Array, ""], Any]:
            found = pieces.predict(params, state.reference, part)
            return pieces.terms(found, part, minibatch, state.kl_coefficient)["loss"], found

        def measure(found: Any, minibatch: Any) -> Metrics:
            terms = pieces.terms(found, minibatch, minibatch, state.kl_coefficient)
            del terms["loss"]
            return terms | pieces.measure(found, minibatch)

        params, optimizer_state, steps = take_steps(
            loss,
            measure,
            optimizer,
            state.params,
            state.optimizer_state,
            experience,
            order_key(state.key, state.step),
            options,
        )
        return params, optimizer_state, metrics | steps | gaps | {"kl_coefficient": state.kl_coefficient}

    return Algorithm(init=init, rollout=rollout, update=update)


def begin_with_policy(
    config: ModelConfig, adapter: AdapterConfig | None
) -> Callable[[Array, Params], tuple[Params, Params, Array]]:
    """The `begin` of an algorithm that trains a policy and nothing else.

    What is given is `{"policy": tree, "reference"?: tree}`, or nothing for a fresh policy; the reference is the policy
    at the start if not given.
    """

    def begin(key: Array, given: Params) -> tuple[Params, Params, Array]:
        check_roles(given, ("policy", "reference"))
        policy_key, state_key = jax.random.split(key)
        policy = given["policy"] if "policy" in given else init_policy(config, policy_key)
        return trainable(policy, adapter, policy_key), reference_policy(given, policy, adapter), state_key

    return begin


def check_kl(place: str, estimate: str) -> None:
    """Refuses estimates of the KL where they do not work.

    Raises:
        ValueError: an unknown place or estimate, or k1 as a term of the loss.

    Example:
        >>> check_kl("loss", "k1")
        Traceback (most recent call last):
            ...
        ValueError: the mean gradient of k1 is 0, so that it does nothing in the loss: choose k2 or k3, or the reward.
    """
    if place not in ("reward", "loss"):
        raise ValueError(f"kl_in is {place!r}: choose reward or loss.")
    if estimate not in ("k1", "k2", "k3"):
        raise ValueError(f"kl_estimate is {estimate!r}: choose k1, k2 or k3.")
    if (place, estimate) == ("loss", "k1"):
        raise ValueError(
            "the mean gradient of k1 is 0, so that it does nothing in the loss: choose k2 or k3, or the reward."
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


def in_parts(read: Callable[[Any], Any], taken: Any, options: OnPolicyConfig) -> Any:
    """`read(taken)` of rows that do not depend on one another, in as many parts as the steps see them in."""
    check_minibatches(len(jax.tree.leaves(taken)[0]), options.minibatches, options.accumulate)
    return by_parts(read, taken, 1 if options.accumulate == 1 else options.minibatches * options.accumulate)


def rollout_key(key: Array, step: Int[Array, ""]) -> Array:
    """The key that the responses of a rollout are drawn with, after `step` rollouts."""
    return jax.random.fold_in(jax.random.fold_in(key, step), 0)


def order_key(key: Array, step: Int[Array, ""]) -> Array:
    """The key that the rows of a rollout are shuffled with, after `step` rollouts."""
    return jax.random.fold_in(jax.random.fold_in(key, step), 1)


def take_steps(
    loss: Callable[[Params, Any, Any], tuple[Array, Any]],
    measure: Callable[[Any, Any], Metrics],
    optimizer: optax.GradientTransformation,
    params: Params,
    optimizer_state: optax.OptState,
    experience: Any,
    key: Array,
    options: OnPolicyConfig,
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
        options: how many passes, minibatches and microbatches, which divide the rows, see `check_minibatches`.

    Returns:
        Parameters, optimiser state and metrics: means over the steps; `val/first_ratio` and `policy/max_logprob_gap`
        are those of the first step, which sees the policy that sampled: its ratio is 1 up to rounding between decoding
        and training (and without that where old log-probabilities are recomputed).
    """
    rows = len(jax.tree.leaves(experience)[0])
    check_minibatches(rows, options.minibatches, options.accumulate)

    def step(carry: tuple[Params, optax.OptState, Bool[Array, ""]], chosen: Int[Array, " rows"]):
        params, optimizer_state, stopped = carry
        minibatch = jax.tree.map(lambda leaf: leaf[chosen], experience)
        gradients, outputs = accumulated_gradients(loss, params, minibatch, options.accumulate)
        metrics = measure(outputs, minibatch)
        *stepped, applied = apply_gradients(optimizer, gradients, optimizer_state, params)
        if options.target_kl is not None:
            stopped = stopped | (metrics["policy/approxkl"] > options.target_kl)
            stepped = jax.tree.map(partial(jnp.where, stopped), [params, optimizer_state], stepped)
        return (*stepped, stopped), metrics | applied | {"policy/stopped": stopped.astype(jnp.float32)}

    keys = jax.random.split(key, options.epochs)
    orders = jax.vmap(jax.random.permutation, in_axes=(0, None))(keys, rows).reshape(
        options.epochs * options.minibatches, -1
    )
    (params, optimizer_state, _), steps = jax.lax.scan(step, (params, optimizer_state, jnp.array(False)), orders)
    metrics = {name: values.mean() for name, values in steps.items()}
    metrics["val/first_ratio"] = steps["val/ratio"][0]
    metrics["policy/max_logprob_gap"] = steps["policy/max_logprob_gap"][0]
    return params, optimizer_state, metrics
