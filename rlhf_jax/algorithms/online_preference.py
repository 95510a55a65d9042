"""Learning from preferences between responses that were just drawn: online DPO, XPO, Nash-MD.

The life of a batch: `rollout` draws two responses to each prompt, the policy's and its opponent's. `update` gets one
reward a response; the larger one of a pair wins. Then epochs x minibatches steps are taken on a loss of pairs. Who the
opponent is (the policy itself, its reference, a mixture of the two) and which loss is minimised are two choices;
`ONLINE` holds those of the literature.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms.on_policy import Pieces, PolicyState, begin_with_policy, on_policy
from rlhf_jax.algorithms.on_policy_options import OnPolicyConfig
from rlhf_jax.algorithms.rollouts import rollout_metrics, scores_by_token, step_metrics, taken_scores
from rlhf_jax.algorithms.trained import assemble
from rlhf_jax.losses.kl import fixed_kl
from rlhf_jax.losses.nash import nash_md_loss
from rlhf_jax.losses.policy import token_log_ratio
from rlhf_jax.losses.preference import CompletionLogprobs, implicit_reward, xpo_loss
from rlhf_jax.losses.preference_choices import PREFERENCE_LOSSES
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.reward import preference_accuracy
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import generate, repeat_prompts
from rlhf_jax.sampling.mixture import check_eta, generate_mixture
from rlhf_jax.types import Algorithm, Metrics, Params, Prompts, Rollout

OPPONENTS = ("policy", "reference", "mixture")
Number = Float[Array, ""] | float


@chex.dataclass(frozen=True)
class PairLogprobs:
    """What a loss of pairs reads; of each pair the policy's response stands first, its opponent's second.

    Attributes:
        logprob: log pi(y) of whole responses, nats, [G, 2].
        reference_logprob: the same under the reference, [G, 2].
        lengths: tokens of the responses, [G, 2].
        margins: by how much the reward of the first exceeds that of the second, [G].
    """

    logprob: Float[Array, "G 2"]
    reference_logprob: Float[Array, "G 2"]
    lengths: Int[Array, "G 2"]
    margins: Float[Array, " G"]

    def ranked(self) -> CompletionLogprobs:
        """The pairs as offline losses have them: the response of the larger reward is the chosen one."""
        first_wins = self.margins[:, None] > 0
        by_rank = [jnp.where(first_wins, each, each[:, ::-1]) for each in (self.logprob, self.reference_logprob)]
        lengths = jnp.where(first_wins, self.lengths, self.lengths[:, ::-1])
        return CompletionLogprobs(
            chosen=by_rank[0][:, 0],
            rejected=by_rank[0][:, 1],
            chosen_length=lengths[:, 0],
            rejected_length=lengths[:, 1],
            reference_chosen=by_rank[1][:, 0],
            reference_rejected=by_rank[1][:, 1],
        )


def _of_pairs(name: str) -> Callable[..., Array]:
    return lambda pairs, beta, alpha: PREFERENCE_LOSSES[name](beta=beta).pairs(pairs.ranked())


def _xpo(pairs: PairLogprobs, beta: Number, alpha: Number) -> Float[Array, " G"]:
    found = pairs.ranked()
    ranked = (found.chosen, found.rejected, found.reference_chosen, found.reference_rejected)
    return xpo_loss(*ranked, pairs.logprob[:, 1], beta, alpha)


def _nash_md(pairs: PairLogprobs, beta: Number, alpha: Number) -> Float[Array, " G"]:
    preference = jax.nn.sigmoid(pairs.margins)
    return nash_md_loss(pairs.logprob[:, 0], pairs.reference_logprob[:, 0], preference, beta)


LOSSES = {
    **{name: _of_pairs(name) for name in ("dpo", "robust", "ipo", "hinge", "chi_po")},
    "xpo": _xpo,
    "nash_md": _nash_md,
}
"""Losses by name: `(PairLogprobs, beta, alpha) -> [G]`; the first are those of `losses.preference_choices`."""


@dataclasses.dataclass(frozen=True)
class OnlinePreferenceConfig(OnPolicyConfig):
    """Options of learning from preferences between fresh responses, beside those of `OnPolicyConfig`.

    Attributes:
        opponent: who draws the second response: the "policy", its "reference", or the "mixture" of both.
        eta: the reference's weight in the mixture, in [0, 1] (`generate_mixture`); None for other opponents.
        loss: a name of `LOSSES`. `nash_md` takes rewards as Bradley-Terry scores: P(y > y') = sigma(r - r'). To the
            others only the order of the two rewards matters.
        beta: how strongly the policy is held to its reference, see the loss; it starts the state's `kl_coefficient`.
        alpha: weight of the optimism of `xpo`; 0 for other losses.

    Raises:
        ValueError: an option is out of range, or is none of the loss or opponent.
    """

    opponent: str = "policy"
    eta: float | None = None
    loss: str = "dpo"
    beta: float = 0.1
    alpha: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name, value, known in (("opponent", self.opponent, OPPONENTS), ("loss", self.loss, LOSSES)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(known)}.")
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta!r}; it must be positive.")
        if (self.eta is not None) != (self.opponent == "mixture"):
            raise ValueError(
                f"the opponent is {self.opponent!r} and eta {self.eta!r}: eta is the weight of the reference in the "
                "opponent 'mixture', and only there."
            )
        if self.eta is not None:
            check_eta(self.eta)
        if not self.alpha >= 0 or (self.alpha > 0 and self.loss != "xpo"):
            raise ValueError(f"alpha is {self.alpha!r} and the loss {self.loss}: give xpo 0 or more, the others 0.")
        if self.loss == "xpo" and self.opponent != "reference":
            raise ValueError(f"xpo is optimistic about what the reference draws: the opponent is {self.opponent!r}.")
        if self.loss == "nash_md" and self.epochs * self.minibatches > 1:
            raise ValueError(
                "nash_md corrects nothing for steps away from the policy that sampled: give epochs=1 and minibatches=1."
            )


ONLINE = {
    "online_dpo": {},
    "online_ipo": {"loss": "ipo"},
    "xpo": {"loss": "xpo", "opponent": "reference", "alpha": 1e-5},
    "nash_md": {"loss": "nash_md", "opponent": "mixture", "eta": 0.5},
}
"""Options by name.

