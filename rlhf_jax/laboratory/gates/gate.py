"""A gate: a claim as one number a seed and the range in which its mean must lie."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.statistics import Estimate, mean_interval, row
from rlhf_jax.training.run_folder import check

PRECONDITION = "precondition: else the stage says nothing"
"""The source of a gate that is no claim: that what is compared has learned something."""
HEADERS = ("gate", "claim", "must be", "mean", "95 % interval", "seeds", "outcome")


@dataclasses.dataclass(frozen=True)
class Gate:
    """A claim that an experiment can refute.

    Attributes:
        name: what is measured.
        source: whose claim it is.
        values: one number a seed, float64 [seeds].
        low: least mean that passes; minus infinity for none.
        high: largest mean that passes; infinity for none.
        unit: of the values; "1" for a pure number.

    Raises:
        ValueError: there is no threshold, a value is not finite, or fewer than 2 seeds.

    Example:
        >>> gate = Gate(name="gain", source="us", values=np.array([0.1, 0.3, 0.2]), low=0.0)
        >>> gate.passed, gate.outcome, gate.threshold
        (True, 'passed, within noise', '≥ 0')
    """

    name: str
    source: str
    values: Float[np.ndarray, " seeds"]
    low: float = -math.inf
    high: float = math.inf
    unit: str = "1"

    def __post_init__(self):
        if not (self.low > -math.inf or self.high < math.inf):
            raise ValueError(f"the gate {self.name!r} has no threshold: give low, high or both.")
        if self.values.size < 2:
            raise ValueError(f"the gate {self.name!r} has {self.values.size} seed: give 2 or more.")
        mean_interval(self.values)  # refuses values that are not finite

    @property
    def estimate(self) -> Estimate:
        """Mean over seeds with its 95 % interval."""
        return mean_interval(self.values)

    @property
    def passed(self) -> bool:
        """Whether the mean lies where the claim wants it."""
        return self.low <= self.estimate.mean <= self.high

    @property
    def clear(self) -> bool:
        """Whether the seeds decide: no threshold lies within the 95 % interval."""
        found = self.estimate
        return not any(found.low < threshold < found.high for threshold in (self.low, self.high))

    @property
    def outcome(self) -> str:
        """The verdict in words."""
        return ("passed" if self.passed else "FAILED") + ("" if self.clear else ", within noise")

    @property
    def threshold(self) -> str:
        """The range of the mean in words."""
        if self.low == -math.inf:
            return f"≤ {self.high:g}"
        return f"≥ {self.low:g}" if self.high == math.inf else f"{self.low:g} to {self.high:g}"

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the gate in a table, under `HEADERS`."""
        found = self.estimate
        interval = f"[{found.low:.3g}, {found.high:.3g}]"
        unit = "" if self.unit == "1" else f" {self.unit}"
        return (
            *(self.name, self.source, self.threshold + unit, f"{found.mean:.3g}", interval, str(found.n)),
            self.outcome,
        )

    @property
    def record(self) -> dict[str, Any]:
        """The gate as JSON values, every seed included."""
        found = self.estimate
        return {
            "name": self.name,
            "source": self.source,
            "unit": self.unit,
            "low": None if self.low == -math.inf else self.low,
            "high": None if self.high == math.inf else self.high,
            "values": [float(value) for value in self.values],
            "mean": found.mean,
            "ci95": [found.low, found.high],
            "passed": self.passed,
            "clear": self.clear,
        }


def gate_rows(gates: Sequence[Gate]) -> list[dict[str, Any]]:
    """Rows of the summary, one a gate."""
    return [row(gate.name, gate.unit, gate.values) for gate in gates]


def gate_checks(gates: Sequence[Gate]) -> list[dict[str, Any]]:
    """Checks of the summary, one a gate."""
    return [_check(gate) for gate in gates]


def gate_table(gates: Sequence[Gate]) -> str:
    """The gates as a Markdown table."""
    lines = [HEADERS, ("---",) * len(HEADERS), *(gate.cells for gate in gates)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '¦') for cell in line)} |" for line in lines)


def _check(gate: Gate) -> dict[str, Any]:
    mean = gate.estimate.mean
    if gate.low == -math.inf:
        return check(gate.name, mean, gate.high, "at most")
    if gate.high == math.inf:
        return check(gate.name, mean, gate.low, "at least")
    return check(gate.name, mean, (gate.low + gate.high) / 2, (gate.high - gate.low) / 2)
