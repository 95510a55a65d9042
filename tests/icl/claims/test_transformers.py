"""The comparison of models with theory, at a tiny size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from rlhf_jax.icl.claims.transformers import (
    compare_models,
    draw_test,
    make_evaluation,
    make_models,
    standard_shifts,
    train_model,
)
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.shift import NO_SHIFT, Shift, shifted
from rlhf_jax.icl.theory.inference import total_variation
from rlhf_jax.icl.theory.minimiser import minimiser

MIXTURE = Mixture(2)
TINY = dict(
    lengths=(8,),
    test_lengths=(8, 12),
    shifts={"label noise .3": Shift(label_noise=0.3)},
    seeds=2,
    batch=64,
    width=8,
    layers=1,
    prompts=256,
    points=2**10,
)


@pytest.fixture(scope="module")
def compared():
    return compare_models(MIXTURE, steps=150, **TINY)


def test_it_measures_every_model_length_seed_and_shift(compared):
    assert compared.models == ("linear", "softmax", "relu", "transformer")
    assert compared.distances.shape == (4, 1, 2, 2)
    assert compared.shifted.shape == (1, 4, 1, 2)
    assert compared.losses.shape == (4, 1, 2, 150)
    assert compared.predicted_distances.shape == (1, 2)
    assert compared.predicted_shifted.shape == (1, 1)
    for values in (compared.distances, compared.shifted):
        assert ((values > 0) & (values < 1)).all()
    # Two seeds are two runs.
    assert (np.abs(compared.distances[:, :, 0] - compared.distances[:, :, 1]) > 0).all()


def test_every_model_learns(compared):
    assert (compared.losses[..., -30:].mean(axis=-1) < compared.losses[..., :10].mean(axis=-1)).all()


def test_the_linear_model_is_as_far_from_bayes_as_predicted(compared):
    weights = minimiser(MIXTURE, 8)
    expected = [total_variation(MIXTURE, weights, m, 2**10).mean for m in (8.0, 12.0)]
    np.testing.assert_allclose(compared.predicted_distances[0], expected)
    shift = TINY["shifts"]["label noise .3"]
    assert compared.predicted_shifted[0, 0] == total_variation(MIXTURE, weights, 8.0, 2**10, shift=shift).mean
    assert [row.quantity.split("(")[1] for row in compared.comparisons] == [
        "d=2, N=8, M=8)",
        "d=2, N=8, M=12)",
        "d=2, N=8, M=8, label noise .3)",
    ]
    assert [row.measured for row in compared.comparisons] == pytest.approx(
        [*compared.distances[0, 0].mean(axis=0), compared.shifted[0, 0, 0].mean()]
    )
    assert all(row.passed for row in compared.comparisons), compared.comparisons


def test_one_seed_is_refused():
    with pytest.raises(ValueError, match="the number of seeds is 1: give at least 2"):
        compare_models(MIXTURE, steps=1, **TINY | {"seeds": 1})


def test_evaluation_in_chunks_is_the_models_on_all_prompts(key):
    models = make_models(MIXTURE, 6, width=8, layers=1)
    prompt, _ = draw_test(MIXTURE, NO_SHIFT, 6, 16, key)
    runs = {name: jax.vmap(model.init)(jax.random.split(key, 2)) for name, model in models.items()}
    runs["linear"] = jnp.array([[[1.0, 0.2], [0.0, 2.0]], [[0.0, 0.0], [0.0, 1.0]]])
    found = make_evaluation(models, chunk=4)(runs, prompt)
    for name, model in models.items():
        for run in range(2):
            alone = jax.jit(model.logits)(jax.tree.map(lambda leaf: leaf[run], runs[name]), prompt)  # noqa: B023
            np.testing.assert_allclose(found[name][run], alone, rtol=1e-4, atol=1e-6)
    by_hand = np.zeros((16, 2))
    for b in range(16):
        for x, y in zip(np.asarray(prompt.inputs[b]), np.asarray(prompt.labels[b]), strict=True):
            by_hand[b, y] += x @ np.asarray(runs["linear"][0]) @ np.asarray(prompt.query[b]) / 6
    np.testing.assert_allclose(found["linear"][0], by_hand, rtol=1e-4, atol=1e-5)


def test_the_transformer_reads_contexts_longer_than_those_of_training(key):
    models = make_models(MIXTURE, 6, width=8, layers=1)
    model = models["transformer"]
    params = jax.jit(model.init)(key)
    longest, _ = draw_test(MIXTURE, NO_SHIFT, 6, 4, key)
    assert jax.jit(model.logits)(params, longest).shape == (4, 2)
    too_long, _ = draw_test(MIXTURE, NO_SHIFT, 7, 4, key)
    with pytest.raises(ValueError, match="does not fit"):
        model.logits(params, too_long)


def test_models_that_are_given_the_same_keys_see_the_same_prompts(key):
    """Two names of one model: equal losses, step by step, whatever was trained before."""
    model = make_models(MIXTURE, 6)["linear"]
    first, second = (train_model(model, MIXTURE, 6, jax.random.split(key, 2), 3, 8) for _ in range(2))
    np.testing.assert_array_equal(first.losses, second.losses)
    start = np.asarray(first.losses)[:, 0]
    np.testing.assert_allclose(start, np.log(2.0), rtol=1e-6)  # W = 0 says 1/2 for each class
    assert (np.abs(first.params[0] - first.params[1]) > 0).any()


def test_draws_of_a_test_come_with_the_posterior_under_the_shift(key):
    shift = Shift(class_probabilities=(0.1, 0.9))
    prompt, bayes = draw_test(MIXTURE, shift, 3, 4096, key)
    assert shifted(MIXTURE, shift).probabilities[1] == 0.9
    share, posterior = np.mean(np.asarray(prompt.query_label)), softmax(bayes, axis=1)[:, 1].mean()
    assert share == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / 4096))
    assert posterior == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / 4096))


@pytest.mark.parametrize("classes", [2, 4])
def test_standard_shifts_are_possible_and_change_one_thing_each(classes):
    mixture = Mixture(2, classes, covariance=[[1.0, 0.2], [0.2, 0.5]], prior_scale=2.0)
    shifts = standard_shifts(mixture)
    assert len(shifts) == 6
    for shift in shifts.values():
        shifted(mixture, shift)
        values = [getattr(shift, field.name) for field in dataclasses.fields(shift)]
        assert sum(value is not None and not np.array_equal(value, 0.0) for value in values) == 1
