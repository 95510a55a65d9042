import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from rlhf_jax.icl.claims.generality import raw_prompts
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.theory.losses import cross_entropy
from rlhf_jax.icl.theory.minimiser import (
    derivatives,
    draw_coordinates,
    draw_invariants,
    isotropic_weight,
    matrix,
    minimiser,
    newton,
    replicates,
)
from rlhf_jax.icl.theory.population import draw, mirrored

CORRELATED = Mixture(3, covariance=[[1.0, 0.4, 0.1], [0.4, 0.8, -0.2], [0.1, -0.2, 0.6]])


def test_seven_invariants_give_the_weight_of_all_coordinates() -> None:
    mixture, length, seeds = Mixture(3, prior_scale=0.8), 30, range(4)
    found = np.array(
        [
            [newton(way(mixture, length, False, 2**13, seed), length)[0] for seed in seeds]
            for way in (draw_invariants, draw_coordinates)
        ]
    )
    errors = found.std(axis=1, ddof=1) / np.sqrt(len(seeds))
    assert abs(found[0].mean() - found[1].mean()) < 3 * np.hypot(*errors)
    assert errors.max() < 5e-3


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize(("classes", "length"), [(2, 7), (3, 40)])
def test_derivatives_are_those_of_the_loss(classes: int, length: int, stratified: bool) -> None:
    mixture = Mixture(3, classes, CORRELATED.covariance)
    points = draw_coordinates(mixture, length, stratified, 2**9, 0)
    weights, step = np.array([0.9, 1.7, -0.4]), 1e-5
    value, gradient, hessian = derivatives(weights, points)
    population = draw(mixture, 2**9, 0)
    pair = [
        cross_entropy(one, matrix(mixture, weights), length, stratified) for one in (population, mirrored(population))
    ]
    assert value == pytest.approx(np.mean(pair), rel=1e-12)
    around = [[derivatives(weights + sign * step * e, points) for sign in (1, -1)] for e in np.eye(3)]
    np.testing.assert_allclose(gradient, [(up[0] - down[0]) / (2 * step) for up, down in around], rtol=1e-7)
    np.testing.assert_allclose(hessian, [(up[1] - down[1]) / (2 * step) for up, down in around], rtol=1e-6, atol=1e-9)


def test_the_gradient_of_raw_prompts_is_zero_there() -> None:
    mixture, length = Mixture(3, 3, CORRELATED.covariance), 25
    found = replicates(mixture, length, seeds=2, points=2**14).mean(axis=0)
    prompts = raw_prompts(mixture, length, 1, 40_000, np.random.default_rng(0))

    def scores(weights: np.ndarray) -> np.ndarray:
        """(gradient / its standard error) for each entry of W, from hard labels."""
        z = np.einsum("nkd,nd->nk", prompts.sums, prompts.query @ weights.T)
        left = np.einsum("nk,nkd->nd", softmax(z, axis=1) - np.eye(3)[prompts.label], prompts.sums)
        gradients = left[:, :, None] * prompts.query[:, None, :]
        return gradients.mean(axis=0) / gradients.std(axis=0) * np.sqrt(len(z))

    assert np.abs(scores(found)).max() < 3.5
    assert np.abs(scores(3 * mixture.inverse)).max() > 20  # the limit of long contexts is not the minimiser


@given(st.floats(0.1, 10.0), st.integers(2, 3))
@settings(max_examples=8)
def test_a_change_of_units_only_rescales_it(scale: float, classes: int) -> None:
    covariance = np.array(CORRELATED.covariance)
    given_ = minimiser(Mixture(3, classes, covariance), 20, points=2**8)
    other = minimiser(Mixture(3, classes, scale * covariance, np.sqrt(scale)), 20, points=2**8)
    np.testing.assert_allclose(scale * other, given_, rtol=1e-6, atol=1e-8)


def test_it_turns_with_the_covariance() -> None:
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turned = Mixture(3, covariance=turn @ CORRELATED.matrix @ turn.T)
    found, other = (replicates(one, 60, seeds=4, points=2**13) for one in (CORRELATED, turned))
    difference = turn.T @ other @ turn - found.mean(axis=0)
    error = np.sqrt((found.var(axis=0, ddof=1) + difference.var(axis=0, ddof=1)) / 4)
    assert (np.abs(difference.mean(axis=0)) < 5 * error + 1e-12).all()
    np.testing.assert_allclose(found, np.swapaxes(found, 1, 2), rtol=1e-12)


def test_long_contexts_lead_to_the_limit_and_stratified_ones_are_nearer() -> None:
    limit = 2 * CORRELATED.inverse
    distances = [
        np.linalg.norm(minimiser(CORRELATED, length, stratified, points=2**12) - limit)
        for length, stratified in ((100, False), (100, True), (100_000, False))
    ]
    assert distances[0] > 1.5 * distances[1] > 30 * distances[2]


def test_the_smallest_settings() -> None:
    assert minimiser(Mixture(1), 1, points=2**8).shape == (1, 1)
    assert 0 < minimiser(Mixture(2, 4, prior_scale=3.0), 1, points=2**10)[0, 0] < 4


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^the context length is 0: give a whole number of at least 1\.$"):
        minimiser(Mixture(3), 0)
    with pytest.raises(ValueError, match=r"^the context length is 0: "):
        minimiser(CORRELATED, 0)
    with pytest.raises(ValueError, match="give a power of two"):
        minimiser(Mixture(3), 20, points=1000)
    for call in (replicates, isotropic_weight):
        with pytest.raises(ValueError, match="number of seeds is 1: give a whole number of at least 2"):
            call(Mixture(3), 20, seeds=1)
    with pytest.raises(ValueError, match="call `minimiser`"):
        isotropic_weight(CORRELATED, 20)
