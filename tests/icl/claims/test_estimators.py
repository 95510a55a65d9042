"""The claims about estimators, at sizes of seconds; the experiment runs them in full."""

import numpy as np
import pytest

from rlhf_jax.icl.claims.estimators import baselines, exact_properties, prefix_errors


def test_errors_after_k_examples_are_the_predicted_ones():
    """T20 at d = 6 with a tenth of the prompts; the tolerance is 5 of their standard errors, or 2 % if more."""
    found = prefix_errors(dimension=6, lengths=(2, 10, 16), prompts=2**13, decompositions=2**11, share=0.02)
    assert len(found) == 3 + 3 + 2 * 3
    for one in found:
        assert abs(one.measured - one.predicted) <= max(one.tolerance, 5 * one.standard_error), one
        assert one.standard_error <= 0.04 * one.predicted + 1e-6


def test_exact_properties_hold():
    found = exact_properties(dimension=4, length=8, pool=256, prompts=16)
    assert len(found) == 5
    assert [one for one in found if not one.passed] == []


@pytest.fixture(scope="module")
def measured():
    return baselines(dimension=8, lengths=(5, 10, 20), sparsity=1, depth=2, prompts=1024, sweeps=50)


def error_of(measured, task, estimator):
    """Means and standard errors, [lengths]."""
    which = [estimator in name for name in measured.estimators].index(True)
    errors = measured.errors[measured.tasks.index(task), which]
    return errors.mean(axis=-1), errors.std(axis=-1) / np.sqrt(errors.shape[-1])


def test_baselines_meet_what_is_known_of_them(measured):
    """Least squares of linear and sparse functions without noise: 1 - k/d below d, 0 from d on, whatever the scale."""
    assert measured.errors.shape == (6, 5, 3, 1024)
    for task in ("linear", "sparse", "linear, inputs scaled by 3"):
        means, errors = error_of(measured, task, "least squares")
        assert abs(means[0] - (1 - 5 / 8)) <= 4 * errors[0]
        assert means[1:].max() < 1e-6
    # Averaging: E |w_k - w|^2 / d = (d + 1) / k without noise (Isserlis), d = 8.
    means, errors = error_of(measured, "linear", "averaging")
    assert (np.abs(means - 9 / np.array([5, 10, 20])) <= 4 * errors).all()
    means, errors = error_of(measured, "linear, orthogonal query", "ridge")
    assert abs(means[0] - 1) <= 4 * errors[0]
    assert np.isnan(means[1:]).all()
    assert error_of(measured, "linear, repeated query", "least squares")[0][0] < 1e-6


def test_baselines_are_good_at_what_they_are_for(measured):
    least_squares, _ = error_of(measured, "sparse", "least squares")
    lasso, _ = error_of(measured, "sparse", "Lasso")
    assert lasso[0] < 0.8 * least_squares[0]
    neighbours = measured.errors[measured.tasks.index("tree"), -1]
    gain = neighbours[0] - neighbours[-1]  # of more examples, on the same prompts
    assert gain.mean() > 3 * gain.std() / np.sqrt(gain.size)
    assert neighbours[-1].mean() < error_of(measured, "tree", "least squares")[0][-1]


def test_predictions_of_one_prompt_are_those_of_the_estimators_on_the_examples_shown():
    """The neighbours of prompts shown k examples of a longer one: as many neighbours as examples give their mean."""
    found = baselines(
        dimension=2, lengths=(1, 4), sparsity=1, neighbours=50, prompts=2048, noise_variance=1.0, sweeps=1
    )
    means, errors = error_of(found, "linear", "nearest neighbours")
    # The mean of k targets, independent of the query's: (d + (d + 1) / k) / d, d = 2 and noise 1.
    assert (np.abs(means - (2 + 3 / np.array([1, 4])) / 2) <= 4 * errors).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": 1}, "number of prompts is 1"),
        ({"lengths": (0, 4)}, "context length k is 0"),
        ({"lengths": ()}, "no context lengths"),
        ({"neighbours": 0}, "number of neighbours is 0"),
        ({"lasso_penalty": -1.0}, "penalty of the Lasso is -1"),
    ],
)
def test_baselines_that_cannot_be_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        baselines(**{"dimension": 2, "sparsity": 1, "lengths": (2,), "prompts": 4, **changes})
