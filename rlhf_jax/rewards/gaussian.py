"""Reward models that predict a Gaussian for each attribute of a text and weigh them (URM), and their ensembles (URME).

A linear head on the last token's state gives a mean and a log standard deviation of each of K attributes' ratings; a
small network, the gate, gives the weights w. The reward is `r = sum_k w_k mu_k`, in the units of the ratings. What the
data leave open (aleatoric) is the predicted deviation; what the models do not know (epistemic) is how far several of
them, trained from different starts, disagree.

The gate reads the state of the response's last token, or that of the prompt's. Tokens and mask do not say where a
prompt ends, so a scorer with a prompt gate is told how many columns prompts have, as in rollouts, where all prompts end
in one column. `score_attributes` takes any mask of the gate.

Source: Lou et al., "Uncertainty-aware Reward Model: Teaching Reward Models to Know What is Unknown", arXiv:2410.00847.
"""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.losses.attributes import clamp_log_deviation
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import FEATURES, last_token
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.rewards.bradley_terry import member_score
from rlhf_jax.rewards.ensemble import variance
from rlhf_jax.types import Params, Score, at_least_float32, wide

GATES = ("response", "prompt")
STATISTICS = ("deviation", "range", "norm")


@chex.dataclass(frozen=True)
class GaussianParams:
    """A reward model of K attributes.

    Attributes:
        trunk: its trunk.
        attributes: `{"kernel": [D, 2 K], "bias": [2 K]}`: K means, then K log standard deviations, of ratings less
            their `mean` over their `scale`.
        gate: `{"hidden": {"kernel": [D, H], "bias": [H]}, "output": {"kernel": [H, K], "bias": [K]}}`.
        mean: of the training data's ratings, float32 [K].
        scale: their standard deviation, float32 [K].
    """

    trunk: Params
    attributes: Params
    gate: Params
    mean: Float[Array, " K"]
    scale: Float[Array, " K"]


@chex.dataclass(frozen=True)
class GaussianEnsembleParams:
    """Such reward models stacked on a leading axis.

    Attributes:
        members: `GaussianParams` whose leaves have the M members on axis 0.
        offset: float32 [M], subtracted from the members' rewards. Zeros for gates with a softmax: a weighted mean of
            ratings has no free constant. Of linear gates, the means on reference samples (`ensemble.member_offset`).
    """

    members: GaussianParams
    offset: Float[Array, " M"]


class Attributes(NamedTuple):
    """What a model says of each attribute, in the units of the ratings.

    Attributes:
        mean: mu, float32 [B, K]; [M, B, K] of members.
        deviation: sigma, float32 [B, K].
        weights: w, float32 [B, K].
    """

    mean: Float[Array, "*B K"]
    deviation: Float[Array, "*B K"]
    weights: Float[Array, "*B K"]

    @property
    def reward(self) -> Float[Array, "*B"]:
        """sum_k w_k mu_k."""
        return (self.weights * self.mean).sum(axis=-1)

    @property
    def reward_deviation(self) -> Float[Array, "*B"]:
        """sqrt(sum_k w_k^2 sigma_k^2), of attributes that vary independently given the text."""
        return jnp.sqrt(jnp.square(self.weights * self.deviation).sum(axis=-1))


def init_distribution_head(config: ModelConfig, key: Array, attributes: int) -> Params:
    """A fresh head `{"kernel": [D, 2 K], "bias": [2 K]}`: means as of a reward head, standard deviations 1 everywhere.

    Raises:
        ValueError: less than one attribute.
    """
    if attributes < 1:
        raise ValueError(f"a head for {attributes} attributes predicts nothing; give at least 1.")
    means = jax.random.normal(key, (config.width, attributes), config.param_dtype) * (config.width + 1) ** -0.5
    return {
        "kernel": jnp.concatenate([means, jnp.zeros_like(means)], axis=1),
        "bias": jnp.zeros(2 * attributes, config.param_dtype),
    }


def init_gate(key: Array, width: int, attributes: int, hidden: int = 64) -> Params:
    """A fresh gate that weighs all attributes alike, 1 / K, until it is trained.

    Args:
        key: a typed key.
        width: D, of the states that it reads.
        attributes: K.
        hidden: H, the width of its hidden layer.
    """
    kernel = jax.random.normal(key, (width, hidden)) * width**-0.5
    return {
        "hidden": {"kernel": kernel, "bias": jnp.zeros(hidden)},
        "output": {"kernel": jnp.zeros((hidden, attributes)), "bias": jnp.full(attributes, 1.0 / attributes)},
    }


