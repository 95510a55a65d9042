"""The decoder-only transformer trunk: token ids in, hidden states out.

A token's path: embedding, then L blocks of (RMSNorm, attention, add; RMSNorm, SwiGLU, add), then a last RMSNorm. Layers
are stacked on a leading axis by `nn.scan`, so compilation does not grow with depth. Heads live in `heads`: several can
share a trunk. Every parameter carries logical axis names (`vocabulary`, `width`, `heads`, `feed_forward`, `layers`):
see `logical_axes`.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.attention import Cache, attend, positions_of, rotary
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.types import Params


class Hidden(NamedTuple):
    """What the trunk computes for N tokens a row.

    Attributes:
        final: hidden states after the last norm, [B, N, D]: what unembedding and heads usually read.
        residual: the residual stream before the last norm, [B, N, D].
        keys: keys of the new tokens in every layer, [L, B, N, H, W], for the cache.
        values: values of the new tokens, the same shape.
    """

    final: Float[Array, "B N D"]
    residual: Float[Array, "B N D"]
    keys: Float[Array, "L B N H W"]
    values: Float[Array, "L B N H W"]


def _dense(config: ModelConfig, features: int, axes: tuple[str, str], name: str) -> nn.Dense:
    init = nn.with_logical_partitioning(nn.initializers.normal(config.initializer_range), axes)
    return nn.Dense(
        features, use_bias=False, dtype=config.dtype, param_dtype=config.param_dtype, kernel_init=init, name=name
    )


def _norm(config: ModelConfig, x: Float[Array, "B N D"], name: str) -> Float[Array, "B N D"]:
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("width",))
    options = dict(epsilon=config.norm_epsilon, dtype=config.dtype, param_dtype=config.param_dtype)
    with jax.numpy_dtype_promotion("standard"):  # Flax raises bfloat16 statistics to float32 by promotion
        return nn.RMSNorm(**options, scale_init=scale_init, name=name)(x)


class Block(nn.Module):
    """One pre-norm block; returns the residual stream and the keys and values of its tokens."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        cached: tuple[Float[Array, "B S H W"], Float[Array, "B S H W"]] | None,
        positions: Int[Array, "B N"],
        mask: Bool[Array, "B N"],
        cached_mask: Bool[Array, "B S"] | None,
    ):
        """`cached`: this layer's keys and values of the cache, of which `cached_mask` names the real ones."""
        config, size = self.config, self.config.head_size
        normed = _norm(config, x, "attention_norm")
        query = _dense(config, config.heads * size, ("width", "heads"), "query")(normed)
        key = _dense(config, config.key_value_heads * size, ("width", "heads"), "key")(normed)
        value = _dense(config, config.key_value_heads * size, ("width", "heads"), "value")(normed)
        query, key, value = (rearrange(t, "b n (h w) -> b n h w", w=size) for t in (query, key, value))
        query, key = rotary(query, positions, config.rope_theta), rotary(key, positions, config.rope_theta)
        attended = attend(query, key, value, mask, None if cached is None else (*cached, cached_mask))
        x = x + _dense(config, config.width, ("heads", "width"), "output")(rearrange(attended, "b n h w -> b n (h w)"))

        normed = _norm(config, x, "feed_forward_norm")
        gate = _dense(config, config.feed_forward_width, ("width", "feed_forward"), "gate")(normed)
        up = _dense(config, config.feed_forward_width, ("width", "feed_forward"), "up")(normed)
        x = x + _dense(config, config.width, ("feed_forward", "width"), "down")(nn.silu(gate) * up)
        return x, (key, value)


class Transformer(nn.Module):
    """The trunk as a Linen module; use it through `init` and `apply` below."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B N"], mask: Bool[Array, "B N"], cache: Cache | None = None) -> Hidden:
        """See `apply_trunk`."""
        config = self.config
        embed_init = nn.with_logical_partitioning(
            nn.initializers.normal(config.initializer_range), ("vocabulary", "width")
        )
        embed = nn.Embed(
            config.vocab_size,
            config.width,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=embed_init,
            name="embed",
        )
        block = Block
        if config.remat != "none":
            policy = jax.checkpoint_policies.dots_saveable if config.remat == "dots" else None
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0 if cache is not None else nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, name="layers")
        x, (keys, values) = layers(
            embed(tokens),
            None if cache is None else (cache.keys, cache.values),
            positions_of(mask, cache),
            mask,
            None if cache is None else cache.mask,
        )
        return Hidden(final=_norm(config, x, "final_norm"), residual=x, keys=keys, values=values)


def _boxed(config: ModelConfig, key: Array) -> Params:
    return Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))["params"]


def init_trunk(config: ModelConfig, key: Array) -> Params:
    """Fresh trunk parameters: a tree of plain arrays, layers stacked on axis 0."""
    return nn.unbox(_boxed(config, key))


def logical_axes(config: ModelConfig) -> Params:
    """A tree like `init_trunk`'s whose leaves are `PartitionSpec`s of logical axis names, one name an array axis."""
    return nn.get_partition_spec(jax.eval_shape(lambda key: _boxed(config, key), jax.random.key(0)))


def apply_trunk(
    config: ModelConfig, params: Params, tokens: Int[Array, "B N"], mask: Bool[Array, "B N"], cache: Cache | None = None
) -> Hidden:
    """Runs the trunk on N tokens a row, after those in the cache if one is given.

    Args:
        config: the model's shape.
        params: a tree from `init_trunk` or `huggingface.load_policy`.
        tokens: token ids, int32 [B, N].
        mask: True on real tokens; padding may stand on either side and is never attended to.
        cache: keys and values of earlier tokens; it is read, not changed (`attention.write` makes the next one).

    Raises:
        ValueError: when the sequence, or the cache that is to hold it, is longer than the model's context.
    """
    length = tokens.shape[1] if cache is None else cache.mask.shape[1]
    if length > config.context_length:
        raise ValueError(
            f"a sequence of {length} tokens does not fit the model's context of {config.context_length}; shorten it."
        )
    return Transformer(config).apply({"params": params}, tokens, mask, cache)
