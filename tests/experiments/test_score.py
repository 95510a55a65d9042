"""Scores of tiny reward models for completions, pairs, and several completions with gold."""

import dataclasses
import json

import numpy as np
import pytest

from rlhf_jax.training.json_lines import read_lines


def transformers_score(folder, text):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        return model(ids).logits[0, 0].item()


@pytest.fixture
def write(script, rewards, tmp_path):
    """A configuration for rows."""

    def make(rows, **options):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return script.Config(reward=rewards[:1], data=data, out=tmp_path / "run", batch_size=2, **options)

    return make


def table(summary):
    return {row["name"]: row["mean"] for row in summary["rows"]}


def test_completions_have_the_score_that_transformers_gives(script, write, rewards):
    texts = [" sat", " ran on a mat", " happy"]
    config = write([{"prompt": "the cat", "completion": text, "kept": 1} for text in [*texts, " x" * 40]])
    summary = script.main(config)
    lines = read_lines(config.out / "scores.jsonl")
    for text, line in zip(texts, lines[:3], strict=True):
        assert line["score"] == pytest.approx(transformers_score(rewards[0], "the cat" + text), abs=1e-4)
        assert line["kept"] == 1
    assert lines[3]["score"] is None  # 88 tokens do not fit a context of 64
    assert table(summary)["rows whose completions were all read"] == pytest.approx(0.75)
    cut = dataclasses.replace(config, out=config.out.parent / "cut", over_long="cut")
    script.main(cut)
    again = [line["score"] for line in read_lines(cut.out / "scores.jsonl")]
    assert again[:3] == pytest.approx([line["score"] for line in lines[:3]], abs=1e-4)
    assert again[3] == pytest.approx(transformers_score(rewards[0], "the cat" + (" x" * 40)[:56]), abs=1e-4)


def test_pairs_and_picks(script, write, rewards):
    rows = [{"prompt": f"the cat {number}", "chosen": " sat", "rejected": " ran"} for number in range(3)]
    config = write(rows)
    summary = script.main(config)
    scores = np.array([line["scores"] for line in read_lines(config.out / "scores.jsonl")])
    assert table(summary)["accuracy"] == pytest.approx((scores[:, 0] > scores[:, 1]).mean())
    assert table(summary)["accuracy of the longer completion"] == 0.5

    # The longest has the most tokens: of a tokenizer of bytes " ééé" has seven, and " abcde" six.
    rows = [{"prompt": "the cat", "completions": [" abcde", " ééé"], "gold": [0.25, 0.75]}]
    assert table(script.main(dataclasses.replace(write(rows), overwrite=True)))["gold of the longest"] == 0.75

    rows = [{"prompt": "the cat", "completions": [" sat", " ran off"], "gold": [0.25, 0.75]}] * 3
    config = dataclasses.replace(write(rows), reward=rewards, rule="worst_case", overwrite=True)
    found = table(script.main(config))
    assert found["gold of a random pick"] == 0.5 and found["gold of the best"] == found["gold of the longest"] == 0.75
    alone = np.array(
        [[transformers_score(folder, "the cat" + text) for text in rows[0]["completions"]] for folder in rewards]
    )
    expected = (alone - alone.mean(axis=1, keepdims=True)).min(axis=0)
    lines = read_lines(config.out / "scores.jsonl")
    np.testing.assert_allclose([line["scores"] for line in lines], [expected] * 3, atol=1e-4)
    assert found["gold of the pick by score"] == pytest.approx([0.25, 0.75][int(expected.argmax())])
    spread = (alone - alone.mean(axis=1, keepdims=True)).std(axis=0)
    np.testing.assert_allclose([line["epistemic"] for line in lines], [spread] * 3, atol=1e-4)
    assert "aleatoric" not in lines[0]


@pytest.mark.parametrize("rule", ["single", "mean"])
def test_what_a_model_says_of_its_doubt_stands_beside_the_score(script, write, monkeypatch, rule):
    """Two stand-ins for models: of each, scores of three completions, of which the first model cannot read the last."""
    mean, aleatoric = np.float32([[1, 5, np.nan], [2, 2, 4]]), np.float32([[3, 0, np.nan], [4, 0, 1]])
    models = iter(script.CompletionScores(*both) for both in zip(mean, [None] * 2, aleatoric, strict=True))
    monkeypatch.setattr(script, "load_scorer", lambda options, source: lambda examples, count: next(models))
    config = write([{"prompt": "the cat", "completion": text} for text in (" sat", " ran", " fell")])
    script.main(dataclasses.replace(config, reward=config.reward * 2, rule=rule))
    lines = read_lines(config.out / "scores.jsonl")
    centred = [[-2, 2], [0, 0]]  # over the two that both read
    expected = centred[0] if rule == "single" else [-1, 1]
    assert [line["score"] for line in lines] == [*expected, None]
    assert [line["epistemic"] for line in lines] == [1.0, 1.0, None]
    assert [line["aleatoric"] for line in lines] == [pytest.approx(np.sqrt((9 + 16) / 2)), 0.0, None]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reward": ()}, "--reward is missing"),
        ({"resume": True}, "leave out --model and --resume"),
        ({"rule": "lower_confidence_bound"}, "needs at least 2 reward models"),
        ({"penalty": 1.0}, "the rule mean has no coefficient"),
        ({"columns": {"completion": "answer"}}, "has no completions to judge"),
        ({"columns": {"note": "score"}}, "has a column 'score', which is written here"),
        ({"columns": {"note": "epistemic"}}, "has a column 'epistemic', which is written here"),
        ({"reward": ("nowhere",)}, "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(script, write, change, sentence):
    config = write([{"prompt": "the cat", "completion": " sat", "note": "n"}])
    with pytest.raises(ValueError, match=sentence):
        script.main(dataclasses.replace(config, **change))
    assert not config.out.exists()
