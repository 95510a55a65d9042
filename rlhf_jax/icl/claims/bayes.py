"""Bayes' prediction over a finite set, of tasks or of noise levels: nothing is better on it, and ridge is off it."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from scipy import special

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.claims.estimators import over_batches
from rlhf_jax.icl.comparison import Comparison, standard_error, within, within_errors
from rlhf_jax.icl.estimators.noise_mixture import noise_mixture_prefixes
from rlhf_jax.icl.estimators.ridge import ridge_prefixes
from rlhf_jax.icl.estimators.task_pools import pool_prefixes
from rlhf_jax.icl.tasks.pools import draw_pool, draw_pool_prompts
from rlhf_jax.icl.tasks.regression import Regression, draw_regression
from rlhf_jax.icl.theory import prefixes


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
    ridge. Both must hold for every pool: of the differences on the same prompts, the one that is furthest above 0 in
    its own standard errors stands beside 0, with four of them as tolerance. The error of ridge on new tasks is known
    (`theory.prefixes.ridge_error`), and for M = 1 the errors of Bayes over the pool are 0 on its task and 2 d, in the
    mean over pools, on new ones.

    Args:
        sizes: M.
        dimension: d of w ~ N(0, I) and x ~ N(0, I).
        length: K; the prefixes have 0 .. K-1 examples.
        noise_variance: of the targets; the penalty of ridge.
        pools: pools a size, >= 2.
        prompts: prompts a pool, as many from the pool as from the prior.
        seed: of everything.
        share: of the prediction, that the error of ridge may be off by.

    Raises:
        ValueError: fewer than two pools a size, or two prompts a pool.
    """
    at_least("number of pools", pools, 2)
    at_least("number of prompts a pool", prompts, 2)
    setting = Regression(dimension, noise_variance=noise_variance)

    def one(lane: tuple[Array, Array]) -> Float[Array, "six prompts"]:
        tasks, key = lane
        known_key, fresh_key = jax.random.split(key)
        known = draw_pool_prompts(known_key, setting, tasks, prompts, length)
        fresh = draw_regression(fresh_key, setting, prompts, length)
        found = []
        for drawn in (known, fresh):
            truth = jnp.einsum("bkd,bd->bk", drawn.inputs, drawn.weights, precision="highest")
            bayes = pool_prefixes(drawn.inputs, drawn.targets, tasks, noise_variance)
            shrunk = ridge_prefixes(drawn.inputs, drawn.targets, noise_variance).predictions
            pairs = (shrunk, truth), (bayes, truth), (bayes, shrunk)
            found += [jnp.mean((a - b) ** 2, axis=1) / dimension for a, b in pairs]
        return jnp.stack(found)

    program, measured = jax.jit(lambda *lanes: jax.lax.map(one, lanes)), []
    for size in sizes:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), size), (2, pools))
        tasks = jnp.stack([draw_pool(key, size, dimension) for key in keys[0]])
        copies = 64 // size if 64 % size == 0 else 1  # they change nothing, and small pools share a program
        measured.append(np.asarray(program(jnp.tile(tasks, (1, copies, 1)), keys[1]), np.float64))
    every = np.moveaxis(np.array(measured), 2, 0)  # [six, sizes, pools, prompts]
    ridge_pool, bayes_pool, _, ridge_fresh, bayes_fresh, distance = every.mean(axis=-1)

    expected = float(prefixes.ridge_error(dimension, range(length), noise_variance).mean()) / dimension
    fresh = every[3].ravel()
    rows = [within("error/d of ridge on new tasks", expected, fresh.mean(), share, float(standard_error(fresh)))]
    for place, size in enumerate(sizes):
        for name, difference in (
            ("Bayes over the pool above ridge on it", (every[1] - every[0])[place]),
            ("ridge above Bayes over the pool on new tasks", (every[3] - every[4])[place]),
        ):
            spread = standard_error(difference, axis=1)
            worst = int(np.argmax(difference.mean(axis=1) / spread))
            rows.append(
                at_most_0(
                    f"M={size}: error/d of {name}, worst of {pools} pools", difference[worst].mean(), spread[worst], 4.0
                )
            )
        if size == 1:
            error, quantile = float(standard_error(bayes_fresh[place])), special.stdtrit(pools - 1, 0.99865)
            rows += [
                Comparison(
                    "error/d of Bayes over a pool of 1 on it", 0.0, float(bayes_pool[place].max()), tolerance=1e-6
                ),
                within_errors(
                    "error/d of Bayes over a pool of 1 on new tasks", 2.0, bayes_fresh[place].mean(), error, quantile
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
    the oracle and of every fixed penalty are known (`theory.prefixes.ridge_error`). The order is that of expectations:
    what one estimator's error is above that of the next, on the same prompts, stands beside 0. Standard errors are
    those of a mean over strata, the levels.

    Args:
        levels: standard deviations of the noise.
        dimension: d.
        length: examples before the query.
        prompts: prompts over all levels.
        seed: of the prompts.
        errors: standard errors that a measured error may be off by.

    Raises:
        ValueError: no noise levels, or fewer than two prompts a level.
    """
    if not levels:
        raise ValueError("there are no noise levels: give at least one.")
    at_least("number of prompts a noise level", prompts // len(levels), 2)
    variances = np.square(levels)
    prior = 1.0 / dimension
    setting = Regression(dimension, prior_scale=prior**0.5, noise_variance=1.0)

    @functools.partial(over_batches, prompts=prompts // len(levels))
    def one(count: int, key: Key[Array, ""], variance: Array) -> dict[str, Array]:
        drawn = draw_regression(key, setting, count, length)
        inputs = jnp.concatenate([drawn.inputs, drawn.query[:, None]], axis=1)
        truth = jnp.einsum("bkd,bd->bk", drawn.inputs, drawn.weights, precision="highest")
        targets = truth + jnp.sqrt(variance) * (drawn.targets - truth)
        targets = jnp.pad(targets, ((0, 0), (0, 1)))  # that of the query is not read
        found = noise_mixture_prefixes(inputs, targets, jnp.asarray(variances, jnp.float32), prior)
        last = {"mixture": found.mixture[:, -1], "selected": found.selected[:, -1]}
        last |= {f"fixed {s}": found.ridges[s, :, -1] for s in range(len(levels))}
        return {name: (values - drawn.query_target) ** 2 for name, values in last.items()}

    by_level = [one(seed + place, np.float32(variance)) for place, variance in enumerate(variances)]
    pooled = {name: np.concatenate([found[name] for found in by_level]) for name in by_level[0]}
    fixed = np.stack([pooled[f"fixed {s}"] for s in range(len(levels))])
    oracle = np.concatenate([found[f"fixed {place}"] for place, found in enumerate(by_level)])

    def spread(values: np.ndarray) -> float:
        strata = standard_error(values.reshape(len(levels), -1), axis=1)
        return float(np.sqrt(np.square(strata).sum())) / len(levels)

    def known(penalty_of: float | None) -> float:
        penalty = None if penalty_of is None else penalty_of / prior
        return float(np.mean([prefixes.ridge_error(dimension, [length], one, prior, penalty)[0] for one in variances]))

    expected = [known(variance) for variance in variances]
    rows = [
        within_errors("error of the oracle's ridge", known(None), oracle.mean(), spread(oracle), errors),
        *(
            within_errors(f"error of ridge for the level {level:g}", known_one, found.mean(), spread(found), errors)
            for level, known_one, found in zip(levels, expected, fixed, strict=True)
        ),
    ]
    ordered = (
        ("the oracle above the mixture", oracle, pooled["mixture"]),
        ("the mixture above the ridge of the largest evidence", pooled["mixture"], pooled["selected"]),
        ("the mixture above the best fixed penalty", pooled["mixture"], fixed[int(np.argmin(expected))]),
    )
    rows += [
        at_most_0(f"error of {name}", (less - more).mean(), spread(less - more), errors) for name, less, more in ordered
    ]
    return NoiseErrors(rows, oracle, pooled["mixture"], pooled["selected"], fixed)


def at_most_0(quantity: str, difference: float, error: float, errors: float) -> Comparison:
    """A difference that theory only bounds, by 0 from above: what it is above 0, with so many standard errors.

    Example:
        >>> at_most_0("error of Bayes above ridge", -0.2, 0.01, 3.0).measured
        0.0
    """
    return within_errors(f"{quantity} (at most 0)", 0.0, max(0.0, float(difference)), error, errors)
