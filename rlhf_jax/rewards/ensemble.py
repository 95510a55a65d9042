"""Rewards from several reward models: mean, worst case, and mean less a penalty for disagreement.

A Bradley-Terry reward is defined up to a constant of each member, and the minimum and the variance over members depend
on those constants: fix them first, by subtracting each member's mean on samples of the reference policy
(`member_offset`, `centre`). The transforms take members that are already centred, as `Score.members` says.

The rules that penalise take any kind of reward model: of one without members, they read `Score.mean` and
`Score.epistemic` instead of the mean and the standard deviation over members.

Source: Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", arXiv:2310.02743 (WCO, UWO); lower
confidence bound: Eisenstein et al., arXiv:2312.09244.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.rewards.transforms import report
from rlhf_jax.types import Metrics, Score, Transform

Outcome = tuple[Float[Array, " B"], tuple[()], Metrics]
PenaltyOutcome = tuple[Float[Array, " B"], Float[Array, ""], Metrics]


def member_offset(members: Float[Array, "M B"]) -> Float[Array, " M"]:
    """Each member's mean score on samples of the reference policy, the constant that `centre` takes away.

    Args:
        members: scores of a fixed set of reference samples, [M, B].

    Returns:
        One offset a member, [M].
    """
    return members.mean(axis=1)


def centre(members: Float[Array, "M B"], offset: Float[Array, " M"]) -> Float[Array, "M B"]:
    """Scores less their member's offset, so that members can be compared.

    Args:
        members: scores, [M, B].
        offset: from `member_offset`, [M].

    Returns:
        Centred scores, [M, B]; a constant added to a member here and on the reference samples leaves them as they are.

    Example:
        >>> reference = jnp.array([[0.0, 2.0], [10.0, 14.0]])
        >>> centre(reference, member_offset(reference)).tolist()
        [[-1.0, 1.0], [-2.0, 2.0]]
    """
    return members - offset[:, None]


def variance(members: Float[Array, "M B"], ddof: int = 0) -> Float[Array, " B"]:
    """Variance over members, `sum_i (R_i - mean)^2 / (M - ddof)`.

    Args:
        members: centred scores, [M, B].
        ddof: 0 for the population variance (the paper), 1 for the sample variance, which is `M / (M - 1)` times as
            large.

    Returns:
        One variance a sequence, in squared units of reward, [B].

    Raises:
        ValueError: `ddof` is neither 0 nor 1, or there are not more than `ddof` members.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof}; give 0 (population variance) or 1 (sample variance).")
    if members.shape[0] <= ddof:
        raise ValueError(
            f"A variance with ddof={ddof} needs more than {ddof} ensemble members, not {members.shape[0]}."
        )
    deviation = members - members.mean(axis=0)[None, :]
    return jnp.square(deviation).sum(axis=0) / (members.shape[0] - ddof)


def single() -> Transform:
    """The reward estimate as it is, `r = score.mean`; `init()` takes nothing.

    `uncertainty/mean` is the mean standard deviation over members, or else the mean of `score.epistemic`; NaN where
    the score has neither.
    """

    def init() -> tuple[()]:
        return ()

    def apply(score: Score, reference: Score | None, state: tuple[()]) -> Outcome:
        spread = score.epistemic if score.members is None else jnp.sqrt(variance(score.members))
        return score.mean, state, report(score, score.mean, spread)

    return Transform(init, apply)


def ensemble_mean() -> Transform:
    """The mean over members, `r = (1/M) sum_i R_i`, or of a model without members its own; `init()` takes nothing."""

    def init() -> tuple[()]:
        return ()

    def apply(score: Score, reference: Score | None, state: tuple[()]) -> Outcome:
        if score.members is None:
            return score.mean, state, report(score, score.mean, score.epistemic)
        rewards = score.members.mean(axis=0)
        return rewards, state, report(score, rewards, jnp.sqrt(variance(score.members)))

    return Transform(init, apply)


