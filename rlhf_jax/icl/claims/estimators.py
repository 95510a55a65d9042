"""Estimators on sampled prompts: beside their expected errors, in the worst prompt, and where no theory is at hand."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rlhf_jax.icl.checks import at_least, positive
from rlhf_jax.icl.comparison import Comparison, standard_error, within
from rlhf_jax.icl.estimators.lasso import lasso
from rlhf_jax.icl.estimators.least_squares import averaging_prefixes, minimum_norm
from rlhf_jax.icl.estimators.neighbours import neighbour_prefixes
from rlhf_jax.icl.estimators.ridge import ridge, ridge_prefixes
from rlhf_jax.icl.estimators.task_pools import pool_prefixes
from rlhf_jax.icl.models.linear_attention import label_mean
from rlhf_jax.icl.tasks.changes import orthogonal_query, repeated_query, scale_inputs
from rlhf_jax.icl.tasks.pools import draw_pool
from rlhf_jax.icl.tasks.regression import Change, Regression, RegressionPrompt, draw_regression
from rlhf_jax.icl.theory import prefixes


def prefix_errors(
    dimension: int = 20,
    lengths: Sequence[int] = (5, 10, 15, 30, 40),
    noise_variance: float = 0.5,
    prompts: int = 2**17,
    decompositions: int = 2**13,
    seed: int = 0,
    share: float = 0.02,
) -> list[Comparison]:
    """Errors of averaging, ridge and least squares after k examples beside `theory.prefixes`, all divided by d.

    Measured is the squared error to the noiseless target: for averaging and ridge that of the prediction for example k,
    from one pass over the prompts; for least squares |w_k - w|^2, which is its mean over queries.

    Args:
        dimension: d of x ~ N(0, I) and w ~ N(0, I).
        lengths: k; least squares is compared where its error has a variance (|k - d| > 3).
        noise_variance: of the targets; least squares is also shown targets without noise.
        prompts: prompts of averaging and ridge.
        decompositions: prompts of least squares, which costs a singular value decomposition each.
        seed: of the prompts.
        share: of the prediction, that a measured error may be off by.

    Returns:
        Two to four rows a length.
    """
    d, places = dimension, np.asarray(lengths)
    noisy = Regression(d, noise_variance=noise_variance)

    @functools.partial(over_batches, prompts=prompts)
    def in_one_pass(count: int, key: Key[Array, ""]) -> dict[str, Array]:
        drawn = draw_regression(key, noisy, count, max(lengths) + 1)
        truth = jnp.einsum("bkd,bd->bk", drawn.inputs, drawn.weights, precision="highest")
        found = {
            "averaging": averaging_prefixes(drawn.inputs, drawn.targets),
            "ridge": ridge_prefixes(drawn.inputs, drawn.targets, noise_variance).predictions,
        }
        return {name: ((one - truth) ** 2)[:, places] for name, one in found.items()}

    kinds = [
        (f"least squares, {name}", k, float(known), variance)
        for name, variance in (("no noise", 0.0), ("noise", noise_variance))
        for k, known in zip(lengths, prefixes.least_squares_error(d, lengths, variance), strict=True)
        if abs(k - d) > 3
    ]

    @functools.partial(over_batches, prompts=decompositions)
    def by_decomposition(count: int, key: Key[Array, ""], k: Array, variance: Array) -> Array:
        drawn = draw_regression(key, Regression(d, noise_variance=1.0), count, max(lengths))
        truth = jnp.einsum("bkd,bd->bk", drawn.inputs, drawn.weights, precision="highest")
        targets = truth + jnp.sqrt(variance) * (drawn.targets - truth)
        seen = (jnp.arange(max(lengths)) < k).astype(truth.dtype)  # examples of zeros change no least norm
        found = minimum_norm(drawn.inputs * seen[None, :, None], targets * seen[None])
        return jnp.sum((found - drawn.weights) ** 2, axis=1)

    rows = []

    def add(name: str, k: int, expected: float, values: np.ndarray) -> None:
        quantity, mean = f"error/d of {name} (d={d}, k={k})", float(values.mean()) / d
        error = float(standard_error(values)) / d
        if expected == 0:  # to the rounding of float32
            rows.append(Comparison(quantity, 0.0, mean, error, tolerance=1e-5))
        else:
            rows.append(within(quantity, expected / d, mean, share, error))

    expected = {
        "averaging": prefixes.averaging_error(d, lengths, noise_variance),
        "ridge": prefixes.ridge_error(d, lengths, noise_variance),
    }
    for name, values in in_one_pass(seed).items():
        for column, k in enumerate(lengths):
            add(name, k, float(expected[name][column]), values[:, column])
    for name, k, known, variance in kinds:
        add(name, k, known, by_decomposition(seed + k, np.int32(k), np.float32(variance)))
    return rows


def exact_properties(dimension: int = 8, length: int = 16, pool: int = 4096, prompts: int = 64) -> list[Comparison]:
    """What should hold for every prompt, to the rounding of float32, in the worst of them.

    A query orthogonal to the context is predicted as 0; ridge in one pass is ridge by a solve; a pool that is streamed
    in blocks gives what it gives at once, and a pool of one task gives that task.

    Args:
        dimension: d.
        length: K.
        pool: tasks in the streamed pool.
        prompts: prompts.
    """
    setting = Regression(dimension, noise_variance=0.25)

    @jax.jit
    def differences(key: Key[Array, ""]) -> tuple[Array, ...]:
        few_key, key, pool_key = jax.random.split(key, 3)
        few = draw_regression(few_key, setting, prompts, dimension - 1, orthogonal_query)
        fitted = minimum_norm(few.inputs, few.targets), ridge(few.inputs, few.targets, 0.25)
        drawn = draw_regression(key, setting, prompts, length)
        solved = jnp.sum(drawn.inputs[:, -1] * ridge(drawn.inputs[:, :-1], drawn.targets[:, :-1], 0.25), axis=1)
        recursive = ridge_prefixes(drawn.inputs, drawn.targets, 0.25).predictions[:, -1]
        tasks = draw_pool(pool_key, pool, dimension)
        at_once, streamed = (pool_prefixes(drawn.inputs, drawn.targets, tasks, 0.25, block) for block in (pool, 100))
        only = pool_prefixes(drawn.inputs, drawn.targets, tasks[:1], 0.25)
        of_task = jnp.einsum("bkd,d->bk", drawn.inputs, tasks[0], precision="highest")
        predictions = (jnp.sum(weights * few.query, axis=1) for weights in fitted)
        return *predictions, recursive - solved, at_once - streamed, only - of_task

    names = {
        "least squares: largest prediction for an orthogonal query": 1e-3,
        "ridge: largest prediction for an orthogonal query": 1e-3,
        "ridge: largest difference of a prediction, in one pass or by a solve": 1e-3,
        f"pool of {pool}: largest difference, streamed or at once": 1e-3,
        "pool of 1: largest difference from its task": 1e-4,
    }
    return [
        Comparison(quantity, 0.0, float(jnp.abs(difference).max()), tolerance=tolerance)
        for (quantity, tolerance), difference in zip(names.items(), differences(jax.random.key(0)), strict=True)
    ]


class Baselines(NamedTuple):
    """Squared errors of estimators at a query, as shares of the error of predicting 0.

    Attributes:
        tasks: what the functions are, and how the inputs were changed.
        estimators: their names.
        lengths: examples in the context, k.
        errors: of each prompt, [tasks, estimators, lengths, prompts]; nan at lengths that a task is not
            measured at.
    """

    tasks: tuple[str, ...]
    estimators: tuple[str, ...]
    lengths: np.ndarray
    errors: np.ndarray


def baselines(
    dimension: int = 20,
    lengths: Sequence[int] = (5, 10, 20, 40),
    sparsity: int = 3,
    depth: int = 4,
    noise_variance: float = 0.0,
    penalty: float = 1.0,
    lasso_penalty: float = 0.01,
    neighbours: int = 3,
    prompts: int = 1024,
    sweeps: int = 100,
    seed: int = 0,
) -> Baselines:
    """What estimators reach on the tasks of Garg et al. 2022 (arXiv 2208.01066), for which no theory is at hand.

    Sparse and linear functions and trees of standard normal inputs, and linear functions whose inputs were changed:
    scaled by 3, and, at the longest of the contexts with k < d, a query orthogonal to the context and one from it. The
    error of predicting 0 is the expectation of f(x)^2: `sparsity`, d (9 d for scaled inputs), and 1 for trees.

    Args:
        dimension: d.
        lengths: k.
        sparsity: coordinates that a sparse function reads.
        depth: of the trees.
        noise_variance: of the targets in the context.
        penalty: of ridge.
        lasso_penalty: of the Lasso.
        neighbours: how many are averaged.
        prompts: of each task and length.
        sweeps: of the Lasso.
        seed: of the prompts.

    Raises:
        ValueError: a number out of its range.
    """
    at_least("number of prompts", prompts, 2)
    at_least("number of neighbours", neighbours, 1)
    positive("penalty of ridge", penalty)
    positive("penalty of the Lasso", lasso_penalty, or_zero=True)
    if not lengths:
        raise ValueError("there are no context lengths: give at least one.")
    below = max((k for k in lengths if k < dimension), default=None)
    longest = max(at_least("context length k", k, 1) for k in lengths)
    linear = Regression(dimension, noise_variance=noise_variance)
    sparse = dataclasses.replace(linear, kind="sparse", sparsity=sparsity)
    tree = dataclasses.replace(linear, kind="tree", depth=depth)
    tasks: dict[str, tuple[Regression, Change | None, float]] = {
        "sparse": (sparse, None, sparsity),
        "tree": (tree, None, 1.0),
        "linear": (linear, None, dimension),
        "linear, inputs scaled by 3": (linear, scale_inputs(3.0), 9 * dimension),
        "linear, orthogonal query": (linear, orthogonal_query, dimension),
        "linear, repeated query": (linear, repeated_query, dimension),
    }
    estimators = (
        "least squares",
        f"ridge, penalty {penalty:g}",
        "averaging",
        f"Lasso, penalty {lasso_penalty:g}",
        f"{neighbours} nearest neighbours",
    )

    @jax.jit
    def errors(drawn: RegressionPrompt, k: Int[Array, ""]) -> Float[Array, "estimators B"]:
        """Examples from k on are set to 0: they change the means over examples only by their number."""
        seen, query = (jnp.arange(longest) < k).astype(drawn.inputs.dtype), drawn.query
        x, y = drawn.inputs * seen[None, :, None], drawn.targets * seen[None]
        shown = k.astype(x.dtype) / longest
        weights = (
            minimum_norm(x, y),
            ridge(x, y, penalty),
            label_mean(x, y) / shown,
            lasso(x, y, lasso_penalty * shown, sweeps),
        )
        # Queries stand where there is no example: the prediction for the first of them has seen k.
        place = jnp.arange(longest + 1)
        stood = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
        stood = jnp.where((place < k)[None, :, None], stood, query[:, None])
        near = neighbour_prefixes(stood, jnp.pad(y, ((0, 0), (0, 1))), neighbours)
        near = jax.lax.dynamic_index_in_dim(near, k, axis=1, keepdims=False)
        predictions = [jnp.einsum("bd,bd->b", one, query, precision="highest") for one in weights]
        return (jnp.stack([*predictions, near]) - drawn.query_target[None]) ** 2

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def draw(key: Key[Array, ""], setting: Regression, change: Change | None, k: int) -> RegressionPrompt:
        drawn = draw_regression(key, setting, prompts, k, change)
        rest = longest - k
        padded = jnp.pad(drawn.inputs, ((0, 0), (0, rest), (0, 0))), jnp.pad(drawn.targets, ((0, 0), (0, rest)))
        return drawn.replace(inputs=padded[0], targets=padded[1], weights=None)

    found = np.full((len(tasks), len(estimators), len(lengths), prompts), np.nan)
    for row, (setting, change, power) in enumerate(tasks.values()):
        key = jax.random.fold_in(jax.random.key(seed), row)
        of_context = change in (orthogonal_query, repeated_query)  # others have the same prompts at every length
        drawn = None if of_context else draw(key, setting, change, longest)
        for column, k in enumerate(lengths):
            if of_context:
                if k != below:
                    continue
                drawn = draw(key, setting, change, k)
            found[row, :, column] = np.asarray(errors(drawn, jnp.int32(k)), np.float64) / power
    return Baselines(tuple(tasks), estimators, np.array(lengths), found)


def over_batches(errors: Callable[..., Any], prompts: int, batch: int = 1024) -> Callable[..., Any]:
    """`errors(count, key, *shared)` over about this many prompts: a function of a seed and what is shared, in float64.

    It computes in batches, one after the other, and is compiled once.

    Args:
        errors: draws `count` prompts with the key, and gives arrays with these on axis 0.
        prompts: about how many; at least 1.
        batch: prompts at a time.
    """
    at_least("number of prompts", prompts, 1)
    count = min(batch, prompts)

    @jax.jit
    def program(keys: Key[Array, " batches"], *shared: Array) -> Any:
        return jax.lax.map(lambda key: errors(count, key, *shared), keys)

    def run(seed: int, *shared: Any) -> Any:
        found = program(jax.random.split(jax.random.key(seed), prompts // count), *map(jnp.asarray, shared))
        return jax.tree.map(lambda one: np.asarray(one, np.float64).reshape(-1, *one.shape[2:]), found)

    return run
