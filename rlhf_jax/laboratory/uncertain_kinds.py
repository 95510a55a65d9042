"""Every kind of reward model that says how sure it is, trained for all seeds from equally many labels.

A kind is a row of `KINDS`: how its models are trained, how they score, and what that costs. What it offers (members,
features, epistemic or aleatoric uncertainty) is what its Score has, see `uncertainty_study.offers`.

The annotator is careless: each of N labels is turned round with probability `label_noise`. The kinds here see N
comparisons of two responses; those of `rated_kinds` see ratings of single responses, and say so.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax.algorithms.attribute_modeling import probabilistic_modeling, probabilistic_params
from rlhf_jax.algorithms.compose import Scorer
from rlhf_jax.algorithms.ensemble_modeling import (
    linear_ensemble_modeling,
    linear_ensemble_params,
    lora_ensemble_modeling,
    lora_ensemble_params,
)
from rlhf_jax.algorithms.fit import epoch_orders, fit
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.reward_modeling import reward_modeling
from rlhf_jax.laboratory.last_layers import GEOMETRIES, natural_square, pair_features
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.proxies import train_members
from rlhf_jax.laboratory.setting import Setting
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.rewards import probabilistic
from rlhf_jax.rewards.averaging import average_weights
from rlhf_jax.rewards.bradley_terry import EnsembleParams, ensemble_scorer, reward_scorer
from rlhf_jax.rewards.dropout import DropoutParams, draw_masks, dropout_scorer
from rlhf_jax.rewards.linear_ensemble import LinearEnsembleParams, linear_ensemble_scorer
from rlhf_jax.rewards.lora_ensemble import LoRAEnsembleParams, lora_ensemble_scorer
from rlhf_jax.rewards.posterior import PosteriorParams, posterior_scorer
from rlhf_jax.rewards.probabilistic import probabilistic_scorer
from rlhf_jax.types import Algorithm, AttributeBatch, Params, PreferenceBatch

HEADS = 20
"""Heads of a linear ensemble."""
PRIOR_DECAY = 1.0
"""How strongly the heads of "linear-decay" are pulled to where they started.

