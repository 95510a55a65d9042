"""The lanes measurement at a tiny size."""

import functools
import json

import pytest

from rlhf_jax.laboratory.options import Options


def test_it_compares_one_seed_with_several_and_nothing_compiles_after_the_first_call(script, tmp_path, monkeypatch):
    tiny = dict(pairs=32, rollouts=8, policy_layers=1, width=8)
    monkeypatch.setattr(script, "Options", functools.partial(Options, **tiny))
    result = script.main(script.Config(out=tmp_path / "run", seeds=2, updates=1, calls=2))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    found = {row["name"]: row for row in result["rows"]}
    assert len(found) == 11
    assert all(row["mean"] > 0 for row in result["rows"])
    for name in ("2 seeds, mapped", "2 seeds, vmapped"):
        times = found[f"2 runs one after the other, over {name}"]
        assert times["n"] == 2 and times["ci95"][0] <= times["mean"] <= times["ci95"][1]
        each = found[f"{name}: one update of one seed"]["mean"]
        assert each == pytest.approx(found[f"{name}: 1 updates"]["mean"] / 2 * 1e3)
    assert [check["pass"] for check in result["checks"]] == [True]


@pytest.mark.parametrize("wrong", [{"seeds": 1}, {"calls": 1}, {"updates": 0}])
def test_what_gives_no_comparison_is_refused(script, tmp_path, wrong):
    with pytest.raises(ValueError, match="at least 2 seeds, 1 update and 2 timed calls"):
        script.main(script.Config(out=tmp_path / "run", **wrong))
    assert not (tmp_path / "run").exists()
