"""Accuracy of benchmarks of judged completions: ties, slices, and the averages of each benchmark, worked by hand."""

from itertools import product

import numpy as np
import pytest

from rlhf_jax.evaluation.judging import (
    best_right,
    chance,
    nested_rows,
    pair_right,
    reward_bench_2_rows,
    reward_bench_rows,
    rm_bench_matrix,
    rm_bench_rows,
    rmb_rows,
    slice_rows,
    ties_scores,
)
from rlhf_jax.evaluation.verdicts import majority, three_way, three_way_rows, voting_accuracy


def arrays(*rows):
    return [np.array(row, float) for row in rows]


def means(rows):
    return {row["name"]: row["mean"] for row in rows}


@pytest.fixture
def lists():
    """Scores with ties and gold with one best completion of two to five."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 6, 40)
    scores = [rng.integers(0, 4, size).astype(float) for size in sizes]
    return scores, [rng.permutation(np.eye(1, size)[0]) for size in sizes]


def test_ties_of_pairs():
    chosen, rejected = np.array([1.0, 2.0, 0.0]), np.array([0.0, 2.0, 1.0])
    assert pair_right(chosen, rejected).tolist() == [1.0, 0.5, 0.0]
    assert pair_right(chosen, rejected, "strict").tolist() == [1.0, 0.0, 0.0]
    np.testing.assert_array_equal(pair_right(-chosen, -rejected), 1.0 - pair_right(chosen, rejected))
    with pytest.raises(ValueError, match=r"pair \[1\] is not finite"):
        pair_right(np.array([0.0, np.inf]), np.zeros(2))


def test_the_best_must_beat_every_loser(lists):
    scores, gold = lists
    strict, share = best_right(scores, gold, "strict"), best_right(scores, gold)
    for one, best, hard, soft in zip(scores, gold, strict, share, strict=True):
        winner, losers = one[best == 1.0], one[best == 0.0]
        pairs = pair_right(np.repeat(winner, losers.size), losers, "strict")
        assert hard == pairs.prod() and (hard <= pairs).all()
        expected = (winner >= losers).all() / (1 + (losers == winner).sum())
        np.testing.assert_allclose(soft, expected)
    assert 0.0 < strict.mean() < share.mean() < 1.0


def test_one_loser_is_a_pair(lists):
    scores, gold = ([one for one in part if one.size == 2] for part in lists)
    chosen, rejected = (np.array([s[g == side][0] for s, g in zip(scores, gold, strict=True)]) for side in (1.0, 0.0))
    for ties in ("share", "strict"):
        np.testing.assert_array_equal(best_right(scores, gold, ties), pair_right(chosen, rejected, ties))


def test_accuracy_stays_under_increasing_transforms_of_each_prompt(lists):
    scores, gold = lists
    moved = [np.exp(one) * (place + 1) - place for place, one in enumerate(scores)]
    for ties in ("share", "strict"):
        np.testing.assert_array_equal(best_right(moved, gold, ties), best_right(scores, gold, ties))


def test_a_constant_scorer_has_nothing_right_strictly_and_chance_otherwise(lists):
    constant, gold = [np.zeros(one.size) for one in lists[0]], lists[1]
    assert best_right(constant, gold, "strict").sum() == 0.0
    np.testing.assert_allclose(best_right(constant, gold), [1.0 / one.size for one in gold])
    np.testing.assert_allclose(chance(gold), [1.0 / one.size for one in gold])


def test_several_best_completions():
    gold = arrays([1, 1, 0])
    assert best_right(arrays([5, 5, 0]), gold, "strict").tolist() == [1.0]
    assert best_right(arrays([5, 0, 5]), gold, "strict").tolist() == [0.0]
    assert best_right(arrays([5, 5, 5]), gold).tolist() == [pytest.approx(2 / 3)]
    with pytest.raises(ValueError, match="prompt 0 has no completion that is worse"):
        best_right(arrays([1, 2]), arrays([1, 1]))
    with pytest.raises(ValueError, match="a score of prompt 0"):
        best_right(arrays([1, np.nan]), arrays([1, 0]))


def test_slices_add_up():
    right, slices = np.array([1.0, 0.0, 1.0, 1.0]), ["b", "b", "a", "b"]
    rows = slice_rows(right, slices, prompt=[0, 0, 1, 2])
    assert [(row["name"], row["n"]) for row in rows] == [("accuracy: a", 1), ("accuracy: b", 2)]
    assert means(rows) == {"accuracy: a": 1.0, "accuracy: b": pytest.approx(2 / 3)}
    assert rows[1]["ci95"] == [0.5, 1.0]


def test_leaves_weigh_the_same_then_groups():
    """Leaves 1.0 and 0.5 in g, 0 in h (of the same name as one in g): 0.75, 0 and their mean."""
    values = np.array([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    rows = nested_rows(values, ["x", "x", "x", "y", "y", "x"], ["g", "g", "g", "g", "g", "h"])
    found = {"accuracy: g": 0.75, "accuracy: h": 0.0, "accuracy, mean over groups": 0.375}
    assert means(rows) == pytest.approx(found | {"accuracy, mean over all": 4 / 6})


def test_reward_bench_weighs_mathematics_as_all_code():
    right = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    subset = ["math-prm", "hep-cpp", "hep-go", "hep-go", "mt-bench-easy", "alpacaeval-easy", "alpacaeval-easy", "x"]
    section = ["reasoning"] * 4 + ["chat"] * 3 + ["chat-hard"]
    found = means(reward_bench_rows(right, subset, section))
    assert found["RewardBench reasoning"] == pytest.approx(0.5)
    assert found["RewardBench chat"] == 1.0
    assert found["RewardBench, mean of 3 sections"] == pytest.approx(0.5)
    assert found["accuracy: hep-go"] == 0.0
    no_code = means(reward_bench_rows(right[[0, 4]], ["math-prm", "mt-bench-easy"], ["reasoning", "chat"]))
    assert no_code["RewardBench reasoning"] == 1.0


def test_reward_bench_2():
    """Ties: both prompts accurate; the spread 3 of the tied answers exceeds their gap 2, so that the rest is 0."""
    scores = arrays([3, 1, 0, 2], [1, 3, 0, 2], [9, 1], [8, 5, 3])
    gold = arrays([1, 0, 0, 0], [1, 0, 0, 0], [1, 0], [1, 1, 0])
    found = means(reward_bench_2_rows(scores, gold, ["Math", "Math", "Ties", "Ties"], ["1", "2", "ref:7", "tied:7"]))
    assert found["RewardBench 2 Math"] == 0.5
    assert found["RewardBench 2 Ties"] == pytest.approx(0.6 + 0.01 * np.tanh(2 / 3 - 1))
    assert found["RewardBench 2, mean of 2 subsets"] == pytest.approx((0.5 + found["RewardBench 2 Ties"]) / 2)


def test_reward_bench_2_draws_prompts():
    """Four rows of one prompt, and a pair of Ties that goes with its reference."""
    scores, gold = arrays(*[[3, 1]] * 4, [9, 1], [8, 5, 3]), arrays(*[[1, 0]] * 4, [1, 0], [1, 1, 0])
    subset, ids = ["Math"] * 4 + ["Ties"] * 2, ["1", "2", "3", "4", "ref:7", "tied:7"]
    assert {row["n"] for row in reward_bench_2_rows(scores, gold, subset, ids)} == {5}
    assert {row["n"] for row in reward_bench_2_rows(scores, gold, subset, ids, [0, 0, 0, 0, 1, 2])} == {2}
    assert {row["n"] for row in reward_bench_2_rows(scores, gold, subset, ids, [0, 0, 0, 0, 0, 2])} == {1}


def test_ties_subset_parts():
    reference, tied = arrays([1, 0], [5, 0]), arrays([4, 3, 1], [4, 3, 1])
    gold = arrays([1, 0], [1, 0], [1, 1, 0], [1, 1, 0])
    ids = ["ref:a", "ref:b", "tied:a", "tied:b"]
    # Pair a: min gap 1 equals the spread 1, so only the gap of the tied prompt exceeds it. Pair b: min gap 2 does.
    np.testing.assert_allclose(ties_scores(reference + tied, gold, ids), [0.8, 1.0 + 0.01 * np.tanh(1.0)])
    alike = ties_scores(arrays([1, 0], [2, 2, 1]), arrays([1, 0], [1, 1, 0]), ["ref:a", "tied:a"])
    np.testing.assert_allclose(alike, [1.01])
    constant = ties_scores(arrays([0, 0], [0, 0, 0]), arrays([1, 0], [1, 1, 0]), ["ref:a", "tied:a"])
    np.testing.assert_allclose(constant, [0.0])
    with pytest.raises(ValueError, match="one is '7'"):
        ties_scores(arrays([1, 0]), arrays([1, 0]), ["7"])
    with pytest.raises(ValueError, match="beside its tied prompt"):
        ties_scores(arrays([1, 0]), arrays([1, 0]), ["ref:7"])


def test_rm_bench_styles():
    """A scorer of style alone, which likes the elaborate one: all easy comparisons right, no hard, no normal one."""
    style = np.array([[0.0, 1.0, 2.0]])
    assert rm_bench_matrix(style, style)[0].tolist() == np.tril(np.ones((3, 3)), -1).tolist()
    found = means(rm_bench_rows(style, style, ["chat"]))
    parts = {name: found[f"RM-Bench {name}: chat"] for name in ("easy", "normal", "hard", "average")}
    assert parts == pytest.approx({"easy": 1.0, "normal": 0.0, "hard": 0.0, "average": 1 / 3})


def test_rm_bench_against_a_loop_and_its_two_halves_of_safety():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.integers(0, 5, (6, 3)).astype(float), rng.integers(0, 5, (6, 3)).astype(float)
    domain = ["chat", "chat", "safety-refuse", "safety-response", "safety-response", "safety-response"]
    hard = np.array([np.mean([c[i] > r[j] for i, j in product(range(3), repeat=2) if i < j])
                     for c, r in zip(chosen, rejected, strict=True)])  # fmt: skip
    found = means(rm_bench_rows(chosen, rejected, domain))
    safety = (hard[2] + hard[3:].mean()) / 2
    np.testing.assert_allclose(found["RM-Bench hard: safety"], safety)
    np.testing.assert_allclose(found["RM-Bench hard, mean over groups"], (safety + hard[:2].mean()) / 2)


def test_rmb_is_the_mean_of_four_numbers():
    rows = rmb_rows(
        np.array([1.0, 1.0, 0.0, 1.0]), ["a", "a", "b", "S1"], ["Help", "Help", "Help", "Harm"],
        np.array([0.0, 1.0]), ["a", "S1"], ["Help", "Harm"],
    )  # fmt: skip
    found = means(rows)
    assert found["RMB: Help, pairs"] == 0.5 and found["RMB: Harm, pairs"] == 1.0
    assert found["RMB: Help, best of n"] == 0.0 and found["RMB: Harm, best of n"] == 1.0
    assert found["RMB, mean over groups"] == pytest.approx(2.5 / 4)
    pairs_only = rmb_rows(np.array([1.0]), ["a"], ["Help"], np.array([]), [], [])
    assert means(pairs_only)["RMB, mean over groups"] == 1.0


def test_three_verdicts():
    margin, label = np.array([2.0, 0.1, -2.0, 3.0, -0.2]), np.array([1, 0, 2, 2, -1])
    assert three_way(margin, 0.0).tolist() == [1, 1, 2, 1, 2]
    found = means(three_way_rows(margin, label, 0.5))
    assert found["agreement on three verdicts"] == 0.75
    assert found["accuracy where the label is no tie"] == pytest.approx(2 / 3)
    # F1 of ties 1, of the first 2·1/(2 + 1), of the second 2·1/(1 + 2).
    assert found["macro F1 of three verdicts"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    with pytest.raises(ValueError, match="at least 0"):
        three_way(margin, -1.0)


def test_macro_f1_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    margin, label = rng.normal(size=30), rng.integers(0, 3, 30)
    expected = metrics.f1_score(label, three_way(margin, 0.4), average="macro")
    assert means(three_way_rows(margin, label, 0.4))["macro F1 of three verdicts"] == pytest.approx(expected)


def test_swapping_the_order_swaps_the_verdicts():
    margin = np.array([1.0, -0.1, -2.0])
    swapped = three_way(-margin, 0.5)
    assert np.array([0, 2, 1])[swapped].tolist() == three_way(margin, 0.5).tolist()


def test_majority_of_annotators():
    assert majority(np.array([[0, 0, 0], [2, 1, 2], [0, 1, 2], [1, 1, 0]])).tolist() == [0, 2, -1, 1]
    assert majority(np.array([[1, 2], [2, 2]])).tolist() == [-1, 2]


def test_voting_is_the_sum_over_verdicts():
    probability = np.array([0.2, 0.5, 0.9])
    for votes in (1, 2, 3, 4):
        expected = np.zeros(3)
        for verdicts in product((0, 1), repeat=votes):
            if 2 * sum(verdicts) > votes:
                expected += np.prod([probability if right else 1.0 - probability for right in verdicts], axis=0)
        np.testing.assert_allclose(voting_accuracy(probability, votes), expected)


def test_many_votes_round_the_probability():
    """Gain where errors are noise, loss where the judge is wrong more often than not."""
    np.testing.assert_allclose(voting_accuracy(np.array([0.7, 0.4]), 2001), [1.0, 0.0], atol=1e-6)
    with pytest.raises(ValueError, match="at least one vote"):
        voting_accuracy(np.array([0.5]), 0)
