"""Prompts of mixtures: the law that they are to have, in both forms, and what jit, vmap and float64 make of them."""

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


def close(one, other, atol=1e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("law", [PLAIN, SKEWED, SHIFTED])
def test_means_are_equally_long_in_the_metric_of_the_covariance_but_for_the_ratios(law, key):
    means = np.asarray(draw_means(key, law, 50), np.float64) / law.norm_ratios[None, :, None]
    lengths = np.sqrt(np.einsum("bkd,de,bke->bk", means, law.mixture.inverse, means))
    np.testing.assert_allclose(lengths, np.broadcast_to(lengths[:, :1], lengths.shape), rtol=1e-4)


def test_the_first_mean_is_normal_and_the_directions_of_the_others_are_uniform(key):
    means = np.asarray(draw_means(key, SKEWED, 20_000, 1.5), np.float64)
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
    means = draw_means(key, shifted(Mixture(1, 4)), 100)
    np.testing.assert_allclose(np.abs(means), np.broadcast_to(np.abs(means[:, :1]), means.shape), rtol=1e-6)
    assert (means[:, 1] > 0).any() and (means[:, 1] < 0).any()


def test_a_direction_of_length_zero_is_not_nan(key, monkeypatch):
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.zeros(shape).at[:, 0].set(2.0))
    assert draw_means(key, PLAIN, 1).tolist() == [[[2.0, 2.0, 2.0], [pytest.approx(np.sqrt(12)), 0.0, 0.0]]]


def test_raw_prompts_follow_their_law(key):
    """Of one task: P(class), x given its class, P(shown label | class), all under a shift, for context and query."""
    means = jnp.broadcast_to(draw_means(key, SHIFTED, 1) * 20, (4000, 3, 3))  # far apart: the nearest mean is its class
    prompt = draw_prompts(jax.random.fold_in(key, 1), SHIFTED, means, 5)
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
    means = draw_means(key, law, 300)
    prompt = draw_prompts(key, law, means, 10)
    assert set(np.unique(prompt.labels)) == set(np.unique(prompt.query_label)) == {0, 2}
    assert (draw_statistics(key, law, means, 10).sums[:, 1] == 0).all()
    certain = shifted(Mixture(2, 2), Shift(class_probabilities=(0.0, 1.0)))
    assert (draw_statistics(key, certain, means[:, :2], 10).query_label == 1).all()


@pytest.mark.parametrize(("law", "length", "shown"), [(SKEWED, 12, [4, 4, 4]), (SHIFTED, 100, [45, 31, 24])])
def test_stratified_contexts_hold_exact_numbers_in_random_order(law, length, shown, key):
    """Under the shift class 0 is shown 100 (0.5 0.8 + 0.3 0.1 + 0.2 0.1) = 45 times, and so on."""
    prompt = draw_prompts(key, law, draw_means(key, law, 40), length, stratified=True)
    assert (np.apply_along_axis(np.bincount, 1, np.asarray(prompt.labels)) == shown).all()
    assert len(np.unique(np.asarray(prompt.labels), axis=0)) == 40
    assert len(np.unique(np.asarray(prompt.query_label))) == 3


def test_stratified_statistics_have_no_noise_of_counts(key):
    """At a covariance that is next to nothing the sums are those of the exact numbers, mu_k / c."""
    law = shifted(Mixture(3, 3), Shift(covariance=1e-10 * np.eye(3)))
    means = draw_means(key, law, 20)
    close(draw_statistics(key, law, means, 7, stratified=True).sums, means / 3, 1e-4)
    assert np.abs(draw_statistics(key, law, means, 7).sums - means / 3).max() > 0.05


@pytest.mark.parametrize("law", [PLAIN, SHIFTED])
def test_the_context_may_grow_without_end(law, key):
    """S_k -> sum_j P(j, k) mu_j, at 1 / sqrt(N)."""
    means = draw_means(key, law, 200)
    limit = np.einsum("jk,bjd->bkd", law.probabilities[:, None] * law.confusion, means)
    for length in (10**4, 10**6):
        sums = draw_statistics(key, law, means, length).sums
        assert 0.1 < np.abs(sums - limit).max() * np.sqrt(length) < 12


