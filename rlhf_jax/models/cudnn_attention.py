"""Attention by the flash kernel of cuDNN, for NVIDIA GPUs: no product is kept, nothing above the diagonal computed.

`jax.nn.dot_product_attention` calls it. The kernel wants rows that begin with their first real token, so the trunk
moves left-padded rows to the left before its first layer and back behind its last one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.attention import Places
from rlhf_jax.models.partitioning import divided, platform
from rlhf_jax.models.shares import on_shares


def cudnn_attend(
    query: Float[Array, "B N Q W"],
    key: Float[Array, "B N H W"],
    value: Float[Array, "B N H W"],
    places: Places,
    windows: tuple[int | None, ...],
    is_local: Bool[Array, ""],
    scale: float | None = None,
) -> Float[Array, "B N Q W"]:
    """What `attention.attend` computes over the same tokens, where every row begins with its first real token.

    On a CPU the same function runs without the kernel, so that what is around it can be tested.

    Args:
        query: queries in bfloat16 or float16; Q is a multiple of H.
        key: keys.
        value: values.
        places: where the tokens stand; rows are not packed.
        windows: as in `splash_attention.splash_attend`.
        is_local: which of two entries.
        scale: see `attention.logits_of`.

    Returns:
        The attended values; meaningless at padding.

    Raises:
        ValueError: on a TPU; or the kernel does not take the dtype, or the width of a head.
    """
    devices, width = platform(), query.shape[-1]
    if devices == "tpu":
        raise ValueError('attention "cudnn" is the kernel of GPUs: choose "auto" or "splash" on a TPU.')
    if devices == "gpu" and not fits(query.dtype, width):
        raise ValueError(
            f'attention "cudnn" takes bfloat16 or float16 and heads of a width that 8 divides, up to 128, not '
            f'{query.dtype} and {width}: choose "auto" or "reference".'
        )
    (rows,), (heads,) = divided(("batch",), query.shape[:1]), divided(("heads",), key.shape[2:3])
    kernel = "cudnn" if devices == "gpu" else "xla"

    def on_this_device(query, key, value, lengths, is_local):
        def within(window: int | None):
            def attend(query, key, value, lengths):
                return jax.nn.dot_product_attention(
                    query,
                    key,
                    value,
                    scale=scale,
                    is_causal=True,
                    query_seq_lengths=lengths,
                    key_value_seq_lengths=lengths,
                    local_window_size=None if window is None else (window - 1, 0),
                    implementation=kernel,
                )

            return attend

        if len(windows) == 1:
            return within(windows[0])(query, key, value, lengths)
        everywhere, nearby = (within(window) for window in windows)
        return jax.lax.cond(is_local, nearby, everywhere, query, key, value, lengths)

    axes = (rows, None, heads, None)
    attend = on_shares(on_this_device, (axes, axes, axes, (rows,), ()), axes, check_vma=False)
    return attend(query, key, value, places.mask.sum(axis=1, dtype=jnp.int32), is_local)


def fits(dtype: jnp.dtype, head_width: int) -> bool:
    """Whether the kernel takes queries of this dtype and width."""
    return dtype in (jnp.bfloat16, jnp.float16) and head_width % 8 == 0 and head_width <= 128


def moved_left(array: Array, starts: Int[Array, " B"], axis: int = 0) -> Array:
    """Rows whose tokens move to the left by so many places, round the end; `-starts` moves them back.

    Args:
        array: [..., B, N, ...].
        starts: places of each row.
        axis: where B stands; N is behind it.

    Example:
        >>> moved_left(jnp.array([[0, 0, 5, 6], [7, 8, 9, 0]]), jnp.array([2, 0])).tolist()
        [[5, 6, 0, 0], [7, 8, 9, 0]]
    """
    roll = jax.vmap(lambda row, start: jnp.roll(row, -start, axis=0))
    for _ in range(axis):
        roll = jax.vmap(roll, in_axes=(0, None))
    return roll(array, starts)
