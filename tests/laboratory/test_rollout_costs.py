"""Responses of unequal lengths, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.laboratory.rollout_costs import drawn_both_ways, geometric_lengths, share_identical
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sampling.queue import InTurns
from rlhf_jax.types import Prompts, Rollout

CONFIG = ModelConfig(
    vocab_size=32, width=8, layers=1, heads=2, key_value_heads=1, feed_forward_width=8, context_length=32
)


def test_one_token_in_so_many_ends_a_response():
    found = geometric_lengths(CONFIG, mean_length=10, longest=20, slots=3)
    assert found.stop_tokens == (0, 10, 20, 30)
    assert (found.max_new_tokens, found.decode) == (20, InTurns(3))


def test_the_share_of_identical_responses_counts_rows():
    def rollout(tokens):
        tokens = jnp.array(tokens, jnp.int32)
        zeros = jnp.zeros(tokens.shape)
        prompts = Prompts(tokens=tokens, mask=tokens > 0, index=jnp.arange(len(tokens), dtype=jnp.int32))
        return Rollout(
            prompts=prompts,
            tokens=tokens,
            mask=tokens > 0,
            logprob=zeros,
            sampling_logprob=zeros,
            finished=jnp.ones(len(tokens), bool),
        )

    parts = [rollout([[1, 2], [3, 4]]), rollout([[5, 6], [7, 8]])]
    assert share_identical(rollout([[1, 2], [3, 4], [5, 6], [7, 8]]), parts) == 1.0
    assert share_identical(rollout([[1, 2], [3, 0], [5, 6], [0, 8]]), parts) == 0.5


def test_batches_are_cut_from_the_queue_in_order():
    queue, plain = drawn_both_ways(CONFIG, rows=4, prompt_length=3, slots=2, mean_length=2, longest=5)
    parts = plain()
    assert [part.prompts.index.tolist() for part in parts] == [[0, 1], [2, 3]]
    np.testing.assert_array_equal(queue().prompts.tokens, np.concatenate([part.prompts.tokens for part in parts]))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="mean length of 33 needs as many tokens"):
        geometric_lengths(CONFIG, 33, 40)
    with pytest.raises(ValueError, match="do not split into batches of 3"):
        drawn_both_ways(CONFIG, 4, 3, 3, 2, 5)
