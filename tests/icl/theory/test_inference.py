import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.shift import NO_SHIFT, Shift
from rlhf_jax.icl.theory import inference
from rlhf_jax.icl.theory.population import draw

CORRELATED = ((1.0, 0.4, 0.1), (0.4, 0.8, -0.2), (0.1, -0.2, 0.6))
FEW = {"points": 2**14, "seeds": (0, 1)}
INFINITE = math.inf
LENGTHS = (16, 64, 256, 1024, 4096, 16384, INFINITE)
WEIGHTS = {20: 1.2050, 100: 1.7211, 500: 1.9324}  # w_N, d = 3
TABLE = {
    20: (0.1090, 0.0770, 0.0636, 0.0590, 0.0576, 0.0572, 0.0570),
    100: (0.1042, 0.0581, 0.0337, 0.0226, 0.0183, 0.0168, 0.0162),
    500: (0.1065, 0.0576, 0.0300, 0.0156, 0.0086, 0.0055, 0.0037),
}


def test_distances_by_hand():
    found = inference.distances(
        np.log([[0.5, 0.3, 0.2], [0.9, 0.1, 1e-300]]), np.log([[0.2, 0.3, 0.5], [0.9, 0.1, 1e-300]])
    )
    np.testing.assert_allclose(found, [0.3, 0.0], atol=1e-12)


@pytest.mark.parametrize(
    ("shift", "stratified"),
    [
        (NO_SHIFT, False),
        (NO_SHIFT, True),
        (Shift(class_probabilities=(0.2, 0.3, 0.5), covariance=np.eye(3) / 2, label_noise=0.2), False),
    ],
)
def test_moments_against_raw_contexts(shift, stratified):
    population = draw(Mixture(3, 3, CORRELATED), 2, seed=1, shift=shift)
    law, length, count = population.law, 6, 50_000
    weights = np.array([[1.5, -0.3, 0.0], [0.2, 1.0, 0.4], [0.1, 0.0, 2.0]])
    mean, covariance = inference.moments(population, weights, length, stratified)
    rng = np.random.default_rng(0)
    true = rng.choice(3, p=law.probabilities, size=(count, length))
    if stratified:
        true = np.tile([0, 0, 1, 1, 2, 2], (count, 1))
    moved = (true + rng.integers(1, 3, size=true.shape)) % 3
    shown = np.where(rng.random(true.shape) < law.label_noise, moved, true)
    inputs = population.means[0][true] + rng.normal(size=(count, length, 3)) @ np.linalg.cholesky(law.covariance).T
    along = inputs @ weights @ population.query[0]
    z = np.stack([np.mean(along * (shown == k), axis=1) for k in range(3)], axis=1)
    np.testing.assert_array_less(np.abs(z.mean(axis=0) - mean[0]), 4 * z.std(axis=0) / math.sqrt(count))
    products = (z - mean[0])[:, :, None] * (z - mean[0])[:, None, :]
    errors = products.std(axis=0) / math.sqrt(count)
    np.testing.assert_array_less(np.abs(products.mean(axis=0) - covariance[0]), 4 * errors + 1e-12)


def test_moments_and_bound_of_two_classes_are_those_of_the_paper():
    population = draw(Mixture(3, covariance=CORRELATED), 64)
    weights = np.random.default_rng(0).normal(size=(3, 3))
    mean, covariance = inference.moments(population, weights, 30)
    u = population.means[:, 1] - population.means[:, 0]
    middle = population.means.mean(axis=1)
    turned = population.query @ weights.T
    centre = np.sum(u * turned, axis=1) / 2
    variance = (
        np.einsum("nd,de,ne->n", turned, np.array(CORRELATED), turned) + np.sum(middle * turned, axis=1) ** 2
    ) / 30
    np.testing.assert_allclose(mean[:, 1] - mean[:, 0], centre, rtol=1e-10)
    contrast = np.array([-1.0, 1.0])
    np.testing.assert_allclose(np.einsum("k,nkl,l->n", contrast, covariance, contrast), variance, rtol=1e-10)
    a = np.einsum("nd,de,ne->n", u, np.linalg.inv(CORRELATED), population.query)
    expected = (np.abs(centre - a) + np.sqrt(variance)) / 4
    np.testing.assert_allclose(inference.bound(population, weights, 30), expected, rtol=1e-8)


