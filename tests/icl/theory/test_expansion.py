import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, softmax

from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.theory.expansion import coefficients, extrapolated, first_order, isotropic_coefficient
from rlhf_jax.icl.theory.minimiser import draw_coordinates, draw_invariants, newton
from rlhf_jax.icl.theory.population import draw

CORRELATED = Mixture(3, covariance=[[1.0, 0.4, 0.1], [0.4, 0.8, -0.2], [0.1, -0.2, 0.6]])


@pytest.mark.parametrize(("dimension", "expected"), [(3, -18.23), (4, -16.9), (5, -16.41), (10, -17.32)])
def test_coefficients_of_two_classes(dimension: int, expected: float) -> None:
    assert isotropic_coefficient(Mixture(dimension)) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("classes", "expected", "points"), [(2, -16.9, 2**15), (3, -28.5, 2**15), (5, -56.5, 2**14), (10, -147.0, 2**13)]
)
def test_coefficients_of_several_classes(classes: int, expected: float, points: int) -> None:
    found = np.mean([first_order(Mixture(4, classes), points=points, seed=seed)[0, 0] for seed in range(4)])
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("mixture", [Mixture(1), Mixture(2), Mixture(6, covariance=2 * np.eye(6), prior_scale=0.7)])
def test_quadrature_is_the_mean_over_draws(mixture: Mixture, stratified: bool) -> None:
    scale = mixture.matrix[0, 0]
    drawn = [first_order(mixture, stratified, 2**13, seed)[0, 0] * scale for seed in range(6)]
    error = np.std(drawn, ddof=1) / np.sqrt(len(drawn))
    assert abs(np.mean(drawn) - isotropic_coefficient(mixture, stratified)) < 3 * error
    assert error < 0.03 * abs(np.mean(drawn))


def test_two_classes_are_the_binary_formula() -> None:
    mixture = Mixture(4)
    given_ = draw_coordinates(mixture, 1, False, 2**10, 0)
    population = draw(mixture, 2**10, 0)
    gap, middle = population.means[:, 1] - population.means[:, 0], population.means.mean(axis=1)
    a = np.sum(gap * population.query, axis=1)
    q = np.sum(population.query**2, axis=1) + np.sum(middle * population.query, axis=1) ** 2
    first = expit(a) * expit(-a)
    second = first * (1 - 2 * expit(a))
    binary = -np.mean((4 * first + 2 * a * second) * q) / np.mean(first * a**2)
    assert coefficients(given_)[0] == pytest.approx(binary, rel=1e-10)


@pytest.mark.parametrize("stratified", [False, True])
def test_the_sums_are_those_of_the_derivation(stratified: bool) -> None:
    mixture = Mixture(2, 3, np.diag([1.0, 4.0]))
    given_ = draw_coordinates(mixture, 1, False, 2**3, 0)
    c, groups = 3, 2
    left, right = np.zeros((groups, groups)), np.zeros(groups)
    for alpha, squares, q in zip(given_.signal, given_.squares, given_.posterior, strict=True):
        a, size = alpha.sum(axis=1), squares.sum()
        jacobian = np.diag(q) - np.outer(q, q)
        noise = c * size * np.eye(c) if stratified else c * np.diag(size + a**2) - np.outer(a, a)
        for i in range(groups):
            left[i] += alpha[:, i] @ jacobian @ alpha
            for k in range(c):
                right[i] -= c * jacobian[k, k] * (squares[i] + (0 if stratified else a[k] * alpha[k, i]))
                right[i] += 0 if stratified else jacobian[k] @ a * alpha[k, i]
            for k, n, m in itertools.product(range(c), repeat=3):
                # Third derivative of logsumexp: of J_kn = 1{k = n} q_k - q_k q_n by z_m.
                third = (k == n) * jacobian[k, m] - jacobian[k, m] * q[n] - q[k] * jacobian[n, m]
                right[i] -= third * noise[n, m] * alpha[k, i] / 2
    np.testing.assert_allclose(coefficients(given_, stratified), np.linalg.solve(left, right), rtol=1e-11)


def test_scaled_weights_approach_it() -> None:
    """-17.71 +- .05 at N = 1280 for d = 3, of which the difference from g1 has little noise on the same points."""
    mixture, gaps = Mixture(3), []
    for seed in range(2):
        given_ = draw_invariants(mixture, 1280, False, 2**15, seed)
        gaps.append(1280 * (newton(given_, 1280)[0] / 2 - 1) - coefficients(given_)[0])
    assert isotropic_coefficient(mixture) + np.mean(gaps) == pytest.approx(-17.71, abs=0.05)


def test_a_general_covariance() -> None:
    values, vectors = CORRELATED.eigen
    drawn = np.stack([first_order(CORRELATED, points=2**14, seed=seed) for seed in range(8)])
    np.testing.assert_allclose(values, [0.317, 0.768, 1.315], atol=1e-3)
    rotated = vectors.T @ drawn.mean(axis=0) @ vectors
    np.testing.assert_allclose(np.diag(rotated), [-124.5, -36.7, -18.3], rtol=0.03)
    assert np.abs(rotated - np.diag(np.diag(rotated))).max() < 1e-9


def test_the_full_system_has_that_solution() -> None:
    """All d^2 equations in the given coordinates, with nothing known of the eigenbasis."""
    found, ways = [], np.eye(9).reshape(9, 3, 3)
    for seed in range(4):
        one = draw(CORRELATED, 2**14, seed)
        gap, middle = one.means[:, 1] - one.means[:, 0], one.means.mean(axis=1)
        x, turned = one.query, one.query @ CORRELATED.inverse
        a, along = np.sum(gap * turned, axis=1), np.sum(middle * turned, axis=1)
        q = np.sum(x * turned, axis=1) + along**2
        first = expit(a) * expit(-a)
        second = first * (1 - 2 * expit(a))
        feature = np.einsum("nd,ne->nde", gap, x)
        left = np.einsum("n,nde,nfg->defg", first, feature, feature, optimize=True).reshape(9, 9)
        pull = 4 * first[:, None] * (x + middle * along[:, None]) + 2 * (second * q)[:, None] * gap
        found.append(np.linalg.solve(left, -(pull.T @ x).reshape(9)) @ ways.reshape(9, 9))
    full = np.reshape(found, (4, 3, 3))
    expected = np.mean([first_order(CORRELATED, points=2**14, seed=seed) for seed in range(4)], axis=0)
    assert np.abs(full.mean(axis=0) - expected).max() < 0.03 * np.abs(expected).max()


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=3), st.integers(1, 50))
def test_extrapolation_is_exact_for_polynomials(series: list[float], step: int) -> None:
    lengths = [step * (i + 1) for i in range(len(series))]
    values = [np.polyval(series[::-1], 1 / length) for length in lengths]
    assert extrapolated(lengths, np.array(values)) == pytest.approx(series[0], abs=1e-9)


def test_extrapolation_keeps_the_other_axes() -> None:
    values = np.array([[1.5, 3.0], [1.25, 2.5]])
    np.testing.assert_allclose(extrapolated([2, 4], values), [1.0, 2.0])


def test_bad_input() -> None:
    for mixture in (Mixture(3, 3), CORRELATED):
        with pytest.raises(ValueError, match="call `first_order`"):
            isotropic_coefficient(mixture)


def test_posterior_of_coordinates_is_that_of_bayes() -> None:
    given_ = draw_coordinates(CORRELATED, 1, False, 2**6, 0)
    np.testing.assert_allclose(softmax(given_.signal.sum(axis=2), axis=1), given_.posterior, rtol=1e-10)
