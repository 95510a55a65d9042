"""Full-batch gradient descent in float64 on a frozen population: where the linear rate of theory can be seen.

Descent on fresh samples ends in a noise floor. Here the same prompts are used at every step, so the loss is one convex
function of W, with its own minimiser (`newton`), smoothness and Hessian. Any loss `loss(weights, data)` that JAX can
trace will do; two are given:

    frozen_loss      the cross-entropy on drawn prompts: class sums S_k, query x, and Bayes' posterior or the label
    integrated_loss  two classes: that of drawn tasks and contexts, with query and label integrated out
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from rlhf_jax.icl.checks import at_least, positive
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.precision import in_float64
from rlhf_jax.icl.shift import shifted
from rlhf_jax.icl.tasks.mixtures import Statistics, bayes_logits, draw_means, draw_statistics

Loss = Callable[[Float[Array, "d d"], Any], Float[Array, ""]]


class Frozen(NamedTuple):
    """Prompts that descent sees at every step.

    Attributes:
        differences: S_k - S_0 for k = 1 .. c - 1, all that the softmax sees of the class sums, float64 [n, c - 1, d].
        query: x, float64 [n, d].
        targets: probabilities of the classes 1 .. c - 1, float64 [n, c - 1].
    """

    differences: np.ndarray | Array
    query: np.ndarray | Array
    targets: np.ndarray | Array


class Contexts(NamedTuple):
    """Tasks of two classes with one context each, for the loss in which the query is integrated out.

    Attributes:
        means: mu_0 and mu_1, float64 [n, 2, d].
        sums: p = S_1 - S_0, float64 [n, d].
        covariance: Lambda, float64 [d, d].
    """

    means: np.ndarray | Array
    sums: np.ndarray | Array
    covariance: np.ndarray | Array


class Path(NamedTuple):
    """What descent did, at steps 0 .. `steps`.

    Attributes:
        squared_distance: |W_t - W*|^2, [steps + 1].
        loss_gap: L(W_t) - L(W*), [steps + 1].
        weights: the last W, [d, d].
    """

    squared_distance: np.ndarray
    loss_gap: np.ndarray
    weights: np.ndarray


@in_float64
def freeze(
    mixture: Mixture,
    length: int,
    prompts: int,
    seed: int = 0,
    labels: Literal["posterior", "hard"] = "posterior",
    stratified: bool = False,
) -> Frozen:
    """Draws a population of prompts.

    Args:
        mixture: the family of tasks.
        length: examples in a context, N.
        prompts: how many, each of its own task.
        seed: of the draws.
        labels: "posterior" targets are those of Bayes; "hard" ones are the label of the query: the same expectation
            with far more noise (100 times the variance of the gradient at N = 1000).
        stratified: contexts hold N / c examples of each class.

    Raises:
        ValueError: a count below 1, or another name of labels.
    """
    if labels not in ("posterior", "hard"):
        raise ValueError(f'the labels are {labels!r}: give "posterior" or "hard".')
    length, prompts = at_least("context length N", length, 1), at_least("number of prompts", prompts, 1)
    means, statistics, posterior = _draw(mixture, length, prompts, stratified, jax.random.key(seed))
    targets = posterior
    if labels == "hard":
        targets = jax.nn.one_hot(statistics.query_label, mixture.classes, dtype=means.dtype)
    return Frozen(statistics.sums[:, 1:] - statistics.sums[:, :1], statistics.query, targets[:, 1:])


@in_float64
def freeze_contexts(mixture: Mixture, length: int, prompts: int, seed: int = 0) -> Contexts:
    """Draws tasks of two classes and a context each, for `integrated_loss`.

    Raises:
        ValueError: more than two classes, or a count below 1.
    """
    if mixture.classes != 2:
        raise ValueError(f"the query is integrated out for two classes only, not {mixture.classes}: use `freeze`.")
    length, prompts = at_least("context length N", length, 1), at_least("number of prompts", prompts, 1)
    means, statistics, _ = _draw(mixture, length, prompts, False, jax.random.key(seed))
    return Contexts(means, statistics.sums[:, 1] - statistics.sums[:, 0], mixture.matrix)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(
    mixture: Mixture, length: int, prompts: int, stratified: bool, key: Key[Array, ""]
) -> tuple[Float[Array, "n c d"], Statistics, Float[Array, "n c"]]:
    """Means, sufficient statistics, and Bayes' posterior."""
    law = shifted(mixture)
    task_key, context_key = jax.random.split(key)
    means = draw_means(task_key, law, prompts)
    statistics = draw_statistics(context_key, law, means, length, stratified)
    return means, statistics, jax.nn.softmax(bayes_logits(law, means, statistics.query), axis=1)


