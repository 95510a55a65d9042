"""URM and its ensemble: scores by hand, the gate, statistics of disagreement, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import reward_features
from rlhf_jax.models.transformer import init_trunk
from rlhf_jax.rewards.ensemble import lower_confidence_bound, worst_case
from rlhf_jax.rewards.gaussian import (
    GaussianEnsembleParams,
    GaussianParams,
    apply_gate,
    disagreement_range,
    gaussian_ensemble_scorer,
    gaussian_scorer,
    init_distribution_head,
    init_gate,
    largest_norm,
    rejection_threshold,
    total_variance,
)
from rlhf_jax.types import Score

CONFIG = ModelConfig(
    vocab_size=12, width=8, layers=1, heads=2, key_value_heads=1, feed_forward_width=12, context_length=16,
    initializer_range=0.5,
)  # fmt: skip
K, MEMBERS = 3, 3
LENGTHS = jnp.array([7, 3, 5])
MASK = jnp.arange(7)[None] < LENGTHS[:, None]
TOKENS = jax.random.randint(jax.random.key(0), (3, 7), 1, 12, jnp.int32)


def make(key) -> GaussianParams:
    """A model whose deviations and weights depend on the text."""
    keys = jax.random.split(key, 4)
    head = init_distribution_head(CONFIG, keys[1], K)
    gate = init_gate(keys[2], CONFIG.width, K, hidden=4)
    output = {**gate["output"], "kernel": jax.random.normal(keys[3], (4, K))}
    head = {
        "kernel": 0.3 * jax.random.normal(keys[3], head["kernel"].shape),
        "bias": jnp.array([0.5, 0.0, -0.5, -0.5, 0.5, 4.0]),  # the last deviation is clamped
    }
    return GaussianParams(
        trunk=init_trunk(CONFIG, keys[0]),
        attributes=head,
        gate={**gate, "output": output},
        mean=jnp.array([3.0, 2.0, 1.0]),
        scale=jnp.array([1.5, 0.5, 1.0]),
    )


@functools.cache
def members() -> GaussianParams:
    return jax.jit(jax.vmap(make))(jax.random.split(jax.random.key(1), MEMBERS))


def member(place: int) -> GaussianParams:
    return jax.tree.map(lambda leaf: leaf[place], members())


@functools.cache
def scorer_of(**options):
    return jax.jit(gaussian_scorer(CONFIG, **options))


@functools.cache
def ensemble_scorer_of(**options):
    return jax.jit(gaussian_ensemble_scorer(CONFIG, **options))


features_of = jax.jit(functools.partial(reward_features, CONFIG))


def ensemble(order=slice(None), offset=None) -> GaussianEnsembleParams:
    chosen = jax.tree.map(lambda leaf: leaf[order], members())
    count = len(chosen.mean)
    return GaussianEnsembleParams(members=chosen, offset=jnp.zeros(count) if offset is None else offset)


def by_hand(params: GaussianParams, softmax: bool, gated=None):
    """Means, deviations and weights in float64."""
    vectors = np.asarray(features_of(params.trunk, TOKENS, MASK), np.float64)
    gated = vectors if gated is None else np.asarray(gated, np.float64)
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), {"head": params.attributes, "gate": params.gate})
    outputs = vectors @ tree["head"]["kernel"] + tree["head"]["bias"]
    mean = np.asarray(params.mean) + np.asarray(params.scale) * outputs[:, :K]
    assert (outputs[:, -1] > 2).any() and (outputs[:, K:-1] < 2).all()
    deviation = np.asarray(params.scale) * np.exp(np.clip(outputs[:, K:], -5, 2))
    hidden = gated @ tree["gate"]["hidden"]["kernel"] + tree["gate"]["hidden"]["bias"]
    hidden = 1.0507009873554805 * np.where(hidden > 0, hidden, 1.6732632423543772 * np.expm1(hidden))
    weights = hidden @ tree["gate"]["output"]["kernel"] + tree["gate"]["output"]["bias"]
    if softmax:
        weights = np.exp(weights) / np.exp(weights).sum(axis=1, keepdims=True)
    return mean, deviation, weights


@pytest.mark.parametrize("softmax", [True, False])
def test_the_score_is_the_weighted_mean_of_the_attributes(softmax):
    score = scorer_of(softmax=softmax)(member(0), TOKENS, MASK)
    mean, deviation, weights = by_hand(member(0), softmax)
    np.testing.assert_allclose(score.mean, (weights * mean).sum(axis=1), rtol=1e-4, atol=1e-5)
    expected = np.sqrt((weights**2 * deviation**2).sum(axis=1))
    np.testing.assert_allclose(score.aleatoric, expected, rtol=1e-4, atol=1e-5)
    assert score.features is None and score.epistemic is None and score.members is None
    assert score.mean.dtype == score.aleatoric.dtype == jnp.float32


def test_padding_does_not_matter():
    expected = scorer_of()(member(0), TOKENS, MASK)
    widths = ((0, 0), (3, 2))
    tokens = jnp.pad(jnp.where(MASK, TOKENS, 9), widths, constant_values=9)
    found = scorer_of()(member(0), tokens, jnp.pad(MASK, widths))
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.aleatoric, expected.aleatoric, rtol=1e-4, atol=1e-5)


def test_a_gate_of_the_prompt_reads_the_prompts_last_token():
    """As of a rollout: prompts of one to three tokens end in column 2, and the states there do not see what follows."""
    begins = jnp.array([0, 2, 1])
    mask = (jnp.arange(7)[None] >= begins[:, None]) & (jnp.arange(7)[None] < jnp.array([7, 5, 4])[:, None])
    params = member(0)
    score = scorer_of(gate="prompt", prompt_length=3)
    gated = features_of(params.trunk, TOKENS[:, :3], mask[:, :3])
    weights = np.asarray(apply_gate(params.gate, gated))
    vectors = features_of(params.trunk, TOKENS, mask)
    outputs = np.asarray(vectors) @ np.asarray(params.attributes["kernel"]) + np.asarray(params.attributes["bias"])
    mean = np.asarray(params.mean) + np.asarray(params.scale) * outputs[:, :K]
    found = score(params, TOKENS, mask)
    np.testing.assert_allclose(found.mean, (weights * mean).sum(axis=1), rtol=1e-4, atol=1e-4)
    assert (np.abs(found.mean - scorer_of()(params, TOKENS, mask).mean) > 1e-3).any()


def test_softmax_weights_sum_to_one_and_a_fresh_gate_weighs_all_alike():
    vectors = jax.random.normal(jax.random.key(3), (5, CONFIG.width))
    weights = apply_gate(member(0).gate, vectors)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
    assert (weights > 0).all() and np.std(np.asarray(weights), axis=0).max() > 1e-2
    for softmax in (True, False):
        fresh = apply_gate(init_gate(jax.random.key(4), CONFIG.width, K), vectors, softmax)
        np.testing.assert_allclose(fresh, 1 / K, rtol=1e-6)


# Ensembles.


def test_an_ensemble_is_a_loop_over_its_members():
    offset = jnp.array([0.5, -1.0, 0.0])
    score = ensemble_scorer_of()(ensemble(offset=offset), TOKENS, MASK)
    each = [scorer_of()(member(place), TOKENS, MASK) for place in range(MEMBERS)]
    rewards = np.stack([one.mean for one in each]) - np.asarray(offset)[:, None]
    np.testing.assert_allclose(score.members, rewards, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score.mean, rewards.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score.epistemic, rewards.std(axis=0), rtol=1e-4, atol=1e-5)
    deviations = np.stack([one.aleatoric for one in each])
    np.testing.assert_allclose(score.aleatoric, np.sqrt((deviations**2).mean(axis=0)), rtol=1e-4, atol=1e-5)
    lead = ensemble_scorer_of(lead=1)(ensemble(offset=offset), TOKENS, MASK)
    np.testing.assert_allclose(lead.aleatoric, score.aleatoric, rtol=1e-6)
    np.testing.assert_allclose(lead.mean, rewards[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("statistic", ["deviation", "range", "norm"])
def test_the_order_of_the_members_does_not_matter(statistic):
    score = ensemble_scorer_of(statistic=statistic)
    found, turned = (score(ensemble(np.array(order)), TOKENS, MASK) for order in ([0, 1, 2], [2, 0, 1]))
    for name in ("mean", "epistemic", "aleatoric"):
        np.testing.assert_allclose(getattr(found, name), getattr(turned, name), rtol=1e-5, atol=1e-6)


def test_one_member_does_not_disagree_with_itself():
    score = ensemble_scorer_of()(ensemble(np.array([1])), TOKENS, MASK)
    np.testing.assert_array_equal(score.epistemic, 0.0)
    np.testing.assert_array_equal(disagreement_range(score.members), 0.0)


def test_range_and_norm_are_the_papers_statistics_and_the_rules_that_penalise_use_them():
    plain = ensemble_scorer_of()(ensemble(), TOKENS, MASK)
    pairs = np.abs(np.asarray(plain.members)[:, None] - np.asarray(plain.members)[None])
    ranged = ensemble_scorer_of(statistic="range")(ensemble(), TOKENS, MASK)
    np.testing.assert_allclose(ranged.epistemic, pairs.max(axis=(0, 1)), rtol=1e-4, atol=1e-5)
    norms = [np.linalg.norm(by_hand(member(place), True)[1], axis=1) for place in range(MEMBERS)]
    normed = ensemble_scorer_of(statistic="norm")(ensemble(), TOKENS, MASK)
    np.testing.assert_allclose(normed.epistemic, np.max(norms, axis=0), rtol=1e-4)
    bound = lower_confidence_bound()
    for score in (ranged, normed):
        rewards, _, metrics = bound.apply(score, None, bound.init(0.5))
        np.testing.assert_allclose(rewards, plain.mean - 0.5 * score.epistemic, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["uncertainty/mean"], score.epistemic.mean(), rtol=1e-5)
        with pytest.raises(ValueError, match="needs the scores of ensemble members"):
            worst_case().apply(score, None, ())


def test_the_total_variance_is_that_of_the_mixture():
    """Each member as two points at mu - sigma and mu + sigma: the variance of all points is the sum of both parts."""
    random = np.random.default_rng(0)
    mean, deviation = random.normal(size=(4, 6)).astype(np.float32), random.random((4, 6)).astype(np.float32)
    points = np.concatenate([mean - deviation, mean + deviation])
    np.testing.assert_allclose(total_variance(jnp.asarray(mean), jnp.asarray(deviation)), points.var(axis=0), rtol=1e-4)
    score = ensemble_scorer_of()(ensemble(), TOKENS, MASK)
    parts = jnp.stack([scorer_of()(member(place), TOKENS, MASK).aleatoric for place in range(MEMBERS)])
    whole = score.epistemic**2 + score.aleatoric**2
    np.testing.assert_allclose(whole, total_variance(score.members, parts), rtol=1e-4, atol=1e-6)


def test_the_norm_is_of_all_attributes_of_a_member():
    assert largest_norm(jnp.array([[[1.0, 2.0, 2.0]], [[2.5, 0.0, 0.0]]])).tolist() == [3.0]


def test_what_is_more_uncertain_than_a_quantile_of_the_calibration_set_is_rejected():
    uncertainty = jnp.asarray(np.random.default_rng(1).permutation(101) / 100.0, jnp.float32)
    for quantile in (0.0, 0.25, 0.999, 1.0):
        kept = float((uncertainty <= rejection_threshold(uncertainty, quantile)).mean())
        assert quantile <= kept <= quantile + 2 / 101
    with pytest.raises(ValueError, match=r"the quantile is 1\.5"):
        rejection_threshold(uncertainty, 1.5)
    with pytest.raises(ValueError, match="needs a calibration set"):
        rejection_threshold(jnp.zeros(0), 0.5)


# Bad input.


def test_impossible_options_are_errors():
    for options, message in (
        ({"gate": "prompt"}, "give prompt_length"),
        ({"prompt_length": 3}, "and for no other"),
        ({"gate": "middle"}, "the gate reads 'middle'; choose one of response, prompt"),
        ({"statistic": "outlier"}, "statistic is 'outlier'; choose one of deviation, range, norm"),
    ):
        with pytest.raises(ValueError, match=message):
            gaussian_ensemble_scorer(CONFIG, **options)
    with pytest.raises(ValueError, match="a head for 0 attributes"):
        init_distribution_head(CONFIG, jax.random.key(0), 0)
    assert isinstance(scorer_of()(member(0), TOKENS, MASK), Score)
