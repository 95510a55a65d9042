"""The quantile reward model: mean, median, spread, crossing, and its one linear head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlhf_jax.models.heads import apply_head
from rlhf_jax.models.transformer import init_trunk
from rlhf_jax.rewards.quantile import QuantileParams, even_levels, mean_head, quantile_scorer, spread


@pytest.fixture(scope="module")
def params(config) -> QuantileParams:
    keys = jax.random.split(jax.random.key(1), 3)
    heads = {"kernel": jax.random.normal(keys[1], (8, 5)), "bias": jax.random.normal(keys[2], (5,))}
    return QuantileParams(
        trunk=jax.jit(init_trunk, static_argnums=0)(config, keys[0]), quantiles=heads, levels=even_levels(5)
    )


def test_scores_are_those_of_numpy_whatever_the_order_of_the_quantiles(params, config, tokens, mask):
    scorers = (jax.jit(quantile_scorer(config, centre=name)) for name in ("mean", "median"))
    by_mean, by_median = (score(params, tokens, mask) for score in scorers)
    raw = np.asarray(by_mean.features) @ np.asarray(params.quantiles["kernel"]) + np.asarray(params.quantiles["bias"])
    assert (np.diff(raw, axis=1) < 0).any()  # random heads cross
    ordered = np.sort(raw, axis=1)
    quarters = np.array([np.interp([0.25, 0.75], params.levels, row) for row in ordered])
    np.testing.assert_allclose(by_mean.mean, raw.mean(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_median.mean, ordered[:, 2], rtol=1e-4, atol=1e-5)
    for score in (by_mean, by_median):
        np.testing.assert_allclose(score.aleatoric, np.diff(quarters)[:, 0] / 1.349, rtol=1e-3)
        assert score.epistemic is None and (score.aleatoric >= 0).all()
    np.testing.assert_allclose(apply_head(mean_head(params.quantiles), by_mean.features), by_mean.mean, rtol=1e-4)
    assert by_median.features is None


def test_the_spread_of_normal_quantiles_is_the_standard_deviation():
    levels = even_levels(50)
    quantiles = np.stack([stats.norm.ppf(levels, 2.0, deviation) for deviation in (0.5, 3.0)]).astype(np.float32)
    np.testing.assert_allclose(spread(jnp.asarray(quantiles), levels), [0.5, 3.0], rtol=1e-3)
    two = spread(jnp.array([[1.0, 0.0]]), even_levels(2))
    np.testing.assert_allclose(two, 1 / (stats.norm.ppf(0.75) - stats.norm.ppf(0.25)), rtol=1e-6)


def test_impossible_options_are_errors(config):
    with pytest.raises(ValueError, match="centre is 'mode'; choose mean or median"):
        quantile_scorer(config, centre="mode")
    with pytest.raises(ValueError, match="1 quantiles show no spread"):
        even_levels(1)
