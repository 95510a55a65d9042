"""Log-probabilities and entropies from hidden states: against the plain softmax, in blocks, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import chunked_logprobs
from rlhf_jax.models.chunked_logprobs import hidden_logprob, positions_at_once


def example(dtype=jnp.float32):
    """States [2, 7, 5], a kernel [5, 11], targets, and weights of log-probabilities and entropies."""
    generator = np.random.default_rng(0)
    states, kernel, weights = (jnp.asarray(generator.normal(size=s), dtype) for s in ((2, 7, 5), (5, 11), (2, 2, 7)))
    return states, kernel, jnp.asarray(generator.integers(0, 11, (2, 7)), jnp.int32), weights


def plain(states, kernel, targets, temperature, softcap):
    logits = states @ kernel
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    logprobs = jax.nn.log_softmax(logits / temperature)
    taken = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return taken, -(jnp.exp(logprobs) * logprobs).sum(axis=-1)


def gradients(function, weights):
    """Scores, and the gradient of their weighted sum by states, kernel and temperature."""

    def total(*arguments):
        scores = function(*arguments)
        return (weights * jnp.stack(scores)).sum(), scores

    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))


def test_quarter_and_sixth_worked_by_hand():
    """States 1 and 2 on log kernels: softmax of log p is p, of 2 log p it is p squared."""
    kernel = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    logprob, entropy = hidden_logprob(jnp.array([[[1.0], [2.0]]]), kernel, jnp.array([[1, 1]]))
    np.testing.assert_allclose(logprob, [[np.log(1 / 4), np.log(1 / 6)]], rtol=1e-6)
    spread = 2 / 3 * np.log(3 / 2) + 1 / 3 * np.log(6)
    np.testing.assert_allclose(entropy, [[1.5 * np.log(2), spread]], rtol=1e-6)


@pytest.mark.parametrize(("softcap", "vocabulary_axis", "block"), [(None, 1, None), (1.5, 0, 3), (None, 0, 4)])
def test_values_and_gradients_are_those_of_the_plain_softmax(softcap, vocabulary_axis, block):
    """In one block, and in three and two of which the last is not full; the kernel either way round."""
    with jax.enable_x64(True):
        states, kernel, targets, weights = example(jnp.float64)

        def found(states, kernel, temperature):
            kernel = kernel if vocabulary_axis == 1 else kernel.T
            return hidden_logprob(states, kernel, targets, temperature, softcap, vocabulary_axis, block)

        given = (states, kernel, jnp.asarray(0.7))
        score = gradients(found, weights)
        value, gradient = score(*given)
        expected = gradients(lambda *x: plain(x[0], x[1], targets, x[2], softcap), weights)(*given)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), (value, gradient), expected)
        generator = np.random.default_rng(1)
        way = [jnp.asarray(generator.normal(size=leaf.shape)) for leaf in given]
        above, below = (score(*(x + h * d for x, d in zip(given, way, strict=True)))[0][0] for h in (1e-5, -1e-5))
        slope = sum((g * d).sum() for g, d in zip(gradient, way, strict=True))
        np.testing.assert_allclose((above - below) / 2e-5, slope, rtol=1e-7)


def test_gradients_by_the_logits_have_their_closed_form():
    """With the identity for a kernel the states are the logits."""
    logits = jnp.array([[[0.3, -1.0, 2.0, 0.5]]])
    p = np.asarray(jax.nn.softmax(logits))
    score = jax.jit(lambda s: hidden_logprob(s, jnp.eye(4), jnp.array([[2]])))
    (_, entropy), pull = jax.vjp(score, logits)
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
    np.testing.assert_allclose(pull((one, zero))[0], np.eye(4)[2] - p, atol=1e-6)
    np.testing.assert_allclose(pull((zero, one))[0], -p * (np.log(p) + entropy[0, 0]), atol=1e-6)


def test_huge_logits_stay_finite():
    """The likely token is certain, the other all but impossible; the entropy and its gradient are 0."""
    states, kernel = jnp.array([[[1e4], [-1e4]]]), jnp.array([[1.0, -1.0]])

    def score(states):
        logprob, entropy = hidden_logprob(states, kernel, jnp.zeros((1, 2), jnp.int32))
        return (logprob + entropy).sum(), (logprob, entropy)

    gradient, (logprob, entropy) = jax.jit(jax.grad(score, has_aux=True))(states)
    np.testing.assert_array_equal(logprob, [[0.0, -2e4]])
    np.testing.assert_array_equal(entropy, [[0.0, 0.0]])
    np.testing.assert_array_equal(gradient, [[[0.0], [2.0]]])


def test_bfloat16_states_give_float32_scores_and_a_float32_sum_over_blocks():
    states, kernel, targets, weights = example()
    half = states.astype(jnp.bfloat16)
    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    found = gradients(lambda s, k, t: hidden_logprob(s, k, targets, t, block=3), weights)(half, kernel, 0.7)
    exact = gradients(lambda *x: plain(x[0], x[1], targets, x[2], None), weights)
    (_, scores), expected = exact(half.astype(jnp.float32), rounded, 0.7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found[0][1], scores)
    assert [leaf.dtype for leaf in (*found[0][1], *found[1])] == [jnp.float32] * 2 + [jnp.bfloat16] + [jnp.float32] * 2
    # The gradient by the logits is rounded to 8 bits before the two products, those are summed in float32.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02), found[1], expected)


def test_lanes_are_the_ones_alone():
    states, kernel, targets, weights = example()
    lanes = (jnp.stack([states, -states]), jnp.stack([kernel, 2 * kernel]), jnp.array([0.7, 1.0]))
    score = gradients(lambda s, k, t: hidden_logprob(s, k, targets, t, block=3), weights)
    together = jax.jit(jax.vmap(score))(*lanes)
    for lane in range(2):
        alone = score(*(leaf[lane] for leaf in lanes))
        jax.tree.map(
            lambda a, b, lane=lane: np.testing.assert_allclose(a[lane], b, rtol=1e-5, atol=1e-6), together, alone
        )


def test_logits_of_all_positions_never_exist():
    states, kernel, targets = jnp.ones((2, 64, 8)), jnp.ones((8, 512)), jnp.zeros((2, 64), jnp.int32)

    def program(block):
        step = jax.grad(lambda s, k: sum(hidden_logprob(s, k, targets, block=block))[0, 0], (0, 1))
        return jax.jit(step).lower(states, kernel).compile()

    whole, blocks = program(64), program(4)
    assert "f32[2,64,512]" in whole.as_text()
    assert "f32[2,4,512]" in blocks.as_text() and "f32[2,64,512]" not in blocks.as_text()
    assert blocks.memory_analysis().temp_size_in_bytes < 4 * 2 * 64 * 512


def test_a_block_follows_from_the_budget(monkeypatch):
    monkeypatch.setattr(chunked_logprobs, "LOGITS_AT_ONCE", 600)
    assert positions_at_once(rows=2, vocabulary=100) == 3
    assert positions_at_once(rows=2, vocabulary=10_000) == 1
    states, kernel, targets, _ = example()
    text = jax.jit(hidden_logprob).lower(jnp.tile(states, (1, 8, 1)), kernel, jnp.tile(targets, (1, 8))).as_text()
    assert "tensor<2x28x11xf32>" not in text and "tensor<2x19x11xf32>" in text  # 56 positions in three blocks of 19


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_a_temperature_that_is_not_positive_is_an_error(temperature):
    states, kernel, targets, _ = example()
    with pytest.raises(ValueError, match="must be positive"):
        hidden_logprob(states, kernel, targets, temperature)


def test_a_kernel_the_wrong_way_round_is_an_error():
    states, kernel, targets, _ = example()
    with pytest.raises(ValueError, match="does not multiply states of width 5"):
        hidden_logprob(states, kernel, targets, vocabulary_axis=0)