With 1,500 comparisons, 4 epochs and width 32 members differ 1.36 times as much with it as without (4 seeds: 1.20 to
1.48); with 0.01 1.01 times, with 0.1 1.08, with 10 1.57 times, where the heads hardly leave their start.
"""
DROPOUT_RATE = 0.1
DROPOUT_MASKS = 20
ADAPTER = AdapterConfig(kind="lora", targets=("query", "key", "value", "output"), rank=4, alpha=8.0)


class Labels(NamedTuple):
    """What the annotator says in every seed.

    Attributes:
        comparisons: N pairs, [seeds, N, …].
        ratings: N single responses with ratings, [seeds, N, …]; None in a world without a rubric.
    """

    comparisons: PreferenceBatch
    ratings: AttributeBatch | None


class Kind(NamedTuple):
    """A kind of reward model.

    Attributes:
        label: what it is, for tables.
        train: `train(options, setting, labels, key)`, parameters with seeds on axis 0; offsets are 0.
        scorer: `scorer(options, setting)`, for the parameters of one seed.
        trained: the part of the parameters of one seed that training changes.
        passes: `passes(options)`, how many sequences go forward and back through a trunk in training, relative to
            "single"; a frozen trunk goes forward only, which counts a third.
        head: the head `{"kernel", …}` that makes the score of `Score.features`; None where there is none.
        geometry: one of `GEOMETRIES`, for AdvPO and the sample-wise penalty.
        rated: whether it needs ratings.
        compared: whether it learns from comparisons too, so that margins of its scores are log-odds; else its aleatoric
            deviation says how likely a rating is above another.
        starts: whether it needs several pretrained trunks.
    """

    label: str
    train: Callable[[Options, Setting, Labels, Array], Params]
    scorer: Callable[[Options, Setting], Scorer]
    trained: Callable[[Params], Any]
    passes: Callable[[Options], float] = lambda options: 1.0
    head: Callable[[Params], Params] | None = None
    geometry: str = "individual"
    rated: bool = False
    compared: bool = True
    starts: bool = False


def each_seed(one: Callable[..., Params], lanes: Any, key: Array, *shared: Any) -> Params:
    """`one({"key", "given"}, *shared)` for every seed, as one program; `lanes` has the seeds on axis 0."""
    seeds = len(jax.tree.leaves(lanes)[0])
    return jax.jit(over_lanes(one))({"key": jax.random.split(key, seeds), "given": lanes}, *shared)


def learned(options: Options, algorithm: Algorithm, start: Params, data: Any, key: Array) -> Any:
    """The state of an offline algorithm after the passes over the data that every kind makes.

    Args:
        options: batch size and passes.
        algorithm: what learns.
        start: pretrained parameters by role.
        data: rows on axis 0.
        key: of what is fresh, and of the order of rows.
    """
    init_key, order_key = jax.random.split(key)
    rows = len(jax.tree.leaves(data)[0])
    order = epoch_orders(order_key, rows, min(options.reward_batch, rows), options.reward_epochs)
    return fit(algorithm.update, algorithm.init(init_key, start), data, order)[0]


def rows_between(data: Any, start: int, stop: int) -> Any:
    """Rows `start` to `stop` of data with rows on axis 0."""
    return jax.tree.map(lambda leaf: leaf[start:stop], data)


def first_trunk(setting: Setting) -> Params:
    """The pretrained trunk that every kind but "starts" begins with."""
    return jax.tree.map(lambda leaf: leaf[0], setting.trunks)


def independent(options: Options, setting: Setting, pools: PreferenceBatch, key: Array, members: int) -> Params:
    """Independent reward models on one pretrained trunk, [seeds, members, …]; heads and data orders differ."""
    trunks = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (members, *leaf.shape)), first_trunk(setting))
    alone = dataclasses.replace(options, members=members)
    return train_members(alone, setting._replace(trunks=trunks), pools, key)


def ensemble(members: Params) -> EnsembleParams:
    """Members [seeds, members, …] with offsets of 0."""

    def one(members: Params) -> EnsembleParams:
        return EnsembleParams(members=members, offset=jnp.zeros(len(members["head"]["bias"])))

    return jax.vmap(one)(members)


def _single(options: Options, setting: Setting, labels: Labels, key: Array) -> Params:
    members = independent(options, setting, labels.comparisons, key, 1)
    return jax.tree.map(lambda leaf: leaf[:, 0], members)


def _seeds(options: Options, setting: Setting, labels: Labels, key: Array) -> EnsembleParams:
    return ensemble(independent(options, setting, labels.comparisons, key, options.members))


def _starts(options: Options, setting: Setting, labels: Labels, key: Array) -> EnsembleParams:
    return ensemble(train_members(options, setting, labels.comparisons, key))


def _bootstrap(options: Options, setting: Setting, labels: Labels, key: Array) -> EnsembleParams:
    """Every member has pairs of its own, as many as there are, drawn from them with replacement."""
    members_key, rows_key = jax.random.split(key)
    shape = (options.seeds, options.members)
    rows = jax.random.randint(rows_key, (*shape, options.pairs), 0, options.pairs)
    pools = jax.vmap(lambda pool, rows: jax.tree.map(lambda leaf: leaf[rows], pool))(labels.comparisons, rows)
    pools = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), pools)
    alone = dataclasses.replace(options, seeds=options.seeds * options.members)
    members = independent(alone, setting, pools, members_key, 1)
    return ensemble(jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[2:]), members))


def _warm(options: Options, setting: Setting, labels: Labels, key: Array) -> Params:
    return jax.vmap(average_weights)(independent(options, setting, labels.comparisons, key, options.members))


def _linear(decay: float) -> Callable[..., Params]:
    def train(options: Options, setting: Setting, labels: Labels, key: Array) -> LinearEnsembleParams:
        config, optimizer = setting.reward_config, adam(options.reward_learning_rate)
        algorithm = linear_ensemble_modeling(config, optimizer, HEADS, options.features, prior_decay=decay)

        def one(lane: dict, trunk: Params) -> LinearEnsembleParams:
            return linear_ensemble_params(learned(options, algorithm, {"trunk": trunk}, lane["given"], lane["key"]))

        return each_seed(one, labels.comparisons, key, first_trunk(setting))

    return train


def _lora(options: Options, setting: Setting, labels: Labels, key: Array) -> LoRAEnsembleParams:
    """Trunk and heads on the first half of the pairs, then adapters and heads on the second half."""
    members, half = options.members, options.pairs // 2
    optimizer, config, features = adam(options.reward_learning_rate), setting.reward_config, options.features
    first = linear_ensemble_modeling(config, optimizer, members, features)
    second = lora_ensemble_modeling(config, optimizer, ADAPTER, members, features)

    def one(lane: dict, trunk: Params) -> LoRAEnsembleParams:
        keys = jax.random.split(lane["key"])
        halves = rows_between(lane["given"], 0, half), rows_between(lane["given"], half, options.pairs)
        begun = learned(options, first, {"trunk": trunk}, halves[0], keys[0]).params
        return lora_ensemble_params(learned(options, second, begun, halves[1], keys[1]))

    return each_seed(one, labels.comparisons, key, first_trunk(setting))


def _posterior(name: str) -> Callable[..., Params]:
    def train(options: Options, setting: Setting, labels: Labels, key: Array) -> PosteriorParams:
        models = _single(options, setting, labels, key)

        def one(lane: dict) -> PosteriorParams:
            model, pool = lane["given"]
            pair = pair_features(options, setting, model["trunk"], pool)
            shape = GEOMETRIES[name](pair, model["head"], options.regularisation)
            square = natural_square(shape, pair, model["head"], options.regularisation)
            radius = jnp.sqrt(square / shape.cholesky.shape[-1])
            return PosteriorParams(**model, geometry=shape, radius=radius, offset=jnp.zeros(()))

        return each_seed(one, (models, labels.comparisons), key)

    return train


def _dropout(options: Options, setting: Setting, labels: Labels, key: Array) -> DropoutParams:
    optimizer = adam(options.reward_learning_rate)
    algorithm = reward_modeling(setting.reward_config, optimizer, options.features, dropout=DROPOUT_RATE)

    def one(lane: dict, trunk: Params) -> DropoutParams:
        train_key, mask_key = jax.random.split(lane["key"])
        params = learned(options, algorithm, {"trunk": trunk}, lane["given"], train_key).params
        masks = draw_masks(mask_key, DROPOUT_MASKS, setting.reward_config.width, DROPOUT_RATE)
        return DropoutParams(**params, masks=masks, offset=jnp.zeros(DROPOUT_MASKS))

    return each_seed(one, labels.comparisons, key, first_trunk(setting))


def _probabilistic(options: Options, setting: Setting, labels: Labels, key: Array) -> Params:
    algorithm = probabilistic_modeling(setting.reward_config, adam(options.reward_learning_rate), options.features)

    def one(lane: dict, trunk: Params) -> Params:
        return probabilistic_params(learned(options, algorithm, {"trunk": trunk}, lane["given"], lane["key"]))

    return each_seed(one, labels.comparisons, key, first_trunk(setting))


def _lora_passes(options: Options) -> float:
    """Half the pairs through one trained trunk, half through a frozen one a member with an adapter's gradients."""
    return 0.5 + 0.5 * options.members * 2 / 3


