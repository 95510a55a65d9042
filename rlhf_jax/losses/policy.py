"""The two pieces a policy-gradient loss is made of, ratio and surrogate, and what is logged about the ratio.

A ratio compares the policy being trained with the one that sampled: of each token, or of each response. A surrogate
turns ratios and advantages into losses of tokens. Any ratio goes with any surrogate, and `losses.reduce` averages.

| algorithm        | ratio                | surrogate             | reduction       |
|------------------|----------------------|-----------------------|-----------------|
| PPO, DAPO        | `token_log_ratio`    | `clipped_surrogate`   | `token_mean`    |
| GRPO             | `token_log_ratio`    | `clipped_surrogate`   | `sequence_mean` |
| GSPO             | `sequence_log_ratio` | `clipped_surrogate`   | `sequence_mean` |
| CISPO            | `token_log_ratio`    | `capped_surrogate`    | `token_mean`    |
| RLOO             | `total_log_ratio`    | `clipped_surrogate`   | `sequence_mean` |
| RLOO, one step   | any                  | `reinforce_surrogate` | `sequence_sum`  |

The ratio of a response stands on all its tokens, so that `sequence_mean` counts every response once.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.losses.kl import LARGEST_LOG_RATIO
from rlhf_jax.losses.reduce import mean
from rlhf_jax.types import Metrics, at_least_float32


def token_log_ratio(
    logprob: Float[Array, "B T"],
    old_logprob: Float[Array, "B T"],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
) -> Float[Array, "B T"]:
    """How much likelier each token has become since it was sampled.

        log rho_t = log pi(y_t) - log old(y_t), held within 20 of 0

    Args:
        logprob: log-probabilities of the tokens taken under the policy being trained, [B, T], nats.
        old_logprob: the same under the policy that sampled them, from the rollout; no gradient flows to it.
        mask: True on the tokens of the response, [B, T].

    Returns:
        Log-ratios, nats, [B, T]; 0 where the mask is not set; float32 for bfloat16 and float16 input.

    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 6.

    Example:
        >>> import jax.numpy as jnp
        >>> logprob, old = jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[-1.5, -2.0, 0.0]])
        >>> token_log_ratio(logprob, old, jnp.array([[True, True, False]])).tolist()
        [[0.5, 0.0, 0.0]]
    """
    return _held(_differences(logprob, old_logprob, mask))


def sequence_log_ratio(
    logprob: Float[Array, "B T"],
    old_logprob: Float[Array, "B T"],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
) -> Float[Array, "B T"]:
    """How much likelier each response has become, a token: the mean of its tokens' log-ratios, on each of them.

        log s = (1/n) sum_t [log pi(y_t) - log old(y_t)], held within 20 of 0

    Where policy and old policy are one, `sequence_mean` of a surrogate of it has the gradient that `token_log_ratio`
    gives, whatever the lengths. Its clips are narrow, about 4e-4, as s moves much less than a token's ratio.

    Args:
        logprob: log-probabilities of the tokens taken under the policy being trained, [B, T], nats.
        old_logprob: the same under the policy that sampled them; no gradient flows to it.
        mask: True on the tokens of the response, [B, T].

    Returns:
        Log-ratios, nats a token, [B, T], the same all along a row; 0 where the mask is not set.

    Source: GSPO, Zheng et al. 2025 (arXiv:2507.18071), eq. 7.

    Example:
        >>> import jax.numpy as jnp
        >>> logprob, old = jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[-1.5, -2.0, 0.0]])
        >>> sequence_log_ratio(logprob, old, jnp.array([[True, True, False]])).tolist()
        [[0.25, 0.25, 0.0]]
    """
    differences = _differences(logprob, old_logprob, mask)
    tokens = jnp.sum(mask.astype(bool), axis=1, keepdims=True).astype(differences.dtype)
    return _on_tokens(jnp.sum(differences, axis=1, keepdims=True) / jnp.maximum(tokens, 1.0), mask)


def total_log_ratio(
    logprob: Float[Array, "B T"],
    old_logprob: Float[Array, "B T"],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
) -> Float[Array, "B T"]:
    """How much likelier each response has become as a whole: the sum of its tokens' log-ratios, on each of them.

        log rho = sum_t [log pi(y_t) - log old(y_t)], held within 20 of 0

    This is the importance weight of a response that was sampled from the old policy. Where policy and old policy are
    one, `sequence_mean` of a surrogate of it has the gradient of -A log pi(y), the whole response's.

    Args:
        logprob: log-probabilities of the tokens taken under the policy being trained, [B, T], nats.
        old_logprob: the same under the policy that sampled them; no gradient flows to it.
        mask: True on the tokens of the response, [B, T].

    Returns:
        Log-ratios, nats a response, [B, T], the same all along a row; 0 where the mask is not set.

    Source: Ahmadian et al. 2024 (arXiv:2402.14740), who take a whole response as one action.

    Example:
        >>> import jax.numpy as jnp
        >>> logprob, old = jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[-1.5, -2.25, 0.0]])
        >>> total_log_ratio(logprob, old, jnp.array([[True, True, False]])).tolist()
        [[0.75, 0.75, 0.0]]
    """
    differences = _differences(logprob, old_logprob, mask)
    return _on_tokens(jnp.sum(differences, axis=1, keepdims=True), mask)


def clipped_surrogate(
    logprob: Float[Array, "*batch"],
    log_ratio: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    clip_low: Float[Array, ""] | float,
    clip_high: Float[Array, ""] | float,
    dual_clip: Float[Array, ""] | float | None = None,
) -> Float[Array, "*batch"]:
    """Per-token policy loss: minus the smaller of the plain and the clipped importance-weighted advantage.

        rho = exp(log_ratio);   -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)

    Where the ratio is 1, the gradient with respect to the log-ratio is -A. A bad token whose ratio is large has a large
    loss; with `dual_clip` = c it is at most -c A where A < 0, and has no gradient beyond.

    Args:
        logprob: not used; every surrogate takes the same arguments.
        log_ratio: of the policy being trained to the one that sampled, nats, [B, T] (any shape): see
            `token_log_ratio`, `sequence_log_ratio`, `total_log_ratio`.
        advantages: same shape; no gradient flows to them.
        clip_low: how far below 1 the ratio may go before the gain stops counting.
        clip_high: how far above 1.
        dual_clip: the largest ratio that counts against a token with negative advantage, above 1 (3 is usual); None:
            there is none.

    Returns:
        Unreduced losses of the same shape; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: a clip is a Python number that is out of range, see `check_clips`.

    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; two bounds as in DAPO (Yu et al. 2025, arXiv:2503.14476);
    dual clip Ye et al. 2020 (arXiv:1912.09729).

    Example:
        >>> import jax.numpy as jnp
        >>> log_ratio = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5, 9.0]))
        >>> advantages = jnp.array([1.0, -1.0, 1.0, -1.0, -1.0])
        >>> [round(float(x), 4) for x in clipped_surrogate(log_ratio, log_ratio, advantages, 0.2, 0.2)]
        [-1.2, 1.5, -0.5, 0.8, 9.0]
        >>> [round(float(x), 4) for x in clipped_surrogate(log_ratio, log_ratio, advantages, 0.2, 0.2, dual_clip=3.0)]
        [-1.2, 1.5, -0.5, 0.8, 3.0]
    """
    check_clips(clip_low, clip_high, dual_clip)
    ratio = jnp.exp(at_least_float32(log_ratio))
    advantages = jax.lax.stop_gradient(advantages).astype(ratio.dtype)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    losses = -jnp.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return losses
    return jnp.minimum(losses, dual_clip * jnp.abs(advantages))  # where A > 0, losses are below 0 anyway


def check_clips(
    clip_low: Float[Array, ""] | float, clip_high: Float[Array, ""] | float, dual_clip: Float[Array, ""] | float | None
) -> None:
    """Refuses clips that are Python numbers below 0, and a dual clip that is one not above 1.

    Raises:
        ValueError: the sentence names it.
    """
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if isinstance(value, float | int) and not value >= 0:
            raise ValueError(f"{name} is {value!r}; it is a distance from a ratio of 1, so it must not be negative")
    if isinstance(dual_clip, float | int) and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip!r}; it bounds a ratio from above, so it must be above 1, or None")


def capped_surrogate(
    logprob: Float[Array, "*batch"],
    log_ratio: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    clip_low: Float[Array, ""] | float,
    clip_high: Float[Array, ""] | float,
) -> Float[Array, "*batch"]:
    """Per-token policy loss whose importance weights are capped, so that no token loses its gradient.

        -min(rho, 1 + clip_high) A log pi(y);   rho = exp(log_ratio), without gradient

    Args:
        logprob: log-probabilities of the tokens taken under the policy being trained, nats, [B, T] (any shape).
        log_ratio: of the policy being trained to the one that sampled, nats; no gradient flows to it.
        advantages: same shape; no gradient flows to them.
        clip_low: not used; every surrogate takes the same arguments.
        clip_high: the largest weight of a token is 1 + clip_high. (Where a library takes the cap itself, as TRL does,
            subtract 1.)

    Returns:
        Unreduced losses of the same shape; float32 for bfloat16 and float16 input.

    Source: CISPO, MiniMax 2025 (arXiv:2506.13585), eqs. 4-5, without a lower bound, as there.

    Example:
        >>> import jax.numpy as jnp
        >>> logprob, log_ratio = jnp.array([-1.0, -1.0]), jnp.log(jnp.array([0.5, 9.0]))
        >>> capped_surrogate(logprob, log_ratio, jnp.array([2.0, 2.0]), 0.0, 2.0).tolist()
        [1.0, 6.0]
    """
    weights = jnp.exp(at_least_float32(jax.lax.stop_gradient(log_ratio)))
    losses = reinforce_surrogate(logprob, log_ratio, advantages, clip_low, clip_high)
    return jnp.minimum(weights, 1.0 + clip_high) * losses


def reinforce_surrogate(
    logprob: Float[Array, "*batch"],
    log_ratio: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    clip_low: Float[Array, ""] | float,
    clip_high: Float[Array, ""] | float,
) -> Float[Array, "*batch"]:
    """Per-token policy loss of tokens that the policy being trained has sampled itself: no ratio, no clip.

        -A log pi(y)

    Args:
        logprob: log-probabilities of the tokens taken under the policy being trained, nats, [B, T] (any shape).
        log_ratio: not used; every surrogate takes the same arguments. Away from 0 the gradient is biased.
        advantages: same shape; no gradient flows to them.
        clip_low: not used.
        clip_high: not used.

    Returns:
        Unreduced losses of the same shape; float32 for bfloat16 and float16 input.

    Source: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning".

    Example:
        >>> import jax.numpy as jnp
        >>> reinforce_surrogate(jnp.array([-1.0]), jnp.array([0.0]), jnp.array([2.0]), 0.2, 0.2).tolist()
        [2.0]
    """
    logprob = at_least_float32(logprob)
    return -jax.lax.stop_gradient(advantages).astype(logprob.dtype) * logprob


def importance_weights(
    log_ratio: Float[Array, "*batch"], cap: Float[Array, ""] | float = float("inf")
) -> Float[Array, "*batch"]:
    """Weights of the losses of tokens that another policy drew than the one the loss is about, held below a cap.

        w = min(pi_old(y) / mu(y), cap), without gradient

    Without a cap the mean of w f over draws of mu is the mean of f over draws of pi_old. A cap bounds the variance, for
    a bias that stands where pi_old is likelier than mu by more than the cap.

    Args:
        log_ratio: of the old policy to the sampler mu, nats, any shape; see `token_log_ratio`.
        cap: the largest weight.

    Returns:
        Weights of the same shape, at least float32.

    Source: Ionides 2008, "Truncated importance sampling"; for a sampler whose numbers differ from those of training Yao
    et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".

    Example:
        >>> import jax.numpy as jnp
        >>> [round(float(x), 4) for x in importance_weights(jnp.log(jnp.array([0.5, 1.0, 9.0])), 2.0)]
        [0.5, 1.0, 2.0]
    """
    return jnp.minimum(jnp.exp(at_least_float32(jax.lax.stop_gradient(log_ratio))), cap)


def ratio_metrics(
    log_ratio: Float[Array, "B T"],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
    clip_low: Float[Array, ""] | float,
    clip_high: Float[Array, ""] | float,
) -> Metrics:
    """How far the policy has moved from the one that sampled, over the tokens that are not masked.

    | name               | meaning                                                                  |
    |--------------------|--------------------------------------------------------------------------|
    | `policy/approxkl`  | mean of (rho - 1) - log rho: estimates KL(old policy, policy), never < 0 |
    | `policy/clipfrac`  | share of tokens with rho below 1 - clip_low or above 1 + clip_high       |
    | `val/ratio`        | mean of rho                                                              |
    | `val/ratio_var`    | variance of rho (divided by n)                                           |

    Args:
        log_ratio: of the policy being trained to the one that sampled, nats, [B, T]; see `token_log_ratio`. Where it is
            one a response, every response counts as often as it has tokens.
        mask: which tokens count, [B, T].
        clip_low: as in `clipped_surrogate`.
        clip_high: as in `clipped_surrogate`.

    Returns:
        A dict of float scalars without gradient; 0 each when nothing counts.

    Example:
        >>> import jax.numpy as jnp
        >>> log_ratio, mask = jnp.log(jnp.array([[1.5, 0.5]])), jnp.ones((1, 2), bool)
        >>> metrics = ratio_metrics(log_ratio, mask, 0.6, 0.4)
        >>> {name: round(float(value), 4) for name, value in metrics.items()}
        {'policy/approxkl': 0.1438, 'policy/clipfrac': 0.5, 'val/ratio': 1.0, 'val/ratio_var': 0.25}
    """
    log_ratio = at_least_float32(jax.lax.stop_gradient(log_ratio))
    ratio = jnp.exp(log_ratio)
    outside = (ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)
    mean_ratio = mean(ratio, mask)
    return {
        "policy/approxkl": mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "policy/clipfrac": mean(outside.astype(ratio.dtype), mask),
        "val/ratio": mean_ratio,
        "val/ratio_var": mean(jnp.square(ratio - mean_ratio), mask),
    }


def _differences(
    logprob: Float[Array, "B T"], old_logprob: Float[Array, "B T"], mask: Bool[Array, "B T"] | Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """logprob - old_logprob in float32 or better, and 0 where the mask is not set."""
    differences = at_least_float32(logprob) - at_least_float32(jax.lax.stop_gradient(old_logprob))
    return jnp.where(mask.astype(bool), differences, 0.0)


def _on_tokens(
    per_response: Float[Array, "B 1"], mask: Bool[Array, "B T"] | Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """The log-ratio of each response, held within 20 of 0, on all its tokens, and 0 where the mask is not set."""
    return jnp.where(mask.astype(bool), _held(per_response), 0.0)


def _held(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Log-ratios within 20 of 0, so that their exponentials stay finite; no gradient flows beyond."""
    return jnp.clip(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
