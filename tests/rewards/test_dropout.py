import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.dropout import DropoutParams, draw_masks, dropout_scorer, masked_heads
from rlhf_jax.rewards.ensemble import member_offset
from rlhf_jax.rewards.linear_ensemble import apply_heads


@pytest.fixture(scope="module")
def scorer(config):
    return jax.jit(dropout_scorer(config))


def every_mask(width: int, values: tuple[float, ...]) -> jax.Array:
    """All masks of equally likely values, [values ** width, width]: no draws, exact moments."""
    return jnp.array(list(itertools.product(values, repeat=width)), jnp.float32)


@pytest.fixture(scope="module")
def model(config):
    model = jax.jit(init_reward_model, static_argnums=0)(config, jax.random.key(1))
    return {**model, "head": {**model["head"], "bias": jnp.float32(0.75)}}


@pytest.fixture(scope="module")
def alone(model, config, tokens, mask):
    return jax.jit(reward_scorer(config))(model, tokens, mask)


def params_of(model, masks, offset=None) -> DropoutParams:
    offset = jnp.zeros(len(masks)) if offset is None else offset
    return DropoutParams(trunk=model["trunk"], head=model["head"], masks=masks, offset=offset)


def test_members_are_the_head_under_each_mask(model, alone, tokens, mask, scorer):
    masks = draw_masks(jax.random.key(2), samples=5, width=8, rate=0.3)
    score = scorer(params_of(model, masks), tokens, mask)
    kernel = np.asarray(model["head"]["kernel"])
    each = np.stack([(np.asarray(alone.features) * mask) @ kernel + 0.75 for mask in np.asarray(masks)])
    np.testing.assert_allclose(score.members, each, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score.epistemic, each.std(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score.mean, alone.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(score.features, alone.features, rtol=1e-5, atol=1e-6)


def test_moments_over_all_masks_are_those_of_the_formula(model, alone, tokens, mask, scorer):
    """Rate 1/2: the 2^8 masks are equally likely, so mean and variance over them are exact."""
    score = scorer(params_of(model, every_mask(8, (0.0, 2.0))), tokens, mask)
    products = np.asarray(alone.features, np.float64) * np.asarray(model["head"]["kernel"], np.float64)
    np.testing.assert_allclose(score.members.mean(axis=0), alone.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.square(score.epistemic), np.square(products).sum(axis=1), rtol=1e-4)


def test_the_variance_of_another_rate():
    """Rate 1/4: of four equally likely values one is 0 and three are 4/3; p / (1 - p) = 1/3."""
    third = 4.0 / 3.0
    head = {"kernel": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.float32(0.25)}
    features = jnp.array([[3.0, 1.5, -2.0]])
    scores = apply_heads(masked_heads(head, every_mask(3, (0.0, third, third, third))), features)
    np.testing.assert_allclose(scores.mean(), 3.0 - 3.0 - 1.0 + 0.25, rtol=1e-4)
    np.testing.assert_allclose(scores.var(), (9.0 + 9.0 + 1.0) / 3.0, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_drawn_masks_drop_at_the_rate_and_have_mean_one(rate):
    masks = np.asarray(draw_masks(jax.random.key(3), samples=400, width=50, rate=rate))
    np.testing.assert_allclose(np.unique(masks), [0.0, 1.0 / (1.0 - rate)], rtol=1e-6)
    error = 5 * (rate * (1 - rate) / masks.size) ** 0.5  # five standard errors
    np.testing.assert_allclose((masks == 0).mean(), rate, atol=error)
    np.testing.assert_allclose(masks.mean(), 1.0, atol=error / (1 - rate))
    assert (masks[0] != masks[1]).any()


def test_offsets_centre_members_and_mean_alike(model, alone, tokens, mask, scorer):
    masks = every_mask(8, (0.0, 2.0))
    raw = scorer(params_of(model, masks), tokens, mask)
    score = scorer(params_of(model, masks, member_offset(raw.members)), tokens, mask)
    np.testing.assert_allclose(score.members.mean(axis=1), 0.0, atol=1e-5)
    np.testing.assert_allclose(score.mean, alone.mean - alone.mean.mean(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score.mean, score.members.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_scores_depend_on_the_sequence_only(model, tokens, mask, scorer):
    params = params_of(model, draw_masks(jax.random.key(2), samples=4, width=8, rate=0.3))
    score, again = scorer(params, tokens, mask), scorer(params, tokens[::-1], mask[::-1])
    np.testing.assert_allclose(again.members[:, ::-1], score.members, rtol=1e-5, atol=1e-6)


def test_bad_rates_and_too_few_samples_are_refused():
    for rate in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=r"the dropout rate is .*; it must be above 0 and below 1"):
            draw_masks(jax.random.key(0), samples=4, width=8, rate=rate)
    with pytest.raises(ValueError, match="1 dropout masks give no standard deviation"):
        draw_masks(jax.random.key(0), samples=1, width=8, rate=0.1)
