"""Filters by hand: temperature, top-k, top-p, min-p, their order, ties, greedy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.sampling.filters import SamplingConfig, filter_logits

PLAIN = SamplingConfig(max_new_tokens=1, stop_tokens=(0,))
# In this order, so that a filter that forgets to sort is seen.
PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3])
LOGITS = jnp.asarray(np.log(PROBABILITIES)[None] + 7.0, jnp.float32)


def filtered(logits=LOGITS, **options):
    return np.asarray(filter_logits(logits, dataclasses.replace(PLAIN, **options)))


def kept(logits=LOGITS, **options):
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in filtered(logits, **options)]


def test_without_filters_logits_are_divided_by_the_temperature():
    np.testing.assert_array_equal(filtered(), LOGITS)
    np.testing.assert_allclose(filtered(temperature=0.5), 2 * LOGITS, rtol=1e-6)


@pytest.mark.parametrize(("k", "tokens"), [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k_keeps_the_most_likely(k, tokens):
    assert kept(top_k=k) == [tokens]


@pytest.mark.parametrize(
    ("p", "tokens"),
    [
        (0.05, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 2, 3]),
        (0.95, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_smallest_set_with_that_mass(p, tokens):
    assert kept(top_p=p) == [tokens]


@pytest.mark.parametrize(
    ("p", "tokens"), [(0.0, [0, 1, 2, 3]), (0.2, [0, 1, 2, 3]), (0.3, [1, 2, 3]), (0.6, [1, 3]), (0.9, [1])]
)
def test_min_p_compares_with_the_most_likely(p, tokens):
    assert kept(min_p=p) == [tokens]


def test_the_temperature_comes_before_top_p():
    """At temperature 0.5 the probabilities are 1, 16, 4, 9 thirtieths: two tokens hold 83 %, not 70 %."""
    assert kept(top_p=0.8) == [[1, 2, 3]]
    assert kept(top_p=0.8, temperature=0.5) == [[1, 3]]


def test_top_p_looks_at_what_top_k_left():
    """Of the two that top-k leaves, the first holds 4/7 = 57 %, not 40 %."""
    assert kept(top_p=0.5) == [[1, 3]]
    assert kept(top_p=0.5, top_k=2) == [[1]]


def test_kept_logits_keep_their_value():
    found = filtered(top_k=3, top_p=0.95, min_p=0.1)
    np.testing.assert_array_equal(found[0, [1, 2, 3]], LOGITS[0, jnp.array([1, 2, 3])])
    assert found[0, 0] == -np.inf


def test_ties_with_the_last_kept_token_are_kept():
    tied = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2]]))
    assert kept(tied, top_k=2) == [[0, 1, 2, 3]]
    assert kept(tied, top_p=0.5) == [[0, 1, 2, 3]]
    assert kept(tied, top_k=1) == [[0]]


def test_greedy_keeps_one_token_even_of_ties():
    assert kept(temperature=0.0) == [[1]]
    assert kept(jnp.array([[1.0, 5.0, 5.0]]), temperature=0.0) == [[1]]
    assert filtered(temperature=0.0)[0, 1] == 0


def test_rows_are_filtered_alone_and_jit_changes_nothing(key):
    sampling = dataclasses.replace(PLAIN, temperature=0.7, top_k=9, top_p=0.8, min_p=0.05)
    logits = 2 * jax.random.normal(key, (5, 30))
    together = filter_logits(logits, sampling)
    alone = jnp.concatenate([filter_logits(row[None], sampling) for row in logits])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(jax.jit(filter_logits, static_argnums=1)(logits, sampling), together, rtol=1e-6)
    counts = np.isfinite(together).sum(axis=1)
    assert (counts >= 1).all()
    assert (counts <= 9).all()


def test_float64_stays_float64():
    with jax.enable_x64(True):
        logits = jnp.asarray(np.log(PROBABILITIES)[None])
        for options in ({"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 2}, {"temperature": 0.0}):
            assert filter_logits(logits, dataclasses.replace(PLAIN, **options)).dtype == jnp.float64


@pytest.mark.parametrize(
    ("options", "differ"),
    [({}, False), ({"temperature": 0.5}, False), ({"top_k": 3}, True), ({"top_p": 0.9}, True), ({"min_p": 0.1}, True)],
)
def test_filtered_says_whether_tokens_may_be_excluded(options, differ):
    assert dataclasses.replace(PLAIN, **options).filtered is differ


def test_greedy_counts_as_filtered_and_scores_at_temperature_one():
    greedy = dataclasses.replace(PLAIN, temperature=0.0)
    assert greedy.filtered
    assert greedy.logprob_temperature == 1.0
    assert dataclasses.replace(PLAIN, temperature=0.3).logprob_temperature == 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
        {"min_p": -0.1},
    ],
)
def test_options_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"SamplingConfig.{next(iter(options))} is"):
        dataclasses.replace(PLAIN, **options)
