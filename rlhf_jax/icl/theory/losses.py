"""The loss of any W, and what Bayes reaches: expectations over the points of `population.draw`."""

import numpy as np
from scipy.special import entr, logsumexp, softmax

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.shift import NO_SHIFT, Shift
from rlhf_jax.icl.theory.minimiser import POINTS
from rlhf_jax.icl.theory.population import Population, check_model, draw, mirrored


def cross_entropy(
    population: Population, weights: np.ndarray, length: int | float, stratified: bool = False
) -> np.ndarray:
    """Cross-entropy of the model against Bayes' posterior at each point, [n]; its mean is L(W).

        logsumexp(z) - sum_k softmax(a)_k z_k

    The expectation is that of -log P_W(label), with far less variance, because the label is averaged out.

    Args:
        population: draws, with or without a shift.
        weights: W, [d, d].
        length: N; `numpy.inf` for contexts without end.
        stratified: see `minimiser`.

    Raises:
        ValueError: as `population.check_model`.
    """
    z = population.model_logits(weights, length, stratified)
    return logsumexp(z, axis=1) - np.sum(softmax(population.logits, axis=1) * z, axis=1)


def loss(
    mixture: Mixture,
    weights: np.ndarray,
    length: int | float,
    stratified: bool = False,
    points: int = POINTS,
    seed: int = 0,
    shift: Shift = NO_SHIFT,
) -> float:
    """L(W) = E[-log P_W(label | prompt)] for any W on contexts of N examples, under any shift.

    Raises:
        ValueError: as `population.check_model` and `population.draw`.
    """
    weights, length = check_model(mixture, weights, length)
    population = draw(mixture, points, seed, shift)
    pair = (population, mirrored(population))
    return float(np.mean([cross_entropy(one, weights, length, stratified).mean() for one in pair]))


def bayes_loss(mixture: Mixture, points: int = POINTS, seed: int = 0, shift: Shift = NO_SHIFT) -> float:
    """Cross-entropy of Bayes' posterior with itself, E[-sum_k q_k log q_k], q = softmax(a): no W has less."""
    return float(entr(softmax(draw(mixture, points, seed, shift).logits, axis=1)).sum(axis=1).mean())


def bayes_error(mixture: Mixture, points: int = POINTS, seed: int = 0, shift: Shift = NO_SHIFT) -> float:
    """Share of labels that even Bayes' posterior does not guess, 1 - E[max_k softmax(a)_k]."""
    return float(1.0 - softmax(draw(mixture, points, seed, shift).logits, axis=1).max(axis=1).mean())


def gradient(population: Population, weights: np.ndarray, length: int | float, stratified: bool = False) -> np.ndarray:
    """The gradient of L at any W, float64 [d, d]: 0 at W*, and the one that raw prompts give in the mean.

    Derived here, from the logits of `population`, with e_k the noise of the context along W x:

        dz_k / dW = (sum_j (n_jk / N) mu_j) x' + (sqrt(n_k) / N) e_k Lambda W x x' / |W x|_Lambda,
        gradient = E[sum_k (softmax(z) - softmax(a))_k dz_k / dW].

    Args:
        population: draws, with or without a shift.
        weights: W, [d, d]; where W x = 0 the noise, whose mean is 0, is left out.
        length: N >= 1.
        stratified: see `minimiser`.

    Raises:
        ValueError: W as in `population.check_model`, or a length that is no whole number of at least 1.
    """
    law, query = population.law, population.query
    weights, _ = check_model(law.mixture, weights, length)
    length = at_least("context length", length, 1)
    shares = population.counts(length, stratified)
    error = softmax(population.model_logits(weights, length, stratified), axis=1) - softmax(population.logits, axis=1)
    turned = query @ weights.T @ law.covariance
    width = np.sqrt(np.sum(turned * (query @ weights.T), axis=1))
    noise = np.sqrt(shares.sum(axis=1) / length) * population.noise
    left = np.einsum("nk,njk,njd->nd", error, shares, population.means, optimize=True)
    pull = np.sum(error * noise, axis=1)
    left = left + np.divide(pull, width, out=np.zeros_like(pull), where=width > 0)[:, None] * turned
    return left.T @ query / len(query)
