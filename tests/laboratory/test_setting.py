import jax
import numpy as np
import pytest

from rlhf_jax.laboratory.setting import gold_of, repeated, sample


def test_every_trunk_is_one_of_its_own(options, setting):
    embeddings = np.asarray(setting.trunks["embed"]["embedding"])
    assert embeddings.shape[0] == options.members
    assert (embeddings[0] != embeddings[1]).any()


def test_repetitions_of_a_prompt_are_sampled_independently(setting):
    prompts = repeated(setting.world.prompts, np.zeros(6, int))
    assert prompts.index.tolist() == list(range(6))
    taken = sample(setting, prompts, jax.random.key(0))
    assert len({np.asarray(row).tobytes() for row in taken.tokens}) > 1


@pytest.mark.parametrize("chunk", [1, 4, 5, 11, 100])
def test_samples_do_not_depend_on_the_chunk(setting, chunk):
    prompts = repeated(setting.world.prompts, np.arange(11))
    expected = sample(setting, prompts, jax.random.key(0), chunk=11)
    found = sample(setting, prompts, jax.random.key(0), chunk=chunk)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.prompts.index, expected.prompts.index)
    np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)


def test_gold_is_asked_of_the_response_with_its_mask(setting, initial):
    world = setting.world._replace(gold=lambda prompts, responses, mask: mask.sum(axis=1).astype(float))
    np.testing.assert_array_equal(gold_of(world, initial), np.asarray(initial.mask).sum(axis=1))
