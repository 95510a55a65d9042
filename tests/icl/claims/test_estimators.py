"""The claims about estimators, at sizes of seconds; the experiment runs them in full."""

import numpy as np
import pytest

from rlhf_jax.icl.claims.estimators import exact_properties, noise_levels, pool_errors, prefix_errors


def failed(comparisons):
    return [one for one in comparisons if not one.passed]


def test_errors_after_k_examples_are_the_predicted_ones():
    """T20 at d = 6 with a tenth of the prompts; the tolerance is 5 of their standard errors, or 2 % if more."""
    found = prefix_errors(dimension=6, lengths=(2, 10, 16), prompts=2**13, decompositions=2**11, share=0.02)
    assert len(found) == 3 + 3 + 2 * 3
    for one in found:
        assert abs(one.measured - one.predicted) <= max(one.tolerance, 5 * one.standard_error), one
        assert one.standard_error <= 0.04 * one.predicted + 1e-6


def test_exact_properties_hold():
    assert not failed(exact_properties(dimension=4, length=8, pool=256, prompts=16))


def test_pool_errors_are_in_the_order_of_bayes_and_near_the_known_values():
    """Against the values of one pool of 4,096 prompts, within the spread of pools: standard deviations of 20 pools."""
    found = pool_errors(sizes=(1, 8, 64), pools=20, prompts=64, share=0.05)
    assert not failed(found.comparisons)
    assert found.bayes_pool.shape == (3, 20)
    known = {8: (0.088, 1.22), 64: (0.161, 0.88)}
    for size, (pool, fresh) in known.items():
        place = found.sizes.tolist().index(size)
        for values, value in ((found.bayes_pool[place], pool), (found.bayes_fresh[place], fresh)):
            assert abs(values.mean() - value) <= 3 * values.std(ddof=1) * np.sqrt(1 + 1 / 20)


def test_noise_levels_are_in_the_order_of_bayes_and_near_the_known_values():
    """The known values come from 8,000 prompts with standard errors of about 2 %."""
    found = noise_levels(prompts=2**12)
    assert not failed(found.comparisons)
    known = ((found.oracle, 0.332), (found.mixture, 0.349), (found.selected, 0.354), (found.fixed[2], 0.442))
    for values, value in known:
        error = values.std(ddof=1) / np.sqrt(values.size)
        assert values.mean() == pytest.approx(value, abs=3 * np.hypot(error, 0.02 * value))
