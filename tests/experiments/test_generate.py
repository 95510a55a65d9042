"""Completions of a tiny model, from a file of prompts to a file of completions."""

import dataclasses
import json

import pytest

from rlhf_jax.training.json_lines import read_lines


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "the cat " * (1 + number % 2) + str(number), "source": number} for number in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(script, tiny_model, prompts, tmp_path):
    return script.Config(
        model=str(tiny_model), data=prompts, out=tmp_path / "run", samples=2, batch_size=4, response_length=8
    )


def interrupted(generate_batches, after):
    """`generate_batches` whose user presses Ctrl-C when `after` batches are drawn."""

    def generate(*arguments):
        for number, batch in enumerate(generate_batches(*arguments)):
            if number == after:
                raise KeyboardInterrupt
            yield batch

    return generate


def test_a_resumed_run_equals_an_uninterrupted_one(script, config, tmp_path, monkeypatch):
    summary = script.main(dataclasses.replace(config, out=tmp_path / "whole"))
    whole = (tmp_path / "whole" / "completions.jsonl").read_bytes()
    lines = read_lines(tmp_path / "whole" / "completions.jsonl")
    assert [(line["row"], line["sample"]) for line in lines] == [divmod(number, 2) for number in range(10)]
    assert all(line["source"] == line["row"] and 1 <= line["tokens"] <= 8 for line in lines)
    assert all(line["finished"] or line["tokens"] == 8 for line in lines)
    assert len({line["completion"] for line in lines}) > 5
    assert summary["rows"][0]["n"] == 10
    assert json.loads((tmp_path / "whole" / "summary.json").read_text()) == summary

    config = dataclasses.replace(config, slots=2)
    with monkeypatch.context() as patch:
        patch.setattr(script, "generate_batches", interrupted(script.generate_batches, after=1))
        with pytest.raises(KeyboardInterrupt):
            script.main(config)
    path = config.out / "completions.jsonl"
    assert len(read_lines(path)) == 4  # drawn two at a time, and the same
    with path.open("a") as file:
        file.write('{"row": 3, "sam')
    script.main(dataclasses.replace(config, resume=True))
    assert path.read_bytes() == whole


def test_greedy_completions_are_those_of_transformers(script, shared_data, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "weights" / "stories260K_hf"
    rows = read_lines(shared_data / "corpus" / "tinystories_prompts.jsonl")[:20]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    script.main(
        script.Config(
            model=str(folder), data=data, out=tmp_path / "run", batch_size=20, response_length=24, temperature=0.0
        )
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for row, line in zip(rows, read_lines(tmp_path / "run" / "completions.jsonl"), strict=True):
        ids = torch.tensor(tokenizer(row["prompt"])["input_ids"])[None]
        expected = model.generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=0)[0].tolist()
        assert tokenizer.decode(expected, skip_special_tokens=True) == row["prompt"] + line["completion"]
        assert line["tokens"] == len(expected) - ids.shape[1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"samples": 0}, "--samples is 0"),
        ({"response_length": 64}, "leave no room for a prompt in 64"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"slots": 0}, "slots is 0"),
        ({"columns": {"source": "row"}}, "has the column 'row', which is written here"),
        ({"columns": {"prompt": "question"}}, "not prompt or messages"),
        ({"resume": True}, "holds no run to resume"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(script, config, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(dataclasses.replace(config, **change))
    assert not config.out.exists()
