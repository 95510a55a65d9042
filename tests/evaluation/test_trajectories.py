"""Peak and fall by hand and by expectation, and interpolation at matched KL."""

import math

import numpy as np
import pytest

from rlhf_jax.evaluation.trajectories import at_matched_kl, chosen_by_others, peak_and_fall


def test_peak_and_fall_worked_by_hand():
    curve = np.array([[0.0, 4.0, 3.0, 1.0], [0.0, 2.0, 3.0, 2.0], [0.0, 6.0, 2.0, 0.0]])
    fall = peak_and_fall(curve)
    assert (fall.peak_step, fall.peak, fall.final) == (1, 4.0, 1.0)
    # Drops 3, 0, 6: mean 3, sd 3, standard error √3.
    assert (fall.drop, fall.standard_error) == (3.0, pytest.approx(math.sqrt(3.0)))
    assert fall.in_standard_errors == pytest.approx(math.sqrt(3.0))
    # The others choose step 1 (sum 8, against 5), step 1 (10, against 5), and for the third, of 6 and 6, the first.
    assert fall.held_out_drop == 3.0


def test_each_seed_is_measured_at_the_step_that_the_others_chose():
    curve = np.array([[9.0, 0.0, 0.0, 1.0], [0.0, 5.0, 0.0, 1.0], [0.0, 4.0, 0.0, 1.0]])
    fall = peak_and_fall(curve)
    assert fall.peak_step == 0  # (9, 0, 0) / 3 ties with (0, 5, 4) / 3, and the first wins
    # Others of seed 0: step 1, where it has 0: drop −1. Of seeds 1 and 2: step 0, where they have 0: drop −1.
    assert (fall.held_out_drop, fall.held_out_standard_error) == (-1.0, 0.0)
    assert fall.held_out_in_standard_errors == -math.inf
    assert fall.drop == 2.0
    assert chosen_by_others(curve).tolist() == [0.0, 0.0, 0.0]


def test_choosing_the_maximum_inflates_the_drop_of_flat_curves_and_leave_one_out_does_not():
    # Flat curves of noise whose sign is flipped in all 2^(2·3) ways: an exact expectation, with no draw in it.
    flips = np.array(list(np.ndindex(*(2,) * 6))) * 2.0 - 1.0
    size = np.array([[1.0, 0.7, 0.4], [0.9, 0.5, 0.6]])
    falls = [peak_and_fall(size * flip.reshape(2, 3)) for flip in flips]
    assert np.mean([fall.drop for fall in falls]) > 0.3
    # The final step's own noise is averaged over both signs, as is a seed's noise at the step that the other chose.
    assert np.mean([fall.held_out_drop for fall in falls]) == pytest.approx(0.0, abs=1e-12)


def test_a_rising_curve_falls_by_nothing():
    fall = peak_and_fall(np.array([[0.0, 1.0, 2.0], [0.0, 2.0, 3.0]]))
    assert (fall.peak_step, fall.drop, fall.in_standard_errors) == (2, 0.0, 0.0)
    assert (fall.held_out_drop, fall.held_out_in_standard_errors) == (0.0, 0.0)


def test_the_order_of_seeds_and_a_constant_do_not_matter():
    curve = np.random.default_rng(0).normal(size=(5, 20))
    one, other = peak_and_fall(curve), peak_and_fall(curve[::-1] + 10.0)
    assert one.peak_step == other.peak_step
    assert other.drop == pytest.approx(one.drop) and other.held_out_drop == pytest.approx(one.held_out_drop)
    assert other.peak == pytest.approx(one.peak + 10.0)


@pytest.mark.parametrize("curve", [np.zeros((1, 5)), np.zeros((3, 0)), np.array([[0.0, np.nan], [0.0, 1.0]])])
def test_a_curve_that_shows_no_fall_with_an_error_bar_is_refused(curve):
    with pytest.raises(ValueError):
        peak_and_fall(curve)


def test_matched_kl_is_linear_in_the_root_and_never_extrapolates():
    kl = np.array([[0.0, 1.0, 9.0], [0.0, 4.0, 16.0]])
    gold = np.array([[0.0, 1.0, 5.0], [0.0, 2.0, -2.0]])
    result = at_matched_kl(kl, gold, np.array([0.0, 0.5, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(result, [[0.0, 0.5, 3.0, 5.0, math.nan], [0.0, 0.5, 2.0, 0.0, -2.0]], rtol=1e-14)


def test_matched_kl_equals_interp_where_kl_only_rises():
    rng = np.random.default_rng(0)
    kl, gold = rng.uniform(0.1, 1.0, size=(4, 30)).cumsum(axis=1), rng.normal(size=(4, 30))
    grid = np.linspace(1.1, 2.0, 7)
    expected = [np.interp(grid, np.sqrt(k), g) for k, g in zip(kl, gold, strict=True)]
    np.testing.assert_allclose(at_matched_kl(kl, gold, grid), expected, rtol=1e-10, atol=1e-12)


def test_only_the_first_passage_counts():
    kl = np.array([[0.0, 4.0, 1.0, 4.0, 9.0]])
    gold = np.array([[0.0, 2.0, 7.0, 7.0, 1.0]])
    np.testing.assert_allclose(at_matched_kl(kl, gold, np.array([1.0, 2.0, 3.0])), [[1.0, 2.0, 1.0]])


def test_a_run_that_starts_beyond_a_distance_has_no_gold_there():
    result = at_matched_kl(np.array([[4.0, 9.0]]), np.array([[1.0, 2.0]]), np.array([1.0, 2.0, 2.5]))
    np.testing.assert_allclose(result, [[math.nan, 1.0, 1.5]])


def test_a_negative_estimate_of_kl_is_no_distance():
    result = at_matched_kl(np.array([[-0.1, 1.0]]), np.array([[0.0, 2.0]]), np.array([0.0, 0.5]))
    np.testing.assert_allclose(result, [[0.0, 1.0]])


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        at_matched_kl(np.array([[0.0, np.nan]]), np.zeros((1, 2)), np.array([0.5]))
