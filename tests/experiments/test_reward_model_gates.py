"""The gates at a tiny size; what they find says nothing there."""

import dataclasses
import json

import pytest


def test_synthetic_stages_leave_their_tables(script, tmp_path):
    config = dataclasses.replace(script.PRESETS["tiny"], out=tmp_path / "run", stages=("rmb", "votes", "rare_arm"))
    result = script.main(config)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    names = [check["name"] for check in result["checks"]]
    assert len(names) == len(set(names)) == 4 + 3 + 4
    records = json.loads((tmp_path / "run" / "gates.json").read_text())
    assert [check["pass"] for check in result["checks"]] == [
        gate["passed"] for gates in records.values() for gate in gates
    ]
    assert all(len(gate["values"]) == config.draws for gates in records.values() for gate in gates)


@pytest.mark.slow
def test_every_stage_runs(script, tmp_path):
    config = dataclasses.replace(script.PRESETS["tiny"], out=tmp_path / "run", policies=True)
    result = script.main(config)
    assert sorted(json.loads((tmp_path / "run" / "gates.json").read_text())) == sorted(script.STAGES)
    names = [check["name"] for check in result["checks"]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seeds": 1}, "--seeds is 1: give 2 or more"),
        ({"bandit_steps": 15}, "--bandit-steps is 15: give a multiple of 10"),
        ({"updates": 7}, "--updates is 7: give a multiple of 5"),
        ({"smoothing_rate": 1.5}, "--smoothing-rate is 1.5"),
        ({"label_noise": 0.5}, "--label-noise is 0.5"),
        ({"stages": ("nothing",)}, "there is no stage 'nothing'; choose among ppe"),
    ],
)
def test_bad_options_are_refused_before_a_folder_is_made(script, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(dataclasses.replace(script.PRESETS["tiny"], out=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()
