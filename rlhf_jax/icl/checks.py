"""Refusals: numbers that cannot be, in one sentence that names the thing and the remedy."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np


def at_least(name: str, value: Any, least: int) -> int:
    """A whole number that is large enough.

    Args:
        name: what it is called in the error.
        value: the number; 3.0 is whole.
        least: the smallest that is allowed.

    Raises:
        ValueError: it is too small, not whole, or no number.

    Example:
        >>> at_least("context length N", 0, 1)
        Traceback (most recent call last):
            ...
        ValueError: the context length N is 0: give a whole number of at least 1.
    """
    whole = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not whole or value != int(value) or value < least:
        raise ValueError(f"the {name} is {value}: give a whole number of at least {least}.")
    return int(value)


def check_length(name: str, value: Any) -> int | float:
    """A context length: a whole number of at least 1, or `inf` for a context without end.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, numbers.Real) and value == math.inf:
        return math.inf
    return at_least(name, value, 1)


def positive(name: str, value: Any, or_zero: bool = False) -> float:
    """A finite number above 0 (or of at least 0).

    Raises:
        ValueError: anything else.

    Example:
        >>> positive("noise variance", -1.0, or_zero=True)
        Traceback (most recent call last):
            ...
        ValueError: the noise variance is -1.0: give a number of at least 0.
    """
    if not (math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
        raise ValueError(f"the {name} is {value}: give a number {'of at least' if or_zero else 'above'} 0.")
    return float(value)


def power_of_two(name: str, value: Any) -> int:
    """A power of two, of at least 2.

    Raises:
        ValueError: another number.
    """
    if at_least(name, value, 2) & (int(value) - 1):
        raise ValueError(f"the {name} is {value}: give a power of two.")
    return int(value)


def check_covariance(matrix: Sequence[Sequence[float]] | np.ndarray, dimension: int) -> np.ndarray:
    """The matrix as float64 [d, d], symmetric to the last bit.

    Raises:
        ValueError: it has another shape, entries that are not finite, is not symmetric, or not positive definite.
    """
    at_least("dimension d", dimension, 1)
    try:
        array = np.asarray(matrix, np.float64)
    except ValueError:
        raise ValueError(f"the covariance is no table of numbers: give {dimension} rows of {dimension}.") from None
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
