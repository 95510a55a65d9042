"""Training on pools of tasks, at sizes of seconds."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.icl.claims import diversity
from rlhf_jax.icl.claims.diversity import linear_layer_on_pools, tiled_pools, transformer_on_pools
from rlhf_jax.icl.models.transformer import VectorModel
from rlhf_jax.icl.training import Fit


def test_a_linear_layer_reaches_the_minimiser_of_its_pool():
    found = linear_layer_on_pools(
        sizes=(1, 2, 8), dimension=3, length=6, seeds=2, steps=300, batch=256, tolerance=0.1, share=0.05
    )
    assert [one for one in found.comparisons if not one.passed] == []
    assert found.fresh.shape == found.predicted_pool.shape == (3, 2)
    assert (found.pool >= found.predicted_pool).all()  # the minimiser of that very risk
    assert found.fresh[0].mean() > found.fresh[-1].mean()


TINY = dict(
    dimension=2,
    length=4,
    seeds=2,
    model=VectorModel(token_width=2, outputs=1, context_length=7, layers=1, width=8),
    steps=40,
    rate=2e-2,
    batch=16,
    prompts=128,
)


def test_a_transformer_learns_its_one_task_and_errors_are_those_of_bayes_and_the_distance_to_it():
    found = transformer_on_pools(sizes=(1, 4), **TINY)
    assert [one for one in found.comparisons if not one.passed] == []
    assert len(found.comparisons) == 2 * 2 + 1
    assert all(values.shape == (2, 2) for values in found[2:])
    # A pool of one task: Bayes over it is the target.
    np.testing.assert_allclose(found.pool_to_bayes[0], found.pool_error[0], rtol=1e-4)


def test_a_network_that_was_not_trained_fails_the_row_of_training_only(monkeypatch):
    monkeypatch.setattr(diversity, "fit", lambda loss, params, *rest: Fit(params, params, jnp.zeros(1)))
    found = transformer_on_pools(sizes=(1,), **TINY)
    failed = [one.quantity for one in found.comparisons if not one.passed]
    assert failed == ["trained transformer, M=1: error/d on its task, below that of ridge (the tolerance)"]


def test_a_small_pool_is_the_beginning_of_the_largest_repeated():
    pools = np.asarray(tiled_pools((2, 4), seeds=3, dimension=2))
    assert pools.shape == (2, 3, 4, 2)
    np.testing.assert_array_equal(pools[0], np.concatenate([pools[1][:, :2]] * 2, axis=1))
    assert len(np.unique(pools[1].reshape(-1, 2), axis=0)) == 12


@pytest.mark.parametrize(
    ("sizes", "sentence"), [((0, 4), "pool sizes is 0"), ((3, 4), "3 does not divide"), ((), "pool sizes are empty")]
)
def test_pools_that_cannot_be_tiled_are_refused(sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        linear_layer_on_pools(sizes=sizes)
