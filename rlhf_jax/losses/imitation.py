"""Imitation of good samples: which responses to a prompt are kept, how much each weighs, and their likelihood.

The optimum of reward less a KL penalty is known, pi*(y | x) = ref(y | x) exp(r / lambda) / Z(x). Maximum likelihood of
samples that are weighted as pi* would draw them approaches it without ratios, clipping or a value net (VAR); the limits
of the weights are supervised fine-tuning (lambda to infinity) and the imitation of the best sample (lambda to 0: RAFT,
and best-of-n distillation where samples come from the reference).

Everywhere the K responses to a prompt follow each other.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.losses.reduce import mean
from rlhf_jax.types import at_least_float32

Mask = Bool[Array, "B T"] | Float[Array, "B T"]


def equal_weights(
    rewards: Float[Array, " B"], samples: int, log_ratio: Float[Array, " B"] | None = None
) -> Float[Array, " B"]:
    """The weight 1 / K for each of the K responses to a prompt, whatever their rewards.

    Args:
        rewards: one a response, [B].
        samples: K, responses a prompt.
        log_ratio: not read; it stands here so that the ways to weigh are interchangeable.

    Returns:
        Weights, [B], float32 or better.

    Raises:
        ValueError: K is below 1, or does not divide the number of responses.

    Example:
        >>> equal_weights(jnp.array([3.0, -1.0, 7.0, 7.0]), 2).tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    del log_ratio
    check_groups(len(rewards), samples)
    return jnp.full_like(at_least_float32(rewards), 1.0 / samples)


def var_weights(
    rewards: Float[Array, " B"],
    samples: int,
    temperature: Float[Array, ""] | float | int,
    log_ratio: Float[Array, " B"] | None = None,
    scope: Literal["group", "batch"] = "group",
) -> Float[Array, " B"]:
    """Weights that turn samples from a proposal mu into samples from the optimum of reward less lambda KL (VAR).

        w_k = (ref_k / mu_k) exp(r_k / lambda) / Z,   Z = sum_j (ref_j / mu_j) exp(r_j / lambda)

    They are at least 0 and sum to 1 over the K responses to a prompt. Estimated from K samples, Z is biased towards the
    reference; the bias vanishes as K grows. What belongs in `log_ratio` depends on where the samples came from:

    | proposal mu                              | log (ref / mu)                        |
    |------------------------------------------|---------------------------------------|
    | the reference itself                     | 0: None                               |
    | an older policy, or filtered sampling    | `importance_log_ratio`                |
    | not known (answers found in a data set)  | `uniform_log_ratio`                   |

    With samples of the reference, weights ref exp(r / lambda) would count the reference twice.

    Args:
        rewards: one a response, [B].
        samples: K, responses a prompt.
        temperature: lambda > 0, reward units a nat: large gives equal weights, small all weight to the best of a group.
        log_ratio: log ref(y | x) - log mu(y | x) up to a constant a prompt, [B], nats; None: 0.
        scope: over which responses Z runs. "group": those to the same prompt; a constant added to the rewards of a
            prompt changes nothing. "batch": all of them, after which the weights *average* 1 / K; that takes rewards
            to be comparable across prompts, so subtract each prompt's mean first where they are not.

    Returns:
        Weights, [B], float32 or better; no gradient flows through them.

    Raises:
        ValueError: the temperature is a Python number that is not positive, the scope is unknown, K is below 1, or does
            not divide the number of responses.

    Source: VAR (arXiv:2502.11026); with proposals other than the reference this is self-normalised importance sampling.

    Example:
        >>> rewards = jnp.log(jnp.array([1.0, 3.0, 2.0, 2.0]))
        >>> [f"{w:.3f}" for w in var_weights(rewards, 2, temperature=1.0)]
        ['0.250', '0.750', '0.500', '0.500']
        >>> [f"{w:.3f}" for w in var_weights(rewards, 2, temperature=1.0, scope="batch")]
        ['0.250', '0.750', '0.500', '0.500']
        >>> [f"{w:.3f}" for w in var_weights(rewards, 2, temperature=0.5)]
        ['0.100', '0.900', '0.500', '0.500']
    """
    if isinstance(temperature, float | int) and temperature <= 0:
        raise ValueError(f"the temperature of VAR's weights is {temperature!r}; it must be positive.")
    if scope not in ("group", "batch"):
        raise ValueError(f"unknown scope {scope!r} of VAR's weights: choose group or batch.")
    groups = check_groups(len(rewards), samples)
    rewards = at_least_float32(rewards)
    logits = rewards / jnp.asarray(temperature, rewards.dtype)
    if log_ratio is not None:
        logits = logits + log_ratio.astype(logits.dtype)
    if scope == "batch":
        weights = jax.nn.softmax(logits) * groups
    else:
        weights = jax.nn.softmax(logits.reshape(groups, samples), axis=1).reshape(-1)
    return jax.lax.stop_gradient(weights)


