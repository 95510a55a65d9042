"""Failure 9.11 of design.md: best-of-n that sorts answers and proxy scores by the ensemble, but not gold scores."""

import itertools

import numpy as np

from rlhf_jax.sampling.best_of_n import best_of_n_curve, best_of_n_weights


def faulty_gold(proxy: np.ndarray, gold: np.ndarray, n: int) -> np.ndarray:
    """The fault, kept: the weights belong to ranks by proxy, the gold scores stay in the order of generation."""
    return gold @ best_of_n_weights(n, proxy.shape[1])


def exhaustive_gold(proxy: np.ndarray, gold: np.ndarray, n: int) -> np.ndarray:
    def picked(row: int) -> float:
        subsets = itertools.combinations(range(proxy.shape[1]), n)
        return float(np.mean([gold[row, max(subset, key=lambda i: proxy[row, i])] for subset in subsets]))

    return np.array([picked(row) for row in range(proxy.shape[0])])


def test_gold_is_permuted_with_the_answers_on_three_answers():
    proxy = np.array([[3.0, 1.0, 2.0]])
    gold = np.array([[7.0, -5.0, 1.0]])
    np.testing.assert_allclose(best_of_n_curve(proxy, gold, [3]).gold, [7.0], rtol=1e-12)  # the answer of proxy 3
    np.testing.assert_allclose(faulty_gold(proxy, gold, 3), [1.0], rtol=1e-12)  # the answer that stands last


def test_gold_follows_the_aggregated_score_of_an_ensemble_and_the_fault_does_not():
    rng = np.random.default_rng(0)
    members, gold = rng.normal(size=(5, 6, 8)), rng.normal(size=(6, 8))
    for proxy in (members.mean(0), members.min(0), members.mean(0) - 0.5 * members.var(0)):
        for n in (2, 4, 8):
            truth = exhaustive_gold(proxy, gold, n)
            np.testing.assert_allclose(
                best_of_n_curve(proxy, gold, [n]).gold_by_prompt[0], truth, rtol=1e-9, atol=1e-12
            )
            assert np.abs(faulty_gold(proxy, gold, n) - truth).max() > 0.1


def test_the_fault_hides_over_optimisation_because_its_curve_ignores_the_proxy():
    rng = np.random.default_rng(1)
    gold = rng.normal(size=(6, 8))
    best, worst = best_of_n_curve(gold, gold, [8]).gold, best_of_n_curve(-gold, gold, [8]).gold
    np.testing.assert_allclose(best, gold.max(axis=1).mean(), rtol=1e-9)
    np.testing.assert_allclose(worst, gold.min(axis=1).mean(), rtol=1e-9)
    np.testing.assert_array_equal(faulty_gold(gold, gold, 8), faulty_gold(-gold, gold, 8))
