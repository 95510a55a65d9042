"""What the trainings of `attribute_modeling` share: their state, their update, and how they read ratings and pairs."""

from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms.accumulation import accumulated_gradients
from rlhf_jax.algorithms.optimizer import apply_gradients
from rlhf_jax.algorithms.reward_modeling import counted
from rlhf_jax.algorithms.trained import check_roles
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.reward import preference_accuracy
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import reward_features
from rlhf_jax.models.transformer import init_trunk
from rlhf_jax.types import Algorithm, AttributeBatch, Metrics, Params, PreferenceBatch, Sequences, at_least_float32

Sides = tuple[Float[Array, " B"], Float[Array, " B"]]


@chex.dataclass(frozen=True)
class DistributionState:
    """Everything that the training of a reward model of distributions carries from one update to the next.

    Attributes:
        params: what is trained, by role.
        base: what the model has besides, which stays as it is, by role.
        optimizer_state: the optimiser's state.
        step: number of updates so far, int32.
        key: of the noise of every update; None where there is none.
    """

    params: Params
    base: Params
    optimizer_state: optax.OptState
    step: Int[Array, ""]
    key: Array | None = None


def offline_algorithm(
    optimizer: optax.GradientTransformation,
    roles: tuple[str, ...],
    start: Callable[[Array, Params], tuple[Params, Params]],
    predict: Callable[[DistributionState, Params, Any], Any],
    terms: Callable[[DistributionState, Any, Any, Any], tuple[Float[Array, ""], Metrics]],
    accumulate: int,
    draw: Callable[[Array, Any], Array] | None = None,
) -> Algorithm:
    """An offline `Algorithm` from a model and a loss.

    Args:
        optimizer: an optax optimiser of what is trained.
        roles: names of the trees that `init` may be given.
        start: `start(key, given) -> (params, base)`.
        predict: `predict(state, params, batch) -> outputs`, a tree of arrays whose first axis counts the rows.
        terms: `terms(state, outputs, (rows, noise), (batch, noise)) -> (loss, metrics)`: the rows' parts of the numbers
            of the batch.
        accumulate: microbatches of an update.
        draw: `draw(key, batch) -> noise`, its first axis counts the rows; None: no noise.
    """

    def init(key: Array, params: Params | None = None) -> DistributionState:
        given = params or {}
        check_roles(given, roles)
        trained, base = start(key, given)
        return DistributionState(
            params=trained,
            base=base,
            optimizer_state=optimizer.init(trained),
            step=jnp.int32(0),
            key=None if draw is None else jax.random.fold_in(key, 1),
        )

    def update(state: DistributionState, batch: Any) -> tuple[DistributionState, Metrics]:
        noise = None if draw is None else draw(jax.random.fold_in(state.key, state.step), batch)
        data = (batch, noise)

        def loss(params: Params, part: Any, whole: Any) -> tuple[Float[Array, ""], Any]:
            found = predict(state, params, part[0])
            return terms(state, found, part, whole)[0], found

        gradients, found = accumulated_gradients(loss, state.params, data, accumulate)
        _, metrics = terms(state, found, data, data)
        params, optimizer_state, step_metrics = apply_gradients(
            optimizer, gradients, state.optimizer_state, state.params
        )
        state = state.replace(params=params, optimizer_state=optimizer_state, step=state.step + 1)
        return state, metrics | step_metrics

    return Algorithm(init=init, rollout=None, update=update)


def starting_trunk(config: ModelConfig, given: Params, key: Array) -> Params:
    """The given trunk, or a fresh one."""
    return given["trunk"] if "trunk" in given else init_trunk(config, key)


def statistics(given: Params, attributes: int) -> Params:
    """`{"mean", "scale"}` of the ratings, as given, or 0 and 1.

    Raises:
        ValueError: they are not of so many attributes.
    """
    found = {"mean": jnp.zeros(attributes), "scale": jnp.ones(attributes)}
    for role in found:
        if role in given:
            found[role] = at_least_float32(given[role])
        if found[role].shape != (attributes,):
            raise ValueError(
                f"params[{role!r}] has the shape {found[role].shape}: give one number for each of the {attributes} "
                "attributes, as losses.attributes.rating_statistics does."
            )
    return found


def normalised(state: DistributionState, batch: AttributeBatch) -> Float[Array, "B K"]:
    """Ratings less their mean over their scale."""
    return (at_least_float32(batch.ratings) - state.base["mean"][None]) / state.base["scale"][None]


def known_ratings(batch: AttributeBatch) -> Bool[Array, "B K"]:
    """Which ratings count: those that are known, of rows that have tokens."""
    return batch.known & batch.sequences.mask.any(axis=-1)[:, None]


def read_last(
    config: ModelConfig, trunk: Params, batch: AttributeBatch, features: Literal["final_norm", "pre_norm"]
) -> Float[Array, "B D"]:
    """What heads read of the rated sequences."""
    return reward_features(config, trunk, batch.sequences.tokens, batch.sequences.mask, features)


def prompt_mask(mask: Bool[Array, "B S"], loss_mask: Bool[Array, "B S"] | None) -> Bool[Array, "B S"]:
    """The real tokens that stand before the completion.

    Raises:
        ValueError: there is no loss mask.

    Example:
        >>> prompt_mask(jnp.array([[True, True, True]]), jnp.array([[False, False, True]])).tolist()
        [[True, True, False]]
    """
    if loss_mask is None:
        raise ValueError("a gate that reads the prompt must know where it ends: give sequences with a loss_mask.")
    return mask & (jnp.cumsum(loss_mask, axis=1) == 0)


def both_sides(batch: PreferenceBatch) -> Sequences:
    """The chosen sequences and behind them the rejected ones, [2 B], to go through the model at once."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), batch.chosen, batch.rejected)


def apart(values: Float[Array, " B2"]) -> Sides:
    """What was found for `both_sides`, as that of the chosen and that of the rejected ones."""
    half = len(values) // 2
    return values[:half], values[half:]


def preference_terms(
    losses: Float[Array, " B"], rewards: Sides, deviations: Sides, batch: PreferenceBatch, whole: PreferenceBatch
) -> tuple[Float[Array, ""], Metrics]:
    """Loss and metrics of some pairs: their parts of those of the `whole` batch.

    Args:
        losses: unreduced, [B].
        rewards: of the chosen and the rejected responses.
        deviations: their standard deviations.
        batch: these pairs.
        whole: all of them.
    """

    def average(values: Float[Array, " B"]) -> Float[Array, ""]:
        return mean(values[:, None], counted(batch)[:, None], whole=counted(whole)[:, None])

    chosen, rejected = rewards
    value = average(losses)
    return value, {
        "loss/reward": value,
        "rewards/chosen": average(chosen),
        "rewards/rejected": average(rejected),
        "rewards/accuracies": average(preference_accuracy(chosen, rejected)),
        "rewards/margins": average(chosen - rejected),
        "uncertainty/mean": average(0.5 * (deviations[0] + deviations[1])),
    }
