"""The kinds of reward models that are trained on ratings of single responses: URM, ensembles of it, and quantiles.

**They see other labels than the kinds of `uncertain_kinds`**, as many of them: a label is what the annotator says of
one response, by five standards, or of one pair. URM and URME have N / 2 ratings, and N / 2 comparisons for the weights
of the standards; the quantile model has N ratings of the whole. A rating says more than a comparison does.

The standards are the terms of the built-in world's rubric in five groups, whose sum is the gold reward. The annotator
is as careless as with comparisons: who turns a label round with probability p answers without looking with probability
2 p, and then the rating is that of another response.
"""

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.algorithms.attribute_modeling import (
    attribute_modeling,
    gate_modeling,
    gaussian_params,
    quantile_modeling,
    quantile_params,
)
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.data.synthetic.rubric import DEFAULT_RUBRIC, rubric_terms
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.setting import Setting, repeated, sample
from rlhf_jax.laboratory.uncertain_kinds import Kind, Labels, each_seed, first_trunk, learned, rows_between, scored_by
from rlhf_jax.losses.attributes import rating_statistics
from rlhf_jax.rewards.gaussian import (
    GaussianEnsembleParams,
    GaussianParams,
    gaussian_ensemble_scorer,
    gaussian_scorer,
)
from rlhf_jax.rewards.quantile import QuantileParams, even_levels, mean_head, quantile_scorer
from rlhf_jax.types import AttributeBatch, Params, Rollout, Sequences

STANDARDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "relevance": ("fluent_relevance",),
        "agreement": ("agreement",),
        "topic": ("off_topic",),
        "tone": ("enthusiasm", "excess_enthusiasm"),
        "form": ("repetition", "excess_length", "strange_words", "unfinished"),
    }
)
"""What responses are rated by: which terms of the rubric make up each standard."""
QUANTILES = 9
LIKELIHOOD_BETA = 0.5
"""Of the likelihood of ratings: between maximum likelihood, 0, and squared error, 1 (Seitzer et al., 2203.09168)."""


def standards_of(rollout: Rollout) -> Float[np.ndarray, "B K"]:
    """The true rating of every response by each of `STANDARDS`, in units of the gold reward, which is their sum."""
    terms = rubric_terms(*(np.asarray(part) for part in (rollout.prompts.tokens, rollout.tokens, rollout.mask)))
    groups = STANDARDS.values()
    return np.stack([sum(getattr(DEFAULT_RUBRIC, name) * terms[name] for name in names) for names in groups], axis=1)


def careless(rng: np.random.Generator, ratings: Float[np.ndarray, "B K"], noise: float) -> Float[np.ndarray, "B K"]:
    """Ratings by an annotator who does not look with probability 2 `noise`, and then rates some other response.

    Args:
        rng: the source of randomness.
        ratings: true ones, [B, K].
        noise: in [0, 0.5).

    Example:
        >>> careless(np.random.default_rng(0), np.array([[1.0], [2.0]]), 0.0).tolist()
        [[1.0], [2.0]]
    """
    other = rng.integers(len(ratings), size=len(ratings))
    blind = rng.random(len(ratings)) < 2 * noise
    return ratings[np.where(blind, other, np.arange(len(ratings)))]


def rate(setting: Setting, key: Array, count: int, noise: float, rng: np.random.Generator) -> AttributeBatch:
    """Ratings of responses of the initial policy of the built-in world.

    Args:
        setting: where.
        key: of the responses.
        count: number N of responses; response i answers training prompt i, cycling.
        noise: see `careless`.
        rng: of the noise.
    """
    rows = np.arange(count) % len(setting.world.prompts.tokens)
    rollout = sample(setting, repeated(setting.world.prompts, rows), key)
    ratings = jnp.asarray(careless(rng, standards_of(rollout), noise), jnp.float32)
    sequences = Sequences(tokens=rollout.sequences.tokens, mask=rollout.sequences.mask)
    return AttributeBatch(sequences=sequences, ratings=ratings, known=jnp.ones(ratings.shape, bool))


