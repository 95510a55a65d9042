"""PPO of a tiny model with reward models and with a Python reward, from files to a folder that `transformers` loads."""

import dataclasses
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from rlhf_jax.models.huggingface import load_policy
from rlhf_jax.training.metrics import read_metrics

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "ppo.py"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("ppo_experiment", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


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


def stopping(batches, after):
    """`batches` of the pipeline, whose user presses Ctrl-C while batch number `after` is handed out."""

    def make(*arguments, **options):
        stream = batches(*arguments, **options)

        class Stream:
            get_state, set_state, taken = stream.get_state, stream.set_state, 0

            def __next__(self):
                self.taken += 1
                if self.taken == after:
                    os.kill(os.getpid(), signal.SIGINT)
                return next(stream)

        return Stream()

    return make


def test_an_ensemble_is_pushed_on_and_a_resumed_run_equals_an_uninterrupted_one(script, config, tmp_path, monkeypatch):
    whole = script.main(dataclasses.replace(config, out=tmp_path / "whole"))
    out = tmp_path / "whole"
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

    with monkeypatch.context() as patch:
        patch.setattr(script, "batches", stopping(script.batches, after=3))
        with pytest.raises(KeyboardInterrupt):
            script.main(config)
    resumed = script.main(dataclasses.replace(config, resume=True))
    assert resumed["rows"][:8] == whole["rows"][:8]
    jax.tree.map(np.testing.assert_array_equal, *(load_policy(folder / "model")[1] for folder in (out, config.out)))
    assert not list((config.out / "checkpoints").rglob("*reference*"))


def test_advpo_compares_with_references_and_its_averages_survive_an_interruption(
    script, config, pairs, tmp_path, monkeypatch
):
    config = dataclasses.replace(
        config, reward=config.reward[:1], rule="advpo", preferences=pairs, advpo_ema=0.9, advpo_rescale="std"
    )
    out = tmp_path / "whole"
    script.main(dataclasses.replace(config, out=out))
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "objective/kl" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["uncertainty/mean"] > 0 and line["uncertainty/displacement"] > 0 and line["rewards/robust"] < 0
        assert line["objective/scores"] == pytest.approx(line["rewards/transformed"], abs=1e-5)

    with monkeypatch.context() as patch:
        patch.setattr(script, "batches", stopping(script.batches, after=3))
        with pytest.raises(KeyboardInterrupt):
            script.main(config)
    script.main(dataclasses.replace(config, resume=True))
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
        ({"reward": ("nowhere",)}, "there is no folder nowhere"),
        ({"reward": ("absent_module:f",)}, "absent_module"),
        ({"rule": "mean", "penalty": 0.5}, "the rule mean has no coefficient"),
        ({"rule": "advpo"}, "--rule advpo needs --preferences FILE"),
        ({"rule": "advpo", "preferences": Path("pairs.jsonl")}, "--rule advpo is for one reward model, and --reward"),
        ({"preferences": Path("pairs.jsonl")}, "--rule worst_case does not use --preferences"),
        ({"minibatches": 3}, "--batch-size 4 does not split into 3 --minibatches"),
        ({"mesh": "data=8", "adapter": "lora", "offload_reference": True}, "--adapter trains on the reference itself"),
        ({"temperature": 0.0}, "PPO samples from the policy itself"),
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
        script.main(dataclasses.replace(config, reward=(str(folder),)))
    assert not config.out.exists()
