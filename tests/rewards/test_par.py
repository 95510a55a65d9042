"""PAR by hand, its bounds, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rewards.par import par
from rlhf_jax.types import Score


def rewards_of(scores, references):
    transform = par()
    return transform.apply(Score(mean=jnp.array(scores)), Score(mean=jnp.array(references)), transform.init())


def test_two_references_a_response_by_hand():
    """sigmoid(0) = 1/2, sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4, sigmoid(log 7) = 7/8."""
    scores = [0.5, -1.0]
    references = [0.5, 0.5 - np.log(3.0), -1.0 + np.log(3.0), -1.0 - np.log(7.0)]
    rewards, state, metrics = rewards_of(scores, references)
    np.testing.assert_allclose(rewards, [(1 / 2 + 3 / 4) / 2, (1 / 4 + 7 / 8) / 2], rtol=1e-6)
    assert state == () and np.isnan(metrics["uncertainty/mean"])
    np.testing.assert_allclose(metrics["rewards/proxy"], -0.25)
    np.testing.assert_allclose(metrics["rewards/transformed"], rewards.mean())


def test_bounded_increasing_and_blind_to_a_constant():
    scores, references = np.linspace(-90.0, 90.0, 7), np.linspace(3.0, -3.0, 14)
    rewards, _, _ = rewards_of(scores, np.zeros(14))
    assert (np.diff(rewards) >= 0).all() and rewards[0] >= 0.0 and rewards[-1] <= 1.0
    assert float(rewards[3]) == 0.5
    moved = rewards_of(scores + 8.0, references + 8.0)[0]
    np.testing.assert_allclose(moved, rewards_of(scores, references)[0], atol=1e-6)


def test_the_gradient_to_a_score_vanishes_after_a_clear_win():
    slope = jax.grad(lambda score: par().apply(Score(mean=score), Score(mean=jnp.zeros(1)), ())[0][0])
    np.testing.assert_allclose(slope(jnp.zeros(1)), [0.25])
    assert float(slope(jnp.full(1, 20.0))[0]) < 1e-8


def test_no_references_or_too_few_are_refused():
    with pytest.raises(ValueError, match="par compares with reference responses: pass their Score"):
        par().apply(Score(mean=jnp.zeros(2)), None, ())
    with pytest.raises(ValueError, match="par has 3 reference responses for 2 responses: give each as many"):
        rewards_of([0.0, 1.0], [0.0, 1.0, 2.0])
