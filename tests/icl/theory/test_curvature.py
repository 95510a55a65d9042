import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.theory.curvature import (
    condition_number,
    hessian,
    hessian_at_zero,
    isotropic_spectrum,
    rate,
    smoothness,
)

CORRELATED = ((1.0, 0.4, 0.1), (0.4, 0.8, -0.2), (0.1, -0.2, 0.6))


def raw(mixture: Mixture, length: int, count: int, stratified: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Class sums [n, c, d] and queries [n, d], from every example of every context."""
    rng = np.random.default_rng(0)
    c, d = mixture.classes, mixture.dimension
    root = np.linalg.cholesky(mixture.matrix)
    first = mixture.prior_scale * rng.normal(size=(count, d))
    size = np.sqrt(np.einsum("nd,de,ne->n", first, np.linalg.inv(mixture.matrix), first))
    unit = rng.normal(size=(count, c - 1, d))
    unit /= np.linalg.norm(unit, axis=2, keepdims=True)
    means = np.concatenate([first[:, None], size[:, None, None] * unit @ root.T], axis=1)
    labels = np.tile(np.arange(length) % c, (count, 1)) if stratified else rng.integers(c, size=(count, length))
    inputs = np.take_along_axis(means, labels[:, :, None], axis=1) + rng.normal(size=(count, length, d)) @ root.T
    sums = np.stack([(inputs * (labels == k)[:, :, None]).sum(axis=1) / length for k in range(c)], axis=1)
    which = rng.integers(c, size=count)
    return sums, means[np.arange(count), which] + rng.normal(size=(count, d)) @ root.T


def curvature_along(
    sums: np.ndarray, query: np.ndarray, weights: np.ndarray, direction: np.ndarray
) -> tuple[float, float]:
    """Mean over prompts of sum_kl J_kl v_k v_l, v_k = S_k' V x, and its standard error."""
    chances = softmax(np.einsum("nkd,de,ne->nk", sums, weights, query), axis=1)
    v = np.einsum("nkd,de,ne->nk", sums, direction, query)
    values = np.sum(chances * v**2, axis=1) - np.sum(chances * v, axis=1) ** 2
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def isotropic(d: int, length: float, tau: float) -> float:
    noise = 0.0 if length == np.inf else 1 / length
    return ((1 + noise) * (tau**2 * d + tau**4 * (d + 1) * (d + 2) / 2) / 2 + noise * (d + tau**2 * d)) / (4 * d)


@pytest.mark.parametrize(("d", "length"), [(1, 3), (4, 50), (7, np.inf)])
def test_smoothness_for_the_identity_is_the_papers_setting_in_closed_form(d, length):
    expected = (d**2 + 5 * d + 2) / (16 * d) + (2 * d + d / 2 + (d + 1) * (d + 2) / 4) / (4 * d * length)
    np.testing.assert_allclose(smoothness(Mixture(d), length), expected, rtol=1e-12)


def test_smoothness_by_hand():
    # d = 1, N = inf: p = (mu_1 - mu_0) / 2 is 0 or +-mu, x^2 has the mean 1 + mu^2: l = E[mu^2 / 2 (1 + mu^2)] / 4.
    assert smoothness(Mixture(1), np.inf) == pytest.approx((1 + 3) / 8)
    # Scale 2: E mu^2 = 4, E mu^4 = 48.
    assert smoothness(Mixture(1, prior_scale=2.0), np.inf) == pytest.approx((4 + 48) / 8)


def test_smoothness_scales_with_covariance_and_prior():
    for value, tau in ((2.5, 1.3), (0.3, 0.5)):
        found = smoothness(Mixture(4, covariance=value * np.eye(4), prior_scale=tau), 7)
        np.testing.assert_allclose(found, value**2 * isotropic(4, 7, tau / value**0.5), rtol=1e-12)


@pytest.mark.parametrize(
    ("classes", "stratified", "length"), [(2, False, 5), (3, False, 6), (3, True, 6), (5, False, 10)]
)
def test_hessian_at_zero_against_raw_prompts(classes, stratified, length):
    mixture = Mixture(3, classes, CORRELATED, prior_scale=0.8)
    exact = hessian_at_zero(mixture, length, stratified)
    sums, query = raw(mixture, length, 50_000, stratified)
    np.testing.assert_allclose(exact, exact.T, rtol=1e-12)
    directions = [np.eye(3), np.diag([1.0, -1.0, 0.0]), np.eye(3, k=1), np.eye(3, k=1) - np.eye(3, k=-1)]
    directions.append(np.linalg.eigh(exact)[1][:, -1].reshape(3, 3))
    for direction in directions:
        mean, error = curvature_along(sums, query, np.zeros((3, 3)), direction)
        assert abs(mean - direction.reshape(-1) @ exact @ direction.reshape(-1)) < 4 * error


@pytest.mark.parametrize(("classes", "stratified"), [(2, False), (3, False), (3, True)])
def test_hessian_at_any_weights_against_raw_prompts(classes, stratified):
    mixture = Mixture(3, classes, CORRELATED)
    weights = np.array([[1.5, -0.3, 0.0], [0.2, 1.0, 0.4], [0.1, 0.0, 2.0]])
    found = hessian(mixture, weights, 6, stratified, points=2**15)
    sums, query = raw(mixture, 6, 50_000, stratified)
    for direction in (np.eye(3), np.diag([1.0, -1.0, 0.0]), np.eye(3, k=1), weights):
        mean, error = curvature_along(sums, query, weights, direction)
        assert abs(mean - direction.reshape(-1) @ found @ direction.reshape(-1)) < 4 * error


def test_hessian_at_zero_weights_is_the_exact_one():
    mixture = Mixture(2, 3, ((1.0, 0.3), (0.3, 0.5)), prior_scale=0.6)
    for length in (8, np.inf):
        exact = hessian_at_zero(mixture, length)
        np.testing.assert_allclose(hessian(mixture, np.zeros((2, 2)), length), exact, atol=0.02 * np.abs(exact).max())


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6))
def test_the_bound_on_the_softmaxs_jacobian(logits):
    q = softmax(np.array(logits))
    gap = (np.eye(len(q)) - 1 / len(q)) / 2 - np.diag(q) + np.outer(q, q)
    assert np.linalg.eigvalsh(gap)[0] > -1e-12


