"""One layer of attention of any kind on the prompts of `linear_attention`, with the same read-out.

The kind is what becomes of the scores e_i' W_KQ e_j of token i for token j, the only difference between the models:

    F_j = sum_heads W_V sum_i kind(E' W_KQ E)_ij e_i,     the prediction: the lower rows of F for the query.

| kind      | weight of token i for token j   | source                                                  |
|-----------|---------------------------------|---------------------------------------------------------|
| `linear`  | s_ij / N                        | Zhang, Frei, Bartlett 2023 (arXiv 2306.09927)           |
| `relu`    | max(s_ij, 0) / N                | normalised ReLU: Bai et al. 2023 (arXiv 2306.04637)     |
| `softmax` | exp(s_ij) / sum_i' exp(s_i'j)   | Vaswani et al. 2017 (arXiv 1706.03762), scale in W_KQ   |

N is the number of examples in all three, so that their weights are comparable (Bai et al. count the query as well).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rlhf_jax.icl.checks import at_least, positive
from rlhf_jax.icl.models.linear_attention import SelfAttention, check_width, divisor, einsum, read_out

Scores = Float[Array, "B h S T"]

KINDS: dict[str, Callable[[Scores, Float[Array, ""]], Scores]] = {
    "linear": lambda scores, length: scores / length,
    "relu": lambda scores, length: jax.nn.relu(scores) / length,
    "softmax": lambda scores, length: jax.nn.softmax(scores, axis=2),
}
"""From scores of tokens i (axis 2) for tokens j (axis 3), and the number of examples, to weights."""


def init_attention(
    key: Array, width: int, heads: int = 1, scale: float = 0.1, dtype: DTypeLike = jnp.float32
) -> SelfAttention:
    """Normal matrices with a standard deviation of `scale`, [heads, w, w] each.

    Args:
        key: of the draw.
        width: rows of a prompt w: features and label slots.
        heads: how many layers of attention stand side by side; what they give is added.
        scale: standard deviation of the entries, > 0.
        dtype: of the matrices.

    Raises:
        ValueError: a width or a number of heads that is not whole or below 1, or a scale that is not above 0.
    """
    width, heads = at_least("width of the tokens", width, 1), at_least("number of heads", heads, 1)
    positive("scale of the matrices", scale)
    value, key_query = scale * jax.random.normal(key, (2, heads, width, width), dtype)
    return SelfAttention(value=value, key_query=key_query)


def attend(
    kind: str,
    attention: SelfAttention,
    embedding: Float[Array, "B w S"],
    attend_to_query: bool = True,
) -> Float[Array, "B w S"]:
    """F for all tokens of a prompt.

    Args:
        kind: a name in `KINDS`.
        attention: W_V and W_KQ of one head [w, w], or of heads that are added up [h, w, w].
        embedding: E, [B, w, S], the query in the last column.
        attend_to_query: whether the query is among the tokens i.

    Returns:
        F, [B, w, S], without the residual.

    Raises:
        ValueError: the kind is unknown, the matrices do not fit the tokens, or the context is empty.
    """
    return _attend(kind, attention, embedding, embedding, attend_to_query)


def predict(
    kind: str,
    attention: SelfAttention,
    embedding: Float[Array, "B w S"],
    outputs: int,
    attend_to_query: bool = True,
) -> Float[Array, "B s"]:
    """The label slots of the query in F: logits of classes, or a prediction. Only the query's own column is computed.

    Args:
        kind: see `attend`.
        attention: see `attend`; `linear_attention.sparse` makes the one of a single matrix W.
        embedding: see `attend`.
        outputs: number of label slots s.
        attend_to_query: see `attend`.

    Returns:
        Logits or predictions, [B, s].

    Raises:
        ValueError: as `attend`.

    Example:
        With W = 0 softmax takes the mean of the labels of all tokens, (3 + 5 + 0) / 3 or, without the query, 4.

        >>> from rlhf_jax.icl.models.linear_attention import embed, sparse
        >>> prompt = embed(jnp.ones((1, 2, 1)), jnp.array([[[3.0], [5.0]]]), jnp.ones((1, 1)))
        >>> predict("softmax", sparse(jnp.zeros((1, 1)), 1), prompt, 1, attend_to_query=False).tolist()
        [[4.0]]
    """
    return read_out(_attend(kind, attention, embedding, embedding[:, :, -1:], attend_to_query), outputs)


def _attend(
    kind: str,
    attention: SelfAttention,
    embedding: Float[Array, "B w S"],
    targets: Float[Array, "B w T"],
    attend_to_query: bool,
) -> Float[Array, "B w T"]:
    """F for the given tokens j of a prompt."""
    if kind not in KINDS:
        raise ValueError(f"the kind of attention is {kind!r}: choose one of {', '.join(KINDS)}.")
    check_width(attention, embedding)
    value, key_query = (matrix.reshape(-1, *matrix.shape[-2:]) for matrix in attention)
    sources = embedding if attend_to_query else embedding[:, :, :-1]
    scores = einsum("bvs,hvw,bwt->bhst", sources, key_query, targets)
    weights = KINDS[kind](scores, divisor(embedding, None))
    return einsum("hwv,bvs,bhst->bwt", value, sources, weights)
