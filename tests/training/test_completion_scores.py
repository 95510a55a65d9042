"""Scores that are put together from those of several models, and folders that have none to give."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf_jax.data.formats import Rows
from rlhf_jax.training.completion_scores import CompletionScores, as_ensemble, check_head, read_completions
from rlhf_jax.training.sources import Source


def test_an_ensemble_does_not_depend_on_what_members_add():
    generator = np.random.default_rng(0)
    raw = generator.normal(size=(3, 6)).astype(np.float32)
    raw[1, 2] = np.nan
    found, moved = (
        as_ensemble([CompletionScores(one) for one in raw + add]) for add in (0.0, np.float32([[1], [5], [-9]]))
    )
    read = np.array([0, 1, 3, 4, 5])
    centred = raw[:, read] - raw[:, read].mean(axis=1, keepdims=True)
    for one in (found, moved):
        np.testing.assert_allclose(one.mean[read], centred.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(one.epistemic[read], centred.std(axis=0), atol=1e-5)
        np.testing.assert_allclose(one.members[:, read], centred, atol=1e-5)
        assert np.isnan(one.mean[2]) and np.isnan(one.members[:, 2]).all()


def test_members_that_part_on_new_data_disagree_there():
    score = np.random.default_rng(0).normal(size=6).astype(np.float32)
    known = [CompletionScores(score), CompletionScores(score + 3.0)]
    new = [CompletionScores(score), CompletionScores(score + 7.0)]
    np.testing.assert_allclose(as_ensemble(new, known).epistemic, 2.0, atol=1e-5)
    np.testing.assert_allclose(as_ensemble(known, known).epistemic, 0.0, atol=1e-5)
    np.testing.assert_allclose(as_ensemble(new, known).mean, score - score.mean() + 2.0, atol=1e-5)


def test_aleatoric_deviations_are_mixed_by_the_law_of_total_variance():
    """Of many draws of a random member's reward, the variance is that of the means and the mean of the variances."""
    means = np.float32([[0.0, 4.0, np.nan], [1.0, 3.0, 0.0]])
    deviations = np.float32([[3.0, 1.0, np.nan], [4.0, 7.0, 2.0]])
    models = [CompletionScores(mean, aleatoric=own) for mean, own in zip(means, deviations, strict=True)]
    found = as_ensemble(models)
    np.testing.assert_allclose(found.aleatoric, [np.sqrt((9 + 16) / 2), np.sqrt((1 + 49) / 2), np.nan], rtol=1e-6)
    draws = np.random.default_rng(0).normal(found.members[:, 0], deviations[:, 0], (100_000, 2))
    assert draws.var() == pytest.approx(found.epistemic[0] ** 2 + found.aleatoric[0] ** 2, rel=0.02)
    assert as_ensemble([models[0], CompletionScores(means[1])]).aleatoric is None


def test_a_folder_without_a_head_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"model.norm.weight": np.ones(4, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no reward head .*its scores would be random"):
        check_head(str(tmp_path))
    save_file({"score.weight": np.ones((1, 4), np.float32)}, tmp_path / "model.safetensors")
    check_head(str(tmp_path))
    with pytest.raises(ValueError, match="there is no folder"):
        check_head(str(tmp_path / "nowhere"))


class Letters:
    """A tokenizer of letters, which puts BOS (1) before a text if it has one."""

    eos_token_id = 2

    def __init__(self, bos):
        self.bos_token_id = bos

    def __call__(self, texts, add_special_tokens, **options):
        first = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [[*first, *map(ord, text)] for text in texts]}


@pytest.mark.parametrize(
    ("bos", "prompt", "completion", "read"),
    [
        (None, "abc", "de", "abcde."),  # as long as may be
        (None, "abcdefghi", "xy", "ghixy."),  # a prompt that leaves no room gives what the completion needs
        (None, "abcdefghi", "uvwxyz", "ghiuv."),  # and half of it to one that is too long itself
        (None, "ab", "uvwxyz", "abuvw."),  # a short prompt stays whole
        (None, "", "uvwxyz", "uvwxy."),
        (1, "abcdefghi", "xy", "^hixy."),  # the token that every text begins with stays
        (1, "a", "uvwxyz", "^auvw."),
    ],
)
def test_what_is_read_of_a_completion_that_is_too_long(tiny_config, bos, prompt, completion, read):
    flat = Rows("rows", "prompt_completion", False, [{"prompt": prompt, "completion": completion}], ["row"], Counter())
    config = dataclasses.replace(tiny_config, vocab_size=200)
    source = Source(folder=None, options={}, config=config, tokenizer=Letters(bos), pad=0, longest=6)
    examples, cut = read_completions(source, flat, cut=True)
    (item,) = examples.items
    assert "".join({1: "^", 2: "."}.get(token, chr(token)) for token in item.tokens) == read
    assert cut == (len(prompt) + len(completion) + (bos is not None) > 5)
    start = next(place for place, letter in enumerate(read) if letter in completion)
    assert item.loss_mask.tolist() == [max(start, 1) <= place for place in range(6)]
