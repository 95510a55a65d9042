"""A tiny model whose initial weights are large enough for every token to be heard by the ones after it."""

import jax
import pytest

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=20,
        width=16,
        layers=2,
        heads=4,
        key_value_heads=2,
        feed_forward_width=24,
        context_length=16,
        initializer_range=0.4,
    )


@pytest.fixture(scope="session")
def params(config):
    return jax.jit(init_policy, static_argnums=0)(config, jax.random.key(0))
