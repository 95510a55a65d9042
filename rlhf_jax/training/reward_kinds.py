"""The kinds of reward models, and what of each a folder has to know.

Every kind is a scorer with a record of parameters. In a folder (`reward_folders`) it stands on an ordinary model, one
trunk with one linear head: here is where the trunk is in the parameters, and which head comes nearest to the kind's
mean. A new kind is one more entry.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from rlhf_jax.rewards import probabilistic, quantile
from rlhf_jax.rewards.bradley_terry import EnsembleParams, ensemble_scorer, reward_scorer
from rlhf_jax.rewards.dropout import DropoutParams, dropout_scorer
from rlhf_jax.rewards.ellipsoid import Geometry
from rlhf_jax.rewards.gaussian import (
    GaussianEnsembleParams,
    GaussianParams,
    gaussian_ensemble_scorer,
    gaussian_scorer,
)
from rlhf_jax.rewards.linear_ensemble import LinearEnsembleParams, linear_ensemble_scorer
from rlhf_jax.rewards.lora_ensemble import LoRAEnsembleParams, lora_ensemble_scorer
from rlhf_jax.rewards.posterior import PosteriorParams, posterior_scorer
from rlhf_jax.types import Params


class Kind(NamedTuple):
    """A kind of reward model.

    Attributes:
        record: class of its parameters.
        scorer: `scorer(config, **options)` gives `score(params, tokens, mask)`.
        head: `head(params, lead)`: the head `{"kernel": [D], "bias": []}` of the ordinary model. Where the kind's mean
            is one linear head on one trunk, it is that one, centred as the mean is.
        trunk: where the trunk is in the parameters.
        stacked: whether the trunk has members on axis 0; the ordinary model has that of the lead, or of member 0.
        records: classes of the fields that are records themselves.
    """

    record: type
    scorer: Callable[..., Callable[..., Any]]
    head: Callable[[Params, int | None], Params]
    trunk: tuple[str, ...] = ("trunk",)
    stacked: bool = False
    records: Mapping[str, type] = MappingProxyType({})


def _centred(head: Params, offset: Array) -> Params:
    bias = head["bias"]
    return {"kernel": head["kernel"], "bias": bias.astype(offset.dtype) - offset}


def _of_heads(heads: Params, offset: Array, lead: int | None) -> Params:
    """The lead's head, or the average of all; in float32, as the offset is."""
    each = _centred(heads, offset)
    each["kernel"] = each["kernel"].astype(offset.dtype)
    return jax.tree.map(lambda leaf: leaf.mean(axis=0) if lead is None else leaf[lead], each)


def _of_attributes(attributes: Params, mean: Array, scale: Array) -> Params:
    """The head of the plain average of K attributes, in the units of the ratings."""
    count = len(scale)
    kernel, bias = attributes["kernel"][:, :count], attributes["bias"][:count]
    kernel, bias = kernel.astype(scale.dtype), bias.astype(scale.dtype)
    return {"kernel": (scale[None] * kernel).mean(axis=1), "bias": (mean + scale * bias).mean()}


def _of_gaussians(params: GaussianEnsembleParams, lead: int | None) -> Params:
    one = jax.tree.map(lambda leaf: leaf[lead or 0], params.members)
    return _centred(_of_attributes(one.attributes, one.mean, one.scale), params.offset[lead or 0])


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "bradley_terry": Kind(dict, reward_scorer, lambda params, lead: params["head"]),
        "ensemble": Kind(
            EnsembleParams,
            ensemble_scorer,
            lambda params, lead: _of_heads(params.members["head"], params.offset, lead or 0),
            trunk=("members", "trunk"),
            stacked=True,
        ),
        "linear_ensemble": Kind(
            LinearEnsembleParams,
            linear_ensemble_scorer,
            lambda params, lead: _of_heads(params.heads, params.offset, lead),
        ),
        "lora_ensemble": Kind(
            LoRAEnsembleParams,
            lora_ensemble_scorer,
            lambda params, lead: _of_heads(params.heads, params.offset, lead),
            trunk=("base", "trunk"),
        ),
        "dropout": Kind(
            DropoutParams, dropout_scorer, lambda params, lead: _centred(params.head, params.offset.mean())
        ),
        "posterior": Kind(
            PosteriorParams,
            posterior_scorer,
            lambda params, lead: _centred(params.head, params.offset),
            records=MappingProxyType({"geometry": Geometry}),
        ),
        "gaussian": Kind(
            GaussianParams,
            gaussian_scorer,
            lambda params, lead: _of_attributes(params.attributes, params.mean, params.scale),
        ),
        "gaussian_ensemble": Kind(
            GaussianEnsembleParams,
            gaussian_ensemble_scorer,
            _of_gaussians,
            trunk=("members", "trunk"),
            stacked=True,
            records=MappingProxyType({"members": GaussianParams}),
        ),
        "quantile": Kind(
            quantile.QuantileParams,
            quantile.quantile_scorer,
            lambda params, lead: quantile.mean_head(params.quantiles),
        ),
        "probabilistic": Kind(
            probabilistic.ProbabilisticParams,
            probabilistic.probabilistic_scorer,
            lambda params, lead: probabilistic.mean_head(params.head),
        ),
    }
)


RATED = frozenset({"gaussian", "gaussian_ensemble", "quantile"})
"""Kinds that are taught ratings, in whose units their margins are: these are no log-odds."""
WITH_MEMBERS = frozenset({"ensemble", "linear_ensemble", "lora_ensemble", "dropout", "gaussian_ensemble"})
"""Kinds whose Score has members."""
EPISTEMIC = WITH_MEMBERS | {"posterior"}
"""Kinds whose Score says how unsure its mean is."""
LINEAR = frozenset({"bradley_terry", "linear_ensemble", "dropout", "posterior", "quantile", "probabilistic"})
"""Kinds whose mean is one linear head on one trunk, the ordinary model of their folder."""


def has_members(kind: str, options: Mapping[str, Any]) -> bool:
    """Whether the Score of a kind with these options of its scorer has members.

    Example:
        >>> has_members("gaussian_ensemble", {}), has_members("gaussian_ensemble", {"statistic": "range"})
        (True, False)
    """
    return kind in WITH_MEMBERS and options.get("statistic", "deviation") == "deviation"


def is_linear(kind: str, options: Mapping[str, Any]) -> bool:
    """Whether the mean of a kind with these options of its scorer is that of the ordinary model of its folder.

    Example:
        >>> [is_linear("ensemble", options) for options in ({}, {"lead": 1})]  # the average, or one member
        [False, True]
    """
    if kind == "ensemble":
        return options.get("lead") is not None
    return kind in LINEAR and options.get("centre", "mean") == "mean"


def kind_of(params: Params) -> str:
    """The kind that these parameters are of.

    Raises:
        ValueError: of none, such as a policy; the sentence names the known ones.

    Example:
        >>> kind_of({"trunk": {}, "head": {}})
        'bradley_terry'
    """
    for name, kind in KINDS.items():
        if isinstance(params, kind.record) and (kind.record is not dict or set(params) == {"trunk", "head"}):
            return name
    what = f"a dictionary of {', '.join(map(str, params))}" if isinstance(params, dict) else type(params).__name__
    known = ", ".join(kind.record.__name__ for kind in KINDS.values() if kind.record is not dict)
    raise ValueError(
        f"{what}: these are parameters of no known kind of reward model; known are {known}, and a dictionary of trunk "
        "and head."
    )
