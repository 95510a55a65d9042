"""What policies of a bandit are compared with, worked out by hand."""

import numpy as np
import pytest

from rlhf_jax.laboratory.bandit import best_of_n, distance, measured, superhf_limit, tilted


def test_exact_policies_worked_by_hand():
    policy, rewards = np.array([[0.5, 0.25, 0.25]]), np.array([[0.0, 2.0, 1.0]])
    np.testing.assert_allclose(best_of_n(policy, rewards, 2), [[1 / 4, 7 / 16, 5 / 16]])
    np.testing.assert_allclose(best_of_n(policy, rewards, 1), policy)
    np.testing.assert_allclose(
        tilted(policy, rewards, 1 / np.log(2)), [[0.5 / 2, 0.25 * 4 / 2, 0.25 * 2 / 2]], rtol=1e-12
    )
    np.testing.assert_allclose(distance(policy, best_of_n(policy, rewards, 2)), [0.25])
    measures = measured(np.array([[0.5, 0.5, 0.0]]), policy, rewards)
    np.testing.assert_allclose([measures.reward, measures.entropy, measures.kl], [[1.0], [np.log(2)], [np.log(2) / 2]])


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_limit_of_superhf_is_a_fixed_point_that_keeps_its_mass(beta):
    generator = np.random.default_rng(0)
    reference, rewards = generator.dirichlet(np.ones(6), 2), generator.normal(size=(2, 6))
    found = superhf_limit(reference, rewards, 4, beta)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose((best_of_n(found, rewards, 4) + beta * reference) / (1 + beta), found, atol=1e-9)
    np.testing.assert_array_equal(superhf_limit(reference, rewards, 4, 0.0).argmax(axis=1), rewards.argmax(axis=1))
