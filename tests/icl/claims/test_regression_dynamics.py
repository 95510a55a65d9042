"""Gradient flow of one layer on regression: integration, descent, and closed forms agree."""

import numpy as np
import pytest

from rlhf_jax.icl.claims import regression_dynamics as claims
from rlhf_jax.icl.theory import gradient_flow
from rlhf_jax.icl.theory.gradient_flow import Factors


def test_gradient_flow_from_other_axes_ends_at_the_global_minimum():
    rows = claims.gradient_flow_limit()
    assert len(rows) == 5 and all(row.passed for row in rows), rows
    early = claims.gradient_flow_limit(end=2.0)
    assert not any(row.passed for row in early[:3])


def test_the_flow_of_matrices_is_logistic():
    found = claims.logistic_curve(rate=0.1, batch=4, seeds=1)
    assert found.comparisons[0].tolerance == 2e-4 and found.comparisons[0].passed, found.comparisons
    assert np.abs(found.integrated - found.predicted).max() > 0.1 * 2e-4  # Euler's rule: what is compared is not equal


def test_descent_on_prompts_drops_when_the_flow_does():
    found = claims.logistic_curve(dimension=3, length=12, start=0.01, step=0.01, rate=8e-3, batch=300, seeds=2)
    assert found.comparisons[1].passed, found.comparisons
    assert found.losses.shape == (2, len(found.trained_times))
    assert found.losses[:, 0].min() > 3 * found.losses[:, -1].max() > 0


def test_the_integrator_of_matrices_agrees_with_the_solver_of_eigenvalues():
    variances, start = np.array([0.5, 1.0, 2.0]), Factors(0.3, np.diag([0.1, 0.2, 0.05]))
    ended = claims.integrate(start, np.diag(variances), 10, 3.0, 0.01, "Runge-Kutta")[-1]
    flow = gradient_flow.aligned_flow(np.array([0.0, 3.0]), Factors(0.3, np.diag(start.keys)), variances, 10)
    assert np.isclose(ended.values, flow.values[-1], atol=1e-8)
    assert np.allclose(ended.keys, np.diag(flow.keys[-1]), atol=1e-8)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="choose Euler or Runge-Kutta"):
        claims.integrate(Factors(1.0, np.eye(2)), np.eye(2), 3, 1.0, 0.1, "Heun")
