import numpy as np
import pytest

from rlhf_jax.laboratory.gates.gate import HEADERS, Gate, gate_checks, gate_rows, gate_table


def gate(*values, **range_):
    return Gate(name="a | b", source="someone", values=np.array(values, np.float64), **range_)


def test_passes_by_the_mean_and_is_clear_by_the_interval():
    """Mean 2, standard deviation 1, n = 3: half of the interval is 4.3027 / sqrt(3) = 2.484."""
    assert gate(1, 2, 3, low=2.1).outcome == "FAILED, within noise"
    assert gate(1, 2, 3, low=1.9).outcome == "passed, within noise"
    assert gate(1, 2, 3, low=-0.49).outcome == "passed"
    assert gate(1, 2, 3, high=-0.49).outcome == "FAILED"
    assert gate(1, 2, 3, low=-0.49, high=4.49).outcome == "passed"
    assert gate(1, 2, 3, low=-0.49, high=4.48).outcome == "passed, within noise"


def test_a_mean_at_the_threshold_passes():
    assert gate(0, 0, low=0.0).outcome == gate(0, 0, high=0.0).outcome == "passed"


def test_every_gate_is_a_row_and_a_check_with_the_same_verdict():
    gates = [
        gate(1, 2, 3, low=2.1),
        gate(1, 2, 3, high=2.1),
        gate(1, 2, 3, low=1.0, high=2.5),
        gate(5, 6, low=1.0, high=2.0),
    ]
    assert (
        [check["pass"] for check in gate_checks(gates)] == [one.passed for one in gates] == [False, True, True, False]
    )
    assert [row["mean"] for row in gate_rows(gates)] == [2.0, 2.0, 2.0, 5.5]


def test_the_table_has_a_line_a_gate_and_keeps_its_columns():
    lines = gate_table([gate(1, 2, 3, low=2.1), gate(1, 2, high=0.0, unit="nats")]).splitlines()
    assert len(lines) == 4
    assert all(line.count(" | ") == len(HEADERS) - 1 for line in lines)
    assert "≤ 0 nats" in lines[3]


def test_the_record_has_every_seed():
    record = gate(1, 2, 3, low=0.0).record
    assert record["values"] == [1.0, 2.0, 3.0]
    assert (record["low"], record["high"], record["passed"], record["clear"]) == (0.0, None, True, False)


@pytest.mark.parametrize(
    ("values", "range_", "sentence"),
    [((1, 2), {}, "no threshold"), ((1,), {"low": 0.0}, "2 or more"), ((1, np.nan), {"low": 0.0}, "not finite")],
)
def test_bad_gates_are_refused(values, range_, sentence):
    with pytest.raises(ValueError, match=sentence):
        gate(*values, **range_)
