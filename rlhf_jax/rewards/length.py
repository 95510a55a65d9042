"""Rewards that take the length of responses into account: penalties, rescaling, and a reward of length alone.

A Bradley-Terry reward often grows with length, and so do the responses of the policy that is trained on it. These
transforms stand around another one (`single()`, an ensemble's rule) and need a scorer that counts tokens:

    scorer = with_lengths(reward_scorer(config), response_length)
    transform = length_penalty(single(), target=100)
    state = transform.init(single().init())

Lengths are in tokens, the stop token included, and of the response alone.

Source: Singhal et al. 2023, "A Long Way to Go: Investigating Length Correlations in RLHF" (arXiv:2310.03716).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.rewards.python_reward import RewardFunction
from rlhf_jax.rewards.transforms import report
from rlhf_jax.types import Algorithm, Metrics, Params, Rollout, Score, Transform

Scorer = Callable[[Params, Array, Array], Score]


@chex.dataclass(frozen=True)
class MeasuredScore(Score):
    """A Score that knows how long the responses are.

    Attributes:
        lengths: tokens of each response, float32 [B].
    """

    lengths: Float[Array, " B"] | None = None


@chex.dataclass(frozen=True)
class WindowState:
    """The state of a transform that measures rewards over the last batches.

    Attributes:
        inner: the state of the transform within.
        means: mean rewards of the last W batches, the newest first, float32 [W].
        deviations: their standard deviations, float32 [W].
        batches: number of batches so far, int32 [].
    """

    inner: Any
    means: Float[Array, " W"]
    deviations: Float[Array, " W"]
    batches: Int[Array, ""]


Outcome = tuple[Float[Array, " B"], Any, Metrics]


def with_lengths(scorer: Scorer, response_length: int) -> Scorer:
    """The same scorer, whose Scores know how long the responses are.

    Args:
        scorer: `score(params, tokens, mask) -> Score`.
        response_length: T; the response is what stands in the last T columns, as in `Rollout.sequences`.
    """

    def score(params: Params, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> MeasuredScore:
        found = scorer(params, tokens, mask)
        lengths = mask[:, -response_length:].sum(axis=-1).astype(jnp.float32)
        return MeasuredScore(
            **{field.name: getattr(found, field.name) for field in dataclasses.fields(Score)}, lengths=lengths
        )

    return score


def length_penalty(inner: Transform, target: int, weight: float | int = 1.0, window: int = 10) -> Transform:
    """A reward that falls with length, at a rate that follows the spread of the rewards.

        r + w (1 - length / N) sigma,  sigma = mean over the last batches of the standard deviation of r in a batch

    It is 0 at length N and sigma at length 0. `init(state)` takes the state of the transform within. The metrics are
    those of that one, with `rewards/transformed` after the penalty, the mean `rewards/length_penalty` that was added,
    and `rewards/deviation`, which is sigma.

    Args:
        inner: the transform whose rewards r are; such as `single()`.
        target: N, in tokens.
        weight: w; the authors' code has 2, and N = 100.
        window: batches that sigma is averaged over, this one included.

    Raises:
        ValueError: the target or the window is below 1; (when traced) the Score has no lengths.

    Example:
        >>> from rlhf_jax.rewards.ensemble import single
        >>> transform = length_penalty(single(), target=10)
        >>> score = MeasuredScore(mean=jnp.array([1.0, 3.0]), lengths=jnp.array([10.0, 20.0]))
        >>> transform.apply(score, None, transform.init())[0].tolist()  # sigma is 1
        [1.0, 2.0]
    """
    _at_least_one("the target length", target)

    def change(rewards: Array, score: Score, mean: Array, deviation: Array) -> tuple[Array, Metrics]:
        penalty = weight * (1.0 - lengths_of(score, "length_penalty").astype(rewards.dtype) / target) * deviation
        average = report(score, penalty, None)["rewards/transformed"]
        return rewards + penalty, {"rewards/length_penalty": average}

    return _windowed(inner, window, change)


def reward_scale(inner: Transform, limit: float | int = 0.3, window: int = 10) -> Transform:
    """Rewards in units of their spread, cut at a small number: clip((r - m) / sigma, -limit, limit).

    m and sigma are the mean and the standard deviation of r in a batch, averaged over the last batches; where sigma is
    0, the reward is too. So no response can gain much by being long. `init(state)` takes the state of the transform
    within. The metrics are those of that one, with `rewards/transformed` after scaling, `rewards/deviation` (sigma) and
    `rewards/clipped`, the share that the limit cuts.

    Args:
        inner: the transform whose rewards r are; such as `single()`.
        limit: largest absolute reward.
        window: batches that m and sigma are averaged over, this one included.

    Raises:
        ValueError: the limit is not positive, or the window is below 1.

    Example:
        >>> from rlhf_jax.rewards.ensemble import single
        >>> transform = reward_scale(single())
        >>> score = Score(mean=jnp.array([1.0, 2.0, 3.0]))
        >>> [f"{reward:.1f}" for reward in transform.apply(score, None, transform.init())[0]]
        ['-0.3', '0.0', '0.3']
    """
    if not limit > 0:
        raise ValueError(f"the limit of scaled rewards is {limit}: give more than 0.")

    def change(rewards: Array, score: Score, mean: Array, deviation: Array) -> tuple[Array, Metrics]:
        scaled = jnp.where(deviation > 0, (rewards - mean) / jnp.where(deviation > 0, deviation, 1.0), 0.0)
        clipped = (jnp.abs(scaled) > limit).astype(rewards.dtype)
        average = report(score, clipped, None)["rewards/transformed"]
        return jnp.clip(scaled, -limit, limit), {"rewards/clipped": average}

    return _windowed(inner, window, change)


def length_reward(lengths: Float[Array, " B"], target: int) -> Float[Array, " B"]:
    """A reward of length alone, 1 - |length / N - 1|: 1 at N tokens, 0 at none and at 2 N.

    What a policy gains by it, judged by others, is how much of a gain can be had by length.

    Args:
        lengths: tokens of the responses, [B].
        target: N, in tokens.

    Example:
        >>> length_reward(jnp.array([0.0, 5.0, 10.0, 30.0]), 10).tolist()
        [0.0, 0.5, 1.0, -1.0]
    """
    return 1.0 - jnp.abs(lengths / target - 1.0)


def length_only(target: int) -> Transform:
    """`length_reward` in place of what the reward model says; `init()` takes nothing.

    Args:
        target: N, in tokens.

    Raises:
        ValueError: the target is below 1; (when traced) the Score has no lengths.
    """
    _at_least_one("the target length", target)

    def apply(score: Score, reference: Score | None, state: tuple[()]) -> Outcome:
        rewards = length_reward(lengths_of(score, "length_only"), target)
        return rewards, state, report(score, rewards, None)

    return Transform(lambda: (), apply)


def length_reward_function(target: int, count: Callable[[Any], int]) -> RewardFunction:
    """`length_reward` as a Python reward, for runs without a reward model.

    Args:
        target: N, in what is counted.
        count: `count(completion)`: its length, such as `lambda text: len(tokenizer(text)["input_ids"])`. A completion
            is a text or a chat, without its stop token.

    Raises:
        ValueError: the target is below 1.

    Example:
        >>> reward = length_reward_function(2, lambda text: len(text.split()))
        >>> reward(prompts=["a", "b"], completions=["one two", "one"])
        [1.0, 0.5]
    """
    _at_least_one("the target length", target)

    def reward(prompts: Sequence, completions: Sequence, **columns: Sequence) -> list[float]:
        return [1.0 - abs(count(completion) / target - 1.0) for completion in completions]

    return reward


def omit_unfinished(algorithm: Algorithm) -> Algorithm:
    """The same algorithm, whose updates leave out responses that did not end by themselves.

    A response without a stop token is cut off, and its reward is not that of what the policy meant to say. Its mask is
    emptied, which gives it weight 0 in losses and length 0 in the metrics of the update; algorithms that compare the
    responses to a prompt still compare with its reward.

    Args:
        algorithm: an on-policy algorithm.
    """

    def update(state: Any, taken: Rollout, rewards: Array) -> tuple[Any, Metrics]:
        return algorithm.update(state, taken.replace(mask=taken.mask & taken.finished[:, None]), rewards)

    return algorithm._replace(update=update)


def lengths_of(score: Score, rule: str) -> Float[Array, " B"]:
    """The lengths of a Score.

    Raises:
        ValueError: it has none.
    """
    lengths = score.lengths if isinstance(score, MeasuredScore) else None
    if lengths is None:
        raise ValueError(f"{rule} needs the lengths of responses: wrap the scorer, with_lengths(scorer, T).")
    return lengths


def _windowed(
    inner: Transform,
    window: int,
    change: Callable[[Array, Score, Array, Array], tuple[Array, Metrics]],
) -> Transform:
    """`change(rewards, score, mean, deviation)` of the rewards of a transform, moments averaged over batches."""
    _at_least_one("the window", window)

    def init(state: Any = ()) -> WindowState:
        zeros = jnp.zeros(window, jnp.float32)
        return WindowState(inner=state, means=zeros, deviations=zeros, batches=jnp.int32(0))

    def apply(score: Score, reference: Score | None, state: WindowState) -> Outcome:
        rewards, inner_state, metrics = inner.apply(score, reference, state.inner)
        batches = state.batches + 1
        means = jnp.roll(state.means, 1).at[0].set(rewards.mean(where=score.own).astype(jnp.float32))
        deviations = jnp.roll(state.deviations, 1).at[0].set(rewards.std(where=score.own).astype(jnp.float32))
        seen = jnp.arange(window) < batches
        mean, deviation = means.mean(where=seen), deviations.mean(where=seen)
        changed, terms = change(rewards, score, mean.astype(rewards.dtype), deviation.astype(rewards.dtype))
        metrics = metrics | {
            "rewards/transformed": report(score, changed, None)["rewards/transformed"],
            "rewards/deviation": deviation,
        }
        state = WindowState(inner=inner_state, means=means, deviations=deviations, batches=batches)
        return changed, state, metrics | terms

    return Transform(init, apply)


def _at_least_one(what: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{what} is {number}: give 1 or more.")
