"""Monte Carlo dropout at the vector that a reward head reads: members are one head under K fixed masks.

The masks are data, drawn once: the same text has the same score at every call, and one compiled program serves all
masks. Train the reward model with the same rate of dropout on the same vector.

Source: Gal and Ghahramani, "Dropout as a Bayesian Approximation", arXiv:1506.02142.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import apply_head, reward_features
from rlhf_jax.rewards.bradley_terry import member_score
from rlhf_jax.rewards.linear_ensemble import apply_heads
from rlhf_jax.types import Params, Score


@chex.dataclass(frozen=True)
class DropoutParams:
    """A reward model and the masks under which its head is read.

    Attributes:
        trunk: its trunk.
        head: `{"kernel": [D], "bias": []}`.
        masks: 0 where a feature is dropped and 1 / (1 - rate) elsewhere, from `draw_masks`, float32 [K, D].
        offset: mean score under each mask on reference samples, from `ensemble.member_offset`, float32 [K].
    """

    trunk: Params
    head: Params
    masks: Float[Array, "K D"]
    offset: Float[Array, " K"]


def draw_masks(key: Array, samples: int, width: int, rate: float) -> Float[Array, "K D"]:
    """K dropout masks with inverted scaling: each feature is kept with probability 1 - rate, divided by 1 - rate.

    Args:
        key: a typed key.
        samples: K, at least 2.
        width: D, the width of the features.
        rate: p in (0, 1), the probability that a feature is dropped.

    Returns:
        float32 [K, D]; the expectation of each entry is 1.

    Raises:
        ValueError: less than two samples, or a rate outside (0, 1).

    Example:
        >>> masks = draw_masks(jax.random.key(0), samples=4, width=3, rate=0.5)
        >>> sorted(set(masks.ravel().tolist()))
        [0.0, 2.0]
    """
    if samples < 2:
        raise ValueError(f"{samples} dropout masks give no standard deviation; draw at least 2.")
    if not 0.0 < rate < 1.0:
        raise ValueError(f"the dropout rate is {rate!r}; it must be above 0 and below 1.")
    return jax.random.bernoulli(key, 1.0 - rate, (samples, width)).astype(jnp.float32) / (1.0 - rate)


def dropout_scorer(config: ModelConfig, features: Literal["final_norm", "pre_norm"] = "final_norm"):
    """A scorer of one reward model under K dropout masks.

    `score(DropoutParams, tokens, mask) -> Score(mean, features, members, epistemic)`: `mean` is the score without
    dropout (less the mean of the offsets, so that it has the zero of the members), `members` those under each mask,

        R_k = sum_d m_kd phi_d e_d + c,   with variance p / (1 - p) sum_d (phi_d e_d)^2 over masks,

    and `epistemic` their standard deviation. The trunk runs once.

    Args:
        config: shape of the trunk.
        features: what the head reads, see `models.heads.reward_features`.
    """

    def score(params: DropoutParams, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        vectors = reward_features(config, params.trunk, tokens, mask, features)
        found = member_score(apply_heads(masked_heads(params.head, params.masks), vectors), None, params.offset, None)
        return found.replace(mean=apply_head(params.head, vectors) - params.offset.mean(), features=vectors)

    return score


def masked_heads(head: Params, masks: Float[Array, "K D"]) -> Params:
    """One head under K masks as K linear heads, `{"kernel": [K, D], "bias": [K]}`.

    Dropping features of a linear head is the same as dropping entries of its kernel.
    """
    kernel = head["kernel"].astype(masks.dtype)
    return {"kernel": masks * kernel[None, :], "bias": jnp.broadcast_to(head["bias"], masks.shape[:1])}
