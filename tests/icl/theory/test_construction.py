"""One step of gradient descent: the best learning rate, against the published table and drawn prompts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.icl.theory import construction as theory
from rlhf_jax.icl.theory import gradient_flow


@pytest.mark.parametrize(
    ("dimension", "length", "rate", "loss"),
    [(10, 10, 1.5152, 0.8249), (5, 10, 2.0270, 0.2703), (10, 25, 2.1552, 0.4693)],
)
def test_the_table_of_uniform_inputs(dimension, length, rate, loss):
    inputs = theory.uniform_inputs(2.0)
    assert abs(theory.best_rate(dimension, length, inputs) - rate) < 1e-4
    assert abs(theory.best_loss(dimension, length, inputs) - loss) < 1e-4
    assert np.isclose(
        theory.step_loss(theory.best_rate(dimension, length, inputs), dimension, length, inputs),
        theory.best_loss(dimension, length, inputs),
        rtol=1e-13,
    )


def test_the_loss_of_any_rate_is_that_of_drawn_prompts_with_noise():
    rng, count = np.random.default_rng(0), 200_000
    inputs, weights = rng.uniform(-0.5, 0.5, (count, 6, 3)), rng.standard_normal((count, 3))
    targets = np.einsum("bnd,bd->bn", inputs, weights) + 0.3 * rng.standard_normal((count, 6))
    query = rng.uniform(-0.5, 0.5, (count, 3))
    for rate in (2.0, 9.0):
        step = rate / 6 * np.einsum("bn,bnd->bd", targets, inputs)
        losses = np.sum((step - weights) * query, axis=1) ** 2 / 2
        expected = theory.step_loss(rate, 3, 6, theory.uniform_inputs(1.0), noise_variance=0.09)
        assert abs(losses.mean() - expected) < 4 * losses.std() / np.sqrt(count)


def test_gaussian_inputs_are_those_of_the_theory_of_one_layer():
    best = gradient_flow.minimiser(np.eye(4), 9, noise_variance=0.7)
    assert np.isclose(theory.best_rate(4, 9, noise_variance=0.7), best[0, 0], rtol=1e-13)
    expected = gradient_flow.risk(best, np.eye(4), 9, noise_variance=0.7) / 2
    assert np.isclose(theory.best_loss(4, 9, noise_variance=0.7), expected, rtol=1e-12)


@given(st.integers(1, 20), st.integers(1, 50), st.floats(0.1, 10.0), st.floats(0.5, 2.0))
def test_the_best_rate_goes_with_one_over_the_squared_width(dimension, length, width, factor):
    narrow, wide = theory.uniform_inputs(width), theory.uniform_inputs(width * factor)
    rate = theory.best_rate(dimension, length, narrow)
    assert np.isclose(theory.best_rate(dimension, length, wide), rate / factor**2, rtol=1e-12)
    for other in (0.9 * rate, 1.1 * rate):
        assert theory.step_loss(other, dimension, length, narrow) > theory.best_loss(dimension, length, narrow)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: theory.uniform_inputs(0.0), "width of the inputs is 0"),
        (lambda: theory.best_rate(0, 3), "dimension d is 0"),
        (lambda: theory.best_rate(2, 3, theory.InputMoments(1.0, 0.5)), "no input has"),
        (lambda: theory.uniform_inputs(np.inf), "width of the inputs is inf"),
        (lambda: theory.best_rate(2, 3, noise_variance=-1.0), "noise variance is -1"),
        (lambda: theory.step_loss(np.nan, 2, 3), "learning rate is nan"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