def apply_linear(layer: Params, features: Float[Array, "B D"]) -> Float[Array, "B N"]:
    """features kernel + bias for a kernel [D, N], in at least float32 at the highest precision."""
    dtype = wide(features)
    out = jnp.matmul(features.astype(dtype), layer["kernel"].astype(dtype), precision="highest")
    return out + layer["bias"].astype(dtype)[None]


def apply_distribution_head(head: Params, features: Float[Array, "B D"]) -> tuple[Float[Array, "B K"], ...]:
    """Mean and log standard deviation of each attribute, [B, K] each; neither clamped nor in the ratings' units."""
    mean, log_deviation = jnp.split(apply_linear(head, features), 2, axis=1)
    return mean, log_deviation


def apply_gate(gate: Params, features: Float[Array, "B D"], softmax: bool = True) -> Float[Array, "B K"]:
    """The weights of the attributes: one hidden layer with SELU, and a softmax over attributes.

    Args:
        gate: `{"hidden", "output"}`.
        features: what it reads, [B, D].
        softmax: weights above 0 that sum to 1; False: as they come out, so that an attribute can lower the reward.
    """
    weights = apply_linear(gate["output"], jax.nn.selu(apply_linear(gate["hidden"], features)))
    return jax.nn.softmax(weights, axis=-1) if softmax else weights


def score_attributes(
    config: ModelConfig,
    params: GaussianParams,
    tokens: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    gate_mask: Bool[Array, "B S"] | None = None,
    features: Literal["final_norm", "pre_norm"] = "final_norm",
    softmax: bool = True,
) -> Attributes:
    """What a model says of each attribute of each sequence, from one pass through its trunk.

    Args:
        config: shape of the trunk.
        params: the model.
        tokens: [B, S].
        mask: the real ones, [B, S].
        gate_mask: the gate reads the state of the last token that is True here, [B, S]; None: the last real token.
        features: what heads and gate read, see `models.heads.reward_features`.
        softmax: see `apply_gate`.
    """
    if features not in FEATURES:
        raise ValueError(f"features are {features!r}; choose one of {', '.join(FEATURES)}.")
    hidden = apply_trunk(config, params.trunk, tokens, mask)
    states = hidden.final if features == "final_norm" else hidden.residual
    last = at_least_float32(last_token(states, mask))
    gated = last if gate_mask is None else at_least_float32(last_token(states, gate_mask))
    mean, log_deviation = apply_distribution_head(params.attributes, last)
    return Attributes(
        mean=params.mean[None] + params.scale[None] * mean,
        deviation=params.scale[None] * jnp.exp(clamp_log_deviation(log_deviation)),
        weights=apply_gate(params.gate, gated, softmax),
    )


