"""Linear transformers of k layers for in-context regression, which run gradient descent in their forward pass.

The prompt is Z_0 = [[x_1 .. x_n  x_q], [y_1 .. y_n  0]]. Every layer reads the examples (not the query) and adds

    Z_{l+1} = Z_l + (1/n) P_l Z_l Mask (Z_l' Q_l Z_l),   Mask = diag(I_n, 0),   the prediction is -[Z_k]_{d+1, n+1}

(Ahn, Cheng, Daneshmand, Sra 2023, arXiv 2306.00297). `layers_of_attention` takes any P_l and Q_l. `LinearLayers` are
the sparse ones, P_l = blockdiag(B_l, 1) and Q_l = blockdiag(A_l, 0): preconditioned gradient descent where B_l = 0, the
GD++ of von Oswald et al. otherwise. A layer then does to every token (x, y), the query's slot among the y,

    y <- y + p' A x,   x <- T x,   T = I + B S A,   p = (1/n) sum_i y_i x_i,   S = (1/n) sum_i x_i x_i',

so that p <- T (p + S A' p) and S <- T S T'. `deep_linear` keeps p and S in place of the examples: d x d matrices only,
whatever n is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.icl.models.linear_attention import SelfAttention, einsum, label_mean, linear_attention


class LinearLayers(NamedTuple):
    """The blocks of k sparse layers.

    Attributes:
        preconditioners: A_l, [k, d, d]; a layer that descends has a negative one, -a_l Sigma^-1 at the optimum.
        rotations: B_l, [k, d, d], which move the inputs too (GD++); None: they stay (B_l = 0).
    """

    preconditioners: Float[Array, "k d d"]
    rotations: Float[Array, "k d d"] | None = None


def deep_linear(
    layers: LinearLayers,
    inputs: Float[Array, "B n d"],
    targets: Float[Array, "B n"],
    query: Float[Array, "B d"],
) -> Float[Array, " B"]:
    """Predictions of k sparse layers.

    Args:
        layers: the blocks.
        inputs: x_1 .. x_n, [B, n, d].
        targets: y_1 .. y_n, [B, n].
        query: x_q, [B, d].

    Returns:
        Minus the label slot of the query, [B].

    Raises:
        ValueError: the blocks are not [k, d, d].

    Example:
        >>> one = LinearLayers(preconditioners=-jnp.eye(1)[None])  # a step of gradient descent of size 1 from 0
        >>> deep_linear(one, jnp.array([[[1.0], [3.0]]]), jnp.array([[2.0, 4.0]]), jnp.array([[0.5]])).tolist()
        [3.5]
    """
    second_moment = einsum("bnd,bne->bde", inputs, inputs) / inputs.shape[1]
    return deep_linear_of_moments(layers, second_moment, label_mean(inputs, targets), query)


def deep_linear_of_moments(
    layers: LinearLayers,
    second_moment: Float[Array, "B d d"],
    mean: Float[Array, "B d"],
    query: Float[Array, "B d"],
) -> Float[Array, " B"]:
    """Predictions of k sparse layers from all that they read of the examples.

    Args:
        layers: the blocks.
        second_moment: S = (1/n) sum_i x_i x_i', [B, d, d].
        mean: p = (1/n) sum_i y_i x_i, [B, d]; S w for noiseless targets w'x.
        query: x_q, [B, d].

    Returns:
        Minus the label slot of the query, [B].

    Raises:
        ValueError: the blocks are not [k, d, d].
    """
    d = query.shape[-1]
    for blocks in layers:
        if blocks is not None and blocks.shape[1:] != (d, d):
            raise ValueError(
                f"inputs have {d} features and the blocks of the layers are {blocks.shape}: make them equal."
            )

    def layer(state: tuple, blocks: LinearLayers) -> tuple[tuple, None]:
        moment, mean, query, slot = state
        a, b = blocks
        slot = slot + einsum("bd,de,be->b", mean, a, query)
        mean = mean + einsum("bde,fe,bf->bd", moment, a, mean)
        if b is not None:
            turn = jnp.eye(d, dtype=a.dtype)[None] + einsum("de,bef,fg->bdg", b, moment, a)
            query, mean = (einsum("bde,be->bd", turn, vector) for vector in (query, mean))
            moment = einsum("bde,bef,bgf->bdg", turn, moment, turn)
        return (moment, mean, query, slot), None

    start = (second_moment, mean, query, jnp.zeros_like(query[:, 0]))
    (_, _, _, slot), _ = jax.lax.scan(layer, start, layers)
    return -slot


def layers_of_attention(layers: SelfAttention, embedding: Float[Array, "B w S"]) -> Float[Array, "B w S"]:
    """Z_k of k layers with all their matrices, from Z_0.

    Args:
        layers: P_l as `value` and Q_l as `key_query`, [k, w, w] each.
        embedding: Z_0, [B, w, S], see `linear_attention.embed`.

    Returns:
        Z_k, [B, w, S]; the prediction is `-read_out(Z_k, 1)`.

    Raises:
        ValueError: the matrices do not fit the tokens, or the context is empty.
    """

    def layer(stream: Float[Array, "B w S"], attention: SelfAttention) -> tuple[Float[Array, "B w S"], None]:
        return stream + linear_attention(attention, stream, attend_to_query=False), None

    return jax.lax.scan(layer, embedding, layers)[0]


def with_all_matrices(layers: LinearLayers) -> SelfAttention:
    """P_l = blockdiag(B_l, 1) and Q_l = blockdiag(A_l, 0) of sparse layers, [k, d + 1, d + 1] each."""
    a, b = layers
    border = ((0, 0), (0, 1), (0, 1))
    value = jnp.pad(jnp.zeros_like(a) if b is None else b, border).at[:, -1, -1].set(1)
    return SelfAttention(value=value, key_query=jnp.pad(a, border))


def gradient_descent_layers(rates: Float[Array, " k"], initial: Float[Array, "s d"]) -> SelfAttention:
    """Layers of linear attention that are steps of gradient descent on the examples, from any initial weights.

    One step on L(W) = (1/2n) sum_i |W x_i - y_i|^2 changes W by D = -(rate/n) sum_i (W x_i - y_i) x_i'. The layer takes
    D x_j from the labels of every token, so that the next one finds the residuals of W + D:

        W_KQ = blockdiag(I, 0),   W_V = rate [[0, 0], [W_0, -I]].

    The label slots of the query start at -W_0 x_q (`embed(..., query_slots=-query @ initial.T)`) and end at -W_k x_q.

    Source: von Oswald et al. 2023 (arXiv 2212.07677), proposition 1, with its projection (rate/n) I in the value.

    Args:
        rates: step size of each of the k layers, [k].
        initial: W_0, [s, d], s targets an example; zeros for a model that starts at 0.

    Returns:
        The layers, for `layers_of_attention`: [k, d + s, d + s] each.

    Example:
        >>> layers = gradient_descent_layers(jnp.array([0.5]), jnp.array([[2.0]]))
        >>> layers.value.tolist(), layers.key_query.tolist()
        ([[[0.0, 0.0], [1.0, -0.5]]], [[[1.0, 0.0], [0.0, 0.0]]])
    """
    s, d = initial.shape
    lower = jnp.concatenate([initial, -jnp.eye(s, dtype=initial.dtype)], axis=1)
    value = rates[:, None, None] * jnp.pad(lower, ((d, 0), (0, 0)))[None]
    key_query = jnp.pad(jnp.eye(d, dtype=initial.dtype), ((0, s), (0, s)))
    return SelfAttention(value=value, key_query=jnp.broadcast_to(key_query, value.shape))
