import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from rlhf_jax.laboratory.gates.rare_arm import descend, draw_comparisons, rare_arm


def logits(step_size, rate, steps=4000, reports=2):
    found = np.asarray(descend(jnp.array([0]), jnp.array([1]), steps, step_size, rate, reports))
    return found[:, 0] - found[:, 1]


def test_smoothing_ends_where_the_conserved_quantity_says():
    """One comparison of two arms: dD/dt = 2 a (y - sigma(D)) and dy/dt = b (sigma(D) - y), so y + b D / (2 a) = 1."""
    for step_size, rate in ((0.01, 0.02), (0.02, 0.01)):
        expected = brentq(lambda d, c=rate / (2 * step_size): expit(d) + c * d - 1.0, 0.0, 10.0)
        found = logits(step_size, rate)
        np.testing.assert_allclose(found, expected, rtol=0.02)


def test_likelihood_grows_without_end():
    """dD/dt = 2 a sigma(-D) has the solution D + exp(D) - 1 = 2 a t."""
    found = logits(0.02, 0.0, steps=8000)
    for logit, time in zip(found, (4000, 8000), strict=True):
        expected = brentq(lambda d, t=time: d + np.exp(d) - 1.0 - 2 * 0.02 * t, 0.0, 20.0)
        assert abs(logit - expected) < 0.02


def test_the_last_comparison_is_the_only_one_of_the_third_arm():
    found = draw_comparisons(np.random.default_rng(0), 2000)
    both = np.stack([found.winner, found.loser])
    assert set(both[:, -1]) == {0, 2}
    assert set(both[:, :-1].ravel()) == {0, 1}
    share = np.mean(found.winner[:-1] == 0)
    assert abs(share - expit(found.rewards[0] - found.rewards[1])) < 4 * 0.5 / np.sqrt(2000)


def test_the_stage_has_one_number_a_seed():
    stage = rare_arm(3, often=10, steps=20)
    assert [gate.values.shape for gate in stage.gates] == [(3,)] * 4
