import dataclasses
from pathlib import Path

import pytest

from rlhf_jax.training.options import SourceOptions, TrainingOptions, check_options


@pytest.fixture
def options(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}")
    return TrainingOptions(model="owner/name", data=data)


def test_the_defaults_need_a_model_and_data_only(options):
    check_options(options)
    check_options(SourceOptions(model="owner/name"), needed=("model",))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": None}, "--model is missing"),
        ({"data": Path("nowhere.jsonl")}, "--data nowhere.jsonl is not a file"),
        ({"eval_data": Path("nowhere.jsonl")}, "--eval-data nowhere.jsonl is not a file"),
        ({"chat_template": Path("nowhere.jinja")}, "--chat-template nowhere.jinja is not a file"),
        ({"batch_size": 0}, "--batch-size is 0: give 1 or more"),
        ({"accumulate": 3}, r"--batch-size 32 does not split into --accumulate 3 microbatches .32 / 3 = 10.6667."),
        ({"log_every": -1}, "--log-every is -1"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0: give more than 0"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"held_out": 1.0}, "--held-out is 1.0: give a share"),
        ({"seed": -1}, "--seed is -1: give 0 or more"),
        ({"resume": True, "overwrite": True}, "give one of them"),
    ],
)
def test_what_cannot_work_is_named_as_on_the_command_line(options, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_options(dataclasses.replace(options, **change))
