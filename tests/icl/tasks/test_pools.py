"""Pools of tasks: prompts come from them and from nothing else, however small they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.shift import shifted
from rlhf_jax.icl.tasks.changes import scale_inputs
from rlhf_jax.icl.tasks.mixtures import draw_means
from rlhf_jax.icl.tasks.pools import choose_tasks, draw_pool, draw_pool_prompts
from rlhf_jax.icl.tasks.regression import Regression


def test_a_pool_is_drawn_from_the_prior(key):
    pool = np.asarray(draw_pool(key, 5000, 3, 0.5), np.float64)
    np.testing.assert_allclose(pool.T @ pool / 5000, 0.25 * np.eye(3), atol=4 * 0.25 * np.sqrt(2 / 5000))
    np.testing.assert_array_equal(draw_pool(key, 4, 3), draw_pool(key, 4, 3))
    assert not np.array_equal(draw_pool(key, 4, 3), draw_pool(jax.random.fold_in(key, 1), 4, 3))


@pytest.mark.parametrize("size", [1, 3, 200])
def test_prompts_have_tasks_of_the_pool_alone(size, key):
    """Also where the pool is smaller than the batch."""
    pool = draw_pool(key, size, 4)
    prompt = draw_pool_prompts(jax.random.fold_in(key, 1), Regression(4), pool, 50, 6)
    rows = {tuple(row) for row in pool.tolist()}
    assert {tuple(row) for row in prompt.weights.tolist()} <= rows
    np.testing.assert_allclose(prompt.targets, jnp.einsum("bnd,bd->bn", prompt.inputs, prompt.weights), atol=1e-5)
    np.testing.assert_allclose(prompt.query_target, (prompt.query * prompt.weights).sum(axis=1), atol=1e-5)
    if size == 3:
        assert len({tuple(row) for row in prompt.weights.tolist()}) == 3


def test_tasks_are_chosen_uniformly_with_replacement(key):
    chosen = np.asarray(choose_tasks(key, jnp.arange(5.0), 4000)).astype(int)
    np.testing.assert_allclose(np.bincount(chosen) / 4000, 0.2, atol=4 * np.sqrt(0.16 / 4000))


def test_a_pool_may_hold_class_means(key):
    pool = draw_means(key, shifted(Mixture(3, 2)), 4)
    chosen = choose_tasks(key, pool, 9)
    assert chosen.shape == (9, 2, 3)
    assert (np.asarray(chosen)[:, None] == np.asarray(pool)[None]).all(axis=(2, 3)).any(axis=1).all()


def test_noise_inputs_and_changes_are_those_of_the_setting(key):
    setting = Regression(4, inputs="uniform", noise_variance=0.25)
    prompt = draw_pool_prompts(key, setting, draw_pool(key, 2, 4), 200, 10, scale_inputs(3.0))
    assert 2.9 < np.abs(prompt.inputs).max() <= 3
    noise = np.asarray(prompt.targets - jnp.einsum("bnd,bd->bn", prompt.inputs, prompt.weights), np.float64)
    assert abs(noise.var() - 0.25) < 4 * 0.25 * np.sqrt(2 / 2000)


def test_bad_input_is_refused_in_one_sentence(key):
    with pytest.raises(ValueError, match="the number of tasks in the pool is 0"):
        draw_pool(key, 0, 3)
    with pytest.raises(ValueError, match="the dimension d is 0"):
        draw_pool(key, 3, 0)
    with pytest.raises(ValueError, match=r"the prior scale is -1\.0"):
        draw_pool(key, 3, 3, -1.0)
    pool = draw_pool(key, 3, 3)
    with pytest.raises(ValueError, match="the number of tasks is 0"):
        choose_tasks(key, pool, 0)
    with pytest.raises(ValueError, match="the number of tasks in the pool is 0"):
        choose_tasks(key, pool[:0], 2)
    with pytest.raises(ValueError, match="the setting has 4 dimensions and the pool 3: give them the same"):
        draw_pool_prompts(key, Regression(4), pool, 5, 5)
    with pytest.raises(ValueError, match="the functions are of the kind tree: a pool of weights is one of linear"):
        draw_pool_prompts(key, Regression(3, kind="tree"), pool, 5, 5)
