"""Kinds of attention: each against a loop, linear against the linear layer, and what a permutation must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.icl.models.attention import KINDS, attend, init_attention, predict
from rlhf_jax.icl.models.linear_attention import SelfAttention, embed, linear_attention, read_out, sparse
from rlhf_jax.icl.precision import in_float64


def weights_of(kind, scores, examples):
    if kind == "softmax":
        return np.exp(scores) / np.exp(scores).sum()
    return (np.maximum(scores, 0) if kind == "relu" else scores) / examples


def by_loop(kind, value, key_query, embedding, attend_to_query):
    """F [w, S] of one prompt, heads on axis 0 of the matrices."""
    examples = embedding.shape[1] - 1
    seen = embedding if attend_to_query else embedding[:, :-1]
    result = np.zeros_like(embedding)
    for w_v, w_kq in zip(value, key_query, strict=True):
        for j in range(examples + 1):
            scores = np.array([e @ w_kq @ embedding[:, j] for e in seen.T])
            result[:, j] += w_v @ seen @ weights_of(kind, scores, examples)
    return result


@pytest.fixture
def data():
    draw = np.random.default_rng(0)
    return *draw.normal(size=(2, 2, 4, 4)), draw.normal(size=(3, 4, 6))


@in_float64
def run(function, value, key_query, embedding, **options):
    return function(SelfAttention(jnp.asarray(value), jnp.asarray(key_query)), jnp.asarray(embedding), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attend_to_query", [True, False])
def test_every_kind_against_a_loop_over_tokens(kind, attend_to_query, data):
    value, key_query, embedding = data
    expected = [by_loop(kind, value, key_query, one, attend_to_query) for one in embedding]
    options = dict(attend_to_query=attend_to_query)
    found = run(lambda *a, **o: attend(kind, *a, **o), *data, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)
    query = run(lambda *a, **o: predict(kind, *a, 2, **o), *data, **options)
    np.testing.assert_allclose(query, np.stack(expected)[:, 2:, -1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("attend_to_query", [True, False])
def test_the_linear_kind_is_the_linear_layer(attend_to_query, data):
    value, key_query, embedding = data
    one = (value[0], key_query[0], embedding)
    found = run(lambda *a, **o: attend("linear", *a, **o), *one, attend_to_query=attend_to_query)
    np.testing.assert_allclose(found, run(linear_attention, *one, attend_to_query=attend_to_query), atol=1e-12)


def prompts(length=9):
    draw = np.random.default_rng(1)
    labels = np.eye(3)[draw.integers(0, 3, size=(2, length))]
    return draw.normal(size=(2, length, 3)), labels, draw.normal(size=(2, 3)), draw.normal(size=(3, 3))


@in_float64
def logits(kind, inputs, labels, query, weights, outputs=3, attend_to_query=True):
    prompt = embed(*map(jnp.asarray, (inputs, labels, query)))
    return predict(kind, sparse(jnp.asarray(weights), outputs), prompt, outputs, attend_to_query)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_context_does_not_matter(kind):
    inputs, labels, query, weights = prompts()
    order = np.random.default_rng(2).permutation(9)
    expected = logits(kind, inputs, labels, query, weights)
    np.testing.assert_allclose(
        logits(kind, inputs[:, order], labels[:, order], query, weights), expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_opposite_labels_give_opposite_predictions(kind):
    """W_KQ of the sparse form does not read labels, so every kind is linear in them."""
    inputs, labels, query, weights = prompts()
    expected = logits(kind, inputs, labels, query, weights)
    np.testing.assert_allclose(logits(kind, inputs, -labels, query, weights), -expected, rtol=0, atol=1e-12)


def test_softmax_over_the_examples_is_a_kernel_average_of_their_labels():
    """Nadaraya and Watson: sum_i k(x_i, x) y_i / sum_i k(x_i, x), k = exp(x_i' W x); it sums to 1 over the classes."""
    inputs, labels, query, weights = prompts()
    found = logits("softmax", inputs, labels, query, weights, attend_to_query=False)
    kernel = np.exp(np.einsum("bnd,de,be->bn", inputs, weights, query))
    np.testing.assert_allclose(
        found, np.einsum("bn,bnc->bc", kernel, labels) / kernel.sum(1, keepdims=True), atol=1e-12
    )
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)


def test_relu_of_positive_scores_is_linear_and_of_negative_ones_nothing():
    inputs, labels, query, _ = prompts()
    inputs, query = np.abs(inputs), np.abs(query)
    linear = logits("linear", inputs, labels, query, np.eye(3))
    np.testing.assert_allclose(logits("relu", inputs, labels, query, np.eye(3)), linear, atol=1e-12)
    np.testing.assert_array_equal(logits("relu", inputs, labels, query, -np.eye(3)), np.zeros((2, 3)))


def test_initial_matrices_and_gradients_in_float32():
    inputs, labels, query, _ = (jnp.asarray(array, jnp.float32) for array in prompts())
    attention = init_attention(jax.random.key(0), 6, heads=50, scale=0.3)
    assert attention.value.shape == attention.key_query.shape == (50, 6, 6)
    assert all(abs(float(matrix.std()) / 0.3 - 1) < 0.06 for matrix in attention)  # 1800 entries: 0.3 / sqrt(3600)
    assert not jnp.array_equal(attention.value, attention.key_query)
    prompt = embed(inputs, labels, query)

    @jax.jit
    def gradient(attention):
        return jax.grad(lambda attention: jnp.square(predict("softmax", attention, prompt, 3)).sum())(attention)

    for matrix in gradient(attention):
        assert matrix.dtype == jnp.float32 and bool((jnp.abs(matrix).max(axis=(1, 2)) > 0).all())


def test_an_unknown_kind_and_matrices_of_another_width_are_refused():
    prompt = jnp.zeros((1, 4, 5))
    attention = sparse(jnp.eye(3), 1)
    with pytest.raises(ValueError, match="'cosine': choose one of linear, relu, softmax"):
        attend("cosine", attention, prompt)
    with pytest.raises(ValueError, match="tokens have 4 entries"):
        predict("softmax", sparse(jnp.eye(3), 2), prompt, 2)
    with pytest.raises(ValueError, match="a query alone"):
        predict("softmax", attention, prompt[:, :, :1], 1)
    with pytest.raises(ValueError, match="number of heads is 0"):
        init_attention(jax.random.key(0), 4, heads=0)
    with pytest.raises(ValueError, match="scale of the matrices is 0"):
        init_attention(jax.random.key(0), 4, scale=0.0)
    assert read_out(attend("softmax", attention, prompt), 1).shape == (1, 1)
