"""The over-optimisation study at a tiny size: its files, what holds by construction, and what it refuses."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.laboratory.options import METHODS, Options
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.run_folder import CHECK_FIELDS, ROW_FIELDS

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "experiments" / "overoptimization.py"
TINY = Options(
    seeds=2,
    members=2,
    pairs=32,
    updates=4,
    report_every=2,
    rollouts=8,
    sft_steps=4,
    reward_epochs=1,
    reward_batch=16,
    best_of_n=8,
    held_out=2,
    width=8,
    kl_coefficients=(0.0, 0.1),
)


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("overoptimization_experiment", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ran(script, tmp_path_factory):
    """The folder and summary of one tiny run."""
    folder = tmp_path_factory.mktemp("study") / "run"
    return folder, script.main(dataclasses.replace(TINY, out=folder))


def test_it_leaves_every_file_that_an_experiment_leaves(ran):
    folder, result = ran
    assert json.loads((folder / "summary.json").read_text()) == result
    assert all(tuple(row) == ROW_FIELDS for row in result["rows"])
    assert all(tuple(check) == CHECK_FIELDS for check in result["checks"])
    assert result["seconds"]["total"] > result["seconds"]["compile"] > 0
    assert json.loads((folder / "config.json").read_text())["config"]["pairs"] == 32
    assert len(list((folder / "figures").glob("*.png"))) == 8
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"initial_policy", "reward_models", "policies"}
    assert (folder / "samples.md").read_text().count("## ") == 3


def test_metrics_have_a_line_a_lane_and_report(ran):
    lines = read_metrics(ran[0] / "metrics.jsonl")
    lanes = len(METHODS) * 2 * TINY.seeds
    assert len(lines) == lanes * 2
    assert {line["step"] for line in lines} == {2, 4}
    assert {(line["method"], line["kl_coefficient"], line["seed"]) for line in lines} == {
        (method, coefficient, seed) for method in METHODS for coefficient in (0.0, 0.1) for seed in range(2)
    }
    assert all({"objective/kl", "policy/approxkl", "uncertainty/mean", "val/ratio"} <= set(line) for line in lines)


def test_all_methods_of_a_seed_start_from_the_same_samples(ran):
    history = np.load(ran[0] / "history.npz")
    gold = history["gold"].reshape(len(METHODS), 2, TINY.seeds, TINY.updates, TINY.rollouts)
    np.testing.assert_array_equal(gold[:, :, :, 0], np.broadcast_to(gold[:1, :1, :, 0], gold[:, :, :, 0].shape))
    assert not np.array_equal(gold[0, 0, 0], gold[0, 0, 1]), "seeds differ"


def test_the_first_update_sees_the_log_probabilities_of_the_rollout(ran):
    checks = {check["name"]: check for check in ran[1]["checks"]}
    assert checks["largest |log-prob at rollout − in the first minibatch|"]["pass"]
    assert checks["ratio of a first minibatch that is farthest from 1"]["pass"]


def test_the_same_seed_gives_the_same_numbers(script, ran, tmp_path):
    again = script.main(dataclasses.replace(TINY, out=tmp_path / "again"))
    assert [(row["name"], row["mean"]) for row in again["rows"]] == [
        (row["name"], row["mean"]) for row in ran[1]["rows"]
    ]


def test_the_neural_gold_runs(script, tmp_path):
    options = dataclasses.replace(TINY, out=tmp_path / "run", gold="neural", methods=("PPO",), best_of_n=0)
    result = script.main(dataclasses.replace(options, kl_coefficients=(0.0,), updates=2))
    assert all(np.isfinite(row["mean"]) for row in result["rows"] if "final" in row["name"])


@pytest.mark.slow
def test_a_pretrained_policy_runs(script, shared_data, tmp_path):
    options = dataclasses.replace(
        script.PRESETS["real"],
        policy=shared_data / "weights" / "stories260K_hf",
        prompts=shared_data / "corpus" / "tinystories_prompts.jsonl",
        sentiment=shared_data / "classification" / "mr_polarity.jsonl",
        out=tmp_path / "run",
        methods=("PPO", "AdvPO"),
        seeds=2,
        members=1,
        pairs=500,
        reward_batch=125,
        reward_epochs=1,
        updates=2,
        report_every=1,
        rollouts=8,
        response_length=8,
        held_out=4,
    )
    script.main(options)
    assert "little" in (tmp_path / "run" / "samples.md").read_text()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"methods": ("UWO",)}, "begin with PPO"),
        ({"methods": ("PPO", "best")}, "choose some of PPO, mean"),
        ({"members": 1}, "no ensemble"),
        ({"advpo_value": -1.0}, "negative"),
        ({"advpo_multiple": -0.5}, "negative"),
        ({"kl_coefficients": (-0.1,)}, "at least 0"),
        ({"label_noise": 0.5}, "less than 0.5"),
        ({"report_every": 3}, "divisor"),
        ({"seeds": 1}, "error bars"),
        ({"policy": Path("somewhere")}, "--prompts FILE.jsonl and --sentiment"),
        ({"prompts": Path("prompts.jsonl")}, "needs --policy FOLDER"),
    ],
)
def test_options_that_cannot_work_are_refused_before_a_folder_is_made(script, tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(dataclasses.replace(TINY, out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_kept_without_overwrite_and_when_another_input_is_bad(script, ran, tmp_path):
    folder, before = ran[0], (ran[0] / "summary.json").read_bytes()
    with pytest.raises(ValueError, match="overwrite"):
        script.main(dataclasses.replace(TINY, out=folder))
    (tmp_path / "empty").mkdir()
    files = {"policy": tmp_path / "empty", "prompts": tmp_path / "p.jsonl", "sentiment": tmp_path / "s.jsonl"}
    with pytest.raises(ValueError, match=r"config\.json"):
        script.main(dataclasses.replace(TINY, out=folder, overwrite=True, **files))
    assert (folder / "summary.json").read_bytes() == before


def test_a_gold_reward_that_returns_nan_stops_the_study_before_training(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "gold_of", lambda world, rollout: np.full(len(rollout.tokens), np.nan))
    with pytest.raises(ValueError, match="the gold reward returned nan for row 0"):
        script.main(dataclasses.replace(TINY, out=tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--preset", "dmeo"], "error: there is no preset 'dmeo'; choose one of demo, full, real."),
        (["--advpo-value", "-1"], "error: the squared radius B of AdvPO is negative"),
        (["--updaets", "3"], "updaets"),
    ],
)
def test_the_command_line_answers_a_mistake_with_one_sentence(tmp_path, words, sentence):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "run"), *words]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert finished.returncode == 2
    assert sentence in finished.stderr + finished.stdout
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "run").exists()
