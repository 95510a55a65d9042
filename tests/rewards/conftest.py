"""Sequences for a tiny trunk to score."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array


@pytest.fixture(scope="session")
def mask() -> Array:
    """Four sequences of 7, 2, 5 and 1 tokens, padded on the right."""
    return jnp.arange(7)[None] < jnp.array([7, 2, 5, 1])[:, None]


@pytest.fixture(scope="session")
def tokens() -> Array:
    return jax.random.randint(jax.random.key(0), (4, 7), 1, 12, jnp.int32)
