"""Each refusal is one sentence that names the thing and says what to give."""

import math

import numpy as np
import pytest

from rlhf_jax.icl.checks import (
    at_least,
    check_covariance,
    check_length,
    check_probabilities,
    positive,
    power_of_two,
)


@pytest.mark.parametrize("value", [0, -5, 0.5, 10.7, math.nan, math.inf, -math.inf, True, "3", None, np.int64(0)])
def test_what_is_no_whole_number_of_at_least_one_is_refused(value):
    with pytest.raises(ValueError, match=r"^the number of prompts is .*: give a whole number of at least 1\.$"):
        at_least("number of prompts", value, 1)


@pytest.mark.parametrize("value", [3, 3.0, np.int32(3), np.float64(3.0)])
def test_whole_numbers_become_ints(value):
    for found in (at_least("number", value, 3), check_length("length", value)):
        assert found == 3
        assert type(found) is int


def test_a_length_may_be_without_end():
    assert check_length("context length", math.inf) == math.inf
    for value in (0, -5, 0.5, 10.7, math.nan, -math.inf, None):
        with pytest.raises(ValueError, match=r"^the context length is .*: give a whole number of at least 1\.$"):
            check_length("context length", value)


def test_numbers_above_zero():
    assert positive("scale", 2) == 2.0
    assert positive("scale", 0.0, or_zero=True) == 0.0
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"^the scale is {value}: give a number above 0\.$"):
            positive("scale", value)
    with pytest.raises(ValueError, match="give a number of at least 0"):
        positive("scale", -1e-9, or_zero=True)


def test_powers_of_two():
    assert [power_of_two("number of points", value) for value in (2, 8.0, 2**20)] == [2, 8, 2**20]
    for value in (3, 1000):
        with pytest.raises(ValueError, match=rf"^the number of points is {value}: give a power of two\.$"):
            power_of_two("number of points", value)
    for value in (0, 1, -4, 2.5, math.inf):
        with pytest.raises(ValueError, match=r"number of points is .*: give a"):
            power_of_two("number of points", value)


def test_a_covariance_is_made_symmetric_to_the_last_bit():
    found = check_covariance([[1.0, 0.1 + 1e-12], [0.1, 2.0]], 2)
    assert found.dtype == np.float64
    assert (found == found.T).all()
    for matrix, sentence in (
        ([[1.0, 0.0], [0.0]], "no table of numbers: give 2 rows of 2"),
        (np.ones(2), r"has the shape \(2,\): give one of shape \(2, 2\)"),
        ([[1.0, math.nan], [math.nan, 1.0]], "not finite"),
        ([[1.0, 0.1], [0.2, 1.0]], r"entry \(0, 1\) is 0.1 and \(1, 0\) is 0.2"),
        ([[1.0, 2.0], [2.0, 1.0]], "has the eigenvalue -1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check_covariance(matrix, 2)


def test_probabilities_sum_to_one_exactly():
    assert check_probabilities([0.3, 0.7 + 5e-7], 2).sum() == pytest.approx(1.0, abs=1e-15)
    for probabilities, sentence in (
        ([0.5, 0.4], "sum to 0.9"),
        ([1.2, -0.2], "none below 0"),
        ([0.5, math.nan], "give finite ones"),
        ([1.0], "1 class probabilities for 2 classes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check_probabilities(probabilities, 2)
