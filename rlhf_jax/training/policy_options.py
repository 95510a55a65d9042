"""The options that scripts share which train a policy on its own responses, and what is refused among them."""

import dataclasses
from typing import Any, Literal

from rlhf_jax.losses.kl import KLController, adaptive_kl, fixed_kl
from rlhf_jax.models.quantised import Storage
from rlhf_jax.rewards.members import rule_state
from rlhf_jax.training.adversarial import AdversarialOptions, check_adversarial, check_not_adversarial
from rlhf_jax.training.options import TrainingOptions, check_options
from rlhf_jax.training.reward_models import COMPARING, PolicyRule, check_rule, names_function
from rlhf_jax.training.session import check_run


@dataclasses.dataclass(frozen=True)
class PolicyOptions(TrainingOptions, AdversarialOptions):
    """Options of every script that trains a policy on its own responses.

    Attributes:
        reward: Hugging Face folders of reward models with the vocabulary of the policy, or one function, named
            module:function. A folder may be of any kind that experiments/reward_model.py writes.
        rule: what becomes of the scores of several reward models, or of the members of one that has some: their mean,
            their minimum, their mean less a penalty for their variance or standard deviation (which one model without
            members may know by itself, such as a posterior), or the score of the first alone. For one reward model
            there are "advpo", its score under the head that is worst for the policy in the confidence ellipsoid of the
            trained one, and "par", the probability that a response is preferred to reference responses to its prompt.
        penalty: coefficient of that penalty; None: 0.5 (uncertainty_weighted) or 1 (lower_confidence_bound).
        reference_samples: responses of the initial policy whose mean score each reward model counts from.
        reference_responses: for advpo and par, responses of the initial policy that are drawn for each prompt to
            compare with; None: the answer that a row brings along, or one that is drawn where there is none.
        batch_size: prompts an update.
        epochs: passes over the prompts.
        response_length: most tokens of a response.
        temperature: of the draws, above 0.
        kl: coefficient of the KL from the initial policy, units of reward (in the loss: of advantage) a nat; where it
            begins, with --target-kl.
        kl_in: the KL is subtracted from the reward of each token, or is a term of the loss; None: as the algorithm does
            it.
        kl_estimate: how it is estimated there; None: as the algorithm does it.
        target_kl: KL in nats a response that the coefficient is steered towards; None: it stays what it is.
        kl_horizon: for --target-kl: responses over which the coefficient follows, at least those of an update.
        dual_clip: above 1: where the advantage is negative, the loss of a token is at most this many times its size;
            None: no bound.
        missing_eos_penalty: subtracted from the reward of a response that did not end by itself.
        passes: passes over the responses of an update.
        minibatches: optimiser steps a pass.
        offload_reference: on a mesh, keep the reference policy in the memory of the hosts while it is not used.
        slots: responses that are drawn at a time, where some are much longer than others: one that has ended makes room
            for the next; None: all at once.
        cache: how keys and values are kept while drawing.
        weights: how the policy's matrices are kept while drawing. Fewer bits are faster, and the policy that draws is
            then a little off the one that is trained: see --old-logprob.
        old_logprob: the log-probabilities that ratios are taken to: those of the draws ("rollout"), those of a forward
            pass before the first step ("recomputed"), or these with the loss of each token weighted by how much
            likelier the policy finds it than what drew it ("truncated"). "auto" compares the first two before training,
            and takes those of the draws unless they are off by more than --logprob-bound.
        logprob_bound: nats that the log-probability of any token drawn may be off. At 0.02 the first ratios are within
            2 % of 1, a tenth of a clip of 0.2.
        importance_cap: the largest weight of a token, for --old-logprob truncated.
        length_buckets: lengths that responses are cut to for an update, as far as they are all shorter: the same
            numbers without much of the padding, and so many times the time to compile.
    """

    learning_rate: float = 1e-5
    most_held_out: int = 128
    reward: tuple[str, ...] = ()
    rule: PolicyRule = "mean"
    penalty: float | None = None
    reference_samples: int = 256
    reference_responses: int | None = None
    response_length: int = 64
    temperature: float = 1.0
    kl: float = 0.05
    kl_in: Literal["reward", "loss"] | None = None
    kl_estimate: Literal["k1", "k2", "k3"] | None = None
    target_kl: float | None = None
    kl_horizon: int = 10_000
    dual_clip: float | None = None
    missing_eos_penalty: float = 0.0
    passes: int = 1
    minibatches: int = 1
    offload_reference: bool = False
    slots: int | None = None
    cache: Storage = "computation"
    weights: Storage = "computation"
    old_logprob: Literal["auto", "rollout", "recomputed", "truncated"] = "auto"
    logprob_bound: float = 0.02
    importance_cap: float = 2.0
    length_buckets: int = 1

    @property
    def draws_as_trained(self) -> bool:
        """Whether the policy draws with the numbers that it is trained with."""
        return self.cache == self.weights == "computation"


