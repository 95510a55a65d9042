"""Algorithm, scorer and reward transform as one jittable step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
from jaxtyping import Array, Float

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
        transform: what is done with scores before the policy sees them; `reference` is its Score of reference
            responses.
    """
    if algorithm.rollout is None:
        raise ValueError("compose needs an on-policy algorithm; this one has no rollout: call its update on batches.")

    def step(
        state: ComposedState, prompts: Prompts, reward_params: Params, reference: Score | None = None
    ) -> tuple[ComposedState, StepOutput]:
        algorithm_state, rollout = algorithm.rollout(state.algorithm, prompts)
        score = scorer(reward_params, rollout.sequences.tokens, rollout.sequences.mask)
        rewards, transform_state, reward_metrics = transform.apply(score, reference, state.transform)
        algorithm_state, metrics = algorithm.update(algorithm_state, rollout, rewards)
        state = ComposedState(algorithm=algorithm_state, transform=transform_state)
        return state, StepOutput(rollout, score, rewards, metrics | reward_metrics)

    return step
