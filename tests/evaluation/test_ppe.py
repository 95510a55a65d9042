"""The metrics of PPE: against loops, scipy and closed forms, and what holds of oracles, flips and transforms."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize
from scipy.special import log_expit

from rlhf_jax.evaluation import statistics
from rlhf_jax.evaluation.calibration import reliability
from rlhf_jax.evaluation.ppe import (
    Battles,
    battle_calibration_rows,
    best_of_k,
    confidence,
    correctness_rows,
    domain_rows,
    human_rows,
    pair_brier,
    ratings,
    row_correlations,
    win_rates,
)


def means(rows):
    return {row["name"]: row["mean"] for row in rows}


@pytest.fixture(scope="module")
def battles():
    """Five models, 150 battles with ties, in which each wins and loses some; scores that know the strength."""
    rng = np.random.default_rng(0)
    models = np.stack([rng.permutation(5)[:2] for _ in range(150)])
    strength = np.arange(5.0)[models]
    gap = strength[:, 0] - strength[:, 1] + 2.0 * rng.normal(size=150)
    people = np.where(np.abs(gap) < 0.4, 0.5, (gap > 0).astype(float))
    return Battles(models=models, first=people, scores=strength + 1.5 * rng.normal(size=(150, 2)))


@pytest.fixture(scope="module")
def human(battles):
    return human_rows(battles, np.where(np.arange(150) < 75, "en", "other"), draws=30)


@pytest.fixture(scope="module")
def answers():
    """Six prompts, seven completions, some right on each; scores with ties; two conflict pairs a prompt."""
    rng = np.random.default_rng(1)
    correct = np.array([rng.permutation(7) < count for count in (1, 2, 3, 4, 5, 6)], float)
    scores = np.round(correct + rng.normal(size=(6, 7)), 0)
    pairs = [np.array([[one.argmax(), one.argmin()], [one.argmin(), one.argmax()]]) for one in correct]
    return scores, correct, pairs


def test_ratings_are_the_penalised_maximum():
    rng = np.random.default_rng(2)
    wins = rng.integers(0, 9, (4, 4)).astype(float)
    np.fill_diagonal(wins, 0.0)

    def loss(rating):
        return -(wins * log_expit(rating[:, None] - rating[None, :])).sum() + 0.3 / 2 * (rating**2).sum()

    best = minimize(loss, np.zeros(4), tol=1e-12).x
    found = ratings(wins, 0.3)
    np.testing.assert_allclose(found, best, atol=1e-4)
    np.testing.assert_allclose(found.sum(), 0.0, atol=1e-9)
    np.testing.assert_allclose(ratings(np.stack([wins, wins.T]), 0.3), np.stack([found, ratings(wins.T, 0.3)]))
    np.testing.assert_allclose(ratings(wins.T, 0.3), -found, atol=1e-8)


def test_a_model_that_always_wins_has_a_finite_rating():
    wins = np.zeros((3, 3))
    wins[0, 1], wins[1, 0], wins[0, 2] = 5.0, 5.0, 200.0
    found = ratings(wins)
    assert np.isfinite(found).all() and found[2] < found[1]
    with pytest.raises(ValueError, match="above 0"):
        ratings(wins, 0.0)


def test_win_rates_worked_by_hand():
    models = np.array([[0, 1], [1, 0], [0, 1], [2, 1]])
    rates = win_rates(models, np.array([1.0, 1.0, 0.5, 0.0]), 3)
    expected = np.array([[np.nan, 0.5, np.nan], [0.5, np.nan, 1.0], [np.nan, 0.0, np.nan]])
    np.testing.assert_allclose(rates, expected)


def test_correlation_of_rows_leaves_out_what_is_not_known():
    a, b = np.random.default_rng(3).random((2, 4, 4))
    a[np.eye(4, dtype=bool)] = np.nan
    a[0, 3] = np.nan
    loop = []
    for row in range(4):
        known = [column for column in range(4) if not np.isnan(a[row, column])]
        loop.append(np.corrcoef(a[row, known], b[row, known])[0, 1])
    np.testing.assert_allclose(row_correlations(a, b), loop)
    np.testing.assert_allclose(row_correlations(a, 3.0 * a + 1.0), 1.0)
    assert np.isnan(row_correlations(np.full((3, 3), np.nan), b[:3, :3])).all()


def test_rankings_worked_apart(battles, human):
    models, people, scores = battles
    found = means(human)
    machine = (scores[:, 0] > scores[:, 1]) + 0.5 * (scores[:, 0] == scores[:, 1])
    rates, fitted = [], []
    for first in (machine, people):
        wins = np.zeros((5, 5))
        for (one, other), share in zip(models, first, strict=True):
            wins[one, other] += share
            wins[other, one] += 1.0 - share
        with np.errstate(invalid="ignore"):
            rates.append(wins / (wins + wins.T))
        fitted.append(ratings(wins))
    off = ~np.eye(5, dtype=bool)
    rows = [np.corrcoef(rates[0][i, off[i]], rates[1][i, off[i]])[0, 1] for i in range(5)]
    assert found["2 row-wise Pearson correlation"] == pytest.approx(np.mean(rows))
    assert found["3 Spearman correlation of rankings"] == pytest.approx(stats.spearmanr(*fitted).statistic)
    assert found["4 Kendall correlation of rankings"] == pytest.approx(stats.kendalltau(*fitted).statistic)


def test_best_of_k_is_the_mean_over_subsets_and_ties():
    scores, gold = np.array([[1.0, 0.0, 1.0, 2.0, 0.0]]), np.array([[0.3, 1.0, 0.7, 0.2, 0.0]])
    curve = best_of_k(scores, gold)[0]
    for k in range(1, 6):
        picks = []
        for subset in map(list, combinations(range(5), k)):
            top = scores[0, subset] == scores[0, subset].max()
            picks.append(gold[0, subset][top].mean())
        np.testing.assert_allclose(curve[k - 1], np.mean(picks))


def test_best_of_k_of_the_oracle_and_of_one(answers):
    scores, correct, _ = answers
    closed = [[1.0 - comb(7 - int(c), k) / comb(7, k) for k in range(1, 8)] for c in correct.sum(axis=1)]
    np.testing.assert_allclose(best_of_k(correct, correct), closed)
    curve = best_of_k(scores, correct)
    np.testing.assert_allclose(curve[:, 0], correct.mean(axis=1))
    np.testing.assert_allclose(best_of_k(np.exp(scores), correct), curve)
    np.testing.assert_allclose(curve[:, -1], [c[s == s.max()].mean() for s, c in zip(scores, correct, strict=True)])


def test_an_oracle_has_no_loss_and_ends_at_one(answers):
    _, correct, pairs = answers
    assert list(means(correctness_rows(correct, correct, pairs)).values()) == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.0])


def test_correctness_metrics_worked_apart(answers):
    scores, correct, pairs = answers
    found = list(means(correctness_rows(scores, correct, pairs)).values())
    right, area = [], []
    for s, c, p in zip(scores, correct, pairs, strict=True):
        good = [(i, j) if c[i] > c[j] else (j, i) for i, j in p]
        right += [(s[i] > s[j]) + 0.5 * (s[i] == s[j]) for i, j in good]
        area.append(np.mean([(a > b) + 0.5 * (a == b) for a in s[c == 1] for b in s[c == 0]]))
    curve, oracle = best_of_k(scores, correct).mean(axis=0), best_of_k(correct, correct).mean(axis=0)
    expected = [np.mean(right), np.mean(area), curve.max(), curve[-1], np.mean((oracle - curve) ** 2)]
    np.testing.assert_allclose(found, expected)
    flipped = list(means(correctness_rows(-scores, correct, pairs)).values())
    np.testing.assert_allclose(flipped[:2], 1.0 - np.array(found[:2]))
    moved = np.exp(scores) + 5.0 * np.arange(6.0)[:, None]
    np.testing.assert_allclose(list(means(correctness_rows(moved, correct, pairs)).values()), found)


def test_domains_of_the_correctness_set(answers):
    """One domain is scored by the truth, the other against it: the worst domain is the broken one."""
    _, correct, pairs = answers
    scores = np.where(np.arange(6)[:, None] < 3, correct, -correct)
    found = means(correctness_rows(scores, correct, pairs, domain=["math"] * 3 + ["code"] * 3))
    assert found["8 accuracy on conflict pairs"] == 0.5
    assert found["8 accuracy on conflict pairs: math"] == 1.0 and found["8 accuracy on conflict pairs: code"] == 0.0
    assert found["9 ROC-AUC: worst domain"] == 0.0
    assert found["12 loss: worst domain"] == found["12 loss: code"] > 0.0 == pytest.approx(found["12 loss: math"])
    mean = (found["11 end score: math"] + found["11 end score: code"]) / 2
    assert found["11 end score: mean over domains"] == pytest.approx(mean)


def test_prompts_without_pairs_or_without_both_outcomes_do_not_count(answers):
    scores, correct, pairs = answers
    none = np.zeros((0, 2), int)
    extended = np.vstack([scores, scores[:1]]), np.vstack([correct, np.ones((1, 7))]), [*pairs, none]
    found, before = means(correctness_rows(*extended)), means(correctness_rows(scores, correct, pairs))
    for name in ("8 accuracy on conflict pairs", "9 ROC-AUC"):
        assert found[name] == pytest.approx(before[name])


def test_bad_correctness_sets(answers):
    scores, correct, pairs = answers
    with pytest.raises(ValueError, match="conflict pair of prompt 1"):
        correctness_rows(scores, correct, [pairs[0], np.array([[0, 0]]), *pairs[2:]])
    with pytest.raises(ValueError, match="no prompts"):
        correctness_rows(scores[:0], correct[:0], [])


def test_scores_that_agree_with_people(battles):
    people = battles.first
    agreeing = battles._replace(scores=np.stack([people, 1.0 - people], axis=1))
    found = means(human_rows(agreeing, draws=30))
    assert found["1 pairwise accuracy"] == 1.0
    for name in ("2 row-wise Pearson", "3 Spearman", "4 Kendall"):
        (value,) = (value for key, value in found.items() if key.startswith(name))
        assert value == pytest.approx(1.0)
    assert found["6 confidence agreement"] >= 0.0
    assert found["7 Brier score of rankings"] < 0.1


def test_flips_and_transforms_of_human_metrics(battles, human):
    rows = {name: value for name, value in means(human + battle_calibration_rows(battles)).items() if ":" not in name}
    flipped = means(human_rows(battles._replace(scores=-battles.scores), draws=30))
    scaled = battles._replace(scores=np.exp(battles.scores))
    moved = means(human_rows(scaled, draws=30) + battle_calibration_rows(scaled))
    chosen = np.where(battles.first == 1.0, 1, -1) * (battles.scores @ (1.0, -1.0))
    assert rows["pair-level ECE"] == pytest.approx(reliability(chosen[battles.first != 0.5]).expected_error)
    assert flipped["1 pairwise accuracy"] == pytest.approx(1.0 - rows["1 pairwise accuracy"])
    for name in ("3 Spearman correlation of rankings", "4 Kendall correlation of rankings"):
        assert flipped[name] == pytest.approx(-rows[name])
    assert flipped["5 separability"] == pytest.approx(rows["5 separability"])
    assert flipped["6 confidence agreement"] == pytest.approx(-rows["6 confidence agreement"])
    for calibrated in ("pair-level Brier score", "pair-level ECE"):
        assert moved.pop(calibrated) != pytest.approx(rows.pop(calibrated))
    assert moved == pytest.approx(rows)


def test_human_rows_by_domain_leave_ties_out(battles, human):
    models, people, scores = battles
    found, kept = means(human), (people != 0.5) & (np.arange(150) < 75)
    right = np.mean((scores[kept, 0] > scores[kept, 1]) == (people[kept] == 1.0))
    assert found["1 pairwise accuracy: en"] == pytest.approx(right)
    assert found["1 pairwise accuracy: least domain"] == min(
        found["1 pairwise accuracy: en"], found["1 pairwise accuracy: other"]
    )
    assert human[-1]["n"] == 5 and human[0]["n"] == (people != 0.5).sum()
    with pytest.raises(ValueError, match="between at least three models"):
        human_rows(Battles(models=models % 2, first=people, scores=scores))


@pytest.fixture
def few_draws(monkeypatch):
    """Intervals of 100 draws: where it matters what is drawn, not how often."""
    bootstrap = statistics.bootstrap
    monkeypatch.setattr(statistics, "bootstrap", lambda *data, n, **more: bootstrap(*data, n=min(n, 100), **more))


def test_battles_and_completions_of_one_prompt_are_drawn_together(battles, few_draws):
    """Ten prompts; the metrics of rankings resample the five models as ever."""
    prompt = np.arange(150) // 15
    found = human_rows(battles, np.where(prompt < 5, "en", "other"), draws=30, prompt=prompt)
    assert {row["n"] for row in found if row["name"].startswith("1 ")} == {10} and found[-1]["n"] == 5
    assert {row["n"] for row in battle_calibration_rows(battles, prompt)} == {10}
    equal = battles._replace(first=np.ones(150), scores=np.tile((prompt % 2)[:, None], 2) * [1.0, -1.0] - [0.5, -0.5])
    by_prompt, by_battle = (human_rows(equal, None, 30, of)[0]["ci95"] for of in (prompt, None))
    assert by_prompt[1] - by_prompt[0] > 2.0 * (by_battle[1] - by_battle[0])
    rng = np.random.default_rng(0)
    scores, correct = rng.normal(size=(12, 4)), np.tile([1.0, 0.0, 1.0, 0.0], (12, 1))
    pairs, four = [np.array([[0, 1]])] * 12, np.repeat([0, 1, 2], 4)  # completions of four models for each prompt
    for domain in (None, ["a", "b"] * 6):
        assert {row["n"] for row in correctness_rows(scores, correct, pairs, domain, four)} == {3}
    assert correctness_rows(scores, correct, pairs)[0]["n"] == 12


def test_confidence_of_two_models_worked_by_hand():
    """Model 0 beats 1 always by people. Scores agree, oppose, or know nothing."""
    models, people = np.tile([[0, 1]], (60, 1)), np.ones(60)
    agree = confidence(models, people, people, 50)[:, 0, 1]
    oppose = confidence(models, people, 1.0 - people, 50)[:, 0, 1]
    np.testing.assert_allclose(agree, [1.0, 1.0, 0.0])
    np.testing.assert_allclose(oppose, [1.0, -1.0, 1.0])
    np.testing.assert_allclose(confidence(models, people, np.full(60, 0.5), 50)[:, 0, 1], [0.0, 0.0, 0.25])
    tables = confidence(models, people, np.tile([0.0, 1.0], 30), 50)
    np.testing.assert_allclose(tables, tables.transpose(0, 2, 1))


def test_pair_brier_is_the_mean_square_and_not_scale_free():
    scores, people = np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([1.0, 1.0])
    sigmoid = 1.0 / (1.0 + np.exp([-2.0, 1.0]))
    np.testing.assert_allclose(pair_brier(scores, people), (1.0 - sigmoid) ** 2)
    np.testing.assert_allclose(pair_brier(scores[:, ::-1], 1.0 - people), pair_brier(scores, people))
    assert not np.allclose(pair_brier(3.0 * scores, people), pair_brier(scores, people))


def test_domain_rows_worked_by_hand():
    found = means(domain_rows("x", np.array([1.0, 0.0, 1.0, 0.25]), ["a", "a", "b", "c"]))
    expected = {"x: a": 0.5, "x: b": 1.0, "x: c": 0.25, "x: least domain": 0.25}
    expected |= {"x: mean over domains": 1.75 / 3, "x: lower quartile of domains": 0.375}
    assert found == pytest.approx(expected)
