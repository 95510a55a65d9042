"""A small GPT-style transformer that reads a prompt of vectors: the package's own trunk between two linear maps.

A token is a vector; `read_in` projects it to the trunk's width, the causal trunk (`models.transformer`) runs on these
embeddings in place of token ids, and `read_out` projects every final state to the outputs. Two ways to write a prompt:

    classification   (x_1, onehot y_1), .., (x_N, onehot y_N), (x_q, 0)      logits of the classes at the last token
    regression       x_1, y_1, x_2, y_2, .., x_K                             prediction for every y_k at the token x_k

The second is that of Garg et al. 2022 (arXiv 2208.01066): y_k stands in the first entry of a vector of zeros, and
because the trunk is causal one pass predicts every example from those before it. The blocks are GPT-2's: learned
positions, layer norm before attention and feed-forward, biases, a feed-forward of four times the width with tanh-GELU.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rlhf_jax.icl.checks import at_least, positive
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.transformer import apply_trunk, init_trunk
from rlhf_jax.types import Params


@dataclasses.dataclass(frozen=True)
class VectorModel:
    """The shape of the model.

    Attributes:
        token_width: entries of a token: d + c for classification, d for regression.
        outputs: what is predicted at every token: c logits, or 1 number.
        context_length: the longest prompt in tokens: N + 1 for classification, 2 K - 1 for regression.
        layers: number of blocks.
        heads: attention heads; divides `width`.
        width: of the residual stream.
        positions: "learned" (a table, as in GPT-2; places beyond the prompts of training keep their initial values) or
            "rotary" (relative; for tests on longer contexts than those of training).
        initializer_range: standard deviation of the trunk's initial matrices and positions; None: `width ** -0.5`. (The
            0.02 of GPT-2 suits a width of 768: at 32 blocks would add next to nothing at first, and learn later.)

    Raises:
        ValueError: a size is not whole or below 1, heads do not divide the width, the initializer range is not above 0,
            or a name is unknown.
    """

    token_width: int
    outputs: int
    context_length: int
    layers: int = 3
    heads: int = 2
    width: int = 32
    positions: Literal["learned", "rotary"] = "learned"
    initializer_range: float | None = None

    def __post_init__(self) -> None:
        for name in ("token_width", "outputs", "context_length", "layers", "heads", "width"):
            object.__setattr__(self, name, at_least(f"{name} of the model", getattr(self, name), 1))
        if self.initializer_range is not None:
            positive("initializer_range of the model", self.initializer_range)
        self.trunk()

    def trunk(self, dtype: DTypeLike = jnp.float32) -> ModelConfig:
        """The trunk, computing and storing in this dtype."""
        name = jnp.dtype(dtype).name
        return ModelConfig(
            vocab_size=1,  # no ids are read
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            key_value_heads=self.heads,
            feed_forward_width=4 * self.width,
            context_length=self.context_length,
            norm="layer",
            positions=self.positions,
            query_key_value_bias=True,
            attention_output_bias=True,
            feed_forward="plain",
            activation="gelu_tanh",
            feed_forward_bias=True,
            initializer_range=self.width**-0.5 if self.initializer_range is None else self.initializer_range,
            dtype=name,
            param_dtype=name,
        )


def init_vector_model(config: VectorModel, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Fresh parameters: `{"read_in", "trunk", "read_out"}`, biases 0, maps with a variance of 1 / (their inputs).

    Args:
        config: the model's shape.
        key: of the draw.
        dtype: of the parameters, that of the tokens to come.
    """
    keys = jax.random.split(key, 3)

    def linear(key: Array, inputs: int, outputs: int) -> Params:
        kernel = inputs**-0.5 * jax.random.normal(key, (inputs, outputs), dtype)
        return {"kernel": kernel, "bias": jnp.zeros(outputs, dtype)}

    trunk = {name: part for name, part in init_trunk(config.trunk(dtype), keys[1]).items() if name != "embed"}
    return {
        "read_in": linear(keys[0], config.token_width, config.width),
        "trunk": trunk,
        "read_out": linear(keys[2], config.width, config.outputs),
    }


