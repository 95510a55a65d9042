"""Algorithms at equal samples and at equal KL, on curves made by hand."""

import numpy as np
import pytest

from rlhf_jax.evaluation.frontier import (
    Curves,
    common_distances,
    comparison_rows,
    equal_kl_table,
    equal_samples_table,
    frontier_figure,
    learning_figure,
    reach_table,
    samples_to_reach,
)


def curves(kl, gold):
    kl, gold = np.array(kl), np.array(gold)
    return Curves(samples=64 * np.arange(kl.shape[1]), kl=kl, gold=gold, proxy=2 * gold)


@pytest.fixture
def arms():
    """Gold is √KL for the first, half of it for the second, which gets farther."""
    return {
        "short": curves([[0.0, 1.0, 4.0], [0.0, 1.0, 9.0]], [[0.0, 1.0, 2.0], [0.0, 1.0, 3.0]]),
        "long": curves([[0.0, 4.0, 16.0], [0.0, 4.0, 16.0]], [[0.0, 1.0, 2.0], [0.2, 1.2, 2.2]]),
    }


def test_distances_are_those_that_every_seed_reaches(arms):
    np.testing.assert_allclose(common_distances(arms, count=4), [0.5, 1.0, 1.5, 2.0])
    # The last one is the farthest itself, to the last bit, for any count: one bit more and nobody is there.
    farthest = curves([[0.0, 0.7]], [[0.0, 1.0]])
    for count in range(1, 50):
        assert common_distances({"a": farthest}, count)[-1] == np.sqrt(0.7)


def test_rows_hold_the_end_and_gold_at_equal_kl(arms):
    rows = {row["name"]: row for row in comparison_rows(arms, "s.d.")}
    assert rows["short: final gold"]["mean"] == pytest.approx(2.5)
    assert rows["short: final KL"]["mean"] == pytest.approx(6.5)
    assert rows["short: final KL"]["unit"] == "nat"
    assert rows["long: final proxy"]["mean"] == pytest.approx(4.2)
    assert rows["short: gold at KL = 4 nats"]["mean"] == pytest.approx(2.0)
    assert rows["long: gold at KL = 4 nats"]["mean"] == pytest.approx(1.1)
    assert rows["long: gold at KL = 1.78 nats"]["mean"] == pytest.approx(0.1 + 2 / 3)
    assert len(rows) == 2 * (3 + 3)


def test_tables_say_the_same(arms):
    equal_samples, equal_kl = equal_samples_table(arms).splitlines(), equal_kl_table(arms).splitlines()
    assert equal_samples[0].startswith("| algorithm, after 128 samples |")
    assert equal_samples[2].startswith("| short | 2.50 [")
    assert equal_kl[0] == "| gold at a KL of | 0.444 nats | 1.78 nats | 4 nats |"
    assert equal_kl[2] == "| short | 0.67 [0.67, 0.67] | 1.33 [1.33, 1.33] | 2.00 [2.00, 2.00] |"
    assert all(line.count("|") == 5 for line in equal_kl + equal_samples)


def test_one_that_has_not_moved_leaves_no_common_kl(arms):
    still = curves([[0.0, 0.0, -0.1]] * 2, [[0.0, 0.1, 0.2]] * 2)
    assert common_distances(arms | {"still": still}).size == 0
    assert "has not moved" in equal_kl_table(arms | {"still": still})
    assert len(comparison_rows(arms | {"still": still}, "s.d.")) == 9


def test_samples_to_reach_a_level(arms):
    assert samples_to_reach(arms["short"], 1.0).tolist() == [64.0, 64.0]
    assert samples_to_reach(arms["short"], 2.5).tolist() == [np.inf, 128.0]
    assert reach_table(arms, 2.5).splitlines()[2:] == ["| short | 1 of 2 | – | – |", "| long | 0 of 2 | – | – |"]
    assert reach_table(arms, 1.1).splitlines()[3] == "| long | 2 of 2 | 96 | 128 |"


def test_runs_of_other_lengths_are_not_compared(arms):
    shorter = Curves(*(values[..., :2] for values in arms["long"]))
    with pytest.raises(ValueError, match=r"drawn \[64, 128\] samples"):
        equal_samples_table(arms | {"long": shorter})


def test_figures_have_a_panel_a_family(arms, tmp_path):
    still = curves([[0.0, 0.0, -0.1]] * 2, [[0.0, 0.1, 0.2]] * 2)
    arms = arms | {"still": still}
    families = {"one": ["short", "still"], "two": ["long"]}
    for path in (
        frontier_figure(arms, families, tmp_path / "figures" / "frontier.png", "gold"),
        learning_figure(arms, families, tmp_path / "figures" / "learning.png", "gold", level=1.5),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
