"""KL estimates by exact enumeration on a tabular policy, and the controllers of the coefficient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.kl import adaptive_kl, fixed_kl, kl_estimate

KINDS = ("k1", "k2", "k3")
LOGITS = np.array([0.3, -1.2, 0.8, 0.1, -0.4])
REFERENCE = np.array([-0.5, 0.4, 0.9, -1.0, 0.2])


def divergence(p_logits, q_logits):
    """KL between two softmax distributions."""
    p, q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(p) * (p - q))


def expected_gradient(logits, reference, kind):
    """Mean over y ~ pi, y and its probability held fixed, of the gradient of the estimate through log pi(y)."""
    probabilities = jax.lax.stop_gradient(jax.nn.softmax(logits))

    def expected(x):
        estimates = kl_estimate(jax.nn.log_softmax(x), jax.nn.log_softmax(reference), kind)
        return jnp.sum(probabilities * estimates)

    return jax.grad(expected)(logits)


def test_values_worked_by_hand():
    logprob, reference = jnp.log(jnp.array([0.5, 0.25])), jnp.log(jnp.array([0.25, 0.5]))
    log2 = np.log(2)
    np.testing.assert_allclose(kl_estimate(logprob, reference, "k1"), [log2, -log2], rtol=1e-6)
    np.testing.assert_allclose(kl_estimate(logprob, reference, "k2"), [log2**2 / 2] * 2, rtol=1e-6)
    np.testing.assert_allclose(kl_estimate(logprob, reference, "k3"), [log2 - 0.5, 1 - log2], rtol=1e-6)


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    with jax.enable_x64(True):
        logits, reference = jnp.asarray(LOGITS), jnp.asarray(REFERENCE)
        logprobs, references = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
        for kind in ("k1", "k3"):
            expected = jnp.sum(jnp.exp(logprobs) * kl_estimate(logprobs, references, kind))
            np.testing.assert_allclose(expected, divergence(logits, reference), rtol=1e-12)
        assert (np.asarray(kl_estimate(logprobs, references, "k3")) > 0).all()
        assert not np.asarray(kl_estimate(logprobs, logprobs, "k3")).any()


def test_on_policy_gradients_are_zero_the_divergence_and_its_opposite():
    with jax.enable_x64(True):
        logits, reference = jnp.asarray(LOGITS), jnp.asarray(REFERENCE)
        np.testing.assert_allclose(expected_gradient(logits, reference, "k1"), 0.0, atol=1e-14)
        forward = jax.grad(lambda x: divergence(x, reference))(logits)
        backward = jax.grad(lambda x: divergence(reference, x))(logits)
        np.testing.assert_allclose(expected_gradient(logits, reference, "k2"), forward, atol=1e-14)
        np.testing.assert_allclose(expected_gradient(logits, reference, "k3"), backward, atol=1e-14)
        assert np.abs(np.asarray(forward - backward)).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_finite_differences(kind):
    with jax.enable_x64(True):
        reference = jnp.asarray([-1.0, -2.0, -0.3])
        logprob = jnp.asarray([-1.5, -0.2, -0.7])
        gradient = jax.grad(lambda x: jnp.sum(kl_estimate(x, reference, kind)))(logprob)
        step = 1e-6
        difference = kl_estimate(logprob + step, reference, kind) - kl_estimate(logprob - step, reference, kind)
        np.testing.assert_allclose(gradient, difference / (2 * step), rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_gets_no_gradient_and_jit_changes_nothing(kind):
    logprob, reference = jnp.array([-1.5, -0.2]), jnp.array([-1.0, -2.0])
    assert not np.asarray(jax.grad(lambda r: jnp.sum(kl_estimate(logprob, r, kind)))(reference)).any()
    jitted = jax.jit(kl_estimate, static_argnums=2)(logprob, reference, kind)
    np.testing.assert_allclose(jitted, kl_estimate(logprob, reference, kind), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_raised_to_float32(kind):
    logprob, reference = jnp.array([-1.5, -0.2], jnp.bfloat16), jnp.array([-1.0, -2.0], jnp.bfloat16)
    got = kl_estimate(logprob, reference, kind)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, kl_estimate(logprob.astype(jnp.float32), reference.astype(jnp.float32), kind))


def test_k3_is_exact_near_zero_and_finite_far_away():
    small = kl_estimate(jnp.array([1e-3]), jnp.array([0.0]), "k3")
    np.testing.assert_allclose(small, 5e-7, rtol=1e-2)
    value, gradient = jax.value_and_grad(lambda x: kl_estimate(x, jnp.float32(0.0), "k3"))(jnp.float32(-1e4))
    assert np.isfinite(value) and float(gradient) == 0.0


def test_an_unknown_kind_is_an_error():
    with pytest.raises((ValueError, TypeError)):
        kl_estimate(jnp.zeros(1), jnp.zeros(1), "k4")


def test_adaptive_coefficient_worked_by_hand():
    controller = adaptive_kl(0.2, target=6.0, horizon=10_000)
    coefficient = controller.init()
    assert coefficient.dtype == jnp.float32 and coefficient.shape == ()
    cases = [
        (6.0, 0.2),
        (6.6, 0.2 * (1 + 0.1 * 0.0256)),
        (60.0, 0.2 * (1 + 0.2 * 0.0256)),
        (0.0, 0.2 * (1 - 0.2 * 0.0256)),
    ]
    for kl, expected in cases:
        np.testing.assert_allclose(controller.update(coefficient, jnp.float32(kl), 256), expected, rtol=1e-6)


def test_fixed_coefficient_stays_and_both_can_be_batched():
    coefficients, kls = jnp.array([0.1, 0.2]), jnp.array([1.0, 100.0])
    fixed = jax.vmap(lambda c, kl: fixed_kl(c).update(fixed_kl(c).init(), kl, 8))(coefficients, kls)
    np.testing.assert_array_equal(fixed, coefficients)

    def adapt(coefficient, kl):
        controller = adaptive_kl(coefficient, 10.0, 100.0)
        return controller.update(controller.init(), kl, jnp.int32(50))

    np.testing.assert_allclose(jax.jit(jax.vmap(adapt))(coefficients, kls), [0.09, 0.22], rtol=1e-6)


def test_a_target_or_horizon_that_is_not_positive_is_an_error():
    with pytest.raises(ValueError, match="target"):
        adaptive_kl(0.1, 0.0, 100)
    with pytest.raises(ValueError, match="horizon"):
        adaptive_kl(0.1, 6.0, 0)
