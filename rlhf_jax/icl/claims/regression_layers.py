"""Trained linear transformers on in-context regression, beside the closed forms of what they learn.

Ahn et al. 2023 (arXiv 2306.00297) for k layers and GD++, von Oswald et al. 2023 (arXiv 2212.07677) for one layer with
all its matrices. Inputs are drawn raw, and trained with Adam under a cosine schedule that ends at 0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from rlhf_jax.icl.comparison import Comparison, within
from rlhf_jax.icl.models.deep_linear import LinearLayers, deep_linear, deep_linear_of_moments
from rlhf_jax.icl.models.linear_attention import SelfAttention, embed, linear_attention, read_out
from rlhf_jax.icl.theory import construction, preconditioned
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
    """

    comparisons: list[Comparison]
    layers: np.ndarray
    predicted: np.ndarray
    shared: np.ndarray
    trained: np.ndarray
    curves: np.ndarray


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
        losses.append([trained_loss(_lane(fits.params, seed), length) for seed in range(seeds)])
        curves.append(np.asarray(fits.losses, np.float64))
        setting = f"d={dimension}, n={length}, k={k}"
        predicted = preconditioned.best_loss(dimension, length, k)
        rows.append(within(f"loss of linear layers ({setting})", predicted, *_mean(losses[-1], share=0.03)))
        for number, step in enumerate(preconditioned.best_steps(dimension, length, k)):
            rows.append(within(f"step {number + 1} ({setting})", step, *_mean(found[:, number], share=0.015)))
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
    layers: int = 2,
    seeds: int = 3,
    steps: int = 3000,
    batch: int = 1000,
    rate: float = 2e-2,
    starts: int = 100,
) -> DeepLayers:
    """Layers that transform their inputs too end in a minimum that theory lists, which need not be the global one.

    One row a seed: its loss beside that of the nearest minimum; the name says which that is. Noise has a part in it:
    with 1,000 prompts an update two seeds of two ended in the local minimum of 0.0865, with 250 both came close to the
    global one, 0.0575.

    Args:
        dimension: d.
        length: n.
        layers: k.
        seeds: runs.
        steps: updates.
        batch: fresh prompts an update.
        rate: of Adam, at the start.
        starts: descents with which theory looks for minima.
    """
    minima = preconditioned.gd_plus_plus_minima(dimension, length, layers, starts)
    fits = train_layers(layers, True, dimension, length, seeds, steps, batch, rate)
    rows, losses = [], []
    for seed in range(seeds):
        losses.append(trained_loss(_lane(fits.params, seed), length))
        place = int(np.argmin([abs(one.loss - losses[-1]) for one in minima]))
        which = "the global minimum" if place == 0 else f"local minimum {place + 1} of {len(minima)}"
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
    )


