"""Reward models from folders, one or several, as one scorer; and the rules that make one reward of their scores.

Members may differ in shape: each has its own trunk, so they are not stacked (`bradley_terry.ensemble_scorer` does that,
for members of one shape). They read the tokens that the policy wrote, so all must know its vocabulary.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.huggingface import Placement, load_config, load_reward_model, load_tokenizer
from rlhf_jax.models.partitioning import constrain
from rlhf_jax.rewards.bradley_terry import check_rewards, reward_scorer
from rlhf_jax.rewards.ensemble import (
    centre,
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
    """A reward model: its shape and its tree `{"trunk", "head"}`."""

    config: ModelConfig
    params: Params


@chex.dataclass(frozen=True)
class MemberParams:
    """Parameters of M reward models, and the constant to subtract from the scores of each.

    Attributes:
        trees: one tree `{"trunk", "head"}` a member.
        offset: see `ensemble.member_offset`, float32 [M].
    """

    trees: tuple[Params, ...]
    offset: Float[Array, " M"]


def members_scorer(configs: Sequence[ModelConfig]):
    """A scorer of M reward models: `score(MemberParams, tokens, mask) -> Score(mean, features, members)`.

    `members` are centred by their offsets. `mean` and `features` are those of the first member: the rules `single` and
    AdvPO use it alone, and the others then say how far they disagree with it.

    Args:
        configs: shape of each member, in the order of `MemberParams.trees`.
    """
    scorers = [reward_scorer(config) for config in configs]

    def score(params: MemberParams, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        pairs = zip(scorers, params.trees, strict=True)
        each = [scorer(tree, tokens, mask) for scorer, tree in pairs]
        members = centre(jnp.stack([one.mean for one in each]), params.offset)
        return Score(mean=members[0], features=each[0].features, members=members)

    return score


def centred(members: Sequence[Member], reference: Sequence[tuple[list[int], Rollout]]) -> MemberParams:
    """The parameters of reward models whose zero is their mean score on reference responses.

    Args:
        members: one reward model or several.
        reference: batches of responses of the initial policy, each with the places of its prompts, as
            `sampling.batches.generate_batches` gives them. A place that comes again filled up a batch and counts once.

    Raises:
        ValueError: a member's score of a reference response is not finite.
    """
    scorer = members_scorer([member.config for member in members])

    @jax.jit
    def scores_of(params: MemberParams, taken: Rollout) -> Float[Array, "M B"]:
        members = scorer(params, taken.sequences.tokens, taken.sequences.mask).members
        return constrain(members, None, None)  # whole on every process

    trees = tuple(member.params for member in members)
    raw = MemberParams(trees=trees, offset=jnp.zeros(len(trees), jnp.float32))
    scores = np.concatenate([scores_of(raw, taken) for _, taken in reference], axis=1)
    for number, values in enumerate(scores):
        check_rewards(values, f"reward model {number} (counting from 0)")
    _, first = np.unique(np.concatenate([places for places, _ in reference]), return_index=True)
    return raw.replace(offset=member_offset(jnp.asarray(scores[:, np.sort(first)])))


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


def check_rule(rule: Rule, members: int) -> None:
    """Raises ValueError where a rule needs several reward models and there is one."""
    if rule in PENALISED and members < 2:
        raise ValueError(f"the rule {rule} needs at least 2 reward models, not {members}: give more, or choose single.")


def load_members(
    folders: Sequence[str], policy: ModelConfig, tokenizer: Any, longest: int, placement: Placement | None = None
) -> list[Member]:
    """Reward models from their Hugging Face folders; all are checked before the first one is read.

    Args:
        folders: the folders, or hub ids.
        policy: shape of the policy whose tokens they are to read; they have its dtypes and its kind of attention.
        tokenizer: of the policy.
        longest: most tokens of a prompt and its response.
        placement: where their parameters lie, see `huggingface.load_policy`.

    Raises:
        ValueError: see `check_member` and `load_reward_model`.
    """
    for folder in folders:
        check_member(folder, policy, tokenizer, longest)
    members = [load_reward_model(folder, policy.dtype, policy.param_dtype, placement) for folder in folders]
    how = dict(attention=policy.attention, attention_block=policy.attention_block)
    return [Member(dataclasses.replace(config, **how), params) for config, params in members]


def check_member(folder: str, policy: ModelConfig, tokenizer: Any, longest: int) -> None:
    """Refuses a reward model that cannot read what a policy writes; reads no parameters.

    Args:
        folder: Hugging Face folder of the reward model.
        policy: shape of the policy.
        tokenizer: of the policy.
        longest: most tokens of a prompt and its response.

    Raises:
        ValueError: the vocabularies differ (tokens that only the reward model has are fine), or its context is too
            short.
    """
    config, known = load_config(folder), load_tokenizer(folder).get_vocab()
    other = [(token, id) for token, id in tokenizer.get_vocab().items() if known.get(token) != id]
    if other:
        token, id = min(other, key=lambda pair: pair[1])
        theirs = known.get(token, "no id")
        raise ValueError(
            f"the reward model {folder} has another vocabulary than the policy ({len(other)} tokens differ: {token!r} "
            f"is {id} for the policy and {theirs} for the reward model): give one with the tokenizer of the policy."
        )
    if config.vocab_size < policy.vocab_size:
        raise ValueError(
            f"the reward model {folder} knows {config.vocab_size} tokens and the policy {policy.vocab_size}: "
            "give one with a vocabulary as large."
        )
    if config.context_length < longest:
        raise ValueError(
            f"the reward model {folder} reads at most {config.context_length} tokens, fewer than the {longest} of "
            "prompt and response: lower --response-length or --longest."
        )
