"""Stages of an experiment on theory: what they leave, also when one is interrupted."""

import csv
import json

import numpy as np
import pytest

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.evaluation.theory_figure import Panel
from rlhf_jax.icl.comparison import Comparison
from rlhf_jax.laboratory.theory import Options, Stage, run_stages
from rlhf_jax.training.run_folder import failed_checks

GOOD, BAD = Comparison("slope", -0.5, -0.49, 0.01, tolerance=0.02), Comparison("limit", 1.0, 2.0, tolerance=0.5)
X = np.array([1.0, 2.0])


def first(options: Options) -> Stage:
    return Stage([GOOD], [Panel("a", "x", "y", {"line": (X, X)})], [row("time", "s", np.array([1.0, 3.0]))])


def second(options: Options) -> Stage:
    return Stage([BAD])


def interrupted(options: Options) -> Stage:
    raise KeyboardInterrupt


def test_stages_leave_rows_figures_and_a_summary(tmp_path, capsys):
    out = tmp_path / "run"
    result = run_stages("study", Options(out=out), {"first": first, "second": second})
    assert json.loads((out / "summary.json").read_text()) == result
    assert [one["name"] for one in result["rows"]] == ["time", "first: time", "second: time"]
    assert failed_checks(result) == ["limit"]
    records = json.loads((out / "comparisons.json").read_text())
    assert [one["pass"] for one in records] == [True, False] and records[0]["standard_error"] == 0.01
    with open(out / "comparisons.csv", newline="") as file:
        assert [one["quantity"] for one in csv.DictReader(file)] == ["slope", "limit"]
    assert (out / "comparisons.md").read_text().count("pass") == 1
    assert [path.name for path in (out / "figures").iterdir()] == ["first.png"]
    printed = capsys.readouterr().out
    assert "study 2/2" in printed and "FAIL" in printed


def test_chosen_stages_run_in_the_order_of_the_experiment(tmp_path):
    stages = {"first": first, "second": second, "interrupted": interrupted}
    result = run_stages("study", Options(stages=("second", "first"), out=tmp_path / "run"), stages)
    assert [check["name"] for check in result["checks"]] == ["slope", "limit"]


def test_an_interrupted_run_keeps_what_it_found(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_stages("study", Options(out=tmp_path / "run"), {"first": first, "interrupted": interrupted})
    assert len(json.loads((tmp_path / "run" / "comparisons.json").read_text())) == 1
    assert not (tmp_path / "run" / "summary.json").exists()


def test_an_unknown_stage_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="there is no stage 'third'; choose among first, second"):
        run_stages("study", Options(stages=("third",), out=tmp_path / "run"), {"first": first, "second": second})
    assert not (tmp_path / "run").exists()
