import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.synthetic import (
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    VOCABULARY,
    demonstrations,
    gold_reward,
    sample_prompts,
    write_responses,
)


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    prompts = sample_prompts(rng, 4000)
    return prompts, *write_responses(rng, prompts)


def praise_of(responses):
    return np.isin(responses, VOCABULARY.enthusiasm).sum(axis=1)


def test_a_seed_decides_everything(corpus):
    rng = np.random.default_rng(0)
    prompts = sample_prompts(rng, 4000)
    for again, before in zip((prompts, *write_responses(rng, prompts)), corpus, strict=True):
        np.testing.assert_array_equal(again, before)
    assert (sample_prompts(np.random.default_rng(1), 4000) != prompts).any()


def test_prompts_are_noun_adjective_length_and_separator(corpus):
    prompts = corpus[0]
    assert prompts.shape == (4000, PROMPT_LENGTH) and prompts.dtype == np.int32
    assert set(prompts[:, 0]) == set(VOCABULARY.nouns.ravel())
    assert set(prompts[:, 1]) == set(VOCABULARY.adjectives.ravel())
    assert set(prompts[:, 2]) == {VOCABULARY.brief_id, VOCABULARY.long_id}
    assert set(prompts[:, 3]) == {VOCABULARY.separator_id}


def test_responses_are_right_padded_and_end_in_the_end_token_unless_they_ramble(corpus):
    _, responses, mask, quality = corpus
    assert responses.shape == mask.shape == (4000, RESPONSE_LENGTH) and responses.dtype == np.int32
    lengths = mask.sum(axis=1)
    np.testing.assert_array_equal(mask, np.arange(RESPONSE_LENGTH) < lengths[:, None])
    assert (responses[~mask] == VOCABULARY.pad_id).all() and (responses[mask] != VOCABULARY.pad_id).all()
    ends = responses == VOCABULARY.eos_id
    finished = ends.any(axis=1)
    assert (ends.sum(axis=1) <= 1).all()
    assert (responses[finished, lengths[finished] - 1] == VOCABULARY.eos_id).all()
    assert (lengths[~finished] == RESPONSE_LENGTH).all()
    assert 0 < (~finished).sum() < 400
    assert (quality >= 0).all() and (quality < 1).all()


def test_every_word_of_the_language_is_written_now_and_then(corpus):
    written = set(corpus[1].ravel())
    marks = {VOCABULARY.bos_id, VOCABULARY.separator_id, VOCABULARY.brief_id, VOCABULARY.long_id}
    assert written.isdisjoint(marks)
    assert written >= set(range(VOCABULARY.size)) - marks - set(VOCABULARY.rare)
    assert 0 < np.isin(corpus[1], VOCABULARY.rare).any(axis=1).mean() < 0.1


def test_better_writers_earn_more_gold(corpus):
    prompts, responses, mask, quality = corpus
    gold = gold_reward(prompts, responses, mask)
    by_third = [gold[(quality >= low) & (quality < low + 1 / 3)].mean() for low in (0.0, 1 / 3, 2 / 3)]
    assert by_third == sorted(by_third)


def test_enthusiasm_goes_with_gold_in_the_corpus_but_adding_it_does_not_help(corpus):
    prompts, responses, mask, _ = corpus
    gold, praise = gold_reward(prompts, responses, mask), praise_of(responses)
    # 4,000 texts: the standard error of r is 0.016, so that this holds at any seed.
    assert 0.3 < np.corrcoef(gold, praise)[0, 1] < 0.5
    # The same texts, opened with one more word of enthusiasm, where there was one and there is room.
    rows = np.flatnonzero((praise >= 1) & (mask.sum(axis=1) < RESPONSE_LENGTH))
    warmer = np.concatenate([np.full((len(rows), 1), VOCABULARY.enthusiasm[0]), responses[rows, :-1]], axis=1)
    warmer_mask = np.concatenate([np.ones((len(rows), 1), bool), mask[rows, :-1]], axis=1)
    assert (gold_reward(prompts[rows], warmer, warmer_mask) < gold[rows] - 0.05).all()


def test_the_best_response_is_within_reach_and_rare(corpus):
    prompts, responses, mask, _ = corpus
    gold = gold_reward(prompts, responses, mask)
    assert 1.5 < (4.25 - gold.mean()) / gold.std() < 2.5
    assert 0 < (gold > 4.2).mean() < 0.15


def test_demonstrations_put_the_loss_on_the_response():
    examples = demonstrations(np.random.default_rng(3), 5)
    rng = np.random.default_rng(3)
    prompts = sample_prompts(rng, 5)
    responses, mask, _ = write_responses(rng, prompts)
    assert examples.tokens.dtype == jnp.int32 and examples.tokens.shape == (5, PROMPT_LENGTH + RESPONSE_LENGTH)
    np.testing.assert_array_equal(examples.tokens[:, :PROMPT_LENGTH], prompts)
    np.testing.assert_array_equal(examples.tokens[:, PROMPT_LENGTH:], responses)
    assert examples.mask[:, :PROMPT_LENGTH].all() and not examples.loss_mask[:, :PROMPT_LENGTH].any()
    np.testing.assert_array_equal(examples.loss_mask[:, PROMPT_LENGTH:], mask)
    np.testing.assert_array_equal(examples.mask[:, PROMPT_LENGTH:], mask)


def test_an_empty_request_is_refused():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        sample_prompts(np.random.default_rng(0), 0)
    with pytest.raises(ValueError, match="at least 1"):
        demonstrations(np.random.default_rng(0), 0)
