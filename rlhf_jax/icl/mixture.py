"""The classification task of one prompt: Gaussian classes with a common covariance, and the prior of their means.

A task is c means, one a class. Its labels are uniform, and x | y = k ~ N(mu_k, Lambda). The prior of Shen et al. makes
all means of a task equally long in the metric of Lambda^-1, which makes the logits of Bayes free of an intercept:

    mu_0 ~ N(0, prior_scale^2 I),   mu_k = Lambda^1/2 |Lambda^-1/2 mu_0| v_k,   v_k uniform on the sphere, k >= 1,
    P(y = k | x) = softmax(a)_k,    a_k = mu_k' Lambda^-1 x.

For two classes this is P(y = 1 | x) = sigmoid((mu_1 - mu_0)' Lambda^-1 x).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlhf_jax.icl.checks import at_least, check_covariance, positive


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A family of classification tasks (Shen, Zhou, Yang, Shen 2024, arXiv 2410.11778, sections 2 and 4).

    Attributes:
        dimension: features d, >= 1.
        classes: classes c, >= 2.
        covariance: Lambda, rows of a symmetric positive definite [d, d]; None: the identity. Give nested sequences or
            an array; it is kept as a tuple of tuples, so that a mixture can be compared and hashed.
        prior_scale: standard deviation of each entry of the first mean, > 0. The squared distance between two means
            grows like 2 d prior_scale^2 (for Lambda = I), and Bayes' error falls with it: `s / sqrt(d)` keeps it the
            same in every dimension.

    Raises:
        ValueError: a field out of its range; the sentence names it.

    Example:
        >>> Mixture(3).covariance
        ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
        >>> Mixture(2, covariance=[[1.0, 2.0], [2.0, 1.0]])
        Traceback (most recent call last):
            ...
        ValueError: the covariance has the eigenvalue -1: give one whose eigenvalues are all positive.
    """

    dimension: int
    classes: int = 2
    covariance: Sequence[Sequence[float]] | np.ndarray | None = None
    prior_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dimension", at_least("dimension d", self.dimension, 1))
        object.__setattr__(self, "classes", at_least("number of classes c", self.classes, 2))
        positive("prior scale", self.prior_scale)
        given = np.eye(self.dimension) if self.covariance is None else self.covariance
        matrix = check_covariance(given, self.dimension)
        object.__setattr__(self, "covariance", tuple(tuple(row) for row in matrix.tolist()))

    @property
    def matrix(self) -> np.ndarray:
        """Lambda as an array, float64 [d, d]."""
        return np.array(self.covariance)

    @property
    def root(self) -> np.ndarray:
        """The symmetric square root of Lambda, float64 [d, d]."""
        return symmetric_root(self.matrix)

    @property
    def inverse(self) -> np.ndarray:
        """Lambda^-1 from the eigendecomposition, float64 [d, d]."""
        values, vectors = self.eigen
        return (vectors / values) @ vectors.T

    @property
    def eigen(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues of Lambda, ascending, [d], and its eigenvectors as columns [d, d]."""
        values, vectors = np.linalg.eigh(self.matrix)
        return values, vectors

    @property
    def isotropic(self) -> bool:
        """Whether Lambda is a multiple of the identity, to rounding."""
        values, _ = self.eigen
        return bool(values[-1] - values[0] <= 1e-12 * values[-1])


def symmetric_root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric positive definite R with R R = covariance, float64 [d, d].

    Example:
        >>> symmetric_root(np.diag([4.0, 9.0])).tolist()
        [[2.0, 0.0], [0.0, 3.0]]
    """
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values)) @ vectors.T