| name         | source                                                                                       |
|--------------|----------------------------------------------------------------------------------------------|
| `online_dpo` | Guo et al. 2024 (arXiv:2402.04792), with a reward in place of a judge                        |
| `online_ipo` | Calandriello et al. 2024 (arXiv:2403.08635)                                                  |
| `xpo`        | Xie et al. 2024 (arXiv:2405.21046); `alpha` is a matter of tuning                            |
| `nash_md`    | Munos et al. 2023 (arXiv:2312.00886)                                                         |
"""


def online(name: str, sampling: SamplingConfig, **changes: Any) -> OnlinePreferenceConfig:
    """The options of a method of the table, with some of them changed.

    Args:
        name: one of `ONLINE`.
        sampling: how responses are drawn.
        changes: attributes of `OnlinePreferenceConfig`.

    Raises:
        ValueError: no such method, or what the options refuse.

    Example:
        >>> online("nash_md", SamplingConfig(max_new_tokens=4, stop_tokens=(1,)), eta=0.1).opponent
        'mixture'
    """
    if name not in ONLINE:
        raise ValueError(f"no method {name!r}: choose one of {', '.join(ONLINE)}.")
    return OnlinePreferenceConfig(sampling=sampling, **(ONLINE[name] | changes))


@chex.dataclass(frozen=True)
class PairExperience:
    """A rollout in pairs, and what is fixed about them before the first minibatch.

    Attributes:
        rollout: the responses, every array [G, 2, ...].
        reference_logprob: of whole responses under the reference, nats, [G, 2].
        margins: see `PairLogprobs`.
        decided: pairs of which one response won, [G].
        counted: pairs that the loss is taken of, [G].
    """

    rollout: Rollout
    reference_logprob: Float[Array, "G 2"]
    margins: Float[Array, " G"]
    decided: Bool[Array, " G"]
    counted: Bool[Array, " G"]


@chex.dataclass(frozen=True)
class PairTokens:
    """What the policy says of the tokens taken: log-probabilities and entropies, nats, [G, 2, T]."""

    logprob: Float[Array, "G 2 T"]
    entropies: Float[Array, "G 2 T"]


def in_pairs(rows: Any) -> Any:
    """Arrays [2 G, ...] as [G, 2, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]), rows)


