"""Tables and figures of kinds and policies."""

import numpy as np
import pytest

from rlhf_jax.evaluation.frontier import Curves
from rlhf_jax.evaluation.uncertainty_figures import kinds_figure, kinds_table, policies_figure, policies_table

LABELS = {"single": "one model", "posterior": "posterior"}
NAMES = {"accuracy": "accuracy", "auroc": "AUROC"}
MEASURES = {
    "single": {"accuracy": np.array([0.6, 0.8]), "auroc": np.array([np.nan, np.nan])},
    "posterior": {"accuracy": np.array([0.7, 0.7]), "auroc": np.array([0.5, np.nan])},
}


def curves(*gold: float) -> Curves:
    values = np.stack([np.array(gold), np.array(gold) + 1.0])
    return Curves(np.arange(len(gold)), np.square(values), values, values)


@pytest.fixture
def policies():
    return {
        ("single", "ppo", "mean"): curves(0.0, 2.0, 1.0),
        ("single", "grpo", "mean"): curves(0.0, 1.0, 1.0),
        ("posterior", "ppo", "mean"): curves(0.0, 1.0, 3.0),
        ("posterior", "ppo", "UWO"): curves(0.0, 1.0, 0.0),
    }


def test_what_is_not_defined_is_a_dash():
    costs = {"single": {"parameters": 1234.0, "scoring": 1.0}, "posterior": {"parameters": 1234.0, "scoring": 1.052}}
    lines = kinds_table(LABELS, costs, MEASURES, NAMES).splitlines()
    assert lines[0] == "| kind | parameters | scoring | accuracy | AUROC |"
    assert lines[2] == "| one model | 1,234 | 1 | 0.700 ± 1.271 | – |"  # t of one degree of freedom, 12.706 x 0.1
    assert lines[3] == "| posterior | 1,234 | 1.05 | 0.700 ± 0.000 | – |"


def test_a_line_a_kind_and_a_column_a_rule(policies):
    lines = policies_table(LABELS, policies, "ppo").splitlines()
    assert lines[0] == "| kind | mean | UWO |"
    assert lines[2] == "| one model | +1.50 [-4.85, +7.85] |  |"  # t of one degree of freedom, 12.706 x 0.5
    assert lines[3] == "| posterior | +3.50 [-2.85, +9.85] | +0.50 [-5.85, +6.85] |"
    assert policies_table(LABELS, policies, "grpo").splitlines()[3] == "| posterior |  |"


def test_figures_are_written(policies, tmp_path):
    for path in (
        kinds_figure(LABELS, MEASURES, NAMES, tmp_path / "figures" / "kinds.png"),
        policies_figure(LABELS, policies, tmp_path / "figures" / "policies.png", "s.d."),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
