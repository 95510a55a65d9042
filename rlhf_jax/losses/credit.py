"""How the rewards of a rollout become advantages without a value function: one signature, so that one replaces another.

Every method is `(rewards [B, T], mask [B, T], samples) -> advantages [B, T]`. Rewards stand on tokens: the score on the
last token of the response, and whatever belongs to the reward, such as a KL penalty, already taken off (see
`token_rewards`). The K = `samples` responses to a prompt follow each other. Advantages are float32 or better, and 0
where the mask is not set.

| method                  | algorithm           | advantage of a token                                              |
|-------------------------|---------------------|-------------------------------------------------------------------|
| `group_standardised`    | GRPO, DAPO, GSPO    | (R - mean R) / (spread of the group + 1e-4)                       |
| `group_centred`         | Dr. GRPO            | R - mean R                                                        |
| `leave_one_out`         | RLOO                | R - mean of the others' R                                         |
| `whitened_return`       | REINFORCE++         | rewards to go, whitened over the batch                            |
| `greedy_difference`     | ReMax               | R - R of the greedy response                                      |

R is the sum of a response's rewards; means and spreads of R run over the responses to the same prompt. A row whose mask
is nowhere set counts in its group with R = 0: give the mask of the whole response here, and leave responses out in the
loss.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.losses.advantages import gae, group_advantages, grouped, whiten
from rlhf_jax.types import at_least_float32


def group_standardised(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"] | Float[Array, "B T"], samples: int
) -> Float[Array, "B T"]:
    """How much better a response is than the others to its prompt, in units of their spread; see `group_advantages`.

    Args:
        rewards: per-token rewards, [B, T]; only their sum over each response matters.
        mask: True through the stop token, [B, T].
        samples: K, responses a prompt.

    Returns:
        Advantages, [B, T], the same on all tokens of a response.

    Raises:
        ValueError: K is below 2, or does not divide the number of responses.

    Source: GRPO, Shao et al. 2024 (arXiv:2402.03300), section 4.1.2.

    Example:
        >>> import jax.numpy as jnp
        >>> rewards, mask = jnp.array([[0.0, 1.0], [3.0, 0.0]]), jnp.array([[True, True], [True, False]])
        >>> [[f"{x:.3f}" for x in row] for row in group_standardised(rewards, mask, 2)]  # the spread is sqrt(2)
        [['-0.707', '-0.707'], ['0.707', '0.000']]
    """
    return _on_tokens(group_advantages(response_rewards(rewards, mask), samples), mask)


def group_centred(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"] | Float[Array, "B T"], samples: int
) -> Float[Array, "B T"]:
    """How much better a response is than the mean of its group, in units of reward.

    Args:
        rewards: per-token rewards, [B, T]; only their sum over each response matters.
        mask: True through the stop token, [B, T].
        samples: K, responses a prompt.

    Returns:
        Advantages, [B, T], the same on all tokens of a response.

    Raises:
        ValueError: K is below 2, or does not divide the number of responses.

    Source: Dr. GRPO, Liu et al. 2025 (arXiv:2503.20783).

    Example:
        >>> import jax.numpy as jnp
        >>> rewards, mask = jnp.array([[0.0, 1.0], [3.0, 0.0]]), jnp.array([[True, True], [True, False]])
        >>> group_centred(rewards, mask, 2).tolist()
        [[-1.0, -1.0], [1.0, 0.0]]
    """
    return _on_tokens(group_advantages(response_rewards(rewards, mask), samples, divide=False), mask)


def leave_one_out(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"] | Float[Array, "B T"], samples: int
) -> Float[Array, "B T"]:
    """How much better a response is than the mean of the other responses to its prompt.

        A_i = R_i - 1/(K - 1) sum_{j != i} R_j = K/(K - 1) (R_i - mean R)

    Args:
        rewards: per-token rewards, [B, T]; only their sum over each response matters.
        mask: True through the stop token, [B, T].
        samples: K, responses a prompt.

    Returns:
        Advantages, [B, T], the same on all tokens of a response.

    Raises:
        ValueError: K is below 2, or does not divide the number of responses.

    Source: RLOO, Ahmadian et al. 2024 (arXiv:2402.14740); Kool et al. 2019, "Buy 4 REINFORCE samples, get a
    baseline for free!".

    Example:
        >>> import jax.numpy as jnp
        >>> rewards, mask = jnp.array([[0.0, 1.0], [3.0, 0.0]]), jnp.array([[True, True], [True, False]])
        >>> leave_one_out(rewards, mask, 2).tolist()
        [[-2.0, -2.0], [2.0, 0.0]]
    """
    centred = group_advantages(response_rewards(rewards, mask), samples, divide=False)
    return _on_tokens(centred * (samples / (samples - 1)), mask)


def whitened_return(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"] | Float[Array, "B T"], samples: int
) -> Float[Array, "B T"]:
    """Rewards to go, whitened over all the tokens of the batch.

    Args:
        rewards: per-token rewards, [B, T].
        mask: True through the stop token, [B, T].
        samples: not used, and may be 1; every method takes the same arguments.

    Returns:
        Advantages, [B, T], of mean 0 and variance 1 over the tokens that are not masked.

    Source: REINFORCE++, Hu 2025 (arXiv:2501.03262).

    Example:
        >>> import jax.numpy as jnp
        >>> rewards, mask = jnp.array([[0.0, 1.0], [3.0, 0.0]]), jnp.array([[True, True], [True, False]])
        >>> [[f"{x:.3f}" for x in row] for row in whitened_return(rewards, mask, 1)]  # to go: 1, 1 and 3
        [['-0.707', '-0.707'], ['1.414', '0.000']]
    """
    return whiten(reward_to_go(rewards, mask, 1.0), mask)


def greedy_difference(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"] | Float[Array, "B T"], samples: int
) -> Float[Array, "B T"]:
    """How much better a response is than the greedy one to its prompt, which is the last of its group.

        A = R(y) - R(y_greedy); the greedy response itself has 0, so it has no gradient

    Args:
        rewards: per-token rewards, [B, T]; only their sum over each response matters.
        mask: True through the stop token, [B, T].
        samples: K, responses a prompt: K - 1 samples, then the greedy one.

    Returns:
        Advantages, [B, T], the same on all tokens of a response.

    Raises:
        ValueError: K is below 2, or does not divide the number of responses.

    Source: ReMax, Li et al. 2024 (arXiv:2310.10505).

    Example:
        >>> import jax.numpy as jnp
        >>> rewards, mask = jnp.array([[0.0, 1.0], [3.0, 0.0]]), jnp.array([[True, True], [True, False]])
        >>> greedy_difference(rewards, mask, 2).tolist()
        [[-2.0, -2.0], [0.0, 0.0]]
    """
    groups = grouped(response_rewards(rewards, mask), samples)
    return _on_tokens((groups - groups[:, -1:]).reshape(-1), mask)


def response_rewards(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"] | Float[Array, "B T"]
) -> Float[Array, " B"]:
    """R, the sum of the rewards of each response, [B], float32 or better; what stands at masked positions is left out.

    Example:
        >>> import jax.numpy as jnp
        >>> response_rewards(jnp.array([[0.5, 1.0, 9.0]]), jnp.array([[True, True, False]])).tolist()
        [1.5]
    """
    return jnp.where(mask.astype(bool), at_least_float32(rewards), 0.0).sum(axis=1)


def reward_to_go(
    rewards: Float[Array, "B T"],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
    discount: Float[Array, ""] | float | int,
) -> Float[Array, "B T"]:
    """What each token and those after it will be rewarded with: `gae` without values and with lambda 1.

        G_t = r_t + discount G_{t+1}

    Args:
        rewards: per-token rewards, [B, T].
        mask: which steps there are, [B, T]; t+1 is the next that is not masked.
        discount: gamma in [0, 1].

    Returns:
        Rewards to go, [B, T], float32 or better; 0 where the mask is not set.

    Example:
        >>> import jax.numpy as jnp
        >>> reward_to_go(jnp.array([[1.0, 2.0, 4.0]]), jnp.ones((1, 3), bool), 0.5).tolist()
        [[3.0, 4.0, 4.0]]
    """
    advantages, _ = gae(rewards, jnp.zeros_like(rewards), mask, discount, 1.0)
    return advantages


def overlong_penalty(length: Int[Array, " B"] | Float[Array, " B"], longest: int, buffer: int) -> Float[Array, " B"]:
    """What is added to the score of a response for coming near the longest length, between 0 and -1.

        0 up to longest - buffer tokens;   (longest - buffer - n) / buffer up to longest;   -1 beyond

    Args:
        length: n, tokens of each response, [B].
        longest: L_m, where the penalty is full, tokens.
        buffer: L_c, over how many tokens before that it grows.

    Returns:
        Penalties, reward units, float32, [B].

    Raises:
        ValueError: the buffer is not between 1 and `longest`.

    Source: DAPO, Yu et al. 2025 (arXiv:2503.14476), eq. 13.

    Example:
        >>> import jax.numpy as jnp
        >>> overlong_penalty(jnp.array([10, 16, 18, 20, 25]), longest=20, buffer=4).tolist()
        [0.0, 0.0, -0.5, -1.0, -1.0]
    """
    if not 1 <= buffer <= longest:
        raise ValueError(f"the buffer of the overlong penalty is {buffer}; choose 1 to {longest}, the longest length")
    return jnp.clip((longest - buffer - length.astype(jnp.float32)) / buffer, -1.0, 0.0)


def spread_groups(rewards: Float[Array, " B"], samples: int) -> Bool[Array, " B"]:
    """Which responses belong to a group whose rewards are not all equal, so that they have something to teach.

    Dynamic sampling leaves the others out. The comparison is exact.

    Args:
        rewards: one reward a response, [B].
        samples: K, responses a prompt.

    Returns:
        True for every response of a group with two different rewards, [B].

    Raises:
        ValueError: K is below 2, or does not divide the number of responses.

    Source: DAPO, Yu et al. 2025 (arXiv:2503.14476), section 3.2.

    Example:
        >>> import jax.numpy as jnp
        >>> spread_groups(jnp.array([1.0, 0.0, 1.0, 1.0]), 2).tolist()
        [True, True, False, False]
    """
    groups = grouped(rewards, samples)
    return jnp.repeat(jnp.any(groups != groups[:, :1], axis=1), samples)


def _on_tokens(per_response: Float[Array, " B"], mask: Bool[Array, "B T"] | Float[Array, "B T"]) -> Float[Array, "B T"]:
    """What each response is given, on all its tokens, and 0 where the mask is not set."""
    return jnp.where(mask.astype(bool), per_response[:, None], 0.0)
