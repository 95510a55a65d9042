"""A reward as a command line names it: folders of reward models of any kind, or one Python function."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.huggingface import Placement, load_config, load_reward_model
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.members import PENALISED, Member, Rule, rule_state
from rlhf_jax.rewards.python_reward import RewardFunction, load_reward_function
from rlhf_jax.training.reward_folders import kind_in, load_reward_folder, options_in, other_tokens, scorer_in
from rlhf_jax.training.reward_kinds import EPISTEMIC, LINEAR, WITH_MEMBERS, has_members, is_linear

PolicyRule = Rule | Literal["advpo", "par"]
"""What may become of scores before a policy is trained on them."""

COMPARING = ("advpo", "par")
"""Rules that compare a response with reference responses to its prompt; they are for one reward model."""


def names_function(names: Sequence[str]) -> bool:
    """Whether a reward is a Python function, named `module:function`, and no folder.

    Example:
        >>> names_function(["my_rewards:length"]), names_function(["a", "b"])
        (True, False)
    """
    return len(names) == 1 and ":" in names[0] and not Path(names[0]).exists()


def check_rule(rule: PolicyRule, folders: Sequence[str]) -> None:
    """Refuses a rule that these reward models cannot serve; reads no parameters.

    A penalty needs several of them, or one whose kind says how unsure it is; the worst case needs several, or one that
    has members; AdvPO needs one whose mean is a linear head.

    Args:
        rule: what becomes of the scores.
        folders: the folders, or hub ids.

    Raises:
        ValueError: there is no such folder, or the sentence names the rule, the kind and the remedy.
    """
    if len(folders) > 1 or rule in ("mean", "single", "par"):
        return
    kind, options = kind_in(folders[0]), options_in(folders[0])
    if rule == "advpo":
        if not is_linear(kind, options):
            raise ValueError(
                f"the rule advpo is for one linear head (of a kind among {', '.join(sorted(LINEAR))}), which the mean "
                f"of {folders[0]}, of kind {kind}, is not: give another model, or choose a penalty."
            )
        return
    able = EPISTEMIC if rule in PENALISED else WITH_MEMBERS
    if rule == "worst_case" and kind in able and not has_members(kind, options):
        raise ValueError(
            f"the rule worst_case needs members, and {folders[0]} gives the statistic {options['statistic']} of its "
            "members instead: choose a penalty, or save it with the statistic deviation."
        )
    if kind not in able:
        raise ValueError(
            f"the rule {rule} needs at least 2 reward models, or one of a kind among {', '.join(sorted(able))}; "
            f"{folders[0]} is one of kind {kind}: give more, or choose single."
        )


def check_no_prompt_gate(folder: str) -> None:
    """Refuses a reward model whose gate reads one column as the end of every prompt; reads no parameters.

    Where prompts end in other columns it would read the state of another token, and nothing would show it.

    Raises:
        ValueError: the gate of the folder reads the prompt.
    """
    options = options_in(folder)
    if options.get("gate") == "prompt":
        raise ValueError(
            f"the gate of {folder} reads the prompt, which must end in column {options.get('prompt_length')} of a "
            "batch, and here prompts are of any length: give a model whose gate reads the response."
        )


def read_reward(
    names: Sequence[str],
    rule: PolicyRule,
    penalty: float | None,
    policy: ModelConfig,
    tokenizer: Any,
    longest: int,
    placement: Placement | None = None,
) -> RewardFunction | list[Member]:
    """The function, or the reward models, checked before the first of them is read.

    Args:
        names: folders (or hub ids) of reward models; or one function, as `module:function`.
        rule: what becomes of the scores; "advpo" reads the ordinary model of a folder alone.
        penalty: see `members.rule_state`.
        policy: shape of the policy whose tokens reward models are to read; they have its dtypes and its kind of
            attention.
        tokenizer: of the policy.
        longest: most tokens of a prompt and its response.
        placement: where the parameters of reward models lie, see `huggingface.load_policy`.

    Raises:
        ValueError: there is no such function or folder, a reward model does not fit the policy, or the rule does not
            fit the reward models.
    """
    if names_function(names):
        return load_reward_function(names[0])
    if rule not in COMPARING:
        rule_state(rule, penalty)
    check_rule(rule, names)
    return load_members(names, policy, tokenizer, longest, placement, ordinary=rule == "advpo")


def load_members(
    folders: Sequence[str],
    policy: ModelConfig,
    tokenizer: Any,
    longest: int,
    placement: Placement | None = None,
    ordinary: bool = False,
) -> list[Member]:
    """Reward models from their folders; all are checked before the first one is read.

    Args:
        folders: the folders, or hub ids.
        policy: shape of the policy whose tokens they are to read; they have its dtypes and its kind of attention.
        tokenizer: of the policy.
        longest: most tokens of a prompt and its response.
        placement: where their parameters lie, see `huggingface.load_policy`.
        ordinary: read the model with one linear head alone that every folder has.

    Raises:
        ValueError: see `check_member`, `check_no_prompt_gate` and `load_reward_folder`.
    """
    for folder in folders:
        check_member(folder, policy, tokenizer, longest)
        check_no_prompt_gate(folder)
    how = dict(attention=policy.attention, attention_block=policy.attention_block)
    dtypes = (policy.dtype, policy.param_dtype, placement)
    found = []
    for folder in folders:
        if ordinary:
            config, params = load_reward_model(folder, *dtypes)
            config = dataclasses.replace(config, **how)
            read_by_head = options_in(folder).get("features", "final_norm")
            found.append(Member(config, params, reward_scorer(config, read_by_head)))
        else:
            read = load_reward_folder(folder, *dtypes)
            config = dataclasses.replace(read.config, **how)
            found.append(Member(config, read.params, scorer_in(folder, config)))
    return found


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
    config, other = load_config(folder), other_tokens(tokenizer, folder, "for the policy", "for the reward model")
    if other is not None:
        raise ValueError(
            f"the reward model {folder} has another vocabulary than the policy ({other}): give one with the tokenizer "
            "of the policy."
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
