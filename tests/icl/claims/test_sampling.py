"""Sufficient statistics against raw prompts, and the moments of both against all contexts of two examples."""

import itertools

import numpy as np
import pytest

from rlhf_jax.icl.claims.sampling import sampling, sums_moments
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.shift import Shift, shifted

MEANS = np.array([[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0]])
SHIFT = Shift(class_probabilities=(0.5, 0.3, 0.2), covariance=((2.0, 0.3), (0.3, 1.0)), label_noise=0.1)


def test_two_classes_have_the_moments_of_shen_et_al():
    """p = S_1 - S_0 has the mean u / 2 and the covariance (Lambda + m m') / N."""
    covariance = np.array([[1.0, 0.4], [0.4, 0.8]])
    mean, spread = sums_moments(shifted(Mixture(2, 2, covariance)), MEANS[:2], 20)
    np.testing.assert_allclose(mean[1] - mean[0], (MEANS[1] - MEANS[0]) / 2)
    middle = MEANS[:2].mean(axis=0)
    difference = spread[1, :, 1] + spread[0, :, 0] - spread[1, :, 0] - spread[0, :, 1]
    np.testing.assert_allclose(difference, (covariance + np.outer(middle, middle)) / 20)


def test_moments_are_those_of_all_contexts_of_two_examples():
    law = shifted(Mixture(2, 3), SHIFT)
    joint = law.probabilities[:, None] * law.confusion
    first, second = np.zeros((3, 2)), np.zeros((3, 2, 3, 2))
    kinds = list(itertools.product(range(3), range(3)))
    for one, other in itertools.product(kinds, kinds):
        probability = joint[one] * joint[other]
        signal, noise = np.zeros((3, 2)), np.zeros((3, 2, 3, 2))
        for true, shown in (one, other):
            signal[shown] += MEANS[true] / 2
            noise[shown, :, shown] += law.covariance / 4
        first += probability * signal
        second += probability * (np.einsum("kd,le->kdle", signal, signal) + noise)
    mean, covariance = sums_moments(law, MEANS, 2)
    np.testing.assert_allclose(mean, first)
    np.testing.assert_allclose(covariance, second - np.einsum("kd,le->kdle", first, first), atol=1e-12)


def test_fixed_numbers_leave_the_noise_of_the_inputs():
    mean, covariance = sums_moments(shifted(Mixture(2, 3)), MEANS, 9, stratified=True)
    np.testing.assert_allclose(mean, MEANS / 3)
    np.testing.assert_allclose(covariance, np.einsum("kl,de->kdle", np.eye(3), np.eye(2)) / 27, atol=1e-15)
    with pytest.raises(ValueError, match="the context length N is 0"):
        sums_moments(shifted(Mixture(2, 3)), MEANS, 0)


def test_raw_prompts_and_sufficient_statistics_have_one_law():
    rows = sampling(count=3000)
    assert len(rows) == 4 * 6 + 2
    assert [row for row in rows if not row.passed] == []


def test_another_law_does_not_pass(monkeypatch):
    """Statistics of a context of 25 examples are told from those of 20."""
    from rlhf_jax.icl.claims import sampling as module

    draw = module.draw_statistics
    monkeypatch.setattr(module, "draw_statistics", lambda key, law, means, length, *rest: draw(key, law, means, 25))
    rows = module.both_forms("other", shifted(Mixture(2)), 20, 8000)
    failed = {row.quantity for row in rows if not row.passed}
    assert "covariance of S, exact, other, furthest entry" in failed
    assert not any("raw, other" in quantity for quantity in failed)
