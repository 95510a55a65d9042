"""The decoder-only transformer trunk of every family: token ids (or embeddings) in, hidden states out.

A token's path: embedding (scaled, plus a learned position, if the family has those), then L blocks of attention and
feed-forward with norms where `config.norm_placement` puts them, then a last norm. What does not depend on the layer
(positions, angles, masks) is computed once, before the blocks. Layers are stacked on a leading axis by `nn.scan`, so
compilation does not grow with depth (but on a CPU up to `FEW_LAYERS`); whether a layer is local travels with it as a
scanned bool. Heads live in `heads`: several can share a trunk. Every parameter carries logical axis names
(`vocabulary`, `width`, `heads`, `feed_forward`, `layers`, `expert`; None where an axis is never sharded): see
`logical_axes`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.attention import Caches, Places, attend, caches_of, lengths_of, places_of, visible
from rlhf_jax.models.attention_choice import chosen_attention
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.cudnn_attention import cudnn_attend, moved_left
from rlhf_jax.models.experts import mixture
from rlhf_jax.models.layers import Linear, Norm, Table, feed_forward
from rlhf_jax.models.memory import named_input, on_device, remat_policy
from rlhf_jax.models.partitioning import constrain, mesh_sizes, platform
from rlhf_jax.models.ring_attention import ring_attend
from rlhf_jax.models.rope import Rotation, rotate, rotation
from rlhf_jax.models.row_attention import row_attend
from rlhf_jax.models.splash_attention import splash_attend
from rlhf_jax.types import Params, wide

FEW_LAYERS = 8
"""Up to so many layers a CPU computes without a loop: measured with 4; a program grows with them."""


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


def _of_this_layer(kinds: tuple, is_local: Bool[Array, ""]):
    """The one entry, or of (global, local) the one for this layer; None where there is no entry."""
    if len(kinds) < 2:
        return kinds[0] if kinds else None
    return jax.tree.map(lambda everywhere, nearby: jnp.where(is_local, nearby, everywhere), *kinds)


def _attention(
    config: ModelConfig,
    x: Float[Array, "B N D"],
    cached: tuple[tuple[Any, Any], ...],
    is_local: Bool[Array, ""],
    allowed: Bool[Array, "B N S"] | Places,
    by: Rotation | None,
) -> tuple[Float[Array, "B N D"], tuple[Float[Array, "B N H W"], Float[Array, "B N H W"]]]:
    """What attention adds to the residual stream, and the keys and values of the new tokens."""
    size, bias = config.head_size, config.query_key_value_bias

    def heads(name: str, count: int) -> Float[Array, "B N H W"]:
        projected = Linear(config, count * size, ("width", "heads"), bias, name=name)(x)
        if name != "value" and config.query_key_norm == "projection":
            projected = Norm(config, "heads", name=f"{name}_norm")(projected)
        split = rearrange(projected, "b n (h w) -> b n h w", w=size)
        # Every device needs its own queries, and the keys and values of all tokens of its rows: in a ring they come by.
        tokens = "tokens" if name == "query" or config.attention == "ring" else None
        split = constrain(split, "batch", tokens, "heads", None)
        if name != "value" and config.query_key_norm == "head":
            split = Norm(config, None, name=f"{name}_norm")(split)
        return split if name == "value" or by is None else rotate(split, by)

    query, key = heads("query", config.heads), heads("key", config.key_value_heads)
    value = heads("value", config.key_value_heads)
    scaling = dict(scale=config.query_scale, softcap=config.attention_softcap)
    window = None if config.window is None else jnp.where(is_local, config.window, config.context_length)
    windows = tuple(config.window if kind else None for kind in sorted(set(config.is_local)))
    if config.attention == "ring":
        attended = ring_attend(query, key, value, allowed, window, block=config.attention_block, **scaling)
    elif config.attention == "rows":
        attended = row_attend(query, key, value, allowed, window, **scaling)
    elif config.attention == "splash":
        attended = splash_attend(query, key, value, allowed, windows, is_local, **scaling)
    elif config.attention == "cudnn":
        attended = cudnn_attend(query, key, value, allowed, windows, is_local, config.query_scale)
    else:
        attended = attend(query, key, value, allowed, cached, **scaling)
    output = Linear(config, config.width, ("heads", "width"), config.attention_output_bias, name="output")
    return output(rearrange(attended, "b n h w -> b n (h w)")), (key, value)


class Block(nn.Module):
    """One block; returns the residual stream and the keys and values of its tokens."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        cached: tuple[tuple[Any, Any], ...],
        is_local: Bool[Array, ""],
        allowed: tuple[Bool[Array, "B N S"] | Places, ...],
        rotations: tuple[Rotation, ...],
    ):
        """`cached`: this layer's part of every cache, keys and values.

        `allowed`: which slots each new token attends to, those of the cache, then the new ones (only where the tokens
        stand, if attention is not the reference); `rotations`: the angles of the new tokens. Both have one entry for
        all layers, or one for global and one for local layers; `rotations` has none where positions are learned.
        """
        config, x = self.config, named_input(x)
        allowed, by = _of_this_layer(allowed, is_local), _of_this_layer(rotations, is_local)

        def before(name: str, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
            return x if config.norm_placement == "post" else Norm(config, name=f"{name}_norm")(x)

        def after(name: str, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
            return x if config.norm_placement == "pre" else Norm(config, name=f"{name}_post_norm")(x)

        attended, keys_and_values = _attention(config, before("attention", x), cached, is_local, allowed, by)
        stream = constrain(x + after("attention", attended), "batch", "tokens", None)
        normed = before("feed_forward", x if config.parallel_residual else stream)
        fed = feed_forward(config, normed) if config.experts is None else mixture(config, normed)
        return constrain(stream + after("feed_forward", fed), "batch", "tokens", None), keys_and_values


def _are_embeddings(tokens: Array) -> bool:
    """Whether tokens are vectors, by their type: ids are whole numbers whatever their shape."""
    return jnp.issubdtype(tokens.dtype, jnp.floating)


class Transformer(nn.Module):
    """The trunk as a Linen module; use it through `init` and `apply` below."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B N"] | Float[Array, "B N D"],
        mask: Bool[Array, "B N"],
        cache: Caches = None,
        segments: Int[Array, "B N"] | None = None,
    ) -> Hidden:
        """See `apply_trunk`."""
        kind = chosen_attention(self.config, tokens.shape[1], segments is not None) if cache is None else "reference"
        config = dataclasses.replace(self.config, attention=kind)
        if kind == "cudnn":  # the kernel takes rows that begin with their first token
            starts = jnp.argmax(mask, axis=1)
            tokens, mask = moved_left(tokens, starts), moved_left(mask, starts)
        places = places_of(mask, cache, segments)
        positions = places.positions
        if _are_embeddings(tokens):
            x = tokens.astype(config.dtype)
        else:
            x = Table(config, config.vocab_size, "vocabulary", name="embed")(tokens)
        if config.embedding_scale is not None:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.positions == "learned":
            x = x + Table(config, config.context_length, None, name="positions")(positions)
        x = constrain(x, "batch", "tokens", None)

        kinds = sorted(set(config.is_local))
        allowed: tuple = (places,)
        if config.attention == "reference":
            allowed = tuple(visible(places, cache, config.window if kind else None) for kind in kinds)
        turning = {"learned": [], "rotary": kinds if config.local_rope_theta is not None else kinds[:1]}
        lengths = lengths_of(positions, segments)  # the compiler drops it where no angle depends on it
        rotations = tuple(rotation(config, positions, lengths, kind, wide(x)) for kind in turning[config.positions])
        block = Block
        if config.remat != "none":
            block = nn.remat(Block, policy=remat_policy(config.remat), prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=config.layers,
            unroll=_layers_at_once(config, cache),
            metadata_params={nn.PARTITION_NAME: "layers"},
            data_transform=lambda params, keys: (on_device(params), keys),
        )(config, name="layers")
        cached = tuple((one.keys, one.values) for one in caches_of(cache))
        x, (keys, values) = layers(x, cached, jnp.array(config.is_local), allowed, rotations)
        hidden = Hidden(final=Norm(config, name="final_norm")(x), residual=x, keys=keys, values=values)
        if kind != "cudnn":
            return hidden
        return Hidden(*(moved_left(part, -starts, axis) for part, axis in zip(hidden, (0, 0, 1, 1), strict=True)))


def _layers_at_once(config: ModelConfig, cache: Caches) -> int:
    """How many layers follow each other without a loop: a CPU copies what a turn of it reads and leaves.

    Decoding is faster with the loop all the same, and `remat` and meshes count on it.
    """
    alone = platform() == "cpu" and math.prod(mesh_sizes().values()) == 1
    plain = cache is None and config.remat == "none"
    return config.layers if alone and plain and config.layers <= FEW_LAYERS else 1


def _boxed(config: ModelConfig, key: Array) -> Params:
    config = dataclasses.replace(config, attention="reference")  # one token, on whatever devices there are
    return Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))["params"]


def init_trunk(config: ModelConfig, key: Array) -> Params:
    """Fresh trunk parameters: a tree of plain arrays, layers stacked on axis 0."""
    return nn.unbox(_boxed(config, key))


def logical_axes(config: ModelConfig) -> Params:
    """A tree like `init_trunk`'s whose leaves are `PartitionSpec`s of logical axis names, one name an array axis."""
    return nn.get_partition_spec(jax.eval_shape(lambda key: _boxed(config, key), jax.random.key(0)))


def apply_trunk(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B N"] | Float[Array, "B N D"],
    mask: Bool[Array, "B N"],
    cache: Caches = None,
    segments: Int[Array, "B N"] | None = None,
) -> Hidden:
    """Runs the trunk on N tokens a row, after those in the cache if one is given.

    With "dynamic" rope scaling the angles depend on the length of each row's sequence up to the last token given (not
    on other rows or padding). Cached keys keep the angles that they were written with, as in `transformers`, so
    cached decoding beyond the original context differs from one forward over the whole sequence.

    Args:
        config: the model's shape.
        params: a tree from `init_trunk` or `huggingface.load_policy`; adapters may be attached to it.
        tokens: token ids, int32 [B, N]; or embeddings that stand in their place, [B, N, D] (vectors, not text). These
            take the place of rows of the table `embed`: what is done to rows (`embedding_scale`, learned positions) is
            done to them, and `params` need not have the table.
        mask: True on real tokens; padding may stand on either side and is never attended to.
        cache: keys and values of earlier tokens, or several such; they are read, not changed (`attention.write` makes
            the next one).
        segments: which of the sequences packed into its row a token belongs to, int32 [B, N]; equal numbers stand side
            by side. Attention stays within a segment, and positions start at 0 in each. None: a row is one sequence.

    Raises:
        ValueError: when the sequence, or the cache that is to hold it, is longer than the model's context; when packed
            rows come with a cache; or when tokens are neither ids nor embeddings of the model's width.
    """
    if tokens.ndim != (3 if _are_embeddings(tokens) else 2):
        raise ValueError(
            f"tokens of the type {tokens.dtype} and the shape {tokens.shape} are neither whole numbers [B, N] nor "
            "embeddings of a floating type [B, N, D]: give one of these."
        )
    if _are_embeddings(tokens) and tokens.shape[2] != config.width:
        raise ValueError(
            f"embeddings have {tokens.shape[2]} entries and the model's width is {config.width}: project them."
        )
    if cache is not None and segments is not None:
        raise ValueError("packed rows (segments) cannot follow a cache; give one of the two.")
    length = sum(one.mask.shape[1] for one in caches_of(cache)) or tokens.shape[1]
    if length > config.context_length:
        raise ValueError(
            f"a sequence of {length} tokens does not fit the model's context of {config.context_length}; shorten it."
        )
    params = {name: part if name == "layers" else on_device(part) for name, part in params.items()}
    return Transformer(config).apply({"params": params}, tokens, mask, cache, segments)
