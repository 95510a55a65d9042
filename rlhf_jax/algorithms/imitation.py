"""Imitation of good samples: VAR, RAFT, SuperHF and best-of-n distillation, with one loss and no value net.

The life of a batch: `rollout` samples K responses to each prompt, from the policy or from its reference. `update` gets
one reward a response (or one a token), keeps the best rows of each group, weighs them, and raises their weighted
likelihood in epochs x minibatches of steps. Only kept rows go through the steps. SuperHF also holds the policy to its
prior, token by token and over the whole vocabulary.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rlhf_jax.algorithms.on_policy import Pieces, PolicyState, begin_with_policy, in_parts, on_policy
from rlhf_jax.algorithms.on_policy_options import OnPolicyConfig
from rlhf_jax.algorithms.rollouts import (
    predicting_states,
    rollout_metrics,
    scores_by_token,
    step_metrics,
    taken_scores,
)
from rlhf_jax.algorithms.trained import assemble
from rlhf_jax.losses.imitation import (
    effective_samples,
    equal_weights,
    importance_log_ratio,
    top_rows,
    var_weights,
    weighted_likelihood_loss,
)
from rlhf_jax.losses.kl import KLController
from rlhf_jax.losses.policy import token_log_ratio
from rlhf_jax.losses.reduce import mean
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.divergence import token_forward_kl
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import Algorithm, Metrics, Params, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class Imitation:
    """What is imitated, and how much.

    Attributes:
        proposal: what responses are drawn from: the "policy" as it is trained, or its frozen "reference".
        keep: how many of the K responses to a prompt are trained on, those of the highest reward; None: all.
        keep_scope: they are the best of each "group", or as many of the whole "batch", see `losses.imitation.top_rows`.
        weights: `(rewards [B], samples, log_ratio=[B]) -> [B]`, the weights of the kept rows, which sum to 1 over those
            of a prompt; log_ratio is log reference - log policy of each, None for the proposal "reference". See
            `losses.imitation`.
        reduction: how the losses of tokens are averaged, a name of `losses.reduce` that needs no constant.
        prior_kl: the loss has a term KL(reference || policy), whose coefficient is the KL controller's.

    Raises:
        ValueError: a choice that does not exist, weights by group for rows that are not kept by group, or a prior for
            samples of the reference.
    """

    proposal: Literal["policy", "reference"]
    keep: int | None = None
    keep_scope: Literal["group", "batch"] = "group"
    weights: Callable[..., Array] = equal_weights
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    prior_kl: bool = False

    def __post_init__(self):
        for name, known in (
            ("proposal", ("policy", "reference")),
            ("keep_scope", ("group", "batch")),
            ("reduction", ("token_mean", "sequence_mean", "sequence_sum")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {', '.join(known[:-1])} or {known[-1]}.")
        if self.keep_scope == "batch" and self.weights is not equal_weights:
            raise ValueError("the best of a batch stand in no groups, which these weights need: choose equal_weights.")
        if self.prior_kl and self.proposal == "reference":
            raise ValueError("prior_kl is measured on the policy's own samples: set proposal to policy.")


IMITATION = {
    "var": Imitation("reference", weights=partial(var_weights, temperature=0.5), reduction="sequence_sum"),
    "var_online": Imitation("policy", weights=partial(var_weights, temperature=0.5), reduction="sequence_sum"),
    "raft": Imitation("policy", keep=1),
    "superhf": Imitation("policy", keep=1, reduction="sequence_mean", prior_kl=True),
    "best_of_n_distillation": Imitation("reference", keep=1),
}
"""Kinds of imitation by name.