def _two_stages(options: Options, setting: Setting, lane: dict, trunk: Params) -> GaussianParams:
    """Trunk and head on the first half of the ratings, then the gate on the second half of the comparisons."""
    (ratings, pairs), half, config = lane["given"], options.pairs // 2, setting.reward_config
    keys, features = jax.random.split(lane["key"]), options.features
    ratings, pairs = rows_between(ratings, 0, half), rows_between(pairs, half, options.pairs)
    first = attribute_modeling(
        config, adam(options.reward_learning_rate), len(STANDARDS), features=features, beta=LIKELIHOOD_BETA
    )
    mean, scale = rating_statistics(ratings.ratings, ratings.known)
    begun = learned(options, first, {"trunk": trunk, "mean": mean, "scale": scale}, ratings, keys[0])
    second = gate_modeling(config, adam(options.reward_learning_rate), features)
    return gaussian_params(learned(options, second, begun.base | begun.params, pairs, keys[1]))


def _urm(options: Options, setting: Setting, labels: Labels, key: Array) -> GaussianParams:
    def one(lane: dict, trunk: Params) -> GaussianParams:
        return _two_stages(options, setting, lane, trunk)

    return each_seed(one, (labels.ratings, labels.comparisons), key, first_trunk(setting))


def _urme(options: Options, setting: Setting, labels: Labels, key: Array) -> GaussianEnsembleParams:
    members = options.members

    def one(lane: dict, trunk: Params) -> GaussianEnsembleParams:
        def member(key: Array) -> GaussianParams:
            return _two_stages(options, setting, lane | {"key": key}, trunk)

        models = jax.lax.map(member, jax.random.split(lane["key"], members))
        return GaussianEnsembleParams(members=models, offset=jnp.zeros(members))

    return each_seed(one, (labels.ratings, labels.comparisons), key, first_trunk(setting))


def _quantile(options: Options, setting: Setting, labels: Labels, key: Array) -> QuantileParams:
    config, optimizer = setting.reward_config, adam(options.reward_learning_rate)
    algorithm = quantile_modeling(config, optimizer, even_levels(QUANTILES), options.features)

    def one(lane: dict, trunk: Params) -> QuantileParams:
        given = lane["given"]
        whole = given.replace(
            ratings=given.ratings.sum(axis=1, keepdims=True), known=given.known.all(axis=1, keepdims=True)
        )
        mean, scale = rating_statistics(whole.ratings, whole.known)
        start = {"trunk": trunk, "mean": mean, "scale": scale}
        return quantile_params(learned(options, algorithm, start, whole, lane["key"]))

    return each_seed(one, labels.ratings, key, first_trunk(setting))


def _urm_passes(options: Options) -> float:
    """Single responses, half as many as pairs; then half the pairs, forward only."""
    return 0.25 + 0.5 / 3


RATED: Mapping[str, Kind] = MappingProxyType(
    {
        "URM": Kind(
            "URM: Gaussian ratings",
            _urm,
            scored_by(gaussian_scorer),
            trained=lambda params: (params.trunk, params.attributes, params.gate),
            passes=_urm_passes,
            rated=True,
        ),
        "URME": Kind(
            "URME: ensemble of URM",
            _urme,
            scored_by(gaussian_ensemble_scorer),
            trained=lambda params: (params.members.trunk, params.members.attributes, params.members.gate),
            passes=lambda options: options.members * _urm_passes(options),
            rated=True,
        ),
        "quantile": Kind(
            f"{QUANTILES} quantiles of a rating",
            _quantile,
            scored_by(quantile_scorer),
            trained=lambda params: (params.trunk, params.quantiles),
            passes=lambda options: 0.5,
            head=lambda params: mean_head(params.quantiles),
            rated=True,
            compared=False,
        ),
    }
)
"""The kinds that are trained on ratings, by name."""
