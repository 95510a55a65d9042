"""One layer trained on a finite pool of tasks: against the published table, prompts, and the theory of no pool."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.icl.theory import gradient_flow
from rlhf_jax.icl.theory import pool as theory


def test_the_closed_forms_for_identity_covariance():
    tasks = np.random.default_rng(0).standard_normal((5, 3))
    second, n, noise = tasks.T @ tasks / 5, 7, 0.4
    expected = second @ np.linalg.inv((1 + 1 / n) * second + (np.trace(second) + noise) / n * np.eye(3))
    found = theory.minimiser(tasks, n, noise)
    assert np.allclose(found, expected, atol=1e-14)
    known, fresh = theory.risks(tasks, n, noise)
    assert np.isclose(known, np.trace(second) - np.trace(found @ second), rtol=1e-12)
    assert np.isclose(fresh, 3 - 2 * np.trace(found) + np.sum(found**2) * (1 + (4 + noise) / n), rtol=1e-12)


def test_the_closed_form_for_any_covariance():
    tasks, covariance = np.random.default_rng(1).standard_normal((2, 3)), np.diag([0.5, 1.0, 3.0])
    second, n, noise = tasks.T @ tasks / 2, 6, 0.1
    bracket = (1 + 1 / n) * covariance @ second + (np.trace(second @ covariance) + noise) / n * np.eye(3)
    assert np.allclose(theory.minimiser(tasks, n, noise, covariance), second @ np.linalg.inv(bracket), atol=1e-13)


def test_one_task_by_hand():
    # w = e_1, N = 2, no noise: A = e_1 e_1' / ((1 + 1/2) + 1/2); known: 1 - 1/2; fresh: 2 - 1 + (1/4)(1 + 3/2)
    assert np.allclose(theory.minimiser(np.array([[1.0, 0.0]]), 2), np.diag([0.5, 0.0]))
    assert np.allclose(theory.risks(np.array([[1.0, 0.0]]), 2), (0.5, 1.625))


def test_the_table_of_fresh_tasks_by_pool_size():
    found = theory.average_risks((1, 4, 8, 16, 64), 8, 16, 0.25, pools=80)
    expected = np.array([0.933, 0.708, 0.534, 0.431, 0.378])
    assert (np.abs(found.fresh / 8 - expected) < 4 * np.sqrt(2) * found.fresh_error / 8 + 5e-4).all()
    limit = gradient_flow.risk(
        gradient_flow.minimiser(np.eye(8), 16, noise_variance=0.25), np.eye(8), 16, noise_variance=0.25
    )
    assert abs(limit / 8 - 0.3663) < 1e-4
    assert (np.diff(found.fresh) < 0).all() and (np.diff(found.pool) > 0).all()


def test_a_large_pool_is_no_pool():
    tasks = np.eye(4) * 2.0  # second moment: the identity, exactly
    assert np.allclose(theory.minimiser(tasks, 5, 0.3), gradient_flow.minimiser(np.eye(4), 5, noise_variance=0.3))


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 30), st.integers(0, 1000))
def test_a_pool_knows_its_own_tasks_best_and_nothing_outside_their_span(dimension, size, length, seed):
    tasks = np.random.default_rng(seed).standard_normal((size, dimension))
    learnt = theory.minimiser(tasks, length, 0.2)
    second = theory.second_moment(tasks)
    general = gradient_flow.minimiser(np.eye(dimension), length, noise_variance=0.2)
    known, fresh = theory.risks(tasks, length, 0.2)
    identity = np.eye(dimension)
    assert known <= gradient_flow.risk(general, identity, length, tasks=second, noise_variance=0.2) + 1e-12
    assert fresh >= gradient_flow.risk(general, identity, length, noise_variance=0.2) - 1e-12
    assert np.linalg.matrix_rank(learnt, tol=1e-10) == np.linalg.matrix_rank(second, tol=1e-10)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: theory.minimiser(np.zeros((0, 3)), 4), "at least one task"),
        (lambda: theory.average_risks((0, 2), 3, 4), "pool size M is 0"),
        (lambda: theory.average_risks((2,), 3, 4, pools=1), "number of pools is 1"),
        (lambda: theory.average_risks((), 3, 4), "number of pool sizes is 0"),
        (lambda: theory.second_moment(np.full((2, 2), np.nan)), "not finite"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
