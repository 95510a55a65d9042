"""A tiny trunk whose initial weights are large enough for every token to be heard, and sequences for it to score."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

from rlhf_jax.models.config import ModelConfig


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=12,
        width=8,
        layers=1,
        heads=2,
        key_value_heads=1,
        feed_forward_width=12,
        context_length=16,
        initializer_range=0.5,
    )


@pytest.fixture(scope="session")
def mask() -> Array:
    """Four sequences of 7, 2, 5 and 1 tokens, padded on the right."""
    return jnp.arange(7)[None] < jnp.array([7, 2, 5, 1])[:, None]


@pytest.fixture(scope="session")
def tokens() -> Array:
    return jax.random.randint(jax.random.key(0), (4, 7), 1, 12, jnp.int32)
