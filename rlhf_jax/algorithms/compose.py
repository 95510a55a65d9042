"""Algorithm, scorer and reward transform as one jittable step."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.types import Algorithm, Metrics, Params, Prompts, Rollout, Score, Transform

Scorer = Callable[[Params, Array, Array], Score]


@chex.dataclass(frozen=True)
class ComposedState:
    """The state of the algorithm and that of the reward transform beside it."""

    algorithm: Any
    transform: Any


class StepOutput(NamedTuple):
    """What one step produced: the rollout, its raw score, the rewards trained on [B], and the metrics."""

    rollout: Rollout
    score: Score
    rewards: Float[Array, " B"]
    metrics: Metrics


def compose(algorithm: Algorithm, scorer: Scorer, transform: Transform):
    """The step `(state, prompts, reward_params, reference=None) -> (state, StepOutput)`.

    It samples, scores, transforms the scores into rewards, and updates; nothing in it leaves the device. A Python
    reward goes between `algorithm.rollout` and `algorithm.update` in a host loop instead.

    Args:
        algorithm: an on-policy algorithm.
        scorer: `score(reward_params, tokens, mask) -> Score`.
        transform: what is done with scores before the policy sees them; `reference` is the Score of R reference
            responses a prompt, which follow each other; of a rollout in groups each response gets those of its prompt.
    """
    if algorithm.rollout is None:
        raise ValueError("compose needs an on-policy algorithm; this one has no rollout: call its update on batches.")

    def step(
        state: ComposedState, prompts: Prompts, reward_params: Params, reference: Score | None = None
    ) -> tuple[ComposedState, StepOutput]:
        algorithm_state, rollout = algorithm.rollout(state.algorithm, prompts)
        score = scorer(reward_params, rollout.sequences.tokens, rollout.sequences.mask).replace(own=rollout.own)
        reference = references_of_responses(reference, len(prompts.index), len(rollout.tokens))
        rewards, transform_state, reward_metrics = transform.apply(score, reference, state.transform)
        algorithm_state, metrics = algorithm.update(algorithm_state, rollout, rewards)
        state = ComposedState(algorithm=algorithm_state, transform=transform_state)
        return state, StepOutput(rollout, score, rewards, metrics | reward_metrics)

    return step


def references_of_responses(reference: Score | None, prompts: int, responses: int) -> Score | None:
    """The reference responses of each response of a rollout: those of its prompt.

    Args:
        reference: Score of R reference responses a prompt, [P * R]; those of a prompt follow each other.
        prompts: P.
        responses: B = P * K responses of the rollout; those of a prompt follow each other.

    Returns:
        Score [B * R], in the same order; what was given where there is one response a prompt.

    Raises:
        ValueError: there is not the same number of reference responses for every prompt.

    Example:
        >>> reference = Score(mean=jnp.array([1.0, 2.0, 3.0, 4.0]))  # of two prompts
        >>> references_of_responses(reference, prompts=2, responses=4).mean.tolist()
        [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0]
    """
    if reference is None or prompts == responses:
        return reference
    count = len(reference.mean)
    if count % prompts:
        raise ValueError(f"{count} reference responses for {prompts} prompts: give every prompt as many.")
    order = jnp.repeat(jnp.arange(count).reshape(prompts, -1), responses // prompts, axis=0).reshape(-1)
    return rows_of(reference, order)


def rows_of(score: Score, rows: Int[Array, " R"]) -> Score:
    """The Score of some rows, with all that it has; those of ensemble members stand on the second axis.

    Example:
        >>> score = Score(mean=jnp.array([1.0, 2.0]), members=jnp.array([[0.0, 1.0], [2.0, 3.0]]))
        >>> rows_of(score, jnp.array([1, 1])).members.tolist()
        [[1.0, 1.0], [3.0, 3.0]]
    """
    known = {field.name: getattr(score, field.name) for field in dataclasses.fields(score)}
    taken = {name: values[rows] for name, values in known.items() if values is not None and name != "members"}
    return score.replace(members=None if score.members is None else score.members[:, rows], **taken)
