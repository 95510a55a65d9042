"""The study of uncertain reward models at a tiny size: what it leaves behind, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def tiny(script):
    return script.PRESETS["tiny"]


def test_it_leaves_tables_figures_and_numbers(script, tiny, tmp_path):
    folder = tmp_path / "run"
    result = script.main(dataclasses.replace(tiny, out=folder))
    assert json.loads((folder / "summary.json").read_text()) == result
    assert {path.name for path in (folder / "figures").iterdir()} == {"kinds.png", "policies.png"}
    rows = {row["name"]: row for row in result["rows"]}
    # The posterior is of the same model as "single", so the plain policies on both are the same.
    assert rows["single: accuracy"]["mean"] == rows["posterior: accuracy"]["mean"]
    np.testing.assert_allclose(rows["posterior, grpo, mean: final gold minus plain"]["mean"], 0.0, atol=1e-5)
    assert "single: AUROC optimised" not in rows and rows["posterior: AUROC optimised"]["n"] == tiny.seeds
    lines = read_metrics(folder / "metrics.jsonl")
    runs = 3  # one model has no uncertainty for UWO
    assert len(lines) == runs * tiny.seeds * (1 + tiny.updates)
    first = [line for line in lines if line["step"] == 0 and line["seed"] == 0]
    assert len({line["objective/gold"] for line in first}) == 1
    np.testing.assert_allclose(
        [line["rewards/proxy"] for line in first], first[0]["rewards/proxy"], rtol=1e-3, atol=1e-4
    )
    checks = {check["name"]: check for check in result["checks"]}
    assert checks["largest |log-prob at rollout − in the first minibatch|"]["pass"]
    gates = json.loads((folder / "gates.json").read_text())
    assert [gate["name"] for gate in gates] == list(checks)[:-1]
    assert "last-layer uncertainty: rise along plain training" in checks
    assert all(len(gate["values"]) == tiny.seeds for gate in gates)
    tables = (folder / "tables.md").read_text()
    assert "| posterior: single responses |" in tables and "grpo: final gold" in tables
    assert tables.count("\n| plain grpo: fall of gold from its peak |") == 1


@pytest.mark.slow
def test_ensembles_are_asked_how_far_their_members_part(script, tiny, tmp_path):
    config = dataclasses.replace(tiny, out=tmp_path / "run", kinds=("single", "seeds", "URME"))
    result = script.main(config)
    rows = {row["name"]: row["mean"] for row in result["rows"]}
    for kind in ("seeds", "URME"):
        for rule in ("mean", "UWO"):
            assert rows[f"{kind}: growth of the members' variance under {rule}"] > 0
    names = [check["name"] for check in result["checks"]]
    assert (
        len(names) == len(set(names)) and "seeds: growth of the members' variance along grpo, mean minus UWO" in names
    )
    assert "one model: slope of gold at best of 4, s.d. a √nat" in names
    clean = script.main(dataclasses.replace(config, out=tmp_path / "clean", label_noise=0.0))
    assert not any("slope" in check["name"] for check in clean["checks"])


@pytest.mark.parametrize("name", ["quick", "full", "real"])
def test_presets_are_possible(script, name):
    config = script.PRESETS[name]
    if name == "real":
        config = dataclasses.replace(config, policy=Path("folder"), prompts=Path("a"), sentiment=Path("b"))
    script.check_config(config)
    if name == "full":
        assert config.seeds >= 5 and set(config.kinds) == set(script.KINDS) and set(config.rules) == set(script.RULES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kinds": ("single", "quantum")}, "no kind 'quantum'; choose some of single"),
        ({"kinds": ("posterior",)}, "kinds are posterior: begin with single"),
        ({"rules": ("UWO",)}, "rules are UWO: begin with mean"),
        ({"rules": ("mean", "UWO", "UWO")}, "name each once"),
        ({"algorithms": ("grop",)}, "no algorithm 'grop'"),
        ({"seeds": 1}, "no error bars"),
        ({"members": 1}, "one member never disagrees"),
        ({"report_every": 3}, "does not divide updates 2"),
        ({"measured": 3}, "even number"),
        ({"best_of": 5}, "best-of is 5, of 4 answers"),
        ({"best_of": 1}, "best-of is 1; give at least 2"),
        ({"lcb_coefficient": -1.0}, "is negative"),
        ({"updates": 0}, "updates is 0"),
        ({"preset": "real"}, "needs --policy FOLDER"),
        ({"policy": Path("f"), "kinds": ("single", "URM")}, "URM needs ratings, which only the built-in world has"),
        ({"policy": Path("f"), "kinds": ("single", "starts")}, "starts needs several pretrained trunks"),
    ],
)
def test_refusals_come_before_anything_is_written(script, tiny, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        script.main(dataclasses.replace(tiny, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
