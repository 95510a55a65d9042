"""Losses on pairs of completions by name: what of a pair each reads, and the reward that a policy stands for under it.

    preference_loss("ipo", beta=0.2, length_norm=True)

A loss is one entry of `PREFERENCE_LOSSES`: a function of its options, which makes a `PreferenceLoss`.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.losses.chi_squared import chi_po_loss, chi_squared_reward
from rlhf_jax.losses.preference import (
    CompletionLogprobs,
    check_not_negative,
    check_positive,
    dpo_loss,
    hinge_loss,
    implicit_reward,
    ipo_loss,
    robust_dpo_loss,
)
from rlhf_jax.losses.reference_free import average_logprob, log_odds, orpo_loss, simpo_loss

Number = Float[Array, ""] | float
OfPairs = Callable[[CompletionLogprobs], Array]
NO_MEASURES: Mapping[str, OfPairs] = MappingProxyType({})


class PreferenceLoss(NamedTuple):
    """A loss on pairs.

    Attributes:
        pairs: the unreduced loss of each pair, [B]; its mean over pairs is minimised.
        rewards: the rewards that the policy stands for, of the chosen and of the rejected completions, [B] each: for
            metrics.
        reference: whether there is a reference policy; if not, none is kept or run.
        likelihood: weight of the negative log-likelihood of the chosen completions, which is added; None: it is not.
        likelihood_rule: its mean: over pairs, of the mean over each one's tokens ("sequence_mean"), or over all tokens
            ("token_mean").
        measures: more to log: by name, a number a pair, [B].
    """

    pairs: OfPairs
    rewards: Callable[[CompletionLogprobs], tuple[Array, Array]]
    reference: bool = True
    likelihood: Number | None = None
    likelihood_rule: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    measures: Mapping[str, OfPairs] = NO_MEASURES


def _four(found: CompletionLogprobs) -> tuple[Array, Array, Array, Array]:
    return found.chosen, found.rejected, found.reference_chosen, found.reference_rejected


def _log_ratios(beta: Number) -> Callable[[CompletionLogprobs], tuple[Array, Array]]:
    """beta log(pi / ref) of both sides."""
    return lambda found: (
        implicit_reward(found.chosen, found.reference_chosen, beta),
        implicit_reward(found.rejected, found.reference_rejected, beta),
    )


def _averages(found: CompletionLogprobs) -> tuple[Array, Array]:
    """Mean log-probability a token of both sides."""
    return average_logprob(found.chosen, found.chosen_length), average_logprob(found.rejected, found.rejected_length)


def _dpo(beta: Number = 0.1, label_smoothing: Number = 0.0) -> PreferenceLoss:
    return PreferenceLoss(lambda found: dpo_loss(*_four(found), beta, label_smoothing), _log_ratios(beta))


def _robust(beta: Number = 0.1, flip_rate: Number = 0.1) -> PreferenceLoss:
    return PreferenceLoss(lambda found: robust_dpo_loss(*_four(found), beta, flip_rate), _log_ratios(beta))


def _ipo(beta: Number = 0.1, length_norm: bool = False) -> PreferenceLoss:
    def pairs(found: CompletionLogprobs) -> Array:
        lengths = (found.chosen_length, found.rejected_length) if length_norm else None
        return ipo_loss(*_four(found), beta, lengths)

    def rewards(found: CompletionLogprobs) -> tuple[Array, Array]:
        chosen, rejected = _log_ratios(beta)(found)
        if not length_norm:
            return chosen, rejected
        return average_logprob(chosen, found.chosen_length), average_logprob(rejected, found.rejected_length)

    return PreferenceLoss(pairs, rewards)


def _hinge(beta: Number = 0.1) -> PreferenceLoss:
    return PreferenceLoss(lambda found: hinge_loss(*_four(found), beta), _log_ratios(beta))


def _rpo(beta: Number = 0.1, nll_weight: Number = 1.0) -> PreferenceLoss:
    check_not_negative("nll_weight", nll_weight)
    return _dpo(beta)._replace(likelihood=nll_weight)


def _chi_po(beta: Number = 0.1, reward_bound: Number = 5.0) -> PreferenceLoss:
    return PreferenceLoss(
        lambda found: chi_po_loss(*_four(found), beta, reward_bound),
        lambda found: (
            chi_squared_reward(found.chosen, found.reference_chosen, beta),
            chi_squared_reward(found.rejected, found.reference_rejected, beta),
        ),
    )


def _simpo(beta: Number = 2.0, gamma: Number = 1.0) -> PreferenceLoss:
    def pairs(found: CompletionLogprobs) -> Array:
        lengths = found.chosen_length, found.rejected_length
        return simpo_loss(found.chosen, found.rejected, *lengths, beta, gamma)

    return PreferenceLoss(pairs, lambda found: tuple(beta * one for one in _averages(found)), reference=False)


def _orpo(beta: Number = 0.1) -> PreferenceLoss:
    check_positive("beta", beta)

    def pairs(found: CompletionLogprobs) -> Array:
        return beta * orpo_loss(found.chosen, found.rejected, found.chosen_length, found.rejected_length)

    def log_odds_ratio(found: CompletionLogprobs) -> Array:
        chosen, rejected = _averages(found)
        return log_odds(chosen) - log_odds(rejected)

    return PreferenceLoss(
        pairs,
        lambda found: tuple(beta * one for one in _averages(found)),
        reference=False,
        likelihood=1.0,
        likelihood_rule="token_mean",
        measures={"odds/log_ratio": log_odds_ratio},
    )


PREFERENCE_LOSSES: Mapping[str, Callable[..., PreferenceLoss]] = MappingProxyType({
    "dpo": _dpo,
    "robust": _robust,
    "ipo": _ipo,
    "hinge": _hinge,
    "rpo": _rpo,
    "chi_po": _chi_po,
    "simpo": _simpo,
    "orpo": _orpo,
})  # fmt: skip
"""Losses by name, each a function of its options.

