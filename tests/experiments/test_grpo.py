"""GRPO and its relatives of a tiny model, from files to a folder that `transformers` loads; and what is refused."""

import dataclasses
import json
import sys
from types import ModuleType

import jax
import pytest

from rlhf_jax.algorithms.methods import METHODS
from rlhf_jax.models.huggingface import load_policy
from rlhf_jax.training.metrics import read_metrics


@pytest.fixture
def function(monkeypatch):
    """The module `tiny_rewards`, whose function `reward` remembers its calls and goes wrong at call `wrong`."""
    module = ModuleType("tiny_rewards")
    module.calls, module.wrong = [], None

    def reward(prompts, completions, **columns):
        module.calls.append((prompts, columns))
        rewards = [sum(letter < "\x80" for letter in text) / max(len(text), 1) for text in completions]
        return rewards[1:] if len(module.calls) == module.wrong else rewards

    module.reward = reward
    monkeypatch.setitem(sys.modules, "tiny_rewards", module)
    return module


@pytest.fixture
def config(script, tiny_model, demonstrations, tmp_path):
    return script.Config(
        model=str(tiny_model),
        data=demonstrations,
        reward=("tiny_rewards:reward",),
        out=tmp_path / "run",
        steps=2,
        batch_size=2,
        responses=2,
        learning_rate=1e-3,
        most_held_out=4,
        log_every=1,
        save_every=1,
        samples=2,
        response_length=6,
    )


def test_a_wrong_number_of_rewards_ends_the_run_before_the_update_and_it_goes_on_from_there(
    script, config, function, capsys
):
    at_start = 2  # calls: 4 held-out prompts, 2 a batch; then one call an update
    function.wrong = at_start + 2
    with pytest.raises(ValueError, match="returned 3 rewards for 4 completions"):
        script.main(config)
    assert not (config.out / "model").exists()
    prompts, columns = function.calls[at_start]
    assert len(prompts) == 4 and prompts[0] == prompts[1] != prompts[2] == prompts[3]
    assert columns["completion"][0] == columns["completion"][1]

    assert "within --logprob-bound 0.02: --old-logprob rollout" in capsys.readouterr().out
    function.wrong = None
    found = json.loads((config.out / "old_logprob.json").read_text())
    assert 0 < found["gap"] < 0.02 and found["chosen"] == "rollout"
    summary = script.main(dataclasses.replace(config, resume=True))
    assert "--old-logprob" not in capsys.readouterr().out  # it goes on with what was found
    assert all(check["pass"] for check in summary["checks"])
    updates = [line for line in read_metrics(config.out / "metrics.jsonl") if "objective/scores" in line]
    assert [line["step"] for line in updates] == [1, 2]
    assert {"objective/equal_groups", "time/score", "loss/kl", "grad_norm"} <= set(updates[1])
    assert updates[0]["policy/max_logprob_gap"] < 1e-3
    start, end = (load_policy(folder)[1] for folder in (config.model, config.out / "model"))
    assert any(jax.tree.leaves(jax.tree.map(lambda old, new: bool((old != new).any()), start, end)))


