"""Reward modelling from a tiny model, from files to a folder that `transformers` loads."""

import dataclasses
import json

import numpy as np
import pytest

from rlhf_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def trained(script, tiny_model, pairs, tmp_path_factory):
    """A run's configuration and its summary."""
    config = script.Config(
        model=str(tiny_model),
        data=pairs,
        out=tmp_path_factory.mktemp("trained") / "run",
        steps=4,
        batch_size=4,
        learning_rate=1e-2,
        log_every=2,
        samples=3,
        adapter="lora",
        rank=2,
    )
    return config, script.main(config)


@pytest.fixture
def config(trained, tmp_path):
    return dataclasses.replace(trained[0], out=tmp_path / "run")


def rewards_by_transformers(folder, items):
    """Scores of a `…ForSequenceClassification`, in one padded batch, which is where a wrong pad token shows."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    batch = tokenizer.pad({"input_ids": [item.tokens.tolist() for item in items]}, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, 0].numpy()


def test_the_exported_model_gives_the_margins_of_the_summary(script, trained):
    config, summary = trained
    assert json.loads((config.out / "summary.json").read_text()) == summary
    rows = {row["name"]: row for row in summary["rows"]}
    source = script.open_source(config)
    data = script.read_split(config, source, script.PREFERENCE_FORMATS, script.tokenize_preferences)
    both = [pair.chosen for pair in data.held_out] + [pair.rejected for pair in data.held_out]
    scores = rewards_by_transformers(config.out / "model", both)
    chosen, rejected = scores[: len(data.held_out)], scores[len(data.held_out) :]
    assert rows["held-out margin"]["mean"] == pytest.approx((chosen - rejected).mean(), abs=1e-4)
    assert rows["held-out accuracy"]["mean"] == np.mean(chosen > rejected)
    assert rows["held-out accuracy of the longer answer"]["mean"] == 0.5  # all pairs are of equal length
    lines = read_metrics(config.out / "metrics.jsonl")
    assert lines[-1]["eval/ece"] == pytest.approx(rows["held-out calibration error (ECE, 10 bins)"]["mean"])
    text = (config.out / "samples.md").read_text()
    assert text.count("**margin**") == 3 and text.count(" joy ") == 3
    assert (config.out / "figures" / "training.png").is_file()


def test_a_reward_model_goes_on_learning_and_margins_can_be_left_out(script, config, trained):
    first = trained[0]
    changes = dict(adapter=None, margins=False, model=str(first.out / "model"), learning_rate=1e-9)
    script.main(dataclasses.replace(config, **changes))
    last = read_metrics(first.out / "metrics.jsonl")[-1]
    start = read_metrics(config.out / "metrics.jsonl")[0]
    assert start["eval/rewards/margins"] == pytest.approx(last["eval/rewards/margins"], abs=1e-4)


def test_best_and_worst_margins(script):
    rows = [{"prompt": str(number), "chosen": "c", "rejected": "r"} for number in range(4)]
    data = script.Split(train=[], held_out=[], rows=rows)
    shown = script.extremes(data, np.array([0.5, -1.0, 2.0, 0.0]), 3)
    assert [(sample["margin"], sample["prompt"]) for sample in shown] == [
        ("2.000", "2"),
        ("0.500", "0"),
        ("-1.000", "1"),
    ]


def test_a_policy_cannot_be_trained_on_demonstrations_here(script, config, demonstrations):
    with pytest.raises(ValueError, match=r"not chosen \+ rejected"):
        script.main(dataclasses.replace(config, data=demonstrations))
    assert not config.out.exists()
