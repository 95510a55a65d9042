"""Estimators on sampled prompts beside their expected errors, and the order that Bayes' rule imposes on them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from rlhf_jax.icl.comparison import Comparison, within, within_errors
from rlhf_jax.icl.estimators.least_squares import averaging_prefixes, minimum_norm
from rlhf_jax.icl.estimators.noise_mixture import noise_mixture_prefixes
from rlhf_jax.icl.estimators.ridge import ridge, ridge_prefixes
from rlhf_jax.icl.estimators.task_pools import pool_prefixes
from rlhf_jax.icl.tasks.changes import orthogonal_query
from rlhf_jax.icl.tasks.pools import draw_pool, draw_pool_prompts
from rlhf_jax.icl.tasks.regression import Regression, draw_regression
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
    noiseless, noisy = Regression(d), Regression(d, noise_variance=noise_variance)

    def in_one_pass(count: int, key: Key[Array, ""]) -> dict[str, Array]:
        drawn = draw_regression(key, noisy, count, max(lengths) + 1)
        truth = jnp.einsum("bkd,bd->bk", drawn.inputs, drawn.weights, precision="highest")
        found = {
            "averaging": averaging_prefixes(drawn.inputs, drawn.targets),
            "ridge": ridge_prefixes(drawn.inputs, drawn.targets, noise_variance).predictions,
        }
        return {name: ((one - truth) ** 2)[:, places] for name, one in found.items()}

    kinds = [
        (f"least squares, {name}", k, float(known), setting)
        for name, setting in (("no noise", noiseless), ("noise", noisy))
        for k, known in zip(lengths, prefixes.least_squares_error(d, lengths, setting.noise_variance), strict=True)
        if abs(k - d) > 3
    ]

    def by_decomposition(k: int, setting: Regression, count: int, key: Key[Array, ""]) -> Array:
        drawn = draw_regression(key, setting, count, k)
        return jnp.sum((minimum_norm(drawn.inputs, drawn.targets) - drawn.weights) ** 2, axis=1)

    rows = []

    def add(name: str, k: int, expected: float, values: np.ndarray) -> None:
        quantity, mean = f"error/d of {name} (d={d}, k={k})", float(values.mean()) / d
        error = _standard_error(values) / d
        if expected == 0:  # to the rounding of float32
            rows.append(Comparison(quantity, 0.0, mean, error, tolerance=1e-5))
        else:
            rows.append(within(quantity, expected / d, mean, share, error))

    expected = {
        "averaging": prefixes.averaging_error(d, lengths, noise_variance),
        "ridge": prefixes.ridge_error(d, lengths, noise_variance),
    }
    for name, values in _over_batches(in_one_pass, prompts, seed).items():
        for column, k in enumerate(lengths):
            add(name, k, float(expected[name][column]), values[:, column])
    for name, k, known, setting in kinds:  # a program each: several decompositions at once can wait for one another
        add(name, k, known, _over_batches(functools.partial(by_decomposition, k, setting), decompositions, seed + k))
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
    rows = []

    def largest(quantity: str, difference: Array, tolerance: float) -> None:
        rows.append(Comparison(quantity, 0.0, float(jnp.abs(difference).max()), tolerance=tolerance))

    few = draw_regression(jax.random.key(0), setting, prompts, dimension - 1, orthogonal_query)
    for name, weights in (
        ("least squares", minimum_norm(few.inputs, few.targets)),
        ("ridge", ridge(few.inputs, few.targets, 0.25)),
    ):
        largest(f"{name}: largest prediction for an orthogonal query", jnp.sum(weights * few.query, axis=1), 1e-3)
    drawn = draw_regression(jax.random.key(1), setting, prompts, length)
    solved = jnp.sum(drawn.inputs[:, -1] * ridge(drawn.inputs[:, :-1], drawn.targets[:, :-1], 0.25), axis=1)
    recursive = ridge_prefixes(drawn.inputs, drawn.targets, 0.25).predictions[:, -1]
    largest("ridge: largest difference of a prediction, in one pass or by a solve", recursive - solved, 1e-3)
    tasks = draw_pool(jax.random.key(2), pool, dimension)
    at_once, streamed = (pool_prefixes(drawn.inputs, drawn.targets, tasks, 0.25, block) for block in (pool, 100))
    largest(f"pool of {pool}: largest difference, streamed or at once", at_once - streamed, 1e-3)
    only = pool_prefixes(drawn.inputs, drawn.targets, tasks[:1], 0.25) - jnp.einsum("bkd,d->bk", drawn.inputs, tasks[0])
    largest("pool of 1: largest difference from its task", only, 1e-4)
    return rows


class PoolErrors(NamedTuple):
    """Errors of ridge and of Bayes over the pool, averaged over the K prefixes and divided by d, each [sizes, pools].

    Attributes:
        comparisons: beside what theory says.
        sizes: M, [sizes].
        ridge_pool: of ridge on tasks of the pool.
        ridge_fresh: of ridge on new tasks.
        bayes_pool: of Bayes over the pool, on tasks of the pool.
        bayes_fresh: of Bayes over the pool, on new tasks.
        distance_fresh: mean squared difference of the two on new tasks.
    """

    comparisons: list[Comparison]
    sizes: np.ndarray
    ridge_pool: np.ndarray
    ridge_fresh: np.ndarray
    bayes_pool: np.ndarray
    bayes_fresh: np.ndarray
    distance_fresh: np.ndarray


def pool_errors(
    sizes: Sequence[int] = (1, 8, 64, 512, 4096),
    dimension: int = 8,
    length: int = 16,
    noise_variance: float = 0.25,
    pools: int = 20,
    prompts: int = 512,
    seed: int = 0,
    share: float = 0.02,
) -> PoolErrors:
    """Ridge and Bayes over the pool, on the pool's tasks and on new ones (Raventos et al. 2023, arXiv 2306.15063).

    On tasks of the pool no prediction is better than that of Bayes over the pool; on new tasks none is better than
    ridge. Both must hold for every pool. The error of ridge on new tasks is known (`theory.prefixes.ridge_error`), and
    for M = 1 the errors of Bayes over the pool are 0 on its task and 2 d, in the mean over pools, on new ones.

    Args:
        sizes: M.
        dimension: d of w ~ N(0, I) and x ~ N(0, I).
        length: K; the prefixes have 0 .. K-1 examples.
        noise_variance: of the targets; the penalty of ridge.
        pools: pools a size, >= 2.
        prompts: prompts a pool, as many from the pool as from the prior.
        seed: of everything.
        share: of the prediction, that the error of ridge may be off by.
    """
    setting = Regression(dimension, noise_variance=noise_variance)

    def one(key: Key[Array, ""], size: int) -> tuple[Array, ...]:
        keys = jax.random.split(key, 3)
        tasks = draw_pool(keys[0], size, dimension)
        known = draw_pool_prompts(keys[1], setting, tasks, prompts, length)
        fresh = draw_regression(keys[2], setting, prompts, length)
        found = []
        for drawn in (known, fresh):
            truth = jnp.einsum("bkd,bd->bk", drawn.inputs, drawn.weights, precision="highest")
            bayes = pool_prefixes(drawn.inputs, drawn.targets, tasks, noise_variance)
            shrunk = ridge_prefixes(drawn.inputs, drawn.targets, noise_variance).predictions
            found += [jnp.mean((a - b) ** 2) / dimension for a, b in ((shrunk, truth), (bayes, truth), (bayes, shrunk))]
        return tuple(found)

    measured = []
    for size in sizes:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), size), pools)
        program = jax.jit(lambda keys, size=size: jax.lax.map(functools.partial(one, size=size), keys))
        measured.append(np.asarray(program(keys), np.float64))
    ridge_pool, bayes_pool, _, ridge_fresh, bayes_fresh, distance = np.moveaxis(np.array(measured), 1, 0)

    expected = float(prefixes.ridge_error(dimension, range(length), noise_variance).mean()) / dimension
    every = ridge_fresh.ravel()
    rows = [within("error/d of ridge on new tasks", expected, every.mean(), share, _standard_error(every))]
    for place, size in enumerate(sizes):
        better, worse = bayes_pool[place] <= ridge_pool[place], bayes_fresh[place] >= ridge_fresh[place]
        rows += [
            Comparison(
                f"share of pools of {size}: Bayes over the pool at least as good on it", 1.0, float(better.mean())
            ),
            Comparison(f"share of pools of {size}: ridge at least as good on new tasks", 1.0, float(worse.mean())),
        ]
        if size == 1:
            error = _standard_error(bayes_fresh[place])
            rows += [
                Comparison(
                    "error/d of Bayes over a pool of 1 on it", 0.0, float(bayes_pool[place].max()), tolerance=1e-6
                ),
                within_errors(
                    "error/d of Bayes over a pool of 1 on new tasks", 2.0, bayes_fresh[place].mean(), error, errors=3.0
                ),
            ]
    return PoolErrors(rows, np.array(sizes), ridge_pool, ridge_fresh, bayes_pool, bayes_fresh, distance)


class NoiseErrors(NamedTuple):
    """Errors to the noiseless target when the noise level is unknown.

    Attributes:
        comparisons: beside what theory says.
        oracle: of ridge that knows the level, each prompt, [n].
        mixture: of Bayes over the levels, [n].
        selected: of the ridge with the largest evidence, [n].
        fixed: of ridge with the penalty of one level for all prompts, [S, n].
    """

    comparisons: list[Comparison]
    oracle: np.ndarray
    mixture: np.ndarray
    selected: np.ndarray
    fixed: np.ndarray


def noise_levels(
    levels: Sequence[float] = (0.1, 0.25, 0.5, 1.0),
    dimension: int = 20,
    length: int = 20,
    prompts: int = 2**16,
    seed: int = 0,
    errors: float = 4.0,
) -> NoiseErrors:
    """Oracle ridge, Bayes over noise levels, and one fixed penalty, in this order (Bai et al. 2023, arXiv 2306.04637).

    w ~ N(0, I/d), and a prompt's noise has one of the standard deviations `levels`, as many prompts each. The errors of
    the oracle and of every fixed penalty are known (`theory.prefixes.ridge_error`).

    Args:
        levels: standard deviations of the noise.
        dimension: d.
        length: examples before the query.
        prompts: prompts over all levels.
        seed: of the prompts.
        errors: standard errors that a measured error may be off by.
    """
    variances = np.square(levels)
    prior = 1.0 / dimension

    def one(variance: float, count: int, key: Key[Array, ""]) -> dict[str, Array]:
        setting = Regression(dimension, prior_scale=prior**0.5, noise_variance=variance)
        drawn = draw_regression(key, setting, count, length)
        inputs = jnp.concatenate([drawn.inputs, drawn.query[:, None]], axis=1)
        targets = jnp.pad(drawn.targets, ((0, 0), (0, 1)))  # that of the query is not read
        found = noise_mixture_prefixes(inputs, targets, jnp.asarray(variances, jnp.float32), prior)
        last = {"mixture": found.mixture[:, -1], "selected": found.selected[:, -1]}
        last |= {f"fixed {s}": found.ridges[s, :, -1] for s in range(len(levels))}
        return {name: (values - drawn.query_target) ** 2 for name, values in last.items()}

    by_level = [
        _over_batches(functools.partial(one, float(variance)), prompts // len(levels), seed + place)
        for place, variance in enumerate(variances)
    ]
    pooled = {name: np.concatenate([found[name] for found in by_level]) for name in by_level[0]}
    fixed = np.stack([pooled[f"fixed {s}"] for s in range(len(levels))])
    oracle = np.concatenate([found[f"fixed {place}"] for place, found in enumerate(by_level)])

    def known(penalty_of: float | None) -> float:
        penalty = None if penalty_of is None else penalty_of / prior
        return float(np.mean([prefixes.ridge_error(dimension, [length], one, prior, penalty)[0] for one in variances]))

    rows = [
        within_errors("error of the oracle's ridge", known(None), oracle.mean(), _standard_error(oracle), errors),
        *(
            within_errors(
                f"error of ridge for the level {level:g}", known(variance), one.mean(), _standard_error(one), errors
            )
            for level, variance, one in zip(levels, variances, fixed, strict=True)
        ),
    ]
    best = fixed[fixed.mean(axis=1).argmin()]
    ordered = (
        ("oracle <= mixture", oracle, pooled["mixture"]),
        ("mixture <= largest evidence", pooled["mixture"], pooled["selected"]),
        ("mixture <= best fixed penalty", pooled["mixture"], best),
    )
    rows += [Comparison(name, 1.0, float(less.mean() <= more.mean())) for name, less, more in ordered]
    return NoiseErrors(rows, oracle, pooled["mixture"], pooled["selected"], fixed)


def _over_batches(errors: Callable[[int, Key[Array, ""]], Any], prompts: int, seed: int, batch: int = 1024) -> Any:
    """The arrays of `errors(count, key)` over about this many prompts, computed in batches, float64."""
    count = min(batch, prompts)
    keys = jax.random.split(jax.random.key(seed), prompts // count)
    found = jax.jit(lambda keys: jax.lax.map(functools.partial(errors, count), keys))(keys)
    return jax.tree.map(lambda one: np.asarray(one, np.float64).reshape(-1, *one.shape[2:]), found)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(values.size))
