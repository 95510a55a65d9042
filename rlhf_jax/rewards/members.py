"""Reward models, one or several, as one scorer; and the rules that make one reward of their scores.

A reward model is of any kind that has a scorer: one linear head, many heads, a posterior. Several may differ in shape
and kind: each has its own trunk, so they are not stacked (`bradley_terry.ensemble_scorer` does that, for members of one
shape). They read the tokens that the policy wrote, so all must know its vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.partitioning import constrain
from rlhf_jax.rewards.bradley_terry import check_rewards, member_score, reward_scorer
from rlhf_jax.rewards.ensemble import (
    ensemble_mean,
    lower_confidence_bound,
    member_offset,
    single,
    uncertainty_weighted,
    worst_case,
)
from rlhf_jax.types import Params, Rollout, Score, Transform

Rule = Literal["mean", "worst_case", "uncertainty_weighted", "lower_confidence_bound", "single"]

RULES: Mapping[str, Transform] = MappingProxyType(
    {
        "mean": ensemble_mean(),
        "worst_case": worst_case(),
        "uncertainty_weighted": uncertainty_weighted(),
        "lower_confidence_bound": lower_confidence_bound(),
        "single": single(),
    }
)
PENALISED = ("uncertainty_weighted", "lower_confidence_bound")


class Member(NamedTuple):
    """A reward model.

    Attributes:
        config: shape of its trunk.
        params: what its scorer reads; of one linear head the tree `{"trunk", "head"}`.
        scorer: `score(params, tokens, mask) -> Score`; None: that of one linear head.
    """

    config: ModelConfig
    params: Params
    scorer: Callable[..., Score] | None = None

    def score(self, params: Params, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        """The Score of sequences, with parameters of this model's shape."""
        return (self.scorer or reward_scorer(self.config))(params, tokens, mask)


@chex.dataclass(frozen=True)
class MemberParams:
    """Parameters of M reward models, and the constant to subtract from the scores of each.

    Attributes:
        trees: the parameters of each.
        offset: see `ensemble.member_offset`, float32 [M].
    """

    trees: tuple[Params, ...]
    offset: Float[Array, " M"]


def members_scorer(members: Sequence[Member]):
    """A scorer of M reward models: `score(MemberParams, tokens, mask) -> Score`, centred by their offsets.

    The Score of one is its own, whatever kind it is of. Of several, `members` are their means, and `mean`, `features`
    and `aleatoric` are those of the first: the rules `single` and AdvPO use it alone, and the others then say how far
    they disagree with it.

    Args:
        members: the reward models, in the order of `MemberParams.trees`; their own parameters are not read.
    """

    def score(params: MemberParams, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        pairs = zip(members, params.trees, strict=True)
        first, *others = (member.score(tree, tokens, mask) for member, tree in pairs)
        if not others:
            return first.replace(mean=first.mean - params.offset[0])
        means = jnp.stack([one.mean for one in (first, *others)])
        found = member_score(means, None, params.offset, lead=0)
        return found.replace(features=first.features, aleatoric=first.aleatoric)

    return score


def centred(members: Sequence[Member], reference: Sequence[tuple[list[int], Rollout]]) -> MemberParams:
    """The parameters of reward models whose zero is their mean score on reference responses.

    Of one that is an ensemble itself, each member's zero is put there too.

    Args:
        members: one reward model or several.
        reference: batches of responses of the initial policy, each with the places of its prompts, as
            `sampling.batches.generate_batches` gives them. A place that comes again filled up a batch and counts once.

    Raises:
        ValueError: a member's score of a reference response is not finite.
    """
    _, first = np.unique(np.concatenate([places for places, _ in reference]), return_index=True)

    def over_reference(member: Member, params: Params, what: str) -> Float[np.ndarray, "M N"] | None:
        @jax.jit
        def scores_of(params: Params, taken: Rollout) -> Float[Array, "M B"] | None:
            found = getattr(member.score(params, taken.sequences.tokens, taken.sequences.mask), what)
            return None if found is None else constrain(jnp.atleast_2d(found), None, None)  # whole on every process

        parts = [scores_of(params, taken) for _, taken in reference]
        return None if parts[0] is None else np.concatenate(parts, axis=1)[:, np.sort(first)]

    trees, offsets = [], []
    for number, member in enumerate(members):
        params, inner = member.params, None
        if len(members) == 1:
            inner = over_reference(member, params, "members")
        if inner is not None:
            check_rewards(inner, "the reward model")
            params = params.replace(offset=params.offset + member_offset(jnp.asarray(inner)))
        scores = over_reference(member, params, "mean")
        check_rewards(scores[0], f"reward model {number} (counting from 0)")
        trees.append(params)
        offsets.append(member_offset(jnp.asarray(scores))[0])
    return MemberParams(trees=tuple(trees), offset=jnp.stack(offsets))


def rule_state(rule: Rule, coefficient: float | None = None) -> Any:
    """The state that the rule's transform begins with.

    Args:
        rule: a name of `RULES`.
        coefficient: of the penalty, for the rules in `PENALISED`; None: the default of the rule.

    Raises:
        ValueError: a coefficient for a rule without one.
    """
    if coefficient is None:
        return RULES[rule].init()
    if rule not in PENALISED:
        raise ValueError(f"the rule {rule} has no coefficient: leave it out, or choose {' or '.join(PENALISED)}.")
    return RULES[rule].init(coefficient)