def frozen_loss(weights: Float[Array, "d d"], frozen: Frozen) -> Float[Array, ""]:
    """Mean cross-entropy of the reduced model, log(1 + sum_k e^z_k) - sum_k t_k z_k, z_k = (S_k - S_0)' W x.

    For two classes it is softplus(z) - t z. Its gradient is the mean of (softmax(z)_k - t_k)(S_k - S_0) x', its Hessian
    that of J_kl vec((S_k - S_0) x') vec((S_l - S_0) x')'.
    """
    turned = jnp.einsum("de,ne->nd", weights, frozen.query, precision="highest")
    z = jnp.einsum("nkd,nd->nk", frozen.differences, turned, precision="highest")
    return jnp.mean(jax.nn.logsumexp(jnp.pad(z, ((0, 0), (1, 0))), axis=1) - jnp.sum(frozen.targets * z, axis=1))


def integrated_loss(weights: Float[Array, "d d"], contexts: Contexts) -> Float[Array, ""]:
    """Mean cross-entropy for two classes with query and label integrated out: z | y ~ N(p'W mu_y, p'W Lambda W'p), so

        L(W) = mean of 1/2 { E softplus(z_1) - E z_1 + E softplus(z_0) },

    each a one-dimensional integral by 20 Gauss-Hermite nodes. Far less noise than `frozen_loss` on as many prompts
    (38 times less variance of the gradient at N = 100). Derived here.
    """
    nodes, masses = np.polynomial.hermite_e.hermegauss(20)
    nodes, masses = jnp.asarray(nodes), jnp.asarray(masses / masses.sum())
    turned = jnp.einsum("nd,de->ne", contexts.sums, weights, precision="highest")
    centre = jnp.einsum("ne,nke->nk", turned, contexts.means, precision="highest")
    variance = jnp.einsum("nd,de,ne->n", turned, contexts.covariance, turned, precision="highest")
    positive = variance > 0  # at W = 0 the root has no derivative, but the variance is quadratic there: it adds none
    width = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)
    z = centre[:, :, None] + width[:, None, None] * nodes[None, None, :]
    return jnp.mean(jnp.sum(jax.nn.softplus(z) @ masses, axis=1) - centre[:, 1]) / 2


@in_float64
def hessian(loss: Loss, weights: np.ndarray, data: Any) -> np.ndarray | Array:
    """Hessian of the loss over the entries of W in row-major order, [d^2, d^2]."""
    return _hessian(loss, jnp.asarray(weights), jax.tree.map(jnp.asarray, data))


def smoothness(data: Frozen | Contexts) -> float:
    """The smoothness l of `frozen_loss` or `integrated_loss` on these data, (c / 2) lambda_max(Hessian(0)).

    The population's counterpart is `theory.curvature.smoothness`, where the factor c / 2 is derived.
    """
    if isinstance(data, Frozen):
        dimension, classes = data.query.shape[1], data.targets.shape[1] + 1
        curvature = hessian(frozen_loss, np.zeros((dimension, dimension)), data)
        return classes / 2 * float(np.linalg.eigvalsh(curvature)[-1])
    count, dimension = data.sums.shape
    second = data.covariance + np.einsum("nkd,nke->nde", data.means, data.means) / 2
    outer = (data.sums[:, :, None] * data.sums[:, None, :]).reshape(count, -1)
    total = (outer.T @ second.reshape(count, -1)).reshape((dimension,) * 4) / count
    return float(np.linalg.eigvalsh(total.transpose(0, 2, 1, 3).reshape(dimension**2, dimension**2))[-1]) / 4


@in_float64
def newton(loss: Loss, data: Any, start: np.ndarray) -> np.ndarray | Array:
    """The minimiser of a convex loss, by Newton's method with backtracking, [d, d].

    Args:
        loss: `loss(weights, data)`; strictly convex.
        data: what it is of.
        start: where to start, [d, d]; not 0 for `integrated_loss`, whose Hessian there autodiff does not see.

    Raises:
        ValueError: no minimiser was found in 50 steps: there are too few prompts, and the loss has none.
    """
    data = jax.tree.map(jnp.asarray, data)
    weights = jnp.asarray(start)
    value, gradient = _value_and_gradient(loss, weights, data)
    for _ in range(50):
        step = -jnp.linalg.solve(_hessian(loss, weights, data), gradient.reshape(-1)).reshape(weights.shape)
        decrease = -float(jnp.sum(step * gradient))
        if 0 <= decrease < 1e-26:
            return weights
        size = 1.0
        while size > 1e-10:
            there = _value_and_gradient(loss, weights + size * step, data)
            if there[0] <= value - 1e-4 * size * decrease + 1e-15:
                break
            size /= 2
        weights = weights + size * step
        value, gradient = there
    raise ValueError(
        "Newton's method found no minimiser: give more prompts than W has entries, and overlapping classes."
    )


