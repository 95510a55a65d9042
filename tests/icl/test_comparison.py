import csv
import json
import math

from rlhf_jax.icl.comparison import (
    Comparison,
    checks,
    markdown,
    print_comparisons,
    within,
    within_errors,
    write_comparisons,
)

ROWS = [Comparison("slope", -0.069, -0.0692, tolerance=0.001), within_errors("loss", 1.0, 1.5, 0.1, errors=3.0)]


def test_a_row_passes_within_its_tolerance_and_never_with_a_nan():
    assert [row.passed for row in ROWS] == [True, False]
    assert within("x", -2.0, -2.2, share=0.1001).passed and not within("x", -2.0, -2.2, share=0.09).passed
    assert not Comparison("x", 1.0, math.nan, tolerance=1.0).passed
    assert not Comparison("x", math.nan, 1.0, tolerance=math.inf).passed


def test_rows_are_written_and_printed(tmp_path, capsys):
    write_comparisons(tmp_path, ROWS)
    records = json.loads((tmp_path / "comparisons.json").read_text())
    assert records[0] == {
        "quantity": "slope",
        "predicted": -0.069,
        "measured": -0.0692,
        "standard_error": None,
        "tolerance": 0.001,
        "pass": True,
    }
    with open(tmp_path / "comparisons.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["standard_error"] == "" and rows[1]["pass"] == "False" and float(rows[1]["measured"]) == 1.5
    print_comparisons(ROWS, "two rows")
    printed = capsys.readouterr().out
    assert "two rows" in printed and "pass" in printed and "FAIL" in printed
    assert [check["pass"] for check in checks(ROWS)] == [True, False]


def test_a_bar_in_a_name_does_not_end_its_cell():
    row = markdown([Comparison("|W - W*| / |W*|", 0.0, 0.1, tolerance=0.2)]).splitlines()[-1]
    assert row == r"| \|W - W*\| / \|W*\| | 0 | 0.1 | – | 0.2 | pass |"
