"""The measurement of the sweep at a tiny size."""

import dataclasses
import json

import numpy as np
import pytest


def test_it_times_every_comparison_and_the_sweep_equals_single_runs(script, tmp_path):
    config = dataclasses.replace(script.PRESETS["tiny"], out=tmp_path / "run")
    result = script.main(config)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    assert len(result["rows"]) == 10 + 3
    assert all(row["mean"] > 0 for row in result["rows"])
    assert [check["pass"] for check in result["checks"]] == [True]


def test_a_ratio_by_hand(script):
    """4 and 9 times as long: 6 times in the geometric mean; the interval is that of two logarithms."""
    found = script.ratio("a over b", np.array([4.0, 18.0]), np.array([1.0, 2.0]))
    assert found["mean"] == pytest.approx(6.0)
    half = 12.7062 * np.log(1.5)
    assert found["ci95"] == pytest.approx([6 * np.exp(-half), 6 * np.exp(half)], rel=1e-3)


def test_calls_take_turns(script):
    order = []
    found = script.seconds_of(lambda: order.append("a"), lambda: order.append("b"), repeats=2)
    assert order == ["a", "b", "a", "b"]
    assert found.shape == (2, 2) and (found > 0).all()


@pytest.mark.parametrize(
    ("changes", "sentence"), [({"repeats": 1}, "at least 2 repeats"), ({"lengths": (0,)}, "the context length N is 0")]
)
def test_bad_options_are_refused_before_anything_runs(script, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(dataclasses.replace(script.PRESETS["tiny"], out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