def check_learning_rate(learning_rate: int | float, smoothness: int | float) -> None:
    """Refuses a step with which gradient descent on a loss of smoothness l may diverge.

    Raises:
        ValueError: it is above 2 / l, not above 0, or not finite; the sentence says what l is. Or l is not above 0.

    Example:
        >>> check_learning_rate(4.0, smoothness=0.625)
        Traceback (most recent call last):
            ...
        ValueError: the learning rate is 4, above 2 / l = 3.2, where l = 0.625 is the smoothness of this loss: give at
        most 2 / l, or 1 / l = 1.6, with which every step descends.
    """
    positive("smoothness l", smoothness)
    if not (np.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(
            f"the learning rate is {learning_rate:g}: give a finite number above 0 and at most 2 / l = "
            f"{2 / smoothness:.6g}, where l = {smoothness:.6g} is the smoothness of this loss."
        )
    if learning_rate > 2 / smoothness:
        raise ValueError(
            f"the learning rate is {learning_rate:.6g}, above 2 / l = {2 / smoothness:.6g}, where l = {smoothness:.6g} "
            f"is the smoothness of this loss: give at most 2 / l, or 1 / l = {1 / smoothness:.6g}, with which every "
            "step descends."
        )


def gradient_descent(
    loss: Loss,
    data: Any,
    start: np.ndarray,
    minimiser: np.ndarray,
    learning_rate: int | float,
    steps: int,
    smoothness: int | float,
) -> Path:
    """Gradient descent W_{t+1} = W_t - eta grad L(W_t), one scan in float64.

    Args:
        loss: `loss(weights, data)`.
        data: what it is of.
        start: W_0, [d, d].
        minimiser: W*, [d, d], as `newton` gives it for the same data.
        learning_rate: eta, at most 2 / l.
        steps: how many, >= 1.
        smoothness: l of this loss (`smoothness`).

    Returns:
        Distances and loss gaps; both fall with the slope `theory.curvature.rate` of the Hessian at W*.

    Raises:
        ValueError: a learning rate as in `check_learning_rate`, or `steps` below 1; before anything is run.
    """
    check_learning_rate(learning_rate, smoothness)
    steps = at_least("number of steps", steps, 1)
    return _descend(loss, steps, data, np.asarray(start), np.asarray(minimiser), np.float64(learning_rate))


@in_float64
def _descend(
    loss: Loss, steps: int, data: Any, start: np.ndarray, minimiser: np.ndarray, learning_rate: np.float64
) -> Path:
    arrays = jax.tree.map(jnp.asarray, (data, start, minimiser, learning_rate))
    return _scan(loss, steps, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan(loss: Loss, steps: int, data: Any, start: Array, minimiser: Array, learning_rate: Array) -> Path:
    least = loss(minimiser, data)

    def step(weights: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        value, gradient = jax.value_and_grad(loss)(weights, data)
        record = (jnp.sum((weights - minimiser) ** 2), value - least)
        return weights - learning_rate * gradient, record

    last, (distances, gaps) = jax.lax.scan(step, start, length=steps)
    final = (jnp.sum((last - minimiser) ** 2), loss(last, data) - least)
    return Path(jnp.append(distances, final[0]), jnp.append(gaps, final[1]), last)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradient(loss: Loss, weights: Array, data: Any) -> tuple[Array, Array]:
    return jax.value_and_grad(loss)(weights, data)


@functools.partial(jax.jit, static_argnums=0)
def _hessian(loss: Loss, weights: Array, data: Any) -> Array:
    """One product with the Hessian at a time: memory does not grow with d^2."""
    shape = weights.shape
    gradient = jax.grad(lambda there: loss(there, data))

    def row(direction: Array) -> Array:
        return jax.jvp(gradient, (weights,), (direction.reshape(shape),))[1].reshape(-1)

    return jax.lax.map(row, jnp.eye(weights.size, dtype=weights.dtype))
