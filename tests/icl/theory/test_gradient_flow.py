"""What one layer of linear attention learns of regression: against hand-worked numbers, prompts and an integrator."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.icl.theory import gradient_flow as theory
from rlhf_jax.icl.theory.gradient_flow import Factors

LAMBDA = np.array([[1.0, 0.4], [0.4, 0.8]])
TASKS = np.array([[2.0, -0.3], [-0.3, 0.5]])


@pytest.fixture(scope="module")
def prompts():
    """200,000 prompts of N = 4 with noise of variance 0.5: p and w."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((200_000, 2)) @ np.linalg.cholesky(TASKS).T
    inputs = rng.standard_normal((200_000, 4, 2)) @ np.linalg.cholesky(LAMBDA).T
    targets = np.einsum("bnd,bd->bn", inputs, weights) + np.sqrt(0.5) * rng.standard_normal((200_000, 4))
    return np.einsum("bn,bnd->bd", targets, inputs) / 4, weights


def test_the_second_moment_of_contexts_is_that_of_drawn_ones(prompts):
    read, _ = prompts
    products = np.einsum("bi,bj->bij", read, read)
    errors = products.std(axis=0) / np.sqrt(200_000)
    assert (np.abs(products.mean(axis=0) - theory.context_moment(LAMBDA, 4, TASKS, 0.5)) < 4 * errors).all()


def test_the_minimiser_is_least_squares_over_drawn_prompts(prompts):
    parts = zip(*(np.array_split(array, 20) for array in prompts), strict=True)
    fits = np.stack([np.linalg.lstsq(read, weights, rcond=None)[0].T for read, weights in parts])
    errors = fits.std(axis=0, ddof=1) / np.sqrt(20)
    best = theory.minimiser(LAMBDA, 4, TASKS, 0.5)
    assert errors.max() < 0.01 * np.abs(best).max()
    assert (np.abs(fits.mean(axis=0) - best) < 4 * errors).all()


def test_risk_is_that_of_drawn_prompts_with_a_query_of_its_own_covariance(prompts):
    read, weights = prompts
    matrix, query = np.array([[0.3, 0.1], [-0.2, 0.7]]), np.diag([2.0, 0.5])
    apart = read @ matrix.T - weights
    losses = np.einsum("bi,ij,bj->b", apart, query, apart)
    expected = theory.risk(matrix, LAMBDA, 4, query, TASKS, 0.5)
    assert abs(losses.mean() - expected) < 4 * losses.std() / np.sqrt(200_000)


def test_the_isotropic_case_by_hand():
    # Gamma = 1 + 1/20 + 5/20 = 1.3; the error is d (1 - 1/1.3) = d (d + 1) / (N + d + 1) = 30/26
    assert np.allclose(theory.minimiser(np.eye(5), 20), np.eye(5) / 1.3, atol=1e-14)
    assert np.isclose(theory.risk(theory.minimiser(np.eye(5), 20), np.eye(5), 20), 30 / 26, rtol=1e-13)
    assert np.isclose(2 * theory.least_loss(np.eye(5), 20), 30 / 26, rtol=1e-13)


def test_priors_and_noise_that_have_a_closed_form():
    gamma = (1 + 1 / 7) * LAMBDA + np.trace(LAMBDA) / 7 * np.eye(2)
    noisy = np.linalg.inv(gamma + 0.3 / (7 * 4) * np.eye(2))
    assert np.allclose(theory.minimiser(LAMBDA, 7, 4 * np.eye(2), 0.3), noisy, atol=1e-13)
    whitened = theory.minimiser(LAMBDA, 7, np.linalg.inv(LAMBDA))
    assert np.allclose(whitened, np.linalg.inv(LAMBDA) / (1 + 3 / 7), atol=1e-13)


def test_the_risk_on_longer_contexts_has_the_published_form():
    a, trace = theory.minimiser(LAMBDA, 6), np.trace(LAMBDA)
    flat = np.eye(2) - a @ LAMBDA
    floor = np.trace(LAMBDA @ flat @ flat)
    varying = np.trace(a @ a @ np.linalg.matrix_power(LAMBDA, 3)) + trace * np.trace(a @ a @ LAMBDA @ LAMBDA)
    assert np.isclose(theory.risk(a, LAMBDA, 50), floor + varying / 50, rtol=1e-12)
    assert np.isclose(theory.risk(a, LAMBDA, np.inf), floor, rtol=1e-12)


@given(st.integers(1, 5), st.integers(1, 60), st.floats(0.0, 2.0), st.integers(0, 1000))
def test_no_other_matrix_has_less_risk_and_axes_do_not_matter(dimension, length, noise, seed):
    rng = np.random.default_rng(seed)
    root, second = rng.standard_normal((2, dimension, dimension))
    covariance, tasks = root @ root.T + 0.1 * np.eye(dimension), second @ second.T
    best = theory.minimiser(covariance, length, tasks, noise)
    least = theory.risk(best, covariance, length, tasks=tasks, noise_variance=noise)
    other = best + 0.1 * rng.standard_normal(best.shape)
    assert theory.risk(other, covariance, length, tasks=tasks, noise_variance=noise) > least
    turn = np.linalg.qr(rng.standard_normal((dimension, dimension)))[0]
    turned = theory.minimiser(turn @ covariance @ turn.T, length, turn @ tasks @ turn.T, noise)
    assert np.allclose(turned, turn @ best @ turn.T, atol=1e-7 * (1 + np.abs(best).max()))


