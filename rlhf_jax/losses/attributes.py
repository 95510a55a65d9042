"""Losses of reward models that predict a distribution: of ratings (Gaussians, quantiles), or of a reward (from pairs).

Where a rating is not known its loss and its gradient are exactly zero, whatever stands there (NaN included).

Sources: URM (Gaussian attribute heads): Lou et al., arXiv:2410.00847; likelihood weighted by a power of the variance:
Seitzer et al., arXiv:2203.09168; quantile regression: Koenker and Bassett 1978, for reward models Dorka,
arXiv:2409.10164; preferences between Gaussian rewards: PURM, arXiv:2503.22480.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rlhf_jax.types import at_least_float32, wide

LOG_DEVIATION_RANGE = (-5.0, 2.0)
"""Where the logarithm of a predicted standard deviation is kept, in units of normalised ratings."""


def clamp_log_deviation(log_deviation: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The logarithm of a standard deviation kept within `LOG_DEVIATION_RANGE`; beyond it the gradient is zero."""
    return jnp.clip(at_least_float32(log_deviation), *LOG_DEVIATION_RANGE)


def gaussian_likelihood(
    mean: Float[Array, "B K"],
    log_deviation: Float[Array, "B K"],
    ratings: Float[Array, "B K"],
    known: Bool[Array, "B K"],
    beta: float | int = 0.0,
) -> Float[Array, "B K"]:
    """Negative log-likelihood of ratings under Gaussians, less the constant log(2 pi) / 2.

        loss = sigma^(2 beta) [s + (y - mu)^2 / (2 sigma^2)],  sigma = exp(s),  s clamped to [-5, 2]

    The weight in front has no gradient. With beta = 0 (maximum likelihood) a hard rating, whose sigma is large, teaches
    the mean little; with beta = 1 the mean learns as under the squared error. At any beta, the gradient with respect to
    s is zero exactly where sigma^2 = (y - mu)^2: sigma becomes the standard deviation of y given the text.

    Args:
        mean: mu, [B, K].
        log_deviation: s, [B, K].
        ratings: y, [B, K], in the same units.
        known: which ratings there are, [B, K].
        beta: in [0, 1].

    Returns:
        Unreduced losses, [B, K]; 0 where a rating is not known.

    Raises:
        ValueError: `beta` is outside [0, 1].

    Source: likelihood: arXiv:2410.00847; weight: arXiv:2203.09168, eq. 4.

    Example:
        >>> import jax.numpy as jnp
        >>> rating, known = jnp.array([[3.0, jnp.nan]]), jnp.array([[True, False]])
        >>> gaussian_likelihood(jnp.array([[1.0, 1.0]]), jnp.zeros((1, 2)), rating, known).tolist()
        [[2.0, 0.0]]
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta!r}; it must be between 0 (likelihood) and 1 (squared error of the mean).")
    s = clamp_log_deviation(log_deviation)
    loss = s + 0.5 * jnp.square(_residual(mean, ratings, known)) * jnp.exp(-2.0 * s)
    if beta:
        loss = jax.lax.stop_gradient(jnp.exp(2.0 * beta * s)) * loss
    return jnp.where(known, loss, 0.0)


def sampled_regression(
    mean: Float[Array, "B K"],
    log_deviation: Float[Array, "B K"],
    ratings: Float[Array, "B K"],
    known: Bool[Array, "B K"],
    noise: Float[Array, "B K"],
) -> Float[Array, "B K"]:
    """Squared error of a reparameterised sample, `(mu + sigma eps - y)^2`; for comparison, not for uncertainty.

    Its expectation over eps is `(mu - y)^2 + sigma^2`, so that it drives sigma to zero whatever the ratings do.

    Args:
        mean: mu, [B, K].
        log_deviation: s = log sigma, clamped to [-5, 2], [B, K].
        ratings: y, [B, K].
        known: which ratings there are, [B, K].
        noise: eps, standard normal, [B, K].

    Returns:
        Unreduced losses, [B, K]; 0 where a rating is not known.

    Source: the published URM models, arXiv:2410.00847.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 1))
        >>> sampled_regression(one, 0.0 * one, 3.0 * one, one > 0, 0.5 * one).tolist()
        [[2.25]]
    """
    error = jnp.exp(clamp_log_deviation(log_deviation)) * at_least_float32(noise) - _residual(mean, ratings, known)
    return jnp.where(known, jnp.square(error), 0.0)


def pinball(
    quantiles: Float[Array, "B Q"],
    levels: Float[Array, " Q"],
    ratings: Float[Array, " B"],
    known: Bool[Array, " B"],
) -> Float[Array, " B"]:
    """The loss whose minimisers are quantiles, `max(tau (y - q), (tau - 1) (y - q))`, averaged over the levels tau.

    Args:
        quantiles: q, one a level, [B, Q]; they need not be in order.
        levels: tau, in (0, 1), [Q].
        ratings: y, [B].
        known: which ratings there are, [B].

    Returns:
        Unreduced losses, [B]; 0 where a rating is not known.

    Source: Koenker and Bassett 1978; for reward models arXiv:2409.10164.

    Example:
        >>> import jax.numpy as jnp
        >>> one, yes = jnp.ones(1), jnp.array([True])
        >>> loss = pinball(jnp.zeros((1, 1)), jnp.array([0.9]), one, yes), pinball(
        ...     2 * jnp.ones((1, 1)), jnp.array([0.9]), one, yes)
        >>> [f"{float(x[0]):.1f}" for x in loss]
        ['0.9', '0.1']
    """
    levels = at_least_float32(levels)[None, :]
    above = _residual(quantiles, ratings[:, None], known[:, None])
    return jnp.maximum(levels * above, (levels - 1.0) * above).mean(axis=1)


def log_expected_preference(
    difference: Float[Array, "*batch"], variance: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """log E sigma(z) for z ~ N(difference, variance): the log-probability that one Gaussian reward beats another.

    A logistic variable is a Gaussian whose standard deviation is 2 K, with K of Kolmogorov's distribution, so

        E sigma(z) = E_K Phi(difference / sqrt(4 K^2 + variance))

    and one quadrature over K (32 Gauss-Legendre nodes on [0.2, 5]) serves every variance. Its error in the logarithm is
    below 4e-7 for |difference| <= 20 and standard deviations up to 10.4, the most that two clamped ones give; the
    result is in float32 then right to rounding. (32 Gauss-Hermite nodes were measured to err by 0.06 there, and the
    probit formula sigma(difference / sqrt(1 + pi variance / 8)) by 0.017 in the probability and by more than 1 in the
    logarithm.)

    Args:
        difference: mean of the difference of the rewards.
        variance: of the difference; the sum of both variances for independent rewards.

    Returns:
        Log-probabilities, of the shape of `difference`.

    Source: Andrews and Mallows 1974 (scale mixtures); the preference: PURM, arXiv:2503.22480.

    Example:
        >>> import jax.numpy as jnp
        >>> found = jnp.exp(log_expected_preference(jnp.array([1.0, 1.0]), jnp.array([0.0, 4.0])))
        >>> [f"{x:.4f}" for x in found]  # the first is sigma(1)
        ['0.7311', '0.6477']
    """
    dtype = wide(difference, variance)
    difference, variance = difference.astype(dtype)[..., None], variance.astype(dtype)[..., None]
    squares, log_weights = (jnp.asarray(array, dtype) for array in _logistic_mixture())
    shape = (1,) * (difference.ndim - 1) + squares.shape
    terms = jax.scipy.special.log_ndtr(difference * jax.lax.rsqrt(squares.reshape(shape) + variance))
    return jax.nn.logsumexp(terms + log_weights.reshape(shape), axis=-1)


def probabilistic_preference(
    chosen: tuple[Float[Array, " B"], Float[Array, " B"]],
    rejected: tuple[Float[Array, " B"], Float[Array, " B"]],
    margin: Float[Array, " B"] | None = None,
    label: Float[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Negative log-likelihood of preferences between independent Gaussian rewards.

        p = E sigma(r_chosen - r_rejected - margin),  loss = -label log p - (1 - label) log(1 - p)

    Args:
        chosen: mean and log standard deviation (clamped to [-5, 2]) of the preferred responses' rewards, [B] each.
        rejected: of the other ones.
        margin: see `losses.reward.bradley_terry`; None: 0.
        label: probability that the first is the better one, [B]; None: 1.

    Returns:
        Unreduced losses in nats, [B].

    Source: PURM, arXiv:2503.22480.
    """
    (mean, log_deviation), (other_mean, other_log_deviation) = chosen, rejected
    difference = at_least_float32(mean) - at_least_float32(other_mean)
    if margin is not None:
        difference = difference - margin.astype(difference.dtype)
    variance = sum(jnp.exp(2.0 * clamp_log_deviation(s)) for s in (log_deviation, other_log_deviation))
    loss = -log_expected_preference(difference, variance)
    if label is None:
        return loss
    label = label.astype(loss.dtype)
    return label * loss - (1.0 - label) * log_expected_preference(-difference, variance)


