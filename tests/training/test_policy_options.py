"""The KL that options ask for, and rewards and rules that do not go together."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from rlhf_jax.training.policy_options import PolicyOptions, check_rewards_named, kl_of


def test_the_coefficient_stays_or_follows_a_target():
    stays, follows = kl_of(PolicyOptions(kl=0.2)), kl_of(PolicyOptions(kl=0.2, target_kl=1.0, kl_horizon=100))
    assert float(stays.update(stays.init(), jnp.float32(5.0), 10)) == pytest.approx(0.2)
    assert float(follows.update(follows.init(), jnp.float32(5.0), 10)) == pytest.approx(0.2 * 1.02)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rule": "uncertainty_weighted"}, "needs at least 2 reward models, or one of a kind among"),
        ({"rule": "worst_case", "penalty": 0.5}, "the rule worst_case has no coefficient"),
        ({"rule": "advpo", "reward": ("module:f",)}, "--rule advpo and --penalty are for reward models"),
        ({"penalty": 0.5, "reward": ("module:f",)}, "--reward module:f is a function: leave them out"),
        ({"rule": "par", "regularisation": 2.0}, "--rule par does not use --regularisation"),
        ({"reference_responses": 2}, "--rule mean does not use --reference-responses"),
    ],
)
def test_a_rule_that_does_not_go_with_the_rewards_is_named(change, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        check_rewards_named(dataclasses.replace(PolicyOptions(reward=(str(tmp_path),)), **change))


def test_advpo_without_a_linear_head_is_refused_before_anything_is_read(tmp_path):
    made_with = {"weights": "", "template": None, "tokenizer": None}
    description = {"kind": "lora_ensemble", "options": {}, "made_with": made_with}
    description |= {"dtype": "float32", "tensors": ""}
    (tmp_path / "uncertainty.json").write_text(json.dumps(description))
    options = PolicyOptions(reward=(str(tmp_path),), rule="advpo", preferences=Path("pairs"))
    with pytest.raises(ValueError, match="the rule advpo is for one linear head"):
        check_rewards_named(options)


def test_what_goes_together_is_let_through(tmp_path):
    folder = (str(tmp_path),)
    advpo = PolicyOptions(reward=folder, rule="advpo", preferences=Path("pairs"), reference_responses=3)
    par = PolicyOptions(reward=folder, rule="par", reference_responses=3)
    several = PolicyOptions(reward=("a", "b"), rule="uncertainty_weighted", penalty=0.1)
    for options in (advpo, par, several, PolicyOptions(reward=("module:f",))):
        check_rewards_named(options)
