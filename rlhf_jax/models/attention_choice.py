"""Which attention computes: the one place that chooses, by devices and sizes."""

import jax.numpy as jnp

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.cudnn_attention import fits
from rlhf_jax.models.partitioning import mesh_sizes, platform
from rlhf_jax.models.splash_attention import HEAD_WIDTHS

LONG = 128
"""Tokens from which on products are not kept: measured on a CPU, and the smallest block of the kernels."""


def chosen_attention(config: ModelConfig, tokens: int, packed: bool = False) -> str:
    """The attention for rows of so many tokens that follow no cache: as the configuration says, or for "auto"

    - "ring" on a mesh that splits rows;
    - "reference" for short rows;
    - "rows" on CPUs, "splash" on TPUs and "cudnn" on GPUs, where the kernel takes the model; else "reference".

    Args:
        config: the model's shape.
        tokens: of a row.
        packed: whether rows hold several sequences.

    Example:
        >>> config = ModelConfig(vocab_size=8, width=4, layers=1, heads=2, key_value_heads=1, feed_forward_width=8,
        ...                      context_length=512, attention="auto")
        >>> chosen_attention(config, 16)
        'reference'
    """
    if config.attention != "auto":
        return config.attention
    if mesh_sizes().get("sequence", 1) > 1:
        return "ring"
    devices = platform()
    if tokens < LONG:
        return "reference"
    if devices == "cpu":
        return "rows"
    if devices == "tpu" and config.head_size % HEAD_WIDTHS == 0:
        return "splash"
    taken = fits(jnp.dtype(config.dtype), config.head_size) and config.attention_softcap is None and not packed
    return "cudnn" if devices == "gpu" and taken else "reference"
