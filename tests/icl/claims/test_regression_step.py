"""One layer with all its matrices ends where theory says, at small sizes."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.icl.claims import regression_step as claims
from rlhf_jax.icl.models.linear_attention import SelfAttention
from rlhf_jax.icl.tasks.regression import Regression


def failed(rows):
    return [row for row in rows if not row.passed]


def test_a_layer_with_all_its_matrices_learns_the_constructed_step():
    rows = claims.constructed_step(settings=((3, 8),), seeds=2, steps=500, batch=150, rate=2e-2, evaluation=5000)
    assert len(rows) == 7 and not failed(rows), failed(rows)
    early = claims.constructed_step(settings=((3, 8),), seeds=1, steps=3, batch=10, evaluation=500)
    assert len(failed(early)) == 7


def test_one_block_is_that_of_theory_and_two_vanish():
    small = dict(variances=(0.5, 1.5), length=10, seeds=2)
    rows = claims.learnt_blocks(steps=800, batch=400, rate=2e-2, **small)
    assert len(rows) == 3 and not failed(rows), failed(rows)
    start = claims.train_all_matrices(Regression(2), 10, 2, 1, 2, 1e-6).params
    apart = np.linalg.norm(start.value[:, -1, :-1], axis=1) / np.abs(start.value[:, -1, -1])
    assert apart.max() > 5 * rows[1].tolerance  # training has removed them


def test_the_effective_matrix_is_the_one_of_the_prediction(key):
    setting = Regression(2)
    prompt = claims.draw_regression(key, setting, 3, 4)
    u, block = 0.7, jnp.array([[0.5, 0.2], [-0.3, 1.1]])
    params = SelfAttention(
        value=jax.random.normal(key, (3, 3)).at[-1].set(jnp.array([0.0, 0.0, u])),
        key_query=jax.random.normal(key, (3, 3)).at[:-1, :-1].set(block).at[-1, :-1].set(0.0),
    )
    means = np.einsum("bn,bnd->bd", prompt.targets, prompt.inputs) / 4
    expected = np.einsum("bd,de,be->b", prompt.query, claims.effective(params), means)
    np.testing.assert_allclose(claims._predictions(params, prompt, prompt.query), expected, rtol=1e-4)