def check_policy_run(options: PolicyOptions, name: str) -> None:
    """Refuses what cannot work, before a model or data are read.

    Args:
        options: the options.
        name: the name of the experiment.

    Raises:
        ValueError: the sentence names the option.
    """
    values = vars(options)
    counts = ("reference_samples", "reference_responses", "passes", "minibatches", "slots", "length_buckets")
    least = dict.fromkeys(counts, 1) | {"kl": 0, "missing_eos_penalty": 0}
    for option, bound in least.items():
        if values[option] is not None and not values[option] >= bound:
            raise ValueError(f"--{option.replace('_', '-')} is {values[option]}: give {bound} or more.")
    for option in ("temperature", "target_kl", "kl_horizon", "logprob_bound", "importance_cap"):
        if values[option] is not None and not values[option] > 0:
            raise ValueError(f"--{option.replace('_', '-')} is {values[option]}: give more than 0.")
    if options.dual_clip is not None and not options.dual_clip > 1:
        raise ValueError(f"--dual-clip is {options.dual_clip}: give more than 1.")
    if options.old_logprob != "truncated" and options.importance_cap != PolicyOptions.importance_cap:
        raise ValueError("--importance-cap is for --old-logprob truncated: give that too, or leave it out.")
    if options.old_logprob in ("recomputed", "truncated") and options.logprob_bound != PolicyOptions.logprob_bound:
        raise ValueError("--logprob-bound is for --old-logprob auto and rollout: leave it out.")
    check_run(options, name)
    check_options(options, ("reward",))
    check_controller(options)
    parts = options.minibatches * options.accumulate
    if options.rows % parts:
        raise ValueError(
            f"--batch-size {options.batch_size} makes {options.rows} responses an update, which do not split into "
            f"--minibatches {options.minibatches} x --accumulate {options.accumulate}: choose divisors."
        )
    check_rewards_named(options)


def check_controller(options: PolicyOptions) -> None:
    """Refuses a target of the KL that cannot be steered towards, and a horizon that nothing reads.

    Raises:
        ValueError: the sentence names the option.
    """
    if options.target_kl is None:
        if options.kl_horizon != PolicyOptions.kl_horizon:
            raise ValueError("--kl-horizon is for --target-kl: give that too, or leave it out.")
        return
    if options.kl == 0:
        raise ValueError("--target-kl multiplies the coefficient, and --kl 0 stays 0: give --kl more than 0.")
    if options.kl_horizon < options.rows:
        raise ValueError(
            f"--kl-horizon is {options.kl_horizon}: give at least the {options.rows} responses of an update, "
            "so that the coefficient stays above 0."
        )


def check_rewards_named(options: PolicyOptions) -> None:
    """Refuses a rule, and options of rules, that do not go with the rewards.

    Raises:
        ValueError: the sentence names the option.
    """
    rule, comparing = options.rule, options.rule in COMPARING
    functions = [name for name in options.reward if names_function([name])]
    if functions and len(options.reward) > 1:
        raise ValueError(f"--reward {functions[0]} is a function, which stands alone: name one that calls the others.")
    if rule != "advpo":
        check_not_adversarial(options, rule)
    if not comparing and options.reference_responses is not None:
        raise ValueError(f"--rule {rule} does not use --reference-responses: leave it out, or choose advpo or par.")
    if comparing and options.penalty is not None:
        raise ValueError(f"--rule {rule} does not use --penalty: leave it out.")
    if names_function(options.reward) and (rule != "mean" or options.penalty is not None):
        raise ValueError(
            f"--rule {rule} and --penalty are for reward models, and --reward {options.reward[0]} is a function: "
            "leave them out, or give the folder of a reward model."
        )
    if rule == "advpo":
        check_adversarial(options)
    if comparing and len(options.reward) != 1:
        raise ValueError(f"--rule {rule} is for one reward model, and --reward names {len(options.reward)}: give one.")
    if not comparing:
        rule_state(rule, options.penalty)
    check_rule(rule, options.reward)


def kl_of(options: PolicyOptions) -> KLController:
    """The controller of the KL's coefficient that the options ask for."""
    if options.target_kl is None:
        return fixed_kl(options.kl)
    return adaptive_kl(options.kl, options.target_kl, options.kl_horizon)


def given(options: PolicyOptions, *names: str) -> dict[str, Any]:
    """Those of the options that are not None, by name: None leaves the choice to the algorithm.

    Example:
        >>> given(PolicyOptions(kl_in="loss"), "kl_in", "kl_estimate")
        {'kl_in': 'loss'}
    """
    return {name: vars(options)[name] for name in names if vars(options)[name] is not None}
