"""How much of a score is length, worked by hand and against what holds by construction."""

import numpy as np
import pytest

from rlhf_jax.evaluation import statistics
from rlhf_jax.evaluation.length import (
    Outputs,
    length_controlled_wins,
    longer_is_chosen,
    pair_length_rows,
    response_length_rows,
    stratified_gain,
    stratified_gain_rows,
    within_prompt_correlation,
)


def means(rows):
    return {row["name"]: row["mean"] for row in rows}


@pytest.fixture
def policies():
    """Outputs before and after training; lengths overlap in part, the trained policy's are longer."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 90, 60), rng.integers(40, 130, 50)
    return tuple(Outputs(rng.normal(size=one.size), one) for one in lengths)


def test_share_of_longer_chosen():
    assert longer_is_chosen(np.array([3, 2, 2, 9]), np.array([2, 2, 3, 1])) == 0.5


def test_correlation_within_prompts_ignores_what_prompts_differ_in():
    rng = np.random.default_rng(1)
    lengths = [rng.random(5) for _ in range(4)]
    rewards = [-one + 0.1 * rng.normal(size=5) for one in lengths]
    within = within_prompt_correlation(rewards, lengths)
    np.testing.assert_allclose(within, [np.corrcoef(*pair)[0, 1] for pair in zip(rewards, lengths, strict=True)])
    shifted = (
        [one + 100.0 * place for place, one in enumerate(rewards)],
        [one + 100.0 * place for place, one in enumerate(lengths)],
    )
    np.testing.assert_allclose(within_prompt_correlation(*shifted), within, atol=1e-9)
    found = means(response_length_rows(*shifted))
    assert found["Pearson correlation of reward and length within a prompt"] == pytest.approx(within.mean())
    assert found["Pearson correlation of reward and length"] > 0.99


def test_prompts_without_a_correlation_are_left_out():
    rewards = [np.array([1.0, 1.0]), np.array([0.0, 1.0])]
    rows = response_length_rows(rewards, [np.array([1.0, 2.0]), np.array([1.0, 2.0])])
    assert (rows[0]["mean"], rows[0]["n"], rows[1]["n"]) == (pytest.approx(1.0), 1, 2)
    assert len(response_length_rows([rewards[0]], [np.array([1.0, 2.0])])) == 2


@pytest.fixture
def few_draws(monkeypatch):
    """Intervals of 100 draws: where it matters what is drawn, not how often."""
    bootstrap = statistics.bootstrap
    monkeypatch.setattr(statistics, "bootstrap", lambda *data, n, **more: bootstrap(*data, n=min(n, 100), **more))


def test_rows_of_one_prompt_are_drawn_together(few_draws):
    rewards = [np.array(one) for one in ([0.0, 1.0], [1.0, 3.0], [2.0, 0.0], [1.0, 1.0])]  # the last says nothing
    rows = response_length_rows(rewards, [np.array([1.0, 2.0])] * 4, np.array([4, 4, 9, 7]))
    assert [row["n"] for row in rows] == [2, 3, 3]


def test_gain_at_equal_length_against_a_loop(policies):
    before, after = policies
    total, weight = 0.0, 0
    for low in range(0, 140, 20):
        sides = [side.rewards[(side.lengths >= low) & (side.lengths < low + 20)] for side in policies]
        if all(side.size for side in sides):
            count = sides[0].size + sides[1].size
            total, weight = total + count * (sides[1].mean() - sides[0].mean()), weight + count
    gain = stratified_gain(before, after)
    np.testing.assert_allclose(gain.within, total / weight)
    np.testing.assert_allclose(gain.covered, weight / 110)
    assert 0.0 < gain.covered < 1.0
    np.testing.assert_allclose(gain.share, gain.within / gain.total)


def test_reward_that_is_length_gains_nothing_at_equal_length(policies):
    by_bin = [Outputs(side.lengths // 20 * 1.0, side.lengths) for side in policies]
    gain = stratified_gain(*by_bin)
    assert gain.total > 0.5
    np.testing.assert_allclose([gain.within, gain.share], 0.0, atol=1e-12)


def test_gain_that_is_the_same_everywhere_is_not_length(policies):
    before, _ = policies
    lengths = np.append(before.lengths, 5)
    rewards = np.append(before.rewards, 0.0)
    gain = stratified_gain(Outputs(rewards, lengths), Outputs(rewards + 2.0, lengths))
    np.testing.assert_allclose([gain.total, gain.within, gain.share, gain.covered], [2.0, 2.0, 1.0, 1.0])


def test_no_bin_in_common():
    gain = stratified_gain(Outputs(np.zeros(2), np.array([1, 2])), Outputs(np.ones(2), np.array([50, 60])))
    assert gain.total == 1.0 and gain.covered == 0.0
    assert np.isnan(gain.within) and np.isnan(gain.share)
    with pytest.raises(ValueError, match="outputs of both policies"):
        stratified_gain(Outputs(np.zeros(0), np.zeros(0)), Outputs(np.ones(1), np.ones(1)))


def test_gain_rows_are_the_gain(policies):
    rows = stratified_gain_rows(*policies)
    np.testing.assert_allclose([row["mean"] for row in rows], stratified_gain(*policies))
    assert rows[0]["n"] == 110 and rows[0]["ci95"][0] < rows[0]["mean"] < rows[0]["ci95"][1]


def test_win_rate_at_nearly_equal_length():
    wins, lengths, others = np.array([1.0, 0.0, 0.5, 1.0]), np.array([10, 20, 30, 40]), np.array([11, 15, 40, 40])
    assert length_controlled_wins(wins, lengths, others, 5).tolist() == [1.0, 1.0]
    assert length_controlled_wins(wins, lengths, others, 100).tolist() == wins.tolist()
    with pytest.raises(ValueError, match="raise the tolerance"):
        length_controlled_wins(wins[:1], lengths[:1], others[:1], 1)


def test_pairs_worked_by_hand():
    margin, chosen, rejected = np.array([1.0, -1.0, 2.0, 1.0]), np.array([5, 5, 2, 3]), np.array([3, 4, 4, 3])
    found = list(means(pair_length_rows(margin, chosen, rejected)).values())
    # Longer chosen: 2 of 4; always the longer: (2 + ½)/4; the scores prefer the longer in 1 of 3 unequal pairs.
    np.testing.assert_allclose(found[:5], [0.5, 0.625, 1 / 3, 0.5, 1.0])
    both = np.append(margin, -margin), np.append(chosen - rejected, rejected - chosen)
    np.testing.assert_allclose(found[5], np.corrcoef(*both)[0, 1])


def test_correlation_of_pairs_does_not_depend_on_which_was_chosen():
    rng = np.random.default_rng(2)
    margin, chosen, rejected = rng.normal(size=15), rng.random(15), rng.random(15)
    swap = rng.random(15) < 0.5
    other = np.where(swap, -margin, margin), np.where(swap, rejected, chosen), np.where(swap, chosen, rejected)
    before, after = means(pair_length_rows(margin, chosen, rejected)), means(pair_length_rows(*other))
    for name in ("Pearson", "Spearman"):
        key = f"{name} correlation of margin and length difference"
        assert after[key] == pytest.approx(before[key])


def test_scores_that_are_lengths_prefer_the_longer():
    chosen, rejected = np.array([9.0, 2.0, 7.0]), np.array([3.0, 4.0, 5.0])
    found = means(pair_length_rows(chosen - rejected, chosen, rejected, groups=[0, 0, 1]))
    assert found["share of pairs whose longer response scores higher"] == 1.0
    assert found["accuracy where the chosen is shorter"] == 0.0
    assert found["Pearson correlation of margin and length difference"] == pytest.approx(1.0)
