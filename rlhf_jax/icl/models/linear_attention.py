"""One layer of linear self-attention that reads a prompt: with all its matrices, and reduced to what they do.

A prompt is a matrix whose columns are examples, the query last, and whose lower rows hold labels, zero for the query:

    E = [[x_1 .. x_N  x_q],         F = W_V E (E' W_KQ E) / N,
         [y_1 .. y_N   0 ]],        the prediction: the lower rows of the last column of F.

N is the number of examples of the context at hand, M in a test on M of them. With W_V = blockdiag(0, u I) and
W_KQ = blockdiag(U, 0) (`sparse`) the query's own column, whose labels are zero, adds nothing, and what is left is
bilinear in the query and one mean a label slot:

    classification   z_k = S_k' W x_q,   S_k = (1/N) sum_i 1{y_i = k} x_i,   W = u U    (`class_sums`, `reduced_logits`)
    two classes      z = p' W x_q,       p = (1/N) sum_i y_i x_i,  y_i = +-1            (`label_mean`, `reduced_logit`)
    regression       x_q' A p,           p of the targets,  A = u U'                    (`reduced_prediction`)

Two classes are z = z_1 - z_0 of the first row, with the same W, because p = S_1 - S_0. Products are taken at the
highest precision: the lower one that accelerators default to would hide what theory says.

Sources: Shen, Zhou, Yang, Shen 2024 (arXiv 2410.11778) for classification; Zhang, Frei, Bartlett 2023 (arXiv
2306.09927) for regression.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

einsum = functools.partial(jnp.einsum, precision="highest")


class SelfAttention(NamedTuple):
    """The two matrices of a layer of attention, of any kind; leading axes count heads or layers.

    Attributes:
        value: W_V (the projection and the values in one; P of Ahn et al.), [..., w, w].
        key_query: W_KQ, the keys times the queries (Q of Ahn et al.), [..., w, w].
    """

    value: Float[Array, "*stack w w"]
    key_query: Float[Array, "*stack w w"]


def embed(
    inputs: Float[Array, "B N d"],
    labels: Float[Array, "B N s"],
    query: Float[Array, "B d"],
    query_slots: Float[Array, "B s"] | None = None,
) -> Float[Array, "B w S"]:
    """The prompt as the matrix E above, w = d + s rows and S = N + 1 columns.

    Args:
        inputs: x_1 .. x_N, [B, N, d].
        labels: what stands below them, [B, N, s]: `signs(labels)[..., None]`, `jax.nn.one_hot(labels, c)`, or targets.
        query: x_q, [B, d].
        query_slots: what stands below the query, [B, s]; None: zeros.

    Example:
        >>> embed(jnp.array([[[1.0], [2.0]]]), jnp.array([[[-1.0], [1.0]]]), jnp.array([[3.0]]))[0].tolist()
        [[1.0, 2.0, 3.0], [-1.0, 1.0, 0.0]]
    """
    slots = jnp.zeros_like(labels[:, 0]) if query_slots is None else query_slots
    rows = jnp.concatenate([inputs, labels], axis=-1)
    last = jnp.concatenate([query, slots], axis=-1)
    return jnp.concatenate([rows, last[:, None]], axis=1).swapaxes(1, 2)


def signs(labels: Int[Array, "*batch"], dtype: DTypeLike = jnp.float32) -> Float[Array, "*batch"]:
    """The two classes as numbers: -1 for class 0, +1 for class 1.

    Example:
        >>> signs(jnp.array([0, 1])).tolist()
        [-1.0, 1.0]
    """
    return 2 * labels.astype(dtype) - 1


def linear_attention(
    attention: SelfAttention,
    embedding: Float[Array, "B w S"],
    length: Float[Array, ""] | float | int | None = None,
    attend_to_query: bool = True,
) -> Float[Array, "B w S"]:
    """F = W_V E (E' W_KQ E) / N, computed as W_V (E E') W_KQ E / N: no matrix of S x S exists.

    Args:
        attention: W_V and W_KQ, [w, w] each, every entry free.
        embedding: E, [B, w, S].
        length: what the sum is divided by; None: S - 1, the examples of this context. Columns of zeros add nothing, so
            shorter contexts may be padded with them (before the query) if their own length is given.
        attend_to_query: whether the last column is among those that are summed over, as in Zhang et al. and Shen et
            al.; Ahn et al. and von Oswald et al. leave it out.

    Returns:
        F, [B, w, S], without the residual: E + F is a layer of Zhang et al.'s regression, F one of Shen et al.'s.

    Raises:
        ValueError: the matrices are not those of one layer of this width, or the context is empty.
    """
    check_width(attention, embedding)
    summed = embedding if attend_to_query else embedding[:, :, :-1]
    gram = einsum("bvs,bws->bvw", summed, summed)
    inner = einsum("bvw,wu,bus->bvs", gram, attention.key_query, embedding)
    return einsum("wv,bvs->bws", attention.value, inner) / divisor(embedding, length)


def read_out(embedding: Float[Array, "B w S"], outputs: int) -> Float[Array, "B s"]:
    """The label slots of the query: the last `outputs` entries of the last column.

    Args:
        embedding: what a layer gave, F or E + F.
        outputs: number of label slots s: 1, or the classes.

    Returns:
        Logits or predictions, [B, s].
    """
    return embedding[:, -outputs:, -1]


def sparse(weights: Float[Array, "d d"], outputs: int, scale: Float[Array, ""] | float | int = 1.0) -> SelfAttention:
    """The matrices of the sparse form: W_V = blockdiag(0, u I_s), W_KQ = blockdiag(U, 0).

    Args:
        weights: U, [d, d]: W of Shen et al. (u = 1), the upper left block of Zhang et al.
        outputs: number of label slots s: 1, or the classes.
        scale: u, the lower right block of Zhang et al.

    Example:
        >>> value, key_query = sparse(jnp.array([[3.0]]), 1, 2.0)
        >>> value.tolist(), key_query.tolist()
        ([[0.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 0.0]])
    """
    d = weights.shape[0]
    lower = jnp.asarray(scale, weights.dtype) * jnp.eye(outputs, dtype=weights.dtype)
    return SelfAttention(
        value=jnp.pad(lower, ((d, 0), (d, 0))), key_query=jnp.pad(weights, ((0, outputs), (0, outputs)))
    )


def class_sums(inputs: Float[Array, "B N d"], labels: Int[Array, "B N"], classes: int) -> Float[Array, "B c d"]:
    """S_k = (1/N) sum_i 1{y_i = k} x_i: all that the sparse layer reads of a context.

    Args:
        inputs: [B, N, d].
        labels: int32 [B, N] below `classes`.
        classes: number of classes c.

    Returns:
        The sums, [B, c, d].

    Example:
        >>> class_sums(jnp.array([[[3.0], [6.0], [6.0]]]), jnp.array([[0, 1, 1]]), 2).tolist()
        [[[1.0], [4.0]]]
    """
    shown = jax.nn.one_hot(labels, classes, dtype=inputs.dtype)
    return einsum("bnc,bnd->bcd", shown, inputs) / inputs.shape[1]


def label_mean(inputs: Float[Array, "B N d"], labels: Float[Array, "B N"]) -> Float[Array, "B d"]:
    """p = (1/N) sum_i y_i x_i, of labels +-1 (`signs`) or of targets.

    Args:
        inputs: [B, N, d].
        labels: [B, N].

    Returns:
        p, [B, d]; for labels +-1 it is S_1 - S_0.
    """
    return einsum("bn,bnd->bd", labels, inputs) / inputs.shape[1]


def reduced_logits(
    weights: Float[Array, "d d"], sums: Float[Array, "B c d"], query: Float[Array, "B d"]
) -> Float[Array, "B c"]:
    """z_k = S_k' W x_q, the logits of the sparse layer for c classes.

    Args:
        weights: W, [d, d].
        sums: S_k, [B, c, d], see `class_sums`.
        query: x_q, [B, d].

    Returns:
        The logits, [B, c].
    """
    return einsum("bcd,bd->bc", sums, einsum("de,be->bd", weights, query))


def reduced_logit(
    weights: Float[Array, "d d"], mean: Float[Array, "B d"], query: Float[Array, "B d"]
) -> Float[Array, " B"]:
    """z = p' W x_q, the logit of class 1 of two.

    Args:
        weights: W, [d, d].
        mean: p of labels +-1, [B, d], see `label_mean`.
        query: x_q, [B, d].

    Returns:
        The logit, [B]; the probability of class 1 is its sigmoid.
    """
    return einsum("bd,de,be->b", mean, weights, query)


def reduced_prediction(
    matrix: Float[Array, "d d"], mean: Float[Array, "B d"], query: Float[Array, "B d"]
) -> Float[Array, " B"]:
    """x_q' A p, the prediction of the sparse layer for regression; A p estimates the weights of the task.

    Args:
        matrix: A = u U', [d, d].
        mean: p of the targets, [B, d], see `label_mean`.
        query: x_q, [B, d].

    Returns:
        The prediction, [B].
    """
    return reduced_logit(matrix, query, mean)


def check_width(attention: SelfAttention, embedding: Float[Array, "B w S"]) -> None:
    """Refuses matrices whose last two axes are not the rows of a prompt, and a prompt that is a query alone.

    Raises:
        ValueError: naming the shapes.
    """
    rows, columns = embedding.shape[1:]
    if any(matrix.shape[-2:] != (rows, rows) for matrix in attention):
        shapes = " and ".join(str(matrix.shape) for matrix in attention)
        raise ValueError(f"tokens have {rows} entries and the matrices of attention are {shapes}: make them equal.")
    if columns < 2:
        raise ValueError("the prompt is a query alone: give at least 1 example before it.")


def divisor(embedding: Float[Array, "B w S"], length: Float[Array, ""] | float | int | None) -> Float[Array, ""]:
    """The length given, or the number of columns before the query, in the dtype of the prompt."""
    return jnp.asarray(embedding.shape[2] - 1 if length is None else length, embedding.dtype)
