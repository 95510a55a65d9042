"""A reward as a command line names it: folders of reward models, or one Python function."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.huggingface import Placement
from rlhf_jax.rewards.members import Member, Rule, check_rule, load_members, rule_state
from rlhf_jax.rewards.python_reward import RewardFunction, load_reward_function


def names_function(names: Sequence[str]) -> bool:
    """Whether a reward is a Python function, named `module:function`, and no folder.

    Example:
        >>> names_function(["my_rewards:length"]), names_function(["a", "b"])
        (True, False)
    """
    return len(names) == 1 and ":" in names[0] and not Path(names[0]).exists()


def read_reward(
    names: Sequence[str],
    rule: Rule,
    penalty: float | None,
    policy: ModelConfig,
    tokenizer: Any,
    longest: int,
    placement: Placement | None = None,
) -> RewardFunction | list[Member]:
    """The function, or the reward models, checked before the first of them is read.

    Args:
        names: folders (or hub ids) of reward models; or one function, as `module:function`.
        rule: what becomes of the scores of several reward models.
        penalty: see `members.rule_state`.
        policy: shape of the policy whose tokens reward models are to read; they have its dtypes and its kind of
            attention.
        tokenizer: of the policy.
        longest: most tokens of a prompt and its response.
        placement: where the parameters of reward models lie, see `huggingface.load_policy`.

    Raises:
        ValueError: there is no such function or folder, a reward model does not fit the policy, or the rule does not
            fit the number of reward models.
    """
    if names_function(names):
        return load_reward_function(names[0])
    rule_state(rule, penalty)
    check_rule(rule, len(names))
    return load_members(names, policy, tokenizer, longest, placement)
