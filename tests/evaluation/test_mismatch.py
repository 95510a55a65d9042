"""Correlations over checkpoints: planted ones are found, transforms and the order of rows leave them."""

import numpy as np
import pytest

from rlhf_jax.evaluation.calibration import reliability
from rlhf_jax.evaluation.mismatch import by_divergence_rows, category_rows, first_divergence, mismatch_report

SPEARMAN = "Spearman, reward model accuracy ~ evaluation gold"
PEARSON = "Pearson, reward model accuracy ~ evaluation gold"


def by_name(rows):
    return {row["name"]: row for row in rows}


def report(*tables):
    """The report with as many draws as a test needs."""
    return mismatch_report(*tables, draws=200)


def numbers(rows):
    return np.array([[row["mean"], *row["ci95"]] for row in rows])


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    accuracy, proxy, gold = rng.normal(size=(3, 12))
    return {"accuracy": accuracy}, {"proxy": proxy, "kl": rng.random(12)}, {"gold": accuracy + gold}


def test_every_link_has_its_correlations(table):
    rows = report(*table)
    assert [row["name"] for row in rows if row["name"].startswith("Spearman")] == [
        "Spearman, reward model accuracy ~ training proxy",
        "Spearman, reward model accuracy ~ training kl",
        "Spearman, reward model accuracy ~ evaluation gold",
        "Spearman, training proxy ~ evaluation gold",
        "Spearman, training kl ~ evaluation gold",
    ]
    assert {row["n"] for row in rows} == {12}
    expected = np.corrcoef(table[0]["accuracy"], table[2]["gold"])[0, 1]
    assert by_name(rows)[PEARSON]["mean"] == pytest.approx(expected)


@pytest.mark.parametrize("planted", [0.8, 0.0, -0.6])
def test_planted_correlation_is_found(planted):
    """Standardised columns whose correlation is exactly the planted one."""
    base = np.random.default_rng(1).normal(size=(300, 2))
    a, b = np.linalg.qr(base - base.mean(axis=0))[0].T
    gold = planted * a + np.sqrt(1.0 - planted**2) * b
    found = by_name(report({"accuracy": a}, {}, {"gold": gold}))
    assert found[PEARSON]["mean"] == pytest.approx(planted)
    assert found[SPEARMAN]["mean"] == pytest.approx(planted, abs=0.1)
    assert found[PEARSON]["ci95"][0] < planted < found[PEARSON]["ci95"][1]


def test_monotone_columns_have_rank_correlation_one():
    accuracy = np.array([0.5, 0.6, 0.9, 0.7])
    found = by_name(report({"accuracy": accuracy}, {}, {"gold": np.exp(9 * accuracy)}))
    assert found[SPEARMAN]["mean"] == pytest.approx(1.0)
    assert found[PEARSON]["mean"] < 0.99


def test_affine_transforms_and_the_order_of_rows_change_nothing(table):
    rows = numbers(report(*table))
    order = np.random.default_rng(2).permutation(12)
    mixed = [{name: column[order] for name, column in part.items()} for part in table]
    np.testing.assert_array_equal(numbers(report(*mixed)), rows)
    scaled = [{name: 8.0 * column - 4.0 for name, column in part.items()} for part in table]
    np.testing.assert_allclose(numbers(report(*scaled)), rows, atol=1e-9)


def test_rank_correlation_stays_under_increasing_transforms(table):
    moved = [{name: np.exp(column) for name, column in part.items()} for part in table]
    before, after = (
        numbers([row for row in report(*part) if row["name"].startswith("Spearman")]) for part in (table, moved)
    )
    np.testing.assert_allclose(after, before, atol=1e-12)


def test_checkpoints_of_a_run_are_drawn_together():
    """Four checkpoints that repeat each run say no more than one a run."""
    rng = np.random.default_rng(3)
    accuracy, gold = rng.normal(size=(2, 8))
    once = report({"accuracy": accuracy}, {}, {"gold": gold})
    repeated = report({"accuracy": np.tile(accuracy, (4, 1)).T}, {}, {"gold": np.tile(gold, (4, 1)).T})
    np.testing.assert_allclose(numbers(repeated), numbers(once), atol=1e-9)
    assert repeated[0]["n"] == 8


def test_what_was_not_measured_is_left_out(table):
    part, kept = [dict(one) for one in table], slice(0, 9)
    part[2]["gold"] = np.append(part[2]["gold"][kept], [np.nan] * 3)
    found = by_name(report(*part))[PEARSON]["mean"]
    assert found == pytest.approx(np.corrcoef(table[0]["accuracy"][kept], table[2]["gold"][kept])[0, 1])


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (({"a": np.ones(4)}, {}, {"b": np.ones(5)}), "the shapes are"),
        (({"a": np.ones(4)}, {}, {}), "two of the tables"),
        (({"a": np.ones(2)}, {}, {"b": np.ones(2)}), "three runs"),
        (({"a": np.ones(3)}, {}, {"b": np.full(3, np.inf)}), "finite numbers"),
    ],
)
def test_bad_tables(table, sentence):
    with pytest.raises(ValueError, match=sentence):
        report(*table)


def test_first_divergence():
    rising, gold = np.array([0.0, 1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 1.9, 3.0, 1.0])
    assert first_divergence(rising, gold) == 2
    assert first_divergence(rising, gold, 0.5) == 4
    assert first_divergence(gold, gold) is None
    assert first_divergence(rising, rising) is None
    assert first_divergence(3.0 * rising - 5.0, 2.0 * gold, 1.0) == 4


def test_accuracy_and_calibration_by_divergence():
    kl, margin = np.array([0.5, 0.5, 2.0, 2.0, 9.0]), np.array([1.0, 0.0, -1.0, 2.0, -5.0])
    found = by_name(by_divergence_rows(kl, margin, np.array([0.0, 1.0, 1.5, 3.0]), spread=np.arange(5.0)))
    assert list(found) == [
        "accuracy, KL 0 to 1", "ECE, KL 0 to 1", "disagreement, KL 0 to 1",
        "accuracy, KL 1.5 to 3", "ECE, KL 1.5 to 3", "disagreement, KL 1.5 to 3",
    ]  # fmt: skip
    assert found["accuracy, KL 0 to 1"]["mean"] == 0.75
    assert found["accuracy, KL 1.5 to 3"]["mean"] == 0.5
    assert found["disagreement, KL 1.5 to 3"]["mean"] == 2.5
    assert found["ECE, KL 1.5 to 3"]["mean"] == pytest.approx(reliability(margin[2:4]).expected_error)
    assert by_divergence_rows(kl, margin, np.array([0.0, 1.0]), groups=[0, 0, 1, 1, 2])[0]["n"] == 1


def test_the_largest_divergence_is_in_the_last_bin():
    kl, margin = np.array([0.0, 1.0, 2.0, 2.1]), np.array([1.0, 1.0, -1.0, -1.0])
    found = {row["name"]: row for row in by_divergence_rows(kl, margin, np.array([0.0, 1.0, 2.0]))}
    assert found["accuracy, KL 0 to 1"]["n"] == 1
    assert found["accuracy, KL 1 to 2"]["n"] == 2 and found["accuracy, KL 1 to 2"]["mean"] == 0.5


def test_scale_of_the_reward_by_category():
    found = by_name(category_rows(np.array([1.0, 3.0, 5.0]), ["b", "b", "a"]))
    assert found["mean reward: b"]["mean"] == 2.0 and found["s.d. of the reward: b"]["mean"] == 1.0
    assert found["mean reward: a"]["n"] == 1
