"""PURM's scorer, and the overlap of reward distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.heads import apply_head
from rlhf_jax.models.transformer import init_trunk
from rlhf_jax.rewards.probabilistic import ProbabilisticParams, mean_head, mean_overlap, probabilistic_scorer
from rlhf_jax.types import Score


def test_scores_are_mean_and_deviation_of_the_reward(config):
    mask = jnp.arange(6)[None] < jnp.array([6, 2, 4])[:, None]
    tokens = jax.random.randint(jax.random.key(0), (3, 6), 1, 12, jnp.int32)
    keys = jax.random.split(jax.random.key(1), 3)
    head = {"kernel": 2.0 * jax.random.normal(keys[1], (8, 2)), "bias": jnp.array([0.5, 2.0])}
    params = ProbabilisticParams(trunk=jax.jit(init_trunk, static_argnums=0)(config, keys[0]), head=head)
    score = jax.jit(probabilistic_scorer(config))(params, tokens, mask)
    outputs = np.asarray(score.features, np.float64) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    assert (outputs[:, 1] > 2).any() and (outputs[:, 1] < 2).any()
    np.testing.assert_allclose(score.mean, outputs[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score.aleatoric, np.exp(np.clip(outputs[:, 1], -5, 2)), rtol=1e-4)
    np.testing.assert_allclose(apply_head(mean_head(head), score.features), score.mean, rtol=1e-5, atol=1e-6)
    assert score.epistemic is None and score.members is None


def test_the_overlap_with_reference_responses_is_a_loop():
    score = Score(mean=jnp.array([0.0, 5.0]), aleatoric=jnp.array([1.0, 0.5]))
    reference = Score(mean=jnp.array([0.0, 2.0, -1.0]), aleatoric=jnp.array([1.0, 1.0, 3.0]))
    expected = np.zeros(2)
    for place, (mean, s) in enumerate(zip(score.mean, score.aleatoric, strict=True)):
        for other, t in zip(reference.mean, reference.aleatoric, strict=True):
            both = float(s) ** 2 + float(t) ** 2
            expected[place] += np.sqrt(2 * s * t / both) * np.exp(-((float(mean) - float(other)) ** 2) / 4 / both) / 3
    np.testing.assert_allclose(mean_overlap(score, reference), expected, rtol=1e-5)
    assert expected[0] > expected[1]
    with pytest.raises(ValueError, match="use a scorer that fills"):
        mean_overlap(Score(mean=jnp.zeros(2)), reference)