def constructed_step(
    settings: Sequence[tuple[int, int]] = ((10, 10), (5, 10), (10, 25)),
    width: float = 2.0,
    seeds: int = 2,
    steps: int = 2000,
    batch: int = 500,
    rate: float = 1e-2,
    evaluation: int = 50_000,
) -> list[Comparison]:
    """A layer with all its matrices free learns one step of gradient descent of the best rate, on uniform inputs.

    Rows: the loss (1/2) E(error)^2, the rate that its matrices amount to, and the cosine of its gradient over the
    query with that of the step (von Oswald et al.'s measure). Means over seeds. The loss is the exact one of the step
    plus the mean difference of the two over the same prompts.

    Args:
        settings: pairs (d, N).
        width: of the inputs, uniform between -width / 2 and width / 2.
        seeds: runs of each.
        steps: updates.
        batch: fresh prompts an update.
        rate: of Adam, at the start.
        evaluation: prompts to measure on.
    """
    rows = []
    for dimension, length in settings:

        def draw(key: Key[Array, ""], count: int, d: int = dimension, n: int = length) -> tuple[Array, ...]:
            for_inputs, for_weights = jax.random.split(key)
            inputs = jax.random.uniform(for_inputs, (count, n + 1, d), minval=-width / 2, maxval=width / 2)
            targets = jnp.einsum("bnd,bd->bn", inputs, jax.random.normal(for_weights, (count, d)))
            return inputs[:, :-1], targets[:, :-1], inputs[:, -1], targets[:, -1]

        def loss(params: SelfAttention, key: Key[Array, ""], draw: Callable = draw) -> Float[Array, ""]:
            *prompt, target = draw(key, batch)
            return jnp.mean((_all_matrices(params, *prompt) - target) ** 2) / 2

        w = dimension + 1
        scale = 0.5 / np.sqrt(w)
        start = lambda key, w=w, scale=scale: SelfAttention(*scale * jax.random.normal(key, (2, w, w)))  # noqa: E731
        fits = _train(loss, start, seeds, steps, rate)

        moments = construction.uniform_inputs(width)
        best = construction.best_rate(dimension, length, moments)
        *prompt, target = draw(jax.random.key(10**6), evaluation)
        inputs, targets, query = prompt
        direction = best / length * jnp.einsum("bn,bnd->bd", targets, inputs)
        stepped = jnp.sum(direction * query, axis=1)
        losses, rates, cosines = [], [], []
        for seed in range(seeds):
            params = _lane(fits.params, seed)
            slope = jax.grad(_summed, argnums=3)(params, *prompt)
            lengths = jnp.linalg.norm(slope, axis=1) * jnp.linalg.norm(direction, axis=1)
            cosines.append(float(jnp.mean(jnp.sum(slope * direction, axis=1) / lengths)))
            worse = (_all_matrices(params, *prompt) - target) ** 2 - (stepped - target) ** 2
            losses.append(construction.best_loss(dimension, length, moments) + float(worse.mean()) / 2)
            block = params.value[-1, -1] * params.key_query[:dimension, :dimension]
            rates.append(-float(jnp.trace(block)) / dimension)
        setting = f"d={dimension}, N={length}, width {width:g}"
        expected = construction.best_loss(dimension, length, moments)
        rows.append(within(f"loss of one layer, all matrices ({setting})", expected, *_mean(losses, share=0.01)))
        rows.append(within(f"learnt rate ({setting})", best, *_mean(rates, share=0.02)))
        mean, _, error = _mean(cosines, share=0.0)
        rows.append(Comparison(f"cosine with the step ({setting})", 1.0, mean, error, tolerance=0.01))
    return rows


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
        for_inputs, for_weights = jax.random.split(key)
        inputs = jax.random.normal(for_inputs, (batch, length + 1, dimension))
        targets = jnp.einsum("bnd,bd->bn", inputs, jax.random.normal(for_weights, (batch, dimension)))
        predictions = deep_linear(params, inputs[:, :-1], targets[:, :-1], inputs[:, -1])
        return jnp.mean((predictions - targets[:, -1]) ** 2)

    def start(key: Key[Array, ""]) -> LinearLayers:
        a, b = 0.01 * jax.random.normal(key, (2, layers, dimension, dimension))
        return LinearLayers(a, b if rotate else None)

    return _train(loss, start, seeds, steps, rate)


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

    def errors(layers: LinearLayers) -> Float[Array, "d d"]:
        def of_pair(weight: Float[Array, " d"], query: Float[Array, " d"]) -> Float[Array, ""]:
            means = jnp.einsum("bde,e->bd", moments, weight)
            predictions = deep_linear_of_moments(layers, moments, means, jnp.broadcast_to(query, means.shape))
            return jnp.mean((predictions - weight @ query) ** 2)

        units = jnp.eye(d)
        return jax.lax.map(lambda weight: jax.vmap(lambda query: of_pair(weight, query))(units), units)

    def isotropic(blocks: Float[Array, "k d d"]) -> Float[Array, "k d d"]:
        return jnp.trace(blocks, axis1=1, axis2=2)[:, None, None] / d * jnp.eye(d)[None]

    plain = jax.tree.map(isotropic, params)
    difference = jax.jit(errors)(params).sum() - jax.jit(errors)(plain).sum()
    a = -np.asarray(plain.preconditioners, np.float64)[:, 0, 0]
    if params.rotations is None:
        return float(difference) + preconditioned.loss_of_steps(a, d, length)
    products = (a * np.asarray(plain.rotations, np.float64)[:, 0, 0])[: k - 1]
    return float(difference) + preconditioned.gd_plus_plus_loss(a, products, d, length)


def _train(loss: Callable, start: Callable[[Array], Params], seeds: int, steps: int, rate: float) -> Fit:
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def run(key: Key[Array, ""]) -> Fit:
        for_start, for_steps = jax.random.split(key)
        return fit(loss, start(for_start), optimizer, steps, for_steps)

    return jax.jit(over_lanes(run))(jax.random.split(jax.random.key(0), seeds))


def _all_matrices(
    params: SelfAttention, inputs: Float[Array, "B N d"], targets: Float[Array, "B N"], query: Float[Array, "B d"]
) -> Float[Array, " B"]:
    """Minus the label slot of the query after one layer."""
    return -read_out(linear_attention(params, embed(inputs, targets[..., None], query), attend_to_query=False), 1)[:, 0]


def _summed(params: SelfAttention, inputs: Array, targets: Array, query: Array) -> Float[Array, ""]:
    return _all_matrices(params, inputs, targets, query).sum()


def _lane(params: Params, seed: int) -> Params:
    return jax.tree.map(lambda leaf: leaf[seed], params)


def _mean(values: Sequence[float] | np.ndarray, share: float) -> tuple[float, float, float]:
    """The last arguments of `within`: the mean over seeds, the share, and the standard error."""
    values = np.asarray(values, np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan
    return float(values.mean()), share, error
