import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logsumexp, softmax

from rlhf_jax.icl import descent
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.precision import in_float64
from rlhf_jax.icl.theory import curvature
from rlhf_jax.icl.theory.minimiser import minimiser


def numpy_version(function):
    """The function of JAX arrays as one of float64 NumPy arrays."""
    jitted = jax.jit(function)
    return in_float64(lambda weights, data: jitted(jnp.asarray(weights), jax.tree.map(jnp.asarray, data)))


loss_of = numpy_version(descent.frozen_loss)
gradient_of = numpy_version(jax.grad(descent.frozen_loss))
integrated_of = numpy_version(descent.integrated_loss)
integrated_gradient_of = numpy_version(jax.grad(descent.integrated_loss))


@pytest.fixture(scope="module", params=[2, 3])
def frozen(request) -> descent.Frozen:
    return descent.freeze(Mixture(2, request.param), 10, 500, seed=1)


@pytest.fixture(scope="module")
def bound(frozen) -> float:
    return descent.smoothness(frozen)


@pytest.fixture(scope="module")
def contexts() -> descent.Contexts:
    return descent.freeze_contexts(Mixture(2, covariance=((1.0, 0.3), (0.3, 0.5))), 10, 500, seed=1)


def some_weights(seed: int, size: float = 1.0) -> np.ndarray:
    return size * np.random.default_rng(seed).normal(size=(2, 2))


def full(frozen: descent.Frozen) -> tuple[np.ndarray, np.ndarray]:
    """Class sums less that of class 0, and targets, of all classes."""
    targets = np.concatenate([1 - frozen.targets.sum(axis=1, keepdims=True), frozen.targets], axis=1)
    return np.pad(frozen.differences, ((0, 0), (1, 0), (0, 0))), targets


def test_loss_gradient_and_hessian_against_their_formulas(frozen):
    weights = some_weights(0)
    sums, targets = full(frozen)
    value, gradient, curved = 0.0, np.zeros((2, 2)), np.zeros((4, 4))
    for s, x, t in zip(sums, frozen.query, targets, strict=True):
        z = s @ weights @ x
        q = softmax(z)
        value += logsumexp(z) - t @ z
        gradient += np.outer(s.T @ (q - t), x)
        features = np.stack([np.outer(row, x).reshape(-1) for row in s])
        curved += features.T @ (np.diag(q) - np.outer(q, q)) @ features
    count = len(sums)
    np.testing.assert_allclose(loss_of(weights, frozen), value / count, rtol=1e-12)
    np.testing.assert_allclose(gradient_of(weights, frozen), gradient / count, atol=1e-14)
    np.testing.assert_allclose(descent.hessian(descent.frozen_loss, weights, frozen), curved / count, atol=1e-14)


def test_two_classes_are_logistic_regression():
    frozen = descent.freeze(Mixture(3), 10, 200)
    weights = np.random.default_rng(0).normal(size=(3, 3))
    z = np.einsum("nd,de,ne->n", frozen.differences[:, 0], weights, frozen.query)
    expected = np.mean(np.logaddexp(0, z) - frozen.targets[:, 0] * z)
    np.testing.assert_allclose(loss_of(weights, frozen), expected, rtol=1e-12)
    residual = (expit(z) - frozen.targets[:, 0])[:, None] * frozen.differences[:, 0]
    np.testing.assert_allclose(gradient_of(weights, frozen), residual.T @ frozen.query / 200, atol=1e-14)


@given(st.integers(0, 10**6), st.floats(0.1, 30))
def test_the_loss_is_convex(frozen, contexts, seed, size):
    one, other = some_weights(seed, size), some_weights(seed + 1, size)
    for loss, data, slack in ((loss_of, frozen, 1e-12), (integrated_of, contexts, 1e-9)):
        ends = (float(loss(one, data)) + float(loss(other, data))) / 2
        assert float(loss((one + other) / 2, data)) <= ends * (1 + slack)


@given(st.integers(0, 10**6), st.floats(0.01, 30))
def test_no_weights_are_better_than_bayes(frozen, seed, size):
    _, targets = full(frozen)
    bayes = -np.mean(np.sum(targets * np.log(np.maximum(targets, 1e-300)), axis=1))
    assert float(loss_of(some_weights(seed, size), frozen)) >= bayes - 1e-12


@given(st.integers(0, 10**6), st.floats(0.01, 10))
def test_no_curvature_exceeds_the_smoothness(frozen, bound, seed, size):
    values = np.linalg.eigvalsh(descent.hessian(descent.frozen_loss, some_weights(seed, size), frozen))
    assert values[-1] <= bound * (1 + 1e-12)
    assert values[0] > 0


def test_smoothness_is_near_that_of_the_population():
    mixture = Mixture(2, covariance=((1.0, 0.3), (0.3, 0.5)), prior_scale=0.7)
    for data in (descent.freeze(mixture, 10, 20_000), descent.freeze_contexts(mixture, 10, 20_000)):
        assert descent.smoothness(data) == pytest.approx(curvature.smoothness(mixture, 10), rel=0.06)


