"""What training on a finite pool of M tasks gives: a linear layer, where theory is exact, and a small transformer.

The two change for different reasons and at different M. One layer of linear attention sees the pool only through its
second moment: new tasks are lost until that has full rank, at M of about d. A transformer can learn the pool by heart,
and what it computes moves from Bayes over the pool towards ridge as M grows beyond what it can tell apart; how far it
gets depends on its size and its training.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.comparison import Comparison, standard_error, within
from rlhf_jax.icl.estimators.ridge import ridge_prefixes
from rlhf_jax.icl.estimators.task_pools import pool_prefixes
from rlhf_jax.icl.models.linear_attention import label_mean, reduced_prediction
from rlhf_jax.icl.models.transformer import VectorModel, init_vector_model, regression_predictions
from rlhf_jax.icl.tasks.pools import draw_pool, draw_pool_prompts
from rlhf_jax.icl.tasks.regression import Regression, RegressionPrompt, draw_regression
from rlhf_jax.icl.theory import gradient_flow
from rlhf_jax.icl.theory import pool as theory
from rlhf_jax.icl.training import fit
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.types import Params


class LinearPools(NamedTuple):
    """A linear layer trained on pools, beside what theory says of the same pools.

    Attributes:
        comparisons: of matrices and risks.
        sizes: M, [sizes].
        pool: squared error / d of the trained layer on new prompts of the pool's tasks, [sizes, seeds].
        fresh: the same on new tasks, [sizes, seeds].
        predicted_pool: of the minimiser for the same pool, [sizes, seeds].
        predicted_fresh: the same on new tasks, [sizes, seeds].
    """

    comparisons: list[Comparison]
    sizes: np.ndarray
    pool: np.ndarray
    fresh: np.ndarray
    predicted_pool: np.ndarray
    predicted_fresh: np.ndarray


def linear_layer_on_pools(
    sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 256),
    dimension: int = 8,
    length: int = 16,
    noise_variance: float = 0.25,
    seeds: int = 4,
    steps: int = 2000,
    batch: int = 1024,
    rate: float = 2e-2,
    tolerance: float = 0.03,
    share: float = 0.02,
) -> LinearPools:
    """Trains yhat = x' A p, p = (1/N) sum y_i x_i, on pools; A, and its errors, beside the minimiser of `theory.pool`.

    Adam with a cosine schedule, from A = 0; compared is the mean of A over the second half of training. The errors of a
    matrix are exact (`gradient_flow.risk`), so only training is random.

    Args:
        sizes: M; each divides the largest.
        dimension: d.
        length: N.
        noise_variance: of the targets in the context.
        seeds: pools a size.
        steps: updates.
        batch: prompts an update.
        rate: peak learning rate.
        tolerance: the largest |A - A_M| / |A_M| (Frobenius norms) that passes.
        share: of the prediction, that a mean error over seeds may be off by.

    Raises:
        ValueError: a size that does not divide the largest.
    """
    at_least("number of steps", steps, 1)
    pools = tiled_pools(sizes, seeds, dimension)
    setting = Regression(dimension, noise_variance=noise_variance)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=0.01))

    def one(lane: tuple[Array, Array]) -> Float[Array, "d d"]:
        pool, key = lane

        def loss(matrix: Float[Array, "d d"], key: Key[Array, ""]) -> Float[Array, ""]:
            drawn = draw_pool_prompts(key, setting, pool, batch, length)
            prediction = reduced_prediction(matrix, label_mean(drawn.inputs, drawn.targets), drawn.query)
            return jnp.mean((prediction - drawn.query_target) ** 2)

        return fit(loss, jnp.zeros((dimension, dimension)), optimizer, steps, key).averaged

    program = jax.jit(over_lanes(one))
    keys = jax.random.split(jax.random.key(1), len(sizes) * seeds)
    trained = np.asarray(program((pools.reshape(-1, *pools.shape[2:]), keys)), np.float64)
    trained = trained.reshape(len(sizes), seeds, dimension, dimension)

    identity, off = np.eye(dimension), np.zeros((len(sizes), seeds))
    measured, predicted = np.zeros((2, len(sizes), seeds)), np.zeros((2, len(sizes), seeds))
    for place in np.ndindex(len(sizes), seeds):
        pool = np.asarray(pools[place][: sizes[place[0]]], np.float64)
        moment, known = theory.second_moment(pool), theory.minimiser(pool, length, noise_variance)
        off[place] = np.linalg.norm(trained[place] - known) / np.linalg.norm(known)
        for way, tasks in enumerate((moment, identity)):
            for table, matrix in ((measured, trained[place]), (predicted, known)):
                risk = gradient_flow.risk(matrix, identity, length, tasks=tasks, noise_variance=noise_variance)
                table[way][place] = risk / dimension
    rows = []
    for place, size in enumerate(sizes):
        rows.append(
            Comparison(
                f"linear layer, M={size}: |A - A_M| / |A_M|, worst seed",
                0.0,
                float(off[place].max()),
                tolerance=tolerance,
            )
        )
        for way, name in enumerate(("tasks of the pool", "new tasks")):
            known, found = predicted[way][place].mean(), measured[way][place].mean()
            rows.append(within(f"linear layer, M={size}: error/d on {name}", known, found, share))
    return LinearPools(rows, np.array(sizes), *measured, *predicted)


class TransformerPools(NamedTuple):
    """Transformers trained on pools; squared differences / d averaged over prefixes and prompts, each [sizes, seeds].

    Attributes:
        comparisons: of the two Bayes predictors, and for M = 1 that the network learnt its task by heart.
        sizes: M, [sizes].
        pool_error: to the noiseless target, on tasks of the pool.
        fresh_error: the same on new tasks.
        pool_to_bayes: distance to Bayes over the pool, on tasks of the pool.
        pool_to_ridge: distance to ridge, on tasks of the pool.
        fresh_to_bayes: distance to Bayes over the pool, on new tasks.
        fresh_to_ridge: distance to ridge, on new tasks.
        bayes_to_ridge: of Bayes over the pool to ridge, on new tasks: how far apart the two alternatives are.
        ridge_error: of ridge on new tasks.
    """

    comparisons: list[Comparison]
    sizes: np.ndarray
    pool_error: np.ndarray
    fresh_error: np.ndarray
    pool_to_bayes: np.ndarray
    pool_to_ridge: np.ndarray
    fresh_to_bayes: np.ndarray
    fresh_to_ridge: np.ndarray
    bayes_to_ridge: np.ndarray
    ridge_error: np.ndarray


def transformer_on_pools(
    sizes: Sequence[int] = (1, 4, 16, 64, 256, 1024),
    dimension: int = 2,
    length: int = 8,
    noise_variance: float = 0.25,
    seeds: int = 4,
    model: VectorModel | None = None,
    steps: int = 4000,
    batch: int = 64,
    rate: float = 4e-3,
    prompts: int = 1024,
) -> TransformerPools:
    """Trains small transformers on pools and measures which of two Bayes predictors they are close to.

    Tokens and loss are those of Garg et al. 2022 (arXiv 2208.01066): x_1, y_1, .., x_K, squared error at every prefix;
    tasks and measures those of Raventos et al. 2023 (arXiv 2306.15063). Adam, a linear warm-up over a tenth of the
    steps, then a cosine to 0.

    Two things are known. Pythagoras' theorem: E |f - target|^2 = E |Bayes - target|^2 + E |f - Bayes|^2 for every f of
    the prompt, trained or not, if Bayes' prediction is the conditional mean: a check of the two predictors, Bayes over
    the pool on its tasks and ridge on new ones. And for M = 1, whose Bayes predictor makes no error: ridge is the best
    that can be done without knowing the task (in the mean over tasks), so a network with a smaller error than ridge has
    learnt the task by heart. One that was not trained makes a larger one, because even to predict 0 does worse than
    ridge.

    Args:
        sizes: M; each divides the largest.
        dimension: d of w ~ N(0, I), x ~ N(0, I).
        length: K.
        noise_variance: of the targets; penalty of ridge.
        seeds: pools a size, each with its own training.
        model: the transformer; None: two layers of width 32.
        steps: updates.
        batch: prompts an update.
        rate: peak learning rate.
        prompts: of each measurement.

    Raises:
        ValueError: a size that does not divide the largest, a model of another token width, or fewer than two steps.
    """
    check_sizes("pool sizes", sizes)
    at_least("number of steps", steps, 2)
    if model is None:
        model = VectorModel(token_width=dimension, outputs=1, context_length=2 * length - 1, layers=2)
    pools = tiled_pools(sizes, seeds, dimension)
    setting = Regression(dimension, noise_variance=noise_variance)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def one(lane: tuple[Array, Array]) -> Float[Array, "measures prompts"]:
        pool, key = lane
        keys = jax.random.split(key, 4)

        def loss(params: Params, key: Key[Array, ""]) -> Float[Array, ""]:
            drawn = draw_pool_prompts(key, setting, pool, batch, length)
            return jnp.mean((regression_predictions(model, params, drawn.inputs, drawn.targets) - drawn.targets) ** 2)

        params = fit(loss, init_vector_model(model, keys[0]), optimizer, steps, keys[1]).params
        known = draw_pool_prompts(keys[2], setting, pool, prompts, length)
        fresh = draw_regression(keys[3], setting, prompts, length)

        def measure(drawn: RegressionPrompt) -> Float[Array, "six prompts"]:
            truth = jnp.einsum("bkd,bd->bk", drawn.inputs, drawn.weights, precision="highest")
            network = regression_predictions(model, params, drawn.inputs, drawn.targets)
            bayes = pool_prefixes(drawn.inputs, drawn.targets, pool, noise_variance)
            ridge = ridge_prefixes(drawn.inputs, drawn.targets, noise_variance).predictions
            pairs = (
                (network, truth),
                (network, bayes),
                (network, ridge),
                (bayes, ridge),
                (bayes, truth),
                (ridge, truth),
            )
            return jnp.stack([jnp.mean((a - b) ** 2, axis=1) / dimension for a, b in pairs])

        return jax.lax.map(measure, jax.tree.map(lambda *both: jnp.stack(both), known, fresh)).reshape(-1, prompts)

    program = jax.jit(over_lanes(one))
    found = []
    for place in range(len(sizes)):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(2), place), seeds)
        found.append(np.asarray(program((pools[place], keys)), np.float64))
    every = np.stack(found)  # [sizes, seeds, measures, prompts]
    (error, to_bayes, to_ridge, _, of_bayes, by_ridge), (new, new_to_bayes, new_to_ridge, apart, _, of_ridge) = (
        np.moveaxis(half, 2, 0) for half in np.split(every, 2, axis=2)
    )
    rows = []
    for place, size in enumerate(sizes):
        for name, whole, bayes, distance in (
            ("tasks of the pool", error, of_bayes, to_bayes),
            ("new tasks", new, of_ridge, new_to_ridge),
        ):
            gap = (whole - bayes - distance)[place].ravel()
            spread = float(standard_error(gap))
            rows.append(
                Comparison(
                    f"Bayes on {name}, M={size}: a network's error/d is that of Bayes + its distance to Bayes",
                    float((bayes + distance)[place].mean()),
                    float(whole[place].mean()),
                    spread,
                    tolerance=max(4 * spread, 1e-5),  # for M = 1 both are the same, to the rounding of float32
                )
            )
        if size == 1:
            of_seeds = error[place].mean(axis=-1)
            rows.append(
                Comparison(
                    "trained transformer, M=1: error/d on its task, below that of ridge (the tolerance)",
                    0.0,
                    float(of_seeds.mean()),
                    float(standard_error(of_seeds)),
                    tolerance=float(by_ridge[place].mean()),
                )
            )
    means = (one.mean(axis=-1) for one in (error, new, to_bayes, to_ridge, new_to_bayes, new_to_ridge, apart, of_ridge))
    return TransformerPools(rows, np.array(sizes), *means)


def tiled_pools(sizes: Sequence[int], seeds: int, dimension: int, seed: int = 0) -> Float[Array, "sizes seeds M d"]:
    """Pools of several sizes in one array: a smaller pool is the beginning of the largest of its seed, repeated.

    Repetition changes neither a uniform draw nor Bayes over the pool, and one compiled program serves all sizes.

    Raises:
        ValueError: no size, one that is not whole or below 1, or one that does not divide the largest.

    Example:
        >>> pools = tiled_pools((1, 4), seeds=1, dimension=2)
        >>> pools.shape, bool((pools[0, 0] == pools[1, 0, 0]).all())
        ((2, 1, 4, 2), True)
    """
    check_sizes("pool sizes", sizes)
    largest = max(sizes)
    keys = jax.random.split(jax.random.key(seed), seeds)
    drawn = [draw_pool(key, largest, dimension) for key in keys]
    return jnp.stack([jnp.stack([jnp.tile(one[:size], (largest // size, 1)) for one in drawn]) for size in sizes])


def check_sizes(name: str, sizes: Sequence[int]) -> None:
    """Refuses pool sizes that `tiled_pools` cannot give.

    Raises:
        ValueError: there is none, one is not whole or below 1, or does not divide the largest.

    Example:
        >>> check_sizes("pool sizes", (3, 4))
        Traceback (most recent call last):
            ...
        ValueError: of the pool sizes, 3 does not divide the largest, 4: give powers of two.
    """
    if not sizes:
        raise ValueError(f"the {name} are empty: give at least one.")
    for size in sizes:
        at_least(name, size, 1)
    for size in sizes:
        if max(sizes) % size:
            raise ValueError(f"of the {name}, {size} does not divide the largest, {max(sizes)}: give powers of two.")
