import numpy as np
import pytest

from rlhf_jax.icl.claims.minimisers import (
    DISTANCES,
    EXAMPLE,
    SHARES,
    WEIGHTS,
    against_reference_tables,
    first_order_by_length,
    general_covariance,
    sampled_weight,
    weights_by_length,
)
from rlhf_jax.icl.mixture import Mixture

TABLE = {3: (20,), 10: (1280,)}


def test_weights_by_length() -> None:
    rows = weights_by_length((Mixture(2, 3),), (20, 320), prompts=2**13, points=2**12)
    assert [row.quantity for row in rows] == ["w_N (d=2, c=3, N=20)", "w_N (d=2, c=3, N=320)"]
    assert all(row.passed for row in rows)
    assert all(0 < row.standard_error < 0.05 * row.predicted for row in rows)


def test_prompts_find_the_weight_from_a_wrong_start() -> None:
    mixture = Mixture(3, covariance=4 * np.eye(3), prior_scale=2.0)  # the identity, in other units
    found = sampled_weight(mixture, 20, 1.15, 2**14)
    assert abs(found.mean - 1.205) < 3 * found.standard_error + 0.005  # one step leaves an error of second order
    assert abs(found.mean - 1.15) > 2 * found.standard_error


@pytest.mark.parametrize("stratified", [False, True])
def test_first_order_by_length(stratified: bool) -> None:
    found = first_order_by_length((Mixture(3), Mixture(2, 3)), (40, 320), points=2**12, seeds=4, stratified=stratified)
    assert all(row.passed for row in found.comparisons)
    assert found.scaled.shape == found.errors.shape == (2, 2)
    assert (np.abs(found.scaled[:, 0]) < np.abs(found.scaled[:, 1])).all()
    assert (np.abs(found.scaled[:, 1]) < np.abs(found.limits)).all()
    assert all(row.standard_error < 0.1 * abs(row.predicted) for row in found.comparisons)


def test_general_covariance() -> None:
    found = general_covariance(EXAMPLE, (100, 400), prompts=2**11, batches=4, points=2**11, seeds=6)
    assert len(found.comparisons) == 7
    assert all(row.passed for row in found.comparisons)
    assert found.scaled[0, 0] > found.scaled[0, 1] > 0


def test_tables_of_another_program() -> None:
    weights = {d: {length: WEIGHTS[d][length] for length in lengths} for d, lengths in TABLE.items()}
    rows = against_reference_tables(weights, {}, {}, points=2**15, seeds=2)
    shares = {2: {50: SHARES[2][50]}, 5: {800: SHARES[5][800]}}
    rows += against_reference_tables({}, shares, {}, points=2**13, seeds=4)
    rows += against_reference_tables({}, {10: {50: SHARES[10][50]}}, {}, points=2**14, seeds=2)
    rows += against_reference_tables({}, {}, {100: DISTANCES[100]}, points=2**14, seeds=6)
    assert len(rows) == 2 + 3 + 2
    assert [row for row in rows if not row.passed] == []
    assert all(0 < row.standard_error < row.tolerance for row in rows)


def test_tables_are_complete() -> None:
    assert sum(len(row) for row in WEIGHTS.values()) == 24
    assert {tuple(row) for row in SHARES.values()} == {(50, 200, 800)}
    assert tuple(DISTANCES) == (100, 200, 400, 800)