| name     | options                   | source                                                                        |
|----------|---------------------------|-------------------------------------------------------------------------------|
| `dpo`    | `beta`, `label_smoothing` | Rafailov et al. 2023 (arXiv:2305.18290); smoothed: cDPO, Mitchell 2023        |
| `robust` | `beta`, `flip_rate`       | Chowdhury et al. 2024 (arXiv:2403.00409)                                      |
| `ipo`    | `beta`, `length_norm`     | Azar et al. 2023 (arXiv:2310.12036); `beta` is its tau                        |
| `hinge`  | `beta`                    | SLiC, Zhao et al. 2023 (arXiv:2305.10425)                                     |
| `rpo`    | `beta`, `nll_weight`      | DPO + `nll_weight` (alpha) times the NLL of the chosen over its length,       |
|          |                           | Pang et al. 2024 (arXiv:2404.19733); Liu et al. 2024 (arXiv:2405.16436) do    |
|          |                           | not divide by the length                                                      |
| `chi_po` | `beta`, `reward_bound`    | Huang et al. 2024 (arXiv:2407.13399)                                          |
| `simpo`  | `beta`, `gamma`           | Meng et al. 2024 (arXiv:2405.14734); no reference                             |
| `orpo`   | `beta`                    | Hong et al. 2024 (arXiv:2403.07691); `beta` is its lambda; no reference       |
"""


def preference_loss(name: str, **options: Any) -> PreferenceLoss:
    """A loss of the table.

    Args:
        name: one of `PREFERENCE_LOSSES`.
        options: those of the loss; what is left out is as the table has it.

    Raises:
        ValueError: no such loss, an option that it does not read, or a value out of its range.

    Example:
        >>> preference_loss("simpo", gamma=0.5).reference
        False
        >>> preference_loss("ipo", gamma=0.5)
        Traceback (most recent call last):
            ...
        ValueError: the loss ipo does not read gamma, only beta, length_norm: leave it out, or choose simpo.
    """
    if name not in PREFERENCE_LOSSES:
        raise ValueError(f"no loss {name!r}: choose one of {', '.join(PREFERENCE_LOSSES)}.")
    check_read(name, options, {name: options_of(make) for name, make in PREFERENCE_LOSSES.items()})
    loss = PREFERENCE_LOSSES[name](**options)
    # A pair of nothing: what is out of range is refused here and not with the first batch.
    number, count = jnp.zeros(1), jnp.ones(1, jnp.int32)
    nothing = CompletionLogprobs(
        chosen=number,
        rejected=number,
        chosen_length=count,
        rejected_length=count,
        reference_chosen=number,
        reference_rejected=number,
    )
    jax.eval_shape(loss.pairs, nothing)
    return loss


def options_of(make: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's arguments.

    Example:
        >>> options_of(PREFERENCE_LOSSES["simpo"])
        ('beta', 'gamma')
    """
    return tuple(inspect.signature(make).parameters)


def check_read(name: str, options: Mapping[str, Any], readers: Mapping[str, tuple[str, ...]]) -> None:
    """Refuses options that a loss would pass over.

    Args:
        name: the loss.
        options: options that are given.
        readers: which options each loss reads.

    Raises:
        ValueError: it does not read one; the sentence says which losses do.
    """
    for option in options:
        if option not in readers[name]:
            others = [other for other, read in readers.items() if option in read]
            remedy = f"leave it out, or choose {' or '.join(others)}" if others else "leave it out"
            known = ", ".join(readers[name])
            raise ValueError(f"the loss {name} does not read {option}, only {known}: {remedy}.")
