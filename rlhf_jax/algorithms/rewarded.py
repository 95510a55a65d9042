"""An on-policy algorithm and its reward as one step: reward models compiled into it, or a Python reward in between.

Both kinds give the same pair of functions, so that a host loop need not know which one it runs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.compose import ComposedState, Scorer, compose, rows_of
from rlhf_jax.algorithms.in_place import in_place
from rlhf_jax.models.partitioning import constrain
from rlhf_jax.rewards.bradley_terry import check_rewards
from rlhf_jax.rewards.python_reward import RewardFunction, call_reward_function, require_every_row
from rlhf_jax.types import Algorithm, Params, Rollout, Score, Transform


class Rewarded(NamedTuple):
    """An algorithm with its reward.

    Attributes:
        transform: the reward transform's part of the first `ComposedState`.
        step: `step(state, batch) -> (state, metrics)`: rollout, reward and update. The state, a `ComposedState`, is
            donated. A batch has `prompts`, and `rows`, the row of each.
        score: `score(rows, rollout) -> rewards`, float32 [B], on the host: what the policy is trained on; or, where
            that depends on the other responses of a batch and on reference responses, the reward model's own score.
    """

    transform: Any
    step: Callable[[ComposedState, Any], tuple[ComposedState, Mapping[str, Any]]]
    score: Callable[[Sequence[dict], Rollout], np.ndarray]


def model_reward(
    algorithm: Algorithm,
    scorer: Scorer,
    params: Params,
    transform: Transform,
    transform_state: Any,
    references: Score | None = None,
    each: int = 1,
) -> Rewarded:
    """Reward models as the reward; the whole step is one compiled program.

    Args:
        algorithm: an on-policy algorithm.
        scorer: `score(params, tokens, mask) -> Score`, of one reward model or several.
        params: their parameters.
        transform: what becomes of their scores.
        transform_state: the transform's state at the start.
        references: for a transform that compares with reference responses, the Score of some for every prompt there
            is: rows i * each to (i + 1) * each belong to the prompts of index i.
        each: reference responses a prompt.
    """
    whole = compose(algorithm, scorer, transform)

    @in_place
    def step(state, prompts, params, references):
        rows = (prompts.index[:, None] * each + jnp.arange(each)[None]).reshape(-1)
        own = None if references is None else rows_of(references, rows)
        state, output = whole(state, prompts, params, own)
        return state, output.metrics

    @jax.jit
    def rewards(taken, params):
        score = scorer(params, taken.sequences.tokens, taken.sequences.mask)
        found = score.mean if references is not None else transform.apply(score, None, transform_state)[0]
        return constrain(found, None)  # whole on every process

    def score(rows: Sequence[dict], rollout: Rollout) -> np.ndarray:
        found = np.asarray(rewards(rollout, params))
        check_rewards(found, "the reward")
        return found

    first = jax.tree.map(jnp.copy, transform_state)  # a copy, for steps donate their state
    return Rewarded(first, lambda state, batch: step(state, batch.prompts, params, references), score)


def function_reward(
    algorithm: Algorithm, function: RewardFunction, completions_of: Callable[[Sequence[dict], Rollout], list]
) -> Rewarded:
    """A Python function as the reward, called on the host between rollout and update.

    Its metrics also hold `time/rollout` and `time/score`, in seconds.

    Args:
        algorithm: an on-policy algorithm.
        function: `f(prompts, completions, **columns)`, see `rewards.python_reward`; it gets the columns of the rows.
        completions_of: the completions of a rollout as the function is to read them, texts or chats.
    """
    rollout, update = in_place(algorithm.rollout), in_place(algorithm.update)

    def score(rows: Sequence[dict], taken: Rollout) -> np.ndarray:
        samples = len(taken.tokens) // len(rows)  # several responses to a prompt follow each other
        rows = [row for row in rows for _ in range(samples)]
        names = sorted({name for row in rows for name in row} - {"prompt"})
        columns = {name: [row.get(name) for row in rows] for name in names}
        prompts = [row["prompt"] for row in rows]
        rewards = call_reward_function(function, prompts, completions_of(rows, taken), columns)
        return require_every_row(rewards, function)

    def step(state: ComposedState, batch: Any) -> tuple[ComposedState, Mapping[str, Any]]:
        began = time.monotonic()
        state, taken = rollout(state.algorithm, batch.prompts)
        jax.block_until_ready(taken)
        drawn = time.monotonic()
        rewards = score(batch.rows, taken)
        scored = time.monotonic()
        state, metrics = update(state, taken, jnp.asarray(rewards))
        times = {"time/rollout": drawn - began, "time/score": scored - drawn}
        return ComposedState(algorithm=state, transform=()), metrics | times

    return Rewarded((), step, score)


def rewarded_by(
    algorithm: Algorithm,
    reward: RewardFunction | tuple,
    completions_of: Callable[[Sequence[dict], Rollout], list],
) -> Rewarded:
    """An algorithm with either kind of reward.

    Args:
        algorithm: an on-policy algorithm.
        reward: a Python function, or the other arguments of `model_reward`.
        completions_of: see `function_reward`.
    """
    if callable(reward):
        return function_reward(algorithm, reward, completions_of)
    return model_reward(algorithm, *reward)
