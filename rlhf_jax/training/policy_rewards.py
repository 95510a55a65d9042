"""The reward of a policy that is trained, from its name on the command line to a function or to compiled pieces."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from rlhf_jax.data.batches import pad_demonstrations
from rlhf_jax.data.tokenization import Demonstration, Preference
from rlhf_jax.parallel.meetings import over_processes
from rlhf_jax.rewards.members import RULES, Member, centred, members_scorer, rule_state
from rlhf_jax.rewards.par import par
from rlhf_jax.rewards.python_reward import RewardFunction
from rlhf_jax.sampling.batches import generate_batches
from rlhf_jax.training.adversarial import adversarial_rule, read_pairs
from rlhf_jax.training.policy_options import PolicyOptions
from rlhf_jax.training.policy_run import Task
from rlhf_jax.training.references import Draw, copies, reference_answers, reference_table
from rlhf_jax.training.reward_models import COMPARING, read_reward
from rlhf_jax.training.sources import collate_for, placement
from rlhf_jax.types import Params, Score, Transform


class Material(NamedTuple):
    """What a reward is made of, as far as it is read from files.

    Attributes:
        reward: the function, or the reward models.
        pairs: for AdvPO, the pairs that the reward model was trained on.
        answers: reference answers that rows bring along, by the place of their prompt.
    """

    reward: RewardFunction | list[Member]
    pairs: list[Preference]
    answers: dict[int, Demonstration]


class ModelReward(NamedTuple):
    """Reward models as the arguments of `algorithms.rewarded.model_reward`, in its order; see there."""

    scorer: Callable[[Params, Array, Array], Score]
    params: Params
    transform: Transform
    transform_state: Any
    references: Score | None = None
    each: int = 1


def read_material(options: PolicyOptions, task: Task) -> Material:
    """Reads reward models (or the function), pairs and answers; what does not fit the policy is refused here.

    Raises:
        ValueError: see `read_reward`, `read_pairs` and `reference_answers`.
    """
    source, comparing = task.source, options.rule in COMPARING
    shape = (source.config, source.tokenizer, task.longest, placement())
    reward = read_reward(options.reward, options.rule, options.penalty, *shape)
    pairs, answers = [], {}
    if options.rule == "advpo":
        longest = min(source.longest, reward[0].config.context_length)
        pairs = read_pairs(options, source, options.preferences, longest)
    if comparing and options.reference_responses is None:
        answers = reference_answers(source, task.data.train, options.data, options.response_length)
    return Material(reward, pairs, answers)


def make_reward(
    options: PolicyOptions, task: Task, material: Material, policy: Params, key: Array
) -> RewardFunction | ModelReward:
    """The function, which each process calls for its rows; or reward models, with what they and their rule begin with.

    Args:
        options: the options.
        task: what is trained on.
        material: from `read_material`.
        policy: the initial policy, whose responses reward models count from and are compared with.
        key: of those responses.

    Raises:
        ValueError: a reward model gives a score that is not finite; see `adversarial_rule`.
    """
    source, members, items = task.source, material.reward, task.data.train
    if callable(members):
        return over_processes(members)

    def draw(items):
        prompts, size = (lambda rows: task.collate(rows).prompts), options.batch_size
        return generate_batches(source.config, policy, items, prompts, size, key, task.sampling)

    params = centred(members, list(draw(items[: options.reference_samples])))
    scorer = members_scorer(members)
    if options.rule not in COMPARING:
        return ModelReward(scorer, params, RULES[options.rule], rule_state(options.rule, options.penalty))
    each = options.reference_responses or 1
    table = references(options, task, material.answers, draw, partial(jax.jit(scorer), params), each)
    if options.rule == "advpo":
        rule = adversarial_rule(options, source, members[0], material.pairs)
    else:
        rule = par(), ()
    return ModelReward(scorer, params, *rule, table, each)


def references(
    options: PolicyOptions,
    task: Task,
    answers: dict[int, Demonstration],
    draw: Draw,
    score: Callable[[Array, Array], Score],
    each: int,
) -> Score:
    """The Score of `each` reference responses to every prompt, see `reference_table`."""
    items = copies(task.data.train, each)
    collate = collate_for(pad_demonstrations, task.source, list(answers.values())) if answers else None
    return reference_table(items, answers, collate, draw, score, options.batch_size)
