"""What scores cost, at a tiny size; the ratios say nothing there."""

import dataclasses
import json

import numpy as np
import pytest


def test_every_kind_is_timed_and_weighed(script, tmp_path):
    config = dataclasses.replace(script.PRESETS["tiny"], out=tmp_path / "run")
    result = script.main(config)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 6 + 5 + 2 * 6
    assert all(row["mean"] >= 0 for row in rows.values())
    assert [check["name"] for check in result["checks"]] == ["3 linear heads: time over one reward model"]

    def size(kind):
        return rows[f"{kind}: parameters"]["mean"] * script.MIB

    width, one = config.width, size("one reward model")
    assert size("2 reward models") == pytest.approx(2 * one + 2 * 4)
    # A kernel, a bias and an offset a head; the one head of the reward model less.
    assert size("3 linear heads") == pytest.approx(one + 3 * 4 * (width + 2) - 4 * (width + 1))
    assert size("last-layer posterior") == pytest.approx(one + 4 * width**2 + 2 * 4)
    assert size("dropout, 3 masks") == pytest.approx(one + 3 * 4 * (width + 1))
    # Two adapters: on query and value, [D, R] and [R, D] each.
    assert size("2 LoRA adapters") == pytest.approx(
        one + 2 * (2 * 2 * width * config.rank * 4 + 4 * (width + 2)) - 4 * (width + 1)
    )


def test_the_ratio_of_an_ensemble_is_of_paired_times(script, tmp_path, monkeypatch):
    """Times that are made up: the linear heads take 1.5 times as long in every turn, however long a turn is."""
    times = np.array([[1.0, 4.0], [1.5, 6.0], [2.0, 2.0], [2.0, 2.0], [2.0, 2.0], [2.0, 2.0]])
    monkeypatch.setattr(
        script, "compile_kind", lambda *given: script.Program(score=lambda: None, parameters=1, temporaries=1)
    )
    monkeypatch.setattr(script, "seconds_of", lambda *programs, repeats: times)
    result = script.main(dataclasses.replace(script.PRESETS["tiny"], out=tmp_path / "run"))
    (check,) = result["checks"]
    assert (check["value"], check["pass"]) == (pytest.approx(1.5), False)
    assert result["rows"][0]["mean"] == pytest.approx((2 / 1.0 + 2 / 4.0) / 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"repeats": 1}, "--repeats is 1: give 2 or more"),
        ({"heads": 1}, "--heads is 1: give 2 or more"),
        ({"width": 100}, "--width is 100: give a multiple of 64"),
    ],
)
def test_bad_options_are_refused_before_a_folder_is_made(script, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(dataclasses.replace(script.PRESETS["tiny"], out=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()
