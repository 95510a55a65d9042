"""The measurement of the sweep at a tiny size."""

import dataclasses
import json
import time

import numpy as np
import pytest


def test_it_times_every_comparison_and_the_sweep_equals_single_runs(script, tmp_path):
    config = dataclasses.replace(script.PRESETS["tiny"], out=tmp_path / "run")
    result = script.main(config)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    assert len(result["rows"]) == 14 + 3
    names = [row["name"] for row in result["rows"]]
    assert len(set(names)) == len(names)
    assert names[1] == "2 seeds × 2 lengths, one program, all devices (8): prompts"
    assert all(row["mean"] > 0 for row in result["rows"])
    assert [check["pass"] for check in result["checks"]] == [True]


def test_a_ratio_by_hand(script):
    """4 and 9 times as long: 6 times in the geometric mean; the interval is that of two logarithms."""
    found = script.ratio("a over b", np.array([4.0, 18.0]), np.array([1.0, 2.0]))
    assert found["mean"] == pytest.approx(6.0)
    half = 12.7062 * np.log(1.5)
    assert found["ci95"] == pytest.approx([6 * np.exp(-half), 6 * np.exp(half)], rel=1e-3)


def test_calls_take_turns_and_preparations_are_not_timed(script):
    order = []

    def prepare(name, seconds=0.0):
        time.sleep(seconds)
        order.append(f"prepare {name}")
        return lambda: order.append(name)

    found = script.seconds_of(lambda: prepare("a", 0.1), lambda: prepare("b"), repeats=2)
    assert order == ["prepare a", "a", "prepare b", "b"] * 2
    assert found.shape == (2, 2) and (found > 0).all()
    assert found.max() < 0.1  # what is prepared is not timed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"repeats": 1}, "the option repeats is 1: give a whole number of at least 2"),
        ({"lengths": (0,)}, "the context length N is 0"),
        ({"dimension": 0}, "the dimension d is 0"),
        ({"steps": 0}, "the option steps is 0"),
        ({"batch": 0}, "the option batch is 0"),
        ({"seeds": 0}, "the option seeds is 0"),
        ({"raw_seeds": 0}, "the option raw_seeds is 0"),
        ({"raw_lengths": (10, 0)}, "the context length of raw prompts is 0"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(script, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(dataclasses.replace(script.PRESETS["tiny"], out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