@given(st.integers(0, 10**6), st.integers(2, 4), st.sampled_from([1, 3, 10, 100, 10_000]), st.floats(0.01, 10))
def test_the_bound_holds_for_any_weights_and_length(seed, classes, length, size):
    mixture = Mixture(2, classes, ((1.0, 0.3), (0.3, 0.5)))
    noise = np.random.default_rng(seed).normal(size=(2, 2))
    weights = classes * mixture.inverse + size * noise
    population = draw(mixture, 2**11, seed)
    found = inference.distances(population.model_logits(weights, length), population.logits)
    most = inference.bound(population, weights, length)
    gap = most - found  # the bound is on means over contexts
    assert gap.mean() > -3 * gap.std() / math.sqrt(len(gap))
    assert most.mean() > 0.9 * found.mean()


def test_the_bound_is_a_bound_at_a_single_task():
    population = draw(Mixture(2), 2, seed=3)
    rng, length, weights = np.random.default_rng(0), 5, np.array([[1.0, 0.5], [0.0, 3.0]])
    labels = rng.integers(2, size=(50_000, length))
    inputs = population.means[0][labels] + rng.normal(size=(50_000, length, 2))
    z = np.mean((inputs @ weights @ population.query[0]) * (2 * labels - 1), axis=1)
    found = inference.distances(np.stack([0 * z, z], axis=1), np.tile(population.logits[0], (len(z), 1)))
    assert found.mean() < inference.bound(population, weights, length)[0]


@pytest.mark.parametrize(
    ("d", "first", "expected"),
    [(3, -18.23, (0.4883, 2.384, 1.937)), (5, -16.41, (0.4154, 2.540, 1.403)), (10, -17.32, (0.2147, 1.950, 0.611))],
)
def test_constants_of_two_classes(d, first, expected):
    found = inference.constants(Mixture(d), correction=first * np.eye(d), **FEW)
    np.testing.assert_allclose([one.mean for one in found], expected, rtol=0.012)


@pytest.mark.parametrize(
    ("c", "noise", "excess"), [(2, 0.457, 2.52), (3, 0.916, 6.85), (5, 1.801, 19.5), (10, 3.73, 66.0)]
)
def test_constants_of_many_classes(c, noise, excess):
    found = inference.constants(Mixture(4, c), **FEW)
    assert found.total_variation.mean == pytest.approx(noise, rel=0.01)
    assert found.cross_entropy.mean == pytest.approx(excess, rel=0.015)
    assert found.floor is None


@pytest.mark.parametrize("stratified", [False, True])
def test_constants_are_the_limit_of_long_tests_for_any_covariance(stratified):
    mixture = Mixture(3, 3, CORRELATED, prior_scale=0.7)
    limit = inference.constants(mixture, stratified=stratified, **FEW).total_variation.mean
    length = 2**16
    found = inference.total_variation(mixture, 3 * mixture.inverse, length, stratified=stratified, **FEW).mean
    assert math.sqrt(length) * found == pytest.approx(limit, rel=0.015)


def test_stratified_contexts_have_less_noise():
    random, stratified = (inference.constants(Mixture(3), stratified=one, **FEW) for one in (False, True))
    assert stratified.total_variation.mean < random.total_variation.mean - 5 * random.total_variation.standard_error
    assert stratified.cross_entropy.mean < random.cross_entropy.mean


@pytest.mark.parametrize("length", TABLE)
def test_total_variation_against_both_lengths(length):
    weights = WEIGHTS[length] * np.eye(3)
    found = [inference.total_variation(Mixture(3), weights, m, **FEW).mean for m in LENGTHS]
    np.testing.assert_allclose(found, TABLE[length], rtol=0.02)


