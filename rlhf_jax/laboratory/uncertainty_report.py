"""What a study of uncertain reward models leaves to read: tables as a page shows them, figures, and its gates."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rlhf_jax.evaluation.uncertainty_figures import (
    Policies,
    kinds_figure,
    kinds_table,
    policies_figure,
    policies_table,
)
from rlhf_jax.laboratory.gates.gate import Gate, gate_table
from rlhf_jax.laboratory.uncertainty_gates import Found
from rlhf_jax.laboratory.uncertainty_panel import MEASURES
from rlhf_jax.laboratory.uncertainty_study import RULES
from rlhf_jax.training.json_files import write_json

FIGURE = tuple(name for name in MEASURES if name not in ("surest_half", "other_half"))
"""Measures of the figure."""
TABLE = tuple(name for name in FIGURE if name not in ("optimised_accuracy", "moved_auroc"))
"""Measures of the table."""

Costs = Mapping[str, Mapping[str, int | float]]


def study_tables(labels: Mapping[str, str], costs: Costs, found: Found, gates: Sequence[Gate]) -> str:
    """Kinds, policies of each algorithm, and gates, as Markdown tables with a line before each.

    Args:
        labels: what each kind is.
        costs: by kind, numbers by name.
        found: what the study measured.
        gates: what was claimed of it.
    """
    measures = {name: one.values for name, one in found.kinds.items()}
    seeds = len(next(iter(measures.values()))["accuracy"])
    parts = [
        f"Training and scoring are relative to one reward model; ± half a 95 % interval over {seeds} seeds.",
        kinds_table(labels, costs, measures, _names(TABLE, found.best_of)),
    ]
    policies = _by_rule(found.policies)
    for algorithm in dict.fromkeys(algorithm for _, algorithm, _ in found.policies):
        what = f"final gold in standard deviations of the initial policy's, mean [95 % interval] over {seeds} seeds"
        parts += [f"{algorithm}: {what}", policies_table(labels, policies, algorithm)]
    passed = sum(gate.passed for gate in gates)
    parts += [f"{passed} of {len(gates)} gates passed:", gate_table(gates)]
    return "\n\n".join(parts) + "\n"


def write_report(path: Path, labels: Mapping[str, str], costs: Costs, found: Found, gates: Sequence[Gate]) -> None:
    """Writes `tables.md`, `gates.json` (every seed), `figures/kinds.png` and `figures/policies.png` to a run's folder.

    Args:
        path: the folder.
        labels: what each kind is.
        costs: by kind, numbers by name.
        found: what the study measured.
        gates: what was claimed of it.
    """
    measures: dict[str, dict[str, np.ndarray]] = {name: one.values for name, one in found.kinds.items()}
    (path / "tables.md").write_text(study_tables(labels, costs, found, gates), encoding="utf-8")
    write_json(path / "gates.json", [gate.record for gate in gates])
    kinds_figure(labels, measures, _names(FIGURE, found.best_of), path / "figures" / "kinds.png")
    policies_figure(labels, _by_rule(found.policies), path / "figures" / "policies.png", "s.d.")


def _by_rule(policies: Policies) -> Policies:
    """The policies in the order of `RULES`, which is that of columns and of colours."""
    places = {rule: place for place, rule in enumerate(RULES)}
    return dict(sorted(policies.items(), key=lambda item: places[item[0][2]]))


def _names(measures: Sequence[str], best_of: int) -> dict[str, str]:
    return {name: MEASURES[name].replace("best of n", f"best of {best_of}") for name in measures}
