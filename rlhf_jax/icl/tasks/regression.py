"""Prompts of in-context regression: linear, sparse, network and tree functions.

A prompt is N examples (x_i, f(x_i) + noise) of a function f that is drawn anew for each prompt, and a query:

    function = draw_function(key, setting, count)     what is to be learnt in context
    evaluate(function, inputs)                        its values
    draw_prompt(key, setting, function, length)       inputs, targets, a query and its target
    draw_regression(key, setting, count, length)      both at once

Inputs that training did not show are made by the functions of `changes`; other noise, another scale of the task and
another covariance of the inputs by another setting (`dataclasses.replace`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rlhf_jax.icl.checks import at_least, check_covariance, positive

Kind = Literal["linear", "sparse", "network", "tree"]
Inputs = Literal["gaussian", "uniform", "random_covariance"]
Prior = Literal["isotropic", "inverse_covariance"]


@dataclasses.dataclass(frozen=True)
class Regression:
    """A family of regression tasks.

    Attributes:
        dimension: features d, >= 1.
        kind: of the function. "linear": f(x) = w' x (Zhang et al. 2023, arXiv 2306.09927; Ahn et al. 2023, arXiv
            2306.00297; von Oswald et al. 2023, arXiv 2212.07677). The others are those of Garg et al. 2022 (arXiv
            2208.01066). "sparse": all but `sparsity` coordinates of w, chosen at random, are zero. "network":
            f(x) = sqrt(2 / hidden) v' relu(U x) with normal U and v. "tree": a complete binary tree whose every node
            asks for the sign of one coordinate, drawn uniformly, with normal values at its leaves.
        inputs: "gaussian": x ~ N(0, Lambda). "uniform": each coordinate is uniform on (-1, 1). "random_covariance":
            x ~ N(0, diag(l)) with l_i ~ Exponential(1) drawn once a prompt (Zhang et al.).
        covariance: Lambda of gaussian inputs, rows of a symmetric positive definite [d, d]; None: the identity.
        prior: of the weights of a linear function: "isotropic", w ~ N(0, prior_scale^2 I), or "inverse_covariance",
            w ~ N(0, prior_scale^2 Lambda^-1).
        prior_scale: multiplies the function of every kind, > 0.
        noise_variance: of the targets of the context, >= 0. The target of the query has none.
        sparsity: coordinates that a sparse function reads, 1 to d.
        hidden: units of a network, >= 1.
        depth: of a tree, >= 1.

    Raises:
        ValueError: a field out of its range; the sentence names it.

    Example:
        >>> Regression(2, kind="sparse", sparsity=3)
        Traceback (most recent call last):
            ...
        ValueError: the sparsity is 3 in 2 dimensions: give at most 2.
    """

    dimension: int
    kind: Kind = "linear"
    inputs: Inputs = "gaussian"
    covariance: Sequence[Sequence[float]] | np.ndarray | None = None
    prior: Prior = "isotropic"
    prior_scale: float = 1.0
    noise_variance: float = 0.0
    sparsity: int = 3
    hidden: int = 100
    depth: int = 4

    def __post_init__(self) -> None:
        at_least("dimension d", self.dimension, 1)
        for name, value, choices in (
            ("kind of function", self.kind, get_args(Kind)),
            ("kind of inputs", self.inputs, get_args(Inputs)),
            ("prior", self.prior, get_args(Prior)),
        ):
            if value not in choices:
                raise ValueError(f"the {name} is {value!r}: choose one of {', '.join(choices)}.")
        positive("prior scale", self.prior_scale)
        positive("noise variance", self.noise_variance, or_zero=True)
        at_least("sparsity", self.sparsity, 1)
        if self.kind == "sparse" and self.sparsity > self.dimension:
            raise ValueError(
                f"the sparsity is {self.sparsity} in {self.dimension} dimensions: give at most {self.dimension}."
            )
        at_least("number of hidden units", self.hidden, 1)
        at_least("depth", self.depth, 1)
        if self.covariance is not None:
            if self.inputs != "gaussian":
                raise ValueError(f'the inputs are {self.inputs}: only "gaussian" ones have a covariance to give.')
            matrix = check_covariance(self.covariance, self.dimension)
            object.__setattr__(self, "covariance", tuple(tuple(row) for row in matrix.tolist()))
        if self.prior == "inverse_covariance" and (self.kind != "linear" or self.inputs != "gaussian"):
            raise ValueError(
                'the prior "inverse_covariance" is one of linear functions of gaussian inputs: choose those.'
            )

    def power(self, exponent: float) -> np.ndarray:
        """Lambda to a power, from its eigendecomposition, float64 [d, d]."""
        matrix = np.eye(self.dimension) if self.covariance is None else np.array(self.covariance)
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * values**exponent) @ vectors.T


class Linear(NamedTuple):
    """f(x) = w' x, one a prompt."""

    weights: Float[Array, "B d"]


class Network(NamedTuple):
    """f(x) = v' relu(U x), one a prompt, `inner` being the transpose of U and `outer` being v."""

    inner: Float[Array, "B d hidden"]
    outer: Float[Array, "B hidden"]


class Tree(NamedTuple):
    """A complete binary tree, one a prompt.

    Node i has the children 2 i + 1, for a coordinate that is not positive, and 2 i + 2; the leaves follow the nodes.
    """

    coordinates: Int[Array, "B nodes"]
    leaves: Float[Array, "B leaves"]


Function: TypeAlias = Linear | Network | Tree
Change: TypeAlias = Callable[
    [Key[Array, ""], Float[Array, "B N d"], Float[Array, "B d"]], tuple[Float[Array, "B N d"], Float[Array, "B d"]]
]


