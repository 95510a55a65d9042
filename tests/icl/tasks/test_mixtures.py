"""Prompts of mixtures: the law that they are to have, in both forms, and what jit, vmap and float64 make of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.models.linear_attention import class_sums
from rlhf_jax.icl.shift import Shift, shifted
from rlhf_jax.icl.tasks.mixtures import bayes_logits, draw_means, draw_prompts, draw_statistics

COVARIANCE = ((1.0, 0.4, 0.1), (0.4, 0.8, -0.2), (0.1, -0.2, 0.6))
SHIFT = Shift(
    class_probabilities=(0.5, 0.3, 0.2),
    covariance=((2.0, 0.0, 0.3), (0.0, 1.0, 0.0), (0.3, 0.0, 0.5)),
    norm_ratios=(1.0, 1.5, 0.5),
    label_noise=0.2,
)
PLAIN = shifted(Mixture(3, 2))
SKEWED = shifted(Mixture(3, 3, COVARIANCE))
SHIFTED = shifted(Mixture(3, 3, COVARIANCE), SHIFT)


def compiled(function, *arrays):
    """The result of one program in place of one for every operation, which would take longer to compile."""
    return jax.jit(function)(*arrays)


def means_of(key, law, count):
    return compiled(lambda key: draw_means(key, law, count), key)


def close(one, other, atol=1e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("law", [PLAIN, SKEWED, SHIFTED])
def test_means_are_equally_long_in_the_metric_of_the_covariance_but_for_the_ratios(law, key):
    means = np.asarray(means_of(key, law, 50), np.float64) / law.norm_ratios[None, :, None]
    lengths = np.sqrt(np.einsum("bkd,de,bke->bk", means, law.mixture.inverse, means))
    np.testing.assert_allclose(lengths, np.broadcast_to(lengths[:, :1], lengths.shape), rtol=1e-4)


def test_the_first_mean_is_normal_and_the_directions_of_the_others_are_uniform(key):
    means = np.asarray(compiled(lambda key: draw_means(key, SKEWED, 20_000, 1.5), key), np.float64)
    values, vectors = SKEWED.mixture.eigen
    whitened = means @ (vectors / np.sqrt(values)) @ vectors.T
    directions = whitened / np.linalg.norm(whitened, axis=2, keepdims=True)
    np.testing.assert_allclose(means[:, 0].T @ means[:, 0] / 20_000, 1.5**2 * np.eye(3), atol=4 * 2.25 * 0.01)
    for k in (1, 2):
        np.testing.assert_allclose(directions[:, k].mean(axis=0), 0, atol=4 * np.sqrt(1 / 3 / 20_000))
        np.testing.assert_allclose(directions[:, k].T @ directions[:, k] / 20_000, np.eye(3) / 3, atol=4 * 0.3 / 141)
        np.testing.assert_allclose((directions[:, k] * directions[:, 0]).sum(axis=1).mean(), 0, atol=4 * 0.58 / 141)


def test_the_prior_scale_multiplies_the_means_and_may_be_traced(key):
    base = draw_means(key, SKEWED, 10)
    scales = jnp.array([0.5, 1.0, 3.0])
    mapped = jax.jit(jax.vmap(lambda scale: draw_means(key, SKEWED, 10, scale)))(scales)
    close(mapped, scales[:, None, None, None] * base[None])
    close(draw_means(key, SKEWED, 10, 3), mapped[2])


def test_one_dimension(key):
    means = np.asarray(means_of(key, shifted(Mixture(1, 4)), 100))
    np.testing.assert_allclose(np.abs(means), np.broadcast_to(np.abs(means[:, :1]), means.shape), rtol=1e-6)
    assert (means[:, 1] > 0).any() and (means[:, 1] < 0).any()


def test_a_direction_of_length_zero_is_not_nan(key, monkeypatch):
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.zeros(shape).at[:, 0].set(2.0))
    assert draw_means(key, PLAIN, 1).tolist() == [[[2.0, 2.0, 2.0], [pytest.approx(np.sqrt(12)), 0.0, 0.0]]]


def test_raw_prompts_follow_their_law(key):
    """Of one task: P(class), x given its class, P(shown label | class), all under a shift, for context and query."""
    means = jnp.broadcast_to(means_of(key, SHIFTED, 1) * 20, (4000, 3, 3))  # far apart: the nearest mean is its class
    prompt = compiled(lambda key, means: draw_prompts(key, SHIFTED, means, 5), jax.random.fold_in(key, 1), means)
    centres, count = np.asarray(means[0], np.float64), 20_000
    inputs, shown = np.asarray(prompt.inputs, np.float64).reshape(-1, 3), np.asarray(prompt.labels).reshape(-1)
    true = np.linalg.norm(inputs[:, None] - centres, axis=2).argmin(axis=1)
    joint = np.bincount(3 * true + shown, minlength=9).reshape(3, 3) / count
    expected = SHIFTED.probabilities[:, None] * (0.8 * np.eye(3) + 0.1 * (1 - np.eye(3)))
    np.testing.assert_allclose(joint, expected, atol=4 * np.sqrt(0.25 / count))
    rest = inputs - centres[true]
    np.testing.assert_allclose(rest.mean(axis=0), 0, atol=4 * np.sqrt(2 / count))
    np.testing.assert_allclose(np.cov(rest.T), SHIFTED.covariance, atol=4 * 2 * np.sqrt(2 / count))

    query, label = np.asarray(prompt.query, np.float64), np.asarray(prompt.query_label)
    assert (np.linalg.norm(query[:, None] - centres, axis=2).argmin(axis=1) == label).all()
    np.testing.assert_allclose(np.bincount(label) / 4000, SHIFTED.probabilities, atol=4 * np.sqrt(0.25 / 4000))
    np.testing.assert_allclose(np.cov((query - centres[label]).T), SHIFTED.covariance, atol=4 * 2 * np.sqrt(2 / 4000))


def test_a_class_of_probability_zero_is_never_seen(key):
    law = shifted(Mixture(2, 3), Shift(class_probabilities=(0.5, 0.0, 0.5)))
    certain = shifted(Mixture(2, 2), Shift(class_probabilities=(0.0, 1.0)))

    def drawn(key):
        means = draw_means(key, law, 300)
        sure = draw_statistics(key, certain, means[:, :2], 10)
        return draw_prompts(key, law, means, 10), draw_statistics(key, law, means, 10), sure

    prompt, statistics, sure = compiled(drawn, key)
    assert set(np.unique(prompt.labels)) == set(np.unique(prompt.query_label)) == {0, 2}
    assert (np.asarray(statistics.sums)[:, 1] == 0).all()
    assert (np.asarray(sure.query_label) == 1).all()


@pytest.mark.parametrize(("law", "length", "shown"), [(SKEWED, 12, [4, 4, 4]), (SHIFTED, 100, [45, 31, 24])])
def test_stratified_contexts_hold_exact_numbers_in_random_order(law, length, shown, key):
    """Under the shift class 0 is shown 100 (0.5 0.8 + 0.3 0.1 + 0.2 0.1) = 45 times, and so on."""
    prompt = compiled(lambda key: draw_prompts(key, law, draw_means(key, law, 40), length, stratified=True), key)
    assert (np.apply_along_axis(np.bincount, 1, np.asarray(prompt.labels)) == shown).all()
    assert len(np.unique(np.asarray(prompt.labels), axis=0)) == 40
    assert len(np.unique(np.asarray(prompt.query_label))) == 3


def test_stratified_statistics_have_no_noise_of_counts(key):
    """At a covariance that is next to nothing the sums are those of the exact numbers, mu_k / c."""
    law = shifted(Mixture(3, 3), Shift(covariance=1e-10 * np.eye(3)))

    def drawn(key):
        means = draw_means(key, law, 20)
        return means / 3, *(draw_statistics(key, law, means, 7, stratified=one).sums for one in (True, False))

    limit, stratified, random = compiled(drawn, key)
    close(stratified, limit, 1e-4)
    assert np.abs(np.asarray(random) - limit).max() > 0.05


@pytest.mark.parametrize("law", [PLAIN, SHIFTED])
def test_the_context_may_grow_without_end(law, key):
    """S_k -> sum_j P(j, k) mu_j, at 1 / sqrt(N)."""
    means = np.asarray(means_of(key, law, 200))
    draw = jax.jit(lambda key, means, length: draw_statistics(key, law, means, length).sums)
    limit = np.einsum("jk,bjd->bkd", law.probabilities[:, None] * law.confusion, means)
    for length in (10**4, 10**6):
        sums = np.asarray(draw(key, means, jnp.float32(length)))
        assert 0.1 < np.abs(sums - limit).max() * np.sqrt(length) < 12


def test_jit_changes_nothing_and_the_length_may_be_traced(key):
    means = means_of(key, SHIFTED, 30)
    traced = jax.jit(lambda key, means, n: draw_statistics(key, SHIFTED, means, n))
    close(draw_statistics(key, SHIFTED, means, 20), traced(key, means, jnp.int32(20)))
    prompts = jax.jit(lambda key, means: draw_prompts(key, SHIFTED, means, 6))
    close(draw_prompts(key, SHIFTED, means, 6), prompts(key, means))


@pytest.mark.parametrize("counts", ["exact", "normal"])
def test_statistics_are_mapped_over_lengths_and_prior_scales(counts, key):
    lengths, scales = (50, 800), (0.5, 2.0)

    def sums(length, scale):
        return draw_statistics(key, PLAIN, draw_means(key, PLAIN, 8, scale), length, counts=counts).sums

    mapped = jax.jit(jax.vmap(sums))(jnp.array(lengths), jnp.array(scales))
    assert mapped.shape == (2, 8, 2, 3)
    for row, length, scale in zip(mapped, lengths, scales, strict=True):
        close(row, compiled(functools.partial(sums, length, scale)))


sums_of = jax.jit(lambda inputs, labels: class_sums(inputs, labels, 3))


@given(st.permutations(range(6)))
def test_the_order_of_the_context_does_not_matter_to_the_sums(order):
    inputs = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
    labels = np.tile(np.array([0, 1, 1, 2, 0, 2], np.int32), (4, 1))
    close(sums_of(inputs, labels), sums_of(inputs[:, order], labels[:, order]), 1e-6)


@pytest.mark.parametrize("law", [PLAIN, SKEWED, SHIFTED])
def test_the_logits_of_bayes_are_those_of_the_law_and_of_the_densities(law, key):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        means, query = rng.normal(size=(10, law.mixture.classes, 3)), rng.normal(size=(10, 3))
        lengths = np.sqrt(np.einsum("bkd,de,bke->bk", means, law.mixture.inverse, means))
        means *= (law.norm_ratios / lengths)[:, :, None]
        logits = np.asarray(compiled(lambda means, query: bayes_logits(law, means, query), means, query))
    np.testing.assert_allclose(logits, law.logits(means, query), atol=1e-10)
    posterior = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rest = query[:, None] - means
    density = np.exp(-np.einsum("bkd,de,bke->bk", rest, np.linalg.inv(law.covariance), rest) / 2) * law.probabilities
    np.testing.assert_allclose(posterior, density / density.sum(axis=1, keepdims=True), atol=1e-10)


def test_the_dtype_follows_the_means(key):
    def drawn(key, dtype):
        means = draw_means(key, PLAIN, 5).astype(dtype)
        return means, draw_prompts(key, PLAIN, means, 4), draw_statistics(key, PLAIN, means, 4)

    def dtypes(dtype):
        return {str(leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(lambda key: drawn(key, dtype), key))}

    assert jax.eval_shape(lambda key: draw_means(key, SKEWED, 2), key).dtype == jnp.float32
    with jax.enable_x64(True):
        assert jax.eval_shape(lambda key: draw_means(key, SKEWED, 2), key).dtype == jnp.float64
        assert dtypes(jnp.float64) == {"float64", "int32"}
        assert dtypes(jnp.float32) == {"float32", "int32"}


def test_bad_input_is_refused_in_one_sentence(key):
    means = jnp.zeros((2, 3, 3))
    with pytest.raises(ValueError, match="the number of tasks is 0: give a whole number of at least 1"):
        draw_means(key, SKEWED, 0)
    with pytest.raises(ValueError, match="the prior scale is 0: give a number above 0"):
        draw_means(key, SKEWED, 2, 0)
    with pytest.raises(ValueError, match="the prior scale is nan"):
        draw_means(key, SKEWED, 2, jnp.float32(jnp.nan))
    for length in (-5, 0.5, 10.7, np.inf, jnp.int32(-5)):
        with pytest.raises(ValueError, match=r"the context length N is .*: give a whole number of at least 1"):
            draw_statistics(key, SKEWED, means, length)
    for draw in (draw_prompts, draw_statistics):
        with pytest.raises(ValueError, match="the context length N is 0: give a whole number of at least 1"):
            draw(key, SKEWED, means, 0)
    with pytest.raises(
        ValueError, match=r"10 examples would hold 3\.33333 of one class and label: give a length that m"
    ):
        draw_prompts(key, SKEWED, means, 10, stratified=True)
    with pytest.raises((ValueError, TypeCheckError), match="counts"):  # the tests' type checks come first
        draw_statistics(key, SKEWED, means, 10, counts="gaussian")