def test_the_limit_multiplies_to_the_minimiser_and_keeps_the_conserved_difference():
    for conserved in (0.0, 1.3, -0.7):
        u, keys = theory.limit(LAMBDA, 9, conserved=conserved)
        assert np.allclose(u * keys, theory.minimiser(LAMBDA, 9), atol=1e-13)
        assert np.isclose(u**2 - np.sum(keys**2), conserved, atol=1e-13)
    inverse = np.linalg.inv((1 + 1 / 9) * LAMBDA + np.trace(LAMBDA) / 9 * np.eye(2))
    assert np.isclose(theory.limit(LAMBDA, 9).values, np.trace(inverse @ inverse) ** 0.25, rtol=1e-13)


def test_the_logistic_curve_solves_the_equations_of_an_aligned_start():
    times, u = np.linspace(0, 3, 31), np.sqrt(0.01 * np.sqrt(8))
    start = Factors(u, np.full(8, 0.01 / u))  # balanced: u^2 = d (a / u)^2
    assert np.isclose(u**2, np.sum(start.keys**2))
    flow = theory.aligned_flow(times, start, np.ones(8), 30, noise_variance=0.5)
    expected = theory.logistic(times, 0.01, 8, 30, noise_variance=0.5)
    assert np.abs(flow.values[:, None] * flow.keys - expected[:, None]).max() < 1e-8
    half = theory.half_time(0.01, 8, 30, 0.5)
    assert np.isclose(theory.logistic(np.array([half]), 0.01, 8, 30, 0.5)[0], 30 / 39.5 / 2, rtol=1e-12)


def test_an_unbalanced_aligned_flow_conserves_and_ends_in_the_limit():
    variances, start = np.array([0.5, 1.0, 2.0]), Factors(0.8, np.array([0.1, 0.2, 0.05]))
    flow = theory.aligned_flow(np.linspace(0, 200, 11), start, variances, 10)
    conserved = flow.values**2 - np.sum(flow.keys**2, axis=1)
    assert np.ptp(conserved) < 1e-8
    u, keys = theory.limit(np.diag(variances), 10, conserved=conserved[0])
    assert np.isclose(flow.values[-1], u, atol=1e-7) and np.allclose(np.diag(keys), flow.keys[-1], atol=1e-7)


def test_random_covariances_of_one_value_are_no_random_covariances():
    a, risk = theory.random_covariance_minimiser((2.0, 4.0, 8.0), dimension=3, length=10)
    assert np.isclose(a, theory.minimiser(2 * np.eye(3), 10)[0, 0], rtol=1e-13)
    assert np.isclose(3 * risk, 2 * theory.least_loss(2 * np.eye(3), 10), rtol=1e-13)
    assert theory.random_covariance_minimiser((1.0, 2.0, 6.0), dimension=4)[1] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: theory.minimiser(-np.eye(2), 3), "eigenvalue"),
        (lambda: theory.minimiser(np.eye(2), 0), "context length N is 0"),
        (lambda: theory.minimiser(np.eye(2), 3, np.eye(3)), "second moment of the weights"),
        (lambda: theory.minimiser(np.eye(2), 3, noise_variance=-1.0), "noise variance is -1.0"),
        (lambda: theory.risk(np.eye(2), np.eye(2), 0), "context length is 0"),
        (lambda: theory.logistic(np.zeros(1), 0.0, 2, 3), "above 0"),
        (lambda: theory.half_time(0.9, 2, 3), "not below half"),
        (lambda: theory.aligned_flow(np.ones(1), Factors(1.0, np.ones(2)), np.ones(3), 4), "one for each eigenvalue"),
        (lambda: theory.random_covariance_minimiser((1.0, 0.5, 1.0)), "no positive variable"),
        (lambda: theory.random_covariance_minimiser((1.0, 2.0, np.inf)), "no positive variable"),
        (lambda: theory.random_covariance_minimiser(length=-np.inf), "context length is -inf"),
        (lambda: theory.minimiser(np.zeros((0, 0)), 3), "dimension d is 0"),
        (lambda: theory.minimiser(np.ones(2), 3), "covariance has the shape"),
        (lambda: theory.risk(np.eye(2), np.eye(2), -np.inf), "context length is -inf"),
        (lambda: theory.minimiser(np.eye(2), 3, np.diag([1.0, -1.0])), "eigenvalues of at least 0"),
        (lambda: theory.minimiser(np.eye(2), 3, np.array([[1.0, 0.5], [0.0, 1.0]])), "finite symmetric matrix"),
        (lambda: theory.minimiser(np.eye(2), 3, np.full((2, 2), np.nan)), "is no E w w'"),
        (lambda: theory.minimiser(np.eye(2), 3, np.zeros((2, 2))), "not all 0"),
        (lambda: theory.risk(np.eye(3), np.eye(2), 4), "weights A have the shape"),
        (lambda: theory.limit(np.eye(2), 4, conserved=np.nan), "conserved difference .* is nan"),
        (lambda: theory.logistic(np.zeros(1), 0.1, 2, 3, -1.0), "noise variance is -1.0"),
        (lambda: theory.logistic(np.zeros(0), 0.1, 2, 3), "at least one finite number"),
        (lambda: theory.aligned_flow(np.zeros(0), Factors(1.0, np.ones(2)), np.ones(2), 4), "at least one finite"),
        (lambda: theory.aligned_flow(np.ones(1), Factors(1.0, np.ones(2)), np.ones(2), 4, -1.0), "noise variance is"),
        (lambda: theory.aligned_flow(np.array([2.0, 1.0]), Factors(1.0, np.ones(2)), np.ones(2), 4), "do not ascend"),
        (lambda: theory.aligned_flow(np.ones(1), Factors(np.nan, np.ones(2)), np.ones(2), 4), "is not finite"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