@chex.dataclass(frozen=True)
class RegressionPrompt:
    """Prompts of regression.

    Attributes:
        inputs: x_i of the context, [B, N, d].
        targets: f(x_i) with noise, [B, N].
        query: [B, d].
        query_target: f(query) without noise, [B]: the error of a prediction that is to meet a noisy target is larger by
            the noise variance.
        weights: w of linear and sparse functions, [B, d]; None for the others.
    """

    inputs: Float[Array, "B N d"]
    targets: Float[Array, "B N"]
    query: Float[Array, "B d"]
    query_target: Float[Array, " B"]
    weights: Float[Array, "B d"] | None


def draw_function(key: Key[Array, ""], setting: Regression, count: int) -> Function:
    """Draws one function a prompt.

    Args:
        key: random key.
        setting: the family of functions.
        count: functions B.

    Returns:
        A `Linear`, `Network` or `Tree`, with the prompts on axis 0 of every array.

    Raises:
        ValueError: `count` is below 1.
    """
    at_least("number of prompts", count, 1)
    value_key, choice_key = jax.random.split(key)
    d, scale = setting.dimension, setting.prior_scale
    if setting.kind == "network":
        inner = jax.random.normal(value_key, (count, d, setting.hidden))
        outer = jax.random.normal(choice_key, (count, setting.hidden))
        return Network(inner=inner, outer=scale * math.sqrt(2 / setting.hidden) * outer)
    if setting.kind == "tree":
        coordinates = jax.random.randint(choice_key, (count, 2**setting.depth - 1), 0, d, jnp.int32)
        return Tree(coordinates=coordinates, leaves=scale * jax.random.normal(value_key, (count, 2**setting.depth)))
    weights = scale * jax.random.normal(value_key, (count, d))
    if setting.prior == "inverse_covariance":
        root = jnp.asarray(setting.power(-0.5), weights.dtype)
        weights = jnp.einsum("bd,de->be", weights, root, precision="highest")
    if setting.kind == "sparse":
        order = jnp.broadcast_to(jnp.arange(d, dtype=jnp.int32), (count, d))
        order = jax.random.permutation(choice_key, order, axis=1, independent=True)
        weights = jnp.where(order < setting.sparsity, weights, 0)
    return Linear(weights=weights)


def evaluate(function: Function, inputs: Float[Array, "B n d"]) -> Float[Array, "B n"]:
    """The values of each prompt's function at its inputs, without noise.

    Args:
        function: of `draw_function`.
        inputs: [B, n, d].

    Returns:
        Values, [B, n].
    """
    if isinstance(function, Linear):
        return jnp.einsum("bnd,bd->bn", inputs, function.weights, precision="highest")
    if isinstance(function, Network):
        units = jax.nn.relu(jnp.einsum("bnd,bdh->bnh", inputs, function.inner, precision="highest"))
        return jnp.einsum("bnh,bh->bn", units, function.outer, precision="highest")
    nodes, depth = function.coordinates.shape[1], function.leaves.shape[1].bit_length() - 1
    place = jnp.zeros(inputs.shape[:2], jnp.int32)
    for _ in range(depth):
        coordinate = jnp.take_along_axis(function.coordinates, place, axis=1)
        value = jnp.take_along_axis(inputs, coordinate[:, :, None], axis=2)[:, :, 0]
        place = 2 * place + 1 + (value > 0).astype(jnp.int32)
    return jnp.take_along_axis(function.leaves, place - nodes, axis=1)


def draw_prompt(
    key: Key[Array, ""], setting: Regression, function: Function, length: int, change: Change | None = None
) -> RegressionPrompt:
    """Draws one prompt a function.

    Args:
        key: random key.
        setting: says how inputs and noise are drawn.
        function: of each prompt.
        length: examples in the context, N.
        change: gives other inputs before the function is evaluated on them, `change(key, inputs, query)` (see
            `changes`); None: nothing.

    Returns:
        The prompts, in the dtype of the function.

    Raises:
        ValueError: the length is below 1.
    """
    at_least("context length N", length, 1)
    input_key, spread_key, noise_key, change_key = jax.random.split(key, 4)
    leaf = function[-1]
    shape, dtype = (leaf.shape[0], length + 1, setting.dimension), leaf.dtype
    if setting.inputs == "uniform":
        drawn = jax.random.uniform(input_key, shape, dtype, -1.0, 1.0)
    else:
        drawn = jax.random.normal(input_key, shape, dtype)
        if setting.inputs == "random_covariance":
            drawn = drawn * jnp.sqrt(jax.random.exponential(spread_key, (shape[0], 1, shape[2]), dtype))
        elif setting.covariance is not None:
            drawn = jnp.einsum("bnd,de->bne", drawn, jnp.asarray(setting.power(0.5), dtype), precision="highest")
    inputs, query = drawn[:, :-1], drawn[:, -1]
    if change is not None:
        inputs, query = change(change_key, inputs, query)
    targets = evaluate(function, inputs)
    if setting.noise_variance > 0:
        targets = targets + math.sqrt(setting.noise_variance) * jax.random.normal(noise_key, targets.shape, dtype)
    return RegressionPrompt(
        inputs=inputs,
        targets=targets,
        query=query,
        query_target=evaluate(function, query[:, None])[:, 0],
        weights=function.weights if isinstance(function, Linear) else None,
    )


def draw_regression(
    key: Key[Array, ""], setting: Regression, count: int, length: int, change: Change | None = None
) -> RegressionPrompt:
    """Draws prompts, each with a function of its own: `draw_prompt` of `draw_function`.

    Raises:
        ValueError: `count` or `length` is below 1.
    """
    function_key, prompt_key = jax.random.split(key)
    return draw_prompt(prompt_key, setting, draw_function(function_key, setting, count), length, change)
