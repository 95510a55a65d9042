"""Learning from preferences with a tiny model, from files to a folder that `transformers` loads."""

import dataclasses
import json
import math
import typing

import jax
import numpy as np
import orbax.checkpoint
import pytest

from rlhf_jax.losses.preference_choices import PREFERENCE_LOSSES
from rlhf_jax.models.huggingface import load_policy
from rlhf_jax.training.metrics import read_metrics


@pytest.fixture
def config(script, tiny_model, pairs, tmp_path):
    return script.Config(
        model=str(tiny_model),
        data=pairs,
        out=tmp_path / "run",
        steps=4,
        batch_size=4,
        learning_rate=1e-3,
        schedule="constant",
        warmup=0.0,
        log_every=1,
        save_every=2,
        samples=1,
        response_length=4,
    )


def summed_logprob(folder, item):
    """log pi(completion | prompt) by torch."""
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor(item.tokens.astype(np.int64))[None]
    with torch.no_grad():
        logprob = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits[0, :-1].log_softmax(-1)
    taken = logprob[torch.arange(len(item.tokens) - 1), tokens[0, 1:]]
    return taken[torch.tensor(item.loss_mask[1:])].sum().item()


def test_it_starts_at_log_two_and_its_margins_are_those_of_the_exported_model(script, config, tiny_model):
    summary = script.main(config)
    assert json.loads((config.out / "summary.json").read_text()) == summary
    lines = read_metrics(config.out / "metrics.jsonl")
    assert lines[0]["eval/rewards/accuracies"] == 0.5 and lines[0]["eval/rewards/margins"] == 0.0
    assert lines[1]["loss/policy"] == pytest.approx(math.log(2), abs=1e-5)
    rows = {row["name"]: row["mean"] for row in summary["rows"]}

    source = script.open_source(config)
    data = script.read_split(config, source, script.PREFERENCE_FORMATS, script.tokenize_labelled)
    margins = []
    for pair in data.held_out:
        chosen, rejected = (
            summed_logprob(config.out / "model", item) - summed_logprob(tiny_model, item)
            for item in (pair.chosen, pair.rejected)
        )
        margins.append(0.1 * (chosen - rejected))
    assert rows["held-out margin of the implicit rewards"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert rows["held-out accuracy of the implicit rewards"] == np.mean(np.array(margins) > 0)
    assert (config.out / "figures" / "training.png").is_file() and (config.out / "samples.md").is_file()


def test_resuming_a_finished_run_trains_no_further(script, config):
    config = dataclasses.replace(config, adapter="dora", rank=2)
    first = script.main(config)
    model = load_policy(config.out / "model")[1]
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        state = checkpointer.metadata(config.out / "checkpoints" / "step_00000004" / "state").item_metadata.tree
    assert state["reference"] is None, "the model's folder has the base: a checkpoint need not hold it"
    assert set(state["params"]["query"]) == {"a", "b", "magnitude"}
    again = script.main(dataclasses.replace(config, resume=True))
    assert again["rows"][:3] == first["rows"][:3]
    jax.tree.map(np.testing.assert_array_equal, model, load_policy(config.out / "model")[1])


def test_a_reference_of_its_own_is_used_and_must_fit(script, config, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="leave out --reference"):
        script.main(dataclasses.replace(config, adapter="lora", reference=str(tiny_model)))
    other = tmp_path / "other"
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig.from_pretrained(tiny_model, num_hidden_layers=1)
    LlamaForCausalLM(shape).save_pretrained(other)
    with pytest.raises(ValueError, match="of another shape than --model"):
        script.main(dataclasses.replace(config, reference=str(other)))
    assert not config.out.exists()


def test_without_a_reference_the_rewards_are_average_logprobs(script, config, tiny_model):
    config = dataclasses.replace(config, loss="simpo", beta=2.0, gamma=0.5, steps=2)
    summary = script.main(config)
    source = script.open_source(config)
    data = script.read_split(config, source, script.PREFERENCE_FORMATS, script.tokenize_labelled)
    chosen, rejected = (
        np.array([2.0 * summed_logprob(tiny_model, item) / item.loss_mask.sum() for item in side])
        for side in zip(*((pair.chosen, pair.rejected) for pair in data.held_out), strict=True)
    )
    first = read_metrics(config.out / "metrics.jsonl")[0]
    assert first["eval/rewards/margins"] == pytest.approx((chosen - rejected).mean(), abs=1e-4)
    assert first["eval/rewards/accuracies"] == np.mean(chosen > rejected)
    assert "held-out accuracy of the implicit rewards before" in {row["name"] for row in summary["rows"]}


def test_completions_with_labels_are_learned_from(script, config, tmp_path):
    rows = [{"prompt": f"{n}. the", "completion": (" joy", " woe")[n % 2], "label": n % 2 == 0} for n in range(30)]
    data = tmp_path / "labels.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = dataclasses.replace(config, data=data, held_out=0.3, loss="kto", good_weight=1.2, steps=2)
    summary = script.main(config)
    lines = read_metrics(config.out / "metrics.jsonl")
    assert lines[1]["kto/reference_point"] == 0.0 and lines[1]["loss/policy"] >= 0.5
    assert all(math.isfinite(row["mean"]) for row in summary["rows"])


def test_kto_refuses_soft_labels_before_anything_is_written(script, config, tmp_path):
    rows = [{"prompt": f"{n}.", "chosen": " joy", "rejected": " woe", "label": 0.5 + n / 100} for n in range(30)]
    data = tmp_path / "soft.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match="pairs have a soft label, and taken apart a completion is good or bad"):
        script.main(dataclasses.replace(config, data=data, loss="kto"))
    assert not config.out.exists()


def test_every_loss_can_be_asked_for(script):
    assert set(script.READERS) == {*PREFERENCE_LOSSES, "kto"}
    assert set(typing.get_args(typing.get_type_hints(script.Config)["loss"])) == set(script.READERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"beta is 0\.0; it must be positive"),
        ({"label_smoothing": 0.5}, r"label_smoothing is 0\.5"),
        ({"loss": "simpo", "label_smoothing": 0.1}, "the loss simpo does not read label_smoothing"),
        ({"gamma": 0.0}, "the loss dpo does not read gamma, only beta, label_smoothing: leave it out, or choose simpo"),
        ({"loss": "kto", "length_norm": True}, "the loss kto does not read length_norm"),
        ({"loss": "orpo", "reference": "somewhere"}, "--loss orpo has no reference: leave out --reference"),
        ({"loss": "kto", "batch_size": 1}, "give a --batch-size of 2 or more"),
        ({"loss": "kto", "bad_weight": 0.0}, r"bad_weight is 0\.0; it must be positive"),
    ],
)
def test_options_that_would_be_passed_over_or_cannot_be_are_refused(script, config, options, message):
    with pytest.raises(ValueError, match=message):
        script.main(dataclasses.replace(config, **options))
    assert not config.out.exists()
