"""Linear regression whose noise level is unknown: Bayes' prediction as a mixture of ridges weighted by evidence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.estimators.options import check_positive
from rlhf_jax.icl.estimators.ridge import ridge_prefixes


class NoiseMixture(NamedTuple):
    """Predictions at every prefix when the noise is one of S levels.

    Attributes:
        ridges: of each level's own ridge, [S, B, K].
        log_evidence: log density of the k targets before, under each level, [S, B, K]; 0 for the first.
        mixture: Bayes' prediction, the ridges weighted by their posterior probabilities, [B, K].
        selected: the ridge of the largest evidence alone, [B, K].
    """

    ridges: Float[Array, "S B K"]
    log_evidence: Float[Array, "S B K"]
    mixture: Float[Array, "B K"]
    selected: Float[Array, "B K"]


def noise_mixture_prefixes(
    inputs: Float[Array, "B K d"],
    targets: Float[Array, "B K"],
    noise_variances: Float[Array, " S"],
    prior_variance: Float[Array, ""] | float,
) -> NoiseMixture:
    """Bayes for `y = w'x + sigma e`, w ~ N(0, prior_variance I), sigma^2 uniform on S known values.

    Given sigma^2 the best prediction is ridge with the penalty sigma^2 / prior_variance, and the evidence of the
    targets is N(y; 0, prior_variance X X' + sigma^2 I), here the product of predictive densities
    N(y_j; x_j'w_j, sigma^2 (1 + leverage_j)): one pass gives all prefixes. This is the algorithm selection of Bai et
    al. 2023 (arXiv 2306.04637) in its ideal form.

    Args:
        inputs: [B, K, d].
        targets: [B, K].
        noise_variances: the values of sigma^2, each > 0, [S], at least one.
        prior_variance: of each entry of w, > 0. Both may be traced.

    Returns:
        The mixture and its parts. The oracle, which knows sigma, is the ridge of the prompt's own level.

    Raises:
        ValueError: no noise variance, or a variance that is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> inputs, targets = jnp.array([[[1.0], [1.0]]]), jnp.array([[2.0, 2.0]])
        >>> found = noise_mixture_prefixes(inputs, targets, jnp.array([1.0, 3.0]), 1.0)
        >>> found.ridges[:, 0, 1].tolist(), 0.5 < float(found.mixture[0, 1]) < 1.0
        ([1.0, 0.5], True)
    """
    at_least("number of noise variances", len(noise_variances), 1)
    check_positive("noise variance", noise_variances)
    check_positive("prior variance", prior_variance)

    def level(variance: Float[Array, ""]) -> tuple[Array, Array]:
        found = ridge_prefixes(inputs, targets, variance / prior_variance)
        spread = variance * (1 + found.leverages)
        density = -((targets - found.predictions) ** 2) / (2 * spread) - jnp.log(2 * jnp.pi * spread) / 2
        return found.predictions, jnp.cumsum(density, axis=1) - density  # of the targets before

    ridges, evidence = jax.lax.map(level, noise_variances)
    shares = jax.nn.softmax(evidence, axis=0)
    best = jnp.argmax(evidence, axis=0)
    return NoiseMixture(
        ridges=ridges,
        log_evidence=evidence,
        mixture=jnp.einsum("sbk,sbk->bk", shares, ridges, precision="highest"),
        selected=jnp.take_along_axis(ridges, best[None], axis=0)[0],
    )
