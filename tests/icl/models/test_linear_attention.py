"""The layer with all its matrices against a loop over tokens, and against the forms that it reduces to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.icl.models.linear_attention import (
    SelfAttention,
    class_sums,
    embed,
    label_mean,
    linear_attention,
    read_out,
    reduced_logit,
    reduced_logits,
    reduced_prediction,
    signs,
    sparse,
)
from rlhf_jax.icl.precision import in_float64


def prompt(dimension: int, length: int, classes: int = 2, seed: int = 0, count: int = 3):
    """Inputs, labels and queries of some prompts, and a W that is not symmetric; float64."""
    draw = np.random.default_rng(seed)
    inputs = draw.normal(size=(count, length, dimension))
    labels = draw.integers(0, classes, size=(count, length), dtype=np.int32)
    return inputs, labels, draw.normal(size=(count, dimension)), draw.normal(size=(dimension, dimension))


def by_loop(value, key_query, embedding, normaliser, columns):
    """What the layer adds to every token: sum over the first `columns` tokens i of W_V e_i (e_i' W_KQ e_j), divided."""
    added = np.zeros_like(embedding)
    for j in range(embedding.shape[1]):
        for i in range(columns):
            score = embedding[:, i] @ key_query @ embedding[:, j]
            added[:, j] += value @ embedding[:, i] * score / normaliser
    return added


@in_float64
def full_logits(inputs, labels, query, weights, classes):
    shown = jax.nn.one_hot(jnp.asarray(labels), classes, dtype=jnp.float64)
    embedding = embed(jnp.asarray(inputs), shown, jnp.asarray(query))
    return read_out(linear_attention(sparse(jnp.asarray(weights), classes), embedding), classes)


@in_float64
def full_logit(inputs, labels, query, weights, length=None):
    targets = signs(jnp.asarray(labels), jnp.float64)[..., None]
    embedding = embed(jnp.asarray(inputs), targets, jnp.asarray(query))
    return read_out(linear_attention(sparse(jnp.asarray(weights), 1), embedding, length), 1)[:, 0]


@in_float64
def logits(inputs, labels, query, weights, classes):
    return reduced_logits(
        jnp.asarray(weights), class_sums(jnp.asarray(inputs), jnp.asarray(labels), classes), jnp.asarray(query)
    )


@in_float64
def logit(inputs, labels, query, weights):
    mean = label_mean(jnp.asarray(inputs), signs(jnp.asarray(labels), jnp.float64))
    return reduced_logit(jnp.asarray(weights), mean, jnp.asarray(query))


def test_a_prompt_worked_by_hand():
    """x = 1 and 2 with labels -1 and +1, query 3: p = (2 - 1) / 2, so z = W p x_q = 2 * 0.5 * 3."""
    inputs, labels, query = jnp.array([[[1.0], [2.0]]]), jnp.array([[0, 1]]), jnp.array([[3.0]])
    weights = jnp.array([[2.0]])
    assert label_mean(inputs, signs(labels)).tolist() == [[0.5]]
    assert class_sums(inputs, labels, 2).tolist() == [[[0.5], [1.0]]]
    assert reduced_logit(weights, label_mean(inputs, signs(labels)), query).tolist() == [3.0]
    assert reduced_logits(weights, class_sums(inputs, labels, 2), query).tolist() == [[3.0, 6.0]]
    layer = linear_attention(sparse(weights, 1), embed(inputs, signs(labels)[..., None], query))
    np.testing.assert_allclose(read_out(layer, 1), [[3.0]], rtol=1e-6)


def test_the_full_layer_equals_its_reduced_form_for_two_classes():
    """T1: d = 5, N = 30, float64."""
    data = prompt(5, 30)
    expected = logit(*data)
    assert np.abs(expected).min() > 0.01
    np.testing.assert_allclose(full_logit(*data), expected, rtol=0, atol=1e-12)
    inputs, labels, query, weights = data
    by_hand = [
        np.mean([(2 * y - 1) * x for x, y in zip(*pair, strict=True)], axis=0) @ weights @ q
        for *pair, q in zip(inputs, labels, query, strict=True)
    ]
    np.testing.assert_allclose(expected, by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_full_layer_equals_its_reduced_form_for_many_classes(classes):
    data = prompt(5, 30, classes)
    expected = logits(*data, classes)
    np.testing.assert_allclose(full_logits(*data, classes), expected, rtol=0, atol=1e-12)
    inputs, labels, query, weights = data
    for b in range(3):
        for k in range(classes):
            sums = sum((inputs[b, i] for i in range(30) if labels[b, i] == k), np.zeros(5)) / 30
            assert abs(sums @ weights @ query[b] - expected[b, k]) < 1e-12


def test_two_classes_are_the_binary_case_with_the_same_weights():
    data = prompt(5, 30)
    both = logits(*data, 2)
    np.testing.assert_allclose(both[:, 1] - both[:, 0], logit(*data), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attend_to_query", [True, False])
def test_free_matrices_against_a_loop_over_tokens(attend_to_query):
    draw = np.random.default_rng(1)
    value, key_query = draw.normal(size=(2, 5, 5))
    embedding = draw.normal(size=(3, 5, 8))

    @in_float64
    def layer(*arrays):
        value, key_query, embedding = map(jnp.asarray, arrays)
        return linear_attention(SelfAttention(value, key_query), embedding, attend_to_query=attend_to_query)

    found = layer(value, key_query, embedding)
    expected = [by_loop(value, key_query, one, 7, 8 if attend_to_query else 7) for one in embedding]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


def test_regression_reads_the_residual_stream():
    """E + F at the query is x_q' A p with A = u U'; the residual itself adds the zero that stands there."""
    draw = np.random.default_rng(2)
    block, targets, scale = draw.normal(size=(4, 4)), draw.normal(size=(3, 9)), 0.7
    inputs, _, query, _ = prompt(4, 9)

    @in_float64
    def both(*arrays):
        block, inputs, targets, query = map(jnp.asarray, arrays)
        embedding = embed(inputs, targets[..., None], query)
        stream = embedding + linear_attention(sparse(block, 1, scale), embedding)
        return read_out(stream, 1)[:, 0], reduced_prediction(scale * block.T, label_mean(inputs, targets), query)

    full, reduced = both(block, inputs, targets, query)
    np.testing.assert_allclose(full, reduced, rtol=0, atol=1e-12)
    mean = np.einsum("bn,bnd->bd", targets, inputs) / 9
    np.testing.assert_allclose(reduced, np.einsum("bd,de,be->b", query, scale * block.T, mean), rtol=0, atol=1e-12)


def test_dividing_by_the_length_of_training_scales_the_logit():
    """N = 10 in training, M = 30 in the test: dividing by N multiplies the logit by M / N = 3."""
    data = prompt(5, 30)
    np.testing.assert_allclose(full_logit(*data, 10), 3 * full_logit(*data), rtol=1e-12)


def test_padding_with_zeros_changes_nothing_if_the_length_is_given():
    inputs, labels, query, weights = prompt(3, 6)
    expected = full_logit(inputs, labels, query, weights)
    padded = np.pad(inputs, ((0, 0), (0, 4), (0, 0)))

    @in_float64
    def longer(length):
        targets = jnp.pad(signs(jnp.asarray(labels), jnp.float64), ((0, 0), (0, 4)))[..., None]
        embedding = embed(jnp.asarray(padded), targets, jnp.asarray(query))
        traced = jax.jit(lambda length: linear_attention(sparse(jnp.asarray(weights), 1), embedding, length))
        return read_out(traced(length), 1)[:, 0]

    np.testing.assert_allclose(longer(6.0), expected, rtol=1e-12)


# Few shapes, because each is compiled; many values.
settings = st.tuples(st.sampled_from([(1, 2, 2), (4, 9, 3)]), st.integers(0, 1000))


@given(settings)
def test_the_order_of_the_context_does_not_matter(setting):
    (dimension, length, classes), seed = setting
    inputs, labels, query, weights = prompt(dimension, length, classes, seed)
    order = np.random.default_rng(seed).permutation(length)
    expected = full_logits(inputs, labels, query, weights, classes)
    found = full_logits(inputs[:, order], labels[:, order], query, weights, classes)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


@given(settings)
def test_a_context_copied_after_itself_says_the_same(setting):
    (dimension, length, classes), seed = setting
    inputs, labels, query, weights = prompt(dimension, length, classes, seed)
    expected = full_logits(inputs, labels, query, weights, classes)
    found = full_logits(np.tile(inputs, (1, 2, 1)), np.tile(labels, (1, 2)), query, weights, classes)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


@given(st.integers(0, 1000))
def test_exchanged_labels_turn_the_logit_round(seed):
    """Exchanging the two classes everywhere is the same as flipping the labels: the probability y becomes 1 - y."""
    inputs, labels, query, weights = prompt(3, 7, 2, seed)
    np.testing.assert_allclose(
        full_logit(inputs, 1 - labels, query, weights), -full_logit(inputs, labels, query, weights), rtol=0, atol=1e-12
    )
    exchanged = logits(inputs, 1 - labels, query, weights, 2)
    np.testing.assert_allclose(exchanged, logits(inputs, labels, query, weights, 2)[:, ::-1], rtol=0, atol=1e-12)


@given(st.integers(0, 1000))
def test_a_vector_added_to_every_sum_moves_no_probability(seed):
    draw = np.random.default_rng(seed)
    sums, shift, query, weights = (draw.normal(size=s) for s in ((3, 4, 2), (3, 1, 2), (3, 2), (2, 2)))

    @in_float64
    def probabilities(*arrays):
        weights, sums, query = map(jnp.asarray, arrays)
        return jax.nn.softmax(reduced_logits(weights, sums, query), axis=-1)

    before, after = probabilities(weights, sums, query), probabilities(weights, sums + shift, query)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-12)


def test_the_dtype_is_that_of_the_inputs_under_jit():
    inputs, labels, query, weights = (jnp.asarray(array.astype("f4")) for array in prompt(3, 7))

    @jax.jit
    def run(weights):
        shown = jax.nn.one_hot(labels.astype(jnp.int32), 2)
        return read_out(linear_attention(sparse(weights, 2), embed(inputs, shown, query)), 2)

    assert run(weights).dtype == jnp.float32
    np.testing.assert_allclose(run(weights), full_logits(*prompt(3, 7), 2), atol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    embedding, eye = jnp.zeros((2, 4, 5)), jnp.eye(3)
    with pytest.raises(ValueError, match=r"tokens have 4 entries .* \(3, 3\) and \(3, 3\): make them equal"):
        linear_attention(SelfAttention(eye, eye), embedding)
    with pytest.raises(ValueError, match="a query alone"):
        linear_attention(sparse(eye, 1), embedding[:, :, :1])
