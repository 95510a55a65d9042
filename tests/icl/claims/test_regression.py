"""Risks, shifts and pools of one layer on regression: theory and drawn prompts agree."""

import numpy as np
import pytest

from rlhf_jax.icl.claims import regression as claims
from rlhf_jax.icl.theory import gradient_flow


def failed(rows):
    return [row.quantity for row in rows if not row.passed]


def test_least_squares_over_prompts_of_a_pool_gives_the_minimiser_of_the_pool():
    rows = claims.pool_minimisers(sizes=(16,))
    assert len(rows) == 2 and not failed(rows)
    assert all(0 < row.standard_error < 0.01 for row in rows)


def test_the_risk_falls_with_the_length_of_the_context_to_a_floor():
    found = claims.context_lengths(lengths=(5, 40, 160), noise_variance=0.3, prompts=8000)
    assert not failed(found.comparisons)
    assert (np.diff(found.predicted) < 0).all() and (np.diff(found.measured) < 0).all()
    assert (found.errors < 0.03 * found.measured).all()


def test_other_variances_break_the_layer_and_other_tasks_and_queries_do_not():
    found = claims.covariate_shift(factors=(0.5, 1.0, 2.0), length=100, prompts=4000)
    assert len(found.comparisons) == 5 and not failed(found.comparisons)
    assert found.measured[0] > 5 * found.measured[1] and found.measured[2] > 5 * found.measured[1]


def test_random_covariances_leave_a_third_of_the_risk():
    rows = claims.random_covariances(lengths=(20, np.inf), prompts=40_000)
    assert len(rows) == 4 and not failed(rows)
    assert rows[-1].predicted == pytest.approx(1 / 3)


def test_drawn_risk_tells_a_layer_that_was_not_learnt_from_one_that_was():
    identity, rng = np.eye(3), np.random.default_rng(0)
    learnt = gradient_flow.minimiser(identity, 10)
    mean, error = claims.drawn_risk(1.1 * learnt, identity, 10, rng, 20_000)
    assert abs(mean - gradient_flow.risk(1.1 * learnt, identity, 10)) < 4 * error
    mean, error = claims.drawn_risk(1.5 * learnt, identity, 10, rng, 20_000)
    assert mean > gradient_flow.risk(learnt, identity, 10) + 10 * error


def test_too_few_prompts_for_a_standard_error_are_refused():
    with pytest.raises(ValueError, match="the number of prompts is 100: give a whole number of at least 160"):
        claims.pool_minimisers(sizes=(16,), prompts=100)
