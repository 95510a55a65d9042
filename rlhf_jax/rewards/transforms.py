"""What reward transforms share: the metrics that all of them report, and one transform that stands for several.

Every transform reports `rewards/proxy`, `rewards/transformed` and `uncertainty/mean`; a metric that a transform does
not measure is NaN, never 0.
"""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.types import Metrics, Score, Transform


@chex.dataclass(frozen=True)
class SelectState:
    """Which transform is applied, and the states of all of them.

    Attributes:
        index: position of the transform that is applied, int32 [].
        states: one state a transform, in their order; only the state at `index` changes.
    """

    index: Int[Array, ""]
    states: tuple[Any, ...]


def report(score: Score, rewards: Float[Array, " B"], uncertainty: Float[Array, " B"] | None) -> Metrics:
    """The metrics that every transform returns, as float32 scalars: means over the policy's own sequences.

    Args:
        score: what the scorer said.
        rewards: what the policy will be trained on, [B].
        uncertainty: one uncertainty a sequence in units of reward, [B]; None where nothing measures it.

    Returns:
        `rewards/proxy` (mean of `score.mean`), `rewards/transformed` (mean of `rewards`) and `uncertainty/mean` (NaN
        for None).
    """
    unknown = jnp.full((), jnp.nan, jnp.float32)

    def average(values: Float[Array, " B"]) -> Float[Array, ""]:
        return values.mean(where=score.own).astype(jnp.float32)

    return {
        "rewards/proxy": average(score.mean),
        "rewards/transformed": average(rewards),
        "uncertainty/mean": unknown if uncertainty is None else average(uncertainty),
    }


def select(transforms: Sequence[Transform]) -> Transform:
    """Applies the one of `transforms` that `state.index` names, so that they share one compiled program.

    The choice is data (`jax.lax.switch`): a study of several methods is one program mapped over states that differ in
    `index`. Under `lax.map` only the chosen transform runs; under `vmap` all of them run and one result is kept. All
    are traced, so the score must hold what each of them needs (members, features, a reference), chosen or not.

    `init(index, states)` takes one state a transform. `apply` returns the rewards and metrics of the chosen one; a
    metric that only others report is NaN.

    Args:
        transforms: the transforms to choose from.

    Returns:
        A transform whose state is a `SelectState`.

    Raises:
        ValueError: no transforms; another number of states than transforms; an index (where it is known) out of range.

    Example:
        >>> from rlhf_jax.rewards.ensemble import single, worst_case
        >>> chosen = select([single(), worst_case()])
        >>> score = Score(mean=jnp.array([2.0]), members=jnp.array([[1.0], [3.0]]))
        >>> rewards, _, _ = chosen.apply(score, None, chosen.init(1, ((), ())))
        >>> rewards.tolist()
        [1.0]
    """
    transforms = tuple(transforms)
    if not transforms:
        raise ValueError("select needs at least one transform; the sequence is empty.")

    def init(index: Int[Array, ""] | int, states: tuple[Any, ...]) -> SelectState:
        if len(states) != len(transforms):
            raise ValueError(
                f"select chooses among {len(transforms)} transforms but was given {len(states)} states; give one each."
            )
        if not isinstance(index, jax.core.Tracer) and not 0 <= int(index) < len(transforms):
            raise ValueError(
                f"select has transforms 0 to {len(transforms) - 1}; index {int(index)} names none of them."
            )
        return SelectState(index=jnp.asarray(index, jnp.int32), states=states)

    def apply(
        score: Score, reference: Score | None, state: SelectState
    ) -> tuple[Float[Array, " B"], SelectState, Metrics]:
        outcomes = [
            jax.eval_shape(transform.apply, score, reference, own)
            for transform, own in zip(transforms, state.states, strict=True)
        ]
        names = sorted(set().union(*(metrics for _, _, metrics in outcomes)))

        def branch(position: int) -> Any:
            def run(score: Score, reference: Score | None, states: tuple[Any, ...]) -> Any:
                rewards, own, metrics = transforms[position].apply(score, reference, states[position])
                complete = {name: metrics.get(name, jnp.full((), jnp.nan, jnp.float32)) for name in names}
                return rewards.astype(score.mean.dtype), (*states[:position], own, *states[position + 1 :]), complete

            return run

        branches = [branch(position) for position in range(len(transforms))]
        rewards, states, metrics = jax.lax.switch(state.index, branches, score, reference, state.states)
        return rewards, SelectState(index=state.index, states=states), metrics

    return Transform(init, apply)
