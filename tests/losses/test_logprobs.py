"""Log-probabilities and entropies from logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.logprobs import entropy, token_logprob


def random_logits(shape=(2, 3, 7), seed=0):
    generator = np.random.default_rng(seed)
    return 3.0 * generator.normal(size=shape), generator.integers(0, shape[-1], shape[:-1])


def test_quarter_and_sixth_worked_by_hand():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.25]))
    np.testing.assert_allclose(token_logprob(logits, jnp.array(1)), np.log(1 / 4), rtol=1e-6)
    np.testing.assert_allclose(token_logprob(logits, jnp.array(1), 0.5), np.log(1 / 6), rtol=1e-6)
    np.testing.assert_allclose(entropy(logits), 1.5 * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1, 0.7, 2.5])
def test_both_equal_numpy_in_float64(temperature):
    logits, tokens = random_logits()
    scaled = logits / temperature
    logprobs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    with jax.enable_x64(True):
        taken = token_logprob(jnp.asarray(logits), jnp.asarray(tokens), temperature)
        np.testing.assert_allclose(taken, np.take_along_axis(logprobs, tokens[..., None], -1)[..., 0], rtol=1e-12)
        spread = entropy(jnp.asarray(logits), temperature)
        np.testing.assert_allclose(spread, -(np.exp(logprobs) * logprobs).sum(-1), rtol=1e-12)
        assert taken.dtype == spread.dtype == jnp.float64


def test_bfloat16_logits_are_raised_before_the_softmax():
    logits, tokens = random_logits()
    half = jnp.asarray(logits, jnp.bfloat16)
    for function in (lambda x: token_logprob(x, jnp.asarray(tokens)), entropy):
        assert function(half).dtype == jnp.float32
        np.testing.assert_array_equal(function(half), function(half.astype(jnp.float32)))


def test_a_shift_of_the_logits_changes_nothing_and_large_ones_stay_finite():
    logits, tokens = random_logits()
    logits, tokens = jnp.asarray(logits, jnp.float32), jnp.asarray(tokens)
    np.testing.assert_allclose(token_logprob(logits + 64.0, tokens), token_logprob(logits, tokens), atol=2e-5)
    assert np.isfinite(token_logprob(1e30 * logits, tokens, 10.0)).all()


def test_gradient_is_one_hot_minus_probabilities():
    logits, tokens = random_logits((7,))
    gradient = jax.grad(lambda x: token_logprob(x, jnp.asarray(tokens), 0.5))(jnp.asarray(logits, jnp.float32))
    probabilities = np.exp(2 * logits) / np.exp(2 * logits).sum()
    np.testing.assert_allclose(gradient, 2 * (np.eye(7)[tokens] - probabilities), atol=1e-6)


def test_impossible_tokens_leave_entropy_and_its_gradient_finite():
    logits = jnp.array([0.0, 0.0, -jnp.inf])
    value, gradient = jax.value_and_grad(entropy)(logits)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)
    assert float(token_logprob(logits, jnp.array(2))) == -np.inf


def test_jit_and_a_traced_temperature_give_the_same():
    logits, tokens = random_logits()
    logits, tokens = jnp.asarray(logits, jnp.float32), jnp.asarray(tokens)
    jitted = jax.jit(token_logprob)(logits, tokens, jnp.float32(0.7))
    np.testing.assert_allclose(jitted, token_logprob(logits, tokens, 0.7), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(entropy)(logits, jnp.float32(0.7)), entropy(logits, 0.7), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_an_error(temperature):
    with pytest.raises(ValueError, match="must be positive"):
        token_logprob(jnp.zeros(3), jnp.array(0), temperature)
    with pytest.raises(ValueError, match="must be positive"):
        entropy(jnp.zeros(3), temperature)
