import math

import numpy as np
import pytest

from rlhf_jax.icl.claims import inference
from rlhf_jax.icl.comparison import Comparison
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.shift import NO_SHIFT, Shift, shifted
from rlhf_jax.icl.theory.inference import Estimated

SMALL = {"prompts": 20_000, "points": 2**13}


def agree(rows: list[Comparison], share: float = 0.01) -> None:
    """Fewer prompts than in full: within four standard errors, and the error of fewer quasi-random points."""
    assert rows
    for row in rows:
        assert abs(row.measured - row.predicted) <= 4 * row.standard_error + share * row.predicted, row
        assert row.standard_error < 0.04 * row.predicted, row


def test_noise_decay():
    found = inference.noise_decay((3,), (64, 1024, 4096), **SMALL)
    assert found.measured.shape == found.predicted.shape == (1, 3)
    agree([row for row in found.comparisons if not row.quantity.startswith("slope")])
    slope = next(row for row in found.comparisons if row.quantity.startswith("slope"))
    assert abs(slope.measured + 0.5) < 4 * slope.standard_error + 0.005
    assert 0 < slope.standard_error < 0.02
    np.testing.assert_allclose(64 * found.predicted[0, 2], 0.4878, rtol=0.01)
    assert sum(row.quantity.startswith("slope") for row in found.comparisons) == 1


def test_grid():
    found = inference.grid(lengths=(100, 500), test_lengths=(64, 1024, math.inf), **SMALL)
    agree([row for row in found.comparisons if "folded" not in row.quantity])
    assert sum("folded" in row.quantity for row in found.comparisons) == 2
    np.testing.assert_allclose(found.predicted, [[0.0581, 0.0226, 0.0162], [0.0576, 0.0156, 0.0037]], rtol=0.02)
    np.testing.assert_allclose(found.folded[1, 1:], found.predicted[1, 1:], rtol=0.04)
    assert found.test_lengths.tolist() == [64, 1024, math.inf]


def test_plateaus():
    shifts = {"none": NO_SHIFT, "prior": Shift(class_probabilities=(0.3, 0.7)), "noise": Shift(label_noise=0.1)}
    found = inference.plateaus((1024, 16384, math.inf), shifts=shifts, **SMALL)
    below = [row for row in found.comparisons if "below" in row.quantity]
    assert len(below) == 1
    assert below[0].passed
    agree([row for row in found.comparisons if "below" not in row.quantity])
    np.testing.assert_allclose(found.predicted[1], [0.0917, 0.0914, 0.0913], rtol=0.02)
    assert found.predicted[0, 2] < 1e-12
    assert found.measured[0, 2] < 1e-3  # 2^26 examples stand for infinity
    assert found.names == ("none", "prior", "noise")


def test_another_prior_is_harmless():
    rows = inference.prior_is_harmless((2.0,), prompts=20_000)
    assert abs(rows[0].measured + 0.5) < 4 * rows[0].standard_error + 0.003
    assert 0 < rows[0].standard_error < 0.02


def test_the_error_of_a_slope_is_that_of_the_fit():
    lengths, rng = np.array([64, 256, 1024]), np.random.default_rng(0)
    means, errors = 2 / np.sqrt(lengths), np.array([0.01, 0.002, 0.003])
    slopes = [np.polyfit(np.log(lengths), np.log(means + errors * rng.normal(size=3)), 1)[0] for _ in range(4000)]
    found = inference._slope(lengths, [Estimated(*pair) for pair in zip(means, errors, strict=True)])
    assert found.mean == pytest.approx(-0.5)
    assert found.standard_error == pytest.approx(np.std(slopes), rel=0.05)


def test_constants_of_many_classes():
    rows = inference.class_constants((2, 3), **SMALL)
    assert len(rows) == 8
    agree(rows)
    for row, expected in zip((rows[0], rows[1], rows[4], rows[5]), (0.457, 2.52, 0.916, 6.85), strict=True):
        assert row.predicted == pytest.approx(expected, rel=0.015)
    for random, stratified in ((rows[0], rows[2]), (rows[1], rows[3]), (rows[4], rows[6]), (rows[5], rows[7])):
        assert "stratified" in stratified.quantity
        assert stratified.measured + 5 * stratified.standard_error < random.measured


def test_floors():
    rows = inference.floors((3,), prompts=20_000, points=2**13, seeds=4)
    agree(rows)
    assert rows[0].predicted == pytest.approx(1.937, rel=0.015)


def test_a_sampler_repeats_itself_and_serves_every_length():
    sample = inference.sampler(shifted(Mixture(2)), 1000)
    first, again, other = (sample(2 * np.eye(2), 50, seed) for seed in (0, 0, 1))
    assert first == again != other
    longer = sample(2 * np.eye(2), 5000, 0)
    assert 0 < longer.mean < first.mean / 5
