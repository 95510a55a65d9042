"""Training of reward models that predict distributions: of ratings (URM, quantiles), and of rewards (PURM).

URM has two stages: `attribute_modeling` fits trunk and head to ratings, `gate_modeling` then fits the weights of the
attributes to preferences and leaves trunk and head as they are. An ensemble is `jax.vmap` over the state. What a scorer
takes is made from a state by `gaussian_params`, `quantile_params` or `probabilistic_params`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rlhf_jax.algorithms.distributions import (
    DistributionState,
    apart,
    both_sides,
    known_ratings,
    normalised,
    offline_algorithm,
    preference_terms,
    prompt_mask,
    read_last,
    starting_trunk,
    statistics,
)
from rlhf_jax.losses.attributes import (
    clamp_log_deviation,
    gaussian_likelihood,
    pinball,
    probabilistic_preference,
    sampled_regression,
)
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.reward import bradley_terry
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import reward_features
from rlhf_jax.rewards.gaussian import (
    GaussianParams,
    apply_distribution_head,
    apply_linear,
    check_gate,
    init_distribution_head,
    init_gate,
    score_attributes,
)
from rlhf_jax.rewards.probabilistic import ProbabilisticParams
from rlhf_jax.rewards.quantile import QuantileParams
from rlhf_jax.types import Algorithm, AttributeBatch, Metrics, Params, PreferenceBatch

LOSSES = ("likelihood", "sampled")
Features = Literal["final_norm", "pre_norm"]


def attribute_modeling(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    attributes: int,
    loss: str = "likelihood",
    features: Features = "final_norm",
    beta: float | int = 0.0,
    warmup: int = 0,
    accumulate: int = 1,
) -> Algorithm:
    """Stage 1 of URM: a trunk and a Gaussian head for K attributes, from ratings.

    The loss is the sum over attributes, averaged over the texts that have a rating; ratings are taken less their `mean`
    over their `scale`.

    Args:
        config: shape of the trunk.
        optimizer: an optax optimiser of trunk and head.
        attributes: K, at least 1.
        loss: "likelihood", from which the standard deviations can be learned; "sampled" (regression on samples, as in
            the published models), which drives them to zero.
        features: what the head reads, see `models.heads.reward_features`.
        beta: see `losses.attributes.gaussian_likelihood`; for the likelihood only.
        warmup: updates at the start in which the standard deviations are taken to be 1, so that the mean is fitted
            first and not where it is easy only.
        accumulate: microbatches that an update sees one after the other, to need less memory.

    Returns:
        `init(key, params={"trunk"?, "attributes"?, "mean"?, "scale"?})` (a fresh trunk and head where none is given;
        mean and scale [K] from `losses.attributes.rating_statistics`, else 0 and 1) and `update(state,
        AttributeBatch)` with the metrics `loss/attributes`, `attributes/squared_error` (a rating, normalised),
        `uncertainty/mean` (mean standard deviation, normalised), `grad_norm` and `lr`.

    Raises:
        ValueError: an unknown loss, a `beta` outside [0, 1] or with another loss than the likelihood, a negative
            `warmup`, less than one attribute, or (when traced) a batch or statistics of another number of attributes.

    Source: arXiv:2410.00847.
    """
    _check_attributes(attributes, loss, beta, warmup)

    def start(key: Array, given: Params) -> tuple[Params, Params]:
        head_key, trunk_key = jax.random.split(key)
        head = given.get("attributes", None) or init_distribution_head(config, head_key, attributes)
        if head["bias"].shape != (2 * attributes,):
            raise ValueError(f"the given head has {head['bias'].shape[0] // 2} attributes, not {attributes}.")
        base = statistics(given, attributes)
        return {"trunk": starting_trunk(config, given, trunk_key), "attributes": head}, base

    def predict(state: DistributionState, params: Params, batch: AttributeBatch) -> Any:
        if batch.ratings.shape[1] != attributes:
            raise ValueError(f"the batch has ratings of {batch.ratings.shape[1]} attributes, the head {attributes}.")
        found = apply_distribution_head(params["attributes"], read_last(config, params["trunk"], batch, features))
        return found[0], jnp.where(state.step < warmup, 0.0, found[1]) if warmup else found[1]

    def terms(
        state: DistributionState, found: Any, part: tuple[AttributeBatch, Array | None], whole: Any
    ) -> tuple[Array, Metrics]:
        (centre, log_deviation), (batch, noise) = found, part
        ratings, known, of_all = normalised(state, batch), known_ratings(batch), known_ratings(whole[0])
        if loss == "likelihood":
            losses = gaussian_likelihood(centre, log_deviation, ratings, known, beta)
        else:
            losses = sampled_regression(centre, log_deviation, ratings, known, noise)
        value = mean(losses, known, "sequence_sum", whole=of_all)
        error = jnp.square(jnp.where(known, ratings, 0.0) - centre)
        return value, {
            "loss/attributes": value,
            "attributes/squared_error": mean(error, known, whole=of_all),
            "uncertainty/mean": mean(jnp.exp(clamp_log_deviation(log_deviation)), known, whole=of_all),
        }

    def draw(key: Array, batch: AttributeBatch) -> Float[Array, "B K"]:
        return jax.random.normal(key, batch.ratings.shape)

    roles = ("trunk", "attributes", "mean", "scale")
    return offline_algorithm(optimizer, roles, start, predict, terms, accumulate, draw if loss == "sampled" else None)


def gate_modeling(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    features: Features = "final_norm",
    softmax: bool = True,
    gate: str = "response",
    hidden: int = 64,
    accumulate: int = 1,
) -> Algorithm:
    """Stage 2 of URM: the gate alone, by the Bradley-Terry likelihood of preferences under `r = sum_k w_k mu_k`.

    Args:
        config: shape of the trunk.
        optimizer: an optax optimiser of the gate.
        features: what heads and gate read; as in stage 1.
        softmax: see `rewards.gaussian.apply_gate`.
        gate: which last token's state the gate reads: of the "response", or of the "prompt", for which the batches must
            have loss masks. The scorer must be made with the same.
        hidden: width of a fresh gate's hidden layer.
        accumulate: see `attribute_modeling`.

    Returns:
        `init(key, params={"trunk", "attributes", "mean"?, "scale"?, "gate"?})` and `update(state, PreferenceBatch)`
        with the metrics `loss/reward`, `rewards/{chosen,rejected,accuracies,margins}`, `uncertainty/mean` (mean
        standard deviation of the reward), `grad_norm` and `lr`.

    Raises:
        ValueError: an unknown gate, or (when traced) a role missing, or a prompt gate without loss masks.

    Source: arXiv:2410.00847.
    """
    check_gate(gate)

    def start(key: Array, given: Params) -> tuple[Params, Params]:
        for role in ("trunk", "attributes"):
            if role not in given:
                raise ValueError(
                    f"a gate is trained on a trained model: give params[{role!r}], from attribute_modeling."
                )
        width, both = given["attributes"]["kernel"].shape
        fresh = init_gate(key, width, both // 2, hidden)
        kept = {"trunk": given["trunk"], "attributes": given["attributes"]}
        return {"gate": given.get("gate", fresh)}, kept | statistics(given, both // 2)

    def predict(state: DistributionState, params: Params, batch: PreferenceBatch) -> Any:
        both = both_sides(batch)
        gate_mask = prompt_mask(both.mask, both.loss_mask) if gate == "prompt" else None
        model = GaussianParams(gate=params["gate"], **state.base)
        found = score_attributes(config, model, both.tokens, both.mask, gate_mask, features, softmax)
        return apart(found.reward), apart(found.reward_deviation)

    def terms(state: DistributionState, found: Any, part: Any, whole: Any) -> tuple[Array, Metrics]:
        chosen, rejected = found[0]
        losses = bradley_terry(chosen, rejected, part[0].margin, label=part[0].label)
        return preference_terms(losses, *found, part[0], whole[0])

    roles = ("trunk", "attributes", "mean", "scale", "gate")
    return offline_algorithm(optimizer, roles, start, predict, terms, accumulate)


def quantile_modeling(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    levels: Float[Array, " Q"],
    features: Features = "final_norm",
    accumulate: int = 1,
) -> Algorithm:
    """Quantiles of one rating, by the pinball loss; heads begin at the quantiles of a normal distribution.

    Args:
        config: shape of the trunk.
        optimizer: an optax optimiser of trunk and heads.
        levels: increasing, from at most 1/4 to at least 3/4, such as `rewards.quantile.even_levels`, [Q].
        features: what the heads read.
        accumulate: see `attribute_modeling`.

    Returns:
        `init(key, params={"trunk"?, "quantiles"?, "mean"?, "scale"?})` (mean and scale [1]; heads are in units of the
        normalised rating) and `update(state, AttributeBatch)`, of one attribute, with the metrics `loss/attributes`,
        `grad_norm` and `lr`.

    Raises:
        ValueError: levels that do not increase or show no quartiles, or (when traced) a batch of several attributes.

    Source: arXiv:2409.10164.
    """
    rising = bool((jnp.diff(levels) > 0).all()) and len(levels) > 1
    if not rising or not 0 < float(levels[0]) <= 0.25 or not 0.75 <= float(levels[-1]) < 1:
        raise ValueError(
            "levels of quantiles must increase from (0, 1/4] to [3/4, 1): use rewards.quantile.even_levels."
        )

    def start(key: Array, given: Params) -> tuple[Params, Params]:
        head_key, trunk_key = jax.random.split(key)
        kernel = jax.random.normal(head_key, (config.width, 1), config.param_dtype) * (config.width + 1) ** -0.5
        fresh = {
            "kernel": jnp.broadcast_to(kernel, (config.width, len(levels))),
            "bias": jax.scipy.special.ndtri(levels).astype(config.param_dtype),
        }
        trained = {"trunk": starting_trunk(config, given, trunk_key), "quantiles": given.get("quantiles", fresh)}
        return trained, statistics(given, 1) | {"levels": jnp.copy(levels)}  # a step may donate its state

    def predict(state: DistributionState, params: Params, batch: AttributeBatch) -> Any:
        if batch.ratings.shape[1] != 1:
            raise ValueError(
                f"quantiles are of one rating: give batches of one attribute, not {batch.ratings.shape[1]}."
            )
        return apply_linear(params["quantiles"], read_last(config, params["trunk"], batch, features))

    def terms(state: DistributionState, found: Any, part: Any, whole: Any) -> tuple[Array, Metrics]:
        ratings, known = normalised(state, part[0]), known_ratings(part[0])
        losses = pinball(found, state.base["levels"], ratings[:, 0], known[:, 0])
        value = mean(losses[:, None], known, whole=known_ratings(whole[0]))
        return value, {"loss/attributes": value}

    return offline_algorithm(optimizer, ("trunk", "quantiles", "mean", "scale"), start, predict, terms, accumulate)


def probabilistic_modeling(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    features: Features = "final_norm",
    accumulate: int = 1,
) -> Algorithm:
    """PURM: Gaussian rewards, by the likelihood of preferences; `rewards.probabilistic` says what sigma then means.

    Args:
        config: shape of the trunk.
        optimizer: an optax optimiser of trunk and head.
        features: what the head reads.
        accumulate: see `attribute_modeling`.

    Returns:
        `init(key, params={"trunk"?, "head"?})` and `update(state, PreferenceBatch)` with the metrics of
        `gate_modeling`.

    Source: arXiv:2503.22480.
    """

    def start(key: Array, given: Params) -> tuple[Params, Params]:
        head_key, trunk_key = jax.random.split(key)
        head = given.get("head", None) or init_distribution_head(config, head_key, 1)
        return {"trunk": starting_trunk(config, given, trunk_key), "head": head}, {}

    def predict(state: DistributionState, params: Params, batch: PreferenceBatch) -> Any:
        both = both_sides(batch)
        vectors = reward_features(config, params["trunk"], both.tokens, both.mask, features)
        centre, log_deviation = (column[:, 0] for column in apply_distribution_head(params["head"], vectors))
        return apart(centre), apart(log_deviation)

    def terms(state: DistributionState, found: Any, part: Any, whole: Any) -> tuple[Array, Metrics]:
        centres, log_deviations = found
        sides = tuple(zip(centres, log_deviations, strict=True))
        losses = probabilistic_preference(*sides, part[0].margin, part[0].label)
        deviations = tuple(jnp.exp(clamp_log_deviation(s)) for s in log_deviations)
        return preference_terms(losses, centres, deviations, part[0], whole[0])

    return offline_algorithm(optimizer, ("trunk", "head"), start, predict, terms, accumulate)


def gaussian_params(state: DistributionState) -> GaussianParams:
    """The model of a state of `attribute_modeling` (all attributes weighed alike) or of `gate_modeling`."""
    known = state.base | state.params
    if "gate" not in known:
        width, both = known["attributes"]["kernel"].shape
        known = known | {"gate": init_gate(jax.random.key(0), width, both // 2)}
    return GaussianParams(**known)


def quantile_params(state: DistributionState) -> QuantileParams:
    """The model of a state of `quantile_modeling`, its heads in the units of the ratings."""
    scale, head = state.base["scale"], state.params["quantiles"]
    heads = {"kernel": head["kernel"] * scale[None], "bias": head["bias"] * scale + state.base["mean"]}
    return QuantileParams(trunk=state.params["trunk"], quantiles=heads, levels=state.base["levels"])


def probabilistic_params(state: DistributionState) -> ProbabilisticParams:
    """The model of a state of `probabilistic_modeling`."""
    return ProbabilisticParams(**state.params)


def _check_attributes(attributes: int, loss: str, beta: float | int, warmup: int) -> None:
    if attributes < 1:
        raise ValueError(f"a head for {attributes} attributes predicts nothing; give at least 1.")
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; choose one of {', '.join(LOSSES)}.")
    if beta and loss != "likelihood":
        raise ValueError(f"beta weighs the likelihood, and the loss is {loss!r}: leave beta out.")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta!r}; it must be between 0 and 1.")
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}; give a number of updates, at least 0.")
