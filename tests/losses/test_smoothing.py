"""Iterative Data Smoothing: the step of the labels, and where a table of logits and labels ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit

from rlhf_jax.losses.reward import bradley_terry
from rlhf_jax.losses.smoothing import smoothed_labels

LABEL = np.array([1.0, 0.0, 0.3, 0.5], np.float32)
CHOSEN = np.array([2.0, 1.0, -40.0, 0.25], np.float32)
REJECTED = np.array([-1.0, 1.0, 60.0, 0.75], np.float32)
MARGIN = np.array([0.0, 1.0, 0.5, -0.5], np.float32)


@pytest.mark.parametrize("rate", [0, 0.1, 0.7, 1])
def test_labels_step_to_the_models_probabilities(rate):
    for margin in (None, MARGIN):
        arrays = tuple(map(jnp.asarray, (LABEL, CHOSEN, REJECTED)))
        got = smoothed_labels(*arrays, rate, None if margin is None else jnp.asarray(margin))
        delta = CHOSEN - REJECTED - (0.0 if margin is None else margin)
        np.testing.assert_allclose(got, (1 - rate) * LABEL + rate * expit(delta), rtol=1e-6, atol=1e-7)


def test_a_rate_of_0_keeps_every_bit_and_a_rate_of_1_every_label_of_the_model():
    arrays = tuple(map(jnp.asarray, (LABEL, CHOSEN, REJECTED)))
    np.testing.assert_array_equal(smoothed_labels(*arrays, 0.0), LABEL)
    np.testing.assert_array_equal(smoothed_labels(*arrays, 1.0), jax.nn.sigmoid(CHOSEN - REJECTED))


def test_labels_stay_between_0_and_1_to_the_last_bit():
    generator = np.random.default_rng(0)
    delta = jnp.asarray(generator.choice([-200.0, -17.0, 0.0, 17.0, 200.0], 64).astype(np.float32))
    zero = jnp.zeros(64)
    for rate in generator.uniform(0, 1, 40):
        label = jnp.asarray(generator.integers(0, 2, 64).astype(np.float32))
        for _ in range(3):
            label = smoothed_labels(label, delta, zero, float(rate))
            assert float(label.min()) >= 0.0 and float(label.max()) <= 1.0


def test_swapped_responses_have_the_complementary_label():
    arrays = tuple(map(jnp.asarray, (CHOSEN, REJECTED)))
    forward = smoothed_labels(jnp.asarray(LABEL), *arrays, 0.4, jnp.asarray(MARGIN))
    backward = smoothed_labels(1.0 - jnp.asarray(LABEL), *arrays[::-1], 0.4, -jnp.asarray(MARGIN))
    np.testing.assert_allclose(backward, 1.0 - forward, atol=1e-6)


def test_no_gradient_flows_through_the_labels():
    def loss(chosen):
        return smoothed_labels(jnp.asarray(LABEL), chosen, jnp.asarray(REJECTED), 0.5).sum()

    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(CHOSEN)), np.zeros(4))


def test_right_after_a_refresh_at_rate_1_the_loss_has_no_gradient():
    chosen, rejected, margin = map(jnp.asarray, (CHOSEN, REJECTED, MARGIN))
    label = smoothed_labels(jnp.asarray(LABEL), chosen, rejected, 1.0, margin)
    gradient = jax.grad(lambda chosen: bradley_terry(chosen, rejected, margin, label=label).sum())(chosen)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)
    before = jax.grad(lambda chosen: bradley_terry(chosen, rejected, margin, label=jnp.asarray(LABEL)).sum())(chosen)
    assert float(jnp.abs(before).max()) > 0.1


def tabular(compared: int, step: float, ratio: float, steps: int) -> float:
    """The logit of one pair that is compared so often, by the library's loss and labels."""

    def visit(carry, _):
        logit, label = carry

        def loss(logit):
            return bradley_terry(jnp.full(compared, logit), jnp.zeros(compared), label=label).sum()

        logit = logit - step * jax.grad(loss)(logit)
        label = smoothed_labels(label, jnp.full(compared, logit), jnp.zeros(compared), step * ratio)
        return (logit, label), None

    start = jnp.zeros(()), jnp.ones(compared)
    return float(jax.lax.scan(visit, start, length=steps)[0][0])


@pytest.mark.parametrize(("compared", "published"), [(1, 0.154), (4, 0.503), (100, 2.51)])
def test_a_table_ends_where_the_conserved_quantity_says(compared, published):
    """sigma(D) + (b / (a n)) D = y_0 for D_0 = 0, labels 1 and b / a = 3; rare pairs stay near 0."""
    ratio = 3.0
    expected = brentq(lambda logit: expit(logit) + ratio / compared * logit - 1.0, 0.0, 10.0)
    assert expected == pytest.approx(published, abs=6e-3)
    with jax.enable_x64(True):
        errors = [tabular(compared, step, ratio, int(8 / step)) - expected for step in (2e-3, 1e-3)]
    # The identity is of continuous time: the error is first order in the step, so extrapolating to 0 leaves the second.
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.05)
    assert 2 * errors[1] - errors[0] == pytest.approx(0.0, abs=abs(errors[0]) / 20)


def test_without_smoothing_the_logit_of_a_pair_that_was_seen_once_has_no_bound():
    free, smoothed = tabular(1, 0.5, 0.0, 400), tabular(1, 0.5, 1.0, 400)
    assert free > 5.0 and smoothed < 0.6


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_impossible_rates_are_errors(rate):
    with pytest.raises(ValueError, match="the smoothing rate is"):
        smoothed_labels(jnp.ones(1), jnp.zeros(1), jnp.zeros(1), rate)
