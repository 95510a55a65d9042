"""Losses of a policy on pairs of completions, from the log-probabilities of whole completions.

All of them compare the policy with a reference, by h, the gap between the two log-ratios of a pair; their first four
arguments are the same. `chi_squared` has another divergence, `reference_free` the losses that need no reference, and
`preference_choices` makes all of them by name.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.losses.reward import bradley_terry
from rlhf_jax.types import at_least_float32


@chex.dataclass(frozen=True)
class CompletionLogprobs:
    """What a loss may know of B pairs: log pi(completion | prompt) in nats, and the numbers of tokens.

    Attributes:
        chosen: of the preferred completions under the policy, tokens summed, [B].
        rejected: of the other ones, [B].
        chosen_length: tokens of the preferred completions, [B].
        rejected_length: tokens of the other ones, [B].
        reference_chosen: `chosen` under the reference, [B]; None where a loss needs no reference.
        reference_rejected: `rejected` under the reference.
    """

    chosen: Float[Array, " B"]
    rejected: Float[Array, " B"]
    chosen_length: Int[Array, " B"]
    rejected_length: Int[Array, " B"]
    reference_chosen: Float[Array, " B"] | None = None
    reference_rejected: Float[Array, " B"] | None = None


def log_ratio(logprob: Float[Array, " B"], reference_logprob: Float[Array, " B"]) -> Float[Array, " B"]:
    """log pi(y | x) - log ref(y | x), [B], nats; float32 or better, and no gradient flows to the reference."""
    return at_least_float32(logprob) - at_least_float32(jax.lax.stop_gradient(reference_logprob))


def log_ratio_gap(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    reference_chosen: Float[Array, " B"],
    reference_rejected: Float[Array, " B"],
) -> Float[Array, " B"]:
    """How much further the policy raised the chosen completion than the other.

        h = (log pi(w) - log ref(w)) - (log pi(l) - log ref(l))

    Args:
        chosen: log pi(w), the log-probability of each preferred completion with its tokens summed, [B], nats.
        rejected: log pi(l), the same of the other completions.
        reference_chosen: log ref(w); no gradient flows to it.
        reference_rejected: log ref(l); no gradient flows to it.

    Returns:
        [B], nats; float32 for bfloat16 and float16 input.

    Example:
        >>> gap = log_ratio_gap(*(jnp.array([value]) for value in (-10.0, -12.0, -11.0, -11.0)))
        >>> float(gap[0])
        2.0
    """
    return log_ratio(chosen, reference_chosen) - log_ratio(rejected, reference_rejected)


def implicit_reward(
    logprob: Float[Array, " B"], reference_logprob: Float[Array, " B"], beta: Float[Array, ""] | float
) -> Float[Array, " B"]:
    """The reward that a policy stands for, up to a constant a prompt: how far it raised a completion's log-probability.

        r = beta (log pi(y | x) - log ref(y | x))

    Args:
        logprob: log-probability of each completion under the policy, its tokens summed, [B], nats.
        reference_logprob: the same under the reference; no gradient flows to it.
        beta: reward units a nat.

    Returns:
        [B]; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: `beta` is a Python number that is not positive.

    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 5.

    Example:
        >>> print(f"{implicit_reward(jnp.array([-10.0]), jnp.array([-12.0]), 0.1)[0]:.2f}")
        0.20
    """
    check_positive("beta", beta)
    return beta * log_ratio(logprob, reference_logprob)


def dpo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    reference_chosen: Float[Array, " B"],
    reference_rejected: Float[Array, " B"],
    beta: Float[Array, ""] | float,
    label_smoothing: Float[Array, ""] | float = 0.0,
) -> Float[Array, " B"]:
    """Direct preference optimisation: Bradley-Terry on the rewards that the policy stands for.

        delta = beta h;   loss = -(1 - e) log sigma(delta) - e log sigma(-delta)

    Where policy and reference are one, the loss is log 2, and its gradient with respect to the two log-probabilities is
    -beta (1/2 - e) and +beta (1/2 - e). With e > 0 (conservative DPO) it is least where sigma(delta) = 1 - e.

    Args:
        chosen: see `log_ratio_gap`, as the next three.
        rejected: log pi(l).
        reference_chosen: log ref(w).
        reference_rejected: log ref(l).
        beta: how strongly the policy is held to its reference, reward units a nat.
        label_smoothing: e in [0, 1/2): the share of labels that are taken to be wrong.

    Returns:
        Unreduced losses in nats, [B]; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: `beta` is a Python number that is not positive, or `label_smoothing` one outside [0, 1/2).

    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; smoothed labels: Mitchell 2023, "A note on DPO with noisy
    preferences and relationship to IPO".

    Example:
        >>> same, raised = jnp.array([-7.0, -7.0]), jnp.array([-7.0, 3.0])
        >>> loss = dpo_loss(raised, same, same, same, beta=0.1)  # log 2, log(1 + 1/e)
        >>> [f"{x:.4f}" for x in loss]
        ['0.6931', '0.3133']
    """
    chosen_reward = implicit_reward(chosen, reference_chosen, beta)
    rejected_reward = implicit_reward(rejected, reference_rejected, beta)
    return bradley_terry(chosen_reward, rejected_reward, label_smoothing=label_smoothing)


def robust_dpo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    reference_chosen: Float[Array, " B"],
    reference_rejected: Float[Array, " B"],
    beta: Float[Array, ""] | float,
    flip_rate: Float[Array, ""] | float,
) -> Float[Array, " B"]:
    """DPO on labels of which a known share is flipped: its mean over the flips is the DPO loss of the true labels.

        l(z) = -log sigma(beta z);   loss = [(1 - e) l(h) - e l(-h)] / (1 - 2 e)

    Smoothed labels (`dpo_loss`) pull beta h towards log((1 - e) / e); this loss does not, and may fall below 0.

    Args:
        chosen: see `log_ratio_gap`, as the next three.
        rejected: log pi(l).
        reference_chosen: log ref(w).
        reference_rejected: log ref(l).
        beta: see `dpo_loss`.
        flip_rate: e in [0, 1/2): the probability that a label is flipped.

    Returns:
        Unreduced losses in nats, [B]; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: `beta` is a Python number that is not positive, or `flip_rate` one outside [0, 1/2).

    Source: Chowdhury et al. 2024 (arXiv:2403.00409).

    Example:
        >>> pair = [jnp.array([value]) for value in (-10.0, -12.0, -11.0, -11.0)]
        >>> flipped = [pair[place] for place in (1, 0, 3, 2)]
        >>> print(f"{0.8 * robust_dpo_loss(*pair, 0.5, 0.2)[0] + 0.2 * robust_dpo_loss(*flipped, 0.5, 0.2)[0]:.4f}")
        0.3133
    """
    check_positive("beta", beta)
    check_share("flip_rate", flip_rate)
    gap = beta * log_ratio_gap(chosen, rejected, reference_chosen, reference_rejected)
    right, wrong = -jax.nn.log_sigmoid(gap), -jax.nn.log_sigmoid(-gap)
    return ((1.0 - flip_rate) * right - flip_rate * wrong) / (1.0 - 2.0 * flip_rate)


def ipo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    reference_chosen: Float[Array, " B"],
    reference_rejected: Float[Array, " B"],
    beta: Float[Array, ""] | float,
    lengths: tuple[Int[Array, " B"], Int[Array, " B"]] | None = None,
) -> Float[Array, " B"]:
    """Identity preference optimisation: the gap is drawn to 1 / (2 beta), where plain DPO never stops widening it.

        loss = (h - 1 / (2 beta))^2

    Args:
        chosen: see `log_ratio_gap`, as the next three.
        rejected: log pi(l).
        reference_chosen: log ref(w).
        reference_rejected: log ref(l).
        beta: the paper's tau, 1 / nat: the larger, the nearer the policy stays to its reference.
        lengths: tokens of the chosen and of the rejected completions: each log-ratio is divided by its own, which makes
            it a mean over tokens, as TRL does. None: sums, as the paper has it.

    Returns:
        Unreduced losses in nats^2, [B]; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: `beta` is a Python number that is not positive.

    Source: Azar et al. 2023 (arXiv:2310.12036), eq. 17.

    Example:
        >>> pair = [jnp.array([value]) for value in (-10.0, -12.0, -11.0, -11.0)]
        >>> float(ipo_loss(*pair, 0.1)[0]), float(ipo_loss(*pair, 0.1, (jnp.array([2]), jnp.array([4])))[0])
        (9.0, 18.0625)
    """
    check_positive("beta", beta)
    first, second = log_ratio(chosen, reference_chosen), log_ratio(rejected, reference_rejected)
    if lengths is not None:
        first, second = first / tokens(lengths[0], first), second / tokens(lengths[1], second)
    return jnp.square(first - second - 1.0 / (2.0 * beta))


def hinge_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    reference_chosen: Float[Array, " B"],
    reference_rejected: Float[Array, " B"],
    beta: Float[Array, ""] | float,
) -> Float[Array, " B"]:
    """The hinge of SLiC on the gap of DPO: a pair that is 1 / beta nats apart is left alone.

        loss = max(0, 1 - beta h)

    Args:
        chosen: see `log_ratio_gap`, as the next three.
        rejected: log pi(l).
        reference_chosen: log ref(w).
        reference_rejected: log ref(l).
        beta: see `dpo_loss`.

    Returns:
        Unreduced losses, [B]; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: `beta` is a Python number that is not positive.

    Source: Zhao et al. 2023 (arXiv:2305.10425), with the log-ratio to a reference as in Liu et al. 2023
    (arXiv:2309.06657).

    Example:
        >>> chosen, zero = jnp.array([0.0, 1.0, 3.0]), jnp.zeros(3)
        >>> hinge_loss(chosen, zero, zero, zero, 0.5).tolist()
        [1.0, 0.5, 0.0]
    """
    check_positive("beta", beta)
    return jax.nn.relu(1.0 - beta * log_ratio_gap(chosen, rejected, reference_chosen, reference_rejected))


def xpo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    reference_chosen: Float[Array, " B"],
    reference_rejected: Float[Array, " B"],
    reference_sample: Float[Array, " B"],
    beta: Float[Array, ""] | float,
    alpha: Float[Array, ""] | float,
) -> Float[Array, " B"]:
    """Exploratory preference optimisation: DPO that also takes probability from what the reference says.

        loss = -log sigma(beta h) + alpha log pi(y_ref)

    With alpha = 0 it is DPO.

    Args:
        chosen: see `log_ratio_gap`, as the next three; one of each pair was drawn from the policy, the other one from
            the reference.
        rejected: log pi(l).
        reference_chosen: log ref(w).
        reference_rejected: log ref(l).
        reference_sample: log pi(y_ref) of the completion that the reference drew, be it chosen or rejected, [B], nats.
        beta: see `dpo_loss`.
        alpha: weight of optimism, not negative.

    Returns:
        Unreduced losses in nats, [B]; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: `beta` is a Python number that is not positive, or `alpha` one below 0.

    Source: Xie et al. 2024 (arXiv:2405.21046), algorithm 1.

    Example:
        >>> same = jnp.array([-7.0])
        >>> print(f"{xpo_loss(same, same, same, same, same, 0.1, 0.01)[0]:.4f}")  # log 2 - 0.07
        0.6231
    """
    check_not_negative("alpha", alpha)
    pairs = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta)
    return pairs + alpha * at_least_float32(reference_sample)


def tokens(length: Int[Array, " B"], like: Float[Array, " B"]) -> Float[Array, " B"]:
    """Numbers of tokens in the dtype of other values, and at least 1, so that empty rows do not divide by 0."""
    return jnp.maximum(length, 1).astype(like.dtype)


def check_positive(name: str, value: Float[Array, ""] | float) -> None:
    """Raises a ValueError if an option is a Python number that is not positive."""
    if isinstance(value, int | float) and not value > 0:
        raise ValueError(f"{name} is {value!r}; it must be positive")


def check_not_negative(name: str, value: Float[Array, ""] | float) -> None:
    """Raises a ValueError if an option is a Python number below 0."""
    if isinstance(value, int | float) and not value >= 0:
        raise ValueError(f"{name} is {value!r}; it must not be negative")


def check_share(name: str, value: Float[Array, ""] | float) -> None:
    """Raises a ValueError if an option is a Python number outside [0, 1/2)."""
    if isinstance(value, int | float) and not 0 <= value < 0.5:
        raise ValueError(f"{name} is {value!r}; it must be at least 0 and below 1/2")
