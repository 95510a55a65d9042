"""Which attention computes: the one place that chooses, by devices and sizes."""

import jax
import jax.numpy as jnp

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.cudnn_attention import fits
from rlhf_jax.models.partitioning import mesh_sizes, platform
from rlhf_jax.models.splash_attention import HEAD_WIDTHS

LONG = 128
"""Tokens from which on products are not kept: measured on a CPU, and the smallest block of the kernels."""
MANY = 1024
"""Tokens from which on products are not kept where no kernel takes the model: blocks of keys take their place."""


def chosen_attention(config: ModelConfig, tokens: int, packed: bool = False) -> str:
    """The attention for rows of so many tokens that follow no cache: as the configuration says, or for "auto"

    - "ring" on a mesh that splits rows;
    - "reference" for short rows;
    - "rows" on CPUs, "splash" on TPUs and "cudnn" on GPUs, where the kernel takes the model;
    - else "reference", or for rows so long that their products are too many to keep, "ring" on the one device.

    Args:
        config: the model's shape.
        tokens: of a row.
        packed: whether rows hold several sequences.

    Raises:
        ValueError: "cudnn" is asked for, and takes neither packed rows nor a cap of the logits.

    Example:
        >>> config = ModelConfig(vocab_size=8, width=4, layers=1, heads=2, key_value_heads=1, feed_forward_width=8,
        ...                      context_length=512, attention="auto")
        >>> chosen_attention(config, 16)
        'reference'
    """
    plain = config.attention_softcap is None and not packed
    if config.attention == "cudnn" and not plain:
        raise ValueError('attention "cudnn" takes neither packed rows nor a softcap: choose "auto" or "ring".')
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
    if devices == "gpu" and plain and fits(jnp.dtype(config.dtype), config.head_size) and has_flash_kernel():
        return "cudnn"
    return "reference" if tokens < MANY else "ring"


def has_flash_kernel() -> bool:
    """Whether the GPUs here have the kernel of cuDNN: those of NVIDIA from compute capability 8.0 (A100) on."""
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return capability.replace(".", "").isdigit() and float(capability) >= 8.0
