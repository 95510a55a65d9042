import numpy as np
import pytest

from rlhf_jax.laboratory.gates import ppe
from rlhf_jax.laboratory.gates.ppe import Answers, Scorers


def scorers(quality=1.0, style=1.0, broken=-1, scale=1.0, noise=0.0):
    one = np.ones(1)
    whole = np.zeros(1, int)
    return Scorers(quality * one, style * one, 0 * one, noise * one, whole, 0 * one, whole + broken, scale * one)


@pytest.fixture
def no_tricks(monkeypatch):
    monkeypatch.setattr(ppe, "TRICK_RATE", 0.0)
    monkeypatch.setattr(ppe, "CERTAINTY", 1e6)


def test_scores_by_hand():
    """Quality 2, style 4, a trick: 2 + 4 - 3 (1 + 1) / 2 for who sees it, 2 + 4 + 6 in the broken domain."""
    answers = Answers(
        *(np.array([x, x]) for x in (2.0, 4.0, 9.0)), np.array([True, True]), np.zeros(2), np.array([0, 1])
    )
    found = ppe.scores(np.random.default_rng(0), scorers(broken=1, scale=2.0), answers)
    np.testing.assert_allclose(found, [[2 * 3.0, 2 * 12.0]])


def test_gold_is_what_people_feel():
    answers = ppe.draw_answers(np.random.default_rng(0), np.zeros(20_000, int), ability=1.0)
    expected = (answers.quality + answers.style) / np.sqrt(2) - 3.0 * answers.trick
    np.testing.assert_allclose(answers.gold, expected)
    np.testing.assert_allclose([answers.quality.mean(), answers.style.mean()], [1.0, 0.0], atol=0.03)
    assert abs(answers.trick.mean() - 0.05) < 0.007


def test_who_feels_as_people_do_has_every_human_metric_and_its_opposite_none(no_tricks):
    found, opposite = (
        ppe.human_metrics(np.random.default_rng(0), scorers(scale=scale), 1500, draws=10) for scale in (1.0, -1.0)
    )
    for name in ("pairwise accuracy", "least accuracy of a domain"):
        assert (found[name][0], opposite[name][0]) == (1.0, 0.0)
    for name in ("row-wise Pearson", "Spearman of rankings", "Kendall of rankings"):
        assert found[name][0] == pytest.approx(1.0)
        assert opposite[name][0] == pytest.approx(-1.0)
    # Who agrees on every battle agrees on every pair of models that both bootstraps separate.
    assert 0.3 < found["confidence agreement"] <= found["separability"]
    assert -opposite["separability"] <= opposite["confidence agreement"] < -0.3
    assert found["Brier score of rankings"] > -0.1 > opposite["Brier score of rankings"]


def test_who_sees_quality_alone_has_every_metric_of_correctness(no_tricks):
    found = ppe.correctness_metrics(np.random.default_rng(0), scorers(style=0.0), 40)
    expected = {"accuracy on conflict pairs": 1.0, "ROC-AUC": 1.0, "largest best-of-k score": 1.0, "end score": 1.0}
    assert {name: found[name][0] for name in expected} == pytest.approx(expected)
    assert found["loss"][0] == pytest.approx(0.0)
    reverse = ppe.correctness_metrics(np.random.default_rng(0), scorers(style=0.0, scale=-1.0), 40)
    assert reverse["accuracy on conflict pairs"][0] == reverse["ROC-AUC"][0] == reverse["end score"][0] == 0.0


def test_the_outcome_is_the_gold_of_the_best_of_16(no_tricks):
    found = ppe.outcomes(np.random.default_rng(5), scorers(), 200)
    rng = np.random.default_rng(5)
    answers = ppe.draw_answers(rng, np.repeat(rng.integers(ppe.DOMAINS, size=200), 16))
    np.testing.assert_allclose(found, answers.gold.reshape(200, 16).max(axis=1).mean())


def test_stages_have_one_number_a_seed(monkeypatch):
    for stage in (ppe.predictors(2, models=4, battles=400, prompts=20), ppe.broken_domain(2, battles=400, prompts=20)):
        assert [gate.values.shape for gate in stage.gates] == [(2,)] * len(stage.gates)
    names = [row["name"] for row in ppe.predictors(2, models=4, battles=400, prompts=20).rows]
    assert len(set(names)) == 14
