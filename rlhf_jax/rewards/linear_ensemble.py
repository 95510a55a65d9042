"""An ensemble of linear reward heads on one trunk: the price of one reward model, and members that can disagree.

All members read the same features, so they can only disagree where their heads differ: in directions that the training
features do not span, if the heads began apart and nothing pulled them together. `algorithms.ensemble_modeling` trains
them.

Source: Zhang et al., "Improving Reinforcement Learning from Human Feedback with Efficient Reward Model Ensemble",
arXiv:2401.16635 (linear-layer ensemble).
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_reward_head, reward_features
from rlhf_jax.rewards.bradley_terry import member_score
from rlhf_jax.types import Params, Score, wide


@chex.dataclass(frozen=True)
class LinearEnsembleParams:
    """One trunk and M heads on it.

    Attributes:
        trunk: the parameters that all members share.
        heads: `{"kernel": [M, D], "bias": [M]}`.
        offset: mean score of each member on reference samples, from `ensemble.member_offset`, float32 [M].
    """

    trunk: Params
    heads: Params
    offset: Float[Array, " M"]


def init_heads(config: ModelConfig, key: Array, members: int) -> Params:
    """M independent reward heads, each as `models.heads.init_reward_head` makes it.

    Args:
        config: shape of the trunk.
        key: a typed key.
        members: M, at least 1.

    Returns:
        `{"kernel": [M, D], "bias": [M]}`.

    Raises:
        ValueError: there are no members.
    """
    check_members(members)
    return jax.vmap(lambda key: init_reward_head(config, key))(jax.random.split(key, members))


def check_members(members: int) -> None:
    """Refuses an ensemble of less than one member.

    Raises:
        ValueError: `members` is below 1.
    """
    if members < 1:
        raise ValueError(f"an ensemble of {members} members cannot be made; give at least 1.")


def apply_heads(heads: Params, features: Float[Array, "B D"]) -> Float[Array, "M B"]:
    """The scores of M linear heads on the same features, `R_mb = phi_m . e_b + c_m`.

    Args:
        heads: `{"kernel": [M, D], "bias": [M]}`.
        features: [B, D].

    Returns:
        Scores [M, B], in at least float32 at the highest precision.

    Example:
        >>> heads = {"kernel": jnp.array([[1.0, 0.0], [1.0, 2.0]]), "bias": jnp.array([0.0, -1.0])}
        >>> apply_heads(heads, jnp.array([[3.0, 1.0]])).tolist()
        [[3.0], [4.0]]
    """
    dtype = wide(features)
    scores = jnp.einsum("bd,md->mb", features.astype(dtype), heads["kernel"].astype(dtype), precision="highest")
    return scores + heads["bias"].astype(dtype)[:, None]


def linear_ensemble_scorer(
    config: ModelConfig,
    features: Literal["final_norm", "pre_norm"] = "final_norm",
    lead: int | None = None,
):
    """A scorer of M heads on one trunk.

    `score(LinearEnsembleParams, tokens, mask) -> Score(mean, features, members, epistemic)`. The features are filled in
    any case, as all members have the same: the mean over members is itself a linear head on them.

    Args:
        config: shape of the trunk.
        features: what the heads read, see `models.heads.reward_features`.
        lead: the member whose score is `mean`; None: `mean` is the average over members.
    """

    def score(params: LinearEnsembleParams, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        vectors = reward_features(config, params.trunk, tokens, mask, features)
        found = member_score(apply_heads(params.heads, vectors), None, params.offset, lead)
        return found.replace(features=vectors)

    return score