def _posterior_kind(label: str, geometry: str) -> Kind:
    return Kind(
        label,
        _posterior(geometry),
        scored_by(posterior_scorer),
        trained=lambda params: (params.trunk, params.head),
        passes=lambda options: 1 + 1 / (3 * options.reward_epochs),
        head=lambda params: params.head,
        geometry=geometry,
    )


def scored_by(make: Callable[..., Scorer]) -> Callable[[Options, Setting], Scorer]:
    """`scorer(options, setting)` of a kind, from `make(config, features=…)`."""
    return lambda options, setting: make(setting.reward_config, features=options.features)


def _mean_of_heads(params: LinearEnsembleParams) -> Params:
    return jax.tree.map(lambda leaf: leaf.mean(axis=0), params.heads)


def _members(options: Options) -> float:
    return float(options.members)


_ENSEMBLE = {
    "scorer": scored_by(ensemble_scorer),
    "trained": lambda params: params.members,
    "passes": _members,
}
_LINEAR = {
    "scorer": scored_by(linear_ensemble_scorer),
    "trained": lambda params: (params.trunk, params.heads),
    "head": _mean_of_heads,
}
_ONE = {
    "scorer": scored_by(reward_scorer),
    "trained": lambda params: params,
    "head": lambda params: params["head"],
}

COMPARED: Mapping[str, Kind] = MappingProxyType(
    {
        "single": Kind("one reward model", _single, **_ONE),
        "seeds": Kind("ensemble: seeds of one start", _seeds, **_ENSEMBLE),
        "bootstrap": Kind("ensemble: bootstraps of the pairs", _bootstrap, **_ENSEMBLE),
        "starts": Kind("ensemble: pretrained starts", _starts, **_ENSEMBLE, starts=True),
        "linear": Kind(f"{HEADS} linear heads", _linear(0.0), **_LINEAR),
        "linear-decay": Kind(f"{HEADS} linear heads, decay to their start", _linear(PRIOR_DECAY), **_LINEAR),
        "LoRA": Kind(
            "ensemble: LoRA adapters, two stages",
            _lora,
            lambda options, setting: lora_ensemble_scorer(setting.reward_config, ADAPTER, options.features),
            trained=lambda params: (params.base, params.adapters, params.heads),
            passes=_lora_passes,
        ),
        "posterior": _posterior_kind("posterior: single responses", "individual"),
        "posterior-pair": _posterior_kind("posterior: differences of pairs", "pair"),
        "posterior-fisher": _posterior_kind("posterior: Laplace (Fisher)", "fisher"),
        "dropout": Kind(
            f"dropout, {DROPOUT_MASKS} masks",
            _dropout,
            scored_by(dropout_scorer),
            trained=lambda params: (params.trunk, params.head),
            head=lambda params: params.head,
        ),
        "PURM": Kind(
            "PURM: Gaussian rewards from pairs",
            _probabilistic,
            scored_by(probabilistic_scorer),
            trained=lambda params: params,
            head=lambda params: probabilistic.mean_head(params.head),
        ),
        "WARM": Kind("WARM: mean of the weights of the seeds", _warm, **_ONE, passes=_members),
    }
)
"""The kinds that are trained on comparisons alone, by name."""
