"""Finite pools of tasks: how many different ones must training show before a model learns more than those?

Tasks of training are drawn, with replacement, from a pool of M that was drawn once; those of the test come from the
pool again, or anew from its prior (`regression.draw_regression`), as in Raventos, Paul, Chen and Ganguli 2023 (arXiv
2306.15063). A pool may be smaller than a batch.
"""

import jax
from jaxtyping import Array, Float, Key

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.tasks.regression import Change, Linear, Regression, RegressionPrompt, draw_function, draw_prompt


def draw_pool(key: Key[Array, ""], size: int, dimension: int, prior_scale: float = 1.0) -> Float[Array, "M d"]:
    """Draws the weights of M linear tasks, w_i ~ N(0, prior_scale^2 I).

    Args:
        key: random key; one key is one pool.
        size: tasks in the pool, M.
        dimension: features d.
        prior_scale: standard deviation of each weight, > 0.

    Returns:
        Weights, [M, d].

    Raises:
        ValueError: a size or dimension below 1, or a prior scale that is not above 0.
    """
    at_least("number of tasks in the pool", size, 1)
    return draw_function(key, Regression(dimension, prior_scale=prior_scale), size).weights


def choose_tasks(key: Key[Array, ""], pool: Float[Array, "M ..."], count: int) -> Float[Array, "B ..."]:
    """Draws tasks from a pool, uniformly and with replacement.

    Args:
        key: random key.
        pool: tasks on axis 0: weights of linear functions [M, d], or class means of mixtures [M, c, d].
        count: tasks B, as many or more than the pool has.

    Returns:
        Rows of the pool, [B, ...].

    Raises:
        ValueError: `count` is below 1, or the pool is empty.
    """
    at_least("number of tasks", count, 1)
    at_least("number of tasks in the pool", pool.shape[0], 1)
    return pool[jax.random.randint(key, (count,), 0, pool.shape[0])]


def draw_pool_prompts(
    key: Key[Array, ""],
    setting: Regression,
    pool: Float[Array, "M d"],
    count: int,
    length: int,
    change: Change | None = None,
) -> RegressionPrompt:
    """Draws prompts whose tasks are those of a pool.

    Args:
        key: random key.
        setting: of linear functions; says how inputs and noise are drawn.
        pool: weights, [M, d].
        count: prompts B.
        length: examples in the context, N.
        change: of the inputs, see `regression.draw_prompt`.

    Returns:
        The prompts; their weights are rows of the pool.

    Raises:
        ValueError: the setting is not one of linear functions or has another dimension than the pool, or `count` or
            `length` is below 1.
    """
    if setting.kind != "linear":
        raise ValueError(f"the functions are of the kind {setting.kind}: a pool of weights is one of linear functions.")
    if setting.dimension != pool.shape[1]:
        raise ValueError(
            f"the setting has {setting.dimension} dimensions and the pool {pool.shape[1]}: give them the same."
        )
    task_key, prompt_key = jax.random.split(key)
    return draw_prompt(prompt_key, setting, Linear(weights=choose_tasks(task_key, pool, count)), length, change)
