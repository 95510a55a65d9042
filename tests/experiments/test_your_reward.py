"""The page on rewards of one's own: its example runs and is short, and its command is understood."""

import importlib.util
import re
import shlex
from pathlib import Path

from rlhf_jax.models.huggingface import load_policy
from rlhf_jax.rewards.python_reward import call_reward_function
from rlhf_jax.training.command_line import parse

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "your_reward.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_example_trains_the_users_model_in_at_most_25_lines(tiny_model, tmp_path, monkeypatch, capsys):
    example = blocks("python")[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    monkeypatch.chdir(tmp_path)
    shorter = example.replace("path/to/model", str(tiny_model)).replace("range(20)", "range(2)")
    exec(compile(shorter, "docs/your_reward.md", "exec"), {"__name__": "page"})
    printed = re.findall(r"reward (-?[0-9.]+)  KL (-?[0-9.]+)", capsys.readouterr().out)
    assert len(printed) == 2 and abs(float(printed[0][1])) < 0.01
    load_policy(tmp_path / "runs" / "happy")


def test_the_function_gives_one_number_a_completion_and_the_command_is_understood():
    module = {}
    exec(compile(blocks("python")[0], "happy.py", "exec"), module)
    assert call_reward_function(module["share"], ["a", "a"], ["Happy dog", ""], {"answer": [1, 1]}).tolist() == [0.5, 0]
    (command,) = blocks("bash")
    words = shlex.split(command)
    specification = importlib.util.spec_from_file_location("grpo_of_the_page", REPOSITORY / words[1])
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    assert parse(script.PRESETS, "", words[2:]).reward == ("happy:share",)
    options = re.findall(r"^\| `(--[^`]+)`", PAGE, flags=re.MULTILINE)
    assert len(options) == 6
    for option in options:
        parse(script.PRESETS, "", [*shlex.split(option), *(["rloo"] if option == "--method" else [])])