| name                     | source                                                                               |
|--------------------------|--------------------------------------------------------------------------------------|
| `var`                    | arXiv:2502.11026; its temperature lambda is 0.5 reward units a nat, see `imitating`  |
| `var_online`             | the same target from samples of the policy, by importance weights                    |
| `raft`                   | Dong et al. 2023 (arXiv:2304.06767)                                                  |
| `superhf`                | Mukobi et al. 2023 (arXiv:2310.16763), who take a KL coefficient of 0.23 and K = 32  |
| `best_of_n_distillation` | supervised fine-tuning on the best of K samples of the reference                     |
"""


def imitating(name: str, temperature: float | None = None, **changes: Any) -> Imitation:
    """A kind of imitation from the table, with some of it changed.

    Args:
        name: one of `IMITATION`.
        temperature: lambda of VAR's weights, reward units a nat; None: as in the table.
        changes: attributes of `Imitation`.

    Raises:
        ValueError: no such name, a temperature that is not positive, or one for weights that have none or are given.

    Example:
        >>> imitating("raft", keep=2).keep
        2
        >>> imitating("rafd")
        Traceback (most recent call last):
            ...
        ValueError: no imitation 'rafd': choose one of var, var_online, raft, superhf, best_of_n_distillation.
    """
    if name not in IMITATION:
        raise ValueError(f"no imitation {name!r}: choose one of {', '.join(IMITATION)}.")
    found = IMITATION[name]
    if temperature is not None:
        if found.weights is equal_weights:
            raise ValueError(f"the weights of {name} have no temperature: leave it out, or choose var.")
        if not temperature > 0:
            raise ValueError(f"the temperature of {name} is {temperature!r}; it must be positive.")
        if "weights" in changes:
            raise ValueError("a temperature makes var_weights of itself: give it, or weights, not both.")
        changes["weights"] = partial(var_weights, temperature=temperature)
    return dataclasses.replace(found, **changes)


@dataclasses.dataclass(frozen=True)
class ImitationConfig(OnPolicyConfig):
    """Options of imitation, beside those of `OnPolicyConfig`.

    Attributes:
        method: what is imitated, see `IMITATION`.
        samples: K, responses that are sampled a prompt, at least 2.
        missing_eos_penalty: subtracted from the reward of a response that did not end by itself.

    Raises:
        ValueError: an option is out of range, or the rewards would decide nothing.
    """

    method: Imitation = IMITATION["var"]
    samples: int = 8
    missing_eos_penalty: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.old_logprob != "rollout" and self.method.proposal == "reference":
            raise ValueError(
                f"old_logprob {self.old_logprob!r} is that of the policy, and the reference draws here: choose rollout."
            )
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}: give 2 or more, for the responses to a prompt are compared.")
        if not 1 <= self.keep <= self.samples:
            raise ValueError(f"keep is {self.keep}: give 1 to {self.samples}, the samples a prompt.")
        if self.keep == self.samples and self.method.weights is equal_weights:
            raise ValueError(
                f"all {self.samples} responses are kept and weigh the same, so that rewards decide nothing: "
                "keep fewer, or weigh them with var_weights."
            )

    @property
    def keep(self) -> int:
        """Responses a prompt that are trained on."""
        return self.samples if self.method.keep is None else self.method.keep


@chex.dataclass(frozen=True)
class Imitated:
    """The kept rows of a rollout, and what is fixed about them before the first minibatch.

    Attributes:
        rollout: the kept responses.
        weights: of the responses, 1 for a prompt in all, [B].
        reference_states: the reference's hidden states that predict the responses, [B, T, D]; None without prior.
    """

    rollout: Rollout
    weights: Float[Array, " B"]
    reference_states: Float[Array, "B T D"] | None


@chex.dataclass(frozen=True)
class Found:
    """What the policy says of the tokens taken, nats, [B, T]; `divergence` is KL(reference || policy) or None."""

    logprob: Float[Array, "B T"]
    entropies: Float[Array, "B T"]
    divergence: Float[Array, "B T"] | None


def imitation(
    config: ModelConfig,
    options: ImitationConfig,
    optimizer: optax.GradientTransformation,
    kl: KLController | None = None,
    adapter: AdapterConfig | None = None,
) -> Algorithm:
    """Imitation of good samples as an `Algorithm`.

    `init(key, params)` takes `{"policy": tree, "reference"?: tree}` or None for a fresh policy; the reference is the
    policy at the start if not given. `rollout(state, prompts)` gives `options.samples` responses a prompt, in groups;
    `update(state, rollout, rewards)` takes one reward a response or one a token.

    The metrics of ratios compare the policy with what the responses were drawn from. Where that is the reference,
    `policy/approxkl` so estimates KL(reference || policy) in nats a token, and `objective/kl` and `objective/entropy`,
    which need samples of the policy, are left out.

    Args:
        config: shape of the policy.
        options: see `ImitationConfig`.
        optimizer: an optax optimiser of what is trained.
        kl: controller of the coefficient of the divergence from the prior, in nats of likelihood a nat; for methods
            with `prior_kl`, and only for these.
        adapter: train this adapter on the policy, which stays as it is and is the reference; None: train the policy.

    Raises:
        ValueError: a prior without a KL controller, or the other way round.
    """
    chosen, temperature = options.method, options.sampling.logprob_temperature
    if chosen.prior_kl and kl is None:
        raise ValueError("this method holds the policy to its prior: give kl, the coefficient (fixed_kl(0.23), say).")
    if kl is not None and not chosen.prior_kl:
        raise ValueError("this method has no KL in its loss: leave out kl, or set prior_kl (as superhf does).")
    no_clip = (float("inf"), float("inf"))

    def policy(params: Params, reference: Params) -> Params:
        return assemble(reference, params, adapter)

    def draw(params: Params, reference: Params, prompts: Prompts, key: Array) -> Rollout:
        source = reference if chosen.proposal == "reference" else policy(params, reference)
        return generate(config, source, prompts, key, options.sampling, options.samples)

    def prepare(
        state: PolicyState, taken: Rollout, rewards: Array, reference_logprob: Float[Array, "B T"]
    ) -> tuple[Imitated, Metrics]:
        """The rows that are kept, with their weights."""
        unfinished = jnp.where(taken.finished, 0.0, -options.missing_eos_penalty)
        scores = scores_by_token(taken, rewards).sum(axis=-1)
        valued = scores + unfinished

        rows = top_rows(valued, options.samples, options.keep, chosen.keep_scope)
        kept = jax.tree.map(lambda leaf: leaf[rows], taken)
        own = chosen.proposal == "policy"
        log_ratio = importance_log_ratio(reference_logprob[rows], kept.logprob, kept.mask) if own else None
        weights = chosen.weights(valued[rows], options.keep, log_ratio=log_ratio)
        states = None
        if chosen.prior_kl:
            states = in_parts(lambda part: predicting_states(config, state.reference["trunk"], part), kept, options)

        metrics = rollout_metrics(taken, reference_logprob if own else None)
        if not own:
            del metrics["objective/entropy"]
        metrics |= {
            "objective/scores": scores.mean(),
            "objective/scores_kept": scores[rows].mean(),
            "objective/rlhf_reward": valued.mean(),
            "weights/effective_samples": effective_samples(weights, options.keep).mean(),
        }
        return Imitated(rollout=kept, weights=weights, reference_states=states), metrics

    def predict(params: Params, reference: Params, part: Imitated) -> Found:
        trained = policy(params, reference)
        logprob, entropies, states = taken_scores(config, trained, part.rollout, temperature)
        divergence = None
        if part.reference_states is not None:
            divergence = token_forward_kl(config, trained, reference, states, part.reference_states, temperature)
        return Found(logprob=logprob, entropies=entropies, divergence=divergence)

    def terms(found: Found, part: Imitated, minibatch: Imitated, kl_coefficient: Array) -> Metrics:
        mask, whole = part.rollout.mask, minibatch.rollout.mask
        each = {
            "loss/policy": weighted_likelihood_loss(
                found.logprob, part.weights, mask, options.keep, chosen.reduction, whole
            ),
            "policy/entropy": mean(found.entropies, mask, whole=whole),
        }
        if found.divergence is None:
            return each | {"loss": each["loss/policy"]}
        each["loss/kl"] = mean(found.divergence, mask, chosen.reduction, whole=whole)
        return each | {"loss": each["loss/policy"] + kl_coefficient * each["loss/kl"]}

    def measure(found: Found, batch: Imitated) -> Metrics:
        old, mask = batch.rollout.logprob, batch.rollout.mask
        return step_metrics(found.logprob, old, token_log_ratio(found.logprob, old, mask), mask, *no_clip)

    pieces = Pieces(policy, draw, prepare, predict, terms, measure)
    return on_policy(config, options, optimizer, kl, begin_with_policy(config, adapter), pieces)
