"""What an on-policy algorithm reads off a rollout: prompts in groups, scores of the tokens taken, and metrics."""

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.losses.advantages import token_rewards
from rlhf_jax.losses.kl import kl_estimate
from rlhf_jax.losses.policy import ratio_metrics, token_log_ratio
from rlhf_jax.losses.reduce import mean
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import response_states, token_scores
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.types import Metrics, Params, Rollout


@chex.dataclass(frozen=True)
class TokenScores:
    """What the policy says of the tokens taken: log-probabilities and entropies, nats, [B, T]."""

    logprob: Float[Array, "B T"]
    entropies: Float[Array, "B T"]


def predicting_states(config: ModelConfig, trunk: Params, taken: Rollout) -> Float[Array, "B T D"]:
    """The hidden states of a trunk that predict the responses."""
    hidden = apply_trunk(config, trunk, taken.sequences.tokens, taken.sequences.mask).final
    return response_states(hidden, taken.tokens.shape[1])


def taken_scores(
    config: ModelConfig, policy: Params, taken: Rollout, temperature: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T D"]]:
    """Log-probability of each token taken and entropy, in nats, and the states that they were computed from."""
    states = predicting_states(config, policy["trunk"], taken)
    logprob, entropies = token_scores(config, policy, states, taken.tokens, temperature)
    return logprob, entropies, states


def scores_by_token(taken: Rollout, rewards: Float[Array, " B"] | Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Rewards as they were given, by token: one a response stands on its last token."""
    return token_rewards(rewards, jnp.zeros_like(taken.logprob), taken.mask, 0.0)


def rollout_metrics(taken: Rollout, reference_logprob: Float[Array, "B T"] | None) -> Metrics:
    """What a rollout says of the policy that drew it: KL from the reference and entropy in nats a response, lengths.

    Args:
        taken: the rollout, of which the policy's own responses count.
        reference_logprob: of its tokens under the reference, [B, T]; None leaves the KL out.
    """
    mask, rows = taken.mask & taken.own_rows[:, None], taken.own_rows.astype(jnp.float32)
    lengths = taken.mask.sum(axis=-1).astype(jnp.float32)
    metrics = {
        "objective/entropy": -mean(taken.logprob, mask, "sequence_sum"),
        "completions/mean_length": (lengths * rows).sum() / rows.sum(),
        "completions/clipped_ratio": 1.0 - (taken.finished.astype(jnp.float32) * rows).sum() / rows.sum(),
    }
    if reference_logprob is not None:
        for name, kind in (("objective/kl", "k1"), ("objective/kl_k3", "k3")):
            metrics[name] = mean(kl_estimate(taken.logprob, reference_logprob, kind), mask, "sequence_sum")
    return metrics


def step_metrics(
    logprob: Float[Array, "B T"],
    old_logprob: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip_low: float,
    clip_high: float,
) -> Metrics:
    """How far the policy of a step has moved from the one that sampled, see `ratio_metrics`.

    `policy/approxkl` is in nats a token, whatever the ratio that is clipped.
    """
    by_token = ratio_metrics(token_log_ratio(logprob, old_logprob, mask), mask, clip_low, clip_high)
    return ratio_metrics(log_ratio, mask, clip_low, clip_high) | {
        "policy/approxkl": by_token["policy/approxkl"],
        "policy/max_logprob_gap": jnp.max(jnp.where(mask, jnp.abs(logprob - old_logprob), 0.0)),
    }
