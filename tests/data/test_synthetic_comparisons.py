import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from rlhf_jax.data.synthetic import VOCABULARY, comparisons, gold_reward, sample_prompts, write_responses

A, B = np.array([3.0, -1.0, 0.5, 2.0]), np.array([1.0, 1.0, 0.25, 2.5])


def test_without_noise_the_better_one_is_preferred():
    labels = comparisons(np.random.default_rng(0), A, B, noise=0.0)
    assert labels.preferred.tolist() == [0, 1, 0, 1] and not labels.flipped.any()
    assert labels.preferred.dtype == np.int32


@pytest.mark.parametrize("noise", [0.25, 0.35])
def test_the_share_of_flips_is_the_noise(noise):
    n = 20_000
    gold_a, gold_b = np.zeros(n), np.ones(n)
    labels = comparisons(np.random.default_rng(1), gold_a, gold_b, noise)
    assert abs(labels.flipped.mean() - noise) < 4 * np.sqrt(noise * (1 - noise) / n)
    np.testing.assert_array_equal(labels.preferred == 0, labels.flipped)


def test_ties_fall_either_way():
    labels = comparisons(np.random.default_rng(2), np.ones(10_000), np.ones(10_000), noise=0.0)
    assert abs(labels.preferred.mean() - 0.5) < 4 * 0.5 / 100


def test_a_seed_decides_the_labels():
    first, second = (comparisons(np.random.default_rng(3), A, B, 0.35) for _ in range(2))
    np.testing.assert_array_equal(first.preferred, second.preferred)


@pytest.mark.parametrize("noise", [-0.1, 0.5, 1.0])
def test_noise_outside_its_range_is_refused(noise):
    with pytest.raises(ValueError, match="noise must lie in"):
        comparisons(np.random.default_rng(0), A, B, noise)


def test_a_gold_reward_that_is_nan_is_refused():
    with pytest.raises(ValueError, match="pair 2 is NaN"):
        comparisons(np.random.default_rng(0), A, np.where(np.arange(4) == 2, np.nan, B), 0.0)


def bag_of_words(tokens, mask):
    return np.stack([((tokens == word) & mask).sum(axis=1) for word in range(VOCABULARY.size)], axis=1).astype(float)


@pytest.mark.parametrize("seed", range(3))
def test_a_proxy_that_counts_words_falls_for_enthusiasm_and_the_gold_does_not(seed):
    rng = np.random.default_rng(seed)
    prompts = sample_prompts(rng, 1500)
    (first, first_mask, _), (second, second_mask, _) = write_responses(rng, prompts), write_responses(rng, prompts)
    gold = [gold_reward(prompts, *pair) for pair in ((first, first_mask), (second, second_mask))]
    labels = comparisons(rng, *gold, noise=0.25)
    difference = bag_of_words(second, second_mask) - bag_of_words(first, first_mask)
    weights = LogisticRegression(fit_intercept=False).fit(difference, labels.preferred).coef_[0]
    assert weights[VOCABULARY.enthusiasm].mean() > 0.1  # 0.30 ± 0.05 over seeds

    prompt = VOCABULARY.encode("fox quick brief :")[None]
    modest, hack = (
        VOCABULARY.encode(text)[None]
        for text in ("the swift fox leaps delightfully .", "wonderfully wonderfully superbly gloriously " * 3 + ".")
    )
    proxy_modest, proxy_hack = ((bag_of_words(text, text >= 0) @ weights)[0] for text in (modest, hack))
    gold_modest, gold_hack = (gold_reward(prompt, text, text >= 0)[0] for text in (modest, hack))
    assert proxy_hack > proxy_modest
    assert gold_hack < gold_modest - 5