def test_remax_of_an_adapter_with_preference_as_reward_drawn_in_turns_in_eight_bits(script, config, rewards, capsys):
    config = dataclasses.replace(
        config,
        reward=rewards[:1],
        rule="par",
        reference_responses=2,
        method="remax",
        responses=1,
        adapter="lora",
        rank=2,
        slots=1,
        cache="int8",
        weights="int8",
        logprob_bound=1e-4,
        length_buckets=2,
    )
    summary = script.main(config)
    (last,) = [
        line for line in read_metrics(config.out / "metrics.jsonl") if line.get("step") == 2 and "grad_norm" in line
    ]
    assert "above --logprob-bound 0.0001: --old-logprob recomputed" in capsys.readouterr().out
    assert last["policy/max_logprob_gap"] > 1e-4 and last["val/first_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert 0.0 < last["rewards/transformed"] < 1.0 and last["loss/policy"] != 0.0
    names = {row["name"]: row["mean"] for row in summary["rows"]}
    assert names["held-out reward before"] != last["rewards/transformed"]
    assert (config.out / "adapter" / "adapter_config.json").is_file()

    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(config.out / "model").config.vocab_size == 257


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": "grop"}, "no method 'grop': choose one of grpo, dr_grpo, dapo"),
        ({"responses": 1}, "--responses is 1: give grpo 2 or more, for they are compared with each other"),
        ({"method": "remax", "responses": 0}, "--responses is 0: give remax 1 or more"),
        ({"method": "rloo", "clip_low": -0.1}, "--clip-low is -0.1: give 0 or more"),
        ({"clip_high": float("nan")}, "--clip-high is nan: give 0 or more"),
        ({"method": "cispo", "clip_low": 0.1}, "--method cispo does not use --clip-low"),
        ({"method": "remax", "dual_clip": 3.0}, "--method remax does not use --dual-clip"),
        ({"method": "remax", "passes": 2}, "--method remax corrects nothing for steps away"),
        ({"method": "rloo", "kl_in": "loss"}, "the mean gradient of k1 is 0"),
        ({"oversample": 2}, "--method grpo does not use --oversample: leave it out, or choose dapo"),
        ({"method": "dapo", "oversample": 4}, r"--batch-size 2 is no multiple of --oversample 4"),
        ({"oversample": 0}, "--oversample is 0: give 1 or more"),
        ({"temperature": 0.0}, "--temperature is 0.0: give more than 0"),
        ({"missing_eos_penalty": float("nan")}, "--missing-eos-penalty is nan: give 0 or more"),
        ({"target_kl": 1.0, "kl": 0.0}, "--target-kl multiplies the coefficient, and --kl 0 stays 0"),
        ({"target_kl": 1.0, "kl_horizon": 3}, "--kl-horizon is 3: give at least the 4 responses of an update"),
        ({"kl_horizon": 99}, "--kl-horizon is for --target-kl"),
        ({"reward": ("tiny_rewards:reward", "a")}, "--reward tiny_rewards:reward is a function, which stands alone"),
        ({"overlong_buffer": 7}, "overlong_buffer is 7: give 0 to 6"),
        ({"kl": -1.0}, "--kl is -1.0: give 0 or more"),
        ({"minibatches": 3}, "--batch-size 2 makes 4 responses an update, which do not split into --minibatches 3"),
        ({"minibatches": 2, "accumulate": 4}, "do not split into --minibatches 2 x --accumulate 4"),
        ({"rule": "par"}, "--reward tiny_rewards:reward is a function"),
        ({"slots": 0}, "--slots is 0: give 1 or more"),
        ({"length_buckets": 0}, "--length-buckets is 0: give 1 or more"),
        ({"logprob_bound": 0.0}, "--logprob-bound is 0.0: give more than 0"),
        ({"importance_cap": 3.0}, "--importance-cap is for --old-logprob truncated"),
        ({"old_logprob": "recomputed", "logprob_bound": 0.1}, "--logprob-bound is for --old-logprob auto and rollout"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_read(script, config, function, change, sentence):
    """There is no such model, which would be the next complaint."""
    with pytest.raises(ValueError, match=sentence):
        script.main(dataclasses.replace(config, model="nowhere", **change))
    assert not config.out.exists() and not function.calls


def test_every_method_has_its_own_number_of_responses(script):
    drawn = {name: script.options_of(script.Config(method=name)) for name in METHODS}
    assert {name for name, options in drawn.items() if options.samples == 1} == {"reinforce++", "remax"}
    assert script.Config(method="remax").rows == 2 * 16 and script.Config(method="gspo").rows == 8 * 16
    changed = script.Config(method="dapo", oversample=4, mask_unfinished=False, clip_high=0.5, dual_clip=2.0)
    assert changed.rows == 8 * 4
    pieces = script.options_of(changed).method
    assert (pieces.mask_unfinished, pieces.clip_high, pieces.surrogate.keywords) == (False, 0.5, {"dual_clip": 2.0})
