"""The claims about Bayes over pools and over noise levels, at sizes of seconds; the experiment runs them in full."""

import numpy as np
import pytest

from rlhf_jax.icl.claims.bayes import at_most_0, noise_levels, pool_errors


def failed(comparisons):
    return [one for one in comparisons if not one.passed]


def test_pool_errors_are_in_the_order_of_bayes_and_near_the_known_values():
    """Against the values of one pool of 4,096 prompts, within the spread of pools: standard deviations of 20 pools."""
    found = pool_errors(sizes=(1, 8, 64), pools=20, prompts=64, share=0.05)
    assert failed(found.comparisons) == []
    assert len(found.comparisons) == 1 + 3 * 2 + 2
    assert found.bayes_pool.shape == (3, 20)
    known = {8: (0.088, 1.22), 64: (0.161, 0.88)}
    for size, (pool, fresh) in known.items():
        place = found.sizes.tolist().index(size)
        for values, value in ((found.bayes_pool[place], pool), (found.bayes_fresh[place], fresh)):
            assert abs(values.mean() - value) <= 3 * values.std(ddof=1) * np.sqrt(1 + 1 / 20)


def test_noise_levels_are_in_the_order_of_bayes_and_near_the_known_values():
    """The known values come from 8,000 prompts with standard errors of about 2 %."""
    found = noise_levels(prompts=2**12)
    assert failed(found.comparisons) == []
    known = ((found.oracle, 0.332), (found.mixture, 0.349), (found.selected, 0.354), (found.fixed[2], 0.442))
    for values, value in known:
        error = values.std(ddof=1) / np.sqrt(values.size)
        assert values.mean() == pytest.approx(value, abs=3 * np.hypot(error, 0.02 * value))
    # Strata of equal size: the variance of their mean is the mean of their variances, over n.
    strata = found.oracle.reshape(4, -1)
    of_oracle = found.comparisons[0].standard_error
    assert of_oracle == pytest.approx(np.sqrt(strata.var(axis=1, ddof=1).mean() / found.oracle.size))
    assert of_oracle < 0.99 * found.oracle.std() / np.sqrt(found.oracle.size)


def test_a_difference_that_is_bounded_by_0_fails_only_above_it():
    below, near, above = (at_most_0("a above b", difference, 0.1, 3.0) for difference in (-5.0, 0.2, 0.4))
    assert (below.measured, near.measured, above.measured) == (0.0, 0.2, 0.4)
    assert (below.passed, near.passed, above.passed) == (True, True, False)


@pytest.mark.parametrize(
    ("claim", "changes", "sentence"),
    [
        (pool_errors, {"pools": 1}, "number of pools is 1"),
        (pool_errors, {"prompts": 1}, "number of prompts a pool is 1"),
        (noise_levels, {"prompts": 4}, "number of prompts a noise level is 1"),
        (noise_levels, {"levels": ()}, "no noise levels"),
    ],
)
def test_claims_that_cannot_be_measured_are_refused(claim, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        claim(**changes)
