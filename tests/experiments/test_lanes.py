"""The lanes measurement at a tiny size."""

import functools
import json

import pytest

from rlhf_jax.laboratory.options import Options


def test_it_measures_one_seed_and_several_and_nothing_compiles_after_the_first_call(script, tmp_path, monkeypatch):
    tiny = dict(pairs=32, rollouts=8, policy_layers=1, width=8)
    monkeypatch.setattr(script, "Options", functools.partial(Options, **tiny))
    result = script.main(script.Config(out=tmp_path / "run", seeds=2, updates=1, calls=1))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    assert len(result["rows"]) == 9
    assert all(row["mean"] > 0 for row in result["rows"])
    assert [check["pass"] for check in result["checks"]] == [True]


def test_one_seed_is_refused(script, tmp_path):
    with pytest.raises(ValueError, match="at least 2 seeds"):
        script.main(script.Config(out=tmp_path / "run", seeds=1))
    assert not (tmp_path / "run").exists()
