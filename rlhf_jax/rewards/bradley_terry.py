"""Scorers: one Bradley-Terry reward model, or an ensemble of them along a leading axis."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import apply_head, reward_features
from rlhf_jax.rewards.ensemble import centre, variance
from rlhf_jax.types import Params, Score


@chex.dataclass(frozen=True)
class EnsembleParams:
    """Reward models stacked on a leading axis, and the constant to subtract from the scores of each.

    Attributes:
        members: a reward-model tree whose leaves have the M members on axis 0.
        offset: mean score of each member on reference samples, float32 [M] (a Bradley-Terry reward is free up to a
            constant a member, so minima and variances over members mean nothing before it is fixed).
    """

    members: Params
    offset: Float[Array, " M"]


def reward_scorer(config: ModelConfig, features: Literal["final_norm", "pre_norm"] = "final_norm"):
    """One model's scorer: `score(params, tokens, mask) -> Score(mean, features)`, r = e . phi + c in float32."""

    def score(params: Params, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        vectors = reward_features(config, params["trunk"], tokens, mask, features)
        return Score(mean=apply_head(params["head"], vectors), features=vectors)

    return score


def ensemble_scorer(
    config: ModelConfig,
    features: Literal["final_norm", "pre_norm"] = "final_norm",
    lead: int | None = None,
):
    """A scorer of M reward models: `score(EnsembleParams, tokens, mask) -> Score(mean, features, members, epistemic)`.

    Args:
        config: shape of the members' trunks.
        features: what the reward heads read.
        lead: the member whose score is `mean` and whose features are returned, so that single-model rules and
            ensemble rules can be compared on one Score; None: `mean` is the ensemble's average and there are no
            features.
    """
    member_scorer = reward_scorer(config, features)

    def score(params: EnsembleParams, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        each = jax.vmap(member_scorer, in_axes=(0, None, None))(params.members, tokens, mask)
        return member_score(each.mean, each.features, params.offset, lead)

    return score


def member_score(
    scores: Float[Array, "M B"],
    features: Float[Array, "M B D"] | None,
    offset: Float[Array, " M"],
    lead: int | None,
) -> Score:
    """The Score of an ensemble from the raw scores of its members.

    Args:
        scores: raw, [M, B].
        features: of each member, [M, B, D]; None where nobody asks.
        offset: from `ensemble.member_offset`, [M].
        lead: the member whose score is the mean and whose features are passed on; None: `mean` is the average, and
            there are no features.
    """
    members = centre(scores, offset)
    epistemic = jnp.sqrt(variance(members))
    if lead is None:
        return Score(mean=members.mean(axis=0), members=members, epistemic=epistemic)
    own = None if features is None else features[lead]
    return Score(mean=members[lead], features=own, members=members, epistemic=epistemic)


def check_rewards(rewards: np.ndarray | Array, source: str = "the reward") -> None:
    """Refuses rewards that are not finite, before anything is trained on them.

    Args:
        rewards: rewards of a batch, [B] or [B, T], on the host or on a device.
        source: what made them, for the message.

    Raises:
        ValueError: naming the first row that is NaN or infinite.
    """
    values = np.asarray(rewards)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row = int(bad[0, 0])
        raise ValueError(
            f"{source} returned {values[tuple(bad[0])]} for row {row} ({len(bad)} of {values.size} values are not "
            "finite); mend it, or leave out that row."
        )
