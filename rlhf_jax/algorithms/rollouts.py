"""What an on-policy algorithm reads off a rollout: scores of the tokens taken, weights, lengths, and metrics."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.losses.advantages import token_rewards
from rlhf_jax.losses.kl import kl_estimate
from rlhf_jax.losses.policy import importance_weights, ratio_metrics, token_log_ratio
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


def sampler_weights(taken: Rollout, ratio: Callable[[Array, Array, Array], Array], cap: float) -> Float[Array, "B T"]:
    """The weights of the tokens' losses that correct for a sampler other than the old policy, see `importance_weights`.

    Args:
        taken: a rollout whose `logprob` is the old policy's, and `sampling_logprob` that of what drew it.
        ratio: of tokens or of responses, as the algorithm has it: `(logprob, old_logprob, mask) -> [B, T]`.
        cap: the largest weight.
    """
    return importance_weights(ratio(taken.logprob, taken.sampling_logprob, taken.mask), cap)


def response_lengths(longest: int, buckets: int) -> tuple[int, ...]:
    """The lengths that responses of at most `longest` tokens are cut to, evenly spaced.

    Example:
        >>> response_lengths(64, 4), response_lengths(3, 4)
        ((16, 32, 48, 64), (1, 2, 3))
    """
    return tuple(sorted({-(-longest * part // buckets) for part in range(1, buckets + 1)}))


def at_length(
    function: Callable[[Rollout, Array], Any],
    taken: Rollout,
    rewards: Float[Array, " B"] | Float[Array, "B T"],
    buckets: int,
) -> Any:
    """`function(taken, rewards)` of responses that are cut to the shortest of a few lengths that holds them all.

    Which one is decided on the device, as the program runs; it holds `function` once for each length. (Under `vmap` it
    computes them all.)

    Args:
        function: its outputs have the same shapes whatever the length.
        taken: a rollout.
        rewards: of its responses, or of their tokens.
        buckets: how many lengths; 1: none is cut.
    """
    lengths = response_lengths(taken.mask.shape[1], buckets)
    if len(lengths) == 1:
        return function(taken, rewards)

    def cut(length: int) -> Callable[[Rollout, Array], Any]:
        names = ("tokens", "mask", "logprob", "sampling_logprob")

        def run(taken: Rollout, rewards: Array) -> Any:
            short = taken.replace(**{name: taken[name][:, :length] for name in names})
            return function(short, rewards if rewards.ndim == 1 else rewards[:, :length])

        return run

    needed = taken.mask.sum(axis=-1).max()
    return jax.lax.switch((needed > jnp.array(lengths[:-1])).sum(), [cut(length) for length in lengths], taken, rewards)


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