def test_jit_changes_nothing_and_the_length_may_be_traced(key):
    for law in (PLAIN, SHIFTED):
        means = draw_means(key, law, 30)
        traced = jax.jit(lambda key, means, n, law=law: draw_statistics(key, law, means, n))
        close(draw_statistics(key, law, means, 20), traced(key, means, jnp.int32(20)))
        close(draw_prompts(key, law, means, 6), jax.jit(lambda k, m, law=law: draw_prompts(k, law, m, 6))(key, means))


@pytest.mark.parametrize("counts", ["exact", "normal"])
def test_statistics_are_mapped_over_lengths_and_prior_scales(counts, key):
    lengths, scales = jnp.array([50, 800]), jnp.array([0.5, 2.0])

    def sums(length, scale):
        return draw_statistics(key, PLAIN, draw_means(key, PLAIN, 8, scale), length, counts=counts).sums

    mapped = jax.jit(jax.vmap(sums))(lengths, scales)
    assert mapped.shape == (2, 8, 2, 3)
    for number in range(2):
        close(mapped[number], sums(int(lengths[number]), float(scales[number])))


@given(st.permutations(range(6)))
def test_the_order_of_the_context_does_not_matter_to_the_sums(order):
    prompt = draw_prompts(jax.random.key(1), SKEWED, draw_means(jax.random.key(2), SKEWED, 4), 6)
    order = np.array(order)
    close(
        class_sums(prompt.inputs, prompt.labels, 3),
        class_sums(prompt.inputs[:, order], prompt.labels[:, order], 3),
        1e-6,
    )


@pytest.mark.parametrize("law", [PLAIN, SKEWED, SHIFTED])
def test_the_logits_of_bayes_are_those_of_the_law_and_of_the_densities(law, key):
    with jax.enable_x64(True):
        means = draw_means(key, law, 10)
        query = draw_means(jax.random.fold_in(key, 1), law, 10)[:, 0]
        logits = np.asarray(bayes_logits(law, means, query))
    means, query = np.asarray(means), np.asarray(query)
    np.testing.assert_allclose(logits, law.logits(means, query), atol=1e-10)
    posterior = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rest = query[:, None] - means
    density = np.exp(-np.einsum("bkd,de,bke->bk", rest, np.linalg.inv(law.covariance), rest) / 2) * law.probabilities
    np.testing.assert_allclose(posterior, density / density.sum(axis=1, keepdims=True), atol=1e-10)


def test_the_dtype_follows_the_means(key):
    assert draw_means(key, SKEWED, 2).dtype == jnp.float32
    with jax.enable_x64(True):
        means = draw_means(key, PLAIN, 5)
        drawn = (draw_prompts(key, PLAIN, means, 4), draw_statistics(key, PLAIN, means, 4))
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(drawn)} == {"float64", "int32"}
        single = draw_statistics(key, PLAIN, means.astype(jnp.float32), 4)
        assert single.sums.dtype == single.query.dtype == jnp.float32


def test_bad_input_is_refused_in_one_sentence(key):
    means = draw_means(key, SKEWED, 2)
    with pytest.raises(ValueError, match="the number of tasks is 0: give a whole number of at least 1"):
        draw_means(key, SKEWED, 0)
    with pytest.raises(ValueError, match="the prior scale is 0: give a number above 0"):
        draw_means(key, SKEWED, 2, 0)
    for draw in (draw_prompts, draw_statistics):
        with pytest.raises(ValueError, match="the context length N is 0: give a whole number of at least 1"):
            draw(key, SKEWED, means, 0)
    with pytest.raises(
        ValueError, match=r"10 examples would hold 3\.33333 of one class and label: give a length that m"
    ):
        draw_prompts(key, SKEWED, means, 10, stratified=True)
    with pytest.raises((ValueError, TypeCheckError), match="counts"):  # the tests' type checks come first
        draw_statistics(key, SKEWED, means, 10, counts="gaussian")
