"""The best-of-n estimator against exhaustive subsets, its limits, and its refusals."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy.special import gammaln

from rlhf_jax.sampling.best_of_n import best_of_n_curve, best_of_n_kl, best_of_n_weights


def scores(prompts: int, answers: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=(prompts, answers))
    return gold + rng.normal(size=(prompts, answers)), gold


def test_weights_worked_by_hand():
    # Of the six pairs out of four ranks, the best is rank 2 once, rank 3 twice, rank 4 three times.
    np.testing.assert_allclose(best_of_n_weights(2, 4), [0.0, 1 / 6, 2 / 6, 3 / 6], rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 100, 1_000, 6_300, 12_500, 12_600])
def test_weights_sum_to_one_with_12600_answers(n):
    weights = best_of_n_weights(n, 12_600)
    assert abs(weights.sum() - 1.0) < 2e-11
    assert np.isfinite(weights).all() and (weights >= 0.0).all()
    rank = np.arange(n, 12_601.0)
    below = gammaln(rank) - gammaln(rank - n + 1) - gammaln(n)
    subsets = gammaln(12_601) - gammaln(n + 1) - gammaln(12_601 - n)
    np.testing.assert_allclose(weights[n - 1 :], np.exp(below - subsets), rtol=1e-9, atol=1e-300)


def test_weights_equal_exact_binomials():
    exact = [math.comb(i - 1, 6) / math.comb(60, 7) for i in range(1, 61)]
    np.testing.assert_allclose(best_of_n_weights(7, 60), exact, rtol=1e-11)


@pytest.mark.parametrize("n", range(1, 10))
def test_estimator_equals_the_average_over_every_subset_of_nine(n):
    proxy, gold = scores(3, 9)
    curve = best_of_n_curve(proxy, gold, [n])
    for prompt in range(3):
        picks = [max(subset, key=lambda i: proxy[prompt, i]) for subset in itertools.combinations(range(9), n)]
        np.testing.assert_allclose(curve.gold_by_prompt[0, prompt], gold[prompt, picks].mean(), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(
            curve.proxy_by_prompt[0, prompt], proxy[prompt, picks].mean(), rtol=1e-10, atol=1e-12
        )
    np.testing.assert_allclose(curve.gold[0], curve.gold_by_prompt[0].mean(), rtol=1e-14)


def test_one_answer_is_the_mean_and_all_answers_the_one_of_highest_proxy():
    proxy, gold = scores(5, 200)
    curve = best_of_n_curve(proxy, gold, [1, 200])
    best = proxy.argmax(axis=1)
    np.testing.assert_allclose(curve.gold_by_prompt[0], gold.mean(axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(curve.proxy_by_prompt[1], proxy.max(axis=1), rtol=1e-9)
    np.testing.assert_allclose(curve.gold_by_prompt[1], gold[np.arange(5), best], rtol=1e-9)


def test_proxy_curve_does_not_decrease_for_any_prompt():
    proxy, gold = scores(20, 300)
    curve = best_of_n_curve(np.round(proxy, 1), gold, list(range(1, 301)))  # rounded: with ties
    assert (np.diff(curve.proxy_by_prompt, axis=0) >= -1e-10).all()


def test_gold_as_its_own_proxy_gives_equal_curves():
    _, gold = scores(4, 50)
    curve = best_of_n_curve(gold, gold, [1, 5, 50])
    np.testing.assert_array_equal(curve.gold, curve.proxy)


def test_the_order_of_answers_and_prompts_does_not_matter():
    proxy, gold = scores(4, 30)
    rng = np.random.default_rng(1)
    answers, prompts = rng.permutation(30), rng.permutation(4)
    one = best_of_n_curve(proxy, gold, [2, 7])
    other = best_of_n_curve(proxy[prompts][:, answers], gold[prompts][:, answers], [2, 7])
    np.testing.assert_allclose(other.gold_by_prompt, one.gold_by_prompt[:, prompts], rtol=1e-12)


def test_a_monotone_map_of_the_proxy_leaves_gold_alone():
    proxy, gold = scores(4, 30)
    np.testing.assert_array_equal(
        best_of_n_curve(np.exp(3.0 * proxy), gold, [2, 7]).gold, best_of_n_curve(proxy, gold, [2, 7]).gold
    )


def test_an_ensemble_of_one_member_gives_the_same_curve_whatever_the_objective():
    proxy, gold = scores(4, 30)
    members = proxy[None]
    objectives = [members.mean(0), members.min(0), members.mean(0) - 0.5 * members.var(0)]
    curves = [best_of_n_curve(objective, gold, [1, 4, 30]) for objective in objectives]
    for curve in curves[1:]:
        np.testing.assert_array_equal(curve.gold, curves[0].gold)
        np.testing.assert_array_equal(curve.proxy, curves[0].proxy)


def test_of_tied_answers_the_later_one_ranks_higher():
    generation = np.arange(2_000.0)  # enough for a sort that is not stable to betray itself
    curve = best_of_n_curve((generation % 2.0)[None], generation[None], [2_000])
    np.testing.assert_array_equal(curve.gold, [1_999.0])
    almost_all = best_of_n_curve(np.zeros((1, 2_000)), generation[None], [1_999])
    np.testing.assert_allclose(almost_all.gold, [1_999.0 * (1_999 / 2_000) + 1_998.0 / 2_000], rtol=1e-12)


def test_float32_scores_are_weighted_in_float64():
    proxy, gold = scores(4, 30)
    curve = best_of_n_curve(proxy.astype(np.float32), gold.astype(np.float32), np.array([3]))
    assert curve.gold.dtype == np.float64
    np.testing.assert_allclose(curve.gold, best_of_n_curve(proxy, gold, [3]).gold, rtol=1e-5, atol=1e-6)


def test_kl_worked_by_hand():
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5, rel=1e-14)
    assert best_of_n_kl(12_500) == pytest.approx(8.4335638, abs=1e-6)


def test_kl_is_that_of_the_density_of_the_maximum():
    # The quantile u of the best of n has density n u^(n−1), against 1 for a plain draw.
    quantile = (np.arange(200_000) + 0.5) / 200_000
    density = 5.0 * quantile**4
    assert np.mean(density * np.log(density)) == pytest.approx(best_of_n_kl(5), abs=1e-6)


def test_kl_is_an_upper_bound_when_answers_repeat():
    for n in (2, 3, 10):  # the best of n draws from 4 equally likely answers
        best = (np.arange(1, 5) / 4) ** n - (np.arange(0, 4) / 4) ** n
        assert np.sum(best * np.log(best * 4)) < best_of_n_kl(n)


@pytest.mark.parametrize("n", [0, -1, 5])
def test_an_impossible_n_is_refused(n):
    proxy, gold = scores(2, 4)
    with pytest.raises(ValueError, match=f"n is {n}"):
        best_of_n_curve(proxy, gold, [1, n])
    if n < 1:
        with pytest.raises(ValueError, match="at least 1"):
            best_of_n_kl(n)


@pytest.mark.parametrize("name", ["proxy", "gold"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused_by_prompt(name, value):
    proxy, gold = scores(3, 4)
    {"proxy": proxy, "gold": gold}[name][2, 1] = value
    with pytest.raises(ValueError, match=f"{name} scores of prompt 2"):
        best_of_n_curve(proxy, gold, [1])


def test_real_answers_give_the_mean_the_oracle_and_the_longest_of_the_data_card(shared_data):
    rows = [json.loads(line) for line in (shared_data / "bon" / "alpaca_eval_bon11.jsonl").open(encoding="utf-8")]
    gold = np.array([[answer["gold"] for answer in row["candidates"]] for row in rows])
    length = np.array([[float(len(answer["text"])) for answer in row["candidates"]] for row in rows])
    oracle = best_of_n_curve(gold, gold, [1, 11])
    assert oracle.gold.round(3).tolist() == [0.292, 0.562]
    # The card takes the first of equally long answers, the estimator the last: hence the reversal.
    assert best_of_n_curve(length[:, ::-1], gold[:, ::-1], [11]).gold.round(3).tolist() == [0.344]
