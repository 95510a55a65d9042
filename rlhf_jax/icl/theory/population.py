"""Expectations over tasks, contexts and queries of a mixture: one set of quasi-random points, whatever d, c and Lambda.

With S_k = (1/N) sum_i 1{y_i = k} x_i the logits of the reduced model are z_k = S_k' W x. Given the task, the query and
the label counts, S_k is Gaussian, so its projection on W x is one number a class:

    z_k = (1/N) sum_j n_jk mu_j' W x + (sqrt(n_k) / N) sqrt(x' W' Lambda W x) e_k,     e_k ~ N(0, 1),

n_jk counting the examples of class j that are shown as k, n_k = sum_j n_jk. No context is ever drawn. The points are
scrambled Sobol points (c d + d + 2 c of them a draw), so that averages of smooth functions converge almost like 1/n;
repeat with other seeds for a standard error.
"""

import dataclasses

import numpy as np

from rlhf_jax.icl.checks import at_least, check_length, power_of_two
from rlhf_jax.icl.mixture import Mixture, symmetric_root
from rlhf_jax.icl.shift import NO_SHIFT, Law, Shift, shifted


@dataclasses.dataclass(frozen=True)
class Population:
    """Draws of a task, a query, and what is random of a context of any length.

    Attributes:
        law: the law that they are drawn from.
        means: the task, float64 [n, c, d].
        query: float64 [n, d].
        label: its class, int [n].
        logits: those of Bayes, float64 [n, c].
        noise: e_k above, float64 [n, c].
        uniform: what the label counts are made of, float64 [n, c - 1].
        seed: of the draws.
    """

    law: Law
    means: np.ndarray
    query: np.ndarray
    label: np.ndarray
    logits: np.ndarray
    noise: np.ndarray
    uniform: np.ndarray
    seed: int

    def counts(self, length: int, stratified: bool = False) -> np.ndarray:
        """How many examples of class j are shown as class k, over the length: n_jk / N, float64 [n, c, c].

        Args:
            length: examples in the context, N >= 1.
            stratified: as many of each class as its probability says, N / c for uniform classes, instead of random.

        Raises:
            ValueError: a length that is no whole number of at least 1.
        """
        length = at_least("context length", length, 1)
        probabilities, c = self.law.probabilities, len(self.law.probabilities)
        count = len(self.label)
        if stratified:
            by_class = np.broadcast_to(probabilities * length, (count, c))
        else:
            left, mass, columns = np.full(count, length), 1.0, []
            for k in range(c - 1):
                share = min(1.0, probabilities[k] / mass) if mass > 0 else 0.0
                columns.append(_binomial(self.uniform[:, k], left, share))
                left, mass = left - columns[-1], mass - probabilities[k]
            by_class = np.stack([*columns, left], axis=1)
        if self.law.label_noise == 0:
            return by_class[:, :, None] * np.eye(c) / length
        if stratified:
            return by_class[:, :, None] * self.law.confusion / length
        rng = np.random.default_rng([self.seed, length])
        return rng.multinomial(by_class.astype(np.int64), self.law.confusion[None]) / length

    def model_logits(self, weights: np.ndarray, length: int | float, stratified: bool = False) -> np.ndarray:
        """Logits z of the reduced model with the matrix W on contexts of N examples, float64 [n, c].

        Args:
            weights: W, [d, d].
            length: N, or `numpy.inf` for what is left of the logits when the context grows without end.
            stratified: see `counts`.

        Raises:
            ValueError: as `check_model`.
        """
        weights, length = check_model(self.law.mixture, weights, length)
        turned = self.query @ weights.T
        if np.isinf(length):
            shares = np.broadcast_to(
                self.law.probabilities[:, None] * self.law.confusion, (1, *self.law.confusion.shape)
            )
        else:
            shares = self.counts(length, stratified)
        along = np.einsum("ncd,nd->nc", self.means, turned)
        signal = np.einsum("njk,nj->nk", np.broadcast_to(shares, (len(along), *shares.shape[1:])), along)
        if np.isinf(length):
            return signal
        width = np.sqrt(np.einsum("nd,de,ne->n", turned, self.law.covariance, turned))
        return signal + np.sqrt(shares.sum(axis=1) / length) * width[:, None] * self.noise


