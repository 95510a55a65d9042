import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.shift import Shift
from rlhf_jax.icl.theory.losses import bayes_error, bayes_loss, cross_entropy, gradient, loss
from rlhf_jax.icl.theory.minimiser import minimiser
from rlhf_jax.icl.theory.population import draw

CORRELATED = Mixture(3, 3, [[1.0, 0.4, 0.1], [0.4, 0.8, -0.2], [0.1, -0.2, 0.6]])


@pytest.mark.parametrize(("dimension", "entropy", "error"), [(3, 0.36139, 0.18169), (5, 0.23083, 0.10469)])
def test_what_bayes_reaches(dimension: int, entropy: float, error: float) -> None:
    assert bayes_loss(Mixture(dimension), points=2**16) == pytest.approx(entropy, rel=5e-3)
    assert bayes_error(Mixture(dimension), points=2**16) == pytest.approx(error, rel=5e-3)


def test_loss_at_zero_and_in_the_limit() -> None:
    assert loss(CORRELATED, np.zeros((3, 3)), 20, points=2**8) == pytest.approx(math.log(3))
    reached = loss(CORRELATED, 3 * CORRELATED.inverse, math.inf, points=2**8)
    assert reached == pytest.approx(bayes_loss(CORRELATED, points=2**8), rel=1e-12)


def test_the_trained_weights_lose_less_than_their_limit() -> None:
    trained = minimiser(CORRELATED, 30, points=2**12)
    assert (
        loss(CORRELATED, trained, 30, points=2**12) < loss(CORRELATED, 3 * CORRELATED.inverse, 30, points=2**12) - 0.02
    )


@given(st.integers(0, 2**31), st.integers(1, 200), st.floats(0.0, 1.0))
def test_bayes_loses_least_at_every_point(seed: int, length: int, noise: float) -> None:
    weights = 2 * np.random.default_rng(seed).normal(size=(3, 3))
    for shift in (Shift(), Shift(class_probabilities=(0.6, 0.3, 0.1), label_noise=noise)):
        population = draw(CORRELATED, 2**6, seed, shift)
        chances = softmax(population.logits, axis=1)
        entropy = -np.sum(chances * np.log(np.maximum(chances, 1e-300)), axis=1)
        assert (cross_entropy(population, weights, length) >= entropy - 1e-12).all()


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("shift", [Shift(), Shift(covariance=np.diag([1.0, 2.0, 3.0]), label_noise=0.2)])
def test_gradient_is_that_of_the_loss(shift: Shift, stratified: bool) -> None:
    population = draw(CORRELATED, 2**8, 0, shift)
    weights = np.random.default_rng(0).normal(size=(3, 3))
    step, slopes = 1e-5, np.zeros((3, 3))
    for index in np.ndindex(3, 3):
        change = np.zeros((3, 3))
        change[index] = step
        ends = [cross_entropy(population, weights + sign * change, 12, stratified).mean() for sign in (1, -1)]
        slopes[index] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(gradient(population, weights, 12, stratified), slopes, rtol=1e-6, atol=1e-9)


def test_a_class_that_never_comes_up_costs_nothing() -> None:
    mixture = Mixture(2, 3)
    shift = Shift(class_probabilities=(0.5, 0.5, 0.0))
    least = bayes_loss(mixture, points=2**8, shift=shift)
    assert 0 < least < math.log(2)
    assert least < loss(mixture, 3 * np.eye(2), 20, points=2**8, shift=shift) < math.inf
    certain = Shift(class_probabilities=(0.0, 1.0, 0.0))
    assert bayes_loss(mixture, points=2**4, shift=certain) == bayes_error(mixture, points=2**4, shift=certain) == 0


def test_gradient_at_zero_weights_is_that_of_the_signal() -> None:
    population = draw(CORRELATED, 2**8, 0)
    error = 1 / 3 - softmax(population.logits, axis=1)
    expected = np.einsum("nk,nkd,ne->de", error, population.means / 3, population.query) / 2**8
    np.testing.assert_allclose(gradient(population, np.zeros((3, 3)), 12, stratified=True), expected, atol=1e-13)


def test_bad_lengths_and_weights_are_refused() -> None:
    population = draw(CORRELATED, 2**4)
    for length in (0, -5, 0.5, 10.7, -math.inf, math.nan):
        for call in (
            lambda n: gradient(population, np.eye(3), n),
            lambda n: cross_entropy(population, np.eye(3), n),
            lambda n: loss(CORRELATED, np.eye(3), n),
        ):
            with pytest.raises(ValueError, match=r"context length is .*: give a whole number of at least 1"):
                call(length)
    with pytest.raises(ValueError, match="context length is inf"):
        gradient(population, np.eye(3), math.inf)
    for call in (lambda w: gradient(population, w, 5), lambda w: loss(CORRELATED, w, 5)):
        with pytest.raises(ValueError, match=r"weights have the shape \(2, 2\)"):
            call(np.eye(2))
        with pytest.raises(ValueError, match="weights have entries that are not finite"):
            call(np.full((3, 3), math.nan))