def importance_log_ratio(
    reference_logprob: Float[Array, "B T"], proposal_logprob: Float[Array, "B T"], mask: Mask
) -> Float[Array, " B"]:
    """log ref(y | x) - log mu(y | x) of responses whose proposal mu is known, the tokens summed.

    Args:
        reference_logprob: of the tokens under the reference, [B, T], nats.
        proposal_logprob: of the tokens under what they were drawn from, [B, T], nats.
        mask: which tokens count, [B, T].

    Returns:
        [B], float32 or better.

    Example:
        >>> reference, proposal = jnp.array([[-1.0, -2.0]]), jnp.array([[-0.5, jnp.nan]])
        >>> importance_log_ratio(reference, proposal, jnp.array([[True, False]])).tolist()
        [-0.5]
    """
    return _row_sums(at_least_float32(reference_logprob) - at_least_float32(proposal_logprob), mask)


def uniform_log_ratio(
    reference_logprob: Float[Array, "B T"], mask: Mask, divisor: Float[Array, ""] | float | int | None = None
) -> Float[Array, " B"]:
    """log ref(y | x) over a divisor, for responses of unknown origin: the proposal is uniform over those there are.

    Sums over whole responses differ by tens of nats, and would put all weight on one response: hence the divisor.

    Args:
        reference_logprob: of the tokens under the reference, [B, T], nats.
        mask: which tokens count, [B, T].
        divisor: of the sums, positive; None: the number of tokens of each response, which makes them averages.

    Returns:
        [B], float32 or better; 0 for an empty response.

    Raises:
        ValueError: the divisor is a Python number that is not positive.

    Example:
        >>> logprob, mask = jnp.array([[-1.0, -3.0], [-4.0, -9.0]]), jnp.array([[True, True], [True, False]])
        >>> uniform_log_ratio(logprob, mask).tolist(), uniform_log_ratio(logprob, mask, 4.0).tolist()
        ([-2.0, -4.0], [-1.0, -1.0])
    """
    if isinstance(divisor, float | int) and divisor <= 0:
        raise ValueError(f"the divisor of the reference's log-probabilities is {divisor!r}; it must be positive.")
    totals = _row_sums(at_least_float32(reference_logprob), mask)
    if divisor is None:
        return totals / jnp.maximum(mask.astype(totals.dtype).sum(axis=1), 1.0)
    return totals / jnp.asarray(divisor, totals.dtype)


def top_rows(
    rewards: Float[Array, " B"], samples: int, keep: int, scope: Literal["group", "batch"] = "group"
) -> Int[Array, " kept"]:
    """The rows of the best responses: exactly `keep` of each group, or as many of the whole batch.

    Of equal rewards the earlier response is kept, and one that is NaN comes last. A fixed number of rows keeps shapes
    fixed, so that only these rows need go through a model.

    Args:
        rewards: one a response, [B].
        samples: K, responses a prompt.
        keep: how many of K, 1 to K.
        scope: "group": the best to each prompt; "batch": the best B keep / K of all, which takes rewards to be
            comparable across prompts.

    Returns:
        Row numbers in ascending order, int32 [B keep / K], so that kept rows of a prompt follow each other.

    Raises:
        ValueError: `keep` is not between 1 and K, the scope is unknown, or K does not divide the number of responses.

    Source: RAFT (Dong et al. 2023, arXiv:2304.06767), SuperHF (Mukobi et al. 2023, arXiv:2310.16763).

    Example:
        >>> rewards = jnp.array([0.5, 2.0, 2.0, 9.0, 8.0, 7.0])
        >>> top_rows(rewards, 3, 1).tolist(), top_rows(rewards, 3, 1, scope="batch").tolist()
        ([1, 3], [3, 4])
    """
    groups = check_groups(len(rewards), samples)
    if not 1 <= keep <= samples:
        raise ValueError(f"{keep} of {samples} responses cannot be kept: keep at least 1 and at most {samples}.")
    if scope not in ("group", "batch"):
        raise ValueError(f"unknown scope {scope!r} of the responses to keep: choose group or batch.")
    if keep == samples:
        return jnp.arange(len(rewards), dtype=jnp.int32)
    blocks = groups if scope == "group" else 1
    size, kept = len(rewards) // blocks, groups * keep // blocks
    ranked = jnp.where(jnp.isnan(rewards), -jnp.inf, rewards)  # a sort takes NaN for the largest
    best = jnp.argsort(ranked.reshape(blocks, size), axis=1, stable=True, descending=True)[:, :kept]
    first = jnp.arange(blocks, dtype=best.dtype)[:, None] * size
    return (jnp.sort(best, axis=1) + first).reshape(-1).astype(jnp.int32)