@pytest.mark.parametrize(("d", "expected"), [(3, 0.4878), (5, 0.4153), (10, 0.2150)])
def test_noise_at_bayes_weights(d, expected):
    found = inference.total_variation(Mixture(d), 2 * np.eye(d), 4096, **FEW)
    assert 64 * found.mean == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (Shift(), (0.0581, 0.0152, 0.0038, 0.0)),
        (Shift(class_probabilities=(0.3, 0.7)), (0.0979, 0.0917, 0.0914, 0.0913)),
        (Shift(covariance=2 * np.eye(3)), (0.1160, 0.0838, 0.0803, 0.0800)),
        (Shift(covariance=np.eye(3) / 2), (0.0830, 0.0667, 0.0649, 0.0648)),
        (Shift(norm_ratios=(1.0, 1.5)), (0.1029, 0.0975, 0.0975, 0.0976)),
    ],
    ids=["none", "prior", "wide", "narrow", "norms"],
)
def test_plateaus_under_shifts(shift, expected):
    found = [
        inference.total_variation(Mixture(3), 2 * np.eye(3), m, shift=shift, **FEW).mean
        for m in (64, 1024, 16384, INFINITE)
    ]
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-12)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_prior_of_the_means_breaks_nothing(scale):
    lengths, shift = np.array([2**12, 2**14, 2**16]), Shift(prior_scale=scale)
    found = [inference.total_variation(Mixture(3), 2 * np.eye(3), int(m), shift=shift, **FEW).mean for m in lengths]
    assert inference.slope(lengths, np.array(found)) == pytest.approx(-0.5, abs=0.01)


@given(st.floats(-5, 5), st.floats(0.05, 3))
def test_folded_normal_against_quadrature(mean, deviation):
    span = 12 * deviation
    density = stats.norm(mean, deviation).pdf
    expected = integrate.quad(lambda x: abs(x) * density(x), mean - span, mean + span, points=[0.0], limit=200)[0]
    found = inference.folded_normal_mean(np.array([mean]), np.array([deviation]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_joint_law_joins_both_limits():
    mixture, first = Mixture(3), -18.23 * np.eye(3)
    limits = inference.constants(mixture, correction=first, **FEW)
    floor = inference.joint_total_variation(mixture, 2 * (np.eye(3) + first / 10**6), INFINITE, **FEW)
    assert 10**6 * floor.mean == pytest.approx(limits.floor.mean, rel=1e-6)
    noise = inference.joint_total_variation(mixture, 2 * np.eye(3), 10**6, **FEW)
    assert 10**3 * noise.mean == pytest.approx(limits.total_variation.mean, rel=1e-6)
    assert inference.crossover(limits, 100) == pytest.approx((0.4883 * 100 / 1.937) ** 2, rel=0.02)


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_the_joint_law_is_within_four_per_cent_where_both_lengths_are_long(length):
    for weights in (WEIGHTS[500] * np.eye(3), 2 * (1 - 18.23 / 500) * np.eye(3)):
        found = inference.joint_total_variation(Mixture(3), weights, length, **FEW).mean
        assert found == pytest.approx(
            inference.total_variation(Mixture(3), WEIGHTS[500] * np.eye(3), length, **FEW).mean, rel=0.04
        )


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="at least two seeds"):
        inference.total_variation(Mixture(2), np.eye(2), 10, points=2**4, seeds=(0,))
    with pytest.raises(ValueError, match="no floor C_N"):
        inference.crossover(inference.constants(Mixture(2), points=2**4), 10)
    with pytest.raises(ValueError, match="label noise"):
        inference.moments(draw(Mixture(2), 4, shift=Shift(label_noise=0.1)), np.eye(2), 10, stratified=True)


def test_bad_lengths_and_weights_are_refused():
    population = draw(Mixture(2), 4)
    calls = [
        lambda weights, length: inference.moments(population, weights, length),
        lambda weights, length: inference.bound(population, weights, length),
        lambda weights, length: inference.total_variation(Mixture(2), weights, length),
        lambda weights, length: inference.joint_total_variation(Mixture(2), weights, length),
    ]
    for call in calls:
        for length in (0, -5, 0.5, 10.7, -math.inf, math.nan):
            with pytest.raises(ValueError, match=r"context length is .*: give a whole number of at least 1"):
                call(np.eye(2), length)
        with pytest.raises(ValueError, match=r"weights have the shape \(3, 3\)"):
            call(np.eye(3), 10)
        with pytest.raises(ValueError, match="weights have entries that are not finite"):
            call(np.full((2, 2), math.inf), 10)