def in_rows(pairs: Any) -> Any:
    """Arrays [G, 2, ...] as [2 G, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), pairs)


def online_preference(
    config: ModelConfig,
    options: OnlinePreferenceConfig,
    optimizer: optax.GradientTransformation,
    adapter: AdapterConfig | None = None,
) -> Algorithm:
    """Learning from preferences between fresh responses as an `Algorithm`.

    `init(key, params)` takes `{"policy": tree, "reference"?: tree}` or None for a fresh policy; the reference is the
    policy at the start if not given. `rollout(state, prompts)` gives two responses to each of G prompts, rows 2 i the
    policy's and rows 2 i + 1 its opponent's; `update(state, rollout, rewards)` takes one reward a response, [2 G], or
    one a token, which are summed. Pairs stay together in minibatches. Of equal rewards (and where one is NaN) neither
    wins: `objective/equal_groups` is the share of such pairs; they weigh nothing, but for the KL of `nash_md`.

    Metrics of the policy's responses (KL, entropy, lengths, scores, ratios) are of its own alone. `rewards/*` are the
    implicit rewards, beta log(pi / ref), of decided pairs.

    Args:
        config: shape of the policy.
        options: see `OnlinePreferenceConfig`, and `online` for those of the literature.
        optimizer: an optax optimiser of what is trained.
        adapter: train this adapter on the policy, which stays as it is and is the reference; None: train the policy.
    """
    temperature = options.sampling.logprob_temperature

    def policy(params: Params, reference: Params) -> Params:
        return assemble(reference, params, adapter)

    def draw(params: Params, reference: Params, prompts: Prompts, key: Array) -> Rollout:
        drawing = policy(params, reference)
        if options.opponent == "policy":
            return generate(config, drawing, prompts, key, options.sampling, samples=2)
        repeated = repeat_prompts(prompts, 2)
        first, second = (jax.tree.map(lambda leaf, place=place: leaf[place::2], repeated) for place in (0, 1))
        own = generate(config, drawing, first, key, options.sampling)
        if options.opponent == "reference":
            other = generate(config, reference, second, key, options.sampling)
        else:
            other = generate_mixture(config, drawing, reference, options.eta, second, key, options.sampling)
        both = in_rows(jax.tree.map(lambda *sides: jnp.stack(sides, axis=1), own, other))
        return both.replace(own=jnp.arange(len(both.tokens)) % 2 == 0)

    def prepare(
        state: PolicyState, taken: Rollout, rewards: Array, reference_logprob: Float[Array, "B T"]
    ) -> tuple[PairExperience, Metrics]:
        """Who wins, and which pairs count."""
        by_token = scores_by_token(taken, rewards)
        scores = in_pairs(by_token.sum(axis=-1))
        margins = jnp.nan_to_num(scores[:, 0] - scores[:, 1])
        whole = in_pairs(taken.mask.any(axis=-1)).all(axis=1)
        decided = whole & (margins != 0)
        experience = PairExperience(
            rollout=in_pairs(taken),
            reference_logprob=in_pairs(jnp.where(taken.mask, reference_logprob, 0.0).sum(axis=-1)),
            margins=margins,
            decided=decided,
            counted=whole if options.loss == "nash_md" else decided,
        )
        metrics = rollout_metrics(taken, reference_logprob) | {
            "objective/scores": mean(by_token, taken.mask & taken.own_rows[:, None], "sequence_sum"),
            "objective/win_rate": preference_accuracy(scores[:, 0], scores[:, 1]).mean(),
            "objective/equal_groups": (margins == 0).astype(jnp.float32).mean(),
        }
        return experience, metrics

    def predict(params: Params, reference: Params, part: PairExperience) -> PairTokens:
        logprob, entropies, _ = taken_scores(config, policy(params, reference), in_rows(part.rollout), temperature)
        return PairTokens(logprob=in_pairs(logprob), entropies=in_pairs(entropies))

    def terms(found: PairTokens, part: PairExperience, minibatch: PairExperience, beta: Float[Array, ""]) -> Metrics:
        def average(values: Float[Array, " G"], of: Bool[Array, " G"], whole: Bool[Array, " N"]) -> Float[Array, ""]:
            return mean(values[:, None], of[:, None], whole=whole[:, None])

        pairs = PairLogprobs(
            logprob=jnp.where(part.rollout.mask, found.logprob, 0.0).sum(axis=-1),
            reference_logprob=part.reference_logprob,
            lengths=part.rollout.mask.sum(axis=-1, dtype=jnp.int32),
            margins=part.margins,
        )
        loss = average(LOSSES[options.loss](pairs, beta, options.alpha), part.counted, minibatch.counted)
        ranked = pairs.ranked()
        chosen = implicit_reward(ranked.chosen, ranked.reference_chosen, beta)
        rejected = implicit_reward(ranked.rejected, ranked.reference_rejected, beta)
        rewards = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": preference_accuracy(chosen, rejected),
            "rewards/margins": chosen - rejected,
        }
        metrics = {name: average(values, part.decided, minibatch.decided) for name, values in rewards.items()}
        masks = (own_mask(part), own_mask(minibatch))
        metrics["policy/entropy"] = mean(in_rows(found.entropies), masks[0], whole=masks[1])
        return metrics | {"loss": loss, "loss/policy": loss}

    def own_mask(pairs: PairExperience) -> Bool[Array, "B T"]:
        taken = in_rows(pairs.rollout)
        return taken.mask & taken.own_rows[:, None]

    def measure(found: PairTokens, batch: PairExperience) -> Metrics:
        new, old, mask = in_rows(found.logprob), in_rows(batch.rollout.logprob), own_mask(batch)
        unclipped = (float("inf"), float("inf"))
        return step_metrics(new, old, token_log_ratio(new, old, mask), mask, *unclipped)

    pieces = Pieces(policy, draw, prepare, predict, terms, measure)
    beta = fixed_kl(options.beta)
    return on_policy(config, options, optimizer, beta, begin_with_policy(config, adapter), pieces)
