"""Failures of rewards and evaluation in other stacks (design.md section 9): each faulty variant is kept here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.losses.advantages import whiten
from rlhf_jax.losses.credit import overlong_penalty
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.reward import preference_accuracy
from rlhf_jax.rewards.python_reward import call_reward_function
from rlhf_jax.training.held_out import bootstrap_row, pair_accuracy

ROWS = PartitionSpec("data")
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def on_each_device(function):
    """`function` of the rows of each of 8 devices, and the mean of what comes out: how the faults are made."""
    apart = jax.shard_map(lambda *rows: function(*rows)[None], mesh=MESH, in_specs=ROWS, out_specs=ROWS)
    return lambda *rows: np.mean(jax.block_until_ready(jax.jit(apart)(*rows)), axis=0)


def on_all_devices(function):
    """`function` of rows that lie on 8 devices, as a step on a mesh computes it."""
    rows_of = NamedSharding(MESH, ROWS)
    return lambda *rows: np.asarray(jax.block_until_ready(jax.jit(function)(*jax.device_put(rows, rows_of))))


# 9.1 Float rewards truncated to int: those of a Python function too.


def rewards_in_a_buffer_of_tokens(function, prompts, completions):
    """The fault: the buffer of rewards takes the dtype of the token ids."""
    buffer = np.zeros(len(prompts), np.int32)
    buffer[:] = function(prompts, completions)
    return buffer


def test_9_1_float_rewards_of_a_function_are_not_truncated():
    def given(prompts, completions):
        return [0.9, -1.6]

    np.testing.assert_allclose(call_reward_function(given, ["a", "b"], ["c", "d"], {}), [0.9, -1.6], rtol=1e-6)
    assert rewards_in_a_buffer_of_tokens(given, ["a", "b"], ["c", "d"]).tolist() == [0, -1]


# 9.8 Length penalties counted in characters; the caller's list mutated.


def penalty_by_characters(texts, longest, buffer):
    """The fault: the limit is a number of tokens, and the length one of characters."""
    return overlong_penalty(jnp.array([len(text) for text in texts], jnp.int32), longest, buffer)


def test_9_8_a_length_penalty_counts_tokens():
    """A long word of one token, and a row of short ones: by characters it is the wrong one that is punished."""
    texts, mask = ["incomprehensibilities", "a b c d e f"], jnp.array([[1] + [0] * 5, [1] * 6], bool)
    lengths = mask.sum(axis=1, dtype=jnp.int32)
    assert lengths.tolist() == [len(text.split()) for text in texts]
    assert overlong_penalty(lengths, longest=8, buffer=4).tolist() == [0.0, -0.5]
    assert penalty_by_characters(texts, longest=8, buffer=4).tolist() == [-1.0, -1.0]
    assert penalty_by_characters(texts, longest=20, buffer=10).tolist() == pytest.approx([-1.0, -0.1])


def call_with_the_lists_of_the_caller(function, prompts, completions, columns):
    """The fault: the function gets the very lists of the batch."""
    return function(prompts=prompts, completions=completions, **columns)


def test_9_8_the_callers_lists_are_not_mutated():
    def strips(prompts, completions, answers):
        for place, chat in enumerate(completions):
            chat[-1]["content"] = chat[-1]["content"].strip()
            answers[place].sort()
        prompts.clear()
        return [float(chat[-1]["content"] in answer) for chat, answer in zip(completions, answers, strict=True)]

    def batch():
        return ["p", "q"], [[{"content": " x "}], [{"content": "y"}]], {"answers": [["z", "x"], ["w"]]}

    ours, faulty = batch(), batch()
    assert call_reward_function(strips, *ours).tolist() == [1.0, 0.0]
    assert ours == batch()
    assert call_with_the_lists_of_the_caller(strips, *faulty) == [1.0, 0.0]
    assert faulty == ([], [[{"content": "x"}], [{"content": "y"}]], {"answers": [["x", "z"], ["w"]]})


# 9.10 A mean of per-device means where lengths differ; 9.11 statistics per device instead of globally.

LENGTHS = np.array([7, 1, 3, 5, 2, 6, 1, 4])
VALUES = jnp.asarray(np.arange(56, dtype=np.float32).reshape(8, 7) / 8)
MASK = jnp.asarray(np.arange(7) < LENGTHS[:, None])


def test_9_10_a_mean_over_devices_is_that_of_one():
    """The tokens of all devices weigh the same; in a mean of means those of short rows weigh more."""
    expected = float(mean(VALUES, MASK))
    assert on_all_devices(mean)(VALUES, MASK) == pytest.approx(expected, rel=1e-6)
    assert abs(float(on_each_device(mean)(VALUES, MASK)) - expected) > 0.05


def test_9_11_advantages_are_whitened_over_all_devices():
    expected = np.asarray(whiten(VALUES, MASK))
    np.testing.assert_allclose(on_all_devices(whiten)(VALUES, MASK), expected, rtol=1e-5, atol=1e-6)
    apart = jax.shard_map(whiten, mesh=MESH, in_specs=ROWS, out_specs=ROWS)
    faulty = np.asarray(jax.block_until_ready(jax.jit(apart)(VALUES, MASK)))
    assert np.abs(faulty - expected).max() > 0.5


# 9.13 A pass count computed as `int(n * accuracy)`; ties counted as wins; strict or loose comparison left unsaid.


def passes_from_a_share(n, accuracy):
    """The fault: a count is made from a share, which a float holds only nearly."""
    return int(n * accuracy)


def test_9_13_passes_are_counted_and_not_made_from_a_share():
    """29 of 100: 100 times 0.29 is 28.999…; what is counted is the rows themselves, and their number is kept."""
    passed = np.arange(100) < 29
    row = bootstrap_row("passed", "", np.mean, passed.astype(float))
    assert row["n"] == 100 and round(row["n"] * row["mean"]) == passed.sum() == 29
    assert passes_from_a_share(100, row["mean"]) == 28
    wrong = [count for count in range(101) if passes_from_a_share(100, count / 100) != count]
    assert wrong == [29, 57, 58]


def strict(chosen, rejected):
    """The fault: a tie is lost, and nobody says so."""
    return float((chosen > rejected).mean())


def loose(chosen, rejected):
    """The fault: a tie is won, and nobody says so."""
    return float((chosen >= rejected).mean())


@pytest.mark.parametrize("tied", [0, 2, 6])
def test_9_13_a_tie_is_half_a_win_so_that_sides_can_be_swapped(tied):
    """A model that gives every response the same score is right half the time, not always and not never."""
    chosen = np.array([3.0, 2.0, 1.0, 5.0, 4.0, 6.0], np.float32)
    rejected = np.where(np.arange(6) < tied, chosen, np.array([1.0, 3.0, 2.0, 1.0, 1.0, 1.0], np.float32))
    for share in (pair_accuracy, lambda *sides: float(preference_accuracy(*map(jnp.asarray, sides)).mean())):
        assert share(chosen, rejected) + share(rejected, chosen) == pytest.approx(1.0)
        middle = (strict(chosen, rejected) + loose(chosen, rejected)) / 2
        assert share(chosen, rejected) == pytest.approx(middle)
    for share in (strict, loose):
        assert (share(chosen, rejected) + share(rejected, chosen) == pytest.approx(1.0)) == (tied == 0)


def test_9_13_ties_in_bfloat16_are_no_wins():
    """Rewards of 64 and more are halves apart in bfloat16: most pairs tie, and the loose comparison wins them all."""
    chosen = jnp.linspace(64.0, 64.2, 8)
    rejected = chosen + 0.01
    assert preference_accuracy(chosen, rejected).tolist() == [0.0] * 8
    rounded = [np.asarray(side.astype(jnp.bfloat16).astype(jnp.float32)) for side in (chosen, rejected)]
    assert loose(*rounded) == 1.0 and pair_accuracy(*rounded) == 0.5
    assert preference_accuracy(*(side.astype(jnp.bfloat16) for side in (chosen, rejected))).tolist() == [0.5] * 8
