"""Curves and samples of a history made by hand."""

import dataclasses

import numpy as np
import pytest

from rlhf_jax.data.world import builtin_world
from rlhf_jax.laboratory.findings import curves_of, samples

UPDATES, ROLLOUTS, LENGTH = 3, 2, 4


@pytest.fixture(scope="module")
def world():
    """Gold is the sum of the tokens that count."""
    world = builtin_world(5, 1, seed=0)
    return world._replace(gold=lambda prompts, tokens, mask: (tokens * mask).sum(axis=1).astype(float))


@pytest.fixture(scope="module")
def study_options(options):
    return dataclasses.replace(
        options, methods=("PPO", "UWO"), kl_coefficients=(0.0, 0.5), updates=UPDATES, rollouts=ROLLOUTS
    )


@pytest.fixture(scope="module")
def history():
    generator = np.random.default_rng(0)
    shape = (8, UPDATES, ROLLOUTS)
    return {
        "rows": generator.integers(0, 5, shape),
        "tokens": generator.integers(4, 90, (*shape, LENGTH)),
        "mask": np.arange(LENGTH) < generator.integers(1, LENGTH + 1, (*shape, 1)),
        "proxy": generator.normal(size=shape).astype(np.float32),
        "spread": generator.random(shape).astype(np.float32),
        "uncertainty": generator.random(shape).astype(np.float32),
        "metrics": {"objective/kl": generator.random(shape[:2]).astype(np.float32)},
    }


def scale(gold):
    return (gold - 100.0) / 50.0


def test_curves_are_means_over_responses_by_method_and_coefficient(study_options, world, history):
    study, gold = curves_of(study_options, world, scale, history)
    assert list(study) == [("PPO", 0.0), ("PPO", 0.5), ("UWO", 0.0), ("UWO", 0.5)]
    for lane in range(8):
        for update in range(UPDATES):
            for response in range(ROLLOUTS):
                where = lane, update, response
                expected = (history["tokens"][where][history["mask"][where]].sum() - 100.0) / 50.0
                np.testing.assert_allclose(gold[where], expected)
    for place, runs in enumerate(study.values()):
        for seed in range(2):
            lane = 2 * place + seed
            np.testing.assert_allclose(runs.kl[seed], history["metrics"]["objective/kl"][lane], rtol=1e-6)
            for name in ("proxy", "spread", "uncertainty"):
                np.testing.assert_allclose(getattr(runs, name)[seed], history[name][lane].mean(axis=-1), rtol=1e-5)
            np.testing.assert_allclose(runs.gold[seed], gold[lane].mean(axis=-1))
            gap = np.abs(history["proxy"][lane] - gold[lane])
            np.testing.assert_allclose(runs.gap[seed], gap.mean(axis=-1))
            np.testing.assert_allclose(runs.length[seed], history["mask"][lane].sum(axis=-1).mean(axis=-1))
            u = history["uncertainty"][lane].reshape(-1).astype(np.float64)
            np.testing.assert_allclose(runs.sample_correlation[seed], np.corrcoef(u, gap.reshape(-1))[0, 1], rtol=1e-6)


def cells_of(text: str, title: str) -> list[list[str]]:
    section = text.split(title)[1].split("##")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith(("| +", "| -"))]


def test_samples_begin_with_the_best_and_the_hackiest(study_options, world, history):
    _, gold = curves_of(study_options, world, scale, history)
    text = samples(study_options, world, history, gold, count=3)
    before = cells_of(text, "Before training")
    expected = [f"{value:+.2f}" for value in gold[0, 0]]
    assert [row[0] for row in before] == expected
    best = [float(row[0]) for row in cells_of(text, "Best by gold")]
    assert best[0] == pytest.approx(gold[:2].max(), abs=0.006)
    assert best == sorted(best, reverse=True)
    hacks = [(float(row[1]), float(row[0])) for row in cells_of(text, "Hackiest at the end")]
    differences = [proxy - true for proxy, true in hacks]
    assert differences == sorted(differences, reverse=True)
    assert differences[0] == pytest.approx((history["proxy"] - gold)[:2, -1].max(), abs=0.011)


def test_no_text_is_shown_twice(study_options, world, history):
    same = history | {"tokens": np.full_like(history["tokens"], 7), "mask": np.ones_like(history["mask"])}
    _, gold = curves_of(study_options, world, scale, same)
    assert len(cells_of(samples(study_options, world, same, gold), "Best by gold")) == 1