def test_hard_labels_have_the_posteriors_gradient_in_the_mean():
    soft, hard = (descent.freeze(Mixture(2), 10, 50_000, labels=labels) for labels in ("posterior", "hard"))
    np.testing.assert_array_equal(soft.query, hard.query)
    assert set(np.unique(hard.targets)) == {0.0, 1.0}
    change = ((soft.targets - hard.targets)[:, 0, None] * soft.differences[:, 0])[:, :, None] * soft.query[:, None]
    gap = gradient_of(some_weights(0), hard) - gradient_of(some_weights(0), soft)
    np.testing.assert_allclose(gap, change.mean(axis=0), atol=1e-12)
    np.testing.assert_array_less(np.abs(gap), 4 * change.std(axis=0) / math.sqrt(50_000))


def test_integrated_loss_is_the_mean_over_queries_and_labels(contexts):
    weights = np.array([[1.0, 0.5], [-0.3, 2.0]])
    rng, root = np.random.default_rng(0), np.linalg.cholesky(contexts.covariance)
    labels = rng.integers(2, size=(400, 500))
    query = contexts.means[np.arange(500), labels] + rng.normal(size=(400, 500, 2)) @ root.T
    z = np.einsum("nd,de,rne->rn", contexts.sums, weights, query)
    values = (np.logaddexp(0, z) - labels * z).mean(axis=1)  # of each repetition
    error = values.std(ddof=1) / math.sqrt(400)
    assert abs(float(integrated_of(weights, contexts)) - values.mean()) < 4 * error


def test_integrated_loss_at_zero(contexts):
    assert float(integrated_of(np.zeros((2, 2)), contexts)) == pytest.approx(math.log(2))
    u = contexts.means[:, 1] - contexts.means[:, 0]
    expected = -np.einsum("nd,ne->de", contexts.sums, u) / 4 / len(u)  # mean of (1/2 - y) p x'
    np.testing.assert_allclose(integrated_gradient_of(np.zeros((2, 2)), contexts), expected, atol=1e-14)


def test_newton_finds_the_minimiser(frozen, contexts):
    found = descent.newton(descent.frozen_loss, frozen, np.zeros((2, 2)))
    np.testing.assert_allclose(gradient_of(found, frozen), 0, atol=1e-13)
    far = descent.newton(descent.frozen_loss, frozen, 20 * np.eye(2))  # full steps from here diverge
    np.testing.assert_allclose(far, found, atol=1e-9)
    found = descent.newton(descent.integrated_loss, contexts, np.eye(2))
    np.testing.assert_allclose(integrated_gradient_of(found, contexts), 0, atol=1e-13)


def test_the_minimiser_of_many_prompts_is_near_the_populations():
    mixture = Mixture(2, covariance=((1.0, 0.3), (0.3, 0.5)))
    found = descent.newton(descent.integrated_loss, descent.freeze_contexts(mixture, 30, 5000), np.eye(2))
    expected = minimiser(mixture, 30, points=2**12)
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def test_gradient_descent_by_hand(frozen, bound):
    start = some_weights(3)
    least = descent.newton(descent.frozen_loss, frozen, np.zeros((2, 2)))
    path = descent.gradient_descent(descent.frozen_loss, frozen, start, least, 1 / bound, 2, bound)
    weights, steps = start, []
    for _ in range(3):
        steps.append((np.sum((weights - least) ** 2), loss_of(weights, frozen) - loss_of(least, frozen)))
        last, weights = weights, weights - gradient_of(weights, frozen) / bound
    np.testing.assert_allclose(np.stack([path.squared_distance, path.loss_gap], axis=1), steps, rtol=1e-9)
    np.testing.assert_allclose(path.weights, last, rtol=1e-12)


def test_every_learning_rate_up_to_two_over_l_descends(frozen, bound):
    start = some_weights(5, 0.1)
    least = descent.newton(descent.frozen_loss, frozen, np.zeros((2, 2)))
    for share in (0.5, 1.0, 1.99):
        path = descent.gradient_descent(descent.frozen_loss, frozen, start, least, share / bound, 50, bound)
        assert np.all(np.diff(path.loss_gap) < 1e-15)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_learning_rates_that_are_none_are_refused(rate):
    with pytest.raises(ValueError, match=r"learning rate is .* 2 / l = 4"):
        descent.check_learning_rate(rate, 0.5)


def test_a_learning_rate_above_two_over_l_is_refused_before_anything_is_run():
    def never(weights, data):
        raise AssertionError("the loss was traced")

    zero = np.zeros((2, 2))
    with pytest.raises(ValueError, match=r"learning rate is 5, above 2 / l = 4, where l = 0\.5 is the smoothness"):
        descent.gradient_descent(never, None, zero, zero, 5.0, 10, 0.5)
    with pytest.raises(ValueError, match="number of steps is 0"):
        descent.gradient_descent(never, None, zero, zero, 1.0, 0, 0.5)
    descent.check_learning_rate(4.0, 0.5)
    for smoothness in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"smoothness l is .*: give a number above 0"):
            descent.gradient_descent(never, None, zero, zero, 1.0, 10, smoothness)


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="two classes only, not 3"):
        descent.freeze_contexts(Mixture(2, 3), 10, 10)
    for length, prompts in ((0, 10), (-5, 10), (10, 0)):
        with pytest.raises(ValueError, match="give a whole number of at least 1"):
            descent.freeze(Mixture(2), length, prompts)
    one = descent.freeze(Mixture(2), 10, 1, labels="hard")  # separable: the loss has no minimum
    with pytest.raises(ValueError, match="found no minimiser"):
        descent.newton(descent.frozen_loss, one, np.zeros((2, 2)))
