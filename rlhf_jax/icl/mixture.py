"""The classification task of one prompt: Gaussian classes with a common covariance, and the prior of their means.

A task is c means, one a class. Its labels are uniform, and x | y = k ~ N(mu_k, Lambda). The prior of Shen et al. makes
all means of a task equally long in the metric of Lambda^-1, which makes the logits of Bayes free of an intercept:

    mu_0 ~ N(0, prior_scale^2 I),   mu_k = Lambda^1/2 |Lambda^-1/2 mu_0| v_k,   v_k uniform on the sphere, k >= 1,
    P(y = k | x) = softmax(a)_k,    a_k = mu_k' Lambda^-1 x.

For two classes this is P(y = 1 | x) = sigmoid((mu_1 - mu_0)' Lambda^-1 x).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


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
        at_least("dimension d", self.dimension, 1)
        at_least("number of classes c", self.classes, 2)
        if not (math.isfinite(self.prior_scale) and self.prior_scale > 0):
            raise ValueError(f"the prior scale is {self.prior_scale}: give a number above 0.")
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
        values, vectors = self.eigen
        return (vectors * np.sqrt(values)) @ vectors.T

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


def check_covariance(matrix: Sequence[Sequence[float]] | np.ndarray, dimension: int) -> np.ndarray:
    """The matrix as float64 [d, d], symmetric to the last bit.

    Raises:
        ValueError: it has another shape, entries that are not finite, is not symmetric, or not positive definite.
    """
    array = np.asarray(matrix, np.float64)
    if array.shape != (dimension, dimension):
        raise ValueError(f"the covariance has the shape {array.shape}: give one of shape {(dimension, dimension)}.")
    if not np.isfinite(array).all():
        raise ValueError("the covariance has entries that are not finite: give finite ones.")
    if np.abs(array - array.T).max() > 1e-9 * np.abs(array).max():
        row, column = np.unravel_index(np.abs(array - array.T).argmax(), array.shape)
        raise ValueError(
            f"the covariance is not symmetric: entry ({row}, {column}) is {array[row, column]:.6g} and "
            f"({column}, {row}) is {array[column, row]:.6g}; make them equal."
        )
    array = (array + array.T) / 2
    least = float(np.linalg.eigvalsh(array)[0])
    if least <= 1e-12 * np.trace(array):
        raise ValueError(f"the covariance has the eigenvalue {least:.6g}: give one whose eigenvalues are all positive.")
    return array


def check_probabilities(probabilities: Sequence[float] | np.ndarray, classes: int) -> np.ndarray:
    """Class probabilities as float64 [c].

    Raises:
        ValueError: there is not one a class, one is negative or not finite, or they do not sum to 1 (within 1e-6).
    """
    array = np.asarray(probabilities, np.float64)
    if array.shape != (classes,):
        raise ValueError(f"there are {array.size} class probabilities for {classes} classes: give one a class.")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"the class probabilities are {array.tolist()}: give finite ones, none below 0.")
    if abs(array.sum() - 1.0) > 1e-6:
        raise ValueError(f"the class probabilities {array.tolist()} sum to {array.sum():.6g}: they must sum to 1.")
    return array / array.sum()


def at_least(name: str, value: int, least: int) -> None:
    """Refuses a count that is too small or not whole.

    Raises:
        ValueError: naming it.
    """
    if isinstance(value, bool) or int(value) != value or value < least:
        raise ValueError(f"the {name} is {value}: give a whole number of at least {least}.")
