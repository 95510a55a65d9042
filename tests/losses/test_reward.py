"""The Bradley-Terry loss of reward models, and preference accuracy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.reward import bradley_terry, preference_accuracy

CHOSEN = np.array([1.5, -0.25, 0.0, 3.0])
REJECTED = np.array([0.5, 0.75, 0.0, -2.0])
MARGIN = np.array([0.0, 0.5, 1.0, 2.0])


def numpy_loss(chosen, rejected, margin, smoothing, centring):
    delta = chosen - rejected - margin
    positive, negative = np.logaddexp(0, -delta), np.logaddexp(0, delta)
    return (1 - smoothing) * positive + smoothing * negative + centring * (chosen + rejected) ** 2


def test_values_worked_by_hand():
    got = bradley_terry(jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(got, [np.log(2), np.log(1 + np.e)], rtol=1e-6)
    centred = bradley_terry(jnp.array([1.0]), jnp.array([1.0]), centring=0.01)
    np.testing.assert_allclose(centred, [np.log(2) + 0.04], rtol=1e-6)


@pytest.mark.parametrize(("smoothing", "centring"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.5)])
def test_loss_equals_numpy_with_and_without_margin(smoothing, centring):
    with jax.enable_x64(True):
        chosen, rejected, margin = jnp.asarray(CHOSEN), jnp.asarray(REJECTED), jnp.asarray(MARGIN)
        for given, number in ((None, 0.0), (margin, MARGIN)):
            got = bradley_terry(chosen, rejected, given, smoothing, centring)
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, numpy_loss(CHOSEN, REJECTED, number, smoothing, centring), rtol=1e-12)


def test_gradient_is_the_missing_probability_and_finite_differences_agree():
    with jax.enable_x64(True):
        chosen, rejected, margin = jnp.asarray(CHOSEN), jnp.asarray(REJECTED), jnp.asarray(MARGIN)
        gradients = jax.grad(lambda c, r: jnp.sum(bradley_terry(c, r, margin)), argnums=(0, 1))(chosen, rejected)
        missing = 1 / (1 + np.exp(CHOSEN - REJECTED - MARGIN))
        np.testing.assert_allclose(gradients[0], -missing, rtol=1e-12)
        np.testing.assert_allclose(gradients[1], missing, rtol=1e-12)

        def loss(c):
            return bradley_terry(c, rejected, margin, 0.1, 0.05)

        gradient = jax.grad(lambda c: jnp.sum(loss(c)))(chosen)
        np.testing.assert_allclose(gradient, (loss(chosen + 1e-6) - loss(chosen - 1e-6)) / 2e-6, rtol=1e-7)


def test_only_centring_sees_a_constant_added_to_both():
    chosen, rejected = jnp.asarray(CHOSEN, jnp.float32), jnp.asarray(REJECTED, jnp.float32)
    np.testing.assert_array_equal(bradley_terry(chosen + 4.0, rejected + 4.0), bradley_terry(chosen, rejected))
    pull = jax.grad(lambda c: jnp.sum(bradley_terry(chosen + c, rejected + c, centring=0.01)))(jnp.float32(0.0))
    np.testing.assert_allclose(pull, 0.04 * (CHOSEN + REJECTED).sum(), rtol=1e-5)


def test_smoothed_labels_pull_confident_pairs_back():
    gradient = jax.grad(lambda c: jnp.sum(bradley_terry(c, jnp.zeros(1), label_smoothing=0.1)))
    np.testing.assert_allclose(gradient(jnp.array([np.log(9.0)], jnp.float32)), 0.0, atol=1e-6)
    assert float(gradient(jnp.array([4.0]))[0]) > 0


LABEL = np.array([1.0, 0.0, 0.3, 0.75])


def test_soft_labels_compose_with_smoothing_and_the_gradient_is_probability_less_label():
    with jax.enable_x64(True):
        chosen, rejected, margin, label = map(jnp.asarray, (CHOSEN, REJECTED, MARGIN, LABEL))
        for smoothing in (0.0, 0.2):
            target = (1 - smoothing) * LABEL + smoothing * (1 - LABEL)
            delta = CHOSEN - REJECTED - MARGIN

            def losses(chosen):
                return bradley_terry(chosen, rejected, margin, smoothing, label=label)  # noqa: B023

            expected = target * np.logaddexp(0, -delta) + (1 - target) * np.logaddexp(0, delta)
            np.testing.assert_allclose(losses(chosen), expected, rtol=1e-12)
            gradient = jax.grad(lambda chosen: losses(chosen).sum())(chosen)
            np.testing.assert_allclose(gradient, 1 / (1 + np.exp(-delta)) - target, rtol=1e-12, atol=1e-15)


def test_a_certain_label_is_no_label_to_the_bit():
    chosen, rejected, margin = (jnp.asarray(values, jnp.float32) for values in (CHOSEN, REJECTED, MARGIN))
    for smoothing in (0.0, 0.1):
        with_label, without = (
            jax.value_and_grad(lambda c: bradley_terry(c, rejected, margin, smoothing, 0.01, label).sum())(chosen)  # noqa: B023
            for label in (jnp.ones(4), None)
        )
        jax.tree.map(np.testing.assert_array_equal, with_label, without)


def test_swapped_responses_with_the_complementary_label_have_the_same_loss():
    chosen, rejected, margin, label = (jnp.asarray(each, jnp.float32) for each in (CHOSEN, REJECTED, MARGIN, LABEL))
    forward = bradley_terry(chosen, rejected, margin, 0.1, 0.01, label)
    backward = bradley_terry(rejected, chosen, -margin, 0.1, 0.01, 1.0 - label)
    np.testing.assert_allclose(backward, forward, rtol=1e-6)


def test_extreme_differences_stay_finite():
    chosen = jnp.array([-1e4, 1e4])
    value, gradient = jax.value_and_grad(lambda c: jnp.sum(bradley_terry(c, -c)))(chosen)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_permutation_jit_and_bfloat16():
    chosen, rejected = jnp.asarray(CHOSEN, jnp.float32), jnp.asarray(REJECTED, jnp.float32)
    loss = bradley_terry(chosen, rejected)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(bradley_terry(chosen[order], rejected[order]), loss[order])
    traced = jax.jit(bradley_terry)(chosen, rejected, jnp.zeros(4), jnp.float32(0.0), jnp.float32(0.0))
    np.testing.assert_allclose(traced, loss, rtol=1e-6)
    assert bradley_terry(chosen.astype(jnp.bfloat16), rejected.astype(jnp.bfloat16)).dtype == jnp.float32


def test_impossible_options_are_errors():
    with pytest.raises(ValueError, match="label_smoothing"):
        bradley_terry(jnp.zeros(1), jnp.zeros(1), label_smoothing=0.5)
    with pytest.raises(ValueError, match="centring"):
        bradley_terry(jnp.zeros(1), jnp.zeros(1), centring=-0.1)


def test_accuracy_counts_ties_one_half_exactly_and_keeps_nan():
    chosen, rejected = jnp.array([2.0, 1.0, 0.0, jnp.inf, jnp.nan]), jnp.array([1.0, 1.0, 1.0, jnp.inf, 0.0])
    got = preference_accuracy(chosen, rejected)
    np.testing.assert_array_equal(got, [1.0, 0.5, 0.0, 0.5, np.nan])


def test_accuracy_and_its_reverse_add_to_one():
    generator = np.random.default_rng(0)
    chosen, rejected = (jnp.asarray(generator.integers(0, 3, 300).astype(np.float32)) for _ in range(2))
    forward, backward = preference_accuracy(chosen, rejected), preference_accuracy(rejected, chosen)
    np.testing.assert_array_equal(forward + backward, np.ones(300))
    assert float(preference_accuracy(chosen, chosen).mean()) == 0.5
