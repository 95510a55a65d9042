"""Supervised fine-tuning of a tiny model, from files to a folder that `transformers` loads."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.models.huggingface import load_policy
from rlhf_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def whole(script, tiny_model, demonstrations, tmp_path_factory):
    """An uninterrupted run: its configuration, its summary and what it printed."""
    config = script.Config(
        model=str(tiny_model),
        data=demonstrations,
        out=tmp_path_factory.mktemp("whole") / "run",
        steps=6,
        batch_size=4,
        learning_rate=1e-2,
        log_every=2,
        evaluate_every=3,
        save_every=2,
        samples=2,
        response_length=4,
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return config, script.main(config), printed


@pytest.fixture
def config(whole, tmp_path):
    return dataclasses.replace(whole[0], out=tmp_path / "run")


def rows_of(summary):
    return {row["name"]: row for row in summary["rows"]}


def test_it_leaves_the_model_and_all_that_was_measured(whole):
    config, summary, printed = whole
    out = config.out
    assert json.loads((out / "summary.json").read_text()) == summary
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert {"config.json", "metrics.jsonl", "samples.md", "figures/training.png", "model/config.json"} <= names
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step_00000004", "step_00000006"}
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval/nll" in line] == [0, 3, 6]
    assert [line["step"] for line in lines if "loss/policy" in line] == [2, 4, 6]
    assert {"lr", "grad_norm", "time/update", "throughput/tokens_per_second"} <= set(lines[-2])
    rows = rows_of(summary)
    before, after = (rows[f"held-out negative log-likelihood {when}"] for when in ("before", "after"))
    assert before["mean"] == pytest.approx(lines[0]["eval/nll"]) and before["n"] == 4
    assert after["mean"] == pytest.approx(lines[-1]["eval/nll"])
    assert rows["from the command to the first step"]["mean"] > 0
    assert "40 of 40 rows kept" in printed.getvalue()
    assert (out / "samples.md").read_text().count("**after**") == 2


def held_out_nll_by_transformers(folder, config, script):
    """The same number from the exported folder, row by row, with torch."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    source = script.open_source(config)
    data = script.read_split(config, source, script.DEMONSTRATION_FORMATS, script.tokenize_demonstrations)
    total = count = 0
    for item in data.held_out:
        tokens = torch.tensor(item.tokens.astype(np.int64))[None]
        with torch.no_grad():
            logprob = model(tokens).logits[0, :-1].log_softmax(-1)
        taken = logprob[torch.arange(len(item.tokens) - 1), tokens[0, 1:]]
        counted = torch.tensor(item.loss_mask[1:])
        total, count = total - taken[counted].sum().item(), count + int(counted.sum())
    return total / count


def test_an_adapter_is_exported_merged_and_apart(script, config, tiny_model):
    config = dataclasses.replace(config, adapter="lora", rank=2, targets=("query", "down"), packing=True)
    summary = script.main(config)
    expected = rows_of(summary)["held-out negative log-likelihood after"]["mean"]
    assert held_out_nll_by_transformers(config.out / "model", config, script) == pytest.approx(expected, abs=1e-4)

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), config.out / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(config.out / "model")
    ids = {"input_ids": merged.dummy_inputs["input_ids"] % 200}
    np.testing.assert_allclose(adapted(**ids).logits.detach(), merged(**ids).logits.detach(), atol=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(script, config, whole, interrupt):
    uninterrupted, summary, _ = whole
    interrupt(config, script, number=3)
    assert not (config.out / "summary.json").exists()
    resumed = script.main(dataclasses.replace(config, resume=True))
    assert resumed["rows"][:2] == summary["rows"][:2]
    trees = [load_policy(out / "model")[1] for out in (uninterrupted.out, config.out)]
    jax.tree.map(np.testing.assert_array_equal, *trees)

    def lines(out):
        timed = ("time/update", "throughput/tokens_per_second")
        return [
            {name: value for name, value in line.items() if name not in timed}
            for line in read_metrics(out / "metrics.jsonl")
        ]

    assert lines(config.out) == lines(uninterrupted.out)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": None}, "--model is missing"),
        ({"data": Path("absent.jsonl")}, "--data absent.jsonl is not a file"),
        ({"longest": 65}, "--longest is 65, but the model's context is 64"),
        ({"batch_size": 37}, "36 rows to train on do not fill one batch of 37"),
        ({"held_out": 0.0}, "no row of .* is held out"),
        ({"resume": True}, "holds no run to resume"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"columns": {"prompt": "question"}}, r"not prompt \+ completion"),
        ({"adapter": "lora", "targets": ("qeury",)}, "qeury"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(script, config, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(dataclasses.replace(config, **change))
    assert not config.out.exists()
