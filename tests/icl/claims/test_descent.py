import math

import numpy as np

from rlhf_jax.icl.claims import descent
from rlhf_jax.icl.mixture import Mixture


def test_rates_from_two_starts():
    found = descent.rates(prompts=8000)
    own = [row for row in found.comparisons if "without data" not in row.quantity]
    assert len(own) == 8
    assert all(row.passed for row in own), own
    for row in found.comparisons:
        if "without data" in row.quantity:
            assert abs(row.measured - row.predicted) < 4 * row.standard_error + 0.005 * abs(row.predicted)
            assert 0 < row.standard_error < 0.03 * abs(row.predicted)
    assert found.loss_gap.shape == found.squared_distance.shape == (2, 401)
    np.testing.assert_array_equal(found.steps, np.arange(401))
    assert math.isclose(found.slope, -0.069, rel_tol=0.06)


def test_the_loss_with_the_query_integrated_out_has_the_same_rate():
    found = descent.rates(dimension=2, length=20, prompts=500, steps=100, integrated=True)
    own = [row for row in found.comparisons if "without data" not in row.quantity]
    assert len(own) == 8
    assert all(row.passed for row in own), own


def test_the_spectrum_has_three_clusters():
    rows = descent.spectrum(prompts=20_000, points=2**15)
    for row in rows[::2]:
        assert abs(row.measured - row.predicted) < 4 * row.standard_error + 0.005 * row.predicted
    np.testing.assert_allclose([row.predicted for row in rows[::2]], [0.0209, 0.0419, 0.0525], rtol=0.02)
    assert [row.measured for row in rows[1::2]] == [row.predicted for row in rows[1::2]] == [1, 9, 6]


def test_smoothness_against_prompts():
    rows = descent.smoothness_at_zero(((Mixture(4), 50),), prompts=40_000, block=20_000)
    assert abs(rows[0].predicted - 0.6157) < 0.005 * 0.6157
    assert abs(rows[0].measured - rows[0].predicted) < 4 * rows[0].standard_error
    assert rows[0].standard_error < 0.015 * rows[0].measured


def test_the_rate_of_a_correlated_covariance():
    rows = descent.anisotropic_rate(prompts=2000, steps=1600)
    assert all(row.passed for row in rows), rows
