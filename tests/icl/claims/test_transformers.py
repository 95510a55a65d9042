"""The comparison of models with theory, at a tiny size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from rlhf_jax.icl.claims.trained_models import make_models, train_model
from rlhf_jax.icl.claims.transformers import (
    compare_models,
    draw_test,
    make_evaluation,
    plug_in_logits,
    standard_shifts,
)
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.shift import NO_SHIFT, Shift, shifted
from rlhf_jax.icl.tasks.mixtures import Prompt
from rlhf_jax.icl.theory.inference import distances, total_variation
from rlhf_jax.icl.theory.minimiser import minimiser

MIXTURE = Mixture(2)
TINY = dict(
    lengths=(8, 12),
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
    """On eight devices, two lengths: eight trainings and six evaluations, one after the other."""
    return compare_models(MIXTURE, steps=100, **TINY)


def test_it_measures_every_model_length_seed_and_shift(compared):
    assert compared.models == ("linear", "softmax", "relu", "transformer")
    assert compared.distances.shape == (4, 2, 2, 2)
    assert compared.shifted.shape == (1, 4, 2, 2)
    assert compared.losses.shape == (4, 2, 2, 100)
    assert compared.predicted_distances.shape == (2, 2)
    assert compared.predicted_shifted.shape == (1, 2)
    assert compared.baselines == ("plug-in, Λ known", "plug-in")
    assert compared.baseline_distances.shape == (2, 2)
    assert compared.baseline_shifted.shape == (1, 2, 2)
    distances = (compared.distances, compared.shifted, compared.baseline_distances, compared.baseline_shifted)
    for values in distances:
        assert ((values > 0) & (values < 1)).all()
    # Two seeds are two runs.
    assert (np.abs(compared.distances[:, :, 0] - compared.distances[:, :, 1]) > 0).all()


def test_every_model_learns(compared):
    assert (compared.losses[..., -20:].mean(axis=-1) < compared.losses[..., :10].mean(axis=-1)).all()


def test_the_linear_model_is_as_far_from_bayes_as_predicted(compared):
    weights = minimiser(MIXTURE, 12)
    expected = [total_variation(MIXTURE, weights, m, 2**10).mean for m in (8.0, 12.0)]
    np.testing.assert_allclose(compared.predicted_distances[1], expected)
    shift = TINY["shifts"]["label noise .3"]
    assert compared.predicted_shifted[0, 1] == total_variation(MIXTURE, weights, 12.0, 2**10, shift=shift).mean
    assert [row.quantity.split("(")[1] for row in compared.comparisons] == [
        "d=2, N=8, M=8)",
        "d=2, N=12, M=8)",
        "d=2, N=8, M=12)",
        "d=2, N=12, M=12)",
        "d=2, N=8, M=8, label noise .3)",
        "d=2, N=12, M=12, label noise .3)",
    ]
    plain = compared.distances[0].mean(axis=1)  # [N, M]
    assert [row.measured for row in compared.comparisons] == pytest.approx(
        [*plain[:, 0], *plain[:, 1], *compared.shifted[0, 0].mean(axis=1)]
    )
    assert all(row.passed for row in compared.comparisons), compared.comparisons


def test_plug_ins_come_nearer_to_bayes_with_longer_contexts(key):
    """Both are consistent; with 400 examples they are nearer than any one-layer model here, the known covariance first.

    On 10 examples 1000 prompts tell the two apart by far: estimating the covariance costs.
    """
    mixture = Mixture(2, covariance=[[1.0, 0.4], [0.4, 0.5]])
    found = {}
    for length in (10, 400):
        prompt, bayes = draw_test(mixture, NO_SHIFT, length, 1000, key)
        logits = np.asarray(plug_in_logits(mixture, prompt), np.float64)
        found[length] = [distances(one, bayes).mean() for one in logits]
    assert found[10][0] < found[10][1] < 0.3
    assert max(found[400]) < 0.03


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seeds": 1}, "the number of seeds is 1: give a whole number of at least 2"),
        ({"prompts": 100}, "the number of test prompts is 100: give a multiple of 64, or less than that"),
        ({"prompts": 1}, "the number of test prompts is 1"),
        ({"lengths": (0,)}, "the context length N is 0"),
        ({"lengths": ()}, "no context length N, or no test length M"),
        ({"test_lengths": (8, 0)}, "the test length M is 0"),
        ({"steps": 0}, "the number of steps is 0"),
        ({"batch": 0}, "the batch is 0"),
        ({"points": 1000}, "the number of points is 1000: give a power of two"),
        ({"rates": {"sofmax": 0.1}}, "a learning rate of 'sofmax': choose among linear, softmax, relu, transformer"),
        ({"shifts": {"noise": Shift(label_noise=2.0)}}, "the label noise is 2.0"),
    ],
)
def test_what_cannot_be_is_refused_before_training(monkeypatch, options, sentence):
    monkeypatch.setattr("rlhf_jax.icl.claims.transformers.train_model", None)
    with pytest.raises(ValueError, match=sentence):
        compare_models(MIXTURE, **{"steps": 1} | TINY | options)


def test_evaluation_in_chunks_is_the_models_on_all_prompts(key):
    models = make_models(MIXTURE, 6, width=8, layers=1)
    prompt, _ = draw_test(MIXTURE, NO_SHIFT, 6, 16, key)
    runs = {name: jax.jit(jax.vmap(model.init))(jax.random.split(key, 2)) for name, model in models.items()}
    runs["linear"] = jnp.array([[[1.0, 0.2], [0.0, 2.0]], [[0.0, 0.0], [0.0, 1.0]]])
    found = make_evaluation(models, chunk=4)(runs, prompt)
    for name, model in models.items():
        alone = jax.jit(lambda params: jax.lax.map(lambda one: model.logits(one, prompt), params))(runs[name])  # noqa: B023
        np.testing.assert_allclose(found[name], alone, rtol=1e-4, atol=1e-6)
    by_hand = np.zeros((16, 2))
    for b in range(16):
        for x, y in zip(np.asarray(prompt.inputs[b]), np.asarray(prompt.labels[b]), strict=True):
            by_hand[b, y] += x @ np.asarray(runs["linear"][0]) @ np.asarray(prompt.query[b]) / 6
    np.testing.assert_allclose(found["linear"][0], by_hand, rtol=1e-4, atol=1e-5)


def test_the_transformer_reads_contexts_longer_than_those_of_training(key):
    models = make_models(MIXTURE, 6, width=8, layers=1)
    model = models["transformer"]
    params = jax.eval_shape(model.init, key)

    def prompt(length):
        return Prompt(
            inputs=jnp.zeros((4, length, 2)),
            labels=jnp.zeros((4, length), jnp.int32),
            query=jnp.zeros((4, 2)),
            query_label=jnp.zeros(4, jnp.int32),
        )

    assert jax.eval_shape(model.logits, params, prompt(6)).shape == (4, 2)
    with pytest.raises(ValueError, match="does not fit"):
        jax.eval_shape(model.logits, params, prompt(7))


def test_models_that_are_given_the_same_keys_see_the_same_prompts(compared):
    """The linear model trained again, alone: equal losses, step by step, whatever was trained before."""
    model = make_models(MIXTURE, 12)["linear"]
    again = train_model(model, MIXTURE, 12, jax.random.split(jax.random.key(12), 2), 100, 64)
    np.testing.assert_array_equal(again.losses, compared.losses[0, 1])
    np.testing.assert_allclose(again.losses[:, 0], np.log(2.0), rtol=1e-6)  # W = 0 says 1/2 for each class
    assert (np.abs(again.params[0] - again.params[1]) > 0).any()


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
