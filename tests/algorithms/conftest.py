"""A tiny policy, and prompts of several lengths."""

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.models.heads import init_policy
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.types import Prompts


@pytest.fixture(scope="session")
def sampling() -> SamplingConfig:
    return SamplingConfig(max_new_tokens=6, stop_tokens=(3, 4), pad_token=0)


@pytest.fixture(scope="session")
def policy(config):
    return jax.jit(init_policy, static_argnums=0)(config, jax.random.key(0))


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    """Eight prompts of one to four tokens."""
    lengths = jnp.array([4, 1, 2, 3, 4, 2, 1, 3])
    mask = jnp.arange(4)[None] >= 4 - lengths[:, None]
    tokens = jax.random.randint(jax.random.key(1), (8, 4), 5, 12, jnp.int32)
    return Prompts(tokens=jnp.where(mask, tokens, 0), mask=mask, index=jnp.arange(8, dtype=jnp.int32))
