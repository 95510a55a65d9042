"""Trained linear transformers of k layers on in-context regression, beside the closed forms of what they learn.

Ahn et al. 2023 (arXiv 2306.00297), sparse layers and GD++. Inputs are drawn raw, and layers trained with Adam under a
cosine schedule that ends at 0. `regression_step.py` trains one layer with all its matrices.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.comparison import Comparison, standard_error, within
from rlhf_jax.icl.models.deep_linear import LinearLayers, deep_linear, deep_linear_of_moments
from rlhf_jax.icl.models.linear_attention import einsum
from rlhf_jax.icl.tasks.regression import Regression, draw_regression
from rlhf_jax.icl.theory import preconditioned
from rlhf_jax.icl.training import Fit, fit
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.types import Params


class DeepLayers(NamedTuple):
    """Losses of linear transformers by number of layers.

    Attributes:
        comparisons: losses, steps, and distances from multiples of the identity.
        layers: k, int [settings].
        predicted: the least loss, [settings].
        shared: the least loss of gradient descent with one step for all layers, [settings].
        trained: of each seed, [settings, seeds].
        curves: training losses of each seed, [settings, seeds, steps].
        minima: losses of all minima that theory found, ascending, [minima]; of GD++ alone.
    """

    comparisons: list[Comparison]
    layers: np.ndarray
    predicted: np.ndarray
    shared: np.ndarray
    trained: np.ndarray
    curves: np.ndarray
    minima: np.ndarray = np.zeros(0)


def sparse_layers(
    layers: Sequence[int] = (1, 2, 3),
    dimension: int = 5,
    length: int = 20,
    seeds: int = 3,
    steps: int = 3000,
    batch: int = 2000,
    rate: float = 2e-2,
) -> DeepLayers:
    """k layers learn the best k steps of gradient descent: their losses, their steps (in any order), and their shape.

    Means over seeds. A layer's step is -tr A_l / d, and its distance from a multiple of the identity
    |A_l + step I|_F / |A_l|_F, the largest of layers and seeds.

    Args:
        layers: k.
        dimension: d.
        length: n.
        seeds: runs of each k.
        steps: updates.
        batch: fresh prompts an update.
        rate: of Adam, at the start.
    """
    rows, losses, curves = [], [], []
    for k in layers:
        fits = train_layers(k, False, dimension, length, seeds, steps, batch, rate)
        blocks = np.asarray(fits.params.preconditioners, np.float64)
        found = np.sort(-np.trace(blocks, axis1=2, axis2=3) / dimension, axis=1)
        losses.append([trained_loss(lane(fits.params, seed), length) for seed in range(seeds)])
        curves.append(np.asarray(fits.losses, np.float64))
        setting = f"d={dimension}, n={length}, k={k}"
        predicted = preconditioned.best_loss(dimension, length, k)
        rows.append(_beside(f"loss of linear layers ({setting})", predicted, losses[-1], 0.03))
        for number, step in enumerate(preconditioned.best_steps(dimension, length, k)):
            rows.append(_beside(f"step {number + 1} ({setting})", step, found[:, number], 0.015))
        apart = blocks - np.trace(blocks, axis1=2, axis2=3)[..., None, None] / dimension * np.eye(dimension)
        worst = (np.linalg.norm(apart, axis=(2, 3)) / np.linalg.norm(blocks, axis=(2, 3))).max()
        rows.append(Comparison(f"largest distance from a multiple of I ({setting})", 0.0, float(worst), tolerance=0.03))
    return DeepLayers(
        comparisons=rows,
        layers=np.array(layers),
        predicted=np.array([preconditioned.best_loss(dimension, length, k) for k in layers]),
        shared=np.array([preconditioned.shared_step(dimension, length, k)[1] for k in layers]),
        trained=np.array(losses),
        curves=np.array(curves),
    )


def gd_plus_plus(
    dimension: int = 5,
    length: int = 20,
    seeds: int = 3,
    steps: int = 3000,
    batch: int = 1000,
    rate: float = 2e-2,
    starts: int = 100,
) -> DeepLayers:
    """Two layers that transform their inputs too end in a minimum that theory lists, which need not be the lowest.

    One row a seed: its loss beside that of the nearest minimum; the name says which that is. It tells something because
    two layers have three minima, far apart; three layers have dozens, one of which is near any loss. Noise has a part
    in which it is: with 1,000 prompts an update two seeds of two ended in the local minimum of 0.0865, with 250 both
    came close to the lowest, 0.0575.

    Args:
        dimension: d.
        length: n.
        seeds: runs.
        steps: updates.
        batch: fresh prompts an update.
        rate: of Adam, at the start.
        starts: descents with which theory looks for minima.
    """
    at_least("number of seeds", seeds, 1)
    layers = 2
    minima = preconditioned.gd_plus_plus_minima(dimension, length, layers, starts)
    fits = train_layers(layers, True, dimension, length, seeds, steps, batch, rate)
    rows, losses = [], []
    for seed in range(seeds):
        losses.append(trained_loss(lane(fits.params, seed), length))
        place = int(np.argmin([abs(one.loss - losses[-1]) for one in minima]))
        which = f"minimum {place + 1} of {len(minima)}, the lowest first"
        name = f"loss of GD++ (d={dimension}, n={length}, k={layers}, seed {seed}): {which}"
        rows.append(within(name, minima[place].loss, losses[-1], share=0.03))
    shared = preconditioned.shared_step(dimension, length, layers)[1]
    return DeepLayers(
        comparisons=rows,
        layers=np.array([layers]),
        predicted=np.array([minima[0].loss]),
        shared=np.array([shared]),
        trained=np.array([losses]),
        curves=np.asarray(fits.losses, np.float64)[None],
        minima=np.array([one.loss for one in minima]),
    )


def train_layers(
    layers: int, rotate: bool, dimension: int, length: int, seeds: int, steps: int, batch: int, rate: float
) -> Fit:
    """Trains sparse layers from entries N(0, 0.01^2) on prompts with x and w from N(0, I), seeds on axis 0.

    Args:
        layers: k.
        rotate: whether B_l is trained too (GD++), or 0.
        dimension: d.
        length: n.
        seeds: runs.
        steps: updates.
        batch: fresh prompts an update.
        rate: of Adam, at the start.
    """

    def loss(params: LinearLayers, key: Key[Array, ""]) -> Float[Array, ""]:
        prompt = draw_regression(key, Regression(dimension), batch, length)
        predictions = deep_linear(params, prompt.inputs, prompt.targets, prompt.query)
        return jnp.mean((predictions - prompt.query_target) ** 2)

    def start(key: Key[Array, ""]) -> LinearLayers:
        a, b = 0.01 * jax.random.normal(key, (2, layers, dimension, dimension))
        return LinearLayers(a, b if rotate else None)

    return train(loss, start, seeds, steps, rate)


def trained_loss(params: LinearLayers, length: int, contexts: int = 10_000, seed: int = 0) -> float:
    """E(prediction - w' x_q)^2 of trained layers, with little noise.

    Weights and query are integrated out, by every pair of unit vectors. The blocks' projections on the identity have an
    exact loss; to it is added the mean difference of the two over the same contexts.

    Args:
        params: the blocks, one run.
        length: n.
        contexts: to draw for the difference.
        seed: of the contexts.
    """
    k, d, _ = params.preconditioners.shape
    inputs = np.random.default_rng(seed).standard_normal((contexts, length, d))
    moments = jnp.asarray(np.einsum("bnd,bne->bde", inputs, inputs) / length, jnp.float32)

    def isotropic(blocks: Float[Array, "k d d"]) -> Float[Array, "k d d"]:
        return jnp.trace(blocks, axis1=1, axis2=2)[:, None, None] / d * jnp.eye(d)[None]

    plain = jax.tree.map(isotropic, params)
    difference = _errors(params, moments) - _errors(plain, moments)
    a = -np.asarray(plain.preconditioners, np.float64)[:, 0, 0]
    if params.rotations is None:
        return float(difference) + preconditioned.loss_of_steps(a, d, length)
    products = (a * np.asarray(plain.rotations, np.float64)[:, 0, 0])[: k - 1]
    return float(difference) + preconditioned.gd_plus_plus_loss(a, products, d, length)


@jax.jit
def _errors(layers: LinearLayers, moments: Float[Array, "B d d"]) -> Float[Array, ""]:
    """The sum of squared errors over pairs of unit vectors, weights and query, each a mean over contexts."""

    def of_pair(pair: tuple[Float[Array, " d"], Float[Array, " d"]]) -> Float[Array, ""]:
        weight, query = pair
        means = einsum("bde,e->bd", moments, weight)
        predictions = deep_linear_of_moments(layers, moments, means, jnp.broadcast_to(query, means.shape))
        return jnp.mean((predictions - jnp.sum(weight * query)) ** 2)

    units = jnp.eye(moments.shape[1])
    pairs = jnp.repeat(units, len(units), axis=0), jnp.tile(units, (len(units), 1))
    return jax.lax.map(of_pair, pairs, batch_size=len(units)).sum()


def train(
    loss: Callable[[Params, Array], Float[Array, ""]],
    start: Callable[[Array], Params],
    seeds: int,
    steps: int,
    rate: float,
) -> Fit:
    """Adam under a cosine schedule from `start(key)`, the seeds on axis 0 of all that it gives."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def run(key: Key[Array, ""]) -> Fit:
        for_start, for_steps = jax.random.split(key)
        return fit(loss, start(for_start), optimizer, steps, for_steps)

    return jax.jit(over_lanes(run, devices=jax.local_devices()[:seeds]))(jax.random.split(jax.random.key(0), seeds))


def lane(params: Params, seed: int) -> Params:
    """The parameters of one run out of those of all, on one device."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[seed]), params)


def average(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The mean over seeds and its standard error, nan for one seed."""
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(standard_error(values))


def _beside(name: str, predicted: float, values: Sequence[float] | np.ndarray, share: float) -> Comparison:
    """The mean over seeds beside the prediction."""
    mean, error = average(values)
    return within(name, predicted, mean, share, error)