def check_model(mixture: Mixture, weights: np.ndarray, length: int | float) -> tuple[np.ndarray, int | float]:
    """The matrix W as float64 [d, d], and a context length: a whole number of at least 1, or `numpy.inf`.

    Raises:
        ValueError: W has another shape or entries that are not finite, or the length is something else.
    """
    array, shape = np.asarray(weights, np.float64), (mixture.dimension, mixture.dimension)
    if array.shape != shape:
        raise ValueError(f"the weights have the shape {array.shape}: give a matrix of shape {shape}.")
    if not np.isfinite(array).all():
        raise ValueError("the weights have entries that are not finite: give finite ones.")
    return array, check_length("context length", length)


def draw(mixture: Mixture, points: int = 2**16, seed: int = 0, shift: Shift = NO_SHIFT) -> Population:
    """Draws tasks and queries.

    Args:
        mixture: the family of tasks.
        points: draws, a power of two.
        seed: of the scrambling: two seeds give independent estimates.
        shift: how the test differs from training.

    Raises:
        ValueError: `points` is no power of two, or the shift is impossible (see `shift.shifted`).
    """
    from scipy import stats

    points = power_of_two("number of points", points)
    law = shifted(mixture, shift)
    d, c = mixture.dimension, mixture.classes
    sobol = stats.qmc.Sobol(c * d + d + 2 * c, scramble=True, rng=np.random.default_rng(seed))
    uniform = np.clip(sobol.random_base2(points.bit_length() - 1), 1e-15, 1 - 1e-15)
    choice, uniform = uniform[:, 0], uniform[:, 1:]
    gaussian = stats.norm.ppf(uniform[:, : c * d + d + c])
    directions = gaussian[:, : c * d].reshape(points, c, d)
    root = mixture.root
    first = law.prior_scale * np.linalg.solve(root, directions[:, 0].T).T  # whitened by the training covariance
    lengths = np.linalg.norm(first, axis=1)[:, None, None]
    others = lengths * directions[:, 1:] / np.linalg.norm(directions[:, 1:], axis=2, keepdims=True)
    means = np.concatenate([first[:, None], others], axis=1) @ root * law.norm_ratios[:, None]
    label = np.minimum(np.searchsorted(np.cumsum(law.probabilities), choice, side="right"), c - 1)
    query = means[np.arange(points), label] + gaussian[:, c * d : c * d + d] @ symmetric_root(law.covariance)
    return Population(
        law=law,
        means=means,
        query=query,
        label=label,
        logits=law.logits(means, query),
        noise=gaussian[:, c * d + d :],
        uniform=uniform[:, c * d + d + c :],
        seed=seed,
    )


def mirrored(population: Population) -> Population:
    """The same tasks and queries with the noise of the context turned round: of equal law, given task and query.

    In the mean of both, what is odd in the noise cancels. What remains of order 1 / N is what the theory is about, so
    that for N >= 1000 the pair has hundreds of times less variance than two independent draws.
    """
    return dataclasses.replace(population, noise=-population.noise, uniform=1.0 - population.uniform)


def _binomial(uniform: np.ndarray, trials: np.ndarray, share: float) -> np.ndarray:
    """The number of successes whose distribution function first reaches `uniform`, int [n]."""
    from scipy import stats

    if np.ptp(trials) == 0:
        table = stats.binom.cdf(np.arange(trials[0] + 1), trials[0], share)
        return np.minimum(np.searchsorted(table, uniform), trials)
    return stats.binom.ppf(uniform, trials, share).astype(np.int64)
