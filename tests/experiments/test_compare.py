"""The comparison of algorithms at a tiny size: what it leaves behind, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def tiny(script):
    return dataclasses.replace(script.PRESETS["tiny"], algorithms=("grpo", "sft"))


def test_it_leaves_tables_figures_texts_and_numbers(script, tiny, tmp_path):
    folder = tmp_path / "run"
    result = script.main(dataclasses.replace(tiny, out=folder))
    assert json.loads((folder / "summary.json").read_text()) == result
    assert {path.name for path in (folder / "figures").iterdir()} == {"frontier.png", "learning.png"}
    lines = read_metrics(folder / "metrics.jsonl")
    assert len(lines) == 2 * tiny.seeds * (1 + tiny.updates)
    assert {line["samples"] for line in lines} == {0, 8, 16}
    first = {
        name: [line for line in lines if line["algorithm"] == name and line["step"] == 0] for name in ("grpo", "sft")
    }
    for one, other in zip(first["grpo"], first["sft"], strict=True):
        assert one | {"algorithm": "sft"} == other  # all begin as the same policy, with the same noise
    rows = {row["name"]: row for row in result["rows"]}
    last = [line["objective/gold"] for line in lines if line["algorithm"] == "grpo" and line["step"] == tiny.updates]
    np.testing.assert_allclose(rows["grpo: final gold"]["mean"], np.mean(last))
    assert rows["grpo: final gold"]["n"] == tiny.seeds
    checks = {check["name"]: check for check in result["checks"]}
    assert [check["pass"] for check in result["checks"][:2]] == [True, True]
    assert checks["grpo: seeds that reach 90% of the maximum within 16 samples"]["expected"] == tiny.seeds
    tables = (folder / "tables.md").read_text()
    assert "after 16 samples" in tables and "| sft |" in tables
    texts = (folder / "samples.md").read_text()
    assert "## grpo" in texts and " = → " in texts


def test_few_algorithms_share_a_panel(script):
    assert script.panels(("ppo", "dpo", "grpo")) == {"": ["ppo", "dpo", "grpo"]}
    many = script.panels((*script.ON_POLICY, "kto"))
    assert [len(names) for names in many.values()] == [5, 5, 1]
    assert many["offline"] == ["kto"]


def test_worlds_have_their_own_options(script):
    real = dataclasses.replace(script.PRESETS["real"], policy=Path("folder"), rule="AdvPO")
    options = script.study_options(real)
    assert (options.preset, options.methods, options.longest_prompt) == ("real", ("PPO", "AdvPO"), 28)
    assert script.study_options(script.PRESETS["world"]).methods == ("PPO",)
    for name in ("toy", "world", "tiny"):
        script.check_config(script.PRESETS[name])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithms": ("ppo", "grop")}, "no algorithm 'grop'; choose some of ppo"),
        ({"seeds": 1}, "no error bars"),
        ({"report_every": 3}, "does not divide updates 2"),
        ({"updates": 0}, "updates is 0"),
        ({"rule": "UWO"}, "leave out --rule UWO"),
        ({"policy": Path("folder")}, "--world real goes with --policy"),
        ({"world": "real"}, "--world real goes with --policy"),
        ({"world": "overoptimization", "rule": "UWO", "members": 1}, "one member is no ensemble"),
        ({"responses": 7}, "7 responses are no multiple"),
        ({"kl_coefficient": -1.0}, "kl-coefficient is -1.0"),
    ],
)
def test_refusals_come_before_anything_is_written(script, tiny, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        script.main(dataclasses.replace(tiny, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
