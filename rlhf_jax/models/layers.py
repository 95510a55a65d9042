"""The parts that look at one token at a time: embeddings, norms, linear layers, the feed-forward block."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from rlhf_jax.models.adapters import adapted
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.partitioning import constrain, gather_width, mesh_sizes
from rlhf_jax.types import wide

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


class Norm(nn.Module):
    """RMSNorm (2019, 1910.07467) or LayerNorm (2016, 1607.06450) over the last axis, as `config.norm` says.

    Attributes:
        config: the model's shape.
        axis: logical name of the axis that is normalised; None where it is never sharded.
    """

    config: ModelConfig
    axis: str | None = "width"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The normed `x` in the dtype of the computation; statistics are in at least float32."""
        config, shape, dtype = self.config, x.shape[-1:], wide(x)

        def vector(name: str, init: nn.initializers.Initializer) -> Float[Array, "*ones D"]:
            leaf = self.param(name, nn.with_logical_partitioning(init, (self.axis,)), shape, config.param_dtype)
            return leaf.astype(dtype).reshape((1,) * (x.ndim - 1) + shape)

        y = x.astype(dtype)
        if config.norm == "layer":
            y = y - y.mean(axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + config.norm_epsilon)
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale = 1 + vector("scale", zeros) if config.norm == "rms_plus_one" else vector("scale", ones)
        y = y * (inverse * scale)
        if config.norm == "layer":
            y = y + vector("bias", zeros)
        return y.astype(config.dtype)


class Table(nn.Module):
    """A vector for every id: the embedding of tokens, or of positions.

    Attributes:
        config: the model's shape.
        rows: number of ids.
        axis: logical name of the axis of ids; None where it is never sharded.
    """

    config: ModelConfig
    rows: int
    axis: str | None

    @nn.compact
    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """The vectors of ids in the dtype of the computation."""
        config = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(config.initializer_range), (self.axis, "width"))
        table = self.param("embedding", init, (self.rows, config.width), config.param_dtype).astype(config.dtype)
        # On a mesh the width is gathered before the look-up: it is split over the same devices as the rows of a batch.
        # So is the gradient, which is added up whole: split at once, it would need the tokens of all rows everywhere.
        return jnp.take(constrain(table, self.axis, None), ids, axis=0)


class Linear(nn.Module):
    """A projection, with whatever adapter stands beside its kernel in the parameter tree (`models.adapters`).

    Attributes:
        config: the model's shape.
        features: number of outputs.
        axes: logical names of the input and the output axis.
        use_bias: whether there is a bias.
    """

    config: ModelConfig
    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """The product in the dtype of the computation."""
        config = self.config
        matrix = nn.with_logical_partitioning(nn.initializers.normal(config.initializer_range), self.axes)
        params = {"kernel": self.param("kernel", matrix, (x.shape[-1], self.features), config.param_dtype)}
        if self.use_bias:
            vector = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            params["bias"] = self.param("bias", vector, (self.features,), config.param_dtype)
        if self.has_variable("params", "kernel_scale"):  # see `quantised.stored_weights`
            params["kernel_scale"] = self.get_variable("params", "kernel_scale")
        params = {name: leaf.astype(config.dtype) for name, leaf in params.items()}
        if x.ndim < 3 or x.shape[1] > 1:  # for one token a row it can be cheaper to send activations
            params["kernel"] = gather_width(params["kernel"], *self.axes)
        if self.has_variable("params", "adapter"):
            params["adapter"] = self.get_variable("params", "adapter")
        # The gradient of a product over two axes moves its largest operand before it is taken, over one it does not.
        flat = x.ndim == 3 and mesh_sizes().get("sequence", 1) == 1
        rows = rearrange(x, "b n i -> (b n) i") if flat else x
        return adapted(rows.astype(config.dtype), params).reshape(*x.shape[:-1], self.features)


def feed_forward(config: ModelConfig, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where `config.feed_forward` is "plain".

    To be called inside a module, whose parameters `gate`, `up` and `down` become.
    """
    inward, outward = ("width", "feed_forward"), ("feed_forward", "width")
    activation, bias = ACTIVATIONS[config.activation], config.feed_forward_bias
    inner = Linear(config, config.feed_forward_width, inward, bias, name="up")(x)
    if config.feed_forward == "plain":
        inner = activation(inner)
    else:
        inner = activation(Linear(config, config.feed_forward_width, inward, bias, name="gate")(x)) * inner
    inner = constrain(inner, "batch", "tokens", "feed_forward")
    return Linear(config, config.width, outward, bias, name="down")(inner)
