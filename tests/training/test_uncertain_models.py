"""Posteriors of trained reward models in three geometries, and what is said of the uncertainty of held-out pairs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rlhf_jax.data.batches import pad_preferences
from rlhf_jax.data.tokenization import Demonstration, Preference
from rlhf_jax.evaluation import uncertainty
from rlhf_jax.evaluation.statistics import bootstrap_rows
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.posterior import posterior_scorer
from rlhf_jax.training import uncertain_models
from rlhf_jax.training.completion_scores import CompletionScores
from rlhf_jax.training.kind_options import KindOptions
from rlhf_jax.training.sources import Source
from rlhf_jax.training.uncertain_models import (
    finish_kind,
    pair_scorer,
    posterior_params,
    score_pairs,
    uncertainty_rows,
)

PAIRS, LENGTH = 6, 5


@dataclasses.dataclass(frozen=True)
class Options(KindOptions):
    kind: str = "posterior"
    batch_size: int = 4


@pytest.fixture(scope="module")
def source(tiny_config):
    return Source(folder=None, options={}, config=tiny_config, tokenizer=None, pad=0, longest=16)


@pytest.fixture(scope="module")
def trained(tiny_config):
    return init_reward_model(tiny_config, jax.random.key(0))


@pytest.fixture(scope="module")
def pairs():
    generator = np.random.default_rng(0)

    def one():
        tokens = generator.integers(1, 16, LENGTH).astype(np.int32)
        return Demonstration(tokens, np.arange(LENGTH) >= 2)

    return [Preference(one(), one(), margin=0.0) for _ in range(PAIRS)]


def features_of(config, trained, pairs):
    scorer = jax.jit(reward_scorer(config))
    found = []
    for name in ("chosen", "rejected"):
        tokens = np.stack([getattr(pair, name).tokens for pair in pairs])
        found.append(np.asarray(scorer(trained, tokens, np.ones_like(tokens, bool)).features, np.float64))
    return found


@pytest.mark.parametrize("geometry", ["fisher", "pairs", "responses"])
def test_doubt_is_a_standard_deviation_in_every_geometry(source, tiny_config, trained, pairs, geometry):
    weight, width = 0.7, tiny_config.width
    found = posterior_params(Options(geometry=geometry, regularisation=weight), source, trained, pairs)
    chosen, rejected = features_of(tiny_config, trained, pairs)
    kernel = np.asarray(trained["head"]["kernel"], np.float64)
    fisher, seen = weight * np.eye(width), weight * np.eye(width)
    for first, second in zip(chosen, rejected, strict=True):
        difference = first - second
        probability = 1.0 / (1.0 + np.exp(-difference @ kernel))
        fisher += probability * (1.0 - probability) * np.outer(difference, difference)
        seen += {
            "fisher": probability * (1.0 - probability) * np.outer(difference, difference),
            "pairs": np.outer(difference, difference),
            "responses": np.outer(first, first) + np.outer(second, second),
        }[geometry]
    cholesky = np.asarray(found.geometry.cholesky)
    np.testing.assert_allclose(cholesky @ cholesky.T, seen, rtol=1e-4, atol=1e-4)
    # The mean over the directions of M of the variance that the Laplace posterior N(phi, fisher^-1) has there.
    expected = np.sqrt(np.trace(seen @ np.linalg.inv(fisher)) / width)
    assert float(found.radius) == pytest.approx(expected, rel=1e-4)
    assert float(found.offset) == 0.0


def test_what_a_posterior_knows_of_a_margin(source, tiny_config, trained, pairs):
    """Both completions share one head: the variance of a margin is z^T M^-1 z of the difference z of their features."""
    params = posterior_params(Options(), source, trained, pairs)
    params = params.replace(radius=2.0 * params.radius)
    scores = pair_scorer(posterior_scorer(tiny_config))
    sides = score_pairs(scores, params, pairs, lambda items: pad_preferences(items, LENGTH, 0), 4)
    chosen, rejected = features_of(tiny_config, trained, pairs)
    factor = np.asarray(params.geometry.cholesky, np.float64)
    inverse = 4.0 * np.linalg.inv(factor @ factor.T)
    exact = np.sqrt(np.einsum("nd,de,ne->n", chosen - rejected, inverse, chosen - rejected))
    for side, features in zip(sides, (chosen, rejected), strict=True):
        expected = np.sqrt(np.einsum("nd,de,ne->n", features, inverse, features))
        np.testing.assert_allclose(np.linalg.norm(side.whitened, axis=0), expected, rtol=1e-4)
        np.testing.assert_allclose(side.epistemic, expected, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(sides[0].whitened - sides[1].whitened, axis=0), exact, rtol=1e-3)
    rows = {row["name"]: row["mean"] for row in uncertainty_rows(*sides)}
    assert rows["epistemic standard deviation of a held-out margin"] == pytest.approx(exact.mean(), rel=1e-3)
    independent = uncertainty.pair_uncertainty(sides[0].epistemic, sides[1].epistemic)
    assert not np.allclose(independent, exact, rtol=0.01)


def test_a_singular_posterior_leaves_the_plain_model_behind(source, trained, pairs, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(uncertain_models, "export_reward_model", lambda *arguments: written.append(arguments))
    options = Options(geometry="pairs", regularisation=1e-12)
    with pytest.raises(ValueError, match="covariance of the differences of 3 pairs and 8 features is singular"):
        finish_kind(options, tmp_path, source, trained, None, pairs[:3], pairs, lambda items: None)
    assert written == [(tmp_path, source, trained)]


def test_rows_by_hand(monkeypatch):
    """Margins 2, 1, -1, 0.5; the wrong pair is the second most doubtful by members and by size of its margin."""
    monkeypatch.setattr(uncertainty, "bootstrap_rows", functools.partial(bootstrap_rows, draws=20))
    chosen = CompletionScores(
        mean=np.array([2.0, 1.0, 0.0, 0.5], np.float32),
        epistemic=np.array([1.0, 2.0, 3.0, 2.0], np.float32),
        members=np.array([[2.5, 1.0, 1.0, 2.0], [1.5, 1.0, -1.0, -1.0]], np.float32),
    )
    rejected = CompletionScores(
        mean=np.array([0.0, 0.0, 1.0, 0.0], np.float32),
        epistemic=np.zeros(4, np.float32),
        members=np.array([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]], np.float32),
    )
    means = {row["name"]: row["mean"] for row in uncertainty_rows(chosen, rejected)}
    assert means == {
        "epistemic standard deviation of a held-out completion": pytest.approx(1.0),
        "epistemic standard deviation of a held-out margin": pytest.approx((0.5 + 0.0 + 1.0 + 1.5) / 4),
        "epistemic: AUROC of errors": pytest.approx(2 / 3),
        "epistemic: area under accuracy-coverage": pytest.approx((1 + 1 + 2 / 3 + 3 / 4) / 4),
        "-|margin|: AUROC of errors": pytest.approx((1 / 2 + 1) / 3),
        "-|margin|: area under accuracy-coverage": pytest.approx((1 + 3 / 4 + 2 / 3 + 3 / 4) / 4),
    }
    alone = [CompletionScores(mean=side.mean, aleatoric=side.epistemic) for side in (chosen, rejected)]
    means = {row["name"]: row["mean"] for row in uncertainty_rows(*alone)}
    assert means["aleatoric standard deviation of a held-out margin"] == pytest.approx(2.0)
    assert means["aleatoric: AUROC of errors"] == 1.0
    assert means["-|margin|: AUROC of errors"] == pytest.approx(1 / 2)
