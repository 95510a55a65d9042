"""How the prompts of a test may differ from those of training."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlhf_jax.icl.checks import check_covariance, check_probabilities, positive
from rlhf_jax.icl.mixture import Mixture


@dataclasses.dataclass(frozen=True)
class Shift:
    """A change of the law of test prompts; what is None or at its default is as in training.

    Attributes:
        class_probabilities: of context and query alike, [c].
        covariance: Lambda of the test, [d, d], by which x is drawn. The means keep their lengths in the metric of the
            training covariance.
        norm_ratios: each mean is multiplied by its ratio, [c]; ratios that differ break the condition of equal lengths.
        label_noise: probability with which a label of the context is replaced by one of the other classes, uniformly.
        prior_scale: of the means, in place of the mixture's. The theory promises that this one is harmless.
    """

    class_probabilities: Sequence[float | int] | None = None
    covariance: Sequence[Sequence[float]] | np.ndarray | None = None
    norm_ratios: Sequence[float | int] | None = None
    label_noise: float = 0.0
    prior_scale: float | None = None


NO_SHIFT = Shift()


@dataclasses.dataclass(frozen=True)
class Law:
    """The law of test prompts: a mixture with its shift worked in, as arrays.

    Attributes:
        mixture: the mixture of training.
        probabilities: of the classes, float64 [c].
        covariance: Lambda of x given its class, float64 [d, d].
        norm_ratios: of the means, float64 [c].
        label_noise: probability with which a label of the context is replaced.
        prior_scale: standard deviation of each entry of the first mean.
    """

    mixture: Mixture
    probabilities: np.ndarray
    covariance: np.ndarray
    norm_ratios: np.ndarray
    label_noise: float
    prior_scale: float

    @property
    def confusion(self) -> np.ndarray:
        """P(label j shown | true class k), float64 [c true, c shown]."""
        c = self.mixture.classes
        return (1 - self.label_noise) * np.eye(c) + self.label_noise / (c - 1) * (1 - np.eye(c))

    def logits(self, means: np.ndarray, query: np.ndarray) -> np.ndarray:
        """The logits of Bayes under this law, `mu_k' L^-1 x - mu_k' L^-1 mu_k / 2 + log P(k)`, with L its covariance.

        Args:
            means: [n, c, d].
            query: [n, d].

        Returns:
            Float64 [n, c]; without a shift the last two terms are the same for all classes and are left out.
        """
        with np.errstate(divide="ignore"):
            prior = np.log(self.probabilities)
        weighted = np.linalg.solve(self.covariance, np.swapaxes(means, 1, 2)).swapaxes(1, 2)
        scores = np.einsum("ncd,nd->nc", weighted, query)
        if self.unbiased:
            return scores
        return scores - np.einsum("ncd,ncd->nc", weighted, means) / 2 + prior

    @property
    def unbiased(self) -> bool:
        """Whether Bayes' logits have no intercept: uniform classes, equal lengths in the metric of this covariance."""
        proportional = self.covariance * self.mixture.matrix[0, 0] - self.mixture.matrix * self.covariance[0, 0]
        return bool(
            np.ptp(self.probabilities) < 1e-12
            and np.ptp(self.norm_ratios) < 1e-12
            and np.abs(proportional).max() < 1e-12 * np.abs(self.covariance).max() * self.mixture.matrix[0, 0]
        )


def shifted(mixture: Mixture, shift: Shift = NO_SHIFT) -> Law:
    """The law of prompts under a shift.

    Raises:
        ValueError: probabilities that do not sum to 1, a covariance that is not positive definite, ratios that are not
            one a class and above 0, a noise outside [0, 1], or a prior scale that is not above 0.
    """
    c, d = mixture.classes, mixture.dimension
    probabilities = np.full(c, 1.0 / c)
    if shift.class_probabilities is not None:
        probabilities = check_probabilities(shift.class_probabilities, c)
    covariance = mixture.matrix if shift.covariance is None else check_covariance(shift.covariance, d)
    ratios = np.ones(c) if shift.norm_ratios is None else np.asarray(shift.norm_ratios, np.float64)
    if ratios.shape != (c,) or not (ratios > 0).all() or not np.isfinite(ratios).all():
        raise ValueError(f"the norm ratios are {ratios.tolist()}: give {c} numbers above 0, one a class.")
    if not 0 <= shift.label_noise <= 1:
        raise ValueError(f"the label noise is {shift.label_noise}: give a probability.")
    scale = mixture.prior_scale if shift.prior_scale is None else shift.prior_scale
    scale = positive("prior scale of the test", scale)
    return Law(mixture, probabilities, covariance, ratios, float(shift.label_noise), scale)
