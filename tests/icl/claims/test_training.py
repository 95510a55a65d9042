"""The claims about training, at sizes of seconds; the experiment runs them in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.icl.claims.training import (
    make_prompt_loss,
    raw_prompts_reach_minimisers,
    setting_of,
    sweep_reaches_minimisers,
)
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.shift import shifted
from rlhf_jax.icl.tasks.mixtures import bayes_logits, draw_means, draw_prompts


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """On eight, the two runs of a training here would be filled up with six copies."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


def test_a_sweep_reaches_the_minimiser_of_every_length():
    """T8 with 1/80 of its prompts: errors are 9 times those of the full size, which are up to .0004: 5 of them pass."""
    found = sweep_reaches_minimisers(lengths=(10, 160), seeds=4, steps=(100, 100), batch=256, stride=20, tolerance=0.02)
    assert [row.quantity for row in found.comparisons] == [
        "tr W / d after a sweep (d=3, N=10)",
        "tr W / d after a sweep (d=3, N=160)",
    ]
    np.testing.assert_allclose([row.predicted for row in found.comparisons], [0.9180, 1.8113], atol=1e-3)
    assert all(row.passed for row in found.comparisons), found.comparisons
    assert all(0 < row.standard_error < 0.01 for row in found.comparisons)
    assert found.steps.tolist() == list(range(20, 201, 20))
    assert found.traces.shape == found.distances.shape == found.losses.shape == (2, 4, 10)
    assert (found.distances[:, :, -1] < 0.1).all()
    assert (found.losses[:, :, -1] < found.losses[:, :, 0]).all()

    np.testing.assert_allclose(found.predicted, [row.predicted for row in found.comparisons])


def test_a_sweep_of_three_classes_that_is_cut_short_does_not_pass():
    """By default the log has entries at divisors of both steps: here 2, of 4 and 6."""
    found = sweep_reaches_minimisers(Mixture(2, 3), lengths=(160,), seeds=2, steps=(4, 6), batch=64, tolerance=0.02)
    assert found.steps.tolist() == [2, 4, 6, 8, 10]
    assert found.comparisons[0].quantity == "tr W / d after a sweep (d=2, c=3, N=160)"
    assert not found.comparisons[0].passed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": (0, 100)}, "the number of steps at a rate is 0"),
        ({"rates": (8.0, -1.0)}, "the learning rate is -1.0"),
        ({"seeds": 0}, "the number of seeds is 0"),
        ({"steps": (30, 20), "stride": 20}, "the stride of the log is 20: give a divisor of the 50 steps"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        sweep_reaches_minimisers(lengths=(10,), **options)


def test_raw_prompts_and_drawn_labels_reach_the_minimiser():
    """T7 with 1/30 of its prompts, so with 5 to 6 times its errors of about .5 %: the share is 5 %; and three classes
    (at the full size |W - W*| / |W*| is .4 %)."""
    rows = raw_prompts_reach_minimisers(
        settings=((Mixture(3), 20), (Mixture(3, 3), 40)), seeds=2, steps=400, batch=256, shares=(0.05, 0.03)
    )
    assert [row.predicted for row in rows] == pytest.approx([0.0, 0.397, 0.0, 0.366], abs=1e-3)
    assert all(row.passed for row in rows), rows


@pytest.mark.parametrize("labels", ["hard", "posterior"])
def test_the_loss_of_raw_prompts_is_the_cross_entropy_of_what_the_model_says(key, labels):
    """A model that says Bayes' logits of a task that it is told: the loss is written out on the same prompts."""
    mixture = Mixture(2, classes=3)
    law = shifted(mixture)

    @jax.jit
    def draw(key):
        for_means, for_prompts = jax.random.split(key)
        means = draw_means(for_means, law, 16)
        return means, draw_prompts(for_prompts, law, means, 5)

    means, prompt = draw(key)
    logits = np.asarray(bayes_logits(law, means, prompt.query), np.float64)
    loss = make_prompt_loss(mixture, 5, 16, labels, lambda params, seen: params * bayes_logits(law, means, seen.query))
    said = 0.5 * logits
    said = said - np.log(np.exp(said).sum(axis=1, keepdims=True))
    posterior = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = posterior if labels == "posterior" else np.eye(3)[np.asarray(prompt.query_label)]
    expected = -(target * said).sum(axis=1).mean()
    assert float(jax.jit(loss)(jnp.float32(0.5), key)) == pytest.approx(expected, rel=1e-5)


def test_a_setting_says_what_is_not_standard():
    mixture = Mixture(2, classes=3, covariance=[[2.0, 0.0], [0.0, 0.5]], prior_scale=0.5)
    assert setting_of(mixture) == "d=2, c=3, Λ with eigenvalues 0.5, 2, prior scale 0.5"
