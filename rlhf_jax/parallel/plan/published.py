"""Shapes of published models by name, to plan for without their files.

Sources: the `config.json` of each model's repository (meta-llama, Qwen, mistralai on huggingface.co).
"""

from collections.abc import Mapping
from types import MappingProxyType

from rlhf_jax.models.config import Experts, ModelConfig, RopeScaling

_LLAMA3 = dict(vocab_size=128_256, key_value_heads=8, context_length=8192, rope_theta=500_000.0, tied_embeddings=False)
_QWEN3 = dict(
    vocab_size=151_936,
    key_value_heads=8,
    context_length=40_960,
    head_width=128,
    rope_theta=1_000_000.0,
    norm_epsilon=1e-6,
    query_key_norm="head",
)

PUBLISHED: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "llama-3.2-1b": ModelConfig(
            **_LLAMA3 | dict(context_length=131_072, tied_embeddings=True),
            width=2048,
            layers=16,
            heads=32,
            feed_forward_width=8192,
            rope_scaling=RopeScaling("llama3", 32.0, original_context=8192),
        ),
        "llama-3-8b": ModelConfig(**_LLAMA3, width=4096, layers=32, heads=32, feed_forward_width=14_336),
        "llama-3-70b": ModelConfig(**_LLAMA3, width=8192, layers=80, heads=64, feed_forward_width=28_672),
        "qwen3-0.6b": ModelConfig(**_QWEN3, width=1024, layers=28, heads=16, feed_forward_width=3072),
        "qwen3-8b": ModelConfig(
            **_QWEN3, width=4096, layers=36, heads=32, feed_forward_width=12_288, tied_embeddings=False
        ),
        "qwen3-32b": ModelConfig(
            **_QWEN3, width=5120, layers=64, heads=64, feed_forward_width=25_600, tied_embeddings=False
        ),
        "qwen3-30b-a3b": ModelConfig(
            **_QWEN3 | dict(key_value_heads=4),
            width=2048,
            layers=48,
            heads=32,
            feed_forward_width=768,
            experts=Experts(count=128, active=8),
            tied_embeddings=False,
        ),
        "mixtral-8x7b": ModelConfig(
            vocab_size=32_000,
            width=4096,
            layers=32,
            heads=32,
            key_value_heads=8,
            feed_forward_width=14_336,
            context_length=32_768,
            rope_theta=1_000_000.0,
            experts=Experts(count=8, active=2),
            tied_embeddings=False,
        ),
    }
)
