"""Accuracy and best-of-n picks, worked by hand."""

import numpy as np
import pytest

from rlhf_jax.evaluation.picks import pair_rows, pick_rows, picked, trivial_pick_rows


def arrays(*rows):
    return [np.array(row) for row in rows]


def means(rows):
    return {row["name"]: row["mean"] for row in rows}


def test_the_pick_is_the_best_by_score_and_ties_share():
    gold = arrays([0.0, 1.0, 0.5], [0.2, 0.8])
    assert picked(arrays([1.0, 3.0, 3.0], [2.0, 1.0]), gold).tolist() == [0.75, 0.2]


def test_gold_beside_random_longest_and_best():
    scores, lengths, gold = (
        arrays([0.0, 1.0], [5.0, 4.0]),
        arrays([9.0, 1.0], [1.0, 9.0]),
        arrays([0.0, 1.0], [0.4, 0.8]),
    )
    found = means(pick_rows(scores, lengths, gold))
    assert found == pytest.approx(
        {
            "gold of the pick by score": 0.7,
            "gold of a random pick": 0.55,
            "gold of the longest": 0.4,
            "gold of the best": 0.9,
            "gold gained over a random pick": 0.15,
            "gold gained over the longest": 0.3,
        }
    )


def test_rows_of_one_prompt_are_drawn_together():
    """Two prompts of 20 equal rows: the mean of a draw is one of three numbers, however many rows there are."""
    scores, lengths, gold = arrays([1.0, 0.0]) * 40, arrays([1.0, 2.0]) * 40, arrays([1.0, 0.0], [0.0, 1.0])
    gold, prompt = [gold[i // 20] for i in range(40)], np.arange(40) // 20
    for rows in (pick_rows(scores, lengths, gold, prompt), trivial_pick_rows(lengths, gold, prompt)):
        assert {row["n"] for row in rows} == {2}
        found = {row["name"]: row["ci95"] for row in rows}
        assert found["gold of the longest"] == [0.0, 1.0] and found["gold of the best"] == [1.0, 1.0]
    alone = pick_rows(scores, lengths, gold)[0]
    assert alone["n"] == 40 and 0.2 < alone["ci95"][0] < alone["ci95"][1] < 0.8


def test_what_needs_no_scores():
    lengths, gold = arrays([9.0, 1.0], [1.0, 9.0]), arrays([0.0, 1.0], [0.4, 0.8])
    found = means(trivial_pick_rows(lengths, gold))
    assert found == pytest.approx(
        {
            "gold of a random pick": 0.55,
            "gold of the longest": 0.4,
            "gold of the best": 0.9,
            "gold gained by the longest over a random pick": -0.15,
            "gold gained by the best over a random pick": 0.35,
        }
    )


def test_pairs():
    scores, lengths = arrays([2.0, 1.0], [0.0, 4.0], [1.0, 1.0]), arrays([3.0, 1.0], [3.0, 1.0], [1.0, 3.0])
    found = means(pair_rows(scores, lengths))
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["accuracy of the longer completion"] == pytest.approx(2 / 3)
    assert found["margin"] == pytest.approx(-1.0)