def gaussian_scorer(
    config: ModelConfig,
    features: Literal["final_norm", "pre_norm"] = "final_norm",
    softmax: bool = True,
    gate: str = "response",
    prompt_length: int | None = None,
):
    """One model's scorer: `score(GaussianParams, tokens, mask) -> Score(mean, aleatoric)`.

    `mean = sum_k w_k mu_k` and `aleatoric = sqrt(sum_k w_k^2 sigma_k^2)`, in the units of the ratings. There are no
    features: with weights that depend on the text the reward is not linear in them.

    Args:
        config: shape of the trunk.
        features: what heads and gate read.
        softmax: see `apply_gate`; as the gate was trained.
        gate: which last token's state the gate reads, "response" or "prompt"; as it was trained.
        prompt_length: columns of the prompts, for a gate that reads them.

    Raises:
        ValueError: an unknown gate, or one that reads the prompt without `prompt_length`, or the reverse.
    """
    read = _reader(config, features, softmax, gate, prompt_length)

    def score(params: GaussianParams, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        found = read(params, tokens, mask)
        return Score(mean=found.reward, aleatoric=found.reward_deviation)

    return score


def gaussian_ensemble_scorer(
    config: ModelConfig,
    features: Literal["final_norm", "pre_norm"] = "final_norm",
    softmax: bool = True,
    gate: str = "response",
    prompt_length: int | None = None,
    lead: int | None = None,
    statistic: str = "deviation",
):
    """A scorer of M such models.

    `score(GaussianEnsembleParams, tokens, mask) -> Score(mean, members, epistemic, aleatoric)`; `aleatoric^2` is the
    mean of the members' variances and `epistemic^2` the variance of their means, so that the sum is the variance of the
    mixture of the members (`total_variance`).

    Args:
        config: shape of the members' trunks.
        features: see `gaussian_scorer`.
        softmax: see `gaussian_scorer`.
        gate: see `gaussian_scorer`.
        prompt_length: see `gaussian_scorer`.
        lead: see `bradley_terry.member_score`.
        statistic: what `epistemic` is: "deviation" over the members, their "range" (`disagreement_range`), or the
            largest "norm" of a member's attribute deviations (`largest_norm`; it measures the data's noise, but the
            paper uses it alike). With the last two the score has no members, so that the rules that penalise use them:
            `ensemble.lower_confidence_bound` is then `r - rho u`.

    Raises:
        ValueError: as `gaussian_scorer`, or an unknown statistic.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"statistic is {statistic!r}; choose one of {', '.join(STATISTICS)}.")
    read = _reader(config, features, softmax, gate, prompt_length)

    def score(params: GaussianEnsembleParams, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        each = jax.vmap(read, in_axes=(0, None, None))(params.members, tokens, mask)
        found = member_score(each.reward, None, params.offset, lead)
        found = found.replace(aleatoric=jnp.sqrt(jnp.square(each.reward_deviation).mean(axis=0)))
        if statistic == "deviation":
            return found
        unsure = disagreement_range(found.members) if statistic == "range" else largest_norm(each.deviation)
        return found.replace(members=None, epistemic=unsure)

    return score


def disagreement_range(members: Float[Array, "M B"]) -> Float[Array, " B"]:
    """max_ij |r_i - r_j|; one member that is off is enough to make it large.

    Example:
        >>> disagreement_range(jnp.array([[1.0], [4.0], [2.0]])).tolist()
        [3.0]
    """
    return members.max(axis=0) - members.min(axis=0)


def largest_norm(deviation: Float[Array, "M B K"]) -> Float[Array, " B"]:
    """max_i ||sigma_i||, the longest of the members' vectors of attribute deviations.

    Example:
        >>> largest_norm(jnp.array([[[3.0, 4.0]], [[1.0, 1.0]]])).tolist()
        [5.0]
    """
    return jnp.sqrt(jnp.square(deviation).sum(axis=-1)).max(axis=0)


def total_variance(mean: Float[Array, "M B"], deviation: Float[Array, "M B"]) -> Float[Array, " B"]:
    """mean_i sigma_i^2 + Var_i(mu_i): the variance of a rating drawn from a member that is drawn at random.

    Args:
        mean: mu of each member, [M, B].
        deviation: sigma of each member, [M, B].

    Example:
        >>> total_variance(jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [2.0]])).tolist()
        [3.5]
    """
    return jnp.square(deviation).mean(axis=0) + variance(mean)


def rejection_threshold(uncertainty: Float[Array, " N"], quantile: float | int) -> Float[Array, ""]:
    """The uncertainty above which responses are rejected: a quantile of those of a calibration set.

    Args:
        uncertainty: of the calibration set, [N].
        quantile: q in [0, 1]: of the calibration set at least a share q is kept.

    Raises:
        ValueError: `quantile` is outside [0, 1], or there is no calibration set.

    Example:
        >>> known = jnp.array([0.1, 0.4, 0.2, 0.3])
        >>> (known <= rejection_threshold(known, 0.5)).tolist()
        [True, False, True, True]
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"the quantile is {quantile!r}; it must be between 0 and 1.")
    if not len(uncertainty):
        raise ValueError("a threshold needs a calibration set: give the uncertainty of at least one response.")
    return jnp.quantile(uncertainty, quantile, method="higher")


def _reader(config: ModelConfig, features: str, softmax: bool, gate: str, prompt_length: int | None):
    """`score_attributes` with everything fixed but parameters, tokens and mask."""
    check_gate(gate)
    if (gate == "prompt") != (prompt_length is not None):
        raise ValueError(
            f"the gate reads the {gate} and prompt_length is {prompt_length}: give prompt_length, the number of "
            "columns of the prompts, for a gate that reads the prompt, and for no other."
        )

    def read(params: GaussianParams, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Attributes:
        gate_mask = None
        if prompt_length is not None:
            gate_mask = mask & (jnp.arange(tokens.shape[1]) < prompt_length)[None]
        return score_attributes(config, params, tokens, mask, gate_mask, features, softmax)

    return read


def check_gate(gate: str) -> None:
    """Refuses a place to read that gates do not know.

    Raises:
        ValueError: naming those that there are.
    """
    if gate not in GATES:
        raise ValueError(f"the gate reads {gate!r}; choose one of {', '.join(GATES)}.")