def apply_vector_model(
    config: VectorModel, params: Params, tokens: Float[Array, "B S w"]
) -> Float[Array, "B S outputs"]:
    """Outputs at every token, each from the tokens up to it.

    Args:
        config: the model's shape.
        params: from `init_vector_model`, in the dtype of the tokens.
        tokens: vectors, [B, S, token_width].

    Returns:
        [B, S, outputs].

    Raises:
        ValueError: tokens of another width, or more of them than the model's context.
    """
    if tokens.shape[2] != config.token_width:
        raise ValueError(
            f"tokens have {tokens.shape[2]} entries and the model reads {config.token_width}: set token_width to match."
        )
    read_in, read_out = (params[name] for name in ("read_in", "read_out"))
    embeddings = tokens @ read_in["kernel"] + read_in["bias"][None, None]
    real = jnp.ones(tokens.shape[:2], bool)
    states = apply_trunk(config.trunk(tokens.dtype), params["trunk"], embeddings, real).final
    return states @ read_out["kernel"] + read_out["bias"][None, None]


def classification_tokens(
    inputs: Float[Array, "B N d"], labels: Int[Array, "B N"], classes: int, query: Float[Array, "B d"]
) -> Float[Array, "B S w"]:
    """Tokens (x; onehot y), the query last with zeros for its label: S = N + 1, w = d + c.

    Example:
        >>> classification_tokens(jnp.array([[[5.0]]]), jnp.array([[1]]), 2, jnp.array([[7.0]])).tolist()
        [[[5.0, 0.0, 1.0], [7.0, 0.0, 0.0]]]
    """
    shown = jax.nn.one_hot(labels, classes, dtype=inputs.dtype)
    examples = jnp.concatenate([inputs, shown], axis=-1)
    last = jnp.pad(query[:, None], ((0, 0), (0, 0), (0, classes)))
    return jnp.concatenate([examples, last], axis=1)


def classification_logits(
    config: VectorModel,
    params: Params,
    inputs: Float[Array, "B N d"],
    labels: Int[Array, "B N"],
    query: Float[Array, "B d"],
) -> Float[Array, "B c"]:
    """Logits of the query's class; the classes are the model's outputs.

    Args:
        config: token_width = d + c, outputs = c, context_length >= N + 1.
        params: of the model.
        inputs: [B, N, d].
        labels: int32 [B, N] below c.
        query: [B, d].

    Returns:
        Logits, [B, c].

    Raises:
        ValueError: as `apply_vector_model`.
    """
    tokens = classification_tokens(inputs, labels, config.outputs, query)
    return apply_vector_model(config, params, tokens)[:, -1]


def regression_tokens(inputs: Float[Array, "B K d"], targets: Float[Array, "B K"]) -> Float[Array, "B S d"]:
    """Tokens x_1, y_1, .., x_K, y_K, each y in the first entry of a vector of zeros: S = 2 K.

    Example:
        >>> regression_tokens(jnp.array([[[5.0, 6.0]]]), jnp.array([[7.0]])).tolist()
        [[[5.0, 6.0], [7.0, 0.0]]]
    """
    count, length, d = inputs.shape
    below = jnp.pad(targets[..., None], ((0, 0), (0, 0), (0, d - 1)))
    return jnp.stack([inputs, below], axis=2).reshape(count, 2 * length, d)


def regression_predictions(
    config: VectorModel, params: Params, inputs: Float[Array, "B K d"], targets: Float[Array, "B K"]
) -> Float[Array, "B K"]:
    """The prediction for every example from those before it, in one pass; the last target is not read.

    Args:
        config: token_width = d, outputs = 1, context_length >= 2 K - 1.
        params: of the model.
        inputs: x_1 .. x_K, the query last if there is one, [B, K, d].
        targets: y_1 .. y_K, [B, K].

    Returns:
        Predictions, [B, K]; the first is from x_1 alone.

    Raises:
        ValueError: as `apply_vector_model`.
    """
    tokens = regression_tokens(inputs, targets)[:, :-1]
    return apply_vector_model(config, params, tokens)[:, ::2, 0]
