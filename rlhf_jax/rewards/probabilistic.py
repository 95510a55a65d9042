"""A reward model of Gaussian rewards that is trained on preferences (PURM): `r ~ N(mu, sigma^2)`.

What its sigma can and cannot mean. A label says which response won, and its likelihood is `E sigma(r_w - r_l)`, which
is nearly `sigma(d / sqrt(1 + pi v / 8))` with d the difference of the means and v the sum of both variances. From the
labels of one pair only that ratio can be learned: a certain small difference and an uncertain large one explain them
alike. So sigma can tell texts apart whose comparisons come out both ways as far as the mean cannot explain that, but
its level is not to be trusted, and it compares texts under one model only. In a simulation with planted means and
deviations (8,000 comparisons, 5 seeds) the rank correlation of sigma with the planted one was 0.99 for heads that are
linear in the true features; for a network of 64 hidden units, which can fit single pairs, it was 0.69 (0.61 to 0.75),
and its median sigma 0.02 to 0.38 where 1.35 was planted. Trained on samples of the rewards instead of the expectation,
sigma shrinks towards zero, as the logarithm of the logistic function is concave. It is no measure of what the model was
not taught, so it is `aleatoric`.

Source: "Probabilistic Uncertain Reward Model", arXiv:2503.22480.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.losses.attributes import bhattacharyya, clamp_log_deviation
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import reward_features
from rlhf_jax.rewards.gaussian import apply_distribution_head
from rlhf_jax.types import Params, Score


@chex.dataclass(frozen=True)
class ProbabilisticParams:
    """A reward model of Gaussian rewards.

    Attributes:
        trunk: its trunk.
        head: `{"kernel": [D, 2], "bias": [2]}`: the mean, then the log standard deviation.
    """

    trunk: Params
    head: Params


def probabilistic_scorer(config: ModelConfig, features: Literal["final_norm", "pre_norm"] = "final_norm"):
    """The scorer: `score(ProbabilisticParams, tokens, mask) -> Score(mean, features, aleatoric)`.

    Args:
        config: shape of the trunk.
        features: what the head reads, see `models.heads.reward_features`; column 0 of its kernel is the head of the
            mean (`mean_head`).
    """

    def score(params: ProbabilisticParams, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        vectors = reward_features(config, params.trunk, tokens, mask, features)
        mean, log_deviation = apply_distribution_head(params.head, vectors)
        return Score(mean=mean[:, 0], features=vectors, aleatoric=jnp.exp(clamp_log_deviation(log_deviation[:, 0])))

    return score


def mean_head(head: Params) -> Params:
    """The linear head `{"kernel": [D], "bias": []}` of the mean, for AdvPO's geometry."""
    return {"kernel": head["kernel"][:, 0], "bias": head["bias"][0]}


def mean_overlap(score: Score, reference: Score) -> Float[Array, " B"]:
    """How much each response's reward distribution overlaps those of reference responses, on average.

    Near 1: the model cannot tell the response from them; near 0: its reward is certainly another. As an uncertainty to
    penalise it is bounded, but it is large for every mediocre response.

    Args:
        score: with `aleatoric`, [B].
        reference: the same of the R reference responses, [R].

    Returns:
        The mean of Bhattacharyya's coefficients, in [0, 1], [B].

    Raises:
        ValueError: a score without `aleatoric`.
    """
    if score.aleatoric is None or reference.aleatoric is None:
        raise ValueError("the overlap of rewards needs their deviations; use a scorer that fills Score.aleatoric.")

    def one(mean: Float[Array, ""], deviation: Float[Array, ""]) -> Float[Array, ""]:
        shape = reference.mean.shape
        mean, deviation = jnp.broadcast_to(mean, shape), jnp.broadcast_to(deviation, shape)
        return bhattacharyya(mean, deviation, reference.mean, reference.aleatoric).mean()

    return jax.vmap(one)(score.mean, score.aleatoric)