def worst_case() -> Transform:
    """Worst-case optimisation (WCO), `r = min_i R_i`; `init()` takes nothing. The members must be centred.

    Raises (when traced):
        ValueError: the score has no members.

    Example:
        >>> transform = worst_case()
        >>> score = Score(mean=jnp.array([2.0, 0.0]), members=jnp.array([[1.0, 0.5], [3.0, -0.5]]))
        >>> transform.apply(score, None, transform.init())[0].tolist()
        [1.0, -0.5]
    """

    def init() -> tuple[()]:
        return ()

    def apply(score: Score, reference: Score | None, state: tuple[()]) -> Outcome:
        members = _members(score, "worst_case", at_least=1)
        rewards = members.min(axis=0)
        return rewards, state, report(score, rewards, jnp.sqrt(variance(members)))

    return Transform(init, apply)


def uncertainty_weighted(ddof: int = 0) -> Transform:
    """Uncertainty-weighted optimisation (UWO), `r = mean_i R_i - coefficient * variance_i R_i`.

    The penalty is the variance, not the standard deviation; `uncertainty/mean` is the mean standard deviation, so that
    it has the unit of reward. `init(coefficient=0.5)`: the paper uses 0.5 for best-of-n and 0.1 in its PPO figures. The
    coefficient is the state, a scalar, so that a sweep maps over it.

    Args:
        ddof: 0 for the population variance (the paper), 1 for the sample variance.

    Raises (when traced):
        ValueError: the score has one member; or none and no `epistemic` uncertainty.

    Example:
        >>> transform = uncertainty_weighted()
        >>> score = Score(mean=jnp.array([2.0]), members=jnp.array([[1.0], [3.0]]))
        >>> transform.apply(score, None, transform.init(0.5))[0].tolist()
        [1.5]
    """

    def apply(score: Score, reference: Score | None, state: Float[Array, ""]) -> PenaltyOutcome:
        mean, disagreement = _mean_and_variance(score, "uncertainty_weighted", ddof)
        rewards = mean - state.astype(mean.dtype) * disagreement
        return rewards, state, report(score, rewards, jnp.sqrt(disagreement))

    return Transform(_coefficient(0.5), apply)


def lower_confidence_bound(ddof: int = 0) -> Transform:
    """A lower confidence bound, `r = mean_i R_i - coefficient * standard deviation_i R_i`; `init(coefficient=1.0)`.

    Args:
        ddof: 0 for the population standard deviation, 1 for the root of the sample variance.

    Raises (when traced):
        ValueError: the score has one member; or none and no `epistemic` uncertainty.
    """

    def apply(score: Score, reference: Score | None, state: Float[Array, ""]) -> PenaltyOutcome:
        mean, squared = _mean_and_variance(score, "lower_confidence_bound", ddof)
        disagreement = jnp.sqrt(squared)
        rewards = mean - state.astype(mean.dtype) * disagreement
        return rewards, state, report(score, rewards, disagreement)

    return Transform(_coefficient(1.0), apply)


def _coefficient(default: float):
    def init(coefficient: Float[Array, ""] | float = default) -> Float[Array, ""]:
        return jnp.asarray(coefficient, dtype=jnp.result_type(float))

    return init


def _mean_and_variance(score: Score, rule: str, ddof: int) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    if score.members is None and score.epistemic is not None:
        return score.mean, jnp.square(score.epistemic)
    members = _members(score, rule, at_least=2)
    return members.mean(axis=0), variance(members, ddof)


def _members(score: Score, rule: str, at_least: int) -> Float[Array, "M B"]:
    if score.members is None:
        raise ValueError(f"{rule} needs the scores of ensemble members; use a scorer that fills Score.members.")
    if score.members.shape[0] < at_least:
        raise ValueError(
            f"{rule} needs at least {at_least} ensemble members, not {score.members.shape[0]}: "
            "one member never disagrees; train more, or use single()."
        )
    return score.members
