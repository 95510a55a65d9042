"""The claims about training, at sizes of seconds; the experiment runs them in full."""

import jax
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


def test_a_sweep_that_is_cut_short_does_not_pass():
    found = sweep_reaches_minimisers(lengths=(160,), seeds=2, steps=(2, 2), batch=64, stride=4, tolerance=0.02)
    assert not found.comparisons[0].passed


def test_raw_prompts_and_drawn_labels_reach_the_minimiser():
    """T7 with 1/30 of its prompts, so with 5 to 6 times its errors of about .5 %: the share is 5 %."""
    rows = raw_prompts_reach_minimisers(
        settings=((Mixture(3), 20),), seeds=2, steps=400, batch=256, shares=(0.05, 0.03)
    )
    assert [row.predicted for row in rows] == pytest.approx([0.0, 0.397], abs=1e-3)
    assert all(row.passed for row in rows), rows


@pytest.mark.parametrize("labels", ["hard", "posterior"])
def test_the_loss_of_raw_prompts_is_the_cross_entropy_of_what_the_model_says(key, labels):
    """A model that says Bayes' logits of a task that it is told: the loss is written out on the same prompts."""
    mixture = Mixture(2, classes=3)
    law = shifted(mixture)
    for_means, for_prompts = jax.random.split(key)
    means = draw_means(for_means, law, 16)
    prompt = draw_prompts(for_prompts, law, means, 5)
    logits = np.asarray(bayes_logits(law, means, prompt.query), np.float64)
    loss = make_prompt_loss(mixture, 5, 16, labels, lambda params, seen: params * bayes_logits(law, means, seen.query))
    said = 0.5 * logits
    said = said - np.log(np.exp(said).sum(axis=1, keepdims=True))
    posterior = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = posterior if labels == "posterior" else np.eye(3)[np.asarray(prompt.query_label)]
    expected = -(target * said).sum(axis=1).mean()
    assert float(loss(np.float32(0.5), key)) == pytest.approx(expected, rel=1e-5)


def test_a_setting_says_what_is_not_standard():
    mixture = Mixture(2, classes=3, covariance=[[2.0, 0.0], [0.0, 0.5]], prior_scale=0.5)
    assert setting_of(mixture) == "d=2, c=3, Λ with eigenvalues 0.5, 2, prior scale 0.5"
