"""Work of the steps that are timed, by hand; the benchmark's tests run them."""

import dataclasses

import pytest

from rlhf_jax.laboratory.work import Sizes, drawing_work, training_work
from rlhf_jax.laboratory.workloads import workloads
from rlhf_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=8, width=4, layers=1, heads=2, key_value_heads=1, feed_forward_width=8, context_length=16
)
SIZES = Sizes(
    prompt_length=2,
    response_length=2,
    generated=(1, 3),
    prompts=2,
    samples=3,
    sequence_length=4,
    demonstrations=2,
    pairs=2,
    scored=2,
)
PROJECTIONS = 288.0  # of a token
SLOT = 16.0  # of attention, a token and slot
LOGITS = 64.0  # of a position


def test_prompts_are_read_once_for_all_their_responses():
    read = 2 * 2 * (PROJECTIONS + 2 * SLOT)
    drawn = 6 * (PROJECTIONS + (2 + 1 + 1) * SLOT + 2 * LOGITS)  # the prompt, the room for one token, itself
    assert drawing_work(CONFIG, SIZES, rows=6, prompts=2) == read + drawn


def test_generation_has_a_row_a_batch():
    found = workloads(CONFIG, SIZES)
    assert [name for name in found if "generate" in name] == ["generate, batch 1", "generate, batch 3"]
    assert found["generate, batch 3"]().tokens == 6


@pytest.mark.parametrize("again", ["none", "full"])
def test_what_is_computed_again_is_not_needed(again):
    work = training_work(dataclasses.replace(CONFIG, remat=again), rows=2, tokens=4, scored=3)
    forward = 2 * 4 * (PROJECTIONS + 4 * SLOT)
    assert work.flops - work.again == 3 * (forward + 2 * 3 * LOGITS)
    assert work.again == 2 * 3 * LOGITS + (0 if again == "none" else forward - 2 * 4 * 2 * 4 * 8)


def test_a_step_of_grpo_by_hand():
    """Two prompts are read, six responses drawn, read by the reference and trained on."""
    found = workloads(CONFIG, SIZES)["GRPO"]()
    forward = 6 * (4 * (PROJECTIONS + 4 * SLOT) + 2 * LOGITS)
    assert found.flops - found.again == drawing_work(CONFIG, SIZES, rows=6, prompts=2) + 4 * forward
    assert found.tokens == 6 * 4


def test_a_step_is_its_rollout_and_its_update():
    found = workloads(CONFIG, SIZES)
    for name in ("GRPO", "PPO"):
        step, rollout, update = (found[part]() for part in (name, f"{name} rollout", f"{name} update"))
        assert step.flops == rollout.flops + update.flops
        assert (step.again, step.tokens) == (update.again, update.tokens)
    separate, shared = found["PPO"](), found["PPO, shared trunk"]()
    assert separate.flops - shared.flops == 3 * 6 * 4 * (PROJECTIONS + 4 * SLOT)
    assert found["rollout score"]().tokens == 6 * 4
