"""From the score of a response to an advantage for each of its tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from rlhf_jax.losses.reduce import mean
from rlhf_jax.types import at_least_float32


def token_rewards(
    scores: Float[Array, " B"] | Float[Array, "B T"],
    kl: Float[Array, "B T"],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
    coefficient: Float[Array, ""] | float | int,
) -> Float[Array, "B T"]:
    """Rewards per token: the score on the last token of the response, less the KL penalty on every token.

        r_t = 1[t is the last response token] R - coefficient * kl_t

    Args:
        scores: a score a response, [B], or rewards per token, [B, T], which are taken as they stand.
        kl: per-token divergence from the reference, [B, T], nats (see `kl_estimate`; k1 as a rule).
        mask: True through the stop token, [B, T]; the last token is the last one where it is set.
        coefficient: of the penalty, reward units a nat.

    Returns:
        Rewards, [B, T], in the float dtype of `kl` (float32 or better); 0 where the mask is not set, so 0 throughout
        for an empty response.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), eq. 2; Ouyang et al. 2022 (arXiv:2203.02155), eq. 2.

    Example:
        >>> import jax.numpy as jnp
        >>> mask = jnp.array([[True, True, False]])
        >>> token_rewards(jnp.array([1.0]), jnp.array([[0.5, -0.5, 9.0]]), mask, 0.5).tolist()
        [[-0.25, 1.25, 0.0]]
    """
    kl = at_least_float32(kl)
    scores = scores.astype(kl.dtype)
    present = mask.astype(bool)
    if scores.ndim == 1:
        steps = present.shape[1]
        last = steps - 1 - jnp.argmax(present[:, ::-1], axis=1)
        scores = jnp.where(jnp.arange(steps)[None, :] == last[:, None], scores[:, None], 0.0)
    return jnp.where(present, scores - jnp.asarray(coefficient, dtype=kl.dtype) * kl, 0.0)


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
    discount: Float[Array, ""] | float | int,
    lam: Float[Array, ""] | float | int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimates, and the returns that the value function is fitted to.

        delta_t = r_t + discount V_{t+1} - V_t;   A_t = delta_t + discount lam A_{t+1};   return_t = A_t + V_t

    The value after the end is 0. Steps that are masked are skipped, wherever they stand: t+1 is the next that is not.

    Args:
        rewards: per-token rewards, [B, T].
        values: the value function at the state each token was chosen in, [B, T].
        mask: which steps there are, [B, T].
        discount: gamma in [0, 1].
        lam: lambda in [0, 1]: 0 trusts the values, 1 trusts the rewards.

    Returns:
        `(advantages, returns)`, each [B, T], float32 or better; 0 where the mask is not set.

    Source: Schulman et al. 2016 (arXiv:1506.02438), eqs. 11-16.

    Example:
        >>> import jax.numpy as jnp
        >>> rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.5, 0.5, 0.5]])
        >>> advantages, returns = gae(rewards, values, jnp.ones((1, 3), bool), discount=1.0, lam=0.5)
        >>> advantages.tolist(), returns.tolist()
        ([[0.125, 0.25, 0.5]], [[0.625, 0.75, 1.0]])
    """
    present = mask.astype(bool)
    rewards = jnp.where(present, at_least_float32(rewards), 0.0)
    values = jnp.where(present, at_least_float32(values), 0.0)

    def step(after, now):
        next_advantage, next_value = after
        reward, value, here = now
        advantage = reward + discount * next_value - value + discount * lam * next_advantage
        carry = (jnp.where(here, advantage, next_advantage), jnp.where(here, value, next_value))
        return carry, jnp.where(here, advantage, 0.0)

    end = jnp.zeros_like(values[:, 0])
    _, advantages = jax.lax.scan(step, (end, end), (rewards.T, values.T, present.T), reverse=True)
    return advantages.T, advantages.T + values


def whiten(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"] | Float[Array, "B T"], shift_mean: bool = True
) -> Float[Array, "B T"]:
    """Values scaled to unit variance over all the tokens of the batch, and, as a rule, to mean 0.

        (x - mean) / sqrt(variance + 1e-8)   (+ mean, without `shift_mean`)

    Mean and variance (divided by n) run over every token that is not masked: whiten the whole batch before it is split.

    Args:
        values: [B, T].
        mask: which tokens count, [B, T].
        shift_mean: False keeps the mean where it was.

    Returns:
        Whitened values, [B, T], float32 or better; 0 where the mask is not set.

    Example:
        >>> import jax.numpy as jnp
        >>> whiten(jnp.array([[1.0, 3.0, 100.0]]), jnp.array([[True, True, False]])).tolist()
        [[-1.0, 1.0, 0.0]]
    """
    present = mask.astype(bool)
    values = jnp.where(present, at_least_float32(values), 0.0)
    centre = mean(values, mask)
    centred = values - centre
    scaled = centred / jnp.sqrt(mean(jnp.square(centred), mask) + 1e-8)
    return jnp.where(present, scaled if shift_mean else scaled + centre, 0.0)


def grouped(values: Shaped[Array, " B"], samples: int) -> Shaped[Array, "G K"]:
    """What belongs to the responses, a row a prompt: the K responses to a prompt follow each other.

    Args:
        values: one a response, [B], of any dtype.
        samples: K, responses a prompt.

    Returns:
        [B / K, K].

    Raises:
        ValueError: K is below 2, or does not divide the number of responses.

    Example:
        >>> import jax.numpy as jnp
        >>> grouped(jnp.arange(6), 3).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    if samples < 2:
        raise ValueError(
            f"a group of {samples} has nothing to compare its response with: draw 2 samples a prompt or more."
        )
    if len(values) % samples:
        raise ValueError(f"{len(values)} responses are no groups of {samples}: give {samples} of each prompt.")
    return values.reshape(-1, samples)


def group_advantages(
    rewards: Float[Array, " B"], samples: int, divide: bool = True, eps: float = 1e-4
) -> Float[Array, " B"]:
    """How much better each response is than the others to the same prompt, in units of their spread.

        A_i = (r_i - mean r) / (s + eps),   s^2 = sum_j (r_j - mean r)^2 / (K - 1)

    A constant added to the rewards of a group changes nothing. Where all rewards of a group are equal, its advantages
    are exactly 0.

    Args:
        rewards: one reward a response, [B]; the K responses to a prompt follow each other.
        samples: K, responses a prompt.
        divide: False leaves the differences in units of reward (Dr. GRPO).
        eps: keeps the advantages of groups with next to no spread small.

    Returns:
        Advantages, [B], float32 or better.

    Raises:
        ValueError: K is below 2, or does not divide the number of responses.

    Source: Shao et al. 2024 (arXiv:2402.03300), section 4.1.2; without division Liu et al. 2025 (arXiv:2503.20783).

    Example:
        >>> import jax.numpy as jnp
        >>> rewards = jnp.array([1.0, 3.0, 2.0, 5.0, 5.0, 5.0])
        >>> group_advantages(rewards, 3, divide=False).tolist()
        [-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        >>> [f"{x:.4f}" for x in group_advantages(rewards, 3)[:3]]  # s is 1
        ['-0.9999', '0.9999', '0.0000']
    """
    groups = grouped(at_least_float32(rewards), samples)
    differences = groups - groups[:, :1]  # so that equal rewards give exact zeros
    centred = differences - differences.mean(axis=1, keepdims=True)
    if divide:
        centred = centred / (jnp.sqrt(jnp.square(centred).sum(axis=1, keepdims=True) / (samples - 1)) + eps)
    return centred.reshape(-1)
