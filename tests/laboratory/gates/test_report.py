import dataclasses
import json

import numpy as np
import pytest

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.laboratory.gates.gate import Gate
from rlhf_jax.laboratory.gates.report import Stage, run_gates
from rlhf_jax.training.options import RunOptions


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    stages: tuple[str, ...] = ()


def good(config):
    gates = [
        Gate("it holds", "us", np.array([1.0, 2.0]), low=0.0),
        Gate("a band", "us", np.array([1.0, 2.0]), 1.0, 2.0),
    ]
    return Stage(gates, [row("besides", "s", np.array([3.0]))])


def bad(config):
    return Stage([Gate("it does not", "us", np.array([1.0, 2.0]), high=0.0)])


STAGES = {"good": good, "bad": bad}


def test_a_gate_that_fails_is_a_check_that_fails_and_all_is_written(tmp_path, capsys):
    result = run_gates("gates", Config(out=tmp_path / "run"), STAGES)
    assert [(check["name"], check["pass"]) for check in result["checks"]] == [
        ("it holds", True),
        ("a band", True),
        ("it does not", False),
    ]
    assert [one["name"] for one in result["rows"]][3:] == ["besides", "good: time", "bad: time"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    records = json.loads((tmp_path / "run" / "gates.json").read_text())
    assert {stage: len(gates) for stage, gates in records.items()} == {"good": 2, "bad": 1}
    text = (tmp_path / "run" / "tables.md").read_text()
    assert text.index("## good") < text.index("| besides |") < text.index("## bad") < text.index("FAILED")
    for stage in STAGES:
        assert (tmp_path / "run" / "figures" / f"{stage}.png").stat().st_size > 1000
    assert "2 of 3 gates passed" in capsys.readouterr().out


def test_only_the_stages_asked_for_run(tmp_path):
    result = run_gates("gates", Config(out=tmp_path / "run", stages=("bad",)), STAGES)
    assert [check["name"] for check in result["checks"]] == ["it does not"]


def test_an_unknown_stage_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="no stage 'other'; choose among good, bad"):
        run_gates("gates", Config(out=tmp_path / "run", stages=("other",)), STAGES)
    assert not (tmp_path / "run").exists()
