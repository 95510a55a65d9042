"""Attention by the kernel for TPUs that JAX ships, "splash": no product is kept, blocks that nobody sees are skipped.

The kernel runs on each device's own rows and heads. On a CPU it is interpreted, which is slow and meant for tests; what
is compiled ahead of time for a mesh of TPUs is the kernel.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.attention import Places
from rlhf_jax.models.partitioning import divided, mesh_sizes, platform
from rlhf_jax.models.shares import on_shares

BLOCKS = (512, 256, 128)
"""Queries and keys of one step of the kernel: the first of these that divides the row, filled up to a multiple of
the last."""

HEAD_WIDTHS = 64
"""The kernel takes heads whose width is a multiple of this."""


def splash_attend(
    query: Float[Array, "B N Q W"],
    key: Float[Array, "B N H W"],
    value: Float[Array, "B N H W"],
    places: Places,
    windows: tuple[int | None, ...],
    is_local: Bool[Array, ""],
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B N Q W"]:
    """What `attention.attend` computes over the same tokens, where the real tokens of a row stand side by side.

    A model whose layers are of two kinds runs the kernel of the one or of the other: what both would keep for the
    backward pass has its room then; rematerialise (`remat`) such models.

    Args:
        query: queries; Q is a multiple of H.
        key: keys.
        value: values.
        places: where the tokens stand.
        windows: tokens that are looked back on, the token itself included, or None for all: one entry for all layers,
            or one for global and one for local layers.
        is_local: which of two entries.
        scale: see `attention.logits_of`.
        softcap: see `attention.logits_of`.

    Returns:
        The attended values; meaningless at padding.

    Raises:
        ValueError: the tokens of a row are split over devices, the width of a head does not suit the kernel, or the
            devices are neither TPUs nor CPUs.
    """
    devices, sequence = platform(), mesh_sizes().get("sequence", 1)
    if devices not in ("tpu", "cpu"):
        raise ValueError(f'attention "splash" is a kernel for TPUs, but the devices are {devices}s: choose "ring".')
    if sequence > 1:
        raise ValueError(
            f'attention "splash" needs all tokens of a row on one device, but the mesh has sequence={sequence}: '
            'choose sequence=1, or attention "ring".'
        )
    width = query.shape[-1]
    if width % HEAD_WIDTHS:
        raise ValueError(
            f'attention "splash" takes heads whose width is a multiple of {HEAD_WIDTHS}, not {width}: choose "ring".'
        )
    segments = jnp.ones_like(places.slots) if places.segments is None else places.segments
    # Padding is a segment of its own: nobody looks at it but padding.
    segments = jnp.where(places.mask, segments, jnp.iinfo(segments.dtype).min)
    (rows,), (heads,) = divided(("batch",), query.shape[:1]), divided(("heads",), key.shape[2:3])

    def on_this_device(query, key, value, segments, is_local):
        kernels = [_kernel(query.shape, window, softcap, devices == "cpu") for window in windows]
        arrays = [rearrange(_filled(array), "b n h w -> b h n w") for array in (query, key, value)]
        arguments = (*arrays, _filled(segments, jnp.iinfo(segments.dtype).min))
        if len(kernels) == 1:
            out = kernels[0](*arguments)
        else:
            everywhere, nearby = kernels
            out = jax.lax.cond(is_local, nearby, everywhere, *arguments)
        return rearrange(out, "b h n w -> b n h w")[:, : query.shape[1]]

    axes = (rows, None, heads, None)
    attend = on_shares(on_this_device, (axes, axes, axes, (rows, None), ()), axes, check_vma=False)
    scaled = query * jnp.asarray(width**-0.5 if scale is None else scale, query.dtype)
    return attend(scaled, key, value, segments, is_local)


def _filled(array: Array, value: int = 0) -> Array:
    """The array with padding behind its tokens (axis 1), up to a whole number of the smallest blocks."""
    rest = -array.shape[1] % BLOCKS[-1]
    return jnp.pad(array, ((0, 0), (0, rest), *((0, 0),) * (array.ndim - 2)), constant_values=value)


def _kernel(
    shape: tuple[int, ...], window: int | None, softcap: float | None, interpret: bool
) -> Callable[[Float[Array, "B Q N W"], Float[Array, "B H N W"], Float[Array, "B H N W"], Int[Array, "B N"]], Array]:
    """The kernel for queries of a shape [B, N, Q, W], over whole rows."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, heads = shape[1] + -shape[1] % BLOCKS[-1], shape[2]
    size = next(block for block in BLOCKS if tokens % block == 0)
    forward = dict(block_q=size, block_kv=size, block_kv_compute=size)
    backward = dict(block_q_dkv=size, block_kv_dkv=size, block_kv_dkv_compute=size, block_q_dq=size, block_kv_dq=size)
    square = (tokens, tokens)
    mask = masks.CausalMask(square) if window is None else masks.LocalMask(square, (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**forward, **backward),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )

    def run(query, key, value, segments):
        return jax.vmap(kernel)(query, key, value, splash.SegmentIds(q=segments, kv=segments))

    return run