def bhattacharyya(
    mean: Float[Array, "*batch"],
    deviation: Float[Array, "*batch"],
    other_mean: Float[Array, "*batch"],
    other_deviation: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """How much two Gaussians overlap: Bhattacharyya's coefficient, the integral of sqrt(p q); 1 if they are the same.

        sqrt(2 sigma tau / (sigma^2 + tau^2)) exp(-(mu - nu)^2 / (4 (sigma^2 + tau^2)))

    Args:
        mean: mu; all four have one shape.
        deviation: sigma, positive.
        other_mean: nu.
        other_deviation: tau, positive.

    Returns:
        In [0, 1], of that shape.

    Example:
        >>> import jax.numpy as jnp
        >>> zero, one = jnp.zeros(1), jnp.ones(1)
        >>> [f"{float(bhattacharyya(zero, one, far * one, one)[0]):.4f}" for far in (0.0, 2.0)]
        ['1.0000', '0.6065']
    """
    both = jnp.square(deviation) + jnp.square(other_deviation)
    return jnp.sqrt(2.0 * deviation * other_deviation / both) * jnp.exp(-jnp.square(mean - other_mean) / (4.0 * both))


def rating_statistics(
    ratings: Float[Array, "N K"], known: Bool[Array, "N K"]
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """Mean and standard deviation of each attribute's known ratings, to train on ratings of unit variance.

    Args:
        ratings: of the training data, [N, K].
        known: which there are, [N, K].

    Returns:
        `(mean, scale)`, [K] each; the scale is 1 for an attribute that does not vary, the mean 0 for one never rated.

    Example:
        >>> import jax.numpy as jnp
        >>> ratings = jnp.array([[1.0, 2.0], [5.0, 2.0], [jnp.nan, 2.0]])
        >>> [array.tolist() for array in rating_statistics(ratings, ~jnp.isnan(ratings))]
        [[3.0, 2.0], [2.0, 1.0]]
    """
    values = jnp.where(known, at_least_float32(ratings), 0.0)
    count = jnp.maximum(known.sum(axis=0), 1).astype(values.dtype)
    mean = values.sum(axis=0) / count
    deviation = jnp.where(known, values - mean[None], 0.0)
    scale = jnp.sqrt(jnp.square(deviation).sum(axis=0) / count)
    # Ratings that are all alike have a standard deviation of rounding noise, not of 0.
    return mean, jnp.where(scale > 1e-6 * jnp.maximum(jnp.abs(mean), 1.0), scale, 1.0)


def _residual(predicted: Array, ratings: Array, known: Array) -> Array:
    """Ratings less predictions; 0, with a gradient of 0, where they are not known."""
    predicted = at_least_float32(predicted)
    return jnp.where(known, jnp.where(known, ratings.astype(predicted.dtype), 0.0) - predicted, 0.0)


@functools.cache
def _logistic_mixture() -> tuple[np.ndarray, np.ndarray]:
    """Squared standard deviations and log weights of the Gaussians that make up a logistic variable, [32] each."""
    low, high = 0.2, 5.0
    nodes, weights = np.polynomial.legendre.leggauss(32)
    nodes = low + 0.5 * (high - low) * (nodes + 1.0)
    terms = np.arange(1, 60)[:, None]
    density = 8 * nodes * ((-1.0) ** (terms + 1) * terms**2 * np.exp(-2 * terms**2 * nodes**2)).sum(axis=0)
    weights = weights * density
    return 4 * nodes**2, np.log(weights / weights.sum())
