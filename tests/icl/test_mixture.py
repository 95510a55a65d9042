import numpy as np
import pytest

from rlhf_jax.icl.mixture import Mixture, symmetric_root

COVARIANCE = [[1.0, 0.4, 0.1], [0.4, 0.8, -0.2], [0.1, -0.2, 0.6]]


def test_roots_and_inverses_are_those_of_the_covariance():
    mixture = Mixture(3, covariance=COVARIANCE)
    np.testing.assert_allclose(mixture.root @ mixture.root, COVARIANCE, atol=1e-14)
    np.testing.assert_array_equal(symmetric_root(np.array(COVARIANCE)), mixture.root)
    np.testing.assert_allclose(mixture.inverse @ COVARIANCE, np.eye(3), atol=1e-14)
    assert not mixture.isotropic and Mixture(3, covariance=2 * np.eye(3)).isotropic


def test_a_mixture_can_be_compared_and_hashed():
    assert {Mixture(3, covariance=COVARIANCE), Mixture(3, covariance=np.array(COVARIANCE))} == {
        Mixture(3, 2, COVARIANCE, 1.0)
    }
    assert Mixture(3) == Mixture(3, covariance=np.eye(3))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"dimension": 0}, "dimension d is 0: give a whole number of at least 1"),
        ({"dimension": 2, "classes": 1}, "number of classes c is 1: give a whole number of at least 2"),
        ({"dimension": 2, "prior_scale": 0.0}, "prior scale is 0.0: give a number above 0"),
        ({"dimension": 2, "prior_scale": float("nan")}, "prior scale is nan"),
        ({"dimension": 2, "covariance": np.eye(3)}, r"shape \(3, 3\): give one of shape \(2, 2\)"),
        ({"dimension": 2, "covariance": [[1.0, 0.1], [0.2, 1.0]]}, r"not symmetric: entry \(0, 1\) is 0.1"),
        ({"dimension": 2, "covariance": [[1.0, 1.0], [1.0, 1.0]]}, "eigenvalues are all positive"),
        ({"dimension": 2, "covariance": [[1.0, 2.0], [2.0, 1.0]]}, "has the eigenvalue -1"),
        ({"dimension": 2, "covariance": [[1.0, 0.0], [0.0, float("inf")]]}, "not finite"),
    ],
)
def test_impossible_mixtures_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Mixture(**fields)