# lambda_trace, lambda_symmetric, lambda_antisymmetric at N = inf, W = 2I
LIMITS = {3: (0.01505, 0.03444, 0.04737), 5: (0.00871, 0.02288, 0.02854), 10: (0.00226, 0.00797, 0.00911)}


@pytest.mark.parametrize("d", LIMITS)
def test_the_three_eigenvalues_of_long_contexts(d):
    found = [isotropic_spectrum(Mixture(d), 2.0, np.inf, points=2**15, seed=seed) for seed in range(2)]
    np.testing.assert_allclose(np.mean(found, axis=0), LIMITS[d], rtol=0.015)


@pytest.mark.parametrize(("classes", "scale", "stratified"), [(2, 1.0, False), (3, 2.0, True)])
def test_three_eigenvalues_are_the_modes_of_the_whole_matrix(classes, scale, stratified):
    mixture = Mixture(3, classes, scale * np.eye(3))
    found = isotropic_spectrum(mixture, 1.2, 30, stratified, points=2**14)
    whole = hessian(mixture, 1.2 * np.eye(3), 30, stratified, points=2**14)
    trace = np.eye(3).reshape(-1) @ whole @ np.eye(3).reshape(-1) / 3
    np.testing.assert_allclose(found.trace, trace, rtol=1e-10)
    np.testing.assert_allclose(found.trace + 5 * found.symmetric + 3 * found.antisymmetric, np.trace(whole), rtol=1e-10)
    values = np.linalg.eigvalsh(whole)
    np.testing.assert_allclose(values, [found.trace, *[found.symmetric] * 5, *[found.antisymmetric] * 3], rtol=0.1)


def test_one_dimension_has_one_eigenvalue():
    found = isotropic_spectrum(Mixture(1), 1.0, 20, points=2**12)
    np.testing.assert_allclose(found.trace, hessian(Mixture(1), np.eye(1), 20, points=2**12)[0, 0], rtol=1e-10)
    assert math.isnan(found.symmetric)


def test_rate():
    assert rate(0.5, np.diag([0.2, 1.0])) == pytest.approx(2 * math.log(0.9))
    assert rate(1.9, np.array([0.2, 1.0])) == pytest.approx(2 * math.log(0.9))  # the fastest mode overshoots
    assert rate(1.0, np.array([1.0])) == -math.inf


@pytest.mark.parametrize(("d", "expected"), [(3, 36.1), (5, 74.6)])
def test_condition_number_of_long_contexts(d, expected):
    assert condition_number(Mixture(d), np.inf, 2 * np.eye(d), points=2**13) == pytest.approx(expected, rel=0.03)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="context length is 0"):
        smoothness(Mixture(2), 0)
    with pytest.raises(ValueError, match=r"weights have the shape \(3, 3\)"):
        hessian(Mixture(2), np.eye(3), 10)
    for length in (10.7, -math.inf, math.nan):
        with pytest.raises(ValueError, match=r"context length is .*: give a whole number of at least 1"):
            smoothness(Mixture(2), length)
    with pytest.raises(ValueError, match="weights have entries that are not finite"):
        hessian(Mixture(2), np.full((2, 2), math.nan), 10)
    with pytest.raises(ValueError, match="no multiple of the identity"):
        isotropic_spectrum(Mixture(3, covariance=CORRELATED), 1.0, 10)
