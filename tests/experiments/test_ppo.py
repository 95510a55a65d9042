"""PPO of a tiny model with reward models and with a Python reward, from files to a folder that `transformers` loads."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from rlhf_jax.models.huggingface import load_policy
from rlhf_jax.training import policy_run
from rlhf_jax.training.metrics import read_metrics


@pytest.fixture
def calls(monkeypatch):
    """The calls of the reward function `tiny_rewards:share_of_ascii`."""
    calls, module = [], ModuleType("tiny_rewards")

    def share_of_ascii(prompts, completions, **columns):
        calls.append((prompts, completions, columns))
        return [sum(letter < "\x80" for letter in text) / max(len(text), 1) for text in completions]

    module.share_of_ascii = share_of_ascii
    monkeypatch.setitem(sys.modules, "tiny_rewards", module)
    return calls


@pytest.fixture
def config(script, tiny_model, demonstrations, rewards, tmp_path):
    return script.Config(
        model=str(tiny_model),
        data=demonstrations,
        reward=rewards,
        rule="worst_case",
        out=tmp_path / "run",
        steps=4,
        batch_size=4,
        passes=1,
        learning_rate=1e-3,
        reference_samples=8,
        log_every=2,
        evaluate_every=2,
        save_every=2,
        samples=2,
        response_length=6,
        value_net="shared",
    )


def rows_of(summary):
    return {row["name"]: row for row in summary["rows"]}


def test_an_ensemble_is_pushed_on(script, config):
    whole, out = script.main(config), config.out
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert {"config.json", "summary.json", "samples.md", "figures/training.png", "model/config.json"} <= names
    assert {f"samples/step_0000000{step}.md" for step in (0, 2, 4)} <= names
    assert (out / "samples.md").read_text().count("**after, reward") == 2
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval/objective/scores" in line] == [0, 2, 4]
    logged = next(line for line in lines if "objective/scores" in line)
    assert {"objective/kl", "loss/policy", "loss/value", "uncertainty/mean", "completions/clipped_ratio"} <= set(logged)
    assert {"throughput/tokens_per_second", "lr", "grad_norm"} <= set(lines[-2])
    assert all(check["pass"] for check in whole["checks"])
    rows = rows_of(whole)
    gained = rows["held-out reward after"]["mean"] - rows["held-out reward before"]["mean"]
    assert rows["held-out reward gained, by prompt"]["mean"] == pytest.approx(gained, abs=1e-6)
    assert rows["KL of the policy from the initial one"]["n"] == 4


def test_advpo_compares_with_references_and_a_resumed_run_equals_an_uninterrupted_one(
    script, config, pairs, tmp_path, interrupt
):
    """Its moving averages are part of what is resumed."""
    config = dataclasses.replace(
        config, reward=config.reward[:1], rule="advpo", preferences=pairs, advpo_ema=0.9, advpo_rescale="std"
    )
    out = tmp_path / "whole"
    whole = script.main(dataclasses.replace(config, out=out))
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "objective/kl" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["uncertainty/mean"] > 0 and line["uncertainty/displacement"] > 0 and line["rewards/robust"] < 0
        assert line["objective/scores"] == pytest.approx(line["rewards/transformed"], abs=1e-5)

    interrupt(config, policy_run, number=3)
    finished = script.main(dataclasses.replace(config, resume=True))
    assert finished["rows"][:8] == whole["rows"][:8]
    assert not list((config.out / "checkpoints").rglob("*reference*"))
    jax.tree.map(np.testing.assert_array_equal, *(load_policy(folder / "model")[1] for folder in (out, config.out)))
    resumed = [line for line in read_metrics(config.out / "metrics.jsonl") if "objective/kl" in line][-1]
    assert resumed["uncertainty/multiplier"] == lines[-1]["uncertainty/multiplier"]


def test_a_function_gets_texts_and_columns_and_an_adapter_is_exported(script, config, calls, tiny_model):
    config = dataclasses.replace(
        config, reward=("tiny_rewards:share_of_ascii",), rule="mean", adapter="lora", rank=2, steps=2, target_kl=1.0
    )
    summary = script.main(config)
    prompts, completions, columns = calls[0]
    assert len(prompts) == len(completions) == 4 and all(isinstance(text, str) for text in completions)
    assert set(columns) == {"completion"} and len(columns["completion"]) == 4
    assert all(prompt in config.data.read_text() for prompt in prompts)
    assert len(calls) == 2 + 2  # the steps; and 4 held-out prompts, at the start and at the end
    assert (config.out / "adapter" / "adapter_config.json").is_file()

    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(config.out / "model").config.vocab_size == 257
    lines = read_metrics(config.out / "metrics.jsonl")
    assert {"time/rollout", "time/score", "kl_coefficient"} <= set(lines[1])
    assert 0.0 <= rows_of(summary)["held-out reward after"]["mean"] <= 1.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reward": ()}, "--reward is missing"),
        ({"reward": ("nowhere",), "rule": "mean"}, "there is no folder nowhere"),
        ({"reward": ("absent_module:f",)}, "absent_module"),
        ({"rule": "mean", "penalty": 0.5}, "the rule mean has no coefficient"),
        ({"rule": "advpo"}, "--rule advpo needs --preferences FILE"),
        ({"rule": "advpo", "preferences": Path("pairs.jsonl")}, "--rule advpo is for one reward model, and --reward"),
        ({"preferences": Path("pairs.jsonl")}, "--rule worst_case does not use --preferences"),
        ({"minibatches": 3}, "4 responses an update, which do not split into --minibatches 3"),
        ({"mesh": "data=8", "adapter": "lora", "offload_reference": True}, "--adapter trains on the reference itself"),
        ({"temperature": 0.0}, "--temperature is 0.0: give more than 0"),
        ({"kl": -0.1}, "--kl is -0.1: give 0 or more"),
        ({"kl_in": "loss", "kl_estimate": "k1"}, "the mean gradient of k1 is 0"),
        ({"dual_clip": 1.0}, "--dual-clip is 1.0: give more than 1"),
        ({"advpo_ema": 0.9}, "--rule worst_case does not use --advpo-ema"),
        ({"reference_responses": 2}, "--rule worst_case does not use --reference-responses"),
        ({"rule": "par", "penalty": 0.5}, "--rule par does not use --penalty"),
        ({"rule": "par"}, "--rule par is for one reward model, and --reward names 2"),
        ({"rule": "par", "reward": ("math:hypot",)}, "--reward math:hypot is a function"),
        ({"response_length": 64}, "leave no room for a prompt"),
        ({"columns": {"prompt": "question"}}, "not prompt or messages"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(script, config, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(dataclasses.replace(config, **change))
    assert not config.out.exists()


def test_a_reward_model_of_another_vocabulary_is_refused(script, config, rewards, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for path in Path(rewards[0]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"another vocabulary than the policy .2 tokens differ"):
        script.main(dataclasses.replace(config, reward=(str(folder),), rule="mean"))
    assert not config.out.exists()
