"""The measurement of blocks of logits at a tiny size."""

import json

import pytest

from rlhf_jax.models import chunked_logprobs


def test_both_programs_agree_and_blocks_take_less_memory(script, tmp_path, monkeypatch):
    monkeypatch.setattr(chunked_logprobs, "LOGITS_AT_ONCE", 2**13)
    config = script.Config(out=tmp_path / "run", vocabulary=2048, tokens=64, rows=2, calls=2)
    result = script.main(config)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    values = {row["name"]: row["mean"] for row in result["rows"]}
    assert values["logits of all positions"] == 2 * 64 * 2048 * 4 / 2**30
    assert values["all logits: memory of a train step"] > values["logits of all positions"]
    assert all(value > 0 for value in values.values()) and len(values) == 9
    assert [check["pass"] for check in result["checks"]] == [True] * 3


def test_a_width_without_whole_heads_is_refused(script, tmp_path):
    with pytest.raises(ValueError, match="multiple of 64"):
        script.main(script.Config(out=tmp_path / "run", width=100))
    assert not (tmp_path / "run").exists()
