"""Modular sums: the checker by hand and by enumeration, prompts, and the teacher who slips."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.synthetic.modular import (
    ModularSums,
    modular_demonstrations,
    modular_prompts,
    modular_reward,
    modular_scorer,
    read_tokens,
    running_sums,
    step_labels,
)

TASK = ModularSums(modulus=7, terms=4)
STOP, PAD = TASK.stop_token, TASK.pad_token
PROMPT = [5, 4, 6, 2, 7]  # 5 + 4 + 6 + 2 =, whose steps are 2 1 3


def judged(*responses):
    tokens = jnp.array([PROMPT + list(response) for response in responses])
    mask = tokens != PAD
    return step_labels(TASK, tokens, mask).tolist(), modular_reward(TASK, tokens, mask).tolist()


def test_steps_and_rewards_by_hand():
    labels, rewards = judged(
        [2, 1, 3, STOP, PAD],  # right
        [2, 4, 6, STOP, PAD],  # a slip that is carried on
        [2, 4, 3, STOP, PAD],  # a slip that is made up for
        [2, 1, 3, 3, STOP],  # one step too many
        [2, 1, STOP, PAD, PAD],  # one too few
        [STOP, PAD, PAD, PAD, PAD],
        [0, 0, 0, STOP, PAD],
    )
    assert labels == [
        [True, True, True],
        [True, False, False],
        [True, False, True],
        [True, True, True],
        [True, True, False],
        [False, False, False],
        [False, False, False],
    ]
    np.testing.assert_allclose(rewards, [1, 1 / 6, 1 / 3 + 1 / 2, 1 / 2, 1 / 3, 0, 0], rtol=1e-6)


def test_only_the_right_steps_and_then_the_stop_earn_everything():
    """All responses of a tiny task, with what follows a stop made padding."""
    task = ModularSums(modulus=3, terms=3)
    prompt, ids = [2, 1, 2, 3], range(task.vocabulary)
    responses = set()
    for response in itertools.product(ids, repeat=task.response_length):
        ended = [place for place, token in enumerate(response) if token == task.stop_token][:1]
        kept = response[: ended[0] + 1] if ended else response
        responses.add(kept + (task.pad_token,) * (task.response_length - len(kept)))
    responses = sorted(responses)
    tokens = jnp.array([prompt + list(response) for response in responses])
    rewards = np.asarray(modular_reward(task, tokens, tokens != task.pad_token))
    assert rewards.min() == 0.0
    assert [responses[place] for place in np.flatnonzero(rewards >= 1.0)] == [(0, 2, task.stop_token, task.pad_token)]


def test_a_masked_token_counts_for_nothing():
    tokens = jnp.array([[*PROMPT, 2, 1, 3, STOP, PAD]] * 2)
    mask = jnp.ones(tokens.shape, bool).at[1, len(PROMPT) + 2 :].set(False)
    np.testing.assert_allclose(modular_reward(TASK, tokens, mask), [1.0, 1 / 3], rtol=1e-6)
    score = modular_scorer(TASK)((), tokens, mask)
    np.testing.assert_array_equal(score.mean, modular_reward(TASK, tokens, mask))
    assert score.members is None


def test_prompts_are_different_sums():
    prompts = modular_prompts(np.random.default_rng(0), ModularSums(modulus=3, terms=3), 27)
    assert len(np.unique(np.asarray(prompts.tokens), axis=0)) == 27
    assert (prompts.tokens[:, -1] == 3).all()
    assert prompts.mask.all()
    assert sorted(prompts.index.tolist()) == list(range(27))


@pytest.mark.parametrize("slips", [0.0, 0.5, 1.0])
def test_the_teacher_slips_as_often_as_asked(slips):
    data = modular_demonstrations(np.random.default_rng(0), TASK, 4000, slips)
    right = step_labels(TASK, data.tokens, data.mask)
    kept = 1.0 - slips + slips / TASK.modulus  # a random number is right now and then
    # The first step is right at that rate; the others carry on from the one before.
    carried = [np.asarray(data.tokens[:, 4 + step]) for step in range(1, 4)]
    numbers = [np.asarray(data.tokens[:, step]) for step in range(4)]
    before = [numbers[0], *carried[:2]]
    rates = [np.mean((before[step] + numbers[step + 1]) % TASK.modulus == carried[step]) for step in range(TASK.steps)]
    np.testing.assert_allclose(rates, kept, atol=0.03)
    if slips == 0.0:
        assert right.all()
        assert (modular_reward(TASK, data.tokens, data.mask) == 1.0).all()
    assert (data.loss_mask == (data.mask & (jnp.arange(10) >= 5)[None])).all()
    assert (data.tokens[:, 8] == STOP).all()


def test_sums_are_those_of_numpy():
    prompts = modular_prompts(np.random.default_rng(1), TASK, 50).tokens
    expected = np.stack([np.asarray(prompts)[:, : count + 2].sum(axis=1) % 7 for count in range(3)], axis=1)
    np.testing.assert_array_equal(running_sums(TASK, prompts), expected)


def test_sequences_read_as_sums():
    assert read_tokens(TASK, np.array([*PROMPT, 2, 1, 3, STOP, PAD])) == "5 + 4 + 6 + 2 = 2 1 3 ."
    assert read_tokens(TASK, np.array([2, 1, STOP])) == "2 1 ."


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ModularSums(modulus=1), "modulo 1"),
        (lambda: ModularSums(terms=1), "1 terms"),
        (lambda: modular_prompts(np.random.default_rng(0), TASK, 7**4 + 1), "have 2401"),
        (lambda: modular_demonstrations(np.random.default_rng(0), TASK, 1, 1.5), "slips = 1.5"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
