"""Reward models named on a command line: what is refused before they are read, and how they compute."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rewards.members import Member
from rlhf_jax.training import reward_folders, reward_models
from rlhf_jax.training.kind_options import KindOptions, check_kind
from rlhf_jax.training.options import TrainingOptions
from rlhf_jax.training.reward_folders import JSON_FILE, RewardFolder, kind_in, options_in, scorer_in
from rlhf_jax.training.reward_models import check_member, check_no_prompt_gate, check_rule, load_members, read_reward

SMALL = ModelConfig(
    vocab_size=12, width=8, layers=1, heads=2, key_value_heads=1, feed_forward_width=12, context_length=16
)


@dataclasses.dataclass(frozen=True)
class Options(TrainingOptions, KindOptions):
    smoothing_rate: float | None = None
    dropout: float = 0.0
    label_smoothing: float = 0.0
    centring: float = 0.0


def described(folder, kind, **options) -> str:
    """A folder that says of which kind its reward model is."""
    made_with = {"weights": "", "template": None, "tokenizer": None}
    description = {"kind": kind, "options": options, "made_with": made_with}
    description |= {"dtype": "float32", "tensors": ""}
    (folder / JSON_FILE).write_text(json.dumps(description))
    return str(folder)


def test_a_rule_must_be_one_that_the_models_can_serve(tmp_path):
    for rule in ("uncertainty_weighted", "lower_confidence_bound", "worst_case"):
        with pytest.raises(ValueError, match=f"the rule {rule} needs at least 2 reward models.*of kind bradley_terry"):
            check_rule(rule, [str(tmp_path)])
        check_rule(rule, ["one", "two"])
        with pytest.raises(ValueError, match="there is no folder nowhere"):
            check_rule(rule, ["nowhere"])
    for rule in ("mean", "single"):
        check_rule(rule, [str(tmp_path)])
    posterior = described(tmp_path, "posterior")
    check_rule("lower_confidence_bound", [posterior])
    with pytest.raises(ValueError, match=r"the rule worst_case needs at least 2.*of kind posterior"):
        check_rule("worst_case", [posterior])
    ranges = described(tmp_path, "gaussian_ensemble", statistic="range")
    check_rule("uncertainty_weighted", [ranges])
    with pytest.raises(ValueError, match=r"worst_case needs members, and .* gives the statistic range"):
        check_rule("worst_case", [ranges])
    check_rule("worst_case", [described(tmp_path, "gaussian_ensemble")])


def test_a_hub_id_has_the_kind_of_the_folder_that_it_is_downloaded_to(monkeypatch, tmp_path):
    import huggingface_hub

    described(tmp_path, "gaussian", gate="prompt", prompt_length=7)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: {"owner/name": str(tmp_path)}[name])
    assert (kind_in("owner/name"), options_in("owner/name")["prompt_length"]) == ("gaussian", 7)
    with pytest.raises(ValueError, match=r"advpo is for one linear head .* of kind gaussian"):
        check_rule("advpo", ["owner/name"])
    with pytest.raises(ValueError, match="must end in column 7"):
        check_no_prompt_gate("owner/name")
    described(tmp_path, "linear_ensemble")
    check_rule("worst_case", ["owner/name"])
    check_kind(Options(kind="lora_ensemble", adapter="lora", model="owner/name"))
    assert scorer_in("owner/name", SMALL).__qualname__.startswith("linear_ensemble_scorer")


@pytest.mark.parametrize(
    ("kind", "options", "linear"),
    [
        ("posterior", {}, True),
        ("ensemble", {"lead": 0}, True),
        ("ensemble", {}, False),
        ("lora_ensemble", {}, False),
        ("gaussian", {}, False),
        ("quantile", {"centre": "median"}, False),
    ],
)
def test_advpo_is_for_a_mean_that_is_one_linear_head(kind, options, linear, tmp_path):
    folder = described(tmp_path, kind, **options)
    check_rule("par", [folder])
    if linear:
        return check_rule("advpo", [folder])
    with pytest.raises(ValueError, match=f"advpo is for one linear head .* of kind {kind}, is not: give another model"):
        check_rule("advpo", [folder])


def test_the_rule_decides_which_model_of_a_folder_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(reward_models, "check_member", lambda *given: None)
    monkeypatch.setattr(reward_models, "load_reward_folder", lambda *_: RewardFolder("posterior", SMALL, None, "whole"))
    monkeypatch.setattr(reward_models, "load_reward_model", lambda *_: (SMALL, "ordinary"))
    monkeypatch.setattr(reward_models, "scorer_in", lambda *_: None)
    heads_read = []
    monkeypatch.setattr(reward_models, "reward_scorer", lambda config, features: heads_read.append(features))
    folder = described(tmp_path, "posterior", features="pre_norm")
    read = {rule: read_reward([folder], rule, None, SMALL, None, 10)[0].params for rule in ("mean", "par", "advpo")}
    assert read == {"mean": "whole", "par": "whole", "advpo": "ordinary"}
    assert heads_read == ["pre_norm"]


def test_a_gate_that_reads_one_column_as_the_end_of_prompts_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(reward_models, "check_member", lambda *given: None)
    check_no_prompt_gate(described(tmp_path, "gaussian", gate="response"))
    folder = described(tmp_path, "gaussian", gate="prompt", prompt_length=7)
    for refuse in (check_no_prompt_gate, lambda folder: load_members([folder], SMALL, None, 10)):
        with pytest.raises(ValueError, match="must end in column 7 of a batch, and here prompts are of any length"):
            refuse(folder)


def tokenizer(vocabulary):
    return SimpleNamespace(get_vocab=lambda: {token: id for id, token in enumerate(vocabulary)})


@pytest.mark.parametrize(
    ("known", "config", "sentence"),
    [
        ("abd", SMALL, "another vocabulary than the policy .1 tokens differ: 'c' is 2 for the policy and no id for"),
        ("acb", SMALL, "2 tokens differ: 'b' is 1 for the policy and 2 for the reward model"),
        ("abc", dataclasses.replace(SMALL, vocab_size=11), "knows 11 tokens and the policy 12"),
        ("abc", dataclasses.replace(SMALL, context_length=9), "reads at most 9 tokens, fewer than the 10"),
    ],
)
def test_a_reward_model_must_be_able_to_read_the_policy(monkeypatch, known, config, sentence):
    monkeypatch.setattr(reward_models, "load_config", lambda folder: config)
    monkeypatch.setattr(reward_folders, "load_tokenizer", lambda folder: tokenizer(known))
    with pytest.raises(ValueError, match=sentence):
        check_member("FOLDER", SMALL, tokenizer("abc"), 10)
    monkeypatch.setattr(reward_models, "load_config", lambda folder: SMALL)
    monkeypatch.setattr(reward_folders, "load_tokenizer", lambda folder: tokenizer("abc<"))
    check_member("FOLDER", SMALL, tokenizer("abc"), 10)


def test_a_reward_is_a_function_or_folders(monkeypatch):
    rest = ("mean", None, SMALL, tokenizer("abc"), 10)
    assert read_reward(["math:hypot"], *rest) is math.hypot
    monkeypatch.setattr(
        reward_models, "load_members", lambda folders, *_, **__: [Member(SMALL, folder) for folder in folders]
    )
    assert [member.params for member in read_reward(["one", "two"], *rest)] == ["one", "two"]
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        check_member("nowhere", SMALL, tokenizer("abc"), 10)


def test_reward_models_compute_as_the_policy_does(monkeypatch, tmp_path):
    loaded = lambda folder, *_: RewardFolder("bradley_terry", SMALL, None, {})  # noqa: E731
    monkeypatch.setattr(reward_models, "check_member", lambda *given: None)
    monkeypatch.setattr(reward_models, "load_reward_folder", loaded)
    monkeypatch.setattr(reward_models, "scorer_in", lambda folder, config: config)
    policy = dataclasses.replace(SMALL, width=2 * SMALL.width, attention="ring", attention_block=3)
    (member,) = load_members([str(tmp_path)], policy, None, 10)
    assert member.config == member.scorer == dataclasses.replace(SMALL, attention="ring", attention_block=3)