def weighted_likelihood_loss(
    logprob: Float[Array, "B T"],
    weights: Float[Array, " B"],
    mask: Mask,
    samples: int,
    reduction: str = "sequence_sum",
    whole: Bool[Array, "N T"] | Float[Array, "N T"] | None = None,
) -> Float[Array, ""]:
    """Negative log-likelihood of weighted responses, averaged over prompts: the loss of everything that imitates.

        loss = - mean over prompts of sum_k w_k L_k,   L_k = sum_t log pi(y_t | x, y_<t)

    That is `sequence_sum`. `sequence_mean` has L_k / n_k instead, n_k the length. With weights 1 / K it is supervised
    fine-tuning under the same reduction. With VAR's weights and `sequence_sum` it is the cross-entropy to the optimum
    pi*, at which its expected gradient is 0.

    Args:
        logprob: log-probabilities of the tokens under the policy, [B, T], nats.
        weights: of the responses, [B], 1 for a prompt in all; no gradient flows to them.
        mask: which tokens count, [B, T].
        samples: K, responses a prompt that the weights are spread over (of those kept).
        reduction: how the losses of tokens are averaged over responses, a name of `losses.reduce` that needs no
            constant; K w_k multiplies each token's.
        whole: mask of the batch that the rows are a part of, see `losses.reduce.mean`.

    Returns:
        A float scalar, nats.

    Example:
        >>> logprob, mask = jnp.array([[-1.0, -1.0], [-4.0, -9.0]]), jnp.array([[True, True], [True, False]])
        >>> weights = jnp.array([0.25, 0.75])
        >>> float(weighted_likelihood_loss(logprob, weights, mask, 2))  # 2 / 4 + 3 * 4 / 4
        3.5
        >>> float(weighted_likelihood_loss(logprob, weights, mask, 2, "sequence_mean"))
        3.25
    """
    shares = jax.lax.stop_gradient(at_least_float32(weights)) * samples
    losses = -at_least_float32(logprob)
    return mean(losses * shares.astype(losses.dtype)[:, None], mask, reduction, whole=whole)


def effective_samples(weights: Float[Array, " B"], samples: int) -> Float[Array, " G"]:
    """How many equally weighted responses the weights of each prompt are worth, from 1 to K.

        (sum_k w_k)^2 / sum_k w_k^2

    Below 2 most prompts learn from one response: raise lambda, or draw more.

    Args:
        weights: of the responses, [B].
        samples: K, responses a prompt.

    Returns:
        [B / K]; 0 for a prompt whose weights are all 0, as those of a batch may be.

    Example:
        >>> effective_samples(jnp.array([0.5, 0.5, 1.0, 0.0]), 2).tolist()
        [2.0, 1.0]
    """
    weights = at_least_float32(weights).reshape(check_groups(len(weights), samples), samples)
    # Shares of the largest weight, so that no square underflows.
    shares = weights / jnp.maximum(weights.max(axis=1, keepdims=True), jnp.finfo(weights.dtype).tiny)
    squares = jnp.square(shares).sum(axis=1)
    return jnp.square(shares.sum(axis=1)) / jnp.where(squares > 0, squares, 1.0)


def check_groups(rows: int, samples: int) -> int:
    """The number of prompts that so many responses belong to.

    Raises:
        ValueError: K is below 1, or does not divide the number of responses.

    Example:
        >>> check_groups(6, 3)
        2
    """
    if samples < 1 or rows % samples:
        raise ValueError(f"{rows} responses are no groups of {samples}: give {samples} of each prompt, at least 1.")
    return rows // samples


def _row_sums(values: Float[Array, "B T"], mask: Mask) -> Float[Array, " B"]:
    weights = mask.astype(values.dtype)
    return (jnp.where(weights != 0, values, 0.0) * weights).sum(axis=1)
