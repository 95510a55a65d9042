"""The ellipsoid against a slow loop, and what AdvPO cannot work with."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data.tokenization import Demonstration, Preference
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.members import Member
from rlhf_jax.training.adversarial import (
    AdversarialOptions,
    check_adversarial,
    check_not_adversarial,
    ellipsoid,
)
from rlhf_jax.training.sources import Source


@pytest.fixture(scope="module")
def source(tiny_config):
    """A model of the letters a to n, with an EOS token 15."""
    letters = {letter: place for place, letter in enumerate("abcdefghijklmn ")} | {"</s>": 15}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [])), eos_token="</s>")
    return Source(Path("nowhere"), {}, tiny_config, tokenizer, pad=0, longest=8)


def demonstration(*tokens, prompt=1):
    return Demonstration(np.array(tokens, np.int32), np.arange(len(tokens)) >= prompt)


@pytest.mark.parametrize("what", ["final_norm", "pre_norm"])
def test_the_ellipsoid_is_that_of_a_loop_over_chosen_and_rejected(source, tiny_config, what):
    pairs = [
        Preference(demonstration(1, 2, 3), demonstration(1, 4), 0.0),
        Preference(demonstration(5, 6), demonstration(5, 7, 8, 9), 0.0),
        Preference(demonstration(2, 2, 2), demonstration(2, 3, 3), 0.0),
    ]
    scorer = reward_scorer(tiny_config, what)
    member = Member(tiny_config, init_reward_model(tiny_config, jax.random.key(0)), scorer)
    scorer = jax.jit(scorer)

    def features(one):
        tokens = np.zeros((1, 8), np.int32)
        tokens[0, : one.length] = one.tokens
        return np.asarray(scorer(member.params, jnp.asarray(tokens), jnp.arange(8)[None] < one.length).features[0])

    head = np.asarray(member.params["head"]["kernel"], np.float64)
    matrix, fisher = 0.5 * np.eye(8), 0.5 * np.eye(8)
    for pair in pairs:
        chosen, rejected = features(pair.chosen).astype(np.float64), features(pair.rejected).astype(np.float64)
        matrix += np.outer(chosen, chosen) + np.outer(rejected, rejected)
        share = 1 / (1 + np.exp(-(chosen - rejected) @ head))
        fisher += share * (1 - share) * np.outer(chosen - rejected, chosen - rejected)
    shape, radius = ellipsoid(member, source, pairs, 2, 0.5, multiple=2.0)
    np.testing.assert_allclose(shape.cholesky @ shape.cholesky.T, matrix, rtol=1e-4, atol=1e-4)
    assert float(radius) ** 2 == pytest.approx(2.0 * np.trace(np.linalg.solve(fisher, matrix)), rel=1e-4)
    assert float(ellipsoid(member, source, pairs, 2, 0.5, value=9.0, multiple=2.0)[1]) == 3.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"preferences": None}, "--rule advpo needs --preferences FILE"),
        ({"regularisation": 0.0}, "--regularisation is 0.0: give more than 0"),
        ({"advpo_value": -1.0}, "--advpo-value is -1.0: give 0 or more"),
        ({"advpo_ema": 1.0}, "ema is 1.0; give a decay between 0 and 1"),
    ],
)
def test_what_advpo_cannot_work_with_is_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_adversarial(dataclasses.replace(AdversarialOptions(preferences=Path("pairs")), **change))


def test_what_only_advpo_reads_is_refused_beside_another_rule():
    check_not_adversarial(AdversarialOptions(), "mean")
    with pytest.raises(ValueError, match="--rule par does not use --advpo-ema: leave it out, or choose advpo"):
        check_not_adversarial(AdversarialOptions(advpo_ema=0.9), "par")
